"""A layer's code: nearest levels, lossless packing, sinks at position 0, and nothing that depends on the company."""

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.cases import (
    ALL_WIDTHS,
    GOLDEN,
    GOLDEN_LATENTS,
    ROTARIES,
    SINKS,
    Case,
    expect,
    expect_close,
    make_artifact,
    make_codec,
    make_identity_codec,
    make_tokens,
    nearest_codes,
    packed_by_hand,
    threads,
)
from vllm_kvsplice import layout as layout_module
from vllm_kvsplice.artifact import heads_of_rank
from vllm_kvsplice.codec import LayerCodec
from vllm_kvsplice.layout import GROUP
from vllm_kvsplice.rotary import Rotary

CODECS = [
    *(Case(widths=(width,), heads=1) for width in ALL_WIDTHS),
    *(Case(rotary=rotary, heads=3, dim=64) for rotary in ROTARIES),
    *(Case(sinks=sinks, dim=128, widths=(0, 3, 8)) for sinks in SINKS),
]
# Of float32 sums of 64 products, relative to the largest; measured 4e-7.
LIMIT = 1e-6

every_codec = pytest.mark.parametrize("codec", [pytest.param(case.codec(), id=case.codec_id) for case in CODECS])


@pytest.fixture(autouse=True)
def one_thread():
    with threads(1):
        yield


def random_codes(codec: LayerCodec, count: int, seed: int) -> Tensor:
    """Codes [T, R2] below 2**width."""
    widths = [w for kind in (codec.layout.key, codec.layout.value) for head in kind for w in head for _ in range(GROUP)]
    drawn = torch.randint(256, (count, len(widths)), generator=torch.Generator().manual_seed(seed))
    return (drawn % (1 << torch.tensor(widths))).to(torch.uint8)


def check_packing() -> None:
    """Bytes are those of the second formulation, and unpacking finds the codes again."""
    codec = make_codec(3, 64)
    codes = random_codes(codec, 7, seed=0)
    packed = codec.pack(codes)
    by_hand = [packed_by_hand(codec.layout, row) for row in codes.tolist()]
    expect([bytes(row) for row in packed.tolist()] == by_hand, "bytes lie where the layout says")
    expect(torch.equal(codec.unpack(packed.T), codes.T), "unpacking undoes packing")


def check_encoding() -> None:
    """Every code names the nearest level of its latent."""
    codec = make_codec(3, 64)
    tokens = make_tokens(codec, 33)
    codes, _ = nearest_codes(codec, *tokens)
    expect(torch.equal(codec.encode(*tokens).long(), codes), "codes name the nearest levels")


def check_reconstruction() -> None:
    """Keys and values come back as mean plus synthesis of the named levels, or as the sink."""
    codec = make_codec(3, 64)
    tokens = make_tokens(codec, 33)
    restored = codec.reconstruct(*tokens)
    codes = nearest_codes(codec, *tokens)[0].view(33, 2, 3, 64)
    for kind, index in (("key", 0), ("value", 1)):
        half = getattr(codec, kind)
        offset = half.mean.expand(33, 3, 64).transpose(0, 1).clone()
        if kind == "key":
            offset = codec.rotary.rotate(offset, tokens[2])
        offset[:, 0] = half.sink
        for head in range(3):
            levels = half.levels[head].repeat_interleave(GROUP, 0).gather(1, codes[:, index, head].T)
            exact = offset[head].double() + (half.synthesis[head].double() @ levels.double()).T
            at_sink = (half.sink_scale[head] * levels[:, 0]).double()
            exact[0] = half.sink[head] + half.synthesis[head].double() @ at_sink
            expect_close(restored[index][:, head], exact, LIMIT, f"{kind}s come back as mean plus detail")


@settings(deadline=None)
@given(st.lists(st.integers(0, 8), min_size=1, max_size=6), st.integers(1, 9), st.integers(0, 2**32))
def test_unpacking_undoes_packing_at_every_width(widths, count, seed):
    codec = make_identity_codec(widths, widths[::-1])
    codes = random_codes(codec, count, seed)
    assert torch.equal(codec.unpack(codec.pack(codes).T), codes.T)


@pytest.mark.parametrize("check", [check_packing, check_encoding, check_reconstruction])
def test_codec_agrees_with_its_second_formulation(check):
    check()


@every_codec
def test_encoding_picks_the_nearest_level(codec):
    tokens = make_tokens(codec, 65)
    codes, distances = nearest_codes(codec, *tokens)
    assert torch.equal(codec.encode(*tokens).long(), codes)
    assert distances.isfinite().all()


@every_codec
@pytest.mark.parametrize("chunk", [1, 7, 16, 17, 64])
def test_bytes_of_a_token_do_not_depend_on_the_tokens_encoded_with_it(codec, chunk):
    tokens = make_tokens(codec, 65)
    parts = [codec.pack(codec.encode(*part)) for part in zip(*(x.split(chunk) for x in tokens), strict=True)]
    assert torch.equal(torch.cat(parts), codec.pack(codec.encode(*tokens)))


def test_bfloat16_tokens_are_coded_like_their_float32_copies():
    codec = make_codec(2, 64)
    key, value, positions = make_tokens(codec, 33)
    narrow = key.bfloat16(), value.bfloat16()
    assert torch.equal(codec.encode(*narrow, positions), codec.encode(*(x.float() for x in narrow), positions))


def test_a_codec_of_no_bits_takes_the_least_token_and_decodes_to_the_mean():
    codec = make_codec(2, 64, widths=(0,))
    key, value, positions = make_tokens(codec, 33)
    assert (codec.layout.code_bytes, codec.layout.token_bytes) == (0, 16)
    assert not codec.pack(codec.encode(key, value, positions)).any()
    for kind, restored in zip(("key", "value"), codec.reconstruct(key, value, positions), strict=True):
        assert torch.equal(restored, codec.offset(kind, positions))


def test_groups_of_no_bits_cost_no_bytes_and_leave_the_others_alone():
    with_gaps, without = make_identity_codec([3, 0, 5], [0, 8, 0]), make_identity_codec([3, 5, 8], [0, 0, 0])
    codes = torch.tensor([[code % 8 for code in GOLDEN_LATENTS] * 6])
    dense = torch.cat((codes[:, :24], torch.zeros(1, 24, dtype=torch.int64)), 1)
    assert with_gaps.layout.code_bytes == without.layout.code_bytes == 16
    assert torch.equal(with_gaps.pack(codes), without.pack(dense))


@pytest.mark.parametrize("width", range(1, 9))
def test_codes_of_whole_numbers_have_the_golden_bytes(width):
    codec = make_identity_codec([width], [0])
    key = torch.tensor(GOLDEN_LATENTS).remainder(1 << width).float().view(1, 1, GROUP)
    packed = codec.pack(codec.encode(key, torch.zeros_like(key), torch.tensor([3])))
    assert bytes(packed[0].tolist()) == bytes.fromhex(GOLDEN[width]).ljust(16, b"\0")
    assert torch.equal(codec.reconstruct(key, key, torch.tensor([3]))[0], key)


def test_256_levels_restore_a_token_to_within_half_their_distance():
    codec = make_codec(1, 64, widths=(8,), sinks="coded")
    *tokens, positions = make_tokens(codec, 33)
    for half, x, restored in zip((codec.key, codec.value), tokens, codec.reconstruct(*tokens, positions), strict=True):
        error = torch.einsum("hrd,thd->thr", half.analysis, restored - x)
        error[0] /= half.sink_scale
        assert error.abs().max() <= 0.5 + 1e-4


@pytest.mark.parametrize("widths", [(0, 1, 2, 3, 4, 5, 6, 7, 8), (1,)])
def test_evenly_spaced_levels_are_known_by_their_step_and_offset(widths):
    codec = make_codec(2, 32, widths, uniform=True)
    step, offset = codec.spacing
    each = [w for kind in (codec.layout.key, codec.layout.value) for head in kind for w in head]
    levels = torch.stack((codec.key.levels, codec.value.levels)).flatten(0, 2)
    for row, width in enumerate(each):
        code = torch.arange(1 << width)
        torch.testing.assert_close(levels[row, : 1 << width], step[row] * code + offset[row], rtol=0, atol=0)


def test_other_levels_have_no_spacing():
    assert make_codec(2, 32, (3, 4)).spacing is None


@pytest.mark.parametrize("rotary", ROTARIES)
def test_position_0_is_the_sink_itself_where_the_sink_replaces_it(rotary):
    codec = make_codec(3, 32, rotary=rotary, sinks="replaced")
    key, value, positions = make_tokens(codec, 5)
    for half, restored in zip((codec.key, codec.value), codec.reconstruct(key, value, positions), strict=True):
        assert torch.equal(restored[0], half.sink)
        assert not torch.equal(restored[1], half.sink)


@pytest.mark.parametrize("rotary", ROTARIES)
def test_position_0_is_the_sink_plus_its_detail_where_the_sink_is_coded(rotary):
    codec = make_codec(3, 32, widths=(8,), rotary=rotary, sinks="coded")
    key, value, positions = make_tokens(codec, 5)
    for half, x, restored in zip(
        (codec.key, codec.value), (key, value), codec.reconstruct(key, value, positions), strict=True
    ):
        assert (restored[0] - x[0]).abs().max() < 0.5 < (half.sink - x[0]).abs().max()


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf, 1e30])
def test_tokens_out_of_range_are_coded_within_the_codebook(bad):
    codec = make_codec(2, 64)
    key, value, positions = make_tokens(codec, 5)
    key[1:3], value[2:4] = bad, bad
    stored = codec.unpack(codec.pack(codec.encode(key, value, positions)).T)
    assert codec.decode(stored).isfinite().all()
    assert all(x.isfinite().all() for x in codec.reconstruct(key, value, positions))


# vLLM's rule: ranks split the heads evenly, or share them evenly when there are fewer heads than ranks.
RANKS = {
    (6, 1): [[0, 1, 2, 3, 4, 5]],
    (6, 2): [[0, 1, 2], [3, 4, 5]],
    (6, 6): [[0], [1], [2], [3], [4], [5]],
    (2, 4): [[0], [0], [1], [1]],
    (1, 3): [[0], [0], [0]],
}


@pytest.mark.parametrize(("shape", "expected"), RANKS.items(), ids=str)
def test_ranks_hold_the_heads_that_vllm_gives_them(shape, expected):
    heads, ranks = shape
    assert [heads_of_rank(heads, rank, ranks) for rank in range(ranks)] == expected


@pytest.mark.parametrize(("heads", "ranks"), [(6, 2), (6, 3), (3, 3), (2, 4)])
def test_ranks_code_their_heads_as_one_rank_does_in_tokens_of_one_size(heads, ranks):
    codec = make_codec(heads, 64)
    artifact = make_artifact(codec, group=4)
    key, value, positions = make_tokens(codec, 17)
    codes = codec.encode(key, value, positions).view(17, 2, heads, 64)
    shards = [artifact.layer_shard(0, rank, ranks) for rank in range(ranks)]
    assert len({shard.layout.token_bytes for shard in shards}) == 1
    for rank, shard in enumerate(shards):
        own = heads_of_rank(heads, rank, ranks)
        assert torch.equal(shard.encode(key[:, own], value[:, own], positions), codes[:, :, own].flatten(1))


# --- planted bugs: one fault each in a function that the second formulations do not use ------------------------------


def codec_seen_by(name: str, change: Callable[[LayerCodec], LayerCodec]) -> tuple:
    """The fault that the method `name` works on a changed codec."""
    intact = getattr(LayerCodec, name)
    return LayerCodec, name, lambda self, *arguments: intact(change(self), *arguments)


def result_of(name: str, change: Callable[[Tensor], Tensor]) -> tuple:
    """The fault that the cached property `name` is changed."""
    intact = vars(LayerCodec)[name].func
    return LayerCodec, name, property(lambda self: change(intact(self)))


def codes_seen_by(name: str, change: Callable[[Tensor], Tensor]) -> tuple:
    """The fault that the method `name` is given changed codes."""
    intact = getattr(LayerCodec, name)
    return LayerCodec, name, lambda self, codes: intact(self, change(codes))


def change_kind(kind: str, **change: Callable[[Tensor], Tensor]) -> Callable[[LayerCodec], LayerCodec]:
    """The codec with fields of its keys or values replaced by functions of themselves."""

    def changed(codec: LayerCodec) -> LayerCodec:
        half = getattr(codec, kind)
        return replace(codec, **{kind: replace(half, **{k: make(getattr(half, k)) for k, make in change.items()})})

    return changed


def smallest_plane_first(width: int) -> list[tuple[int, int]]:
    bits = [bits for bits in (1, 2, 4, 8) if width & bits]
    return list(zip(bits, [sum(bits[:i]) for i in range(len(bits))], strict=True))


def one_bit_short(width: int, intact: Callable = layout_module.planes) -> list[tuple[int, int]]:
    return intact(max(0, width - 1))


def rotated_backwards(codec: LayerCodec) -> LayerCodec:
    return replace(codec, rotary=Rotary(-codec.rotary.inv_freq))


def unrotated(codec: LayerCodec) -> LayerCodec:
    return replace(codec, rotary=None)


PLANTED = {
    "planes in the wrong order": ((layout_module, "planes", smallest_plane_first), check_packing),
    "width one too small": ((layout_module, "planes", one_bit_short), check_packing),
    "latents packed from the other end": (codes_seen_by("pack", lambda codes: codes.flip(1)), check_packing),
    "level below the nearest": (result_of("thresholds", lambda bounds: bounds + 0.01), check_encoding),
    "codebook of the next group coded with": (result_of("thresholds", lambda b: b.roll(GROUP, 0)), check_encoding),
    "heads swapped": (codec_seen_by("encode", change_kind("key", mean=lambda mean: mean[[0, 2, 1]])), check_encoding),
    "rotation dropped": (codec_seen_by("encode", unrotated), check_encoding),
    "mean rotated backwards": (codec_seen_by("encode", rotated_backwards), check_encoding),
    "sink missing": (codec_seen_by("encode", change_kind("value", sink=torch.zeros_like)), check_encoding),
    "sink read in the units of ordinary tokens": (
        codec_seen_by("reconstruct", change_kind("key", sink_scale=torch.ones_like)),
        check_reconstruction,
    ),
    "codes of the next group decoded": (
        codes_seen_by("decode", lambda codes: codes.roll(GROUP, 0)),
        check_reconstruction,
    ),
    "synthesis transposed": (
        codec_seen_by("reconstruct", change_kind("value", synthesis=lambda d: d.mT)),
        check_reconstruction,
    ),
    "rotation dropped when reading": (codec_seen_by("reconstruct", unrotated), check_reconstruction),
}


@pytest.mark.parametrize(("fault", "check"), PLANTED.values(), ids=PLANTED)
def test_planted_bug_is_caught(monkeypatch, fault, check):
    monkeypatch.setattr(*fault)
    with pytest.raises(AssertionError, match="broken promise"):
        check()
