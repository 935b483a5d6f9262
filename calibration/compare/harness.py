"""Perplexity of one model on one text under every method: the same windows, the same rule for position 0.

Mode `all` of `kvsplice eval`: every attended key and value is read as the method stores it, in prompts as in answers, and
position 0, the attention sink, is read exactly and has no part in any method's scales. It counts as stored like any other
token. An exact window of W newest tokens is read under every method that has none of its own, and costs each of them a
16-bit copy beside what it stores, as it does in our server.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel

from calibration.attention import Reading, Tap, tapped
from calibration.compare.methods import Method
from calibration.evaluate import summed_loss
from vllm_kvsplice.artifact import BASELINE_BITS, ModelShape


@dataclass(frozen=True)
class Row:
    """A method's place: what it stores and what that costs, beside the perplexity of the model as it is.

    `standard_error_percent` is that of the change, from how it differs between windows; NaN of a single one.
    """

    method: str
    family: str
    ours: bool
    bits_per_element: float
    ppl: float
    change_percent: float
    standard_error_percent: float
    baseline_ppl: float
    tokens: int
    context: int
    recent_window: int


def compare(
    model: PreTrainedModel,
    methods: Sequence[Method],
    windows: Tensor,
    recent: int,
    progress: Callable[[], None],
) -> Iterator[Row]:
    """Judge `methods`, one row each as soon as it is known.

    Args:
        model: loaded with `calibration.models.load_model`, in float32 where figures are to be quoted.
        methods: what to judge.
        windows: token ids [W, T].
        recent: W of the exact window.
        progress: called once per window for the model as it is and for each method.

    """
    context = windows.shape[1]
    plain = _nats_per_token(model, windows, progress)
    layers, shape = attended_layers(model), ModelShape.of(model.config)
    for method in methods:
        with tapped(model, _tap(method, shape.num_layers), method.own_window or Reading(recent)):
            compressed = _nats_per_token(model, windows, progress)
        growth = compressed - plain
        ratio = math.exp(growth.mean())
        spread = float(growth.std()) if len(windows) > 1 else math.nan
        yield Row(
            method=method.name,
            family=method.family,
            ours=method.ours,
            bits_per_element=total_bits(method, layers, shape, context, recent),
            ppl=math.exp(compressed.mean()),
            change_percent=100 * (ratio - 1),
            standard_error_percent=100 * ratio * spread / math.sqrt(len(windows)),
            baseline_ppl=math.exp(plain.mean()),
            tokens=len(windows) * (context - 1),
            context=context,
            recent_window=recent,
        )


def total_bits(method: Method, layers: Sequence[int], shape: ModelShape, context: int, recent: int) -> float:
    """Bits per element of `method` over the full-attention `layers`, dense ones and the exact window included."""
    dense = len(method.dense_layers(shape.num_layers) & set(layers)) / len(layers)
    stored = method.bits_per_element(context, shape.head_dim)
    window = 0.0 if method.own_window else BASELINE_BITS * min(recent, context) / context
    return dense * BASELINE_BITS + (1 - dense) * (stored + window)


def better_peer(row: Row, rows: Iterable[Row]) -> Row | None:
    """The smallest peer whose perplexity is no higher than that of `row`, one of ours."""
    better = [peer for peer in rows if not peer.ours and peer.ppl <= row.ppl]
    return min(better, key=lambda peer: peer.bits_per_element, default=None)


@torch.no_grad()
def attended_layers(model: PreTrainedModel) -> list[int]:
    """The model's full-attention layers, those whose cache is compressed."""
    found: list[int] = []

    def tap(layer: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        found.append(layer)
        return key, value

    with tapped(model, tap):
        model(torch.zeros(1, 1, dtype=torch.int64, device=model.device), use_cache=False)
    return found


def _tap(method: Method, num_layers: int) -> Tap:
    """What attention reads of one sequence under `method`: position 0 as it is, all others as restored."""
    dense = method.dense_layers(num_layers)

    def tap(layer: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        if layer in dense:
            return key, value
        positions = torch.arange(1, key.shape[2], device=key.device)
        keys, values = method.restore(layer, key[0, :, 1:].float(), value[0, :, 1:].float(), positions)
        return torch.cat((key[:, :, :1], keys[None].to(key)), 2), torch.cat(
            (value[:, :, :1], values[None].to(value)), 2
        )

    return tap


def _nats_per_token(model: PreTrainedModel, windows: Tensor, progress: Callable[[], None]) -> Tensor:
    """Mean negative log-likelihood of each window, float64 [W]."""
    nats = []
    for window in windows:
        nats.append(summed_loss(model, window) / (len(window) - 1))
        progress()
    return torch.tensor(nats, dtype=torch.float64)
