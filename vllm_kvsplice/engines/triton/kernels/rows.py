"""Which rows a program answers, and which tokens they read.

*Rows* are the queries of one KV head: row r of a sequence is query head r % G of its token r // G. *Scores* are exponents
of two, not of e.
"""

import triton
import triton.language as tl

LOG2_E = tl.constexpr(1.4426950408889634)


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
def rows_of(sequences, tile, number, GROUP: tl.constexpr, ROWS: tl.constexpr):
    """The sequence of `tile`, its first token in the step, how many it has, and the tile's first row among its own."""
    sequence = sequence_of(sequences.query_start, tile, number, GROUP, ROWS)
    start = tl.load(sequences.query_start + sequence)
    queries = tl.load(sequences.query_start + sequence + 1) - start
    return sequence, start, queries, (tile - start * GROUP // ROWS - sequence) * ROWS


@triton.jit
def read_by(
    sequences, exact, sequence, queries, row, GROUP: tl.constexpr, EXACT_PAGE: tl.constexpr, WHOLE_CHUNK: tl.constexpr
):
    """Positions [rows] before which tokens are read as stored, and the last that is read; 0 and -1 past the queries."""
    real = row < queries * GROUP
    first_position = tl.load(sequences.lengths + sequence) - queries
    last = tl.where(real, first_position + row // GROUP, -1)
    until = last + 1
    if EXACT_PAGE > 0:
        until = tl.maximum(until - exact.size, 0)
        if WHOLE_CHUNK:
            until = tl.where(real, tl.minimum(until, first_position), 0)
    return until, last
