"""Between codes and bytes, for both directions. A *field* is one plane of one latent, in one word of `Tables.fields`."""

import triton
import triton.language as tl


@triton.jit
def parts(field):
    """Byte within the token, rotation and mask: code bits are ``rotate right(byte, rotation) & mask``."""
    return field >> 13, (field >> 8) & 31, field & 255


@triton.jit
def rotate_right(word, distance):
    """Of uint32 words; one instruction."""
    return (word >> distance) | (word << ((32 - distance) & 31))


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
