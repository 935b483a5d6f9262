"""`tiers`: the rule of thumb that is published with the metrics of attention's Fisher matrix, as a planner.

A head of high trace is critical and keeps all its latents; others keep few, the fewer the worse conditioned they are. The
rule names ranks; a rank of r stands here for the r strongest latents of keys and of values, stored in a tier's bits.
docs/planning.md measures what it is worth.
"""

from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, NamedTuple

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

from calibration.plan import Plan, left_by
from vllm_kvsplice.errors import KVSpliceError
from vllm_kvsplice.layout import GROUP, MAX_WIDTH

# The head size that the rule's ranks are written for.
RULE_HEAD_DIM = 64

# trace, eigmax, cond of one head's attention (`calibration.fim.spectrum`), by (layer, query head).
Metrics = Mapping[tuple[int, int], Mapping[str, float]]
Rank = Annotated[int, Field(ge=GROUP, le=RULE_HEAD_DIM)]
Bits = Annotated[int, Field(ge=1, le=MAX_WIDTH)]


class TierRule(BaseModel):
    """Thresholds of the rule and what follows from them; ranks are those of heads of 64 dimensions and grow with the head.

    Attributes:
        critical_trace: above it a head is critical. compressible_trace: below it a head may be compressed most.
        high_cond, moderate_cond: above them a head is compressed most, and much.
        cond_floor: judge by eigmax / this instead of the measured cond. The tool that the thresholds come from clamps the
            smallest eigenvalue, which is always zero, to 1e-8 (docs/planning.md).
        dominant_eigmax: above it the strongest group of latents is stored in 8 bits whatever the tier.
        critical_bits, high_cond_bits, other_bits: of the latents that are stored.

    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    critical_trace: float = 0.95
    compressible_trace: float = 0.90
    high_cond: float = 1e7
    moderate_cond: float = 1e6
    cond_floor: Annotated[float, Field(gt=0)] | None = None
    dominant_eigmax: float = 0.15
    high_cond_rank: Rank = 8
    moderate_cond_rank: Rank = 16
    other_rank: Rank = 32
    critical_bits: Bits = 8
    high_cond_bits: Bits = 4
    other_bits: Bits = 8


class Tier(NamedTuple):
    """What the rule gives a head: `groups` of latents at `bits`, the first at `first` bits, and why."""

    groups: int
    bits: int
    first: int
    why: str

    @property
    def code_bytes(self) -> int:
        return self.first + (self.groups - 1) * self.bits


@dataclass(frozen=True)
class _Purchases:
    """What heads receive as they grow from nothing to 8 bits, each in proportion to its tier; the rule itself is share 1.

    Attributes:
        share: of the tier's bytes that the head then has, ascending [N].
        place, bits: where in the flat widths [2 * L * H * G], and how many bits more, int64 [N] each.

    """

    share: Tensor
    place: Tensor
    bits: Tensor

    def widths(self, count: int, shape: torch.Size) -> Tensor:
        """Widths [2, L, H, G] after the first `count` purchases."""
        flat = torch.zeros(shape.numel(), dtype=torch.int64)
        return flat.index_add_(0, self.place[:count], self.bits[:count]).view(shape)


def plan_tiers(
    distortion: Tensor, layers: Sequence[int], metrics: Metrics, rule: TierRule, budget_bytes: int | None = None
) -> Plan:
    """The rule's plan; under a budget, with every head's bytes grown or shrunk by one factor until it is filled.

    Args:
        distortion: of each group at widths 0..8, [2, L, H, G, 9].
        layers: the model's numbers of the L layers.
        metrics: of every query head of these layers.
        rule: its thresholds.
        budget_bytes: bytes per token over all L layers.

    Raises:
        KVSpliceError: metrics of a head are missing, or the budget is below 16 bytes a layer.

    """
    shape = distortion.shape[:-1]
    tiers = [[_careful(metrics, layer, head, shape, rule) for head in range(shape[2])] for layer in layers]
    purchases = _purchases(tiers, shape)
    if budget_bytes is None:
        count = int((purchases.share <= 1).sum())
        widths = purchases.widths(count, shape)
    else:
        widths = _filled(purchases, shape, budget_bytes)
    kept = widths.gt(0).sum((0, 3)) * GROUP // 2
    reasons = tuple(
        tuple(f"{tier.why}; {kept[row, head]} of {shape[3] * GROUP} latents" for head, tier in enumerate(heads))
        for row, heads in enumerate(tiers)
    )
    return Plan(widths, left_by(distortion, widths), "tiers", reasons)


def tier_of(metrics: Mapping[str, float], groups: int, rule: TierRule) -> Tier:
    """What the rule says of a head of `groups` groups of latents."""
    trace, cond, eigmax = (metrics[name] for name in ("trace", "cond", "eigmax"))
    if rule.cond_floor is not None:
        cond = eigmax / rule.cond_floor
    if trace > rule.critical_trace:
        name, rank, bits = f"critical (trace {trace:.3f})", RULE_HEAD_DIM, rule.critical_bits
    elif cond > rule.high_cond and trace < rule.compressible_trace:
        name, rank, bits = f"high cond ({cond:.1e}, trace {trace:.3f})", rule.high_cond_rank, rule.high_cond_bits
    elif cond > rule.moderate_cond:
        name, rank, bits = f"moderate cond ({cond:.1e})", rule.moderate_cond_rank, rule.other_bits
    else:
        name, rank, bits = f"no other tier (cond {cond:.1e}, trace {trace:.3f})", rule.other_rank, rule.other_bits
    dominant = eigmax > rule.dominant_eigmax
    why = f"{name}: rank {rank} of {RULE_HEAD_DIM} at {bits} bits" + (
        f", dominant direction (eigmax {eigmax:.2f}) at {MAX_WIDTH} bits" if dominant else ""
    )
    return Tier(max(1, rank * groups // RULE_HEAD_DIM), bits, MAX_WIDTH if dominant else bits, why)


def _careful(metrics: Metrics, layer: int, head: int, shape: torch.Size, rule: TierRule) -> Tier:
    """Of the tiers of all query heads that read this KV head, the one that keeps most."""
    heads = 1 + max((h for at, h in metrics if at == layer), default=-1)
    if not heads or heads % shape[2]:
        raise KVSpliceError(
            f"the FIM metrics have {heads} heads in layer {layer} and the model {shape[2]} KV heads; "
            "make metrics of this model with: kvsplice fim MODEL"
        )
    readers = range(head * heads // shape[2], (head + 1) * heads // shape[2])
    missing = [h for h in readers if not {"trace", "cond", "eigmax"} <= set(metrics.get((layer, h), ()))]
    if missing:
        raise KVSpliceError(
            f"the FIM metrics lack trace, cond or eigmax of layer {layer}, head {missing[0]}; "
            "make metrics of this model with: kvsplice fim MODEL"
        )
    return max((tier_of(metrics[layer, h], shape[3], rule) for h in readers), key=lambda tier: tier.code_bytes)


def _purchases(tiers: Sequence[Sequence[Tier]], shape: torch.Size) -> _Purchases:
    places = torch.arange(shape.numel()).view(shape)
    found = [
        (share, int(place), bits)
        for row, heads in enumerate(tiers)
        for head, tier in enumerate(heads)
        for share, group, bits in _growth(tier, shape[3])
        for place in places[:, row, head, group]
    ]
    found.sort(key=lambda purchase: purchase[0])
    share, place, bits = zip(*found, strict=True)
    return _Purchases(torch.tensor(share, dtype=torch.float64), torch.tensor(place), torch.tensor(bits))


def _growth(tier: Tier, groups: int) -> list[tuple[float, int, int]]:
    """(share of the tier's bytes, group, bits more) of a head's keys or values: first more latents, then wider ones."""
    widths = [tier.first] + [tier.bits] * (groups - 1)
    steps = list(enumerate(widths))
    steps += [(g, 1) for width in range(tier.bits, MAX_WIDTH) for g in range(groups) if widths[g] <= width]
    found, total = [], 0
    for group, bits in steps:
        total += bits
        found.append((total / tier.code_bytes, group, bits))
    return found


def _filled(purchases: _Purchases, shape: torch.Size, budget_bytes: int) -> Tensor:
    """As many purchases as `budget_bytes` pay for, and then what fits the padding of each layer."""

    def plan(count: int) -> Plan:
        return Plan(purchases.widths(count, shape), 0.0)

    count = bisect_right(range(len(purchases.share) + 1), budget_bytes, key=lambda n: plan(n).bytes_per_token) - 1
    if count < 0:
        raise KVSpliceError(
            f"a budget of {budget_bytes} bytes per token is below the {plan(0).bytes_per_token} of the smallest pages; "
            "choose --bits between 1.5 and 8"
        )
    bought = plan(count)
    spare = bought.layer_bytes - bought.widths.sum((0, 2, 3))
    flat, layer_of = bought.widths.flatten(), torch.arange(shape[1])[None, :, None, None].expand(shape).flatten()
    for place, bits in zip(purchases.place[count:].tolist(), purchases.bits[count:].tolist(), strict=True):
        more = min(bits, int(spare[layer_of[place]]))
        flat[place] += more
        spare[layer_of[place]] -= more
    return flat.view(shape)
