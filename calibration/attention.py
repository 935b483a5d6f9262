"""A tap on the attention of any Hugging Face causal LM: see, or replace, the keys and values a layer attends to."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, sdpa_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from vllm_kvsplice.errors import KVSpliceError

ATTENTION = "kvsplice"

# (layer index, key, value) -> (key, value); keys are rotated, tensors are [batch, H, T, D].
Tap = Callable[[int, Tensor, Tensor], tuple[Tensor, Tensor]]

_active: list[Tap] = []


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
    if _active and options.get("sliding_window") is None:
        key, value = _active[-1](module.layer_idx, key, value)
    return sdpa_attention_forward(module, query, key, value, attention_mask, **options)


ALL_ATTENTION_FUNCTIONS.register(ATTENTION, _tapped_attention)
ALL_MASK_ATTENTION_FUNCTIONS.register(ATTENTION, sdpa_mask)


@contextmanager
def tapped(model: PreTrainedModel, tap: Tap) -> Iterator[None]:
    """Within this block, every full-attention layer of `model` attends to what `tap` returns.

    The model must have been loaded with ``attn_implementation="kvsplice"`` (`calibration.models.load_model` does).
    """
    assert model.config._attn_implementation == ATTENTION, "load the model with calibration.models.load_model"
    _active.append(tap)
    try:
        yield
    finally:
        _active.pop()
