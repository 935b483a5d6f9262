"""Attention to stored tokens with any levels: they are looked up, and multiplied in float16."""

import triton
import triton.language as tl

from vllm_kvsplice.engines.triton.kernels.codes import look_up, unpack
from vllm_kvsplice.engines.triton.kernels.means import beginning, stacked, turned, turns, waves
from vllm_kvsplice.engines.triton.kernels.softmax import HEADROOM, normalised, softmax_step


@triton.jit
def attend_any(
    query, absorbed, pages, block_table, tables, partial, rows, place, real, until, head, split, splits, scale, page_stride,
    HEADS_DIM, HEAD_DIM: tl.constexpr, D: tl.constexpr, PAIRS: tl.constexpr, ROWS: tl.constexpr, TILE: tl.constexpr,
    PAGE: tl.constexpr, PLANES: tl.constexpr,
):  # fmt: skip
    """One split of the stored tokens before `until` [rows]: what `normalised` returns, for value latents [D, rows]."""
    key_latent, value_latent, even, odd, z_query, top, weight, sums = beginning(
        query, absorbed, pages, block_table, tables, partial, rows, place, real, until, head, split, scale, page_stride,
        HEADS_DIM, HEAD_DIM, D, PAIRS, ROWS, PAGE, PLANES,
    )  # fmt: skip
    headroom = tl.exp2(tl.zeros((ROWS,), tl.float32) + HEADROOM)
    total, sums = weight * headroom, sums * headroom[None, :]

    # Queries in float16, in a unit of each row's own.
    unit = tl.maximum(tl.max(tl.abs(z_query), 0), tl.sqrt(tl.max(even * even + odd * odd, 0)))
    unit = tl.where(unit > 0, unit, 1)
    z_query, even, odd = (z_query / unit[None, :]).to(tl.float16), even / unit[None, :], odd / unit[None, :]
    tiles = tl.cdiv(tl.max(until), TILE)
    share = tl.cdiv(tiles, splits)
    cos_first, sin_first, cos, sin = turns(tables, split * share * TILE, HEAD_DIM, PAIRS, TILE)
    even, odd = turned(even, odd, cos_first, sin_first)

    key_fields, value_fields = tables.fields + key_latent, tables.fields + value_latent
    key_levels, value_levels = (key_latent // 8 * 256).to(tl.uint32), (value_latent // 8 * 256).to(tl.uint32)
    token = tl.arange(0, TILE)
    wave = waves(tables, token, HEAD_DIM, PAIRS)
    for tile in range(split * share, tl.minimum(split * share + share, tiles)):
        first = tile * TILE
        page = pages + tl.load(block_table + first // PAGE).to(tl.int64) * page_stride + first % PAGE // 4
        key_code = unpack(page, key_fields, PAGE // 4, 2 * HEADS_DIM, TILE // 4, PLANES)
        value_code = unpack(page, value_fields, PAGE // 4, 2 * HEADS_DIM, TILE // 4, PLANES)
        scores = tl.dot(wave, stacked(even, odd).to(tl.float16))
        keys = tl.trans(look_up(tables.levels, key_levels, key_code))
        scores = tl.dot(keys, z_query, scores) * (unit * scale)[None, :]
        position = first + token
        visible = (position[:, None] < until[None, :]) & (position > 0)[:, None]
        probability, top, total, factor = softmax_step(tl.where(visible, scores, float("-inf")), top, total)
        values = look_up(tables.levels, value_levels, value_code)
        sums = tl.dot(values, probability.to(tl.float16), sums * factor[None, :])
        even, odd = turned(even, odd, cos, sin)
    return normalised(sums, top, total, HEADROOM)
