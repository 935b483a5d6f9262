"""Value pruning: which values go, what is read in their place, and how much memory is left."""

from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Tensor

from tests.codecs import codebooks
from tests.huggingface.agreement import agree
from tests.huggingface.conftest import Tiny
from tests.huggingface.test_cache import evaluated, generate, left_padded, new_cache, read
from vllm_kvsplice.codec import KindCodec, LayerCodec
from vllm_kvsplice.errors import KVSpliceError
from vllm_kvsplice.huggingface import value_elements
from vllm_kvsplice.huggingface.attention import attend
from vllm_kvsplice.huggingface.pruning import PrunedLayer
from vllm_kvsplice.layout import GROUP, LayerLayout

HEADS, DIM, RANK = 2, 64, 16


def rank_codec() -> LayerCodec:
    """Two heads of 64 dimensions without rotation, 8 bits for each of 16 latents of keys and of values."""
    widths = ((8,) * (RANK // GROUP) + (0,) * ((DIM - RANK) // GROUP),) * HEADS
    bits = torch.tensor(widths)
    levels, unit = codebooks(bits, torch.ones(bits.shape))
    used = (unit * (bits > 0)).repeat_interleave(GROUP, 1)
    random = torch.Generator().manual_seed(0)

    def kind() -> KindCodec:
        basis = torch.linalg.qr(torch.randn(HEADS, DIM, DIM, generator=random)).Q
        analysis = torch.where(used > 0, 1 / used, 0)[..., None] * basis.mT
        mean, sink = torch.randn(2, HEADS, DIM, generator=random)
        return KindCodec(mean, analysis, basis * used[:, None], levels, sink, torch.zeros(HEADS, DIM))

    return LayerCodec(kind(), kind(), LayerLayout(widths, widths), None)


def take(layer: PrunedLayer, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Attention of a step after all before it, [1, T, heads, D]."""
    before = layer.get_seq_length()
    positions = torch.arange(before, before + key.shape[2])[None]
    module = torch.nn.Module()
    module.num_key_value_groups = query.shape[1] // key.shape[1]
    return attend(module, query, *layer.update(key, value), None, position_ids=positions)[0]


def step(tokens: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Query of two heads per KV head, key and value, [1, heads, tokens, D]."""
    random = torch.Generator().manual_seed(seed)
    return tuple(torch.randn(1, heads, tokens, DIM, generator=random) for heads in (2 * HEADS, HEADS, HEADS))


class TestMemory:
    def test_a_thousand_values_of_64_dimensions_become_391_of_16(self) -> None:
        assert value_elements(1024, 64, 391, 16) == (1024 * 64, 391 * 64, 391 * 16) == (65536, 25024, 6256)
        assert value_elements(100, 64, 391, 16) == (6400, 6400, 1600)

    def test_what_is_held_is_that_many_elements(self) -> None:
        layer = PrunedLayer(rank_codec(), 0, None, 391, False)
        take(layer, *step(1000, 0))
        take(layer, *step(24, 1))
        # A byte each, because 16 latents have 8 bits.
        assert layer.value_codes.nbytes == HEADS * value_elements(1024, DIM, 391, RANK)[2]
        assert layer.codes.nbytes == HEADS * 1024 * RANK
        held = {"codes", "value_codes", "kept", "received", "positions", "window"}
        assert set(layer.held) == held
        assert layer.kept.nbytes == layer.received.nbytes == HEADS * 391 * 4

    def test_the_window_is_kept_beside_them(self) -> None:
        layer = PrunedLayer(rank_codec(), 5, None, 10, False)
        for seed in range(3):
            take(layer, *step(20, seed))
        assert layer.kept.shape == (1, HEADS, 10 + 4)
        assert layer.kept[0, :, -4:].tolist() == [[56, 57, 58, 59]] * HEADS


class TestChoice:
    @pytest.mark.parametrize("first", [False, True], ids=["compress-then-select", "prune-then-compress"])
    @pytest.mark.parametrize("window", [0, 6])
    def test_values_that_drew_most_attention_stay(self, first: bool, window: int) -> None:
        """Against the definition, in loops and in float64."""
        codec, k = rank_codec(), 8
        layer = PrunedLayer(codec, window, None, k, first)
        take(layer, *step(30, 0))
        drawn = attention_drawn(codec, *step(30, 0)[:2], window, first)
        older = 30 - max(0, window - 1)
        for head in range(HEADS):
            expected = drawn[head, :older].topk(k).indices.sort().values
            assert layer.kept[0, head, :k].tolist() == expected.tolist()

    def test_the_two_orders_choose_differently(self) -> None:
        chosen = []
        for first in (False, True):
            layer = PrunedLayer(rank_codec(), 0, None, 8, first)
            take(layer, *step(30, 0))
            chosen.append(layer.kept)
        assert not torch.equal(*chosen)

    def test_a_value_that_went_is_read_as_the_mean(self) -> None:
        codec = rank_codec()
        layer, whole = PrunedLayer(codec, 0, None, 8, False), PrunedLayer(codec, 0, None, 99, False)
        for one in (layer, whole):
            take(one, *step(30, 0))
        gone = torch.ones(1, HEADS, 30, dtype=torch.bool).scatter_(2, layer.kept.long(), False)
        (key, value), (all_keys, all_values) = layer._restored(torch.float32), whole._restored(torch.float32)
        assert torch.equal(key, all_keys)
        assert torch.equal(value[~gone], all_values[~gone])
        mean = codec.offset("value", torch.arange(30)).transpose(0, 1)[None]
        assert torch.equal(value[gone], mean[gone])

    def test_attention_is_summed_over_steps(self) -> None:
        layer = PrunedLayer(rank_codec(), 1, None, 99, False)
        query, key, value = step(13, 0)
        for part in (slice(0, 8), slice(8, 12), slice(12, 13)):
            take(layer, query[:, :, part], key[:, :, part], value[:, :, part])
        expected = attention_drawn(rank_codec(), query, key, 1, False)
        assert torch.allclose(layer.received[0].double(), expected, atol=1e-5)


def attention_drawn(codec: LayerCodec, query: Tensor, key: Tensor, window: int, first: bool) -> Tensor:
    """[H, T] of a first step."""
    tokens = key.shape[2]
    stored = codec.reconstruct(key[0].transpose(0, 1), key[0].transpose(0, 1), torch.arange(tokens))[0].double()
    drawn = torch.zeros(HEADS, tokens, dtype=torch.float64)
    for at in range(tokens):
        for head in range(2 * HEADS):
            exact = [first or j > at - window for j in range(at + 1)]
            keys = [key[0, head // 2, j].double() if exact[j] else stored[j, head // 2] for j in range(at + 1)]
            scores = torch.stack(keys) @ query[0, head, at].double() * DIM**-0.5
            drawn[head // 2, : at + 1] += scores.softmax(0)
    return drawn


class TestCache:
    @pytest.mark.parametrize("first", [False, True])
    def test_keeping_everything_changes_nothing(self, llama: Tiny, first: bool) -> None:
        cache = new_cache(llama, prune_values=1000, prune_first=first)
        assert agree(read(llama, cache, *llama.tokens.split(32, 1)), evaluated(llama, llama.tokens))

    def test_the_fewer_are_kept_the_more_is_lost(self, llama: Tiny) -> None:
        expected = evaluated(llama, llama.tokens)[:, 48:]
        lost = []
        for k in (32, 16, 8, 1):
            cache = new_cache(llama, 4, prune_values=k)
            given = read(llama, cache, llama.tokens[:, :48], llama.tokens[:, 48:])[:, 48:]
            lost.append(float((given - expected).abs().mean()))
        assert lost == sorted(lost)
        assert lost[0] > 0

    def test_padded_rows_equal_rows_alone(self, llama: Tiny) -> None:
        rows = [llama.tokens[0, :50], llama.tokens[1, :33]]
        padded, mask = left_padded(rows)
        together = generate(llama, padded, new_cache(llama, prune_values=12), attention_mask=mask)
        for row, answer in zip(rows, together[:, 50:], strict=True):
            alone = generate(llama, row[None], new_cache(llama, prune_values=12))
            assert torch.equal(alone[0, len(row) :], answer)

    @pytest.mark.parametrize(
        ("change", "rows"),
        [
            (lambda cache: cache.reorder_cache(torch.tensor([2, 2, 0])), [2, 2, 0]),
            (lambda cache: cache.batch_repeat_interleave(2), [0, 0, 1, 1, 2, 2]),
        ],
        ids=["reorder", "repeat"],
    )
    def test_changes_of_the_batch(self, llama: Tiny, change: Callable, rows: list[int]) -> None:
        cache, other = (new_cache(llama, prune_values=12) for _ in range(2))
        read(llama, cache, llama.tokens[:3, :60])
        change(cache)
        read(llama, other, llama.tokens[rows, :60])
        ends = map(partial(read, llama), (cache, other), [llama.tokens[rows, 60:]] * 2)
        assert agree(*ends)

    def test_crop_is_refused(self, llama: Tiny) -> None:
        cache = new_cache(llama, prune_values=12)
        read(llama, cache, llama.tokens)
        cache.crop(0)
        with pytest.raises(KVSpliceError, match="cannot be cropped"):
            cache.crop(-1)
