"""What the kernels read: a codec's tables, prepared once per layer on the pages' device, and a step's arguments."""

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from vllm_kvsplice.codec import LayerCodec
from vllm_kvsplice.layout import GROUP, MAX_WIDTH

# The most tokens that a tile of attention holds.
MAX_TILE = 64


class Tables(NamedTuple):
    """Of keys, then values, where a leading 2 counts the two. R2 = 2 * H * D latents.

    Attributes:
        mean, turned: float32 [2, H, D]; m(j) = mean * cos(j f) + turned * sin(j f).
        sink: float32 [2, H, D], m(0).
        frequencies: f, float64 [2, D], radians per position; 0 where nothing turns.
        analysis, synthesis: float32 [2, H, D, D], as in `KindCodec`.
        sink_scale: float32 [2, H, D].
        thresholds: float32 [R2 / 8, 256], a group's 255 and +inf.
        levels: float16 [R2 / 8, 256], exact: whole numbers of eight bits.
        step, offset: float32 [R2] where levels are evenly spaced and no width is 8, else None: a level is
            step * code + offset, with codes as in `aligned`. The offset of keys is a share of the step.
        fields: int32 [planes, R2], ``byte << 13 | rotation << 8 | mask`` (`codes.parts`).
        aligned: the same for codes that end at the seventh bit: shifted up by as many bits as they have fewer than seven.
        group_bytes: int32 [R2 / 8 + 1], the byte at which each group begins, and where the last ends.
        pairs: int32 [2, D / 2], the dimensions i and k of keys that turn together; `pair_frequencies` float64 [D / 2]. With
            a = q_i m_i + q_k m_k and b = q_k m_i - q_i m_k, q . m(j) is the sum of a cos(j f) + b sin(j f) over pairs.
        waves: float16 [MAX_TILE, 2, D / 2], cos(j f) and sin(j f) for the first positions j.

    """

    mean: Tensor
    turned: Tensor
    sink: Tensor
    frequencies: Tensor
    analysis: Tensor
    synthesis: Tensor
    sink_scale: Tensor
    thresholds: Tensor
    levels: Tensor
    step: Tensor | None
    offset: Tensor | None
    fields: Tensor
    aligned: Tensor
    group_bytes: Tensor
    pairs: Tensor
    pair_frequencies: Tensor
    waves: Tensor


class Sequences(NamedTuple):
    """`Batch` as kernels take it, with the window's block table: tensors, and the tables' strides.

    A step's parts are slices of them that begin anywhere, so kernels are not compiled for how they are aligned.
    """

    query_start: Tensor
    lengths: Tensor
    block_table: Tensor
    table_stride: int
    exact_table: Tensor | None
    exact_stride: int


class Exact(NamedTuple):
    """`Window` as kernels take it: tokens, and the pages with their strides."""

    size: int
    pages: Tensor
    page_stride: int
    head_stride: int
    token_stride: int


class Segment(NamedTuple):
    """Part of the context of all sequences, rebuilt for prompts.

    Attributes:
        rebuilt: float16 [2, S, H, `size`, D padded], keys and values.
        begin: position of the first token.
        size: in tokens.

    """

    rebuilt: Tensor
    begin: int
    size: int


class State(NamedTuple):
    """What prompts have read of the segments so far: sums of values, maxima of scores, and sums of exponentials.

    float32 [T, H * G, D], and twice [T, H * G]; `total` and `sums` are those of exponentials less `top`.
    """

    sums: Tensor
    top: Tensor
    total: Tensor


class Partial(NamedTuple):
    """What each split leaves for the merge; with a window, its part is one split more.

    Attributes:
        sums: float32 [splits, T, H * G, D], of value latents (of values in the window's part), for weights of sum 1.
        weights: float32 [splits, T, H * G], base-2 logarithm of the sum of exponentials; -inf where nothing was read.
        sink_scores: float32 [T, H * G], of position 0 in the same logarithm; -inf where it is not read as stored.

    """

    sums: Tensor
    weights: Tensor
    sink_scores: Tensor


def reads_fast(codec: LayerCodec) -> bool:
    """Whether kernels multiply codes as they are, which is where levels are evenly spaced and no group has eight bits."""
    return codec.spacing is not None and MAX_WIDTH not in codec.layout.widths


def tables_of(codec: LayerCodec) -> Tables:
    """Of `codec`, on its device."""

    def both(name: str) -> Tensor:
        return torch.stack((getattr(codec.key, name), getattr(codec.value, name))).contiguous()

    mean, key_mean, dim = both("mean"), codec.key.mean, codec.head_dim
    first, second, frequency = _pairs(codec)
    turned, frequencies = torch.zeros_like(mean), mean.new_zeros(2, dim, dtype=torch.float64)
    turned[0, :, first], turned[0, :, second] = -key_mean[:, second], key_mean[:, first]
    frequencies[0, first] = frequencies[0, second] = frequency
    angles = torch.outer(torch.arange(MAX_TILE, dtype=torch.float64, device=mean.device), frequency)
    step, offset = _uniform(codec)
    return Tables(
        mean=mean,
        turned=turned,
        sink=both("sink"),
        frequencies=frequencies,
        analysis=both("analysis"),
        synthesis=both("synthesis"),
        sink_scale=both("sink_scale"),
        thresholds=torch.nn.functional.pad(codec.thresholds[::GROUP], (0, 1), value=math.inf).contiguous(),
        levels=both("levels").flatten(0, 2).half(),
        step=step,
        offset=offset,
        fields=_fields(codec),
        aligned=_fields(codec, aligned=True),
        group_bytes=_group_bytes(codec).to(mean.device),
        pairs=torch.stack((first, second)).int(),
        pair_frequencies=frequency,
        waves=torch.stack((angles.cos(), angles.sin()), 1).half(),
    )


def _pairs(codec: LayerCodec) -> tuple[Tensor, Tensor, Tensor]:
    """The dimensions that turn together, [D / 2] each, and their frequency; what does not turn is paired at frequency 0."""
    dims = torch.arange(codec.head_dim, device=codec.key.mean.device)
    turning = codec.rotary.inv_freq.double() if codec.rotary else dims[:0].double()
    rotated, rest = dims[: 2 * len(turning)], dims[2 * len(turning) :]
    paired = rotated.view(-1, 2).T if codec.rotary and codec.rotary.interleaved else rotated.view(2, -1)
    first, second = torch.cat((paired, rest.view(-1, 2).T), 1)
    return first, second, torch.cat((turning, turning.new_zeros(len(rest) // 2)))


def _fields(codec: LayerCodec, aligned: bool = False) -> Tensor:
    bits: Any = codec.bits
    low = bits.low + _missing_bits(codec).repeat_interleave(GROUP) if aligned else bits.low
    rotation = (bits.shift - low) % 32
    # Planes that a latent does not have are read where it has its first.
    byte = torch.where(bits.mask > 0, bits.byte, bits.byte[0])
    return (byte << 13 | rotation << 8 | bits.mask << low).int().contiguous()


def _missing_bits(codec: LayerCodec) -> Tensor:
    """Of seven, for each group."""
    return (7 - torch.tensor(codec.layout.widths, device=codec.key.mean.device)).clamp_min(0)


def _group_bytes(codec: LayerCodec) -> Tensor:
    return torch.tensor([0, *codec.layout.widths]).cumsum(0).int()


def _uniform(codec: LayerCodec) -> tuple[Tensor | None, Tensor | None]:
    """`Tables.step` and `Tables.offset`, or None twice."""
    if codec.spacing is None or not reads_fast(codec):
        return None, None
    step, offset = codec.spacing
    step = step / (1 << _missing_bits(codec))
    keys = torch.arange(len(step), device=step.device) < len(step) // 2
    # Queries are multiplied by the step first.
    offset = torch.where(keys & (step > 0), offset / step, offset)
    return step.repeat_interleave(GROUP), offset.repeat_interleave(GROUP)
