// What AMX is given: its products take tiles of 16 rows by 64 bytes from memory.
#pragma once

#include "avx512.h"

namespace kvsplice {
namespace {

// Query rows of a block, and of a register.
constexpr int kManyRows = 1024, kLanes = 16;
constexpr int kTileBytes = 16 * 64;
// bfloat16 numbers of a tile's row, and of a tile.
constexpr int kDepth = 32, kTileNumbers = 16 * kDepth;
// Rows of a product of bfloat16 numbers: four tiles, whose sums do not wait for each other.
constexpr int kProductRows = 64;

// Sums stand in tile registers 0 to 3, and then side by side in memory.
KV_INLINE void zero_sums() {
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
}
KV_INLINE void keep_sums(void* sums) {
    char* at = static_cast<char*>(sums);
    _tile_stored(0, at, 64);
    _tile_stored(1, at + kTileBytes, 64);
    _tile_stored(2, at + 2 * kTileBytes, 64);
    _tile_stored(3, at + 3 * kTileBytes, 64);
}

// What they hold, of whole numbers or of floats.
struct Products {
    alignas(64) int32_t sums[4 * 16][kLanes];
};

// 16 x 16 numbers of 32 bits, rows `stride` bytes apart; column c goes to `to(c)`.
template <class To>
KV_INLINE void turn(const void* from, int64_t stride, To to) {
    __m512i x[4][4];
    each<4>([&](auto n) KV_LAMBDA {
        __m512i a[4], b[4];
        each<4>([&](auto i) KV_LAMBDA { a[i] = load_bytes(static_cast<const char*>(from) + (4 * n + i) * stride); });
        b[0] = _mm512_unpacklo_epi32(a[0], a[1]);
        b[1] = _mm512_unpackhi_epi32(a[0], a[1]);
        b[2] = _mm512_unpacklo_epi32(a[2], a[3]);
        b[3] = _mm512_unpackhi_epi32(a[2], a[3]);
        x[n][0] = _mm512_unpacklo_epi64(b[0], b[2]);
        x[n][1] = _mm512_unpackhi_epi64(b[0], b[2]);
        x[n][2] = _mm512_unpacklo_epi64(b[1], b[3]);
        x[n][3] = _mm512_unpackhi_epi64(b[1], b[3]);
    });
    // x[n][i]: quarter l holds rows 4 n.. of column 4 l + i.
    each<4>([&](auto i) KV_LAMBDA {
        constexpr int kEven = 0x88, kOdd = 0xDD;
        const __m512i even_low = _mm512_shuffle_i32x4(x[0][i], x[1][i], kEven),
                      odd_low = _mm512_shuffle_i32x4(x[0][i], x[1][i], kOdd),
                      even_high = _mm512_shuffle_i32x4(x[2][i], x[3][i], kEven),
                      odd_high = _mm512_shuffle_i32x4(x[2][i], x[3][i], kOdd);
        _mm512_storeu_si512(to(i), _mm512_shuffle_i32x4(even_low, even_high, kEven));
        _mm512_storeu_si512(to(4 + i), _mm512_shuffle_i32x4(odd_low, odd_high, kEven));
        _mm512_storeu_si512(to(8 + i), _mm512_shuffle_i32x4(even_low, even_high, kOdd));
        _mm512_storeu_si512(to(12 + i), _mm512_shuffle_i32x4(odd_low, odd_high, kOdd));
    });
}

// A tile's keys token by token, from quads of latents, for which `quads` is memory: 64 latents from 64 `part` on go to
// to(part, token).
template <class To>
KV_INLINE void unpack_tokens(const Half& half, const Tiles& tiles, int tile, int8_t* quads, To to) {
    Avx512::unpack_keys<false>(half, tiles, tile, quads);
    for (int part = 0; part < ceil_div(half.latents, 64); ++part)
        for (int j = 0; j < 4; ++j)
            turn(quads + part * 64 * kTile + 64 * j, 256,
                 [&](int c) KV_LAMBDA { return to(part, c / 4 * 16 + 4 * j + c % 4); });
}

// Four numbers of 16 bits a lane as four high and four low bytes, all signed.
KV_INLINE void split_bytes(const Ints* x, void* high, void* low) {
    constexpr __mmask32 kOdd = 0xAAAAAAAA;
    const __m512i bytes = _mm512_set1_epi16(255), half = _mm512_set1_epi16(128);
    const __m512i even = _mm512_mask_mov_epi16((__m512i)x[0], kOdd, _mm512_slli_epi32((__m512i)x[2], 16));
    const __m512i odd = _mm512_mask_mov_epi16((__m512i)x[1], kOdd, _mm512_slli_epi32((__m512i)x[3], 16));
    // `odd` where `bytes` has zeros.
    _mm512_store_si512(high, _mm512_ternarylogic_epi64(bytes, _mm512_srli_epi16(_mm512_add_epi16(even, half), 8),
                                                       _mm512_add_epi16(odd, half), 0xCA));
    _mm512_store_si512(low, _mm512_ternarylogic_epi64(bytes, even, _mm512_slli_epi16(odd, 8), 0xCA));
}

// Floats of eight bits more than a bfloat16 has: a high part, cut off, and what is left, each as pairs [16 rows, 2].
KV_INLINE void split_parts(Floats even, Floats odd, void* high, void* low) {
    const Ints cut = Ints{} + static_cast<int32_t>(0xFFFF0000);
    const auto pair = [&](Ints x, Ints y) KV_LAMBDA { return (Ints)_mm512_srli_epi32((__m512i)x, 16) | (y & cut); };
    const Ints e = (Ints)even & cut, o = (Ints)odd & cut;
    store(high, pair(e, o));
    store(low, pair((Ints)(even - (Floats)e) + 0x8000, (Ints)(odd - (Floats)o) + 0x8000));
}

KV_INLINE Floats even_of(Ints pairs) { return (Floats)(pairs << 16); }
KV_INLINE Floats odd_of(Ints pairs) { return (Floats)(pairs & static_cast<int32_t>(0xFFFF0000)); }

// `count` numbers as bfloat16 ones, and where those are not all of them, what is left.
inline void load_parts(const void* data, Dtype dtype, int64_t offset, int count, uint16_t* high, uint16_t* low) {
    if (dtype == Dtype::kBfloat16) {
        std::memcpy(high, static_cast<const uint16_t*>(data) + offset, count * sizeof(uint16_t));
        return;
    }
    float row[kMaxDim];
    load_row(data, dtype, offset, count, row);
    for (int i = 0; i < count; ++i) {
        high[i] = to_bfloat16(row[i]);
        low[i] = to_bfloat16(row[i] - from_bfloat16(high[i]));
    }
}
constexpr int parts_of(Dtype dtype) { return dtype == Dtype::kBfloat16 ? 1 : 2; }

// Sums of one or two bfloat16 matrices, `part` numbers apart: rows of `stride` numbers, or tiles [16 pairs][16 rows][2].
struct Rows {
    const uint16_t* numbers;
    int64_t stride, part;
    int parts;
};
struct Columns {
    const uint16_t* tiles;
    int64_t part;
    int parts;
};

// A codec's synthesis from a row on.
inline Rows synthesis_from(const Half& half, int row) {
    return {half.parts + row * half.depth, half.depth, half.part, 2};
}

// out [64, 16] += a [64, 32 depth] x b [32 depth, 16], but for the product of what both leave.
KV_INLINE void multiply(const Rows& a, const Columns& b, int depth, float* out, int64_t out_stride = kLanes) {
    const auto at = [&](int tile, int k, int part)
                        KV_LAMBDA { return a.numbers + part * a.part + tile * 16 * a.stride + k * kDepth; };
    const int64_t stride = a.stride * sizeof(uint16_t), out_bytes = out_stride * sizeof(float);
    _tile_loadd(0, out, out_bytes);
    _tile_loadd(1, out + 16 * out_stride, out_bytes);
    _tile_loadd(2, out + 32 * out_stride, out_bytes);
    _tile_loadd(3, out + 48 * out_stride, out_bytes);
    for (int k = 0; k < depth; ++k) {
        _tile_loadd(4, b.tiles + k * kTileNumbers, 64);
        _tile_loadd(6, at(0, k, 0), stride);
        _tile_dpbf16ps(0, 6, 4);
        _tile_loadd(7, at(1, k, 0), stride);
        _tile_dpbf16ps(1, 7, 4);
        if (b.parts == 2) {
            _tile_loadd(5, b.tiles + b.part + k * kTileNumbers, 64);
            _tile_dpbf16ps(0, 6, 5);
            _tile_dpbf16ps(1, 7, 5);
        }
        _tile_loadd(6, at(2, k, 0), stride);
        _tile_dpbf16ps(2, 6, 4);
        _tile_loadd(7, at(3, k, 0), stride);
        _tile_dpbf16ps(3, 7, 4);
        if (b.parts == 2) {
            _tile_dpbf16ps(2, 6, 5);
            _tile_dpbf16ps(3, 7, 5);
        }
        if (a.parts == 1) continue;
        _tile_loadd(6, at(0, k, 1), stride);
        _tile_dpbf16ps(0, 6, 4);
        _tile_loadd(7, at(1, k, 1), stride);
        _tile_dpbf16ps(1, 7, 4);
        _tile_loadd(6, at(2, k, 1), stride);
        _tile_dpbf16ps(2, 6, 4);
        _tile_loadd(7, at(3, k, 1), stride);
        _tile_dpbf16ps(3, 7, 4);
    }
    _tile_stored(0, out, out_bytes);
    _tile_stored(1, out + 16 * out_stride, out_bytes);
    _tile_stored(2, out + 32 * out_stride, out_bytes);
    _tile_stored(3, out + 48 * out_stride, out_bytes);
}

}  // namespace
}  // namespace kvsplice
