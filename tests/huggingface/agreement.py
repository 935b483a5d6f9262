"""What it means that two ways of computing logits agree."""

from torch import Tensor

# Two shapes of the same product differ in the last bit, and through it once in a while by a flipped code (docs/codec.md).
FLOOR = 0.00003
# One that flips early spreads to every later token of its row: by up to 0.066 on a tiny Llama.
FLIPPED = 0.1


def agree(one: Tensor, other: Tensor) -> bool:
    """Whether three quarters of logits are equal up to rounding, and the others up to a flipped code."""
    differences = (one - other).abs().flatten()
    return bool(differences.quantile(0.75) < FLOOR and differences.max() < FLIPPED)
