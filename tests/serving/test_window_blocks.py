"""vLLM's own cache manager, with ours for the window, driven through random requests: every token read is the right one.

No model runs. What a worker would write into a block is remembered as (hash of the sequence up to the token), so a stale,
foreign or missing block shows at the first read.
"""

import random
from collections.abc import Iterator, Sequence

import pytest
import torch
from vllm.sampling_params import SamplingParams
from vllm.utils.hashing import sha256
from vllm.v1.core.kv_cache_manager import KVCacheManager
from vllm.v1.core.kv_cache_utils import get_request_block_hasher, init_none_hash
from vllm.v1.core.single_type_kv_cache_manager import SlidingWindowManager
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig, KVCacheGroupSpec
from vllm.v1.request import Request

from tests.cases import expect
from vllm_kvsplice.serving import window_blocks
from vllm_kvsplice.serving.window_blocks import WindowManager, WindowSpec, register_window_spec

CODES = 32
LONGEST = 400
STEP = 128
SHAPE = {"num_kv_heads": 1, "head_size": 8, "dtype": torch.float32}


def window_spec(window: int, raw: int, drafts: int) -> WindowSpec:
    return WindowSpec(block_size=raw, sliding_window=window, hit_alignment=CODES, drafts=drafts, **SHAPE)


class Pool:
    """Two caches over one pool of blocks, and the memory that a worker would have."""

    def __init__(self, window: int, raw: int, blocks: int, caching: bool, drafts: int = 0) -> None:
        register_window_spec()
        init_none_hash(sha256)
        self.spec = window_spec(window, raw, drafts)
        groups = [
            KVCacheGroupSpec(["attention"], FullAttentionSpec(block_size=CODES, **SHAPE)),
            KVCacheGroupSpec(["attention.window"], self.spec),
        ]
        config = KVCacheConfig(num_blocks=blocks, kv_cache_tensors=[], kv_cache_groups=groups)
        self.manager = KVCacheManager(config, LONGEST, CODES, raw, max_in_flight_tokens=STEP, enable_caching=caching)
        self.hasher = get_request_block_hasher(raw, sha256)
        self.memory: dict[tuple[int, int], int] = {}
        self.hits = 0

    @property
    def free(self) -> int:
        return self.manager.block_pool.get_num_free_blocks()

    def request(self, name: str, tokens: list[int]) -> Request:
        sampling = SamplingParams(max_tokens=LONGEST)
        return Request(name, tokens, sampling, None, block_hasher=self.hasher)

    def step(self, request: Request, tokens: int) -> bool:
        """Compute up to `tokens` more of a request; False where the pool has no room."""
        adopted, hit = None, 0
        if request.num_computed_tokens == 0:
            adopted, hit, _ = self.manager.get_computed_blocks(request)
        tokens = min(tokens, request.num_tokens - hit - request.num_computed_tokens)
        if self.manager.allocate_slots(request, tokens, hit, adopted, full_sequence_must_fit=bool(adopted)) is None:
            return False
        self.hits += hit
        first = request.num_computed_tokens + hit
        self._read_and_write(request, request.all_token_ids, first, first + tokens)
        request.num_computed_tokens = first + tokens
        return True

    def verify(self, request: Request, drafts: list[int], accepted: int) -> bool:
        """Compute a request's last token and `drafts` after it, of which so many turn out right; False where no room is."""
        first = request.num_computed_tokens
        if self.manager.allocate_slots(request, 1 + len(drafts)) is None:
            return False
        self._read_and_write(request, [*request.all_token_ids, *drafts], first, first + 1 + len(drafts))
        request.append_output_token_ids(drafts[:accepted])
        request.num_computed_tokens = request.num_tokens
        return True

    def _read_and_write(self, request: Request, text: Sequence[int], first: int, end: int) -> None:
        blocks = self.manager.get_block_ids(request.request_id)[1]
        # More where drafts were taken back.
        expect(len(blocks) >= -(-end // self.spec.block_size), "every token has a place in the block table")
        for token in range(max(0, first - self.spec.sliding_window + 1), first):
            block, offset = blocks[token // self.spec.block_size], token % self.spec.block_size
            expect(block != 0, f"token {token} of the window before {first} has a block")
            right = hash(tuple(text[: token + 1]))
            expect(self.memory.get((block, offset)) == right, f"token {token} reads as it was written")
        for token in range(first, end):
            if block := blocks[token // self.spec.block_size]:
                self.memory[block, token % self.spec.block_size] = hash(tuple(text[: token + 1]))
        held = sum(block != 0 and not self._for_a_hit(number, end) for number, block in enumerate(blocks))
        most = self.spec.max_admission_blocks_per_request(STEP, LONGEST)
        expect(held <= most, f"{held} blocks are within the {most} that admission reckons with")

    def _for_a_hit(self, block: int, tokens: int) -> bool:
        return self.spec.before_hit(block) and not self.spec.needed(block, tokens)


def prompts(chance: random.Random) -> Iterator[list[int]]:
    """Prompts of which many share beginnings."""
    trunks = [[chance.randrange(50) for _ in range(300)] for _ in range(3)]
    while True:
        trunk = chance.choice(trunks)[: chance.randrange(1, 300)]
        yield trunk + [chance.randrange(50) for _ in range(chance.randrange(60))]


def serve(pool: Pool, seed: int, steps: int = 400) -> int:
    """A crude scheduler: admit, step in chunks of any size, decode, preempt the newest, finish. Counts preemptions."""
    chance = random.Random(seed)
    fresh, running, preempted = prompts(chance), [], 0
    for number in range(steps):
        if len(running) < 4 and chance.random() < 0.4:
            request = pool.request(f"{seed}-{number}", next(fresh))
            if pool.step(request, chance.randrange(1, STEP)):
                running.append(request)
        for request in list(running):
            if request not in running:
                continue
            if request.num_computed_tokens == request.num_tokens:
                request.append_output_token_ids(chance.randrange(50))
            drafts = [chance.randrange(50) for _ in range(chance.randrange(pool.spec.drafts + 1))]
            while not (
                pool.verify(request, drafts, chance.randrange(len(drafts) + 1))
                if request.num_computed_tokens + 1 == request.num_tokens
                else pool.step(request, chance.choice((1, 3, 16, STEP - 1)))
            ):
                victim = running.pop()
                pool.manager.free(victim)
                victim.num_computed_tokens = 0
                preempted += 1
                if victim is request:
                    break
            if request in running and (request.num_tokens > LONGEST - 5 - pool.spec.drafts or chance.random() < 0.02):
                pool.manager.free(request)
                running.remove(request)
    for request in running:
        pool.manager.free(request)
    return preempted


SHAPES = [(32, 8), (32, 16), (2, 4), (7, 4), (33, 32), (20, 1), (100, 8)]


@pytest.mark.parametrize("drafts", [0, 5, 40])
@pytest.mark.parametrize("caching", [True, False], ids=["prefix caching", "no prefix caching"])
@pytest.mark.parametrize(("window", "raw"), SHAPES)
def test_every_token_of_the_window_reads_as_it_was_written(window: int, raw: int, caching: bool, drafts: int) -> None:
    # Hardly two of the longest requests fit.
    blocks = window_spec(window, raw, drafts).max_admission_blocks_per_request(STEP, LONGEST)
    pool = Pool(window, raw, 2 * (LONGEST // CODES) + blocks, caching, drafts)
    before = pool.free
    preempted = sum(serve(pool, seed) for seed in range(3))
    assert pool.free == before
    assert (pool.hits > 0) is caching
    assert preempted > 0


@pytest.mark.parametrize(("window", "raw"), SHAPES)
def test_a_chunk_holds_few_blocks(window: int, raw: int) -> None:
    """A chunk without prefix caching holds the window alone, where vLLM's own manager holds all of the chunk."""
    pool = Pool(window, raw, 1000, caching=False)
    request = pool.request("one", list(range(128)))
    assert pool.step(request, 128)
    held = [block for block in pool.manager.get_block_ids("one")[1] if block]
    assert len(held) <= pool.spec.window_blocks


def test_a_crowded_pool_keeps_no_windows_for_hits() -> None:
    prompt = list(range(200))
    crowded = Pool(20, 8, 14, caching=True)
    assert crowded.step(crowded.request("one", prompt), 127)
    held = [block for block in crowded.manager.get_block_ids("one")[1] if block]
    assert len(held) <= crowded.spec.window_blocks


def test_hits_end_where_a_window_was_kept() -> None:
    pool = Pool(20, 8, 1000, caching=True)
    prompt = list(range(200))
    assert pool.step(pool.request("first", prompt), 127)
    again = pool.request("second", prompt)
    assert pool.step(again, 1)
    # 96 is the last multiple of 32 that 127 computed tokens cover.
    assert again.num_computed_tokens == 97


def test_planted_fault_a_token_too_few_kept_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(WindowSpec, "needed", lambda spec, block, tokens: (block + 1) * 8 > tokens - 10)
    with pytest.raises(AssertionError, match=r"broken promise: token .* has a block"):
        serve(Pool(20, 8, 150, caching=True), 1)


def test_planted_fault_drafts_forgotten_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(WindowSpec, "needed", lambda spec, block, tokens: (block + 1) * 8 > tokens - 19)
    with pytest.raises(AssertionError, match=r"broken promise: token .* has a block"):
        serve(Pool(20, 8, 150, caching=True, drafts=40), 1)


def test_planted_fault_windows_before_hits_dropped_finds_no_prefix(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(WindowSpec, "before_hit", lambda spec, block: False)
    dropped, kept = Pool(20, 8, 150, caching=True), Pool(20, 8, 150, caching=True)
    serve(dropped, 1)
    monkeypatch.undo()
    serve(kept, 1)
    assert dropped.hits < kept.hits / 2


def test_the_scheduler_finds_our_manager() -> None:
    manager = Pool(20, 8, 100, caching=True).manager.coordinator.single_type_managers[1]
    assert type(manager) is WindowManager
    assert issubclass(WindowManager, SlidingWindowManager)
    assert window_blocks.KVCacheSpecRegistry.get_manager_class(manager.kv_cache_spec) is WindowManager
