"""The code of one layer: residual, latent, code, and back (design: docs/codec.md).

    residual  u = x - m(position)          m: mean of the head; rotated to the position for keys
    latent    z = E u                      E [R, D]: analysis, rows scaled to the unit of their codebook
    code      c_i = nearest level of z_i in the codebook of its group; levels are whole numbers
    decode    x = m(position) + D z        D [D, R]: synthesis

Everything here is float32 tensors in the open: engines read these fields, and `LayerCodec.reconstruct` is the definition
that every engine is tested against.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import torch
from torch import Tensor

from vllm_kvsplice.layout import GROUP, MAX_WIDTH, BitMap, LayerLayout
from vllm_kvsplice.rotary import Rotary

Kind = Literal["key", "value"]
LEVELS = 1 << MAX_WIDTH
# Levels are whole numbers of eight bits, so that engines may sum products of them in integers.
LOWEST_LEVEL, HIGHEST_LEVEL = -128, 127


@dataclass(frozen=True)
class KindCodec:
    """The keys' or the values' half of a layer. H heads, D head dimensions, R = D latents, G = D / 8 groups.

    Attributes:
        mean: [H, D]; of keys before rotation.
        analysis: E, [H, R, D]. synthesis: D, [H, D, R]. Both are zero where a latent has no bits.
        levels: codebooks, [H, G, 256], whole numbers in -128..127; a group of width b uses the first 2**b, ascending, the
            rest repeat the last.
        sink: what stands at position 0 in place of the mean, [H, D] (keys at position 0 are not rotated).
        sink_scale: standard deviation of each latent at position 0 as a share of its ordinary one, [H, R]: codes there
            count in these units. 0 where position 0 *is* the sink and its code is ignored.

    """

    mean: Tensor
    analysis: Tensor
    synthesis: Tensor
    levels: Tensor
    sink: Tensor
    sink_scale: Tensor

    def shard(self, heads: Sequence[int]) -> "KindCodec":
        """The same for a rank that holds only `heads`."""
        index = torch.as_tensor(heads, device=self.mean.device)
        return KindCodec(*(tensor[index] for tensor in vars(self).values()))

    def to(self, device: torch.device) -> "KindCodec":
        return KindCodec(*(tensor.to(device) for tensor in vars(self).values()))


@dataclass(frozen=True)
class LayerCodec:
    """Codec of one layer. `rotary` is None for models whose keys carry no rotary position."""

    key: KindCodec
    value: KindCodec
    layout: LayerLayout
    rotary: Rotary | None

    @property
    def num_kv_heads(self) -> int:
        return self.key.mean.shape[0]

    @property
    def head_dim(self) -> int:
        return self.key.mean.shape[1]

    @cached_property
    def bits(self) -> BitMap:
        fields = self.layout.bit_map()
        device = self.key.mean.device
        return BitMap(fields.byte.to(device), fields.shift.to(device), fields.mask.to(device), fields.low.to(device))

    @cached_property
    def analysis(self) -> Tensor:
        """Of keys and values, float64 [2, H, R, D]."""
        return torch.stack((self.key.analysis, self.value.analysis)).double()

    @cached_property
    def synthesis(self) -> Tensor:
        """Of keys and values, float64 [2, H, D, R]."""
        return torch.stack((self.key.synthesis, self.value.synthesis)).double()

    @cached_property
    def sink_scale(self) -> Tensor:
        """Of keys and values, [2, H, R]."""
        return torch.stack((self.key.sink_scale, self.value.sink_scale))

    @cached_property
    def thresholds(self) -> Tensor:
        """Decision boundaries, [2 * H * D, 255]: midpoints between neighbouring levels, +inf past the last."""
        levels = torch.stack((self.key.levels, self.value.levels)).flatten(0, 2)
        midpoints = (levels[:, 1:] + levels[:, :-1]) / 2
        midpoints = midpoints.masked_fill(levels[:, 1:] <= levels[:, :-1], torch.inf)
        return midpoints.repeat_interleave(GROUP, 0).contiguous()

    @cached_property
    def _level_table(self) -> tuple[Tensor, Tensor]:
        """All codebooks end to end, and where each latent's begins."""
        levels = torch.stack((self.key.levels, self.value.levels))
        groups = torch.arange(levels.flatten(0, 2).shape[0], device=levels.device)
        return levels.flatten(), groups.repeat_interleave(GROUP) * LEVELS

    @cached_property
    def spacing(self) -> tuple[Tensor, Tensor] | None:
        """Where the levels of all groups are evenly spaced: level = step * code + offset, [2 * H * G] each."""
        levels = torch.stack((self.key.levels, self.value.levels)).flatten(0, 2)
        sizes = 1 << torch.tensor(self.layout.widths, device=levels.device)
        step, offset = levels[:, 1] - levels[:, 0], levels[:, 0]
        code = torch.arange(LEVELS, device=levels.device).minimum(sizes[:, None] - 1)
        return (step, offset) if torch.equal(levels, step[:, None] * code + offset[:, None]) else None

    def shard(self, heads: Sequence[int], token_bytes: int) -> "LayerCodec":
        """The codec of a tensor-parallel rank that holds only `heads`, in pages of `token_bytes` a token."""
        layout = self.layout.shard(heads, token_bytes)
        return LayerCodec(self.key.shard(heads), self.value.shard(heads), layout, self.rotary)

    def to(self, device: torch.device) -> "LayerCodec":
        if self.key.mean.device == device:
            return self
        rotary = self.rotary and self.rotary.to(device)
        return LayerCodec(self.key.to(device), self.value.to(device), self.layout, rotary)

    def __deepcopy__(self, memo: dict[int, object]) -> "LayerCodec":
        """Nothing in a codec ever changes, so copies of what holds one share it."""
        return self

    def offset(self, kind: Kind, positions: Tensor) -> Tensor:
        """m(position): what is subtracted before coding and added back after, [T, H, D] for `positions` [T]."""
        half = self.key if kind == "key" else self.value
        mean = half.mean[:, None].expand(-1, len(positions), -1)
        if kind == "key" and self.rotary:
            mean = self.rotary.rotate(mean, positions)
        return torch.where((positions == 0)[:, None, None], half.sink, mean.transpose(0, 1))

    def encode(self, key: Tensor, value: Tensor, positions: Tensor) -> Tensor:
        """Codes of T tokens: uint8 [T, 2 * H * D], keys first.

        Args:
            key, value: [T, H, D] in any floating dtype; keys as the model caches them, that is after rotation.
            positions: int64 [T].

        """
        # float64: a token's code must not depend on how many tokens share the matrix product.
        residual = torch.stack(
            (key.float() - self.offset("key", positions), value.float() - self.offset("value", positions))
        ).double()
        latents = torch.einsum("kthd,khrd->khrt", residual, self.analysis)
        scale = self.sink_scale.double()[..., None]
        at_sink = torch.where(scale > 0, latents / scale, 0)
        latents = torch.where(positions == 0, at_sink, latents).float().flatten(0, 2)
        return torch.searchsorted(self.thresholds, latents.contiguous()).to(torch.uint8).T.contiguous()

    def decode(self, codes: Tensor) -> Tensor:
        """Latents of `codes` [R2, ...]: float32 of the same shape (the synthesis ignores those without bits)."""
        table, start = self._level_table
        index = codes.long() + start.view(-1, *[1] * (codes.dim() - 1))
        return table[index]

    def pack(self, codes: Tensor) -> Tensor:
        """Bytes of T tokens, uint8 [T, token_bytes], from `codes` [T, R2]."""
        packed = torch.zeros(len(codes), self.layout.token_bytes, dtype=torch.int64, device=codes.device)
        for byte, shift, mask, low in zip(self.bits.byte, self.bits.shift, self.bits.mask, self.bits.low, strict=True):
            packed.index_add_(1, byte, ((codes.long() >> low) & mask) << shift)
        return packed.to(torch.uint8)

    def unpack(self, pages: Tensor) -> Tensor:
        """Codes [R2, ...] from bytes [token_bytes, ...], uint8."""
        codes = torch.zeros(self.bits.byte.shape[1], *pages.shape[1:], dtype=torch.uint8, device=pages.device)
        column = (-1, *[1] * (pages.dim() - 1))
        for byte, shift, mask, low in zip(self.bits.byte, self.bits.shift, self.bits.mask, self.bits.low, strict=True):
            field = (pages[byte] >> shift.to(torch.uint8).view(column)) & mask.to(torch.uint8).view(column)
            codes |= field << low.to(torch.uint8).view(column)
        return codes

    def restore(self, codes: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values float32 [T, H, D] each, from `codes` [R2, T] of tokens at `positions` [T]."""
        latents = self.decode(codes).view(2, self.num_kv_heads, self.head_dim, -1)
        restored = []
        kinds: tuple[tuple[Kind, KindCodec], ...] = (("key", self.key), ("value", self.value))
        for (kind, half), z in zip(kinds, latents, strict=True):
            z = torch.where(positions == 0, z * half.sink_scale[..., None], z)
            restored.append(self.offset(kind, positions) + torch.einsum("hdr,hrt->thd", half.synthesis, z))
        return restored[0], restored[1]

    def reconstruct(self, key: Tensor, value: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values as an engine reads them back: float32 [T, H, D] each; arguments as in `encode`."""
        return self.restore(self.encode(key, value, positions).T, positions)
