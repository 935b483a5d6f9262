"""`budget`: reverse water-filling in the Fisher metric (`calibration.plan.plan_budget`), with what it saw in each head."""

from dataclasses import replace

from torch import Tensor

from calibration.plan import Plan, plan_budget
from vllm_kvsplice.layout import GROUP


def plan_by_fisher(distortion: Tensor, budget_bytes: int) -> Plan:
    """The plan of least distortion in `budget_bytes` per token over all layers; `distortion` is [2, L, H, G, 9]."""
    plan = plan_budget(distortion, budget_bytes)
    bits = plan.widths.double().mean(-1)
    # What a head would cost if nothing of it were stored, beside the average head of its kind.
    at_stake = distortion[..., 0].sum(-1)
    at_stake = at_stake / at_stake.mean((1, 2), keepdim=True).clamp_min(1e-30)
    _, layers, heads, groups = plan.widths.shape
    reasons = tuple(
        tuple(
            "; ".join(
                f"{kind} {bits[i, layer, head]:.2f} bits in {int((plan.widths[i, layer, head] > 0).sum()) * GROUP} of "
                f"{groups * GROUP} latents, {at_stake[i, layer, head]:.2g}x the average head's loss at stake"
                for i, kind in enumerate(("keys", "values"))
            )
            for head in range(heads)
        )
        for layer in range(layers)
    )
    return replace(plan, reasons=reasons)
