"""A recipe: what to measure on, who plans, and how large the result may be."""

from pathlib import Path
from typing import Annotated, Any

import yaml
from pydantic import BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from calibration.planners import PlannerSettings
from vllm_kvsplice.engines import MAX_WINDOW
from vllm_kvsplice.errors import KVSpliceError
from vllm_kvsplice.names import FitName

DEFAULT_BITS = 4.0
DEFAULT_STEPS = 300
SIZES = ("bits", "budget", "max_ppl_increase")
# Settings of a recipe that an option on the command line stands in for, beside its own.
_REPLACES = dict.fromkeys(SIZES, SIZES) | {"plan": (*SIZES, "fim"), "planner": ("plan", "fim")}


def _percent(given: Any) -> Any:
    """``1%`` and ``1`` are both 1."""
    return given.strip().removesuffix("%") if isinstance(given, str) else given


class CalibrationConfig(PlannerSettings):
    """A recipe, as in `configs/`; unknown keys are errors.

    Attributes:
        bits: average bits per key and value element, 1.5 to 8. budget: bytes per token over all layers instead.
        max_ppl_increase: in percent; instead of a size, the smallest one that keeps to it.
        fit: the fitting algorithm (`calibration.fit.FITS`).
        finetune: whether to train the codec on what the model says afterwards. steps: of that training, by default 300.
        text: `pydoc`, `wikitext`, a file or a directory.
        tokens: to measure on. seed: of all sampling.
        context: tokens per window; by default 1024, or all that the model reads.
        recent: W of the exact window that the codec will be read beside: what only its tokens read needs fewer bits.

    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    bits: float | None = Field(default=None, ge=1.5, le=8)
    budget: int | None = Field(default=None, ge=1)
    max_ppl_increase: Annotated[float | None, BeforeValidator(_percent), Field(gt=0)] = None
    fit: FitName = "pca"
    finetune: bool = False
    steps: int | None = Field(default=None, ge=1)
    text: str = "pydoc"
    tokens: int = Field(default=16384, ge=256)
    context: int | None = Field(default=None, ge=16)
    seed: int = Field(default=0, ge=0, lt=1 << 63)
    recent: int = Field(default=0, ge=0, le=MAX_WINDOW)

    @model_validator(mode="before")
    @classmethod
    def _sound(cls, settings: Any) -> Any:
        sizes = [name for name in SIZES if settings.get(name) is not None]
        if len(sizes) > 1:
            raise ValueError(f"give {sizes[0]} or {sizes[1]}, not both")
        if (settings.get("planner") == "manual") != (settings.get("plan") is not None):
            raise ValueError("planner manual and a plan file go together: give both, or neither")
        if settings.get("planner") == "manual" and sizes:
            raise ValueError(f"a plan made by hand has its own size; leave {sizes[0]} out")
        if settings.get("fim") is not None and settings.get("planner") != "tiers":
            raise ValueError("only planner tiers reads FIM metrics; choose it, or leave fim out")
        if settings.get("steps") is not None and not settings.get("finetune"):
            raise ValueError("steps are those of finetune; switch it on, or leave steps out")
        own_size = settings.get("planner") in ("manual", "tiers")
        return settings if sizes or own_size else {**settings, "bits": DEFAULT_BITS}

    @property
    def training_steps(self) -> int:
        return (self.steps or DEFAULT_STEPS) if self.finetune else 0

    @property
    def requested(self) -> str:
        if self.bits is not None:
            return f"{self.bits:g} bits"
        if self.budget is not None:
            return f"{self.budget} bytes per token"
        if self.max_ppl_increase is not None:
            return f"perplexity +{self.max_ppl_increase:g} % at most"
        return "the size that its rules give"


def read_config(path: Path | None, **options: Any) -> CalibrationConfig:
    """The recipe in a YAML file, with the options given on the command line (those not None) in place of its own.

    Raises:
        KVSpliceError: the file is missing or not a mapping, or a value is out of range.

    """
    try:
        recipe = yaml.safe_load(path.read_text()) or {} if path else {}
        if not isinstance(recipe, dict):
            raise KVSpliceError(f"{path} is not a mapping of settings")
        given = {name: value for name, value in options.items() if value is not None}
        replaced = {setting for name in given for setting in _REPLACES.get(name, ())}
        recipe = {name: value for name, value in recipe.items() if name not in replaced}
        return CalibrationConfig.model_validate(recipe | given)
    except ValidationError as error:
        first = error.errors()[0]
        place = f"setting {'.'.join(map(str, first['loc']))}: " if first["loc"] else ""
        raise KVSpliceError(place + first["msg"].removeprefix("Value error, ")) from error
    except (OSError, yaml.YAMLError, UnicodeDecodeError) as error:
        raise KVSpliceError(f"cannot read the recipe {path} ({error})") from error
