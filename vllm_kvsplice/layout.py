"""Bytes of a page: the only place that knows where a latent's code lies.

A page holds one block of ``N`` tokens of one layer as a byte matrix [C, N]: byte ``c`` of every token is contiguous, so a
kernel that walks tokens loads 64 of them at once. ``C`` is the layer's `token_bytes`. A token's bytes follow each other
in this order, and every group of 8 latents of width ``b`` takes exactly ``b`` bytes:

    | key: head 0: group 0, group 1, ... | head 1: ... | value: head 0: ... | ... | padding |

Codes never straddle a byte. A width that is no power of two is the sum of planes that are, largest first and holding the
low bits: a group of width 3 is two bytes of 2-bit fields followed by one byte of 1-bit fields:

    byte 0: latents 0..3, bits 1..0     byte 1: latents 4..7, bits 1..0     byte 2: latents 0..7, bit 2

Example: 3 heads of 64 dimensions at a constant width of 3 take 2 * 3 * 8 groups * 3 bytes = 144 bytes a token and layer;
dense bfloat16 takes 768.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

GROUP = 8
MAX_WIDTH = 8
# vLLM views a page in the model's dtype and copies pages whole: sixteen bytes keep every dtype and vector load aligned.
TOKEN_ALIGNMENT = 16

Widths = tuple[tuple[int, ...], ...]


def planes(width: int) -> list[tuple[int, int]]:
    """The fields that make up a code of `width` bits, as (bits of the plane, lowest bit of the code it holds)."""
    found, low = [], 0
    for bits in (8, 4, 2, 1):
        if width - low >= bits:
            found.append((bits, low))
            low += bits
    return found


@dataclass(frozen=True, slots=True)
class BitMap:
    """Where each latent's code lies inside a token, as index tensors of shape [P, R].

    P is the largest number of planes of any width here (at least 1), R = 2 * H * D counts the latents of keys, then
    values, head by head. Planes a latent does not have carry mask 0.
    """

    byte: Tensor
    shift: Tensor
    mask: Tensor
    low: Tensor


@dataclass(frozen=True)
class LayerLayout:
    """Widths of one layer and the bytes that follow from them.

    Attributes:
        key, value: width in bits of each group, [H][D / 8], each 0..8.
        token_bytes: bytes of one token in this layer, padding included. Given only where several tensor-parallel ranks
            must agree on one size; otherwise the smallest multiple of 16 that holds the codes.

    """

    key: Widths
    value: Widths
    token_bytes: int = 0
    code_bytes: int = field(init=False)

    def __post_init__(self) -> None:
        for width in self.widths:
            if not 0 <= width <= MAX_WIDTH:
                raise ValueError(f"width {width} is not between 0 and {MAX_WIDTH} bits")
        code_bytes = sum(map(sum, self.key)) + sum(map(sum, self.value))
        object.__setattr__(self, "code_bytes", code_bytes)
        if not self.token_bytes:
            object.__setattr__(self, "token_bytes", aligned(code_bytes))
        assert self.token_bytes >= code_bytes
        assert self.token_bytes % TOKEN_ALIGNMENT == 0

    @property
    def widths(self) -> list[int]:
        """Of all groups, keys first, head by head."""
        return [width for kind in (self.key, self.value) for head in kind for width in head]

    @property
    def key_bytes(self) -> int:
        """Bytes of a token's keys; its values follow, head by head, up to `code_bytes`."""
        return sum(map(sum, self.key))

    @property
    def value_heads(self) -> list[int]:
        """The head that each byte of a token's values belongs to."""
        return [head for head, widths in enumerate(self.value) for _ in range(sum(widths))]

    def bit_map(self) -> BitMap:
        """Index tensors that let a whole token be packed or unpacked at once."""
        per_latent: list[list[tuple[int, int, int, int]]] = []
        start = 0
        for width in self.widths:
            fields: list[list[tuple[int, int, int, int]]] = [[] for _ in range(GROUP)]
            for bits, low in planes(width):
                per_byte = 8 // bits
                for i in range(GROUP):
                    fields[i].append((start + i // per_byte, (i % per_byte) * bits, (1 << bits) - 1, low))
                start += bits
            per_latent.extend(fields)
        depth = max(1, *(len(f) for f in per_latent))
        padded = [f + [(0, 0, 0, 0)] * (depth - len(f)) for f in per_latent]
        return BitMap(*torch.tensor(padded, dtype=torch.int64).permute(2, 1, 0).unbind())

    def shard(self, heads: Sequence[int], token_bytes: int) -> "LayerLayout":
        """The layout of a rank that holds only `heads`, padded to `token_bytes`."""
        return LayerLayout(tuple(self.key[h] for h in heads), tuple(self.value[h] for h in heads), token_bytes)


def aligned(code_bytes: int) -> int:
    """The smallest page-safe token size that holds `code_bytes`; never 0, because vLLM has no page without bytes."""
    return max(1, -(-code_bytes // TOKEN_ALIGNMENT)) * TOKEN_ALIGNMENT
