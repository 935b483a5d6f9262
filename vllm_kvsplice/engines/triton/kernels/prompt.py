"""Kernels for prompts, where each stored token is read by many rows.

Unpacking tokens once for every few rows, as decoding does, would be most of the work. So a segment of the context is made
readable first, as plain float16: keys as they were, values as latents, which `attention.finish_kernel` takes back. Then
attention is the common tiled one (Dao, FlashAttention-2, 2023), and goes on segment by segment.
"""

import triton
import triton.language as tl

from vllm_kvsplice.engines.triton.kernels.codes import look_up, unpack
from vllm_kvsplice.engines.triton.kernels.means import turn
from vllm_kvsplice.engines.triton.kernels.rows import LOG2_E, read_by, rows_of
from vllm_kvsplice.engines.triton.kernels.softmax import HEADROOM


@triton.jit
def unpack_kernel(
    pages, sequences, tables, segment, page_stride,
    HEAD_DIM: tl.constexpr, D: tl.constexpr, TILE: tl.constexpr, PAGE: tl.constexpr, PLANES: tl.constexpr,
    COLUMNS: tl.constexpr,
):  # fmt: skip
    """Fill `segment`. Grid: (tiles of its tokens, H, S). Programs past a sequence's tokens end at once."""
    head, heads, sequence = tl.program_id(1), tl.num_programs(1), tl.program_id(2)
    place = tl.program_id(0) * TILE
    first = segment.begin + place
    if first >= tl.load(sequences.lengths + sequence):
        return
    block = tl.load(sequences.block_table + sequence.to(tl.int64) * sequences.table_stride + first // PAGE)
    page = pages + block.to(tl.int64) * page_stride + first % PAGE // 4
    latent = tl.arange(0, D)
    used = latent < HEAD_DIM
    key_latent = head * HEAD_DIM + tl.where(used, latent, 0)
    position, column = first + tl.arange(0, TILE), tl.arange(0, COLUMNS)
    cell = ((sequence * heads + head).to(tl.int64) * segment.size + place + tl.arange(0, TILE)) * D

    keys = levels_of(page, tables, key_latent, used, position, 2 * heads * HEAD_DIM, TILE, PAGE, PLANES)
    for part in range(0, D, COLUMNS):
        dim = part + column
        known = dim < HEAD_DIM
        basis = tables.synthesis + (head * HEAD_DIM + dim)[None, :] * HEAD_DIM + latent[:, None]
        basis = tl.load(basis, used[:, None] & known[None, :], 0)
        at = head * HEAD_DIM + dim
        cos, sin = turn(position.to(tl.float64)[:, None] * tl.load(tables.frequencies + dim, known, 0)[None, :])
        mean, turned = tl.load(tables.mean + at, known, 0), tl.load(tables.turned + at, known, 0)
        mean = mean[None, :] * cos + turned[None, :] * sin
        mean = tl.where((position == 0)[:, None], tl.load(tables.sink + at, known, 0)[None, :], mean)
        # What rounding takes from the matrix is multiplied too; levels are whole numbers, and exact.
        high = basis.to(tl.float16)
        key = tl.dot(keys, high, tl.dot(keys, (basis - high.to(tl.float32)).to(tl.float16), mean))
        tl.store(segment.key + cell[:, None] + dim[None, :], key.to(tl.float16))
    value_latent = heads * HEAD_DIM + key_latent
    values = levels_of(page, tables, value_latent, used, position, 2 * heads * HEAD_DIM, TILE, PAGE, PLANES)
    tl.store(segment.value + cell[:, None] + latent[None, :], values)


@triton.jit
def levels_of(
    page, tables, latent, used, position, latents, TILE: tl.constexpr, PAGE: tl.constexpr, PLANES: tl.constexpr
):
    """Float16 [TILE, D], 0 where a latent is not `used`; position 0 has units of its own."""
    code = unpack(page, tables.fields + latent, PAGE // 4, latents, TILE // 4, PLANES)
    levels = look_up(tables.levels, (latent // 8 * 256).to(tl.uint32), code)
    unit = tl.where((position == 0)[None, :], tl.load(tables.sink_scale + latent)[:, None], 1)
    return tl.trans(tl.where(used[:, None], levels.to(tl.float32) * unit, 0).to(tl.float16))


@triton.jit
def exact_tile(exact, block_table, head, position, end, dim, HEAD_DIM: tl.constexpr, PAGE: tl.constexpr):
    """Keys and values, float16 [TILE, D], of exact tokens before `end`."""
    block = tl.load(block_table + position // PAGE, position < end, 0).to(tl.int64)
    cell = exact.pages + block * exact.page_stride + head * exact.head_stride + position % PAGE * exact.token_stride
    mask = (position < end)[:, None] & (dim < HEAD_DIM)[None, :]
    keys = tl.load(cell[:, None] + dim[None, :], mask, 0).to(tl.float32)
    values = tl.load(cell[:, None] + HEAD_DIM + dim[None, :], mask, 0).to(tl.float32)
    return keys.to(tl.float16), values.to(tl.float16)


@triton.jit
def segment_tile(segment, place, position, end, dim, D: tl.constexpr, MASKED: tl.constexpr):
    """The same of a segment's tokens, of which `place` is the head's first."""
    cell = (place + position - segment.begin)[:, None] * D + dim[None, :]
    if MASKED:
        read = (position < end)[:, None]
        return tl.load(segment.key + cell, read, 0), tl.load(segment.value + cell, read, 0)
    return tl.load(segment.key + cell), tl.load(segment.value + cell)


@triton.jit
def softmax_rows(scores, top, total):
    """`softmax.softmax_step` for scores [rows, tokens]."""
    new_top = tl.maximum(top, tl.max(scores, 1))
    # Rows that have read nothing have no maximum.
    base = tl.where(new_top == float("-inf"), 0, new_top)
    probability, factor = tl.exp2(scores - base[:, None] + HEADROOM), tl.exp2(top - base)
    return probability.to(tl.float16), new_top, total * factor + tl.sum(probability, 1), factor


@triton.jit
def attend_segment(
    q, unit, segment, place, until, real, top, total, sums, HEAD_DIM: tl.constexpr, D: tl.constexpr, TILE: tl.constexpr
):
    """Go on with the segment's tokens before `until` [rows]."""
    dim = tl.arange(0, D)
    begin = segment.begin
    end = tl.minimum(tl.max(until), begin + segment.size)
    whole = tl.minimum(tl.min(tl.where(real, until, end)), end)
    whole = begin + tl.maximum(whole - begin, 0) // TILE * TILE
    for first in range(begin, whole, TILE):
        keys, values = segment_tile(segment, place, first + tl.arange(0, TILE), end, dim, D, False)
        scores = tl.dot(q, tl.trans(keys)) * unit[:, None]
        probability, top, total, factor = softmax_rows(scores, top, total)
        sums = tl.dot(probability, values, sums * factor[:, None])
    for first in range(whole, end, TILE):
        position = first + tl.arange(0, TILE)
        keys, values = segment_tile(segment, place, position, end, dim, D, True)
        scores = tl.dot(q, tl.trans(keys)) * unit[:, None]
        scores = tl.where(position[None, :] < until[:, None], scores, float("-inf"))
        probability, top, total, factor = softmax_rows(scores, top, total)
        sums = tl.dot(probability, values, sums * factor[:, None])
    return top, total, sums


@triton.jit
def attend_raw(
    q, unit, exact, sequence, head, begin, last, real, top, total, sums,
    HEAD_DIM: tl.constexpr, D: tl.constexpr, TILE: tl.constexpr, PAGE: tl.constexpr,
):  # fmt: skip
    """Go on with the exact tokens from `begin` to `last` [rows]."""
    if PAGE > 0:
        block_table = exact.block_table + sequence.to(tl.int64) * exact.table_stride
        end = tl.max(last) + 1
        for first in range(tl.min(tl.where(real, begin, end)), end, TILE):
            position = first + tl.arange(0, TILE)
            keys, values = exact_tile(exact, block_table, head, position, end, tl.arange(0, D), HEAD_DIM, PAGE)
            scores = tl.dot(q, tl.trans(keys)) * unit[:, None]
            visible = (position[None, :] >= begin[:, None]) & (position[None, :] <= last[:, None])
            probability, top, total, factor = softmax_rows(tl.where(visible, scores, float("-inf")), top, total)
            sums = tl.dot(probability, values, sums * factor[:, None])
    return top, total, sums


@triton.jit(do_not_specialize=["tokens", "number"])
def prompt_kernel(
    query, sequences, exact, segment, partial, tokens, number, scale, stride_token, stride_head,
    GROUP: tl.constexpr, HEAD_DIM: tl.constexpr, D: tl.constexpr, ROWS: tl.constexpr, TILE: tl.constexpr,
    EXACT_PAGE: tl.constexpr, WHOLE_CHUNK: tl.constexpr,
):  # fmt: skip
    """Part of the attention of ROWS rows of one sequence and KV head: to a segment, or to the exact window.

    `partial` holds what was read of segments before, and then also what was read of this one. Grid: (tiles of rows, H, 1,
    or 2 with the exact window). Programs past a sequence's rows or its tokens end at once.
    """
    # Those that read most begin first.
    tile, head, part = tl.num_programs(0) - 1 - tl.program_id(0), tl.program_id(1), tl.program_id(2)
    heads = tl.num_programs(1)
    sequence, start, queries, first_row = rows_of(sequences, tile, number, GROUP, ROWS)
    if first_row >= queries * GROUP:
        return
    row = first_row + tl.arange(0, ROWS)
    real = row < queries * GROUP
    token, query_head = (start + row // GROUP).to(tl.int64), head * GROUP + row % GROUP
    place = token * (heads * GROUP) + query_head
    until, last = read_by(sequences, exact, sequence, queries, row, GROUP, EXACT_PAGE, WHOLE_CHUNK)
    begin = segment.begin
    if (part == 0) & (begin > 0) & (tl.max(until) <= begin):
        return

    dim = tl.arange(0, D)
    known = real[:, None] & (dim < HEAD_DIM)[None, :]
    q = query + (token * stride_token + query_head * stride_head)[:, None] + dim[None, :]
    q = tl.load(q, known, 0).to(tl.float32)
    # Queries in float16, in a unit of each row's own.
    unit = tl.max(tl.abs(q), 1)
    unit = tl.where(unit > 0, unit, 1)
    q, unit = (q / unit[:, None]).to(tl.float16), unit * scale * LOG2_E
    top, total = tl.full((ROWS,), float("-inf"), tl.float32), tl.zeros((ROWS,), tl.float32)
    sums = tl.zeros((ROWS, D), tl.float32)
    weights = partial.weights + place + part.to(tl.int64) * tokens * (heads * GROUP)
    output = partial.sums + (place + part.to(tl.int64) * tokens * (heads * GROUP))[:, None] * HEAD_DIM + dim[None, :]
    if part == 0:
        first_key = (sequence * heads + head).to(tl.int64) * segment.size
        if begin > 0:
            top = tl.load(weights, real, float("-inf"))
            some = top > float("-inf")
            total = tl.where(some, tl.exp2(tl.zeros((ROWS,), tl.float32) + HEADROOM), 0)
            sums = tl.load(output, known & some[:, None], 0) * total[:, None]
        else:
            key = tl.load(segment.key + first_key * D + dim).to(tl.float32)
            score = tl.sum(q.to(tl.float32) * key[None, :], 1) * unit
            tl.store(partial.sink_scores + place, tl.where(until > 0, score, float("-inf")), real)
        top, total, sums = attend_segment(
            q, unit, segment, first_key, until, real, top, total, sums, HEAD_DIM, D, TILE
        )  # fmt: skip
    else:
        top, total, sums = attend_raw(
            q, unit, exact, sequence, head, until, last, real, top, total, sums, HEAD_DIM, D, TILE, EXACT_PAGE
        )  # fmt: skip
    read = total > 0
    total = tl.where(read, total, 1)
    tl.store(weights, tl.where(read, top + tl.log2(total) - HEADROOM, float("-inf")), real)
    tl.store(output, sums / total[:, None], known & read[:, None])
