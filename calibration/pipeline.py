"""The steps of calibration in order: collect -> plan -> fit -> evaluate -> export."""

import datetime
import importlib.metadata
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from torch import Tensor
from transformers import PreTrainedModel

from calibration import fit
from calibration.attention import AS_STORED, Reading
from calibration.evaluate import Evaluation, Mode, evaluate
from calibration.models import fast_dtype, load_model, longest_context, rotary_of
from calibration.plan import Plan, budget_for_bits, plan_budget
from calibration.statistics import Statistics, collect, fingerprint, load_statistics, save_statistics
from calibration.text import Corpus, calibration_windows, load_corpus, token_windows
from vllm_kvsplice.artifact import (
    Artifact,
    LayerPlan,
    Manifest,
    ModelShape,
    Provenance,
    Quality,
    RotaryShape,
    make_artifact,
    save_artifact,
)
from vllm_kvsplice.errors import KVSpliceError
from vllm_kvsplice.layout import GROUP
from vllm_kvsplice.rotary import Rotary

# Held-out windows behind the quality that an artifact carries; `kvsplice eval` measures more.
QUALITY_WINDOWS = 2
DEFAULT_BITS = 4.0
DEFAULT_CONTEXT = 1024
PACKAGES = ("vllm-kvsplice", "torch", "transformers")

console = Console(stderr=True)


class CalibrationConfig(BaseModel):
    """A recipe, as in `configs/`; unknown keys are errors.

    Attributes:
        bits: average bits per key and value element, 1.5 to 8. budget: bytes per token over all layers instead.
        text: `pydoc`, `wikitext`, a file or a directory.
        tokens: to measure on. seed: of all sampling.
        context: tokens per window; by default 1024, or all that the model reads.

    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    bits: float | None = Field(default=None, ge=1.5, le=8)
    budget: int | None = Field(default=None, ge=1)
    text: str = "pydoc"
    tokens: int = Field(default=16384, ge=256)
    context: int | None = Field(default=None, ge=16)
    seed: int = Field(default=0, ge=0, lt=1 << 63)

    @model_validator(mode="before")
    @classmethod
    def _one_size(cls, settings: Any) -> Any:
        sizes = [name for name in ("bits", "budget") if settings.get(name) is not None]
        if len(sizes) == 2:
            raise ValueError("give bits or budget, not both")
        return settings if sizes else {**settings, "bits": DEFAULT_BITS}

    @property
    def requested(self) -> str:
        return f"{self.bits:g} bits" if self.bits is not None else f"{self.budget} bytes per token"


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
        if {"bits", "budget"} & set(given):
            recipe = {name: value for name, value in recipe.items() if name not in ("bits", "budget")}
        return CalibrationConfig.model_validate(recipe | given)
    except ValidationError as error:
        first = error.errors()[0]
        raise KVSpliceError(f"setting {'.'.join(map(str, first['loc'])) or 'bits'}: {first['msg']}") from error
    except (OSError, yaml.YAMLError, UnicodeDecodeError) as error:
        raise KVSpliceError(f"cannot read the recipe {path} ({error})") from error


def calibrate(model_name: str, out: Path, config: CalibrationConfig, statistics_file: Path | None = None) -> Artifact:
    """Calibrate a model and write its artifact to `out`.

    Args:
        model_name: directory or Hub name of a Hugging Face causal LM.
        out: the artifact's directory, replaced if it holds one.
        config: what to measure on and how large the result may be.
        statistics_file: measurements are kept here, and used from here when they fit model, text and seed.

    Raises:
        KVSpliceError: a mistake of the user's; the message names the way out.

    """
    corpus = load_corpus(config.text)
    model, tokenizer = load_model(model_name, fast_dtype())
    shape = ModelShape.of(model.config)
    if shape.head_dim % GROUP:
        raise KVSpliceError(f"head size {shape.head_dim} is not a multiple of {GROUP} and cannot be compressed")
    longest = longest_context(model)
    context = config.context or min(DEFAULT_CONTEXT, longest)
    if context > longest:
        raise KVSpliceError(f"windows of {context} tokens exceed the {longest} the model reads; lower --context")
    rotary = rotary_of(model)
    windows = calibration_windows(tokenizer, corpus.fit, max(1, config.tokens // context), context)
    held_out = token_windows(tokenizer, corpus.held_out, QUALITY_WINDOWS, context)
    statistics = _measure(model, windows, rotary, config.seed, statistics_file)
    with console.status("Fitting the codec"):
        codec = fit.fit_pca(statistics, lambda distortion: _plan(distortion, config, shape, statistics.layers))
    artifact = make_artifact(
        Manifest(
            model=shape,
            rotary=RotaryShape(pairs=len(rotary.inv_freq), interleaved=rotary.interleaved) if rotary else None,
            layers=_layer_plans(codec.plan, statistics.layers, shape.num_layers),
            provenance=_provenance(model_name, corpus, config, windows),
            quality=None,
            tensors_sha256="0" * 64,
        ),
        codec.tensors | ({"rotary.inv_freq": rotary.inv_freq} if rotary else {}),
    )
    return save_artifact(artifact.with_quality(_judge(model_name, artifact, held_out)), out)


@contextmanager
def steps(description: str, total: int) -> Iterator[Callable[[], None]]:
    """A progress bar on standard error; the callable advances it by one."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console) as progress:
        task = progress.add_task(description, total=total)
        yield lambda: progress.advance(task)


def _measure(
    model: PreTrainedModel, windows: Tensor, rotary: Rotary | None, seed: int, file: Path | None
) -> Statistics:
    key = fingerprint(model, windows, seed) if file else ""
    kept = load_statistics(file, key) if file else None
    if kept:
        console.print(f"Using the measurements in {file}")
        return kept
    with steps("Measuring keys, values and Fisher information", len(windows)) as progress:
        statistics = collect(model, windows, rotary, seed=seed, progress=progress)
    if file:
        save_statistics(statistics, file, key)
    return statistics


def _plan(distortion: Tensor, config: CalibrationConfig, shape: ModelShape, layers: tuple[int, ...]) -> Plan:
    """Spend what the recipe allows; dense layers have no part in it, except that a byte budget pays for them first."""
    if config.budget is None:
        assert config.bits is not None
        return plan_budget(distortion, budget_for_bits(config.bits, distortion[..., 0].numel()))
    dense = (shape.num_layers - len(layers)) * 4 * shape.num_kv_heads * shape.head_dim
    return plan_budget(distortion, config.budget - dense)


def _layer_plans(plan: Plan, layers: tuple[int, ...], num_layers: int) -> tuple[LayerPlan | None, ...]:
    rows = {
        layer: LayerPlan(key=_nested(plan.widths[0, row]), value=_nested(plan.widths[1, row]))
        for row, layer in enumerate(layers)
    }
    return tuple(rows.get(layer) for layer in range(num_layers))


def _nested(widths: Tensor) -> tuple[tuple[int, ...], ...]:
    return tuple(tuple(row) for row in widths.tolist())


def _provenance(model: str, corpus: Corpus, config: CalibrationConfig, windows: Tensor) -> Provenance:
    return Provenance(
        # A path on the machine that calibrated means nothing elsewhere.
        model=Path(model).name if Path(model).exists() else model,
        text=corpus.name,
        text_sha256=corpus.sha256,
        tokens=windows.numel(),
        context=windows.shape[1],
        seed=config.seed,
        fit="pca",
        requested=config.requested,
        created=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        versions={name: importlib.metadata.version(name) for name in PACKAGES},
    )


def _judge(model_name: str, artifact: Artifact, windows: Tensor) -> Quality:
    """Perplexity on held-out text, in float32 because it is a quality figure and not a statistic."""
    evaluation = judge(model_name, artifact, windows, "all", "Judging the codec on held-out text")
    return Quality(
        mode="all",
        baseline_ppl=evaluation.baseline_ppl,
        ppl=evaluation.ppl,
        change_percent=evaluation.change_percent,
        tokens=evaluation.tokens,
        context=windows.shape[1],
    )


def judge(
    model_name: str,
    artifact: Artifact,
    windows: Tensor,
    mode: Mode,
    description: str,
    reading: Reading = AS_STORED,
) -> Evaluation:
    """Evaluate `artifact` on token ids [W, T] with a progress bar; raises `ArtifactError` if it is another model's."""
    model, _ = load_model(model_name, torch.float32)
    artifact.check_model(model.config)
    codecs = {index: artifact.layer(index).to(model.device) for index in artifact.compressed_layers}
    with steps(description, len(windows)) as progress:
        return evaluate(model, codecs, windows, mode, progress, reading)
