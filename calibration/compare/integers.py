"""Min-max quantisation to whole numbers with a float16 scale and zero: of tokens, and of channels as in KIVI."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from calibration.compare.rotation import rotate, unrotate
from calibration.compare.stores import Field, Store

# The smallest normal float16: a group whose elements differ by less is a constant.
SMALLEST_SCALE = 2.0**-14


@dataclass(frozen=True)
class TokenIntegers(Store):
    """Each group of a token's dimensions between its own least and largest element.

    Attributes:
        bits: of a code.
        group: dimensions that share scale and zero, or their largest divisor that fits a head; 0: the whole head.
        rotated: behind a randomised Hadamard transform (QuaRot, arXiv:2404.00456).

    """

    bits: int
    group: int = 0
    rotated: bool = False

    def encode(self, x: Tensor, positions: Tensor) -> tuple[Field, ...]:
        groups = (rotate(x) if self.rotated else x).unflatten(-1, (-1, math.gcd(self.group, x.shape[-1])))
        low, scale = _range(groups, -1, self.bits)
        return Field(_codes(groups, low, scale, self.bits), self.bits), Field.whole(low), Field.whole(scale)

    def decode(self, fields: tuple[Field, ...], positions: Tensor) -> Tensor:
        codes, low, scale = (field.values for field in fields)
        restored = (codes * scale.float() + low.float()).flatten(-2)
        return unrotate(restored) if self.rotated else restored


@dataclass(frozen=True)
class ChannelIntegers(Store):
    """Each dimension of `group` tokens in a row between its own least and largest element (KIVI, arXiv:2402.02750)."""

    bits: int
    group: int

    def encode(self, x: Tensor, positions: Tensor) -> tuple[Field, ...]:
        run, first, last = self._run(positions), positions[0], positions[-1]
        # Where a run is cut short, its tokens next to the cut stand for those that are missing.
        whole = torch.arange(int(run[-1] + 1) * self.group, device=x.device) + first // self.group * self.group
        runs = x[:, whole.clamp(first, last) - first].unflatten(1, (-1, self.group))
        low, scale = (part.squeeze(2) for part in _range(runs, 2, self.bits))
        return Field(_codes(x, low[:, run], scale[:, run], self.bits), self.bits), Field.whole(low), Field.whole(scale)

    def decode(self, fields: tuple[Field, ...], positions: Tensor) -> Tensor:
        codes, low, scale = (field.values for field in fields)
        run = self._run(positions)
        return codes * scale[:, run].float() + low[:, run].float()

    def _run(self, positions: Tensor) -> Tensor:
        """Which row of scales each token has."""
        return positions // self.group - positions[0] // self.group


def _range(x: Tensor, dim: int, bits: int) -> tuple[Tensor, Tensor]:
    """Zero and scale over dimension `dim`, which becomes 1, in float16."""
    least, largest = x.aminmax(dim=dim, keepdim=True)
    low = least.half()
    return low, ((largest - low.float()) / ((1 << bits) - 1)).clamp_min(SMALLEST_SCALE).half()


def _codes(x: Tensor, low: Tensor, scale: Tensor, bits: int) -> Tensor:
    return ((x - low.float()) / scale.float()).round().clamp(0, (1 << bits) - 1).to(torch.uint8)
