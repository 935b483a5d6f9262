"""Between codes and bytes, for both directions. A *field* is one plane of one latent, in one word of `Tables.fields`."""

import torch
import triton
import triton.language as tl
from triton import knobs

# Whether byte permutations must be spelled out: the interpreter has no assembly, other GPUs than NVIDIA's another one.
SPELLED_OUT = tl.constexpr(knobs.runtime.interpret or torch.version.hip is not None)


@triton.jit
def parts(field):
    """Byte within the token, rotation and mask: code bits are ``rotate right(byte, rotation) & mask``."""
    return field >> 13, (field >> 8) & 31, field & 255


@triton.jit
def rotate_right(word, distance):
    """Of uint32 words by less than 32; one instruction."""
    if SPELLED_OUT:
        return (word >> distance) | (word << ((32 - distance) & 31))
    return tl.inline_asm_elementwise(
        "shf.r.wrap.b32 $0, $1, $1, $2;", "=r,r,r", [word, distance], dtype=tl.uint32, is_pure=True, pack=1
    )


@triton.jit
def shift_left(word, distance):
    """Of uint32 words by less than 32. Shifts have few units and products others, so some are done there."""
    if SPELLED_OUT:
        return word << distance
    return tl.inline_asm_elementwise(
        "mul.lo.u32 $0, $1, $2;", "=r,r,r", [word, tl.full(distance.shape, 1, tl.uint32) << distance], dtype=tl.uint32,
        is_pure=True, pack=1,
    )  # fmt: skip


@triton.jit
def unpack(page, fields, row_words: tl.constexpr, latents, WORDS: tl.constexpr, PLANES: tl.constexpr):
    """Codes of four tokens a word, uint32 [D, WORDS], of the tokens from `page` on.

    Args:
        page: pointer to the uint32 that holds byte 0 of the first four tokens.
        fields: pointers [D] to the latents' first planes; the next plane lies `latents` words further.
        row_words: words between two bytes of a token.

    """
    word = tl.arange(0, WORDS)
    code = tl.zeros((fields.shape[0], WORDS), tl.uint32)
    for plane in tl.static_range(PLANES):
        byte, rotation, mask = parts(tl.load(fields + plane * latents))
        packed = tl.load(page + (byte * row_words)[:, None] + word[None, :], (mask > 0)[:, None], 0).to(tl.uint32)
        # Bits that a rotation brings in from a neighbouring byte are never under the mask.
        code |= rotate_right(packed, rotation.to(tl.uint32)[:, None]) & (mask * 0x01010101).to(tl.uint32)[:, None]
    return code


@triton.jit
def look_up(levels, begin, code):
    """Levels, float16 [D, 4 * WORDS], of codes uint32 [D, WORDS]; each latent's levels begin at `begin` [D], uint32."""
    level_0 = tl.load(levels + (code & 255 | begin[:, None]))
    level_1 = tl.load(levels + (code >> 8 & 255 | begin[:, None]))
    level_2 = tl.load(levels + (code >> 16 & 255 | begin[:, None]))
    level_3 = tl.load(levels + (code >> 24 | begin[:, None]))
    four = tl.join(tl.join(level_0, level_2), tl.join(level_1, level_3))
    return tl.reshape(four, (code.shape[0], 4 * code.shape[1]))


@triton.jit
def pack(code, fields, columns, latents, PLANES: tl.constexpr):
    """Bytes number `columns` [C] of tokens, int32 [T, C], from codes int32 [T, D]; `fields` as in `unpack`.

    Each plane of a latent is a summand of one byte: a product with zeros and ones adds them up, exactly.
    """
    packed = tl.zeros((code.shape[0], columns.shape[0]), tl.float32)
    for plane in tl.static_range(PLANES):
        byte, rotation, mask = parts(tl.load(fields + plane * latents))
        bits = (code & mask[None, :]).to(tl.uint32)
        summand = rotate_right(bits, (32 - rotation).to(tl.uint32)[None, :] & 31)
        packed = tl.dot(summand.to(tl.float16), (byte[:, None] == columns[None, :]).to(tl.float16), packed)
    return packed.to(tl.int32)


@triton.jit
def permute(low, high, selector: tl.constexpr):
    """Four of the eight bytes of two uint32 words: nibble i of `selector` says which becomes byte i."""
    if SPELLED_OUT:
        word = low & 0
        for i in tl.static_range(4):
            word |= ((high if selector >> 4 * i & 4 else low) >> (selector >> 4 * i & 3) * 8 & 255) << 8 * i
        return word
    places = tl.full(low.shape, selector, tl.uint32)
    return tl.inline_asm_elementwise(
        "prmt.b32 $0, $1, $2, $3;", "=r,r,r,r", [low, high, places], dtype=tl.uint32, is_pure=True, pack=1
    )


@triton.jit
def as_bytes(word):
    """int8 [N, 4 * W], the bytes of uint32 words [N, W] in their order."""
    four = tl.join(tl.join(word, word >> 16), tl.join(word >> 8, word >> 24))
    return tl.reshape(four, (word.shape[0], 4 * word.shape[1])).to(tl.int8)


@triton.jit
def transposed(first, second, third, fourth):
    """uint32 [4 * W, N], a token's four bytes in a word, from [N, W] words that hold one byte of four tokens each.

    Tokens come in the order of `shuffled`.
    """
    low_0, low_1 = permute(first, second, 0x5140), permute(first, second, 0x7362)
    high_0, high_1 = permute(third, fourth, 0x5140), permute(third, fourth, 0x7362)
    even = tl.join(permute(low_0, high_0, 0x5410), permute(low_1, high_1, 0x5410))
    odd = tl.join(permute(low_0, high_0, 0x7632), permute(low_1, high_1, 0x7632))
    tokens = tl.reshape(tl.join(even, odd), (first.shape[0], first.shape[1] // 4, 4, 2, 2))
    return tl.reshape(tl.permute(tokens, (2, 4, 1, 3, 0)), (4 * first.shape[1], first.shape[0]))


@triton.jit
def shuffled(place, TILE: tl.constexpr):
    """The token of a tile that stands at `place`.

    Words that are stored together go to different banks of memory, and the two rows of a product that a thread holds, eight
    apart, are neighbours, whose bytes are stored together.
    """
    chunks: tl.constexpr = TILE // 16
    return place // 2 % chunks * 16 + place // (4 * chunks) * 4 + place % 2 * 2 + place // (2 * chunks) % 2


@triton.jit
def dealt(x):
    """[TILE, N] from the order of `shuffled`: words of four tokens are dealt out to as many hands as a hand has words."""
    parts = tl.reshape(x, (4, 2, x.shape[0] // 16, 2, x.shape[1]))
    return tl.reshape(tl.permute(parts, (0, 2, 3, 1, 4)), (x.shape[0], x.shape[1]))
