"""Kernels that store tokens. Dimensions: `vllm_kvsplice.engines.contract`; what the tables hold: `tables.Tables`."""

import triton
import triton.language as tl

from vllm_kvsplice.engines.triton.kernels.codes import pack


@triton.jit
def mean_at(mean, turned, sink, frequency, position):
    """m(position), [T, dimensions] of one head.

    Products and their sum are rounded one by one, as the reference rounds them: launch with `enable_fp_fusion=False`.
    """
    angle = position.to(tl.float64)[:, None] * frequency[None, :]
    turning = mean[None, :] * tl.cos(angle).to(tl.float32) + turned[None, :] * tl.sin(angle).to(tl.float32)
    return tl.where(position[:, None] == 0, sink[None, :], turning)


@triton.jit
def nearest(thresholds, latents, WIDTH: tl.constexpr):
    """Codes, int32, of float32 `latents` [T, D] by bisection; `thresholds` [D] points to the 255 of each latent."""
    code = tl.zeros(latents.shape, tl.int32)
    for bit in tl.static_range(WIDTH):
        size = 1 << (WIDTH - 1 - bit)
        code += tl.where(tl.load(thresholds[None, :] + code + (size - 1)) < latents, size, 0)
    return code


@triton.jit(do_not_specialize=["count"])
def encode_kernel(
    key, value, positions, slots, pages, tables,
    count, page_stride, key_token, key_head, value_token, value_head, token_bytes,
    HEAD_DIM: tl.constexpr, LATENTS: tl.constexpr, PAGE: tl.constexpr, PLANES: tl.constexpr, WIDTH: tl.constexpr,
    TOKENS: tl.constexpr, STEP: tl.constexpr,
):  # fmt: skip
    """Write the codes of LATENTS latents of one half, that is of one head's keys or values, into the pages.

    Grid: (tiles of TOKENS tokens, 2 * H halves: keys' heads, then values', parts of a half). Latents are summed in float64,
    because they must be the reference's.
    """
    token = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    half, heads = tl.program_id(1), tl.num_programs(1) // 2
    kind, head = half // heads, half % heads
    slot = tl.load(slots + token, token < count, -1)
    real = slot >= 0
    position = tl.load(positions + token, real, 0)
    rows = key + token.to(tl.int64) * key_token + head * key_head
    if kind == 1:
        rows = value + token.to(tl.int64) * value_token + head * value_head

    latent = tl.program_id(2) * LATENTS + tl.arange(0, LATENTS)
    used = latent < HEAD_DIM
    row = half * HEAD_DIM + tl.where(used, latent, 0)
    latents = tl.zeros((TOKENS, LATENTS), tl.float64)
    for first in range(0, HEAD_DIM, STEP):
        dim = first + tl.arange(0, STEP)
        known = dim < HEAD_DIM
        at = half * HEAD_DIM + dim
        mean, turned = tl.load(tables.mean + at, known), tl.load(tables.turned + at, known)
        sink = tl.load(tables.sink + at, known)
        frequency = tl.load(tables.frequencies + kind * HEAD_DIM + dim, known)
        x = tl.load(rows[:, None] + dim[None, :], real[:, None] & known[None, :], 0).to(tl.float32)
        residual = tl.where(known[None, :], x - mean_at(mean, turned, sink, frequency, position), 0)
        basis = tl.load(tables.analysis + row[None, :] * HEAD_DIM + dim[:, None], known[:, None] & used[None, :], 0)
        latents = tl.dot(residual.to(tl.float64), basis.to(tl.float64), latents)

    unit = tl.load(tables.sink_scale + row, used, 0).to(tl.float64)[None, :]
    at_sink = tl.where(unit > 0, latents / tl.where(unit > 0, unit, 1), 0)
    latents = tl.where((position == 0)[:, None], at_sink, latents)
    code = nearest(tables.thresholds + row // 8 * 256, latents.to(tl.float32), WIDTH)

    begin = tl.load(tables.group_bytes + tl.min(tl.where(used, row, 2 * heads * HEAD_DIM)) // 8)
    end = tl.load(tables.group_bytes + tl.max(row) // 8 + 1)
    byte = begin + tl.arange(0, LATENTS)
    packed = pack(tl.where(used[None, :], code, 0), tables.fields + row, byte, 2 * heads * HEAD_DIM, PLANES)
    cell = pages + (slot // PAGE) * page_stride + slot % PAGE
    tl.store(cell[:, None] + byte[None, :] * PAGE, packed.to(tl.uint8), real[:, None] & (byte < end)[None, :])
    # Bytes past the codes are zero.
    if tl.program_id(2) == 0:
        for padding in range(tl.load(tables.group_bytes + heads * HEAD_DIM // 4) + half, token_bytes, 2 * heads):
            tl.store(cell + padding * PAGE, tl.zeros((TOKENS,), tl.uint8), real)


@triton.jit
def copy_kernel(
    key, value, slots, pages,
    key_token, key_head, value_token, value_head, page_block, page_head, page_token,
    HEAD_DIM: tl.constexpr, D: tl.constexpr, PAGE: tl.constexpr,
):  # fmt: skip
    """Copy one token's key and value of one head to its slot in the exact window. Grid: (T, H)."""
    token, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    slot = tl.load(slots + token)
    dim = tl.arange(0, D)
    stored = dim < tl.where(slot >= 0, HEAD_DIM, 0)
    cell = pages + (slot // PAGE) * page_block + head * page_head + (slot % PAGE) * page_token + dim
    x = tl.load(key + token * key_token + head * key_head + dim, stored)
    tl.store(cell, x.to(pages.dtype.element_ty), stored)
    y = tl.load(value + token * value_token + head * value_head + dim, stored)
    tl.store(cell + HEAD_DIM, y.to(pages.dtype.element_ty), stored)
