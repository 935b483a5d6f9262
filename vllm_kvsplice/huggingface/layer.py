"""One layer of a `KVSpliceCache`: every token packed, the newest ones as they are too. Letters as in `vllm_kvsplice`.

Tensors that are held between steps have the batch first, whatever else they are; so what happens to the batch happens to
all of them alike (`_each`).
"""

from collections.abc import Callable
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor
from transformers.cache_utils import CacheLayerMixin

from vllm_kvsplice.codec import LayerCodec
from vllm_kvsplice.huggingface.attention import KeysValues, Reading, Step, both, visible_to


class CompressedLayer(CacheLayerMixin):
    """Packed codes of a layer's tokens, and its exact window.

    Attributes:
        codes: uint8 [batch, S, token_bytes].
        window: the newest tokens as they are, [batch, 2, H, at most W - 1, D] in the model's dtype, keys before values; a
            query brings the token at its own position along.
        positions: int32 [batch, S], the place of every token in its sequence, -1 for padding. Only the layer that leads
            has them, and `window_begin`, the first column that a later query reads exactly in any row.
        record_past: keep all tokens as they are until the next `crop`, which may want them back.

    """

    is_sliding = False
    is_croppable = True
    supports_early_init = False

    def __init__(self, codec: LayerCodec, recent: int, leader: "CompressedLayer | None" = None) -> None:
        super().__init__()
        self.codec = codec
        self.recent = recent
        # The first layer of a step knows its positions first, and keeps them for the others.
        self.leader = leader or self
        self.record_past = False

    def activate_past_recording(self) -> None:
        self.record_past = True

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.codec = self.codec.to(key_states.device)
        batch, device = key_states.shape[0], key_states.device
        self.codes = torch.empty(batch, 0, self._stored_bytes, dtype=torch.uint8, device=device)
        self.window = torch.stack((key_states, value_states), 1)[..., :0, :].clone()
        if self.leader is self:
            self.positions = torch.empty(batch, 0, dtype=torch.int32, device=device)
        self.is_initialized = True

    @property
    def window_tokens(self) -> int:
        return self.window.shape[3]

    @property
    def _stored_bytes(self) -> int:
        return self.codec.layout.token_bytes

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Any, Any]:
        """Hand out a step [batch, H, T, D]; it is stored when attention reads it."""
        step = Step(partial(self._take, (key_states, value_states)))
        return step, step

    def _take(
        self, step: KeysValues, query: Tensor, mask: Tensor | None, positions: Tensor, scale: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Store a step's tokens; returns what its queries attend to, as of `both`."""
        if not self.is_initialized:
            self.lazy_initialization(*step)
        queries, tokens = query.shape[2], self.get_seq_length() + query.shape[2]
        visible = visible_to(mask, queries, tokens, query.device)
        if self.leader is self:
            # A token that does not see itself is padding.
            real = visible[..., tokens - queries :].diagonal(dim1=-2, dim2=-1).reshape(-1, queries)
            self._place(torch.cat((self.positions, torch.where(real, positions, -1).int().expand(len(query), -1)), 1))
        self._store(step)
        key, value = self.window.unbind(1)
        attended = both(self._restored(key.dtype), (key, value), visible, self._exactly(self.recent, queries))
        self._attended(query, attended, visible, scale)
        if not self.record_past:
            self.trim()
        return attended

    def _place(self, positions: Tensor) -> None:
        """Remember where all tokens stand, and from where on later queries read them exactly."""
        self.positions = positions
        exact = positions > positions.amax(1, keepdim=True) + 1 - self.recent
        columns = (exact & (positions >= 0)).any(0).nonzero()
        self.window_begin = int(columns[0]) if len(columns) else positions.shape[1]

    def _store(self, step: KeysValues) -> None:
        """Code a step's tokens [batch, H, T, D], and keep them as they are for now."""
        batch, _, count, _ = step[0].shape
        positions = self._positions()[:, -count:]
        key, value = (kind.transpose(1, 2).flatten(0, 1) for kind in (step[0], self._to_code(step[1])))
        packed = self.codec.pack(self.codec.encode(key, value, positions.flatten()))
        self._append(packed.unflatten(0, (batch, count)))
        self.window = torch.cat((self.window, torch.stack(step, 1)), 3)

    def _append(self, packed: Tensor) -> None:
        self.codes = torch.cat((self.codes, packed), 1)

    def _packed(self) -> Tensor:
        """uint8 [batch, S, token_bytes]."""
        return self.codes

    def _positions(self) -> Tensor:
        """int64 [batch, S]; that of padding means nothing."""
        return self.leader.positions.to(self.codes.device).long().clamp(min=0)

    def _restored(self, dtype: torch.dtype) -> KeysValues:
        """All tokens as stored, [batch, H, S, D] each."""
        codes = self.codec.unpack(self._packed().flatten(0, 1).T)
        key, value = self.codec.restore(codes, self._positions().flatten())
        return self._by_head(key).to(dtype), self._from_code(self._by_head(value)).to(dtype)

    def _to_code(self, value: Tensor) -> Tensor:
        """What is coded of a step's values [batch, H, T, D]: they themselves."""
        return value

    def _from_code(self, value: Tensor) -> Tensor:
        """Values of what the codec restores."""
        return value

    def _by_head(self, tokens: Tensor) -> Tensor:
        """[batch, H, S, D] of [batch * S, H, D]."""
        return tokens.unflatten(0, self.codes.shape[:2]).transpose(1, 2)

    def _exactly(self, recent: int, queries: int) -> Tensor:
        """bool [batch, 1, T, S]: what the last T tokens read as it is, of what is still held so, under a window of W."""
        positions = self._positions()[:, None]
        exactly = Reading(recent).exact(positions[..., -queries:], positions)
        exactly[..., : positions.shape[-1] - self.window_tokens] = False
        return exactly

    def _attended(self, query: Tensor, attended: tuple[Tensor, Tensor, Tensor], visible: Tensor, scale: float) -> None:
        """What to learn from a step's attention: nothing here."""

    def trim(self) -> None:
        """Forget as they are all tokens but those that a later query reads exactly."""
        begin = max(0, self.window_tokens - (self.get_seq_length() - self.leader.window_begin))
        # A clone, because a view would hold what it was cut from.
        self.window = self.window[..., begin:, :].clone()

    def get_seq_length(self) -> int:
        return self.codes.shape[1] if self.is_initialized else 0

    def get_max_length(self) -> int:
        return -1

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.get_seq_length() + query_length, 0

    @property
    def held(self) -> dict[str, Tensor]:
        """Every tensor that is kept from one step to the next."""
        return {name: held for name, held in vars(self).items() if isinstance(held, Tensor)}

    def _each(self, change: Callable[[Tensor], Tensor]) -> None:
        for name, held in self.held.items():
            setattr(self, name, change(held))

    def reset(self) -> None:
        self.is_initialized = False
        for name in self.held:
            setattr(self, name, None)

    def crop(self, tokens_to_remove: int) -> None:
        """Remove the last tokens: that many if the number is negative (a positive one is the length to keep at most).

        Of what then lies in the window, tokens that were let go as they are are read as stored, unless past recording
        was active.
        """
        length = self.get_seq_length()
        kept = max(0, length + tokens_to_remove) if tokens_to_remove <= 0 else min(length, tokens_to_remove)
        if not kept:
            self.reset()
            return
        self.codes = self.codes[:, :kept].clone()
        if self.leader is self:
            self._place(self.positions[:, :kept].clone())
        self.window = self.window[..., : max(0, self.window_tokens - (length - kept)), :]
        self.trim()

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self._each(lambda held: held.index_select(0, beam_idx.to(held.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        self._each(lambda held: held.repeat_interleave(repeats, 0))

    def batch_select_indices(self, indices: Tensor) -> None:
        self._each(lambda held: held[indices])


class Warp(Protocol):
    """A monotone function of each dimension of values [H, T, D], and its inverse."""

    def __call__(self, value: Tensor) -> Tensor: ...

    def inverse(self, warped: Tensor) -> Tensor: ...


class WarpedLayer(CompressedLayer):
    """A layer whose codec was fitted to warped values (`calibration.compare.spline_first`)."""

    def __init__(self, codec: LayerCodec, recent: int, leader: CompressedLayer | None, warp: Warp) -> None:
        super().__init__(codec, recent, leader)
        self.warp = warp

    def _to_code(self, value: Tensor) -> Tensor:
        return _by_row(self.warp, value)

    def _from_code(self, value: Tensor) -> Tensor:
        return _by_row(self.warp.inverse, value)


def _by_row(function: Callable[[Tensor], Tensor], value: Tensor) -> Tensor:
    """`function` of [H, T, D] on every row of a batch [batch, H, T, D]."""
    return function(value.transpose(0, 1).flatten(1, 2)).unflatten(1, (len(value), -1)).transpose(0, 1)
