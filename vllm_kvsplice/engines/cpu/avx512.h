// AVX-512 with VBMI and VNNI: codebooks live in a register, and 64 products of 8 bits take one instruction.
//
// Keys: four latents of a token lie side by side in a 32-bit lane, as unsigned level + 128. A query row has 16 bits, two
// signed bytes, so a tile costs a row two instructions for each four latents and sixteen tokens.
// Values: a register holds 64 tokens of one latent, signed; a row's probabilities have 15 bits, two unsigned bytes.
#pragma once

#include <immintrin.h>

#include "attend.h"
#include "write.h"

namespace kvsplice {
namespace {

typedef uint16_t Words __attribute__((vector_size(64)));

KV_INLINE __m512i load_bytes(const void* from) { return _mm512_loadu_si512(from); }

// sum += unsigned bytes times signed bytes, four to a lane. As assembly because GCC 12 keeps a copy of every sum of the
// intrinsic on the stack, which takes twice as long.
KV_INLINE void dot(__m512i& sum, __m512i bytes, __m512i signed_bytes) {
    asm("vpdpbusd %2, %1, %0" : "+v"(sum) : "v"(bytes), "v"(signed_bytes));
}

// Shifts whole 16-bit words, so a neighbour's bits fill the side that is shifted in: lookups ignore them.
KV_INLINE __m512i shifted(__m512i x, int right) {
    return (__m512i)(right >= 0 ? (Words)x >> right : (Words)x << -right);
}

// `low` where `mask` has ones, `high` elsewhere.
KV_INLINE __m512i joined(int mask, __m512i low, __m512i high) {
    return _mm512_ternarylogic_epi64(_mm512_set1_epi8(static_cast<char>(mask)), low, high, 0xCA);
}

// Eight latents of 64 tokens as indices; only the lowest W bits of each byte mean anything.
template <int W>
KV_INLINE void indices(const uint8_t* data, int64_t stride, __m512i* out) {
    constexpr int first = W >= 8 ? 8 : W >= 4 ? 4 : W >= 2 ? 2 : 1;
    __m512i plane[8];
#pragma GCC unroll 8
    for (int c = 0; c < W; ++c) plane[c] = load_bytes(data + c * stride);
#pragma GCC unroll 8
    for (int i = 0; i < 8; ++i) {
        __m512i index = shifted(plane[i * first / 8], i * first % 8);
        if constexpr (W == 3) index = joined(0x03, index, shifted(plane[2], i - 2));
        if constexpr (W == 5) index = joined(0x0F, index, shifted(plane[4], i - 4));
        if constexpr (W >= 6 && W < 8) index = joined(0x0F, index, shifted(plane[4 + i / 4], i % 4 * 2 - 4));
        if constexpr (W == 7) index = joined(0x3F, index, shifted(plane[6], i - 6));
        out[i] = index;
    }
}

// A codebook of W bits in registers; `raised`: plus 128.
template <int W>
struct Levels {
    __m512i low, high;

    KV_INLINE Levels(const Group& group, bool raised) {
        const void* table = raised ? static_cast<const void*>(group.raised) : group.levels;
        low = W == 8 ? _mm512_set1_epi8(raised ? 0 : -128) : load_bytes(table);
        if constexpr (W == 7) high = load_bytes(static_cast<const char*>(table) + 64);
    }
    KV_INLINE __m512i of(__m512i index) const {
        if constexpr (W == 8) return _mm512_xor_si512(index, low);
        if constexpr (W == 7) return _mm512_permutex2var_epi8(low, index, high);
        return _mm512_permutexvar_epi8(index, low);
    }
};

// Some tiles of a group. `plane`: the group's first, counted from the head's.
struct Run {
    const Tiles& tiles;
    int64_t plane;
    int first, count;
};

template <int W, bool raised>
void unpack_keys_of(const Group& group, const Run& run, int8_t* out, int64_t tile_bytes) {
    const Levels<W> levels(group, raised);
    for (int t = run.first; t < run.first + run.count; ++t, out += tile_bytes) {
        run.tiles.ask(t, run.plane, W);
        __m512i x[8];
        indices<W>(run.tiles.data[t] + run.plane * run.tiles.stride, run.tiles.stride, x);
        each<2>([&](auto quad) KV_LAMBDA {
            const __m512i a = levels.of(x[4 * quad]), b = levels.of(x[4 * quad + 1]), c = levels.of(x[4 * quad + 2]),
                          d = levels.of(x[4 * quad + 3]);
            const __m512i ab_low = _mm512_unpacklo_epi8(a, b), ab_high = _mm512_unpackhi_epi8(a, b);
            const __m512i cd_low = _mm512_unpacklo_epi8(c, d), cd_high = _mm512_unpackhi_epi8(c, d);
            __m512i* to = reinterpret_cast<__m512i*>(out) + 4 * quad;
            _mm512_store_si512(to, _mm512_unpacklo_epi16(ab_low, cd_low));
            _mm512_store_si512(to + 1, _mm512_unpackhi_epi16(ab_low, cd_low));
            _mm512_store_si512(to + 2, _mm512_unpacklo_epi16(ab_high, cd_high));
            _mm512_store_si512(to + 3, _mm512_unpackhi_epi16(ab_high, cd_high));
        });
    }
}

// Rows of latents, `row_bytes` apart.
template <int W>
void unpack_values_of(const Group& group, const Run& run, int8_t* out, int64_t row_bytes) {
    const Levels<W> levels(group, false);
    for (int t = run.first; t < run.first + run.count; ++t, out += kTile) {
        run.tiles.ask(t, run.plane, W);
        __m512i x[8];
        indices<W>(run.tiles.data[t] + run.plane * run.tiles.stride, run.tiles.stride, x);
        each<8>([&](auto i) KV_LAMBDA { _mm512_store_si512(out + i * row_bytes, levels.of(x[i])); });
    }
}

// N query rows over a tile.
template <int N>
void dot_keys_of(const __m512i* keys, int latents, const int8_t* query, int64_t query_stride, const float* unit,
                 const int32_t* offset, float* scores) {
    __m512i high[N][4], low[N][4];
    each<N>([&](auto n)
                KV_LAMBDA { each<4>([&](auto i) KV_LAMBDA { high[n][i] = low[n][i] = _mm512_setzero_si512(); }); });
    for (int r = 0; r < latents; r += 4, keys += 4) {
        each<N>([&](auto n) KV_LAMBDA {
            int32_t h, l;
            std::memcpy(&h, query + n * query_stride + r, 4);
            std::memcpy(&l, query + n * query_stride + query_stride / 2 + r, 4);
            const __m512i query_high = _mm512_set1_epi32(h), query_low = _mm512_set1_epi32(l);
            each<4>([&](auto i) KV_LAMBDA {
                dot(high[n][i], keys[i], query_high);
                dot(low[n][i], keys[i], query_low);
            });
        });
    }
    each<N>([&](auto n) KV_LAMBDA {
        each<4>([&](auto i) KV_LAMBDA {
            __m512i sum = _mm512_add_epi32(_mm512_slli_epi32(high[n][i], 8), low[n][i]);
            sum = _mm512_sub_epi32(sum, _mm512_set1_epi32(offset[n]));
            float* at = scores + n * kSplit + 16 * i;
            store(at, load(at) + unit[n] * (Floats)_mm512_cvtepi32_ps(sum));
        });
    });
}

// Sums over all lanes of four registers.
KV_INLINE __m128i sums_of(__m512i a, __m512i b, __m512i c, __m512i d) {
    const __m512i ab = _mm512_add_epi32(_mm512_unpacklo_epi32(a, b), _mm512_unpackhi_epi32(a, b));
    const __m512i cd = _mm512_add_epi32(_mm512_unpacklo_epi32(c, d), _mm512_unpackhi_epi32(c, d));
    const __m512i all = _mm512_add_epi32(_mm512_unpacklo_epi64(ab, cd), _mm512_unpackhi_epi64(ab, cd));
    const __m256i half = _mm256_add_epi32(_mm512_castsi512_si256(all), _mm512_extracti64x4_epi64(all, 1));
    return _mm_add_epi32(_mm256_castsi256_si128(half), _mm256_extracti128_si256(half, 1));
}

// N rows by four latents over a split.
template <int N>
void dot_values_of(const int8_t* values, const uint8_t* probability, int tiles, int32_t* sums, int64_t stride) {
    __m512i high[N][4], low[N][4];
    each<N>([&](auto n)
                KV_LAMBDA { each<4>([&](auto i) KV_LAMBDA { high[n][i] = low[n][i] = _mm512_setzero_si512(); }); });
    for (int t = 0; t < tiles * kTile; t += kTile) {
        __m512i latent[4];
        each<4>([&](auto i) KV_LAMBDA { latent[i] = load_bytes(values + i * kSplit + t); });
        each<N>([&](auto n) KV_LAMBDA {
            const __m512i p_high = load_bytes(probability + n * 2 * kSplit + t);
            const __m512i p_low = load_bytes(probability + n * 2 * kSplit + kSplit + t);
            each<4>([&](auto i) KV_LAMBDA {
                dot(high[n][i], p_high, latent[i]);
                dot(low[n][i], p_low, latent[i]);
            });
        });
    }
    each<N>([&](auto n) KV_LAMBDA {
        each<4>([&](auto i) KV_LAMBDA { high[n][i] = _mm512_add_epi32(_mm512_slli_epi32(high[n][i], 8), low[n][i]); });
        _mm_storeu_si128(reinterpret_cast<__m128i*>(sums + stride * n),
                         sums_of(high[n][0], high[n][1], high[n][2], high[n][3]));
    });
}

struct Avx512 {
    static constexpr int kRows = 32, kFewRows = kRows;
    using Prompt = Nobody;
    static constexpr bool kQuads = true;
    static constexpr int kKeyOffset = 128;
    // Tiles whose keys are unpacked at once.
    static constexpr int kBatch = 4;

    // Nothing to hold; the destructor tells the compiler that a session is more than an unused variable.
    struct Session {
        ~Session() {}
    };

    static int64_t key_places(int latents) { return kBatch * kTile * latents / 2; }
    static int64_t value_places(int) { return kSplit * 8 / 2; }

    static void pack_query(const int16_t* numbers, int count, int64_t stride, int16_t* out) {
        int8_t *high = reinterpret_cast<int8_t*>(out), *low = high + stride;
        for (int r = 0; r < count; ++r) {
            low[r] = static_cast<int8_t>(numbers[r]);
            high[r] = static_cast<int8_t>((numbers[r] - low[r]) >> 8);
        }
    }

    // Packing keeps to 128-bit lanes, which undoes the order that the keys' unpacking left.
    static KV_INLINE void pack_probability(const Wholes* rounded, int16_t* out, int tile) {
        const __m512i first = _mm512_packus_epi32((__m512i)rounded[0], (__m512i)rounded[1]);
        const __m512i second = _mm512_packus_epi32((__m512i)rounded[2], (__m512i)rounded[3]);
        const __m512i byte = _mm512_set1_epi16(255);
        uint8_t* at = reinterpret_cast<uint8_t*>(out) + tile * kTile;
        const __m512i high = _mm512_packus_epi16(_mm512_srli_epi16(first, 8), _mm512_srli_epi16(second, 8));
        const __m512i low = _mm512_packus_epi16(_mm512_and_si512(first, byte), _mm512_and_si512(second, byte));
        _mm512_storeu_si512(at, high);
        _mm512_storeu_si512(at + kSplit, low);
    }

    // The keys of some tiles, [4 latents][64 tokens][4] a tile, tokens in quads (`kQuads`).
    template <bool raised = true>
    static void unpack_keys(const Half& half, const Tiles& tiles, int first, int count, int8_t* out,
                            int64_t tile_bytes) {
        static constexpr decltype(&unpack_keys_of<1, raised>) by_width[] = {
            unpack_keys_of<1, raised>, unpack_keys_of<2, raised>, unpack_keys_of<3, raised>, unpack_keys_of<4, raised>,
            unpack_keys_of<5, raised>, unpack_keys_of<6, raised>, unpack_keys_of<7, raised>, unpack_keys_of<8, raised>};
        for (int g = 0; g < half.group_count; ++g, out += 8 * kTile) {
            const Group& group = half.groups[g];
            by_width[group.width - 1](group, {tiles, group.plane - half.groups[0].plane, first, count}, out,
                                      tile_bytes);
        }
    }

    // The values of some groups and tiles, rows of `row_bytes`.
    static void unpack_values(const Half& half, int group, int groups, const Tiles& tiles, int first, int count,
                              int8_t* out, int64_t row_bytes) {
        static constexpr decltype(&unpack_values_of<1>) by_width[] = {
            unpack_values_of<1>, unpack_values_of<2>, unpack_values_of<3>, unpack_values_of<4>,
            unpack_values_of<5>, unpack_values_of<6>, unpack_values_of<7>, unpack_values_of<8>};
        for (int g = group; g < group + groups; ++g, out += 8 * row_bytes)
            by_width[half.groups[g].width - 1](
                half.groups[g], {tiles, half.groups[g].plane - half.groups[0].plane, first, count}, out, row_bytes);
    }

    static void score_latents(const Half& half, const Tiles& tiles, const Queries& queries, int16_t* keys,
                              float* scores) {
        const int64_t tile_bytes = kTile * half.latents;
        int8_t* unpacked = reinterpret_cast<int8_t*>(keys);
        for (int first = 0; first < tiles.count; first += kBatch) {
            const int count = least(kBatch, tiles.count - first);
            unpack_keys(half, tiles, first, count, unpacked, tile_bytes);
            for (int t = 0; t < count; ++t)
                dot_keys(reinterpret_cast<const __m512i*>(unpacked + t * tile_bytes), half.latents, queries,
                         scores + (first + t) * kTile);
        }
    }

    static void dot_keys(const __m512i* tile, int latents, const Queries& queries, float* scores) {
        for (int row = 0; row < queries.rows;) {
            const int8_t* q = reinterpret_cast<const int8_t*>(queries.numbers + row * queries.stride);
            const int left = queries.rows - row;
            const auto kernel = left == 3 || left > 4 ? dot_keys_of<3> : left >= 2 ? dot_keys_of<2> : dot_keys_of<1>;
            kernel(tile, latents, q, 2 * queries.stride, queries.unit + row, queries.offset + row,
                   scores + row * kSplit);
            row += left == 3 || left > 4 ? 3 : least(left, 2);
        }
    }

    static void sum_values(const Half& half, const Tiles& tiles, int16_t* probability, int rows, int16_t* values,
                           int32_t* sums, int64_t stride) {
        int8_t* unpacked = reinterpret_cast<int8_t*>(values);
        for (int g = 0; g < half.group_count; ++g, sums += 8) {
            unpack_values(half, g, 1, tiles, 0, tiles.count, unpacked, kSplit);
            for (int row = 0; row < rows;) {
                const uint8_t* p = reinterpret_cast<const uint8_t*>(probability + row * kSplit);
                const int left = rows - row;
                const auto kernel = left == 3 || left > 4 ? dot_values_of<3>
                                    : left >= 2           ? dot_values_of<2>
                                                          : dot_values_of<1>;
                for (int i = 0; i < 8; i += 4)
                    kernel(unpacked + i * kSplit, p, tiles.count, sums + row * stride + i, stride);
                row += left == 3 || left > 4 ? 3 : least(left, 2);
            }
        }
    }
};

}  // namespace
}  // namespace kvsplice
