"""The attention function `kvsplice` of Hugging Face models: `sdpa` that can also read what a `KVSpliceCache` stores.

A cache of transformers hands a model its keys and values whole, and every query reads the same ones. Here what a query
reads depends on its position (the exact window), so the cache hands out a `Step`, which only this function can read.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, sdpa_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from vllm_kvsplice.errors import KVSpliceError

ATTENTION = "kvsplice"
# Arguments of attention that this package does not know to honour, and what a model does that gives them.
UNSUPPORTED = {"softcap": "caps its attention logits", "s_aux": "has attention sinks as parameters"}

# Keys and values, [batch, H, T, D] each, keys after rotation.
KeysValues = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Reading:
    """Which tokens a query reads as they are; all others it reads as stored.

    Attributes:
        recent: W; a query at position i reads j > i - W exactly (`vllm_kvsplice.engines.Window`).
        prompt: queries before this position read everything exactly, as those of a prompt that a server with
            ``prefill: exact`` reads in one step.

    """

    recent: int = 0
    prompt: int = 0

    def exact(self, queries: Tensor, tokens: Tensor) -> Tensor:
        """bool [..., T, S]: whether queries at positions [..., T] read tokens at positions [..., S] exactly."""
        query = queries[..., None]
        return (tokens[..., None, :] > query - self.recent) | (query < self.prompt)

    def exact_values(self, queries: Tensor, tokens: Tensor) -> Tensor:
        """The same of values, where a rule tells them from keys."""
        return self.exact(queries, tokens)


class Step:
    """What the cache gives a model in place of keys and values: anything but reading it in `attend` is an error.

    `read` takes the query, the mask or None, the positions [batch or 1, T] and the factor of scores. It stores the step's
    tokens and returns keys, values and a mask as of `both`.
    """

    def __init__(self, read: Callable[[Tensor, Tensor | None, Tensor, float], tuple[Tensor, Tensor, Tensor]]) -> None:
        self.read = read

    def __getattr__(self, name: str) -> Any:
        raise _unreadable()

    @classmethod
    def __torch_function__(cls, *_: Any, **__: Any) -> Any:
        raise _unreadable()


def _unreadable() -> KVSpliceError:
    return KVSpliceError(
        f"only the attention {ATTENTION!r} reads a compressed cache; switch the model to it with "
        f'model.set_attn_implementation("{ATTENTION}"), which a model outside transformers\' attention interface cannot do'
    )


def both(stored: KeysValues, exact: KeysValues, visible: Tensor, exactly: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """S tokens as stored, then the last E of them as they are, under a mask that shows each query one of the two.

    Args:
        stored: [batch, H, S, D] each. exact: [batch, H, E, D] each.
        visible: bool [..., T, S], what a query sees at all.
        exactly: bool [..., T, S], what it reads as it is, if it sees it; only of the last E.

    Returns:
        Keys and values [batch, H, S + E, D] and the mask [..., T, S + E].

    """
    key, value = (torch.cat(pair, 2) for pair in zip(stored, exact, strict=True))
    return key, value, one_of_two(visible, exactly, exact[0].shape[2])


def one_of_two(visible: Tensor, exactly: Tensor, kept: int) -> Tensor:
    """The mask of `both`, `kept` being E."""
    tokens = visible.shape[-1]
    return torch.cat((visible & ~exactly, (visible & exactly)[..., tokens - kept :]), -1)


def visible_to(mask: Tensor | None, queries: int, tokens: int, device: torch.device) -> Tensor:
    """bool [..., queries, tokens]: `mask`, or where there is none, all that is not later than the query."""
    if mask is None:
        return torch.ones(queries, tokens, dtype=torch.bool, device=device).tril(tokens - queries)
    if mask.dtype != torch.bool:
        raise KVSpliceError("a mask of numbers that are added to scores is not supported; give a mask of booleans")
    return mask


def refuse_unsupported(options: dict[str, Any]) -> None:
    """Raise `KVSpliceError` for arguments of attention that would silently be ignored."""
    for name, does in UNSUPPORTED.items():
        if options.get(name) is not None:
            raise KVSpliceError(f"this model {does}, which KVSplice does not support")


def attend(
    module: Any,
    query: Tensor,
    key: Tensor | Step,
    value: Any,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    **options: Any,
) -> tuple[Tensor, None]:
    """Attention as transformers calls it; query [batch, G * H, T, D]."""
    refuse_unsupported(options)
    if isinstance(key, Step):
        positions = options.get("position_ids")
        if positions is None:
            raise KVSpliceError(
                "this model does not tell its attention where tokens stand, so its cache cannot be coded"
            )
        key, value, attention_mask = key.read(query, attention_mask, positions, scaling or query.shape[-1] ** -0.5)
    return sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **options)


ALL_ATTENTION_FUNCTIONS.register(ATTENTION, attend)
ALL_MASK_ATTENTION_FUNCTIONS.register(ATTENTION, sdpa_mask)
