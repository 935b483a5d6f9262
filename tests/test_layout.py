"""The bytes of a token are exactly the documented ones."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.cases import GOLDEN, GOLDEN_LATENTS, make_codec, make_identity_codec, packed_by_hand
from vllm_kvsplice.layout import GROUP, LayerLayout, aligned, planes

PLANES = {
    0: [],
    1: [(1, 0)],
    2: [(2, 0)],
    3: [(2, 0), (1, 2)],
    4: [(4, 0)],
    5: [(4, 0), (1, 4)],
    6: [(4, 0), (2, 4)],
    7: [(4, 0), (2, 4), (1, 6)],
    8: [(8, 0)],
}


@st.composite
def layouts(draw) -> LayerLayout:
    heads, groups = draw(st.integers(1, 3)), draw(st.integers(1, 5))
    widths = st.tuples(*[st.tuples(*[st.integers(0, 8)] * groups)] * heads)
    return LayerLayout(draw(widths), draw(widths))


def golden_codes(width: int) -> list[int]:
    return [latent % (1 << width) for latent in GOLDEN_LATENTS]


@pytest.mark.parametrize("width", PLANES)
def test_planes_are_the_binary_digits_of_the_width_low_bits_in_the_largest(width):
    assert planes(width) == PLANES[width]


@pytest.mark.parametrize("width", GOLDEN)
def test_a_group_of_each_width_has_the_hand_worked_bytes(width):
    codec = make_identity_codec([width], [0])
    packed = codec.pack(torch.tensor([golden_codes(width) + [0] * GROUP]))
    assert bytes(packed[0].tolist()) == bytes.fromhex(GOLDEN[width]).ljust(16, b"\0")


def test_a_token_of_mixed_widths_has_the_hand_worked_bytes_keys_first_head_by_head():
    layout = LayerLayout(key=((1, 0), (2, 3)), value=((0, 4), (8, 5)))
    codes = [code for width in (1, 0, 2, 3, 0, 4, 8, 5) for code in golden_codes(width)]
    by_hand = bytes.fromhex("4B  E7 30  E7 30 66  DB 36 48 0F  1B 2D C6 93 58 E4 7F A0  DB 36 48 0F 59") + bytes(9)
    codec = replace(make_codec(2, 16), layout=layout)
    assert bytes(codec.pack(torch.tensor([codes]))[0].tolist()) == by_hand
    assert packed_by_hand(layout, codes) == by_hand
    assert (layout.code_bytes, layout.token_bytes) == (23, 32)


@pytest.mark.parametrize(("code_bytes", "token_bytes"), [(0, 16), (1, 16), (15, 16), (16, 16), (17, 32), (144, 144)])
def test_a_token_takes_the_smallest_positive_multiple_of_16_bytes(code_bytes, token_bytes):
    assert aligned(code_bytes) == token_bytes
    wide, narrow = divmod(code_bytes, 8)
    assert LayerLayout(((8,) * wide + (narrow,),), ((0,) * (wide + 1),)).token_bytes == token_bytes


def test_the_documented_example_takes_144_bytes():
    plan = ((3,) * 8,) * 3
    assert LayerLayout(plan, plan).token_bytes == 144


@settings(deadline=None)
@given(layouts())
def test_codes_never_straddle_a_byte_nor_share_a_bit_and_leave_no_hole(layout):
    fields = layout.bit_map()
    bits = torch.zeros(layout.token_bytes, 8, dtype=torch.int64)
    for byte, shift, mask in zip(fields.byte.flatten(), fields.shift.flatten(), fields.mask.flatten(), strict=True):
        width = int(mask).bit_length()
        assert int(mask) == (1 << width) - 1
        assert shift + width <= 8
        bits[byte, shift : shift + width] += 1
    assert (bits[: layout.code_bytes] == 1).all()
    assert (bits[layout.code_bytes :] == 0).all()


@settings(deadline=None)
@given(layouts())
def test_every_bit_of_a_code_is_stored_exactly_once(layout):
    fields = layout.bit_map()
    widths = [w for kind in (layout.key, layout.value) for head in kind for w in head for _ in range(GROUP)]
    assert (fields.mask << fields.low).sum(0).tolist() == [(1 << width) - 1 for width in widths]


@pytest.mark.parametrize("width", [-1, 9, 16])
@pytest.mark.parametrize("kind", [0, 1])
def test_widths_outside_0_to_8_are_refused_by_name(width, kind):
    plan = [((3, 4),), ((5, 6),)]
    plan[kind] = ((3, width),)
    with pytest.raises(ValueError, match=f"width {width} is not between 0 and 8"):
        LayerLayout(*plan)


@pytest.mark.parametrize("token_bytes", [16, 40])
def test_a_token_size_that_is_too_small_or_unaligned_is_refused(token_bytes):
    with pytest.raises(AssertionError):
        LayerLayout(((8, 8, 8),), ((0, 0, 0),), token_bytes)


def test_a_shard_keeps_its_heads_widths_and_is_padded_to_the_given_size():
    layout = LayerLayout(key=((1, 2), (3, 4), (5, 6)), value=((6, 5), (4, 3), (2, 1)))
    shard = layout.shard([2, 0], 48)
    assert shard == LayerLayout(((5, 6), (1, 2)), ((2, 1), (6, 5)), 48)
    assert (shard.code_bytes, shard.token_bytes) == (28, 48)
