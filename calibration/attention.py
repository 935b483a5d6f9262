"""A tap on the attention of any Hugging Face causal LM: see, or replace, the keys and values a layer attends to.

`tapped` puts other keys and values in their place; `watched` only looks, at queries as well.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, sdpa_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from vllm_kvsplice.errors import KVSpliceError

ATTENTION = "kvsplice"

# (layer index, key, value) -> (key, value); keys are rotated, tensors are [batch, H, T, D].
Tap = Callable[[int, Tensor, Tensor], tuple[Tensor, Tensor]]
# (layer index, query [batch, G * H, T, D], key [batch, H, T, D], factor of their products), both rotated.
Watch = Callable[[int, Tensor, Tensor, float], None]


@dataclass(frozen=True)
class Reading:
    """Which tokens a query reads as they are; all others it reads as the tap returns them.

    Attributes:
        recent: W; a query at position i reads j > i - W exactly (`vllm_kvsplice.engines.Window`).
        prompt: queries before this position read everything exactly, as those of a prompt that a server with
            ``prefill: exact`` reads in one step.

    """

    recent: int = 0
    prompt: int = 0

    def exact_keys(self, tokens: int, device: torch.device) -> Tensor:
        """bool [T, T]: whether the query of the row reads the key of the column exactly."""
        positions = torch.arange(tokens, device=device)
        query = positions[:, None]
        return (positions > query - self.recent) | (query < self.prompt)

    def exact_values(self, tokens: int, device: torch.device) -> Tensor:
        """The same of values."""
        return self.exact_keys(tokens, device)


AS_STORED = Reading()

_active: list[tuple[Tap, Reading]] = []
_watching: list[Watch] = []


def _tapped_attention(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    **options: Any,
) -> tuple[Tensor, None]:
    if options.get("softcap") is not None:
        raise KVSpliceError("this model caps its attention logits, which KVSplice does not support")
    # Layers with a sliding window keep their dense cache in the server, so nothing is measured or changed there.
    full = options.get("sliding_window") is None
    if _watching and full:
        _watching[-1](module.layer_idx, query, key, options.get("scaling") or query.shape[-1] ** -0.5)
    if _active and full:
        tap, reading = _active[-1]
        stored = tap(module.layer_idx, key, value)
        if reading == AS_STORED:
            key, value = stored
        else:
            key, value, attention_mask = _mixed(stored, (key, value), attention_mask, reading)
    return sdpa_attention_forward(module, query, key, value, attention_mask, **options)


def _mixed(
    stored: tuple[Tensor, Tensor], exact: tuple[Tensor, Tensor], mask: Tensor | None, reading: Reading
) -> tuple[Tensor, Tensor, Tensor]:
    """Every token in each of the ways it may be read, under a mask that shows each query one of them."""
    tokens, device = exact[0].shape[2], exact[0].device
    exact_keys, exact_values = reading.exact_keys(tokens, device), reading.exact_values(tokens, device)
    visible = torch.ones_like(exact_keys).tril() if mask is None else mask
    ways = []
    for key, key_read in ((stored[0], ~exact_keys), (exact[0], exact_keys)):
        for value, value_read in ((stored[1], ~exact_values), (exact[1], exact_values)):
            if (read := key_read & value_read).any():
                ways.append((key, value, visible & read))
    keys, values, masks = zip(*ways, strict=True)
    return torch.cat(keys, 2), torch.cat(values, 2), torch.cat(masks, -1)


ALL_ATTENTION_FUNCTIONS.register(ATTENTION, _tapped_attention)
ALL_MASK_ATTENTION_FUNCTIONS.register(ATTENTION, sdpa_mask)


@contextmanager
def tapped(model: PreTrainedModel, tap: Tap, reading: Reading = AS_STORED) -> Iterator[None]:
    """Within this block, every full-attention layer of `model` attends to what `tap` returns.

    What `reading` exempts it attends to as it is.

    The model must have been loaded with ``attn_implementation="kvsplice"`` (`calibration.models.load_model` does).
    """
    assert model.config._attn_implementation == ATTENTION, "load the model with calibration.models.load_model"
    _active.append((tap, reading))
    try:
        yield
    finally:
        _active.pop()


@contextmanager
def watched(model: PreTrainedModel, watch: Watch) -> Iterator[None]:
    """Within this block, `watch` sees what every full-attention layer of `model` attends with; text must not be padded.

    Works with any attention implementation the model was loaded with, which it has again afterwards.
    """
    before = model.config._attn_implementation
    if before != ATTENTION:
        model.set_attn_implementation(ATTENTION)
    _watching.append(watch)
    try:
        yield
    finally:
        _watching.pop()
        if before != ATTENTION:
            model.set_attn_implementation(before)
