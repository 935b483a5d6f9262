// The exact window of many query rows at once, as products of bfloat16 tiles; `window.h` is that of few rows.
#pragma once

#include "amx.h"
#include "window.h"

namespace kvsplice {
namespace {

// Everything is relative to 2^top and stands on its side, a row a lane. `A` and `Block` are those of attend.h.
struct AmxWindow {
    int wide;                                  // D, rounded up to a product's rows
    uint16_t *keys, *rows;                     // of a tile: [parts, 64, wide], and values before they are turned
    uint16_t *values, *weights;                // [parts, wide, 64]; [parts, tiles]
    float* scores;                             // [64, 16 rows]
    int32_t begin[kManyRows], end[kManyRows];  // tokens that a row reads
    float top[kManyRows], weight[kManyRows];

    static constexpr int64_t kWeightsPart = kTile / kDepth * kTileNumbers;

    template <class A>
    void lay_out(char*& at, const A& a) {
        wide = static_cast<int>(round_up(a.dim, kProductRows));
        place(at, keys, 2 * kTile * wide);
        place(at, rows, 2 * kTile * wide);
        place(at, values, 2 * wide * kTile);
        place(at, weights, 2 * kWeightsPart);
        place(at, scores, kTile * kLanes);
    }

    // The rows' weighted values go to `sums` [groups, wide, 16 rows]; `queries` gives a group's columns, not scaled.
    template <class A, class ColumnsOf>
    void attend(const A& a, const Block& b, ColumnsOf queries, float* sums) {
        const int32_t never = INT32_MAX;
        int32_t from = never, until = 0;
        const int64_t groups = ceil_div(b.rows, kLanes);
        for (int row = 0; row < groups * kLanes; ++row) {
            const bool reads = row < b.rows && a.step.window.size;
            begin[row] = reads ? static_cast<int32_t>(most<int64_t>(0, a.w.begin[row])) : never;
            end[row] = reads ? static_cast<int32_t>(a.w.last[row]) + 1 : 0;
            top[row] = kNever;
            weight[row] = 0;
            from = least(from, begin[row]);
            until = most(until, end[row]);
        }
        std::memset(sums, 0, groups * wide * kLanes * sizeof(float));
        for (int32_t base = from / kTile * kTile; base < until; base += kTile) {
            load_tile(a, b, base, most(from, base), least(until, base + kTile));
            for (int group = 0; group < groups; ++group)
                attend_tile(a, group * kLanes, base, queries(group), sums + group * wide * kLanes);
        }
    }

  private:
    // Only tokens that some row of the block reads; zeros elsewhere.
    template <class A>
    void load_tile(const A& a, const Block& b, int32_t base, int32_t from, int32_t until) const {
        const Window& window = a.step.window;
        const int64_t part = kTile * wide;
        std::memset(keys, 0, 2 * part * sizeof(uint16_t));
        std::memset(rows, 0, 2 * part * sizeof(uint16_t));
        for (int32_t position = from; position < until; ++position) {
            const uint8_t* token = a.window.find(window, b, position);
            const int64_t offset = position % window.block * 2 * a.dim, row = (position - base) * wide;
            load_parts(token, window.dtype, offset, a.dim, keys + row, keys + part + row);
            load_parts(token, window.dtype, offset + a.dim, a.dim, rows + row, rows + part + row);
        }
        for (int p = 0; p < parts_of(window.dtype); ++p)
            for (int d = 0; d < wide; d += kDepth)
                for (int t = 0; t < kTile; t += 16)
                    turn_values(rows + p * part + t * wide + d, values + p * part + d * kTile + t);
    }

    // 16 tokens by 32 dimensions.
    void turn_values(const uint16_t* from, uint16_t* out) const {
        alignas(64) uint16_t pairs[16][kDepth];
        turn(from, wide * sizeof(uint16_t), [&](int c) KV_LAMBDA { return pairs[c]; });
        for (int c = 0; c < 16; ++c, out += 2 * kTile) {
            const __m512i both = load_bytes(pairs[c]);
            _mm256_storeu_si256(reinterpret_cast<__m256i*>(out), _mm512_cvtepi32_epi16(both));
            _mm256_storeu_si256(reinterpret_cast<__m256i*>(out + kTile),
                                _mm512_cvtepi32_epi16(_mm512_srli_epi32(both, 16)));
        }
    }

    // Sixteen rows and a tile. Products take 32 tokens at absolute positions; what a row does not read adds zeros.
    template <class A>
    void attend_tile(const A& a, int row, int32_t base, const Columns& query, float* sums) {
        const Ints begins = load<Ints>(begin + row) - base, ends = load<Ints>(end + row) - base;
        const int first = most(0, _mm512_reduce_min_epi32((__m512i)begins)),
                  last = most(0, _mm512_reduce_max_epi32((__m512i)ends));
        const int from = first / kDepth * kDepth, until = static_cast<int>(round_up(least(last, kTile), kDepth));
        if (from >= until) return;
        const int parts = parts_of(a.step.window.dtype);
        const int64_t part = kTile * wide;
        std::memset(scores, 0, kTile * kLanes * sizeof(float));
        multiply({keys, wide, part, parts}, query, static_cast<int>(ceil_div(a.dim, kDepth)), scores);
        const Floats old = load(top + row), scale = splat(a.step.scale * kLog2E);
        Floats all = old, total{};
        for (int t = from; t < until; ++t) {
            const Ints at = Ints{} + t;
            const Floats score = (at >= begins) & (at < ends) ? load(scores + t * kLanes) * scale : splat(kNever);
            all = larger(all, score);
            store(scores + t * kLanes, score);
        }
        for (int t = from; t < until; t += 2) {
            Floats p[2];
            each<2>([&](auto i) KV_LAMBDA {
                const Floats score = load(scores + (t + i) * kLanes);
                p[i] = score > kNever ? exp2_below(score - all) : Floats{};
                total += p[i];
            });
            split_parts(p[0], p[1], weights + t / 2 * kDepth, weights + kWeightsPart + t / 2 * kDepth);
        }
        // exp2_below(0) is not quite one.
        const Floats kept = old < all ? exp2_below(old - all) : splat(1);
        for (int d = 0; d < a.dim; ++d) store(sums + d * kLanes, load(sums + d * kLanes) * kept);
        store(top + row, all);
        store(weight + row, load(weight + row) * kept + total);
        for (int d = 0; d < a.dim; d += kProductRows)
            multiply({values + d * kTile + from, kTile, part, parts},
                     {weights + from / kDepth * kTileNumbers, kWeightsPart, 2}, (until - from) / kDepth,
                     sums + d * kLanes);
    }
};

}  // namespace
}  // namespace kvsplice
