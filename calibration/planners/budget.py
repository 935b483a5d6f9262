"""`budget`: reverse water-filling on measured, Fisher-weighted distortion.

The loss grows by about half the Fisher-weighted error of every key and value, so errors of different layers,
heads and kinds are in one currency and one budget serves them all (Cover & Thomas, Elements of Information Theory,
section 10.3.3, with measured rate-distortion curves in place of the Gaussian's).
"""

from dataclasses import replace

import torch
from torch import Tensor

from calibration.plan import Plan, left_by
from vllm_kvsplice.errors import KVSpliceError
from vllm_kvsplice.layout import GROUP, MAX_WIDTH, TOKEN_ALIGNMENT


def budget_for_bits(bits: float, num_groups: int) -> int:
    """Bytes per token that `num_groups` groups of 8 latents take at an average of `bits` per latent."""
    return int(bits * num_groups * GROUP / 8)


def budget_range(distortion: Tensor) -> tuple[int, int]:
    """The least and the most bytes per token that `plan_budget` takes for [2, L, H, G, 9]."""
    kinds, layers, heads, groups, _ = distortion.shape
    return layers * TOKEN_ALIGNMENT, layers * kinds * heads * groups * MAX_WIDTH


def plan_budget(distortion: Tensor, budget_bytes: int) -> Plan:
    """The widths that leave the least distortion in `budget_bytes` per token over all layers.

    Every layer's bytes come out as a multiple of 16, the size that pages are padded to, so no budget is lost to padding.

    Args:
        distortion: Fisher-weighted cost of each group at widths 0..8, [2, L, H, G, 9].
        budget_bytes: bytes per token over all L layers.

    Raises:
        KVSpliceError: the budget is below one 16-byte step per layer or above 8 bits everywhere.

    """
    kinds, layers, heads, groups, _ = distortion.shape
    per_layer = distortion.transpose(0, 1).reshape(layers, kinds * heads * groups, MAX_WIDTH + 1)
    least, most = budget_range(distortion)
    if not least <= budget_bytes <= most:
        raise KVSpliceError(
            f"a budget of {budget_bytes} bytes per token is outside {least}..{most} for {layers} layers; "
            f"choose --bits between {max(1.5, MAX_WIDTH * least / most):.3g} and {MAX_WIDTH}"
        )
    # A bit is only on offer after the bits below it: make each group's gains fall.
    gains = (per_layer[..., :-1] - per_layer[..., 1:]).cummin(-1).values.flatten(1)
    order = gains.sort(dim=1, descending=True, stable=True)
    steps = order.values.unflatten(1, (-1, TOKEN_ALIGNMENT)).sum(-1)
    bought = torch.zeros_like(steps, dtype=torch.bool)
    bought[:, 0] = True
    ranked = steps[:, 1:].flatten().sort(dim=0, descending=True, stable=True).indices
    chosen = ranked[: budget_bytes // TOKEN_ALIGNMENT - layers]
    bought[:, 1:] = torch.zeros(steps[:, 1:].numel(), dtype=torch.bool).index_fill(0, chosen, True).view(layers, -1)
    bits = torch.zeros_like(gains, dtype=torch.int64)
    bits.scatter_(1, order.indices, bought.repeat_interleave(TOKEN_ALIGNMENT, 1).long())
    widths = bits.unflatten(1, (-1, MAX_WIDTH)).sum(-1)
    widths = widths.view(layers, kinds, heads, groups).transpose(0, 1).contiguous()
    return Plan(widths, left_by(distortion, widths))


def plan_by_fisher(distortion: Tensor, budget_bytes: int) -> Plan:
    """`plan_budget`, with what it saw in each head."""
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
