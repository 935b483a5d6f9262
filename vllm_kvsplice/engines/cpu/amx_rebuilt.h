// Keys of very many query rows of a bfloat16 model, rebuilt: a split's keys are restored once for all rows of a block, in
// bfloat16, as stock attention has them, and scores cost half the products of tiles.
//
//     keys   [tokens, D]  = R(j) mean + levels [tokens, R] x synthesis^T
//     scores [tokens, 16] = keys x queries
#pragma once

#include "amx_absorbed.h"

namespace kvsplice {
namespace {

struct RebuiltKeys {
    // Tokens and groups whose scores are multiplied at once.
    static constexpr int kStep = 32, kAtOnce = 2;
    // Rows that are worth it, where restoring a token takes as long as it saves; and rows of a block: the more share a token
    // the better, but a block's numbers should stay in the second cache.
    static constexpr int kWorth = 128, kRows = kManyRows;

    int dim, wide;          // D, and rounded up to a product's rows
    int key_tiles, depth;   // latents of a layer in 64s, and of a head in 32s
    uint16_t* synthesis;    // [D / 16, depth] of tiles
    int8_t *quads, *bytes;  // of a tile: levels in quads, and [64, R]
    uint16_t* levels;       // the same in bfloat16
    float* restored;        // of a tile: [64, wide]
    uint16_t* keys;         // of a split: [kSplit / 16, wide / 32] of tiles

    // Queries are bfloat16 numbers as they come.
    static bool suits(const Step& step) { return step.query.dtype == Dtype::kBfloat16; }

    template <class A>
    void lay_out(char*& at, const A& a) {
        dim = a.dim;
        wide = static_cast<int>(round_up(dim, kProductRows));
        key_tiles = static_cast<int>(ceil_div(a.key_latents, 64));
        place(at, synthesis, wide / kLanes * 2 * key_tiles * kTileNumbers);
        place(at, quads, kTile * key_tiles * 64);
        place(at, bytes, kTile * key_tiles * 64);
        place(at, levels, kTile * key_tiles * 64);
        place(at, restored, kTile * wide);
        place(at, keys, kSplit * wide);
    }

    template <class A>
    void prepare(A& a, const Block& b, AmxQueries& asked, bool from_start, Worth& worth) {
        const Half& half = a.layer.key[b.head];
        depth = static_cast<int>(ceil_div(half.latents, kDepth));
        turn_synthesis(half);
        std::memset(restored, 0, kTile * wide * sizeof(float));
        float first[kMaxDim];
        if (from_start) restore_first(half, a.w.first_key, first);
        const Floats scale = splat(a.step.scale * kLog2E);
        for (int row = 0; row < b.rows; row += kLanes) {
            store(worth.unit + row, scale);
            store(worth.constant + row, Floats{});
            if (!from_start) continue;
            asked.scale(row / kLanes, scale);
            Floats score{};
            for (int d = 0; d < dim; ++d) score += load(asked.turned + d * kLanes) * first[d];
            store(worth.first + row, score);
        }
    }

    template <class A>
    void begin(const A& a, const Block& b, int split, int tiles) {
        const Half& half = a.layer.key[b.head];
        const Tiles coded = half.group_count ? a.tiles_of(b, true, split, tiles) : Tiles{};
        for (int tile = 0; tile < tiles; ++tile) {
            const int64_t position = static_cast<int64_t>(split) * kSplit + tile * kTile;
            float mean[kMaxDim];
            rotate(a.layer, half.mean, position, mean);
            for (int t = 0; t < kTile; ++t) rotate(a.layer, mean, t, restored + t * wide);
            if (half.group_count) add_latents(half, coded, tile);
            keep_keys(tile);
        }
    }

    // A group's in tile registers 0 and 1, sixteen tokens each, and the next group's in 2 and 3.
    KV_INLINE void multiply_tokens(const AmxQueries& asked, int group, int token, Products& found) const {
        const uint16_t *query = asked.part(group, 0), *other = asked.part(group + 1, 0);
        const uint16_t *key = keys + token * wide, *far = key + 16 * wide;
        zero_sums();
        for (int k = 0; k < asked.depth * kTileNumbers; k += kTileNumbers) {
            _tile_loadd(4, query + k, 64);
            _tile_loadd(6, key + k, 64);
            _tile_dpbf16ps(0, 6, 4);
            _tile_loadd(7, far + k, 64);
            _tile_dpbf16ps(1, 7, 4);
            _tile_loadd(5, other + k, 64);
            _tile_dpbf16ps(2, 6, 5);
            _tile_dpbf16ps(3, 7, 5);
        }
        keep_sums(&found);
    }

    static KV_INLINE Floats score(const Products& found, int group, int token) {
        return load(found.sums[group * kStep + token]);
    }

  private:
    // R(position) x; tables of positions reach to the end of a tile.
    static void rotate(const Layer& layer, const float* x, int64_t position, float* __restrict out) {
        const int pairs = layer.rotary ? layer.rotary->pairs : 0;
        std::memcpy(out, x, layer.dim * sizeof(float));
        if (!pairs) return;
        const float *cosine = layer.rotary->angles + position * 2 * pairs, *sine = cosine + pairs;
        const int64_t apart = layer.rotary->interleaved ? 1 : pairs;
        const auto turn_pairs = [&]<int kPlaces>() KV_LAMBDA {
            const float* far = x + apart;
            float* out_far = out + apart;
#pragma omp simd
            for (int f = 0; f < pairs; ++f) {
                out[kPlaces * f] = x[kPlaces * f] * cosine[f] - far[kPlaces * f] * sine[f];
                out_far[kPlaces * f] = x[kPlaces * f] * sine[f] + far[kPlaces * f] * cosine[f];
            }
        };
        layer.rotary->interleaved ? turn_pairs.template operator()<2>() : turn_pairs.template operator()<1>();
    }

    // Pairs of latents by sixteen dimensions.
    void turn_synthesis(const Half& half) {
        const auto at = [&](int r, int d) KV_LAMBDA {
            return (Ints)_mm512_cvtepu16_epi32(
                _mm256_loadu_si256(reinterpret_cast<const __m256i*>(half.parts + r * half.depth + d)));
        };
        uint16_t* out = synthesis;
        for (int d = 0; d < dim; d += kLanes)
            for (int r = 0; r < depth * kDepth; r += 2, out += kDepth) store(out, at(r, d) | at(r + 1, d) << 16);
    }

    // Position 0's key, of levels in units of its own.
    void restore_first(const Half& half, const float* levels, float* out) const {
        std::memcpy(out, half.sink, dim * sizeof(float));
        for (int r = 0; r < half.latents; ++r) {
            const uint16_t *high = half.parts + r * half.depth, *low = high + half.part;
            for (int d = 0; d < dim; ++d) out[d] += levels[r] * (from_bfloat16(high[d]) + from_bfloat16(low[d]));
        }
    }

    void add_latents(const Half& half, const Tiles& tiles, int tile) {
        const int64_t width = key_tiles * 64;
        unpack_tokens(half, tiles, tile, quads,
                      [&](int part, int token) KV_LAMBDA { return bytes + token * width + part * 64; });
        for (int i = 0; i < kTile * width; i += 64) widen(bytes + i, levels + i);
        for (int d = 0; d < dim; d += kLanes)
            multiply({levels, width, 0, 1}, {synthesis + d / kLanes * depth * kTileNumbers, 0, 1}, depth, restored + d,
                     wide);
    }

    // As tiles [16 tokens][32 dimensions].
    void keep_keys(int tile) {
        for (int t = 0; t < kTile; ++t) {
            uint16_t* out = keys + (tile * kTile + t / 16 * 16) * wide + t % 16 * kDepth;
            for (int d = 0; d < wide; d += kDepth, out += kTileNumbers) {
                const Floats low = load(restored + t * wide + d), high = load(restored + t * wide + d + kLanes);
                store(out, (Ints)(__m512i)_mm512_cvtne2ps_pbh((__m512)high, (__m512)low));
            }
        }
    }

    // 64 whole numbers as bfloat16 ones, exactly.
    static KV_INLINE void widen(const int8_t* from, uint16_t* out) {
        __m512 x[4];
        each<4>([&](auto i) KV_LAMBDA {
            x[i] = _mm512_cvtepi32_ps(
                _mm512_cvtepi8_epi32(_mm_load_si128(reinterpret_cast<const __m128i*>(from + 16 * i))));
        });
        store(out, (Ints)(__m512i)_mm512_cvtne2ps_pbh(x[1], x[0]));
        store(out + kDepth, (Ints)(__m512i)_mm512_cvtne2ps_pbh(x[3], x[2]));
    }
};

}  // namespace
}  // namespace kvsplice
