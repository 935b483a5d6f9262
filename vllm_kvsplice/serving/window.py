"""The exact window in vLLM's worker: a second, small cache of raw keys and values beside each compressed layer.

To vLLM it is one more attention layer, with a sliding window, that nothing calls. So vLLM allocates its blocks, frees
those that slid out, and finds them again for a shared prefix, as it does for any sliding-window model; nothing is kept by
request outside the two paged caches. The layer's implementation (`backend.KVSpliceImpl`) writes and reads it.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from vllm.config import VllmConfig
from vllm.model_executor.layers.attention_layer_base import AttentionLayerBase
from vllm.utils.math_utils import cdiv
from vllm.v1.attention.backend import (
    AttentionBackend,
    AttentionCGSupport,
    AttentionMetadata,
    AttentionMetadataBuilder,
    CommonAttentionMetadata,
    MultipleOf,
)
from vllm.v1.kv_cache_interface import AttentionSpec, KVCacheLayout

from vllm_kvsplice.errors import KVSpliceError
from vllm_kvsplice.serving.graphs import StepBuffer, graph_support
from vllm_kvsplice.serving.window_blocks import WindowSpec


class WindowBackend(AttentionBackend):
    """What vLLM needs to know to allocate the window's pages."""

    @staticmethod
    def get_name() -> str:
        return "CUSTOM"

    @staticmethod
    def get_impl_cls() -> Any:
        raise NotImplementedError("the exact window has no attention of its own")

    @staticmethod
    def get_builder_cls() -> type["WindowMetadataBuilder"]:
        return WindowMetadataBuilder

    @staticmethod
    def get_supported_kernel_block_sizes(kv_cache_spec: Any = None) -> list[int | MultipleOf]:
        return [MultipleOf(1)]

    @classmethod
    def supported_kv_cache_layouts(cls) -> tuple[KVCacheLayout, ...]:
        return (KVCacheLayout.BLHNC,)


@dataclass(frozen=True)
class Scratch:
    """Pages for one step of one layer that hold every raw token its queries read.

    Only the tokens that later steps read have a place in the cache. A step with several queries of one sequence also reads
    others of its own, so it copies what it needs from the cache, adds its own tokens, and reads from here. Layers use the
    pages one after the other.

    Attributes:
        pages: [P, H, N', 2 * D] in the cache's dtype.
        block_table: int32 [S, blocks], into `pages`; only entries of blocks that a query reads are valid.
        slots: int64 [T], where the step's tokens go.
        copied_from, copied_to: int64 [P'], blocks of the cache and of `pages`.

    """

    pages: Tensor
    block_table: Tensor
    slots: Tensor
    copied_from: Tensor
    copied_to: Tensor

    @classmethod
    def of(cls, common: CommonAttentionMetadata, spec: WindowSpec) -> "Scratch":
        starts, lengths, size = common.query_start_loc.long(), common.seq_lens.long(), spec.block_size
        first = lengths - starts.diff()
        begin = (first - spec.sliding_window + 1).clamp(min=0) // size
        end = (lengths - 1) // size + 1
        offset = (end - begin).cumsum(0) - end
        number = torch.arange(int(end.max()), device=lengths.device)
        table = (offset[:, None] + number).clamp(min=0)
        read = (number >= begin[:, None]) & (number < end[:, None])
        old = read & (number * size < first[:, None])

        queries = starts.diff()
        sequence = torch.arange(len(lengths), device=lengths.device).repeat_interleave(queries)
        position = torch.arange(len(sequence), device=lengths.device) + (lengths - starts[1:])[sequence]
        pages = torch.empty(
            int((end - begin).sum()),
            spec.num_kv_heads,
            size,
            2 * spec.head_size,
            dtype=spec.dtype,
            device=lengths.device,
        )
        slots = table[sequence, position // size] * size + position % size
        cached = common.block_table_tensor[:, : len(number)].long()
        return cls(pages, table.int(), slots, cached[old], table[old])


@dataclass(frozen=True)
class WindowMetadata(AttentionMetadata):
    """Where a step's raw tokens are.

    Attributes:
        slots: int64 [T], into the cache; -1 where a token has no place there.
        block_table: int32 [S, blocks], of the cache.
        scratch: where to read, when some sequence has several queries; None: from the cache.

    """

    slots: Tensor
    block_table: Tensor
    scratch: Scratch | None


class WindowMetadataBuilder(AttentionMetadataBuilder[WindowMetadata]):
    def __init__(
        self, kv_cache_spec: AttentionSpec, layer_names: list[str], vllm_config: VllmConfig, device: torch.device
    ) -> None:
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)
        self._slots = StepBuffer(vllm_config, device)

    @classmethod
    def get_cudagraph_support(cls, vllm_config: VllmConfig, kv_cache_spec: Any) -> AttentionCGSupport:
        return graph_support(vllm_config)

    def build(
        self, common_prefix_len: int, common_attn_metadata: CommonAttentionMetadata, fast_build: bool = False
    ) -> WindowMetadata:
        common, spec = common_attn_metadata, self.kv_cache_spec
        assert isinstance(spec, WindowSpec)
        # Block 0 is nobody's: the manager names it where a token has no place.
        slots = self._slots.hold(common.slot_mapping.masked_fill(common.slot_mapping < spec.block_size, -1))
        scratch = Scratch.of(common, spec) if common.max_query_len > 1 else None
        return WindowMetadata(slots, common.block_table_tensor, scratch)


class WindowLayer(torch.nn.Module, AttentionLayerBase):
    """The window of one compressed layer, in vLLM's list of attention layers as ``<layer>.window``.

    Attributes:
        kv_cache: [B', H, N', 2 * D] in the cache's dtype, a token's key before its value; set by vLLM.

    """

    def __init__(self, layer: Any, tokens: int, block_size: int, hit_alignment: int, drafts: int) -> None:
        super().__init__()
        self.name = f"{layer.layer_name}.window"
        self.tokens = tokens
        self.kv_cache = torch.empty(0)
        self._spec = WindowSpec(
            block_size=block_size,
            num_kv_heads=layer.num_kv_heads,
            head_size=layer.head_size,
            dtype=layer.kv_cache_torch_dtype,
            # vLLM finds no prefix for a window that reads nothing before its own token.
            sliding_window=max(2, tokens),
            hit_alignment=hit_alignment,
            drafts=drafts,
        )

    def get_attn_backend(self) -> type[AttentionBackend]:
        return WindowBackend

    def get_kv_cache_spec(self, vllm_config: VllmConfig) -> WindowSpec:
        self._config = vllm_config
        return self._spec

    def bind_kv_cache(self, kv_cache: Tensor) -> None:
        """Take the pages that vLLM has allocated; raises `KVSpliceError` where one request would never be admitted."""
        longest, in_flight = self._config.model_config.max_model_len, self._config.max_in_flight_tokens
        # Not the configuration's block size, which by now may be the window's (docs/vllm.md).
        blocks = cdiv(longest, self._spec.hit_alignment)
        blocks += self._spec.max_admission_blocks_per_request(in_flight, longest)
        # Block 0 is nobody's. To measure what graphs take, vLLM first binds a few blocks, before it has counted them.
        counted = self._config.cache_config.num_gpu_blocks is not None
        if counted and len(kv_cache) - 1 < blocks:
            raise KVSpliceError(
                f"a request of {longest} tokens and its exact window take {blocks} blocks of KV cache and there are "
                f"{len(kv_cache) - 1}; lower --max-model-len or give it more memory"
            )
        self.kv_cache = kv_cache
