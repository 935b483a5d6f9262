"""Kernels that attend to what is stored. Dimensions: `vllm_kvsplice.engines.contract`; arguments in groups: `tables`.

Three launches: `absorb_kernel` takes queries to the latents' space, `attend_kernel` reads the pages in splits, and
`finish_kernel` merges the splits and takes the result back. Grids follow from the shapes of tensors alone, never from
sequence lengths, so a CUDA graph that captured them serves any lengths.

*Rows* are the queries of one KV head: row r of a sequence is query head r % G of its token r // G. *Scores* are exponents
of two, not of e.
"""

import triton
import triton.language as tl

from vllm_kvsplice.engines.triton.kernels.lookup import attend_any
from vllm_kvsplice.engines.triton.kernels.means import load_query
from vllm_kvsplice.engines.triton.kernels.rows import LOG2_E, read_by, rows_of
from vllm_kvsplice.engines.triton.kernels.softmax import HEADROOM, normalised, softmax_step
from vllm_kvsplice.engines.triton.kernels.uniform import attend_uniform


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
def attend_exact(
    query, sequences, exact, sequence, rows, real, begin, last, head, scale,
    HEAD_DIM: tl.constexpr, D: tl.constexpr, ROWS: tl.constexpr, TILE: tl.constexpr, PAGE: tl.constexpr,
):  # fmt: skip
    """The exact tokens from `begin` to `last` [rows]: what `normalised` returns. None if PAGE is 0."""
    top, total = tl.full((ROWS,), float("-inf"), tl.float32), tl.zeros((ROWS,), tl.float32)
    sums = tl.zeros((D, ROWS), tl.float32)
    if PAGE > 0:
        dim = tl.arange(0, D)
        known = dim < HEAD_DIM
        block_table = sequences.exact_table + sequence.to(tl.int64) * sequences.exact_stride
        heads = exact.pages + head * exact.head_stride
        q = load_query(query, rows, dim, known[:, None] & real[None, :])
        end = tl.max(last) + 1
        for first in range(tl.min(tl.where(real, begin, end)), end, TILE):
            position = first + tl.arange(0, TILE)
            block = tl.load(block_table + position // PAGE, position < end, 0).to(tl.int64)
            cell = heads + block * exact.page_stride + position % PAGE * exact.token_stride
            mask = (position < end)[:, None] & known[None, :]
            # Products in tf32, where types of 16 bits are exact, for Triton's interpreter multiplies no bfloat16.
            precision: tl.constexpr = "tf32x3" if exact.pages.dtype.element_ty == tl.float32 else "tf32"
            keys = tl.load(cell[:, None] + dim[None, :], mask, 0).to(tl.float32)
            values = tl.load(cell[:, None] + HEAD_DIM + dim[None, :], mask, 0).to(tl.float32)
            scores = tl.dot(keys, q, input_precision=precision) * scale
            visible = (position[:, None] >= begin[None, :]) & (position[:, None] <= last[None, :])
            probability, top, total, factor = softmax_step(tl.where(visible, scores, float("-inf")), top, total)
            sums = tl.dot(tl.trans(values), probability, sums * factor[None, :], input_precision=precision)
    return normalised(sums, top, total, HEADROOM)


@triton.jit(do_not_specialize=["tokens", "number", "splits"], do_not_specialize_on_alignment=["sequences"])
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
    sequence, start, queries, first_row = rows_of(sequences, tile, number, GROUP, ROWS)
    if first_row >= queries * GROUP:
        return
    row = first_row + tl.arange(0, ROWS)
    real = row < queries * GROUP
    token, query_head = (start + row // GROUP).to(tl.int64), head * GROUP + row % GROUP
    rows, place = token * stride_token + query_head * stride_head, token * (heads * GROUP) + query_head
    until, last = read_by(sequences, exact, sequence, queries, row, GROUP, EXACT_PAGE, WHOLE_CHUNK)

    score_scale = scale * LOG2_E
    if split < splits:
        sums, weight = (attend_uniform if UNIFORM else attend_any)(
            query, absorbed, pages, sequences.block_table + sequence.to(tl.int64) * sequences.table_stride, tables,
            partial, rows, place, real, until, head, split, splits, score_scale, page_stride,
            heads * HEAD_DIM, HEAD_DIM, D, PAIRS, ROWS, TILE, PAGE, PLANES,
        )  # fmt: skip
    else:
        sums, weight = attend_exact(
            query, sequences, exact, sequence, rows, real, until, last, head, score_scale, HEAD_DIM, D, ROWS, TILE,
            EXACT_PAGE,
        )  # fmt: skip
    place += split.to(tl.int64) * tokens * (heads * GROUP)
    tl.store(partial.weights + place, weight, real)
    dim = tl.arange(0, D)
    written = (dim < HEAD_DIM)[:, None] & (real & (weight > float("-inf")))[None, :]
    tl.store(partial.sums + place[None, :] * HEAD_DIM + dim[:, None], sums, written)


@triton.jit(do_not_specialize=["rows", "number", "splits"], do_not_specialize_on_alignment=["query_start"])
def finish_kernel(
    partial, tables, query_start, output,
    rows, number, splits, stride_token,
    GROUP: tl.constexpr, HEAD_DIM: tl.constexpr, D: tl.constexpr, EXACT: tl.constexpr, ROWS: tl.constexpr,
    COLUMNS: tl.constexpr, SPLITS: tl.constexpr, GATHER: tl.constexpr,
):  # fmt: skip
    """Merge the splits, of which there are at most SPLITS, GATHER at a time, and rebuild the values.

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
    latent = tl.arange(0, D)
    sums = tl.zeros((ROWS, D), tl.float32)
    for split in range(0, splits, GATHER):
        part = split + tl.arange(0, GATHER)
        source = part[:, None] * step + place[None, :]
        weight = tl.load(partial.weights + source, (part < splits)[:, None] & asked[None, :], float("-inf"))
        # Where nothing was read nothing was written.
        written = (weight > float("-inf"))[:, :, None] & (latent < HEAD_DIM)[None, None, :]
        read = tl.load(partial.sums + source[:, :, None] * HEAD_DIM + latent[None, None, :], written, 0)
        sums += tl.sum(tl.exp2(weight - top[None, :])[:, :, None] * read, 0)
    basis = tables.synthesis + (values + dim)[None, :] * HEAD_DIM + latent[:, None]
    basis = tl.load(basis, (latent < HEAD_DIM)[:, None] & known[None, :], 0)
    out = tl.dot(sums, basis, input_precision="tf32x3")

    mean, sink = tl.load(tables.mean + values + dim, known, 0), tl.load(tables.sink + values + dim, known, 0)
    on_sink = tl.exp2(tl.load(partial.sink_scores + place, asked, float("-inf")) - top)
    out += stored[:, None] * mean[None, :] + on_sink[:, None] * (sink - mean)[None, :]
    if EXACT:
        part = partial.sums + (splits * step + place)[:, None] * HEAD_DIM + dim[None, :]
        out += exact[:, None] * tl.load(part, (exact > 0)[:, None] & known[None, :], 0)
    mask = (row < rows)[:, None] & known[None, :]
    place = token.to(tl.int64) * stride_token + (head * GROUP + row % GROUP) * HEAD_DIM
    tl.store(output + place[:, None] + dim[None, :], (out / total[:, None]).to(output.dtype.element_ty), mask)
