"""Kernels for prompts, where each stored token is read by many rows.

Unpacking tokens once for every few rows, as decoding does, would be most of the work. So a segment of the context is first
made what it was, keys and values in float16. Then attention is the common tiled one (Dao, FlashAttention-2, 2023), which
goes on from segment to segment and then to the exact window.
"""

import triton
import triton.language as tl

from vllm_kvsplice.engines.triton.kernels.codes import look_up, unpack
from vllm_kvsplice.engines.triton.kernels.means import turn
from vllm_kvsplice.engines.triton.kernels.rows import LOG2_E, read_by, rows_of
from vllm_kvsplice.engines.triton.kernels.softmax import softmax_rows


@triton.jit(do_not_specialize_on_alignment=["sequences"])
def rebuild_kernel(
    pages, sequences, tables, segment, page_stride,
    HEAD_DIM: tl.constexpr, D: tl.constexpr, TILE: tl.constexpr, PAGE: tl.constexpr, PLANES: tl.constexpr,
    COLUMNS: tl.constexpr,
):  # fmt: skip
    """Fill `segment`. Grid: (tiles of its tokens, 2 * H halves: keys' heads, then values', S).

    Programs past a sequence's tokens end at once.
    """
    half, heads, sequence = tl.program_id(1), tl.num_programs(1) // 2, tl.program_id(2)
    kind, place = half // heads, tl.program_id(0) * TILE
    first = segment.begin + place
    if first >= tl.load(sequences.lengths + sequence):
        return
    block = tl.load(sequences.block_table + sequence.to(tl.int64) * sequences.table_stride + first // PAGE)
    page = pages + block.to(tl.int64) * page_stride + first % PAGE // 4
    latent, token = tl.arange(0, D), tl.arange(0, TILE)
    used, at_sink = latent < HEAD_DIM, first + token == 0
    own = half * HEAD_DIM + tl.where(used, latent, 0)
    code = unpack(page, tables.fields + own, PAGE // 4, 2 * heads * HEAD_DIM, TILE // 4, PLANES)
    levels = look_up(tables.levels, (own // 8 * 256).to(tl.uint32), code).to(tl.float32)
    # Position 0 has units of its own.
    unit = tl.where(at_sink[None, :], tl.load(tables.sink_scale + own)[:, None], 1)
    levels = tl.trans(tl.where(used[:, None], levels * unit, 0).to(tl.float16))

    row = ((kind * tl.num_programs(2) + sequence) * heads + half % heads).to(tl.int64) * segment.size + place + token
    out = segment.rebuilt + row[:, None] * D
    for part in range(0, D, COLUMNS):
        dim = part + tl.arange(0, COLUMNS)
        known = dim < HEAD_DIM
        at = half * HEAD_DIM + dim
        mean = tl.broadcast_to(tl.load(tables.mean + at, known, 0)[None, :], (TILE, COLUMNS))
        if kind == 0:
            frequency = tl.load(tables.frequencies + dim, known, 0)
            # The angle in two parts: that of the first token may be large, those from there on are small.
            cos_first, sin_first = turn(frequency * first.to(tl.float64))
            angle = token.to(tl.float32)[:, None] * frequency.to(tl.float32)[None, :]
            cos_on, sin_on = tl.cos(angle), tl.sin(angle)
            cos = cos_first[None, :] * cos_on - sin_first[None, :] * sin_on
            sin = sin_first[None, :] * cos_on + cos_first[None, :] * sin_on
            mean = mean * cos + tl.load(tables.turned + at, known, 0)[None, :] * sin
        mean = tl.where(at_sink[:, None], tl.load(tables.sink + at, known, 0)[None, :], mean)
        basis = tables.synthesis + at[None, :] * HEAD_DIM + latent[:, None]
        basis = tl.load(basis, used[:, None] & known[None, :], 0)
        # In float16, by a scale of each dimension's own.
        scale = tl.max(tl.abs(basis), 0)
        scale = tl.where(scale > 0, scale, 1)
        rebuilt = tl.dot(levels, (basis / scale[None, :]).to(tl.float16)) * scale[None, :] + mean
        tl.store(out + dim[None, :], rebuilt.to(tl.float16))


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
def segment_tile(segment, places, position, end, dim, D: tl.constexpr, MASKED: tl.constexpr):
    """The same of a segment's tokens; `places` are those of the head's first key and value."""
    offset = (position - segment.begin)[:, None] * D + dim[None, :]
    keys, values = segment.rebuilt + places[0] * D + offset, segment.rebuilt + places[1] * D + offset
    if MASKED:
        read = (position < end)[:, None]
        return tl.load(keys, read, 0), tl.load(values, read, 0)
    return tl.load(keys), tl.load(values)


@triton.jit
def attend_segment(
    q, unit, segment, places, until, real, top, total, sums, HEAD_DIM: tl.constexpr, D: tl.constexpr, TILE: tl.constexpr
):
    """Go on with the segment's tokens before `until` [rows]."""
    dim = tl.arange(0, D)
    begin = segment.begin
    end = tl.minimum(tl.max(until), begin + segment.size)
    whole = tl.minimum(tl.min(tl.where(real, until, end)), end)
    whole = begin + tl.maximum(whole - begin, 0) // TILE * TILE
    for first in range(begin, whole, TILE):
        keys, values = segment_tile(segment, places, first + tl.arange(0, TILE), end, dim, D, False)
        scores = tl.dot(q, tl.trans(keys)) * unit[:, None]
        probability, top, total, factor = softmax_rows(scores, top, total)
        sums = tl.dot(probability, values, sums * factor[:, None])
    for first in range(whole, end, TILE):
        position = first + tl.arange(0, TILE)
        keys, values = segment_tile(segment, places, position, end, dim, D, True)
        scores = tl.dot(q, tl.trans(keys)) * unit[:, None]
        scores = tl.where(position[None, :] < until[:, None], scores, float("-inf"))
        probability, top, total, factor = softmax_rows(scores, top, total)
        sums = tl.dot(probability, values, sums * factor[:, None])
    return top, total, sums


@triton.jit
def attend_raw(
    q, unit, sequences, exact, sequence, head, begin, last, real, top, total, sums,
    HEAD_DIM: tl.constexpr, D: tl.constexpr, TILE: tl.constexpr, PAGE: tl.constexpr,
):  # fmt: skip
    """Go on with the exact tokens from `begin` to `last` [rows]."""
    if PAGE > 0:
        block_table = sequences.exact_table + sequence.to(tl.int64) * sequences.exact_stride
        end = tl.max(last) + 1
        for first in range(tl.min(tl.where(real, begin, end)), end, TILE):
            position = first + tl.arange(0, TILE)
            keys, values = exact_tile(exact, block_table, head, position, end, tl.arange(0, D), HEAD_DIM, PAGE)
            scores = tl.dot(q, tl.trans(keys)) * unit[:, None]
            visible = (position[None, :] >= begin[:, None]) & (position[None, :] <= last[:, None])
            probability, top, total, factor = softmax_rows(tl.where(visible, scores, float("-inf")), top, total)
            sums = tl.dot(probability, values, sums * factor[:, None])
    return top, total, sums


@triton.jit(do_not_specialize=["longest", "number"], do_not_specialize_on_alignment=["sequences"])
def prompt_kernel(
    query, sequences, exact, segment, state, output, longest, number, scale, stride_token, stride_head, output_token,
    GROUP: tl.constexpr, HEAD_DIM: tl.constexpr, D: tl.constexpr, ROWS: tl.constexpr, TILE: tl.constexpr,
    EXACT_PAGE: tl.constexpr, WHOLE_CHUNK: tl.constexpr,
):  # fmt: skip
    """Attention of ROWS rows of one sequence and KV head to a segment, and, in the last one, to the exact window.

    Until then `state` holds what was read; the last segment reaches `longest`. Grid: (tiles of rows, H). Programs past a
    sequence's rows end at once.
    """
    # Those that read most begin first.
    tile, head, heads = tl.num_programs(0) - 1 - tl.program_id(0), tl.program_id(1), tl.num_programs(1)
    sequence, start, queries, first_row = rows_of(sequences, tile, number, GROUP, ROWS)
    if first_row >= queries * GROUP:
        return
    row = first_row + tl.arange(0, ROWS)
    real = row < queries * GROUP
    token, query_head = (start + row // GROUP).to(tl.int64), head * GROUP + row % GROUP
    until, last = read_by(sequences, exact, sequence, queries, row, GROUP, EXACT_PAGE, WHOLE_CHUNK)
    ends = segment.begin + segment.size >= longest
    if (not ends) & (tl.max(until) < segment.begin):
        return

    dim = tl.arange(0, D)
    known = real[:, None] & (dim < HEAD_DIM)[None, :]
    q = query + (token * stride_token + query_head * stride_head)[:, None] + dim[None, :]
    q = tl.load(q, known, 0).to(tl.float32)
    # Queries in float16, in a unit of each row's own.
    unit = tl.max(tl.abs(q), 1)
    unit = tl.where(unit > 0, unit, 1)
    q, unit = (q / unit[:, None]).to(tl.float16), unit * scale * LOG2_E
    place = token * (heads * GROUP) + query_head
    kept = state.sums + place[:, None] * HEAD_DIM + dim[None, :]
    top, total = tl.full((ROWS,), float("-inf"), tl.float32), tl.zeros((ROWS,), tl.float32)
    sums = tl.zeros((ROWS, D), tl.float32)
    if segment.begin > 0:
        top, total = tl.load(state.top + place, real, float("-inf")), tl.load(state.total + place, real, 0)
        sums = tl.load(kept, known, 0)
    first_key = (sequence * heads + head).to(tl.int64) * segment.size
    places = first_key, first_key + (number * heads).to(tl.int64) * segment.size
    top, total, sums = attend_segment(
        q, unit, segment, places, until, real, top, total, sums, HEAD_DIM, D, TILE
    )  # fmt: skip
    if ends:
        _, total, sums = attend_raw(
            q, unit, sequences, exact, sequence, head, until, last, real, top, total, sums, HEAD_DIM, D, TILE, EXACT_PAGE
        )  # fmt: skip
        out = output + (token * output_token + query_head * HEAD_DIM)[:, None] + dim[None, :]
        tl.store(out, (sums / tl.where(real, total, 1)[:, None]).to(output.dtype.element_ty), known)
    else:
        tl.store(state.top + place, top, real)
        tl.store(state.total + place, total, real)
        tl.store(kept, sums, known)
