"""`budget`: reverse water-filling in the Fisher metric (`calibration.plan.plan_budget`), with what it saw in each head."""

from dataclasses import replace

from torch import Tensor

from calibration.plan import Plan, plan_budget
from vllm_kvsplice.layout import GROUP


def plan_by_fisher(distortion: Tensor, budget_bytes: int) -> Plan:
    """The plan of least distortion in `budget_bytes` per token over all layers; `distortion` is [2, L, H, G, 9]."""
    plan = plan_budget(distortion, budget_bytes)
    # What a head would cost if nothing of it were stored, beside the average head of its kind.
    at_stake = distortion[..., 0].sum(-1)
    at_stake = at_stake / at_stake.mean((1, 2), keepdim=True).clamp_min(1e-30)
    _, layers, heads, _ = plan.widths.shape
    reasons = tuple(
        tuple(_reason(plan.widths[:, layer, head], at_stake[:, layer, head]) for head in range(heads))
        for layer in range(layers)
    )
    return replace(plan, reasons=reasons)


def _reason(widths: Tensor, at_stake: Tensor) -> str:
    """In words: one head's `widths` [2, G], and how many times the average head's loss is at stake [2]."""
    return "; ".join(
        f"{kind} {own.double().mean():.2f} bits in {int((own > 0).sum()) * GROUP} of {len(own) * GROUP} latents, "
        f"{share:.2g}x the average head's loss at stake"
        for kind, own, share in zip(("keys", "values"), widths, at_stake, strict=True)
    )
