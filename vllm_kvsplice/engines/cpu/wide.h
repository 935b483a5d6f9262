// Instruction sets without 8-bit dot products: codes become 16-bit numbers, multiplied in pairs into 32-bit sums.
// Compiled twice, for AVX2 and for any processor at all; the integers are the same as those of AVX-512.
#pragma once

#ifdef __AVX2__
#include <immintrin.h>
#endif

#include "attend.h"
#include "write.h"

namespace kvsplice {
namespace {

typedef int16_t Shorts __attribute__((vector_size(32)));
typedef int32_t Sums __attribute__((vector_size(32)));
typedef int8_t Bytes __attribute__((vector_size(32)));

// a[0] b[0] + a[1] b[1], ...: eight sums of two products.
KV_INLINE Sums pair_products(Shorts a, Shorts b) {
#ifdef __AVX2__
    return (Sums)_mm256_madd_epi16((__m256i)a, (__m256i)b);
#else
    Sums sums;
    for (int i = 0; i < 8; ++i) sums[i] = a[2 * i] * b[2 * i] + a[2 * i + 1] * b[2 * i + 1];
    return sums;
#endif
}

// Eight latents of 32 tokens: W bits of each code from bit `low` on.
template <int W>
KV_INLINE void add_codes(const uint8_t* data, int64_t stride, int low, Bytes* codes) {
    typedef uint16_t Unsigned __attribute__((vector_size(32)));
    constexpr int bits = W >= 8 ? 8 : W >= 4 ? 4 : W >= 2 ? 2 : 1, per_byte = 8 / bits;
    // Shifting pairs of bytes is shifting bytes once what a neighbour lent is masked off.
    const Unsigned mask = Unsigned{} + static_cast<uint16_t>(((1 << bits) - 1) * 0x0101);
    each<8>([&](auto i) KV_LAMBDA {
        const Unsigned plane = load<Unsigned>(data + i / per_byte * stride);
        codes[i] |= (Bytes)((plane >> i % per_byte * bits & mask) << low);
    });
    if constexpr (W > bits) add_codes<W - bits>(data + bits * stride, stride, low + bits, codes);
}

KV_INLINE Bytes looked_up(const Group& group, Bytes codes) {
    if (group.width == 8) return codes ^ static_cast<int8_t>(-128);
    Bytes found{};
#ifdef __AVX2__
    const Bytes high = codes >> 4 & 7;
    for (int part = 0; part < (group.width > 4 ? 1 << (group.width - 4) : 1); ++part) {
        const __m256i table =
            _mm256_broadcastsi128_si256(_mm_loadu_si128(reinterpret_cast<const __m128i*>(group.levels + 16 * part)));
        const Bytes level = (Bytes)_mm256_shuffle_epi8(table, (__m256i)(codes & 15));
        found |= level & (high == static_cast<int8_t>(part));
    }
#else
    for (int i = 0; i < 32; ++i) found[i] = group.levels[codes[i]];
#endif
    return found;
}

struct Wide {
    static constexpr int kRows = 32, kFewRows = kRows;
    using Prompt = Nobody;
    static constexpr bool kQuads = false;
    static constexpr int kKeyOffset = 0;

    // Nothing to hold; the destructor tells the compiler that a session is more than an unused variable.
    struct Session {
        ~Session() {}
    };

    static int64_t key_places(int latents) { return kTile * latents; }
    static int64_t value_places(int) { return kSplit * 8; }

    static void pack_query(const int16_t* numbers, int count, int64_t, int16_t* out) {
        std::memcpy(out, numbers, count * sizeof(int16_t));
    }

    static KV_INLINE void pack_probability(const Wholes* rounded, int16_t* out, int tile) {
        out += tile * kTile;
        each<kTile / 16>([&](auto i) KV_LAMBDA {
#ifdef __AVX2__
            // Packing keeps to 128-bit lanes.
            const __m256i both = _mm256_packs_epi32((__m256i)rounded[2 * i], (__m256i)rounded[2 * i + 1]);
            store(out + 16 * i, _mm256_permute4x64_epi64(both, 0xD8));
#else
            for (int j = 0; j < 16; ++j)
                out[16 * i + j] = static_cast<int16_t>(rounded[(16 * i + j) / kRegister][j % kRegister]);
#endif
        });
    }

    static void score_latents(const Half& half, const Tiles& tiles, const Queries& queries, int16_t* keys,
                              float* scores) {
        for (int tile = 0; tile < tiles.count; ++tile, scores += kTile) {
            for (int g = 0; g < half.group_count; ++g) unpack_keys(half, g, tiles, tile, keys + g * 8 * kTile);
            for (int row = 0; row < queries.rows; ++row)
                dot_keys(keys, half.latents, queries.numbers + row * queries.stride, queries.unit[row],
                         scores + row * kSplit);
        }
    }

    // [4 pairs of latents][64 tokens][2]
    static void unpack_keys(const Half& half, int g, const Tiles& tiles, int tile, int16_t* out) {
        unpack(half, g, tiles, tile, [&](int t, const Bytes* latent) KV_LAMBDA {
            for (int i = 0; i < 8; i += 2) store_pairs(latent[i], latent[i + 1], out + (i / 2 * kTile + t) * 2);
        });
    }

    // Calls `take` with levels of 32 tokens from token t on, twice.
    template <class Take>
    static KV_INLINE void unpack(const Half& half, int g, const Tiles& tiles, int tile, Take take) {
        const Group& group = half.groups[g];
        const int64_t plane = group.plane - half.groups[0].plane;
        tiles.ask(tile, plane, group.width);
        for (int t = 0; t < kTile; t += 32) {
            Bytes latent[8] = {};
            with_constant<8>(group.width, [&](auto width) KV_LAMBDA {
                add_codes<width>(tiles.data[tile] + plane * tiles.stride + t, tiles.stride, 0, latent);
            });
            for (Bytes& codes : latent) codes = looked_up(group, codes);
            take(t, latent);
        }
    }

    // Numbers of `a` and `b` in turn, as 16 bits each.
    static KV_INLINE void store_pairs(Bytes a, Bytes b, int16_t* out) {
#ifdef __AVX2__
        const __m256i low = _mm256_unpacklo_epi8((__m256i)a, (__m256i)b),
                      high = _mm256_unpackhi_epi8((__m256i)a, (__m256i)b);
        store(out, _mm256_cvtepi8_epi16(_mm256_castsi256_si128(low)));
        store(out + 16, _mm256_cvtepi8_epi16(_mm256_castsi256_si128(high)));
        store(out + 32, _mm256_cvtepi8_epi16(_mm256_extracti128_si256(low, 1)));
        store(out + 48, _mm256_cvtepi8_epi16(_mm256_extracti128_si256(high, 1)));
#else
        for (int j = 0; j < 32; ++j) {
            out[2 * j] = a[j];
            out[2 * j + 1] = b[j];
        }
#endif
    }

    static void dot_keys(const int16_t* keys, int latents, const int16_t* query, float unit, float* scores) {
        Sums sums[8] = {};
        for (int r = 0; r < latents; r += 2) {
            const int32_t pair = static_cast<uint16_t>(query[r]) | static_cast<int32_t>(query[r + 1]) << 16;
            const Shorts both = (Shorts)(Sums{} + pair);
            for (int i = 0; i < 8; ++i) sums[i] += pair_products(load<Shorts>(keys + r * kTile + 16 * i), both);
        }
        for (int i = 0; i < 8; ++i)
            store(scores + 8 * i,
                  load<HalfFloats>(scores + 8 * i) + unit * __builtin_convertvector(sums[i], HalfFloats));
    }

    static void sum_values(const Half& half, const Tiles& tiles, int16_t* probability, int rows, int16_t* values,
                           int32_t* sums, int64_t stride) {
        for (int g = 0; g < half.group_count; ++g, sums += 8) {
            for (int tile = 0; tile < tiles.count; ++tile) unpack_values(half, g, tiles, tile, values + tile * kTile);
            for (int row = 0; row < rows; ++row)
                dot_values(values, probability + row * kSplit, tiles.count, sums + row * stride);
        }
    }

    static void unpack_values(const Half& half, int g, const Tiles& tiles, int tile, int16_t* out) {
        unpack(half, g, tiles, tile, [&](int t, const Bytes* latent) KV_LAMBDA {
            for (int i = 0; i < 8; ++i) store_numbers(latent[i], out + i * kSplit + t);
        });
    }

    static KV_INLINE void store_numbers(Bytes x, int16_t* out) {
#ifdef __AVX2__
        store(out, _mm256_cvtepi8_epi16(_mm256_castsi256_si128((__m256i)x)));
        store(out + 16, _mm256_cvtepi8_epi16(_mm256_extracti128_si256((__m256i)x, 1)));
#else
        for (int j = 0; j < 32; ++j) out[j] = x[j];
#endif
    }

    static void dot_values(const int16_t* values, const int16_t* probability, int tiles, int32_t* sums) {
        Sums total[8] = {};
        for (int t = 0; t < tiles * kTile; t += 16) {
            const Shorts p = load<Shorts>(probability + t);
            for (int i = 0; i < 8; ++i) total[i] += pair_products(p, load<Shorts>(values + i * kSplit + t));
        }
        for (int i = 0; i < 8; ++i) {
            int32_t lanes[8], sum = 0;
            store(lanes, total[i]);
            for (int32_t x : lanes) sum += x;
            sums[i] = sum;
        }
    }
};

}  // namespace
}  // namespace kvsplice
