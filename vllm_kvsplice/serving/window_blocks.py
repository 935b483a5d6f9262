"""Blocks of the exact window: how many tokens they hold, and which of a sequence's tokens have one.

All blocks of vLLM's pool have one size, that of the widest group of layers, so `block_sizes` picks token counts for which a
block of codes and a block of raw tokens weigh about the same.

vLLM gives every token of a step a block in a sliding window's cache and frees those that slid out only with the next
step. A chunk of 2048 raw tokens would hold as much memory as 11,000 tokens at 3 bits, for one step. `WindowManager` leaves
out the blocks that nobody will read again; the step itself reads its own tokens from `window.Scratch`.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from vllm.config import VllmConfig
from vllm.utils.math_utils import cdiv
from vllm.v1.core.kv_cache_utils import KVCacheBlock
from vllm.v1.core.single_type_kv_cache_manager import SlidingWindowManager, register_all_kvcache_specs
from vllm.v1.kv_cache_interface import SlidingWindowSpec
from vllm.v1.kv_cache_spec_registry import KVCacheSpecRegistry

# The sequence that block sizes are chosen for.
TYPICAL_TOKENS = 4096
LARGEST_BLOCK = 256
# Memory that may be given away for longer blocks, which kernels walk faster.
SLACK = 1.02
# Share of the pool that must stay free for other requests before a step keeps windows for prefix hits alone.
SPARE = 1 / 8


@dataclass(frozen=True)
class BlockSizes:
    """Tokens in a block of codes and in a block of raw tokens, and the bytes either takes in the pool."""

    codes: int
    raw: int
    block_bytes: int

    def window_blocks(self, window: int) -> int:
        """The most blocks that the last `window` tokens lie in, as they begin anywhere in one."""
        return cdiv(window - 1, self.raw) + 1

    def window_bytes(self, window: int) -> int:
        """The most that the exact window of one decoding sequence takes."""
        return self.window_blocks(window) * self.block_bytes

    def pool_blocks(self, sequences: int, tokens: int, window: int) -> int:
        """Blocks that sequences of `tokens` hold while one is in a step of prefill, with its windows before and after."""
        return sequences * cdiv(tokens, self.codes) + (sequences + 1) * self.window_blocks(window)

    def sequence_bytes(self, tokens: int, window: int) -> float:
        """Expected bytes of a sequence; its last block of codes is half full."""
        return (tokens / self.codes + 0.5 + self.window_blocks(window)) * self.block_bytes


def block_sizes(code_bytes: int, raw_bytes: int, window: int, multiple: int, block_size: int | None) -> BlockSizes:
    """Block sizes for a window of `window` tokens that waste least.

    Args:
        code_bytes, raw_bytes: of one token over all compressed layers of a rank, as codes and as it is.
        window: W, at least 1.
        multiple: that a block of codes must be of.
        block_size: tokens in a block of codes, where the user has chosen.

    """
    candidates = []
    for codes in [block_size] if block_size else range(multiple, LARGEST_BLOCK + 1, multiple):
        # A prefix hit must end at a block's end in both caches, so one size divides the other.
        for raw in (n for n in range(1, codes + 1) if codes % n == 0):
            block_bytes = max(codes * code_bytes, raw * raw_bytes)
            candidates.append(BlockSizes(codes, raw, block_bytes))
    best = min(sizes.sequence_bytes(TYPICAL_TOKENS, window) for sizes in candidates)
    return max(
        (sizes for sizes in candidates if sizes.sequence_bytes(TYPICAL_TOKENS, window) <= SLACK * best),
        key=lambda sizes: (sizes.codes, sizes.raw),
    )


@dataclass(frozen=True, kw_only=True)
class WindowSpec(SlidingWindowSpec):
    """The exact window as vLLM's scheduler sees it.

    Attributes:
        hit_alignment: tokens; a prefix hit ends at a multiple of it, so the window before such a place is worth keeping.
        drafts: tokens that speculative decoding adds to a step and may take back, with which the window moves back as well.

    """

    hit_alignment: int
    drafts: int

    @property
    def window_blocks(self) -> int:
        """The most blocks that the tokens lie in that later steps of a sequence read."""
        return cdiv(self.sliding_window + self.drafts - 1, self.block_size) + 1

    def needed(self, block: int, tokens: int) -> bool:
        """Whether a later step of a sequence of `tokens` reads its block number `block`."""
        return (block + 1) * self.block_size > tokens - self.drafts - self.sliding_window + 1

    def before_hit(self, block: int) -> bool:
        """Whether a prefix hit reads it: the W - 1 tokens before a multiple of `hit_alignment`."""
        end = (block + 1) * self.block_size
        return end > cdiv(end, self.hit_alignment) * self.hit_alignment - self.sliding_window + 1

    def max_admission_blocks_per_request(self, max_in_flight_tokens: int, max_model_len: int) -> int:
        """The most blocks that a request needs at any time: the windows before and after a step."""
        vllm_reckons = super().max_admission_blocks_per_request(max_in_flight_tokens, max_model_len)
        return min(2 * self.window_blocks, vllm_reckons)

    def max_memory_usage_bytes(self, vllm_config: VllmConfig) -> int:
        """What a sequence costs while it decodes, which is what vLLM's report of how many fit should count.

        vLLM would add the tokens of a whole step to each sequence, and these never have a place here.
        """
        model = vllm_config.model_config
        # Where vLLM looks for the longest sequence that fits, it must also fit during a step.
        windows = 2 if model.original_max_model_len == -1 else 1
        return min(windows * self.window_blocks, cdiv(model.max_model_len, self.block_size)) * self.page_size_bytes


class WindowManager(SlidingWindowManager):
    """Blocks of the window of each request, with vLLM's null block where none is kept.

    A step keeps the window that the next one reads and, while memory is plenty, every window that a prefix hit would read.
    """

    kv_cache_spec: WindowSpec

    def __init__(self, kv_cache_spec: WindowSpec, **options: Any) -> None:
        super().__init__(kv_cache_spec, **options)
        # By request: how many of its first blocks have been removed.
        self._removed: dict[str, int] = {}

    def get_num_blocks_to_allocate(
        self,
        request_id: str,
        num_tokens: int,
        new_computed_blocks: Sequence[KVCacheBlock],
        total_computed_tokens: int,
        num_local_computed_tokens: int,
        num_tokens_main_model: int,
        apply_admission_cap: bool = False,
        prefill_end: int = 0,
    ) -> int:
        """See `SingleTypeKVCacheManager`; of the new blocks, only those that the next step reads."""
        held = len(self.req_to_blocks.get(request_id, ()))
        evictable = 0
        if request_id not in self.num_cached_block:
            skipped = self.get_num_skipped_tokens(total_computed_tokens) // self.block_size
            evictable = self._get_num_evictable_blocks(new_computed_blocks[max(0, skipped - held) :])
            held = max(skipped, held + len(new_computed_blocks))
        needed = len(self._needed(held, num_tokens))
        if apply_admission_cap and self.max_admission_blocks_per_request is not None:
            needed = min(needed, self.max_admission_blocks_per_request)
        return needed + evictable

    def allocate_new_blocks(self, request_id: str, num_tokens: int, num_tokens_main_model: int) -> list[KVCacheBlock]:
        """See `SingleTypeKVCacheManager`; null blocks stand for those not kept."""
        blocks = self.req_to_blocks[request_id]
        kept = self._needed(len(blocks), num_tokens)
        if self.enable_caching:
            kept = self._with_hits(kept, len(blocks), num_tokens)
        fresh = self.block_pool.get_new_blocks(len(kept))
        new = [self._null_block] * max(0, cdiv(num_tokens, self.block_size) - len(blocks))
        for index, block in zip(kept, fresh, strict=True):
            new[index - len(blocks)] = block
        blocks.extend(new)
        if self._record_new_block_ids:
            self.new_block_ids.extend(block.block_id for block in fresh)
        return new

    def _needed(self, first: int, tokens: int) -> list[int]:
        """Numbers of the blocks from `first` on that a sequence of `tokens` needs after this step."""
        blocks = range(first, cdiv(tokens, self.block_size))
        return [block for block in blocks if self.kv_cache_spec.needed(block, tokens)]

    def _with_hits(self, needed: list[int], first: int, tokens: int) -> list[int]:
        """`needed` and the blocks of a step that prefix hits would read, if enough memory is left for other requests."""
        spec = self.kv_cache_spec
        kept = [b for b in range(first, cdiv(tokens, self.block_size)) if b in needed or spec.before_hit(b)]
        codes = cdiv(tokens, spec.hit_alignment) - first * self.block_size // spec.hit_alignment
        free = self.block_pool.get_num_free_blocks() - codes - len(kept)
        return kept if free >= self.block_pool.num_gpu_blocks * SPARE else needed

    def _remove_blocks_in_range(self, request_id: str, first_block: int, last_block: int) -> None:
        """See `SingleTypeKVCacheManager`, which stops at the first null block; here they lie between others."""
        blocks = self.req_to_blocks.get(request_id, [])
        last_block = min(last_block, len(blocks))
        first_block = max(first_block, self._removed.get(request_id, 0))
        gone = [i for i in range(first_block, last_block) if not blocks[i].is_null]
        self._removed[request_id] = max(first_block, last_block)
        # The last first, so that a prefix is evicted from its end.
        freed = [blocks[i] for i in reversed(gone)]
        for i in gone:
            blocks[i] = self._null_block
        self.block_pool.free_blocks(freed)

    def pop_blocks_for_free(self, request_id: str) -> list[KVCacheBlock]:
        """See `SingleTypeKVCacheManager`."""
        self._removed.pop(request_id, None)
        return super().pop_blocks_for_free(request_id)


def register_window_spec() -> None:
    """Tell vLLM's scheduler who manages the window's blocks. Safe to call again."""
    # Before ours, because vLLM takes a registry that is not empty for complete.
    register_all_kvcache_specs(None)
    registration: Any = KVCacheSpecRegistry.register
    registration(WindowSpec, WindowManager, uniform_type_base_spec=WindowSpec)
