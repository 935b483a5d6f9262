"""Which group of latents gets how many bits, and what that is expected to cost."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from vllm_kvsplice.layout import TOKEN_ALIGNMENT
from vllm_kvsplice.names import FitName

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
