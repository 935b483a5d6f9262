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

// Eight latents of 32 tokens as codes.
KV_INLINE void codes_of(int width, const uint8_t* data, int64_t stride, Bytes* out) {
    for (int i = 0; i < 8; ++i) out[i] = Bytes{};
    int low = 0;
    for (int bits = 8; bits; bits /= 2) {
        if (width - low < bits) continue;
        const int per_byte = 8 / bits;
        for (int i = 0; i < 8; ++i) {
            const Shorts plane = load<Shorts>(data + (low + i / per_byte) * stride);
            // Shifting pairs of bytes is shifting bytes once what a neighbour lent is masked off.
            const Shorts mask = Shorts{} + static_cast<int16_t>(((1 << bits) - 1) * 0x0101);
            typedef uint16_t Unsigned __attribute__((vector_size(32)));
            const Shorts field = (Shorts)((Unsigned)plane >> i % per_byte * bits) & mask;
            out[i] |= (Bytes)((Unsigned)field << low);
        }
        low += bits;
    }
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
    static constexpr bool kQuads = false;
    static constexpr int kKeyBytes = 2, kKeyOffset = 0;

    static void pack_query(const int16_t* numbers, int count, int64_t, int16_t* out) {
        std::memcpy(out, numbers, count * sizeof(int16_t));
    }

    static KV_INLINE void pack_probability(const Ints* rounded, int16_t* out, int tile) {
        for (int i = 0; i < kTile; ++i) out[tile * kTile + i] = static_cast<int16_t>(rounded[i / 16][i % 16]);
    }

    // [4 pairs of latents][64 tokens][2]
    static void unpack_keys(const Group& group, const uint8_t* data, int64_t stride, int16_t* out) {
        for (int t = 0; t < kTile; t += 32) {
            Bytes latent[8];
            codes_of(group.width, data + t, stride, latent);
            for (Bytes& codes : latent) codes = looked_up(group, codes);
            for (int i = 0; i < 8; i += 2)
                for (int j = 0; j < 32; ++j) {
                    int16_t* pair = out + (i / 2 * kTile + t + j) * 2;
                    pair[0] = latent[i][j];
                    pair[1] = latent[i + 1][j];
                }
        }
    }

    static void unpack_values(const Group& group, const uint8_t* data, int64_t stride, int16_t* out, int tile) {
        for (int t = 0; t < kTile; t += 32) {
            Bytes latent[8];
            codes_of(group.width, data + t, stride, latent);
            for (int i = 0; i < 8; ++i) {
                const Bytes level = looked_up(group, latent[i]);
                for (int j = 0; j < 32; ++j) out[i * kSplit + tile * kTile + t + j] = level[j];
            }
        }
    }

    static void dot_keys(const int16_t* keys, int latents, const int16_t* query, int64_t query_stride,
                         const float* unit, const int32_t*, int rows, float* scores, Ahead& ahead) {
        for (int row = 0; row < rows; ++row, query += query_stride, scores += kSplit) {
            Sums sums[8] = {};
            for (int r = 0; r < latents; r += 2) {
                ahead.ask();
                const int32_t pair = static_cast<uint16_t>(query[r]) | static_cast<int32_t>(query[r + 1]) << 16;
                const Shorts both = (Shorts)(Sums{} + pair);
                for (int i = 0; i < 8; ++i) sums[i] += pair_products(load<Shorts>(keys + r * kTile + 16 * i), both);
            }
            for (int i = 0; i < 8; ++i)
                store(scores + 8 * i,
                      load<HalfFloats>(scores + 8 * i) + unit[row] * __builtin_convertvector(sums[i], HalfFloats));
        }
    }

    static void dot_values(const int16_t* values, const int16_t* probability, int tiles, int rows, int32_t* sums,
                           Ahead* ahead) {
        for (int row = 0; row < rows; ++row, probability += kSplit) {
            Sums total[8] = {};
            for (int t = 0; t < tiles * kTile; t += 16) {
                if (t % kTile == 0) ahead[t / kTile].ask();
                const Shorts p = load<Shorts>(probability + t);
                for (int i = 0; i < 8; ++i) total[i] += pair_products(p, load<Shorts>(values + i * kSplit + t));
            }
            for (int i = 0; i < 8; ++i) {
                int32_t lanes[8], sum = 0;
                store(lanes, total[i]);
                for (int32_t x : lanes) sum += x;
                sums[row * 8 + i] = sum;
            }
        }
    }
};

}  // namespace
}  // namespace kvsplice
