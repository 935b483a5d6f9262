"""The attention backend: what vLLM asks of one, answered for pages of packed latents.

The page sizes of layers differ. vLLM takes a layer's page size from its backend class, and asks that class without saying
for which layer, so there is a subclass for every size (`_backend_of`). Layers of one size share it, because vLLM prepares
every step once a class. All use of vLLM's ``customize_spec``, which is documented there as temporary, is in
`KVSpliceBackend.customize_spec`.
"""

from dataclasses import dataclass, replace
from functools import cache
from typing import Any, ClassVar

import torch
from torch import Tensor
from vllm.config import VllmConfig, get_current_vllm_config
from vllm.distributed import get_tensor_model_parallel_rank, get_tensor_model_parallel_world_size
from vllm.forward_context import get_forward_context
from vllm.logger import init_logger
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.models.utils import extract_layer_index
from vllm.v1.attention.backend import (
    AttentionBackend,
    AttentionCGSupport,
    AttentionImpl,
    AttentionMetadata,
    AttentionMetadataBuilder,
    AttentionType,
    CommonAttentionMetadata,
    MultipleOf,
)
from vllm.v1.attention.backends.utils import split_decodes_and_prefills
from vllm.v1.kv_cache_interface import AttentionSpec, KVCacheLayout

from vllm_kvsplice.artifact import Artifact
from vllm_kvsplice.codec import LayerCodec
from vllm_kvsplice.engines import Batch, Window, cpu, get_engine
from vllm_kvsplice.engines.triton import SEGMENT_BYTES, WORKSPACE, TritonEngine
from vllm_kvsplice.engines.triton.tables import reads_fast
from vllm_kvsplice.errors import KVSpliceError
from vllm_kvsplice.serving.graphs import StepBuffer, graph_support
from vllm_kvsplice.serving.plugin import BLOCK_MULTIPLE, chosen_block_sizes, served_artifact
from vllm_kvsplice.serving.settings import Settings, read_settings
from vllm_kvsplice.serving.window import WindowLayer, WindowMetadata

logger = init_logger("vllm.kvsplice")


class KVSpliceBackend(AttentionBackend):
    """Permissive defaults of the base class are narrowed to what tests cover."""

    forward_includes_kv_cache_update = False
    supported_dtypes: ClassVar[list[torch.dtype]] = [torch.float16, torch.bfloat16, torch.float32]
    # Set on the subclass that `_backend_of` makes: bytes of one token in one layer; whether some layers have no codec.
    token_bytes: ClassVar[int | None] = None
    beside_stock: ClassVar[bool] = False

    @staticmethod
    def get_name() -> str:
        return "CUSTOM"

    @staticmethod
    def get_impl_cls() -> type["KVSpliceImpl"]:
        return KVSpliceImpl

    @staticmethod
    def get_builder_cls() -> type["KVSpliceMetadataBuilder"]:
        return KVSpliceMetadataBuilder

    @staticmethod
    def get_supported_kernel_block_sizes(kv_cache_spec: Any = None) -> list[int | MultipleOf]:
        return [MultipleOf(BLOCK_MULTIPLE)]

    @classmethod
    def supported_kv_cache_layouts(cls) -> tuple[KVCacheLayout, ...]:
        # Caches of different page sizes in several groups must be block-outermost; the other is for models with layers
        # left to stock backends that know nothing else.
        return (KVCacheLayout.BLHNC, KVCacheLayout.LBHNC)

    @classmethod
    def supports_head_size(cls, head_size: int) -> bool:
        return head_size % 8 == 0

    @classmethod
    def supports_kv_connector(cls) -> bool:
        return False

    @classmethod
    def supports_device_cpu_query_lens_mismatch(cls) -> bool:
        return False

    @classmethod
    def customize_spec(cls, spec: AttentionSpec) -> AttentionSpec:
        """The layer's page as one head slot of `token_bytes` bytes a token; what is inside is ours.

        A block may pass from our layers to stock ones, whose attention multiplies what lies behind a sequence's end by 0;
        old codes read as numbers make NaN of it. Where dtypes of layers differ, vLLM clears every block before use.
        """
        assert cls.token_bytes is not None, "asked for a cache spec before weights were loaded"
        dtype = torch.uint8 if cls.beside_stock else spec.dtype
        return replace(spec, num_head_slots=1, state_content_bytes=cls.token_bytes, dtype=dtype)


@cache
def _backend_of(token_bytes: int, beside_stock: bool) -> type[KVSpliceBackend]:
    attributes = {"token_bytes": token_bytes, "beside_stock": beside_stock}
    return type(f"KVSpliceBackend{token_bytes}", (KVSpliceBackend,), attributes)


@dataclass(frozen=True)
class Part:
    """Sequences of a step that an engine attends to together, and their tokens in the step."""

    sequences: slice
    tokens: slice
    batch: Batch


@dataclass(frozen=True)
class KVSpliceMetadata(AttentionMetadata):
    """One step's T tokens.

    Attributes:
        positions: int64 [T]; padding's mean nothing.
        batch: all of it.
        parts: of it, where they are to be attended to one after the other.

    """

    positions: Tensor
    batch: Batch
    parts: tuple[Part, ...]


def positions_of(common: CommonAttentionMetadata) -> Tensor:
    """Each token's place in its sequence, int64 [T], found without reading anything on the host."""
    start, lengths = common.query_start_loc, common.seq_lens
    place = torch.arange(common.num_actual_tokens, dtype=start.dtype, device=start.device)
    sequence = torch.searchsorted(start[1:], place, right=True).clamp(max=len(lengths) - 1)
    # A token's position is its place in the step plus its sequence's distance from there.
    return (place + (lengths - start[1:])[sequence]).long()


def parts_of(common: CommonAttentionMetadata, batch: Batch, few: int) -> tuple[Part, ...]:
    """Where some sequences have more queries than `few`, first those that have not, which vLLM puts in front."""
    number, others, tokens, _ = split_decodes_and_prefills(common, few)
    if not number or not others:
        return ()
    starts, lengths, table = batch.query_start, batch.seq_lens, batch.block_table
    front, back = slice(number), slice(number, None)
    return (
        Part(front, slice(tokens), Batch(starts[: number + 1], lengths[front], table[front], batch.longest)),
        Part(back, slice(tokens, None), Batch(starts[back] - tokens, lengths[back], table[back], batch.longest)),
    )


class KVSpliceMetadataBuilder(AttentionMetadataBuilder[KVSpliceMetadata]):
    """vLLM makes one builder per page size; they all share one step's metadata."""

    _latest: ClassVar[tuple[CommonAttentionMetadata, KVSpliceMetadata] | None] = None

    def __init__(
        self, kv_cache_spec: AttentionSpec, layer_names: list[str], vllm_config: VllmConfig, device: torch.device
    ) -> None:
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)
        self._positions = StepBuffer(vllm_config, device)
        # The GPU engine reads for prompts in another way than for few tokens; others do by themselves what suits.
        if read_settings(vllm_config.additional_config).engine == "triton":
            self._init_reorder_batch_threshold(1, supports_spec_as_decode=True)
        _announce(vllm_config, kv_cache_spec.block_size)

    @classmethod
    def get_cudagraph_support(cls, vllm_config: VllmConfig, kv_cache_spec: Any) -> AttentionCGSupport:
        return graph_support(vllm_config)

    def build(
        self, common_prefix_len: int, common_attn_metadata: CommonAttentionMetadata, fast_build: bool = False
    ) -> KVSpliceMetadata:
        shared, common = KVSpliceMetadataBuilder, common_attn_metadata
        if shared._latest is None or shared._latest[0] is not common:
            batch = Batch(common.query_start_loc, common.seq_lens, common.block_table_tensor, common.max_seq_len)
            few = self.reorder_batch_threshold
            parts = parts_of(common, batch, few) if few else ()
            shared._latest = (common, KVSpliceMetadata(self._positions.hold(positions_of(common)), batch, parts))
        return shared._latest[1]


class KVSpliceImpl(AttentionImpl[KVSpliceMetadata]):
    """Attention of one layer over packed pages."""

    def __init__(
        self,
        num_heads: int,
        head_size: int,
        scale: float,
        num_kv_heads: int | None = None,
        alibi_slopes: list[float] | None = None,
        sliding_window: int | None = None,
        kv_cache_dtype: str = "auto",
        logits_soft_cap: float | None = None,
        attn_type: str = AttentionType.DECODER,
        kv_sharing_target_layer_name: str | None = None,
        **unknown: Any,
    ) -> None:
        refused = {
            "ALiBi": alibi_slopes is not None,
            "a sliding window": sliding_window is not None,
            f"cache dtype {kv_cache_dtype}": kv_cache_dtype not in ("auto", "bfloat16", "float16"),
            "a soft cap on attention logits": bool(logits_soft_cap),
            f"{attn_type} attention": attn_type != AttentionType.DECODER,
            "a KV cache shared between layers": kv_sharing_target_layer_name is not None,
            **{name: value is not None for name, value in unknown.items()},
        }
        reasons = [reason for reason, present in refused.items() if present]
        if reasons:
            raise KVSpliceError(
                f"this model's attention uses {', '.join(reasons)}, which KVSplice does not support; "
                "serve it without --attention-backend CUSTOM"
            )
        self.num_heads = num_heads
        self.head_size = head_size
        self.scale = float(scale)
        self.num_kv_heads = num_kv_heads or num_heads
        self.kv_cache_dtype = kv_cache_dtype
        self._vllm_config = get_current_vllm_config()
        self._settings, self._artifact = served_artifact(self._vllm_config)
        self._engine = get_engine(self._settings.engine)
        # Set in process_weights_after_loading, before anything runs.
        self.codec: LayerCodec
        self._window: WindowLayer | None = None
        self._viewed: tuple[Tensor, Tensor] | None = None
        self._rehearsed = False

    def process_weights_after_loading(self, act_dtype: torch.dtype) -> None:
        """Bind this layer to its codec: only now does vLLM let an implementation learn whose it is."""
        # Other weights do not change it, and its window and what graphs read must stay where they are.
        if hasattr(self, "codec"):
            return
        context = self._vllm_config.compilation_config.static_forward_context
        name, layer = next((n, la) for n, la in context.items() if getattr(la, "impl", None) is self)
        index = extract_layer_index(name)
        if type(layer) is not Attention:
            raise KVSpliceError(
                f"this model has {type(layer).__name__}, which KVSplice does not support; serve it without "
                "--attention-backend CUSTOM"
            )
        if self._artifact.manifest.layers[index] is None or layer.head_size_v != layer.head_size:
            raise KVSpliceError(
                f"the artifact has no codec for layer {index}; make it anew with: kvsplice calibrate MODEL --out DIR"
            )
        rank, ranks = get_tensor_model_parallel_rank(), get_tensor_model_parallel_world_size()
        # The worker has made its GPU the current one; an attention layer has no parameters that would name it.
        device = torch.empty(0, device=self._vllm_config.device_config.device_type).device
        self.codec = self._artifact.layer_shard(index, rank, ranks).to(device)
        assert (self.codec.num_kv_heads, self.codec.head_dim) == (self.num_kv_heads, self.head_size)
        layer.attn_backend = _backend_of(self.codec.layout.token_bytes, not self._artifact.covers_all_layers)
        if self._settings.recent_window:
            assert self._settings.window_block is not None
            hit_alignment, drafts = self._vllm_config.cache_config.block_size, self._vllm_config.num_speculative_tokens
            self._window = WindowLayer(
                layer, self._settings.recent_window, self._settings.window_block, hit_alignment, drafts
            )
            context[self._window.name] = self._window

    def do_kv_cache_update(
        self, layer: Any, key: Tensor, value: Tensor, kv_cache: Tensor, slot_mapping: Tensor
    ) -> None:
        metadata: Any = get_forward_context().attn_metadata
        if metadata is None:
            return
        positions = metadata[layer.layer_name].positions
        count = positions.shape[0]
        key, value, slots = _first(count, key), _first(count, value), _first(count, slot_mapping)
        self._engine.write(self.codec, key, value, positions, slots, self._pages(kv_cache))
        if self._window:
            slots = _first(count, metadata[self._window.name].slots)
            self._engine.write_window(key, value, slots, self._window.kv_cache)

    def forward(
        self,
        layer: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        kv_cache: Tensor,
        attn_metadata: KVSpliceMetadata | None,
        output: Tensor,
        output_scale: Tensor | None = None,
        output_block_scale: Tensor | None = None,
    ) -> Tensor:
        """Attend; `query` and `output` are [T, H * G, D], `key` and `value` were stored by `do_kv_cache_update`."""
        if output_scale is not None or output_block_scale is not None:
            raise NotImplementedError("fused quantisation of the attention output is not supported by KVSplice")
        if attn_metadata is None:
            if query.is_cuda:
                # By such steps vLLM measures how much memory a step takes: take what attention would.
                query.new_empty(SEGMENT_BYTES + 4 * WORKSPACE * query.numel(), dtype=torch.uint8)
            if not self._rehearsed:
                self._rehearse(query, key, value)
                self._rehearsed = True
            return output.zero_()
        count = attn_metadata.positions.shape[0]
        window = self._exact(key, value)
        query, pages, out = _first(count, query), self._pages(kv_cache), _first(count, output)
        if not attn_metadata.parts:
            self._engine.attend(self.codec, query, pages, attn_metadata.batch, self.scale, window, out)
        for part in attn_metadata.parts:
            near = replace(window, block_table=window.block_table[part.sequences]) if window else None
            rows = part.tokens
            self._engine.attend(self.codec, query[rows], pages, part.batch, self.scale, near, out[rows])
        if count < output.shape[0]:
            output[count:] = 0
        return output

    def _rehearse(self, query: Tensor, key: Tensor, value: Tensor) -> None:
        """Have kernels compiled before there are caches: graphs will hold a part of them only."""
        config, settings = self._vllm_config, self._settings
        if not isinstance(self._engine, TritonEngine) or not config.kernel_config.enable_jit_warmup:
            return
        window = None
        if settings.recent_window:
            assert settings.window_block is not None
            pages = key.new_zeros(1, self.num_kv_heads, settings.window_block, 2 * self.head_size)
            table = pages.new_zeros(1, 2, dtype=torch.int32)
            window = Window(settings.recent_window, pages, table, settings.prefill == "exact")
        self._engine.rehearse(self.codec, query, key, value, config.cache_config.block_size, window)

    def _pages(self, kv_cache: Tensor) -> Tensor:
        """`kv_cache` as `_as_pages` gives it, made once for the cache that vLLM passes at every step."""
        if self._viewed is None or self._viewed[0] is not kv_cache:
            self._viewed = (kv_cache, _as_pages(kv_cache))
        return self._viewed[1]

    def _exact(self, key: Tensor, value: Tensor) -> Window | None:
        """What this step reads exactly; `key` and `value` are its own tokens', [T, H, D]."""
        if not self._window:
            return None
        metadata: Any = get_forward_context().attn_metadata
        step: WindowMetadata = metadata[self._window.name]
        pages, table = self._window.kv_cache, step.block_table
        if scratch := step.scratch:
            pages, table = scratch.pages, scratch.block_table
            if scratch.copied_to.shape[0]:
                pages[scratch.copied_to] = self._window.kv_cache[scratch.copied_from]
            count = scratch.slots.shape[0]
            self._engine.write_window(_first(count, key), _first(count, value), scratch.slots, pages)
        return Window(self._window.tokens, pages, table, self._settings.prefill == "exact")


def _first(count: int, tensor: Tensor) -> Tensor:
    """`tensor[:count]`, which takes a microsecond also where nothing is cut off: several a layer, in every step."""
    return tensor if tensor.shape[0] == count else tensor[:count]


def _as_pages(kv_cache: Tensor) -> Tensor:
    """vLLM's [B, 1, N, C / itemsize] in the model's dtype as this project's pages, uint8 [B, C, N], on the same memory."""
    raw = kv_cache.view(torch.uint8)
    blocks, _, tokens, token_bytes = raw.shape
    assert raw.stride()[2:] == (token_bytes, 1), "a page must be contiguous"
    return raw.as_strided((blocks, token_bytes, tokens), (raw.stride(0), tokens, 1))


UNEVEN = (
    "some layers have levels that are not evenly spaced, or groups of eight bits, which GPUs read far more slowly; "
    "for even ones: kvsplice calibrate MODEL --out DIR --fit pca_uniform"
)
_announced: VllmConfig | None = None


def _announce(vllm_config: VllmConfig, block_size: int) -> None:
    """Once per server, when every layer is bound: what is compressed, by which artifact, and what it saves."""
    global _announced
    if _announced is vllm_config:
        return
    _announced = vllm_config
    settings, artifact = served_artifact(vllm_config)
    layers = list(vllm_config.compilation_config.static_forward_context.values())
    bound = [layer.impl for layer in layers if isinstance(getattr(layer, "impl", None), KVSpliceImpl)]
    windows = sum(isinstance(layer, WindowLayer) for layer in layers)
    dense = len(layers) - windows - len(bound)
    logger.info("KVSplice is in use: %s", describe(artifact, len(bound), dense, settings.engine))
    if settings.engine == "triton" and not all(reads_fast(layer.codec) for layer in bound):
        logger.warning("KVSplice: %s", UNEVEN)
    if cpu.native is None and not torch.cuda.is_available():
        logger.warning("KVSplice: %s", cpu.MISSING)
    logger.info("KVSplice reads exactly: %s", describe_window(vllm_config, settings, block_size))


def describe(artifact: Artifact, compressed: int, dense: int, engine: str) -> str:
    """One line for the log: digest, layers, bytes per token before and after."""
    before, after = artifact.baseline_bytes_per_token, artifact.bytes_per_token
    return (
        f"artifact {artifact.digest[:12]}, {compressed} layers compressed and {dense} dense, engine {engine}, "
        f"{before} -> {after} bytes per token ({before / after:.2f}x, {artifact.bits_per_element:.2f} bits per element)"
    )


def describe_window(vllm_config: VllmConfig, settings: Settings, block_size: int) -> str:
    """One line for the log: what the exact window costs a sequence beside compressed blocks of `block_size` tokens."""
    if not settings.recent_window:
        return "nothing (window 0)"
    sizes = chosen_block_sizes(vllm_config, settings, block_size)
    cost = sizes.window_bytes(settings.recent_window) / 1e6
    return (
        f"window {settings.recent_window} tokens: {cost:.1f} MB a sequence "
        f"(blocks of {sizes.codes} compressed or {sizes.raw} exact tokens), prefill {settings.prefill}"
    )
