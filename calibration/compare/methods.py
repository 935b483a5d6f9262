"""What is compared: a name, the bits of all that is stored, and keys and values as they are read back.

Position 0 is no method's business: it is read exactly under every one of them (`calibration.compare.harness`).
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Set
from dataclasses import dataclass
from statistics import mean
from typing import ClassVar

from torch import Tensor

from calibration.attention import Reading
from calibration.compare.rank import Components, Truncated
from calibration.compare.stores import Store
from vllm_kvsplice.artifact import BASELINE_BITS
from vllm_kvsplice.codec import LayerCodec


@dataclass(frozen=True)
class Method(ABC):
    """A way to store the cache of a model's full-attention layers; methods of one family are points of one curve."""

    ours: ClassVar[bool] = False
    name: str
    family: str

    @property
    def own_window(self) -> Reading | None:
        """What is read exactly by the method's own rule, if it has one; its bits contain it."""
        return None

    def dense_layers(self, num_layers: int) -> Set[int]:
        """Layers of a model of `num_layers` that the method leaves in 16 bits."""
        return frozenset()

    @abstractmethod
    def bits_per_element(self, context: int, head_dim: int) -> float:
        """All that is stored of `context` tokens in the other layers, per element of keys and values."""

    @abstractmethod
    def restore(self, layer: int, key: Tensor, value: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        """`key` and `value`, float32 [H, T, D], of `layer` at ascending `positions` [T], as they are read back."""


@dataclass(frozen=True)
class Peer(Method):
    """The same two stores in every layer and head."""

    key: Store
    value: Store

    def bits_per_element(self, context: int, head_dim: int) -> float:
        return (self.key.size(context, head_dim) + self.value.size(context, head_dim)) / (2 * context * head_dim)

    def restore(self, layer: int, key: Tensor, value: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        return self.key.restore(key, positions), self.value.restore(value, positions)


@dataclass(frozen=True)
class TurboQuant(Peer):
    """Keys and values in slots of an even number of bytes; the first and the last `dense` layers stay as they are.

    `slot_size_aligned`, `get_boundary_skip_layers` in vllm/model_executor/layers/quantization/turboquant/config.py.
    """

    dense: int = 2

    def dense_layers(self, num_layers: int) -> Set[int]:
        ends = min(self.dense, num_layers // 2)
        return {*range(ends), *range(num_layers - ends, num_layers)}

    def bits_per_element(self, context: int, head_dim: int) -> float:
        slot = self.key.size(1, head_dim) + self.value.size(1, head_dim)
        return -(-slot // 16) * 16 / (2 * head_dim)


@dataclass(frozen=True)
class Kivi(Peer):
    """The newest tokens stay in 16 bits until `residual` of them have come together."""

    residual: int = 128

    @property
    def own_window(self) -> Reading:
        return Residual(length=self.residual)

    def bits_per_element(self, context: int, head_dim: int) -> float:
        """The mean over one round: the residual of keys grows from nothing to its length and starts again."""
        lengths = range(max(1, context - self.residual + 1), context + 1)
        return mean(self._bits_at(length, head_dim) for length in lengths)

    def _bits_at(self, length: int, head_dim: int) -> float:
        keys, values = length // self.residual * self.residual, max(0, length - self.residual)
        exact = (2 * length - keys - values) * head_dim * BASELINE_BITS
        return (self.key.size(keys, head_dim) + self.value.size(values, head_dim) + exact) / (2 * length * head_dim)


@dataclass(frozen=True)
class Residual(Reading):
    """What KIVI reads in 16 bits (arXiv:2402.02750, Algorithm 1; models/llama_kivi.py of its authors), token by token.

    Keys are quantised when `length` of them have come together, a value once `length` newer ones are there.
    """

    length: int = 128

    def exact(self, queries: Tensor, tokens: Tensor) -> Tensor:
        return tokens[..., None, :] >= (queries // self.length * self.length)[..., None]

    def exact_values(self, queries: Tensor, tokens: Tensor) -> Tensor:
        return tokens[..., None, :] >= queries[..., None] - self.length


@dataclass(frozen=True)
class Rank(Method):
    """The strongest `rank` principal components of every layer and head (`calibration.compare.rank`)."""

    components: Mapping[int, tuple[Components, Components]]
    rank: int

    def bits_per_element(self, context: int, head_dim: int) -> float:
        layer = min(self.components)
        heads = len(self.components[layer][0].mean)
        stored = sum(kind.size(context, head_dim, heads) for kind in self._stores(layer))
        return stored / (2 * heads * context * head_dim)

    def restore(self, layer: int, key: Tensor, value: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        keys, values = self._stores(layer)
        return keys.restore(key, positions), values.restore(value, positions)

    def _stores(self, layer: int) -> tuple[Truncated, Truncated]:
        keys, values = self.components[layer]
        return Truncated(keys, self.rank), Truncated(values, self.rank)


@dataclass(frozen=True)
class KVSplice(Method):
    """Ours: the codecs of an artifact, by layer."""

    ours: ClassVar[bool] = True
    codecs: Mapping[int, LayerCodec]

    def dense_layers(self, num_layers: int) -> Set[int]:
        return set(range(num_layers)) - self.codecs.keys()

    def bits_per_element(self, context: int, head_dim: int) -> float:
        return mean(8 * c.layout.token_bytes / (2 * c.num_kv_heads * head_dim) for c in self.codecs.values())

    def restore(self, layer: int, key: Tensor, value: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        restored = self.codecs[layer].reconstruct(key.transpose(0, 1), value.transpose(0, 1), positions)
        return restored[0].transpose(0, 1), restored[1].transpose(0, 1)
