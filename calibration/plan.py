"""Which group of latents gets how many bits: reverse water-filling on measured, Fisher-weighted distortion.

The loss grows by about half the Fisher-weighted error of every key and value, so errors of different layers,
heads and kinds are in one currency and one budget serves them all (Cover & Thomas, Elements of Information Theory,
section 10.3.3, with measured rate-distortion curves in place of the Gaussian's).
"""

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from vllm_kvsplice.errors import KVSpliceError
from vllm_kvsplice.layout import GROUP, MAX_WIDTH, TOKEN_ALIGNMENT

FitName = Literal["pca", "pca_spline", "pca_uniform", "kvsplice", "kvsplice_spline", "kvsplice_uniform"]


# What a float can still be raised to.
_LARGEST_EXPONENT = 700.0


@dataclass(frozen=True)
class Plan:
    """What every planner gives (`calibration.planners`) and calibration takes.

    Attributes:
        widths: in bits, int64 [2, L, H, G] (keys, then values).
        distortion: what errors are expected to cost per token, Fisher-weighted (docs/codec.md), in nats.
        planner: what chose them.
        reasons: why, one sentence for each head, [L][H].
        fits: fitting algorithms (`calibration.fit.FITS`) of heads that have one of their own, None elsewhere, [L][H].

    """

    widths: Tensor
    distortion: float
    planner: str = "budget"
    reasons: tuple[tuple[str, ...], ...] = ()
    fits: tuple[tuple[FitName | None, ...], ...] = ()

    @property
    def layer_bytes(self) -> Tensor:
        """Bytes of one token in each layer, padding included, int64 [L]."""
        steps = (self.widths.sum((0, 2, 3)) + TOKEN_ALIGNMENT - 1) // TOKEN_ALIGNMENT
        return steps.clamp_min(1) * TOKEN_ALIGNMENT

    @property
    def bytes_per_token(self) -> int:
        """Bytes of one token in all L layers, padding included."""
        return int(self.layer_bytes.sum())

    @property
    def expected_increase(self) -> float:
        """Relative growth of perplexity that the distortion stands for (0.01 is 1 %).

        To second order an error e in a key or value costs e^T G e / 2 nats, G its Fisher matrix (docs/planning.md has the
        expectation beside measurements).
        """
        return math.expm1(min(self.distortion / 2, _LARGEST_EXPONENT))


def left_by(distortion: Tensor, widths: Tensor) -> float:
    """Distortion that `widths` [2, L, H, G] leave of what is possible [2, L, H, G, 9]."""
    return float(distortion.gather(-1, widths[..., None]).sum())


def spread(code_bytes: int, groups: int) -> Tensor:
    """Widths [G] of a head that takes `code_bytes` a token, as even as whole bits allow: the strongest latents first."""
    width, more = divmod(code_bytes, groups)
    return torch.tensor([width + 1] * more + [width] * (groups - more))


def budget_for_bits(bits: float, num_groups: int) -> int:
    """Bytes per token that `num_groups` groups of 8 latents take at an average of `bits` per latent."""
    return int(bits * num_groups * GROUP / 8)


def budget_range(distortion: Tensor) -> tuple[int, int]:
    """The least and the most bytes per token that `plan_budget` takes for [2, L, H, G, 9]."""
    kinds, layers, heads, groups, _ = distortion.shape
    return layers * TOKEN_ALIGNMENT, layers * kinds * heads * groups * MAX_WIDTH


def plan_budget(distortion: Tensor, budget_bytes: int) -> Plan:
    """The widths that leave the least distortion in `budget_bytes` per token over all layers.

    Every layer's bytes come out as a multiple of 16, the size that pages are padded to, so no budget is lost to padding.

    Args:
        distortion: Fisher-weighted cost of each group at widths 0..8, [2, L, H, G, 9].
        budget_bytes: bytes per token over all L layers.

    Raises:
        KVSpliceError: the budget is below one 16-byte step per layer or above 8 bits everywhere.

    """
    kinds, layers, heads, groups, _ = distortion.shape
    per_layer = distortion.transpose(0, 1).reshape(layers, kinds * heads * groups, MAX_WIDTH + 1)
    least, most = budget_range(distortion)
    if not least <= budget_bytes <= most:
        raise KVSpliceError(
            f"a budget of {budget_bytes} bytes per token is outside {least}..{most} for {layers} layers; "
            f"choose --bits between {max(1.5, MAX_WIDTH * least / most):.3g} and {MAX_WIDTH}"
        )
    # A bit is only on offer after the bits below it: make each group's gains fall.
    gains = (per_layer[..., :-1] - per_layer[..., 1:]).cummin(-1).values.flatten(1)
    order = gains.sort(dim=1, descending=True, stable=True)
    steps = order.values.unflatten(1, (-1, TOKEN_ALIGNMENT)).sum(-1)
    bought = torch.zeros_like(steps, dtype=torch.bool)
    bought[:, 0] = True
    ranked = steps[:, 1:].flatten().sort(dim=0, descending=True, stable=True).indices
    chosen = ranked[: budget_bytes // TOKEN_ALIGNMENT - layers]
    bought[:, 1:] = torch.zeros(steps[:, 1:].numel(), dtype=torch.bool).index_fill(0, chosen, True).view(layers, -1)
    bits = torch.zeros_like(gains, dtype=torch.int64)
    bits.scatter_(1, order.indices, bought.repeat_interleave(TOKEN_ALIGNMENT, 1).long())
    widths = bits.unflatten(1, (-1, MAX_WIDTH)).sum(-1)
    widths = widths.view(layers, kinds, heads, groups).transpose(0, 1).contiguous()
    return Plan(widths, left_by(distortion, widths))
