"""Rotary position embedding as a linear map R(position), for every variant whose angle is linear in the position."""

from dataclasses import dataclass, field

import torch
from torch import Tensor

# Tables grow in steps of this many positions, so that a decoding sequence does not rebuild them every token.
_TABLE_STEP = 4096


@dataclass(slots=True)
class Rotary:
    """R(j) rotates pair i of a vector by the angle ``j * inv_freq[i]`` (RoFormer, arXiv:2104.09864).

    Covers default, linear, NTK-aware, llama3 and YaRN scaling (they only change ``inv_freq``), partial rotation
    (dimensions past ``2 * len(inv_freq)`` stay as they are) and both ways of pairing dimensions. A constant attention
    scaling needs no place here: means are measured on scaled keys and so contain it.

    Attributes:
        inv_freq: radians per position, float32 [F].
        interleaved: True pairs dimensions (2i, 2i+1) as GPT-J does, False pairs (i, i+F) as Llama does.
        skips: the model's layers whose keys are not rotated (NoPE, arXiv:2501.18795).

    """

    inv_freq: Tensor
    interleaved: bool = False
    skips: tuple[int, ...] = ()
    _cos: Tensor = field(init=False, repr=False)
    _sin: Tensor = field(init=False, repr=False)
    _moved: dict[torch.device, "Rotary"] = field(init=False, repr=False, default_factory=dict)

    def __post_init__(self) -> None:
        self._cos = self._sin = self.inv_freq.new_empty(0, len(self.inv_freq))

    def to(self, device: torch.device) -> "Rotary":
        """The same on `device`, one for all layers that ask: its tables grow with the longest sequence."""
        if device == self.inv_freq.device:
            return self
        if device not in self._moved:
            self._moved[device] = Rotary(self.inv_freq.to(device), self.interleaved, self.skips)
        return self._moved[device]

    def at(self, layer: int) -> "Rotary | None":
        """The rotation of the keys of `layer`, None where they are not rotated."""
        return None if layer in self.skips else self

    def rotate(self, x: Tensor, positions: Tensor) -> Tensor:
        """R(positions) x.

        Args:
            x: vectors [..., T, D], float32.
            positions: int64 [T], each at least 0.

        """
        cos, sin = self._tables(positions)
        return self._apply(x, cos, sin)

    def unrotate(self, x: Tensor, positions: Tensor) -> Tensor:
        """R(positions)^-1 x; arguments as in `rotate`."""
        cos, sin = self._tables(positions)
        return self._apply(x, cos, -sin)

    def _tables(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        needed = int(positions.max()) + 1 if positions.numel() else 0
        if needed > self._cos.shape[0]:
            length = -(-needed // _TABLE_STEP) * _TABLE_STEP
            angles = torch.outer(torch.arange(length, dtype=torch.float64), self.inv_freq.double().cpu())
            self._cos = angles.cos().float().to(self.inv_freq.device)
            self._sin = angles.sin().float().to(self.inv_freq.device)
        return self._cos[positions], self._sin[positions]

    def _apply(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        pairs = self.inv_freq.shape[0]
        rotated, rest = x[..., : 2 * pairs], x[..., 2 * pairs :]
        if self.interleaved:
            first, second = rotated[..., 0::2], rotated[..., 1::2]
        else:
            first, second = rotated[..., :pairs], rotated[..., pairs:]
        turned = (first * cos - second * sin, first * sin + second * cos)
        joined = torch.stack(turned, -1).flatten(-2) if self.interleaved else torch.cat(turned, -1)
        return torch.cat((joined, rest), -1) if rest.shape[-1] else joined
