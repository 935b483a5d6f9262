"""What errors cost as measured under compression, in place of what Fisher information expects of them.

Fisher information is that of the uncompressed model, and of few tokens: its largest directions come out too large and its
smallest too small, and what later layers make of an error is overestimated. An error scaled by s costs about s^2 times as
much, so the derivative of KL(uncompressed || compressed) with respect to s at 1 is twice what it costs, the currency of
distortions (docs/codec.md). One backward pass tells it of every group at once.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from transformers import PreTrainedModel

from calibration.attention import Reading
from calibration.fit.coder import FittedCodec
from calibration.fit.finetune import task_loss
from calibration.fit.trainable import TrainableCodec
from calibration.plan import at_widths
from vllm_kvsplice.layout import GROUP
from vllm_kvsplice.rotary import Rotary

# What the expectation counts for beside measurements, as a share of the average head: of what hardly costs anything little
# can be measured.
_PRIOR = 0.1


def marginal_cost(
    model: PreTrainedModel,
    fitted: FittedCodec,
    layers: Sequence[int],
    rotary: Rotary | None,
    windows: Tensor,
    reading: Reading,
    progress: Callable[[], None],
) -> Tensor:
    """The share of each group of latents in the divergence, times two, in nats per token: [2, L, H, G].

    Args:
        model: loaded by `calibration.models.load_model`.
        fitted: the codec under which it is measured.
        layers: the model's numbers of the L layers of `fitted`.
        rotary: the model's rotary embedding, None without.
        windows: token ids, int64 [W, T].
        reading: which tokens are read exactly.
        progress: called after every window.

    """
    fitted = fitted.to(model.device)
    codec = TrainableCodec(fitted, layers, rotary)
    scale = torch.ones(fitted.plan.widths.shape, device=model.device, requires_grad=True)
    analysis = torch.stack((fitted.key.analysis, fitted.value.analysis))
    synthesis = torch.linalg.inv(analysis)
    rows = {layer: row for row, layer in enumerate(layers)}

    def scaled(kind: int, row: int, exact: Tensor, stored: Tensor) -> Tensor:
        error = (stored - exact).detach().float() @ analysis[kind, row].mT
        error = error * scale[kind, row].repeat_interleave(GROUP, -1)[:, None]
        return exact + (error @ synthesis[kind, row].mT).to(exact.dtype)

    def read(layer: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        if layer not in rows:
            return key, value
        with torch.no_grad():
            stored_key, stored_value = codec(layer, key, value)
        return scaled(0, rows[layer], key, stored_key), scaled(1, rows[layer], value, stored_value)

    for window in windows.to(model.device):
        (task_loss(model, read, window, reading) * len(window) / windows.numel()).backward()
        progress()
    assert scale.grad is not None
    return scale.grad.cpu().double()


def corrected(distortion: Tensor, widths: Tensor, cost: Tensor) -> Tensor:
    """`distortion` scaled to what was measured: overall, by kind and rank of a group, and by head.

    Single groups are not told apart: what is measured of one is mostly noise.

    Args:
        distortion: expected, of each group at widths 0..8, [2, L, H, G, 9].
        widths: under which `cost` was measured, both [2, L, H, G].

    """
    expected = at_widths(distortion, widths).double()
    factor = torch.ones_like(expected)
    for alike in ((0, 1, 2, 3), (1, 2), (3,)):
        left = (expected * factor).sum(alike, keepdim=True)
        prior = _PRIOR * left.mean()
        factor = factor * (cost.sum(alike, keepdim=True).clamp_min(0) + prior) / (left + prior).clamp_min(1e-30)
    return distortion * factor[..., None].to(distortion.dtype)
