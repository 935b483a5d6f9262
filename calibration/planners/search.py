"""How many bits a limit on perplexity asks for."""

from bisect import bisect_left
from collections.abc import Callable

from vllm_kvsplice.errors import KVSpliceError

# From 1.5 to 8 bits, the sizes that planners accept.
SEARCH_BITS = tuple(eighths / 8 for eighths in range(12, 65))
CURVE_BITS = SEARCH_BITS[::2]


def search_bits(increase: Callable[[float], float], limit: float) -> float:
    """The fewest of `SEARCH_BITS` at which perplexity grows by at most `limit` (0.01 is 1 %), by bisection.

    Args:
        increase: measures the growth at so many bits; falling, but for noise.
        limit: of the growth.

    Raises:
        KVSpliceError: it grows by more even at 8 bits.

    """
    found = bisect_left(SEARCH_BITS, True, key=lambda bits: increase(bits) <= limit)
    if found == len(SEARCH_BITS):
        raise KVSpliceError(
            f"even at 8 bits perplexity grows by more than {100 * limit:g} %; allow more with --max-ppl-increase"
        )
    return SEARCH_BITS[found]
