// AVX-512 with VBMI and VNNI: codebooks live in a register, and 64 products of 8 bits take one instruction.
//
// Keys: four latents of a token lie side by side in a 32-bit lane, as unsigned level + 128. A query row has 16 bits, two
// signed bytes, so a tile costs a row two instructions for each four latents and sixteen tokens.
// Values: a register holds 64 tokens of one latent, signed; a row's probabilities have 15 bits, two unsigned bytes.
// Few rows multiply what is unpacked as it is unpacked: on Zen 4 a store takes two cycles, and one from the products.
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

// Latent I of a group of W bits, 64 tokens, as indices; only the lowest W bits of each byte mean anything.
template <int W, int I>
KV_INLINE __m512i index_of(const uint8_t* data, int64_t stride) {
    constexpr int first = W >= 8 ? 8 : W >= 4 ? 4 : W >= 2 ? 2 : 1;
    const auto plane = [&](int c) KV_LAMBDA { return load_bytes(data + c * stride); };
    __m512i index = shifted(plane(I * first / 8), I * first % 8);
    if constexpr (W == 3) index = joined(0x03, index, shifted(plane(2), I - 2));
    if constexpr (W == 5) index = joined(0x0F, index, shifted(plane(4), I - 4));
    if constexpr (W >= 6 && W < 8) index = joined(0x0F, index, shifted(plane(4 + I / 4), I % 4 * 2 - 4));
    if constexpr (W == 7) index = joined(0x3F, index, shifted(plane(6), I - 6));
    return index;
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

// A group's codes in tiles, unpacked as they are read; `raised`: levels plus 128.
template <int W, bool raised>
struct Coded {
    const Tiles& tiles;
    int64_t plane;
    Levels<W> levels;

    KV_INLINE Coded(const Half& half, int g, const Tiles& t)
        : tiles(t), plane(half.groups[g].plane - half.groups[0].plane), levels(half.groups[g], raised) {}
    KV_INLINE void ask(int tile) const { tiles.ask(tile, plane, W); }
    template <int I>
    KV_INLINE __m512i latent(int tile) const {
        return levels.of(index_of<W, I>(tiles.data[tile] + plane * tiles.stride, tiles.stride));
    }
    // Two quads of latents by four times sixteen tokens, four latents of a token side by side.
    KV_INLINE void quads(int tile, __m512i (&out)[8]) const {
        each<2>([&](auto quad) KV_LAMBDA {
            const __m512i a = latent<4 * quad>(tile), b = latent<4 * quad + 1>(tile), c = latent<4 * quad + 2>(tile),
                          d = latent<4 * quad + 3>(tile);
            const __m512i ab_low = _mm512_unpacklo_epi8(a, b), ab_high = _mm512_unpackhi_epi8(a, b);
            const __m512i cd_low = _mm512_unpacklo_epi8(c, d), cd_high = _mm512_unpackhi_epi8(c, d);
            out[4 * quad] = _mm512_unpacklo_epi16(ab_low, cd_low);
            out[4 * quad + 1] = _mm512_unpackhi_epi16(ab_low, cd_low);
            out[4 * quad + 2] = _mm512_unpacklo_epi16(ab_high, cd_high);
            out[4 * quad + 3] = _mm512_unpackhi_epi16(ab_high, cd_high);
        });
    }
};

// Values that were unpacked before, rows of kSplit.
struct Unpacked {
    const int8_t* values;

    KV_INLINE void ask(int) const {}
    template <int I>
    KV_INLINE __m512i latent(int tile) const {
        return load_bytes(values + I * kSplit + tile * kTile);
    }
};

// N query rows over a tile: sums of high and of low bytes.
template <int N>
struct Scores {
    __m512i high[N][4], low[N][4];

    KV_INLINE Scores() {
        each<4 * N>([&](auto i) KV_LAMBDA { high[i / 4][i % 4] = low[i / 4][i % 4] = _mm512_setzero_si512(); });
    }

    // Quads of a group, the first of whose latents `query` is at.
    KV_INLINE void add(const __m512i* quads, const int8_t* query, int64_t row_bytes) {
        each<2>([&](auto quad) KV_LAMBDA {
            each<N>([&](auto n) KV_LAMBDA {
                const int8_t* bytes = query + n * row_bytes + 4 * quad;
                const __m512i query_high = four(bytes), query_low = four(bytes + row_bytes / 2);
                each<4>([&](auto i) KV_LAMBDA {
                    dot(high[n][i], quads[4 * quad + i], query_high);
                    dot(low[n][i], quads[4 * quad + i], query_low);
                });
            });
        });
    }

    static KV_INLINE __m512i four(const int8_t* bytes) {
        int32_t all;
        std::memcpy(&all, bytes, 4);
        return _mm512_set1_epi32(all);
    }

    KV_INLINE void put(const Queries& queries, float* scores) const {
        each<N>([&](auto n) KV_LAMBDA {
            each<4>([&](auto i) KV_LAMBDA {
                __m512i sum = _mm512_add_epi32(_mm512_slli_epi32(high[n][i], 8), low[n][i]);
                sum = _mm512_sub_epi32(sum, _mm512_set1_epi32(queries.offset[n]));
                float* at = scores + n * kSplit + 16 * i;
                store(at, load(at) + queries.unit[n] * (Floats)_mm512_cvtepi32_ps(sum));
            });
        });
    }
};

// N rows over a tile whose codes are unpacked meanwhile, and kept for other rows where `keep` is not null.
template <int N>
void score_coded(const Half& half, const Tiles& tiles, int tile, const Queries& queries, __m512i* keep, float* scores) {
    const int8_t* query = reinterpret_cast<const int8_t*>(queries.numbers);
    Scores<N> sums;
    for (int g = 0; g < half.group_count;)
        with_constant<8>(half.groups[g].width, [&](auto width) KV_LAMBDA {
            // Groups of one width follow each other, so that this takes few turns that a processor cannot foresee.
            do {
                const Coded<width, true> keys(half, g, tiles);
                keys.ask(tile);
                __m512i quads[8];
                keys.quads(tile, quads);
                if (keep) each<8>([&](auto i) KV_LAMBDA { keep[8 * g + i] = quads[i]; });
                sums.add(quads, query + 8 * g, 2 * queries.stride);
            } while (++g < half.group_count && half.groups[g].width == width);
        });
    sums.put(queries, scores);
}

// N rows over a tile that was kept.
template <int N>
void score_kept(const __m512i* quads, int groups, const Queries& queries, float* scores) {
    const int8_t* query = reinterpret_cast<const int8_t*>(queries.numbers);
    Scores<N> sums;
    for (int g = 0; g < groups; ++g) sums.add(quads + 8 * g, query + 8 * g, 2 * queries.stride);
    sums.put(queries, scores);
}

// Sums over all lanes of four registers.
KV_INLINE __m128i sums_of(__m512i a, __m512i b, __m512i c, __m512i d) {
    const __m512i ab = _mm512_add_epi32(_mm512_unpacklo_epi32(a, b), _mm512_unpackhi_epi32(a, b));
    const __m512i cd = _mm512_add_epi32(_mm512_unpacklo_epi32(c, d), _mm512_unpackhi_epi32(c, d));
    const __m512i all = _mm512_add_epi32(_mm512_unpacklo_epi64(ab, cd), _mm512_unpackhi_epi64(ab, cd));
    const __m256i half = _mm256_add_epi32(_mm512_castsi512_si256(all), _mm512_extracti64x4_epi64(all, 1));
    return _mm_add_epi32(_mm256_castsi256_si128(half), _mm256_extracti128_si256(half, 1));
}

// N rows by a group's latents over a split; as many latents at once as registers hold sums of.
template <int N, class Values>
void sum_group(const Values& values, const uint8_t* probability, int tiles, int32_t* sums, int64_t stride) {
    constexpr int L = N == 1 ? 8 : N == 4 ? 2 : 4;
    each<8 / L>([&](auto part) KV_LAMBDA {
        __m512i high[N * L], low[N * L];
        each<N * L>([&](auto i) KV_LAMBDA { high[i] = low[i] = _mm512_setzero_si512(); });
        for (int t = 0; t < tiles; ++t) {
            if (t % (8 / L) == part) values.ask(t);
            __m512i latents[L];
            each<L>([&](auto i) KV_LAMBDA { latents[i] = values.template latent<L * part + i>(t); });
            each<N>([&](auto n) KV_LAMBDA {
                const uint8_t* p = probability + n * 2 * kSplit + t * kTile;
                const __m512i p_high = load_bytes(p), p_low = load_bytes(p + kSplit);
                each<L>([&](auto i) KV_LAMBDA {
                    dot(high[n * L + i], p_high, latents[i]);
                    dot(low[n * L + i], p_low, latents[i]);
                });
            });
        }
        each<N * L>([&](auto i) KV_LAMBDA { high[i] = _mm512_add_epi32(_mm512_slli_epi32(high[i], 8), low[i]); });
        each<N * L / 4>([&](auto i) KV_LAMBDA {
            const __m128i four = sums_of(high[4 * i], high[4 * i + 1], high[4 * i + 2], high[4 * i + 3]);
            int32_t* at = sums + 4 * i / L * stride + L * part + 4 * i % L;
            if constexpr (L >= 4) {
                _mm_storeu_si128(reinterpret_cast<__m128i*>(at), four);
            } else {
                _mm_storel_epi64(reinterpret_cast<__m128i*>(at), four);
                _mm_storel_epi64(reinterpret_cast<__m128i*>(at + stride), _mm_unpackhi_epi64(four, four));
            }
        });
    });
}

struct Avx512 {
    static constexpr int kRows = 32, kFewRows = kRows;
    using Prompt = Nobody;
    static constexpr bool kQuads = true;
    static constexpr int kKeyOffset = 128;

    // Nothing to hold; the destructor tells the compiler that a session is more than an unused variable.
    struct Session {
        ~Session() {}
    };

    static int64_t key_places(int latents) { return kTile * latents / 2; }
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

    // The keys of a tile, [4 latents][64 tokens][4], tokens in quads (`kQuads`); `raised`: levels plus 128.
    template <bool raised>
    static void unpack_keys(const Half& half, const Tiles& tiles, int tile, void* out) {
        __m512i* to = static_cast<__m512i*>(out);
        for (int g = 0; g < half.group_count;)
            with_constant<8>(half.groups[g].width, [&](auto width) KV_LAMBDA {
                do {
                    const Coded<width, raised> keys(half, g, tiles);
                    keys.ask(tile);
                    __m512i quads[8];
                    keys.quads(tile, quads);
                    each<8>([&](auto i) KV_LAMBDA { _mm512_store_si512(to + 8 * g + i, quads[i]); });
                } while (++g < half.group_count && half.groups[g].width == width);
            });
    }

    // The values of a group in `count` tiles from `first` on, rows of `row_bytes`.
    static void unpack_values(const Half& half, int g, const Tiles& tiles, int first, int count, int8_t* out,
                              int64_t row_bytes) {
        with_constant<8>(half.groups[g].width, [&](auto width) KV_LAMBDA {
            const Coded<width, false> values(half, g, tiles);
            for (int t = 0; t < count; ++t) {
                values.ask(first + t);
                each<8>([&](auto i) KV_LAMBDA {
                    _mm512_store_si512(out + i * row_bytes + t * kTile, values.template latent<i>(first + t));
                });
            }
        });
    }

    // f(row, N) for rows from `first` on, as many at a time as registers hold sums of.
    template <class F>
    static KV_INLINE void by_rows(int first, int rows, F f) {
        for (int row = first; row < rows;) {
            const int left = rows - row, count = left == 3 || left > 4 ? 3 : least(left, 2);
            with_constant<4>(count, [&](auto n) KV_LAMBDA { f(row, n); });
            row += count;
        }
    }

    static void score_latents(const Half& half, const Tiles& tiles, const Queries& queries, int16_t* keys,
                              float* scores) {
        __m512i* kept = reinterpret_cast<__m512i*>(keys);
        // Three rows' sums and what is unpacked fill all registers, and storing it besides would take more.
        const int first = queries.rows > 3 ? 2 : queries.rows;
        for (int t = 0; t < tiles.count; ++t, scores += kTile) {
            with_constant<4>(first, [&](auto n) KV_LAMBDA {
                score_coded<n>(half, tiles, t, queries, queries.rows > first ? kept : nullptr, scores);
            });
            by_rows(first, queries.rows, [&](int row, auto n) KV_LAMBDA {
                score_kept<n>(kept, half.group_count, queries.from(row), scores + row * kSplit);
            });
        }
    }

    static void sum_values(const Half& half, const Tiles& tiles, int16_t* probability, int rows, int16_t* values,
                           int32_t* sums, int64_t stride) {
        const uint8_t* p = reinterpret_cast<const uint8_t*>(probability);
        int8_t* unpacked = reinterpret_cast<int8_t*>(values);
        for (int g = 0; g < half.group_count; ++g, sums += 8) {
            if (rows <= 4) {
                with_constant<8>(half.groups[g].width, [&](auto width) KV_LAMBDA {
                    const Coded<width, false> coded(half, g, tiles);
                    with_constant<4>(rows,
                                     [&](auto n) KV_LAMBDA { sum_group<n>(coded, p, tiles.count, sums, stride); });
                });
                continue;
            }
            unpack_values(half, g, tiles, 0, tiles.count, unpacked, kSplit);
            by_rows(0, rows, [&](int row, auto n) KV_LAMBDA {
                sum_group<n>(Unpacked{unpacked}, p + row * 2 * kSplit, tiles.count, sums + row * stride, stride);
            });
        }
    }
};

}  // namespace
}  // namespace kvsplice
