"""`manual`: widths as somebody wrote them down, in the JSON of the field's FIM workflow (configs/README.md)."""

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
from torch import Tensor

from calibration.plan import Plan, left_by, spread
from vllm_kvsplice.errors import KVSpliceError
from vllm_kvsplice.layout import GROUP, MAX_WIDTH
from vllm_kvsplice.names import FitName

# Of heads that say nothing and where nothing is said for all.
DEFAULT_BITS = 4
DENSE_BYTES = 2

Algorithm = Literal[FitName, "none"]
Share = Annotated[float, Field(ge=0, lt=1)]
Bits = Annotated[int, Field(ge=1, le=MAX_WIDTH)]

# What tools write beside their decisions. It decides nothing.
REMARKS = (
    *("comment", "stats", "compression_summary", "expected_kv_memory_savings", "expected_quality_degradation"),
    *("fim_stats_source", "n_head", "n_kv_heads"),
)
_KEY = re.compile(r"(?:layer)?(\d+)/(?:head)?(\d+)")


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Size(_Strict):
    """Of keys, values or both: `rank` latents of `bits` each; `compression_ratio` is the share of latents left out."""

    rank: int | None = Field(default=None, ge=0)
    bits: Bits | None = None
    compression_ratio: Share | None = None

    @property
    def given(self) -> bool:
        return (self.rank, self.bits, self.compression_ratio) != (None, None, None)

    def widths(self, groups: int) -> Tensor:
        """Widths [G]; a rank is rounded up to whole groups, and without a width its latents have 8 bits."""
        rank = self.rank
        if rank is None and self.compression_ratio is not None:
            rank = round((1 - self.compression_ratio) * groups * GROUP)
        kept = groups if rank is None else -(-rank // GROUP)
        width = self.bits or MAX_WIDTH
        return torch.tensor([width] * kept + [0] * (groups - kept))


class Head(Size):
    """One head: its size, or those of its keys and values; `enabled` false: 8 bits, the finest code there is."""

    enabled: bool = True
    algo: Algorithm | None = None
    d_k: int | None = None
    d_v: int | None = None
    key: Size | None = None
    value: Size | None = None
    reason: str = ""
    category: str = ""

    @property
    def off(self) -> bool:
        return not self.enabled or self.algo == "none"


class Everywhere(Size):
    """What holds for every head that says nothing else."""

    algo_default: FitName | None = None
    target_memory_reduction: Share | None = None
    d_head: int | None = None
    d_k: int | None = None
    d_v: int | None = None


class ManualConfig(_Strict):
    """The whole file; what stands in `global` may as well stand beside it."""

    everywhere: Everywhere = Field(default=Everywhere(), alias="global")
    per_layer_head: dict[str, Head] = {}

    @model_validator(mode="before")
    @classmethod
    def _gather(cls, content: Any) -> Any:
        if not isinstance(content, dict):
            raise ValueError("the file holds no JSON object")
        settings = {
            name: value for name, value in content.items() if name not in ("global", "per_layer_head", *REMARKS)
        }
        inner = content.get("global", {})
        if not isinstance(inner, dict):
            raise ValueError("global is no JSON object")
        inner = {name: value for name, value in inner.items() if name not in REMARKS}
        twice = sorted(set(inner) & set(settings))
        if twice:
            raise ValueError(f"{twice[0]} stands in global and beside it")
        return {"global": inner | settings, "per_layer_head": content.get("per_layer_head", {})}


def read_manual(file: Path) -> ManualConfig:
    """The configuration in a JSON file.

    Raises:
        KVSpliceError: it is missing, not JSON, names a setting that does not exist, or one twice.

    """
    try:
        return ManualConfig.model_validate(json.loads(file.read_text(), object_pairs_hook=_once))
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(map(str, first["loc"]))
        raise KVSpliceError(
            f"{file}: {place or 'the file'}: {first['msg']}; configs/README.md lists what can be set"
        ) from error
    except (OSError, UnicodeDecodeError, ValueError) as error:
        raise KVSpliceError(f"cannot read the plan {file} ({error})") from error


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"{next(name for name in names if names.count(name) > 1)!r} is set twice")
    return found


def plan_manual(distortion: Tensor, layers: Sequence[int], config: ManualConfig) -> Plan:
    """The plan that `config` describes; `distortion` is [2, L, H, G, 9] of the model's `layers`.

    Heads without settings of their own take those of `global`; with `target_memory_reduction` they share what others leave.

    Raises:
        KVSpliceError: it names a head that the model has not, a size that does not fit, or a target out of reach.

    """
    shape = distortion.shape[:-1]
    _check_sizes(config.everywhere, "global", shape)
    widths = (config.everywhere if config.everywhere.given else Size(bits=DEFAULT_BITS)).widths(shape[3])
    widths = widths.expand(shape).clone()
    reasons = [["as every head without settings of its own"] * shape[2] for _ in layers]
    fits = [[config.everywhere.algo_default] * shape[2] for _ in layers]
    free = torch.ones(shape[1:3], dtype=torch.bool)
    for key, head in config.per_layer_head.items():
        row, column = _place(key, layers, shape)
        if not free[row, column]:
            raise KVSpliceError(f"per_layer_head {key!r} sets a head that another name has set already")
        _check_sizes(head, key, shape)
        for kind, own in enumerate((head.key, head.value)):
            widths[kind, row, column] = _size(head, own, config.everywhere).widths(shape[3])
        free[row, column] = False
        if head.algo and head.algo != "none":
            fits[row][column] = head.algo
        reasons[row][column] = head.reason or ("left in 8 bits as written" if head.off else "as written")
    if config.everywhere.target_memory_reduction is not None:
        widths = _shared(widths, free, shape, config.everywhere.target_memory_reduction)
    return Plan(widths, left_by(distortion, widths), "manual", tuple(map(tuple, reasons)), tuple(map(tuple, fits)))


def _size(head: Head, own: Size | None, everywhere: Everywhere) -> Size:
    """Of a head's keys or values: what they leave open is the head's, and what that leaves open everyone's."""
    if head.off:
        return Size(bits=MAX_WIDTH)
    given = [size for size in (own, head, everywhere) if size is not None and size.given]
    if not given:
        return Size(bits=DEFAULT_BITS)
    latents = next((size for size in given if (size.rank, size.compression_ratio) != (None, None)), given[0])
    bits = next((size.bits for size in given if size.bits is not None), None)
    return Size(rank=latents.rank, compression_ratio=latents.compression_ratio, bits=bits)


def _place(key: str, layers: Sequence[int], shape: torch.Size) -> tuple[int, int]:
    """Row and head of ``"6/8"``."""
    found = _KEY.fullmatch(key.strip())
    if not found:
        raise KVSpliceError(f'per_layer_head {key!r} is not of the form "LAYER/HEAD", as in "6/8"')
    layer, head = map(int, found.groups())
    if layer not in layers:
        raise KVSpliceError(
            f"per_layer_head {key}: layer {layer} has no cache to compress; layers with one: {list(layers)}"
        )
    if head >= shape[2]:
        raise KVSpliceError(
            f"per_layer_head {key}: this model caches {shape[2]} KV heads a layer, numbered 0 to {shape[2] - 1}; "
            "query heads share them"
        )
    return list(layers).index(layer), head


def _check_sizes(settings: Head | Everywhere, name: str, shape: torch.Size) -> None:
    dim = shape[3] * GROUP
    for field in ("d_head", "d_k", "d_v"):
        given = getattr(settings, field, None)
        if given not in (None, dim):
            raise KVSpliceError(f"{name}: {field} is {given}, but the heads of this model have {dim} dimensions")
    for size in (settings, getattr(settings, "key", None), getattr(settings, "value", None)):
        if size is not None and size.rank is not None and size.rank > dim:
            raise KVSpliceError(f"{name}: rank {size.rank} exceeds the {dim} dimensions of a head")


def _shared(widths: Tensor, free: Tensor, shape: torch.Size, reduction: float) -> Tensor:
    """`widths` with equal bytes for all `free` heads [L, H], as many as the target leaves."""
    kinds, layers, heads, groups = shape
    target = int((1 - reduction) * kinds * layers * heads * groups * GROUP * DENSE_BYTES)
    for head_bytes in range(groups * MAX_WIDTH, 0, -1):
        tried = torch.where(free[None, :, :, None], spread(head_bytes, groups), widths)
        if Plan(tried, 0.0).bytes_per_token <= target:
            return tried
    raise KVSpliceError(
        f"target_memory_reduction {reduction:g} leaves {target} bytes per token, fewer than the heads set by hand take; "
        "lower the target or give these heads fewer latents or bits"
    )
