"""Kernels that attend to what is stored. Dimensions: `vllm_kvsplice.engines.contract`; arguments in groups: `tables`.

Three launches: `absorb_kernel` takes queries to the latents' space, `attend_kernel` reads the pages in splits, and
`finish_kernel` merges the splits and takes the result back. Grids follow from the shapes of tensors alone, never from
sequence lengths, so a CUDA graph that captured them serves any lengths.

*Rows* are the queries of one KV head: row r of a sequence is query head r % G of its token r // G. *Scores* are exponents
of two, not of e.
"""

import triton
import triton.language as tl

from vllm_kvsplice.engines.triton.codes import in_order, look_up, shuffled, unpack
from vllm_kvsplice.engines.triton.uniform import (
    LARGEST,
    LOG2_LARGEST,
    ORIGIN,
    ORIGIN_BITS,
    fine_halves,
    halves,
    key_bytes,
    stacked,
    value_bytes,
    whole,
)

# Probabilities are rounded to float16 times 2**14: below 2**-14 that type has fewer bits.
HEADROOM = tl.constexpr(14.0)
LOG2_E = tl.constexpr(1.4426950408889634)
FULL_TURN = tl.constexpr(6.283185307179586)


@triton.jit(do_not_specialize=["rows"])
def absorb_kernel(
    query, synthesis, absorbed, rows, stride_token, stride_head,
    GROUP: tl.constexpr, HEAD_DIM: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, STEP: tl.constexpr,
):  # fmt: skip
    """D_K^T q, float32 [T, H * G, D]. Grid: (tiles of the step's rows, H, tiles of latents)."""
    row, head = tl.program_id(0) * ROWS + tl.arange(0, ROWS), tl.program_id(1)
    latent = tl.program_id(2) * COLUMNS + tl.arange(0, COLUMNS)
    token, query_head = (row // GROUP).to(tl.int64), head * GROUP + row % GROUP
    q = query + token * stride_token + query_head * stride_head
    mask = (row < rows)[:, None] & (latent < HEAD_DIM)[None, :]
    total = tl.zeros((ROWS, COLUMNS), tl.float32)
    for first in range(0, HEAD_DIM, STEP):
        dim = first + tl.arange(0, STEP)
        known = dim < HEAD_DIM
        x = tl.load(q[:, None] + dim[None, :], (row < rows)[:, None] & known[None, :], 0).to(tl.float32)
        basis = synthesis + (head * HEAD_DIM + dim)[:, None] * HEAD_DIM + latent[None, :]
        basis = tl.load(basis, known[:, None] & (latent < HEAD_DIM)[None, :], 0)
        total = tl.dot(x, basis, total, input_precision="ieee")
    place = token * (tl.num_programs(1) * GROUP) + query_head
    tl.store(absorbed + place[:, None] * HEAD_DIM + latent[None, :], total, mask)


@triton.jit
def sequence_of(query_start, tile, count, GROUP: tl.constexpr, ROWS: tl.constexpr):
    """The sequence that `tile` belongs to; sequence s owns tiles from number ``rows before it // ROWS + s`` on."""
    low, high = tile * 0, count
    while low + 1 < high:
        middle = (low + high) // 2
        if tl.load(query_start + middle) * GROUP // ROWS + middle <= tile:
            low = middle
        else:
            high = middle
    return low


@triton.jit
def softmax_step(scores, top, total):
    """Probabilities of `scores` [tokens, rows] times 2**HEADROOM, new maximum and sum, and the old sums' factor."""
    new_top = tl.maximum(top, tl.max(scores, 0))
    # Rows that have read nothing have no maximum.
    base = tl.where(new_top == float("-inf"), 0, new_top)
    probability, factor = tl.exp2(scores - base[None, :] + HEADROOM), tl.exp2(top - base)
    return probability, new_top, total * factor + tl.sum(probability, 0), factor


@triton.jit
def turn(angle):
    """Cosine and sine in float32 of float64 angles of any size."""
    small = (angle - tl.floor(angle / FULL_TURN + 0.5) * FULL_TURN).to(tl.float32)
    return tl.cos(small), tl.sin(small)


@triton.jit
def load_query(query, rows, dims, mask):
    return tl.load(query + rows[None, :] + dims[:, None], mask, 0).to(tl.float32)


@triton.jit
def mean_terms(query, rows, real, head, tables, HEADS_DIM, HEAD_DIM: tl.constexpr, PAIRS: tl.constexpr):
    """Coefficients [pairs, rows] of the cosines and of the sines of the mean keys' series at position 0."""
    pair = tl.arange(0, PAIRS)
    used = pair < HEAD_DIM // 2
    mask = used[:, None] & real[None, :]
    i = tl.load(tables.pairs + pair, used, 0)
    k = tl.load(tables.pairs + HEAD_DIM // 2 + pair, used, 0)
    q_i, q_k = load_query(query, rows, i, mask), load_query(query, rows, k, mask)
    mean_i = tl.load(tables.mean + head * HEAD_DIM + i)[:, None]
    mean_k = tl.load(tables.mean + head * HEAD_DIM + k)[:, None]
    return q_i * mean_i + q_k * mean_k, q_k * mean_i - q_i * mean_k


@triton.jit
def turned(even, odd, cos, sin):
    """The coefficients further on, by the angles of `cos` and `sin` [pairs]."""
    return even * cos[:, None] + odd * sin[:, None], odd * cos[:, None] - even * sin[:, None]


@triton.jit
def series(tables, first, HEAD_DIM: tl.constexpr, PAIRS: tl.constexpr, TILE: tl.constexpr):
    """Cosines and sines of the pairs: of position `first`, of a tile's length [pairs], and inside a tile [TILE, pairs]."""
    pair, token = tl.arange(0, PAIRS), tl.arange(0, TILE)
    turning = pair < HEAD_DIM // 2
    frequency = tl.load(tables.pair_frequencies + pair, turning, 0)
    cos_first, sin_first = turn(frequency * first.to(tl.float64))
    cos_tile, sin_tile = turn(frequency * TILE)
    wave = tables.waves + token[:, None] * HEAD_DIM + pair[None, :]
    cos_waves, sin_waves = tl.load(wave, turning[None, :], 0), tl.load(wave + HEAD_DIM // 2, turning[None, :], 0)
    return cos_first, sin_first, cos_tile, sin_tile, cos_waves, sin_waves


@triton.jit
def read_sink(
    query, z_query, page, tables, rows, mask, latent, key_latent, value_latent, HEADS_DIM,
    PAGE: tl.constexpr, PLANES: tl.constexpr,
):  # fmt: skip
    """Scores before scaling [rows] and value latents [D, 1] of position 0, which has units and a mean of its own.

    In float32: much attention falls on it.
    """
    key_code = unpack(page, tables.fields + key_latent, PAGE // 4, 2 * HEADS_DIM, 1, PLANES) & 255
    value_code = unpack(page, tables.fields + value_latent, PAGE // 4, 2 * HEADS_DIM, 1, PLANES) & 255
    z = tl.load(tables.levels + (key_latent // 8 * 256)[:, None] + key_code).to(tl.float32)
    y = tl.load(tables.levels + (value_latent // 8 * 256)[:, None] + value_code).to(tl.float32)
    z *= tl.load(tables.sink_scale + key_latent)[:, None]
    y *= tl.load(tables.sink_scale + value_latent)[:, None]
    mean = tl.load(tables.sink + key_latent)[:, None]
    return tl.sum(z_query * z + load_query(query, rows, latent, mask) * mean, 0), y


@triton.jit
def attend_stored(
    query, absorbed, pages, block_table, tables, partial, rows, place, real, until, head, split, splits, scale, page_stride,
    HEADS_DIM, HEAD_DIM: tl.constexpr, D: tl.constexpr, PAIRS: tl.constexpr, ROWS: tl.constexpr, TILE: tl.constexpr,
    PAGE: tl.constexpr, PLANES: tl.constexpr,
):  # fmt: skip
    """One split of the stored tokens before `until` [rows]: sums of value latents, maximum and sum of the softmax."""
    latent = tl.arange(0, D)
    used = latent < HEAD_DIM
    mask = used[:, None] & real[None, :]
    key_latent = head * HEAD_DIM + tl.where(used, latent, 0)
    value_latent = HEADS_DIM + key_latent
    even, odd = mean_terms(query, rows, real, head, tables, HEADS_DIM, HEAD_DIM, PAIRS)
    z_query = tl.load(absorbed + place[None, :] * HEAD_DIM + latent[:, None], mask, 0)

    top, total = tl.full((ROWS,), float("-inf"), tl.float32), tl.zeros((ROWS,), tl.float32)
    sums = tl.zeros((D, ROWS), tl.float32)
    if split == 0:
        page = pages + tl.load(block_table).to(tl.int64) * page_stride
        score, y = read_sink(
            query, z_query, page, tables, rows, mask, latent, key_latent, value_latent, HEADS_DIM, PAGE, PLANES
        )
        top = tl.where(until > 0, score * scale, float("-inf"))
        tl.store(partial.sink_scores + place, top, real)
        total = tl.where(until > 0, tl.exp2(total + HEADROOM), 0)
        sums = y * total[None, :]

    # Queries in float16, in a unit of each row's own.
    unit = tl.maximum(tl.max(tl.abs(z_query), 0), tl.sqrt(tl.max(even * even + odd * odd, 0)))
    unit = tl.where(unit > 0, unit, 1)
    z_query, even, odd = (z_query / unit[None, :]).to(tl.float16), even / unit[None, :], odd / unit[None, :]
    tiles = tl.cdiv(tl.max(until), TILE)
    share = tl.cdiv(tiles, splits)
    cos_first, sin_first, cos, sin, cos_waves, sin_waves = series(tables, split * share * TILE, HEAD_DIM, PAIRS, TILE)
    even, odd = turned(even, odd, cos_first, sin_first)

    key_fields, value_fields = tables.fields + key_latent, tables.fields + value_latent
    key_levels, value_levels = (key_latent // 8 * 256).to(tl.uint32), (value_latent // 8 * 256).to(tl.uint32)
    token = tl.arange(0, TILE)
    for tile in range(split * share, tl.minimum(split * share + share, tiles)):
        first = tile * TILE
        page = pages + tl.load(block_table + first // PAGE).to(tl.int64) * page_stride + first % PAGE // 4
        key_code = unpack(page, key_fields, PAGE // 4, 2 * HEADS_DIM, TILE // 4, PLANES)
        value_code = unpack(page, value_fields, PAGE // 4, 2 * HEADS_DIM, TILE // 4, PLANES)
        scores = tl.dot(cos_waves, even.to(tl.float16))
        scores = tl.dot(sin_waves, odd.to(tl.float16), scores)
        keys = tl.trans(look_up(tables.levels, key_levels, key_code))
        scores = tl.dot(keys, z_query, scores) * (unit * scale)[None, :]
        position = first + token
        visible = (position[:, None] < until[None, :]) & (position > 0)[:, None]
        probability, top, total, factor = softmax_step(tl.where(visible, scores, float("-inf")), top, total)
        values = look_up(tables.levels, value_levels, value_code)
        sums = tl.dot(values, probability.to(tl.float16), sums * factor[None, :])
        even, odd = turned(even, odd, cos, sin)
    return sums, top, total


@triton.jit
def attend_uniform(
    query, absorbed, pages, block_table, tables, partial, rows, place, real, until, head, split, splits, scale, page_stride,
    HEADS_DIM, HEAD_DIM: tl.constexpr, D: tl.constexpr, PAIRS: tl.constexpr, ROWS: tl.constexpr, TILE: tl.constexpr,
    PAGE: tl.constexpr, PLANES: tl.constexpr,
):  # fmt: skip
    """`attend_stored` where levels are evenly spaced."""
    latent = tl.arange(0, D)
    used = latent < HEAD_DIM
    mask = used[:, None] & real[None, :]
    key_latent = head * HEAD_DIM + tl.where(used, latent, 0)
    value_latent = HEADS_DIM + key_latent
    even, odd = mean_terms(query, rows, real, head, tables, HEADS_DIM, HEAD_DIM, PAIRS)
    z_query = tl.load(absorbed + place[None, :] * HEAD_DIM + latent[:, None], mask, 0)

    top, sink_weight = tl.full((ROWS,), float("-inf"), tl.float32), tl.zeros((ROWS,), tl.float32)
    sink_sums = tl.zeros((D, ROWS), tl.float32)
    if split == 0:
        page = pages + tl.load(block_table).to(tl.int64) * page_stride
        score, y = read_sink(
            query, z_query, page, tables, rows, mask, latent, key_latent, value_latent, HEADS_DIM, PAGE, PLANES
        )
        top = tl.where(until > 0, score * scale, float("-inf"))
        tl.store(partial.sink_scores + place, top, real)
        sink_weight = tl.where(until > 0, tl.exp2(sink_weight), 0)
        sink_sums = y * sink_weight[None, :]

    # Queries as whole numbers, in a unit of each row's own; what the offsets add is one number a row.
    z_query *= tl.load(tables.step + key_latent, used, 0)[:, None]
    unit = tl.max(tl.abs(z_query), 0) / LARGEST
    unit = tl.where(unit > 0, unit, 1)
    number = tl.floor(z_query / unit[None, :] + 0.5)
    constant = tl.sum(number * tl.load(tables.offset + key_latent, used, 0)[:, None], 0) * unit * scale
    whole_query = halves(number.to(tl.int32)).to(tl.int8)
    unit *= scale
    amplitude = tl.sqrt(tl.max(even * even + odd * odd, 0))
    amplitude = tl.where(amplitude > 0, amplitude, 1)
    even, odd = even / amplitude[None, :], odd / amplitude[None, :]
    amplitude *= scale

    tiles = tl.cdiv(tl.max(until), TILE)
    share = tl.cdiv(tiles, splits)
    cos_first, sin_first, cos, sin, _, _ = series(tables, split * share * TILE, HEAD_DIM, PAIRS, TILE)
    column, token = tl.arange(0, 2 * PAIRS), shuffled(tl.arange(0, TILE), TILE)
    pair = column % PAIRS
    waves = tables.waves + token[:, None] * HEAD_DIM + (column // PAIRS * (HEAD_DIM // 2) + pair)[None, :]
    waves = tl.load(waves, (pair < HEAD_DIM // 2)[None, :], 0)
    even, odd = turned(even, odd, cos_first, sin_first)

    four = tl.arange(0, D // 4) * 4
    four = tables.fields + head * HEAD_DIM + tl.where(four < HEAD_DIM, four, 0)
    totals = tl.zeros((TILE, ROWS), tl.float32)
    sums = tl.zeros((D, ROWS), tl.float32)
    factor_0 = tl.full((ROWS,), 1, tl.float32)
    begin, end = split * share, tl.minimum(split * share + share, tiles)
    # One tile ahead, so that the bytes of the tile after next can be asked for without waiting for their address.
    block = tl.load(block_table + begin * TILE // PAGE, begin < end, 0)
    for tile in range(begin, end):
        first = tile * TILE
        page = pages + block.to(tl.int64) * page_stride + first % PAGE // 4
        block = tl.load(block_table + (first + TILE) // PAGE, tile + 1 < end, 0)
        keys = key_bytes(page, four, 2 * HEADS_DIM, PAGE // 4, TILE // 4, PLANES)
        values = value_bytes(page, four + HEADS_DIM, 2 * HEADS_DIM, PAGE // 4, TILE // 4, PLANES)
        mean = tl.dot(waves, fine_halves(stacked(even, odd)))
        mean_high, mean_low = tl.split(tl.reshape(mean, (TILE, ROWS, 2)))
        products = tl.dot(keys, whole_query, tl.full((TILE, 2 * ROWS), ORIGIN_BITS, tl.int32), out_dtype=tl.int32)
        scores = whole(products) * unit[None, :] + ((mean_high + mean_low) * amplitude[None, :] + constant[None, :])
        position = first + token
        visible = (position[:, None] < until[None, :]) & (position > 0)[:, None]
        scores = tl.where(visible, scores, float("-inf"))
        tile_top = tl.max(scores, 0)
        new_top = tl.maximum(top, tile_top)
        base = tl.where(tile_top == float("-inf"), 0, tile_top)
        weight, factor = tl.where(tile_top == float("-inf"), 0, tl.exp2(tile_top - new_top)), tl.exp2(top - new_top)
        factor = tl.where(new_top == float("-inf"), 1, factor)
        top = new_top
        probability = tl.exp2(scores - base[None, :] + LOG2_LARGEST) + ORIGIN
        totals = totals * factor[None, :] + (probability - ORIGIN) * weight[None, :]
        counts = probability.to(tl.int32, bitcast=True) - ORIGIN_BITS
        products_v = tl.dot(values, in_order(halves(counts)).to(tl.int8), tl.full((D, 2 * ROWS), ORIGIN_BITS, tl.int32), out_dtype=tl.int32)
        sums = sums * factor[None, :] + whole(products_v) * weight[None, :]
        factor_0 *= factor
        even, odd = turned(even, odd, cos, sin)
    total = tl.sum(totals, 0)
    # From the order of `value_bytes`.
    sums = tl.permute(tl.reshape(sums, (4, D // 4, ROWS)), (1, 0, 2))
    sums = tl.reshape(sums, (D, ROWS))
    sums = sums * tl.load(tables.step + value_latent, used, 0)[:, None]
    sums += tl.load(tables.offset + value_latent, used, 0)[:, None] * total[None, :]
    # In the units of `softmax_step`.
    share_of = tl.exp2(tl.zeros((ROWS,), tl.float32) + (HEADROOM - LOG2_LARGEST))
    sink_weight *= factor_0 * LARGEST
    sums += sink_sums * (factor_0 * LARGEST)[None, :]
    return sums * share_of[None, :], top, (total + sink_weight) * share_of


@triton.jit
def attend_exact(
    query, exact, sequence, rows, real, begin, last, head, scale,
    HEAD_DIM: tl.constexpr, D: tl.constexpr, ROWS: tl.constexpr, TILE: tl.constexpr, PAGE: tl.constexpr,
):  # fmt: skip
    """The exact tokens from `begin` to `last` [rows]: sums of values, maximum and sum of the softmax. None if PAGE is 0."""
    top, total = tl.full((ROWS,), float("-inf"), tl.float32), tl.zeros((ROWS,), tl.float32)
    sums = tl.zeros((D, ROWS), tl.float32)
    if PAGE > 0:
        dim = tl.arange(0, D)
        known = dim < HEAD_DIM
        block_table = exact.block_table + sequence.to(tl.int64) * exact.table_stride
        heads = exact.pages + head * exact.head_stride
        q = load_query(query, rows, dim, known[:, None] & real[None, :])
        end = tl.max(last) + 1
        for first in range(tl.min(tl.where(real, begin, end)), end, TILE):
            position = first + tl.arange(0, TILE)
            block = tl.load(block_table + position // PAGE, position < end, 0).to(tl.int64)
            cell = heads + block * exact.page_stride + position % PAGE * exact.token_stride
            mask = (position < end)[:, None] & known[None, :]
            # Products in tf32, where types of 16 bits are exact, for Triton's interpreter multiplies no bfloat16.
            keys = tl.load(cell[:, None] + dim[None, :], mask, 0).to(tl.float32)
            values = tl.load(cell[:, None] + HEAD_DIM + dim[None, :], mask, 0).to(tl.float32)
            scores = tl.dot(keys, q, input_precision="tf32") * scale
            visible = (position[:, None] >= begin[None, :]) & (position[:, None] <= last[None, :])
            probability, top, total, factor = softmax_step(tl.where(visible, scores, float("-inf")), top, total)
            sums = tl.dot(tl.trans(values), probability, sums * factor[None, :], input_precision="tf32")
    return sums, top, total


@triton.jit(do_not_specialize=["tokens", "number", "splits"])
def attend_kernel(
    query, absorbed, pages, sequences, tables, exact, partial,
    tokens, number, splits, scale, stride_token, stride_head, page_stride,
    GROUP: tl.constexpr, HEAD_DIM: tl.constexpr, D: tl.constexpr, PAIRS: tl.constexpr, ROWS: tl.constexpr,
    TILE: tl.constexpr, PAGE: tl.constexpr, PLANES: tl.constexpr, EXACT_PAGE: tl.constexpr, WHOLE_CHUNK: tl.constexpr,
    UNIFORM: tl.constexpr,
):  # fmt: skip
    """Part of the attention of ROWS rows of one sequence and KV head.

    Grid: (tiles of rows, H, splits, and one more for the exact window where there is one). Programs past a sequence's
    rows or its tokens end at once.
    """
    tile, head, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    heads = tl.num_programs(1)
    sequence = sequence_of(sequences.query_start, tile, number, GROUP, ROWS)
    start = tl.load(sequences.query_start + sequence)
    queries = tl.load(sequences.query_start + sequence + 1) - start
    first_row = (tile - start * GROUP // ROWS - sequence) * ROWS
    if first_row >= queries * GROUP:
        return
    row = first_row + tl.arange(0, ROWS)
    real = row < queries * GROUP
    token, query_head = (start + row // GROUP).to(tl.int64), head * GROUP + row % GROUP
    rows, place = token * stride_token + query_head * stride_head, token * (heads * GROUP) + query_head
    first_position = tl.load(sequences.lengths + sequence) - queries
    last = tl.where(real, first_position + row // GROUP, -1)
    until = last + 1
    if EXACT_PAGE > 0:
        until = tl.maximum(until - exact.size, 0)
        if WHOLE_CHUNK:
            until = tl.where(real, tl.minimum(until, first_position), 0)

    score_scale = scale * LOG2_E
    if split < splits:
        sums, top, total = (attend_uniform if UNIFORM else attend_stored)(
            query, absorbed, pages, sequences.block_table + sequence.to(tl.int64) * sequences.table_stride, tables,
            partial, rows, place, real, until, head, split, splits, score_scale, page_stride,
            heads * HEAD_DIM, HEAD_DIM, D, PAIRS, ROWS, TILE, PAGE, PLANES,
        )  # fmt: skip
    else:
        sums, top, total = attend_exact(
            query, exact, sequence, rows, real, until, last, head, score_scale, HEAD_DIM, D, ROWS, TILE, EXACT_PAGE
        )  # fmt: skip
    weight = tl.where(total > 0, top + tl.log2(total) - HEADROOM, float("-inf"))
    place += split.to(tl.int64) * tokens * (heads * GROUP)
    tl.store(partial.weights + place, weight, real)
    dim = tl.arange(0, D)
    sums /= tl.where(total > 0, total, 1)[None, :]
    written = (dim < HEAD_DIM)[:, None] & (real & (weight > float("-inf")))[None, :]
    tl.store(partial.sums + place[None, :] * HEAD_DIM + dim[:, None], sums, written)


@triton.jit(do_not_specialize=["rows", "number", "splits"])
def finish_kernel(
    partial, tables, query_start, output,
    rows, number, splits, stride_token,
    GROUP: tl.constexpr, HEAD_DIM: tl.constexpr, EXACT: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
    STEP: tl.constexpr, SPLITS: tl.constexpr,
):  # fmt: skip
    """Merge the splits, of which there are at most SPLITS, and rebuild the values.

    Output [T, H * G, D], zeros past the last sequence's tokens. Grid: (tiles of the step's rows, H, tiles of dimensions).
    """
    row, head, heads = tl.program_id(0) * ROWS + tl.arange(0, ROWS), tl.program_id(1), tl.num_programs(1)
    dim = tl.program_id(2) * COLUMNS + tl.arange(0, COLUMNS)
    token = row // GROUP
    place = token.to(tl.int64) * (heads * GROUP) + head * GROUP + row % GROUP
    asked = token < tl.load(query_start + number)
    step = (rows // GROUP).to(tl.int64) * (heads * GROUP)

    # All splits' weights at once: one after the other they would be waited for one after the other.
    number_of = tl.arange(0, SPLITS)
    weights = partial.weights + number_of[:, None] * step + place[None, :]
    weights = tl.load(weights, (number_of < splits)[:, None] & asked[None, :], float("-inf"))
    exact = tl.full((ROWS,), float("-inf"), tl.float32)
    if EXACT:
        exact = tl.load(partial.weights + splits * step + place, asked, float("-inf"))
    top = tl.maximum(tl.maximum(tl.max(weights, 0), exact), -1e30)
    exact = tl.exp2(exact - top)
    stored = tl.sum(tl.exp2(weights - top[None, :]), 0)
    total = tl.where(asked, stored + exact, 1)

    values = (heads + head) * HEAD_DIM
    known = dim < HEAD_DIM
    out = tl.zeros((ROWS, COLUMNS), tl.float32)
    for first in range(0, HEAD_DIM, STEP):
        latent = first + tl.arange(0, STEP)
        sums = tl.zeros((ROWS, STEP), tl.float32)
        for split in tl.range(0, splits, loop_unroll_factor=4):
            weight = tl.exp2(tl.load(partial.weights + split * step + place, asked, float("-inf")) - top)
            read = partial.sums + (split * step + place)[:, None] * HEAD_DIM + latent[None, :]
            read = tl.load(read, asked[:, None] & (latent < HEAD_DIM)[None, :], 0)
            # Where nothing was read nothing was written.
            sums += tl.where(weight[:, None] > 0, weight[:, None] * read, 0)
        basis = tables.synthesis + (values + dim)[None, :] * HEAD_DIM + latent[:, None]
        basis = tl.load(basis, (latent < HEAD_DIM)[:, None] & known[None, :], 0)
        out = tl.dot(sums, basis, out, input_precision="ieee")

    mean, sink = tl.load(tables.mean + values + dim, known, 0), tl.load(tables.sink + values + dim, known, 0)
    on_sink = tl.exp2(tl.load(partial.sink_scores + place, asked, float("-inf")) - top)
    out += stored[:, None] * mean[None, :] + on_sink[:, None] * (sink - mean)[None, :]
    if EXACT:
        part = partial.sums + (splits * step + place)[:, None] * HEAD_DIM + dim[None, :]
        out += exact[:, None] * tl.load(part, (exact > 0)[:, None] & known[None, :], 0)
    mask = (row < rows)[:, None] & known[None, :]
    place = token.to(tl.int64) * stride_token + (head * GROUP + row % GROUP) * HEAD_DIM
    tl.store(output + place[:, None] + dim[None, :], (out / total[:, None]).to(output.dtype.element_ty), mask)
