"""A tap on the attention of any Hugging Face causal LM: see, or replace, the keys and values a layer attends to.

`tapped` puts other keys and values in their place; `watched` only looks, at queries as well. Both work with whatever
attention the model was loaded with, which it has again afterwards.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, sdpa_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from vllm_kvsplice.errors import KVSpliceError
from vllm_kvsplice.huggingface.attention import KeysValues, Reading, refuse_unsupported, visible_to

__all__ = ["AS_STORED", "ATTENTION", "Reading", "Tap", "Watch", "tapped", "watched"]

ATTENTION = "kvsplice_tap"

# (layer index, key, value) -> (key, value); keys are rotated, tensors are [batch, H, T, D].
Tap = Callable[[int, Tensor, Tensor], tuple[Tensor, Tensor]]
# (layer index, query [batch, G * H, T, D], key [batch, H, T, D], factor of their products), both rotated.
Watch = Callable[[int, Tensor, Tensor, float], None]

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
    refuse_unsupported(options)
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
            positions = torch.arange(key.shape[2], device=key.device)
            visible = visible_to(attention_mask, len(positions), len(positions), key.device)
            exact = (reading.exact(positions, positions), reading.exact_values(positions, positions))
            key, value, attention_mask = _mixed(stored, (key, value), visible, *exact)
    return sdpa_attention_forward(module, query, key, value, attention_mask, **options)


def _mixed(
    stored: KeysValues, exact: KeysValues, visible: Tensor, exact_keys: Tensor, exact_values: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Every token in each of the ways it may be read, under a mask that shows each query one of them."""
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
    """
    _active.append((tap, reading))
    try:
        with _switched(model):
            yield
    finally:
        _active.pop()


@contextmanager
def watched(model: PreTrainedModel, watch: Watch) -> Iterator[None]:
    """Within this block, `watch` sees what every full-attention layer of `model` attends with; text must not be padded."""
    _watching.append(watch)
    try:
        with _switched(model):
            yield
    finally:
        _watching.pop()


@contextmanager
def _switched(model: PreTrainedModel) -> Iterator[None]:
    """`model` with the attention function of this module; raises `KVSpliceError` if it has one of its own making."""
    before = model.config._attn_implementation
    model.set_attn_implementation(ATTENTION)
    if model.config._attn_implementation != ATTENTION:
        raise KVSpliceError(
            f"{type(model).__name__} does not take transformers' attention interface and cannot be compressed"
        )
    try:
        yield
    finally:
        model.set_attn_implementation(before)
