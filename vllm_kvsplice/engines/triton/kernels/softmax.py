"""Softmax in parts: each has probabilities in a scale of its own, and a weight by which parts are merged."""

import triton
import triton.language as tl

# Probabilities are rounded to float16 times 2**14: below 2**-14 that type has fewer bits.
HEADROOM = tl.constexpr(14.0)


@triton.jit
def softmax_step(scores, top, total):
    """Probabilities of `scores` [tokens, rows] times 2**HEADROOM, new maximum and sum, and the old sums' factor."""
    new_top = tl.maximum(top, tl.max(scores, 0))
    # Rows that have read nothing have no maximum.
    base = tl.where(new_top == float("-inf"), 0, new_top)
    probability, factor = tl.exp2(scores - base[None, :] + HEADROOM), tl.exp2(top - base)
    return probability, new_top, total * factor + tl.sum(probability, 0), factor


@triton.jit
def softmax_rows(scores, top, total):
    """`softmax_step` for scores [rows, tokens]; probabilities in float16."""
    new_top = tl.maximum(top, tl.max(scores, 1))
    # Rows that have read nothing have no maximum.
    base = tl.where(new_top == float("-inf"), 0, new_top)
    probability, factor = tl.exp2(scores - base[:, None] + HEADROOM), tl.exp2(top - base)
    return probability.to(tl.float16), new_top, total * factor + tl.sum(probability, 1), factor


@triton.jit
def normalised(sums, top, total, headroom):
    """`sums` [N, rows] for weights of sum 1, and the base-2 logarithm of the sum of exponentials; -inf where none was read.

    `total` [rows] is that sum times 2**(headroom - top), and `sums` are in the same scale.
    """
    weight = tl.where(total > 0, top + tl.log2(total) - headroom, float("-inf"))
    return sums / tl.where(total > 0, total, 1)[None, :], weight
