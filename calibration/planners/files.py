"""A plan as a file: what ``kvsplice plan`` writes, people read and change, and calibration takes."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from torch import Tensor

from calibration.plan import Plan, left_by
from vllm_kvsplice.errors import KVSpliceError
from vllm_kvsplice.layout import GROUP, MAX_WIDTH
from vllm_kvsplice.names import FitName

Widths = tuple[Annotated[int, Field(ge=0, le=MAX_WIDTH)], ...]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class HeadDecision(_Strict):
    """Width in bits of each group of 8 latents of a KV head, why, and what fits it where that is not the recipe's."""

    head: int
    key: Widths
    value: Widths
    reason: str = ""
    fit: FitName | None = None


class LayerDecision(_Strict):
    """One layer of the model; every layer whose cache is compressed is listed."""

    layer: int
    heads: tuple[HeadDecision, ...]


class Point(_Strict):
    """A size that the budget planner could be given instead, and what it would cost."""

    bytes_per_token: int
    expected_percent: float


class PlanFile(_Strict):
    """A plan and what to expect of it. Only `layers` decides; the rest is there to be read.

    Attributes:
        bytes_per_token, baseline_bytes_per_token: over all layers of the model, dense ones included.
        expected_percent: growth of perplexity that the planner expects.
        curve: the same for other sizes, the best plan for each.

    """

    format: Literal["kvsplice-plan"] = "kvsplice-plan"
    version: Literal[1] = 1
    planner: str
    model: str = ""
    bytes_per_token: Annotated[int, Field(ge=1)]
    baseline_bytes_per_token: Annotated[int, Field(ge=1)]
    memory_saving_percent: float
    expected_percent: float
    curve: tuple[Point, ...] = ()
    layers: Annotated[tuple[LayerDecision, ...], Field(min_length=1)]

    @property
    def bits_per_element(self) -> float:
        return 16 * self.bytes_per_token / self.baseline_bytes_per_token


def describe(
    plan: Plan, layers: Sequence[int], model: str, dense_layers: int, curve: Sequence[tuple[int, float]] = ()
) -> PlanFile:
    """`plan` for the model's `layers` as a file; `dense_layers` more stay as they are.

    `curve` has pairs of bytes per token in all layers and the growth of perplexity expected there (0.01 is 1 %).
    """
    kinds, count, heads, groups = plan.widths.shape
    per_layer = 2 * kinds * heads * groups * GROUP
    size, baseline = plan.bytes_per_token + dense_layers * per_layer, (count + dense_layers) * per_layer
    reasons = plan.reasons or ((("",) * heads),) * count
    fits = plan.fits or ((None,) * heads,) * count
    return PlanFile(
        planner=plan.planner,
        model=model,
        bytes_per_token=size,
        baseline_bytes_per_token=baseline,
        memory_saving_percent=100 * (1 - size / baseline),
        expected_percent=100 * plan.expected_increase,
        curve=tuple(Point(bytes_per_token=b, expected_percent=100 * increase) for b, increase in curve),
        layers=tuple(
            LayerDecision(layer=layer, heads=tuple(_decisions(*decisions)))
            for layer, *decisions in zip(layers, *plan.widths.tolist(), reasons, fits, strict=True)
        ),
    )


def _decisions(
    key: list[list[int]], value: list[list[int]], reasons: Sequence[str], fits: Sequence[FitName | None]
) -> list[HeadDecision]:
    rows = enumerate(zip(key, value, reasons, fits, strict=True))
    return [HeadDecision(head=h, key=tuple(k), value=tuple(v), reason=why, fit=fit) for h, (k, v, why, fit) in rows]


def is_plan_file(file: Path) -> bool:
    """Whether `file` is JSON of this format, and not a configuration written by hand."""
    try:
        content = json.loads(file.read_text())
    except (OSError, ValueError) as error:
        raise KVSpliceError(f"cannot read the plan {file} ({error})") from error
    return isinstance(content, dict) and content.get("format") == PlanFile.model_fields["format"].default


def load_plan_file(file: Path) -> PlanFile:
    """The plan in `file`; raises `KVSpliceError` if it is none."""
    try:
        return PlanFile.model_validate_json(file.read_bytes())
    except (ValidationError, OSError) as error:
        place = ".".join(map(str, error.errors()[0]["loc"])) if isinstance(error, ValidationError) else str(error)
        raise KVSpliceError(f"{file} is no plan ({place}); make one with: kvsplice plan MODEL --out {file}") from error


def read_plan(file: Path, distortion: Tensor, layers: Sequence[int]) -> Plan:
    """The plan in `file` for a model of `layers` and `distortion` [2, L, H, G, 9].

    Raises:
        KVSpliceError: it is a plan for a model of another shape.

    """
    content = load_plan_file(file)
    heads = [[(h.head, len(h.key), len(h.value)) for h in layer.heads] for layer in content.layers]
    _, _, count, groups, _ = distortion.shape
    expected = [[(h, groups, groups) for h in range(count)]] * len(layers)
    if [layer.layer for layer in content.layers] != list(layers) or heads != expected:
        raise KVSpliceError(
            f"{file} is a plan for another model, or not for all of its layers and heads: this one has layers "
            f"{layers[0]} to {layers[-1]} ({len(layers)}) of {count} KV heads with {groups} groups each; "
            "make one with: kvsplice plan MODEL"
        )
    widths = torch.tensor(
        [[[getattr(h, kind) for h in layer.heads] for layer in content.layers] for kind in ("key", "value")]
    )
    reasons = tuple(tuple(h.reason for h in layer.heads) for layer in content.layers)
    fits = tuple(tuple(h.fit for h in layer.heads) for layer in content.layers)
    return Plan(widths, left_by(distortion, widths), content.planner, reasons, fits)
