"""`uniform`: the same widths in every layer and head, for keys and for values. What the other planners have to beat."""

from torch import Tensor

from calibration.plan import Plan, left_by, spread
from vllm_kvsplice.errors import KVSpliceError
from vllm_kvsplice.layout import MAX_WIDTH, TOKEN_ALIGNMENT


def plan_uniform(distortion: Tensor, budget_bytes: int) -> Plan:
    """The widest even plan in `budget_bytes` per token over all layers; `distortion` is [2, L, H, G, 9].

    Raises:
        KVSpliceError: the budget is below one byte for every head's keys and values, or above 8 bits everywhere.

    """
    kinds, layers, heads, groups, _ = distortion.shape
    layer_bytes = budget_bytes // layers // TOKEN_ALIGNMENT * TOKEN_ALIGNMENT
    head_bytes = layer_bytes // (kinds * heads)
    if not 1 <= head_bytes <= groups * MAX_WIDTH:
        raise KVSpliceError(
            f"a budget of {budget_bytes} bytes per token is {head_bytes} bytes for the keys of a head, outside "
            f"1..{groups * MAX_WIDTH}; choose --bits between 1.5 and 8"
        )
    widths = spread(head_bytes, groups).expand(kinds, layers, heads, groups).contiguous()
    reason = f"{head_bytes} bytes for the keys and {head_bytes} for the values of every head alike"
    return Plan(widths, left_by(distortion, widths), "uniform", ((reason,) * heads,) * layers)
