"""What a store is: numbers of known size, and the vectors that come back from them."""

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Field:
    """Numbers that a store keeps: whole ones in 0..2**bits - 1, or of any kind in all the bits of their dtype."""

    values: Tensor
    bits: int

    def __post_init__(self) -> None:
        own = 8 * self.values.element_size()
        codes = not self.values.is_floating_point() and self.values.min() >= 0 and self.values.max() < 1 << self.bits
        assert self.bits == own or codes, f"numbers that do not fit into {self.bits} bits"

    @classmethod
    def whole(cls, values: Tensor) -> "Field":
        """Every number in all the bits of its dtype."""
        return cls(values, 8 * values.element_size())

    @property
    def size(self) -> int:
        """In bits."""
        return self.values.numel() * self.bits


class Store(ABC):
    """Keys or values of a layer, [H, T, D] at ascending `positions` [T], as numbers and back."""

    @abstractmethod
    def encode(self, x: Tensor, positions: Tensor) -> tuple[Field, ...]:
        """All that is kept of float32 vectors `x`."""

    @abstractmethod
    def decode(self, fields: tuple[Field, ...], positions: Tensor) -> Tensor:
        """The vectors that `fields` stand for, float32 [H, T, D]."""

    def restore(self, x: Tensor, positions: Tensor) -> Tensor:
        """`x` as it is read back."""
        return self.decode(self.encode(x, positions), positions)

    def size(self, tokens: int, dim: int, heads: int = 1) -> int:
        """Bits of the first `tokens` tokens of `heads` heads, counted on the fields of as many zeros."""
        if not tokens:
            return 0
        return sum(field.size for field in self.encode(torch.zeros(heads, tokens, dim), torch.arange(tokens)))


@dataclass(frozen=True)
class Float(Store):
    """Every element in a float of fewer bits; what is out of its range becomes its largest, as in vLLM's kernels.

    An fp8 cache of vLLM has scale 1 for keys and for values unless the checkpoint brings scales
    (vllm/model_executor/layers/quantization/kv_cache.py).
    """

    dtype: torch.dtype

    def encode(self, x: Tensor, positions: Tensor) -> tuple[Field, ...]:
        largest = torch.finfo(self.dtype).max
        return (Field.whole(x.clamp(-largest, largest).to(self.dtype)),)

    def decode(self, fields: tuple[Field, ...], positions: Tensor) -> Tensor:
        return fields[0].values.float()


BFLOAT16 = Float(torch.bfloat16)
FP8 = Float(torch.float8_e4m3fn)
