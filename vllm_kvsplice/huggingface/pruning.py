"""Value pruning: of all tokens older than the exact window, each head keeps the values of those k that drew most attention.

Which tokens those are is decided as in H2O (arXiv:2306.14048): by the attention they received, summed over all queries so
far. Unlike there keys stay, so that probabilities do not change, and a value that is gone is read as the head's mean, which
is what a code of no bits says (docs/huggingface.md has what that is worth against dropping it).
"""

import torch
from torch import Tensor

from vllm_kvsplice.codec import LayerCodec
from vllm_kvsplice.errors import KVSpliceError
from vllm_kvsplice.huggingface.attention import KeysValues, one_of_two
from vllm_kvsplice.huggingface.layer import CompressedLayer

# Query rows looked at in one go, which bounds the memory that their probabilities take.
_QUERY_ROWS = 128


def value_elements(tokens: int, dim: int, kept: int, rank: int) -> tuple[int, int, int]:
    """Elements of one head's values: of all tokens, of those kept, and of the latents with bits of those kept."""
    kept = min(tokens, kept)
    return tokens * dim, kept * dim, kept * rank


class PrunedLayer(CompressedLayer):
    """A layer whose heads keep k values beside those of the exact window.

    Attributes:
        codes: uint8 [batch, S, key bytes], of keys alone.
        kept: int32 [batch, H, K], the tokens whose values each head has; the last of them are the window's.
        value_codes: uint8 [batch, K, value bytes]; the bytes of head h in row r are those of its token kept[h, r].
        received: float32 [batch, H, K], attention that those tokens drew.

    """

    def __init__(self, codec: LayerCodec, recent: int, leader: CompressedLayer | None, k: int, first: bool) -> None:
        super().__init__(codec, recent, leader)
        self.k = k
        self.first = first

    @property
    def _stored_bytes(self) -> int:
        return self.codec.layout.key_bytes

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        super().lazy_initialization(key_states, value_states)
        layout, none = self.codec.layout, key_states.new_empty(*key_states.shape[:2], 0)
        self.kept, self.received = none.int(), none.float()
        self.value_codes = self.codes.new_empty(len(none), 0, layout.code_bytes - layout.key_bytes)

    def _append(self, packed: Tensor) -> None:
        before, layout = self.get_seq_length(), self.codec.layout
        self.codes = torch.cat((self.codes, packed[..., : layout.key_bytes]), 1)
        self.value_codes = torch.cat((self.value_codes, packed[..., layout.key_bytes : layout.code_bytes]), 1)
        new = torch.arange(before, self.get_seq_length(), device=packed.device)
        new = new.expand(*self.kept.shape[:2], -1)
        self.kept = torch.cat((self.kept, new.int()), 2)
        self.received = torch.cat((self.received, torch.zeros_like(new, dtype=torch.float32)), 2)

    def _by_byte(self, of_heads: Tensor) -> Tensor:
        """int64 [batch, K, value bytes]: what a head's bytes get of `of_heads` [batch, H, K]."""
        heads = torch.tensor(self.codec.layout.value_heads, dtype=torch.int64, device=of_heads.device)
        return of_heads.long().transpose(1, 2)[..., heads]

    def _packed(self) -> Tensor:
        batch, tokens, key_bytes = self.codes.shape
        packed = self.codes.new_zeros(batch, tokens, self.codec.layout.token_bytes)
        packed[..., :key_bytes] = self.codes
        values = packed[..., key_bytes : self.codec.layout.code_bytes]
        values.scatter_(1, self._by_byte(self.kept), self.value_codes)
        return packed

    def _restored(self, dtype: torch.dtype) -> KeysValues:
        key, value = super()._restored(dtype)
        there = torch.zeros(value.shape[:3], dtype=torch.bool, device=value.device).scatter_(2, self.kept.long(), True)
        mean = self._by_head(self.codec.offset("value", self._positions().flatten())).to(dtype)
        return key, torch.where(there[..., None], value, mean)

    def _attended(self, query: Tensor, attended: tuple[Tensor, Tensor, Tensor], visible: Tensor, scale: float) -> None:
        key, _, mask = attended
        tokens, queries = self.get_seq_length(), query.shape[2]
        if self.first:
            # What is held as it is, the whole step, is judged as it is.
            mask = one_of_two(visible, self._exactly(tokens, queries), self.window_tokens)
        drawn = _attention_drawn(query, key, mask, scale)
        stored_drawn, exact_drawn = drawn[..., :tokens], drawn[..., tokens:]
        stored_drawn[..., tokens - exact_drawn.shape[-1] :] += exact_drawn
        self.received = self.received + stored_drawn.gather(2, self.kept.long())

    def trim(self) -> None:
        super().trim()
        held, window = self.kept.shape[2], self.window_tokens
        if held - window > self.k:
            older = self.received[..., : held - window].topk(self.k, sorted=False).indices.sort().values
            newest = torch.arange(held - window, held, device=older.device).expand(*older.shape[:2], -1)
            chosen = torch.cat((older, newest), 2)
            self.value_codes = self.value_codes.gather(1, self._by_byte(chosen))
            self.kept, self.received = self.kept.gather(2, chosen), self.received.gather(2, chosen)

    def crop(self, tokens_to_remove: int) -> None:
        """Refused, because values that were pruned in favour of the removed tokens' do not come back."""
        if tokens_to_remove:
            raise KVSpliceError("a cache that prunes values cannot be cropped; make it without prune_values, or anew")


def _attention_drawn(query: Tensor, key: Tensor, mask: Tensor, scale: float) -> Tensor:
    """Probabilities that each key drew, summed over queries and the query heads of its head: float32 [batch, H, S].

    Args:
        query: [batch, G * H, T, D]. key: [batch, H, S, D].
        mask: bool [batch, 1, T, S] or [T, S].
        scale: of scores.

    """
    tiles = zip(query.split(_QUERY_ROWS, 2), mask.expand(len(query), 1, -1, -1).split(_QUERY_ROWS, 2), strict=True)
    return torch.stack([_drawn_by(rows, key, visible, scale) for rows, visible in tiles]).sum(0)


def _drawn_by(query: Tensor, key: Tensor, visible: Tensor, scale: float) -> Tensor:
    """The same of a few queries; `visible` is [batch, 1, T, S]."""
    scores = torch.einsum("bhgtd,bhsd->bhgts", query.unflatten(1, (key.shape[1], -1)), key).float() * scale
    # Rows of padding see nothing at all.
    return scores.masked_fill(~visible[:, :, None], -torch.inf).softmax(-1).nan_to_num().sum((2, 3))
