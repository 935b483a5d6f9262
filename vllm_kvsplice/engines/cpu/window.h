// The exact window: the newest tokens of a row, read as they are and joined to its softmax over the stored ones.
#pragma once

#include "block.h"

namespace kvsplice {
namespace {

// Rows that attend together: those that stand together read much the same tokens of a tile.
constexpr int kExactRows = 4;

// `A` is the Attention that it is a part of, with rows' queries, states and places.
struct ExactWindow {
    float *keys, *values;  // of a tile in float32, [D, 64] and [64, D]

    template <class A>
    void lay_out(char*& at, const A& a) {
        place(at, keys, kTile * a.dim);
        place(at, values, kTile * a.dim);
    }

    template <class A>
    void attend(A& a, const Block& b) const {
        int64_t begin = b.context, end = 0;
        for (int row = 0; row < b.rows; ++row) {
            begin = least(begin, most<int64_t>(0, a.w.begin[row]));
            end = most(end, a.w.last[row] + 1);
        }
        for (int64_t base = begin / kTile * kTile; base < end; base += kTile) {
            const int from = static_cast<int>(most<int64_t>(0, begin - base)),
                      until = static_cast<int>(least<int64_t>(kTile, end - base));
            load_tile(a, b, base, from, until);
            for (int row = 0; row < b.rows; row += kExactRows)
                attend_rows(a, row, least(kExactRows, b.rows - row), base);
        }
    }

    // A position's block; keys and values of its tokens follow each other.
    static const uint8_t* find(const Window& window, const Block& b, int64_t position) {
        const int32_t block = window.table[b.sequence * window.table_stride + position / window.block];
        return window.data + block * window.block_stride + b.head * window.head_stride;
    }

  private:
    // Only tokens that some row of the block reads; what stands in the place of others has no weight. Keys are transposed in
    // registers: of stores of single numbers the compiler makes scatters, which took a tenth of a step at a context of 1024.
    template <class A>
    void load_tile(const A& a, const Block& b, int64_t base, int from, int until) const {
        const Window& window = a.step.window;
        const int dim = a.dim;
        float key[8][kMaxDim];
        for (int eight = from / 8 * 8; eight < until; eight += 8) {
            for (int t = most(from, eight); t < least(until, eight + 8); ++t) {
                const int64_t position = base + t;
                const uint8_t* token = find(window, b, position);
                const int64_t offset = position % window.block * 2 * dim;
                load_row(token, window.dtype, offset, dim, key[t - eight]);
                load_row(token, window.dtype, offset + dim, dim, values + t * dim);
            }
            for (int d = 0; d < dim; d += 8) {
                HalfFloats square[8];
                each<8>([&](auto t) KV_LAMBDA { square[t] = load<HalfFloats>(key[t] + d); });
                transpose(square);
                each<8>([&](auto i) KV_LAMBDA { store(keys + (d + i) * kTile + eight, square[i]); });
            }
        }
    }

    // Scores and sums are products of all rows, in which what a row does not read has no weight.
    template <class A>
    void attend_rows(A& a, int first, int rows, int64_t base) const {
        int begin[kExactRows], end[kExactRows], from = kTile, until = 0;
        for (int i = 0; i < rows; ++i) {
            begin[i] = static_cast<int>(most<int64_t>(0, a.w.begin[first + i] - base));
            end[i] = static_cast<int>(least<int64_t>(kTile, a.w.last[first + i] + 1 - base));
            if (begin[i] >= end[i]) continue;
            from = least(from, begin[i]);
            until = most(until, end[i]);
        }
        if (until <= from) return;
        const int dim = a.dim, start = from / 16 * 16, width = static_cast<int>(round_up(until, 16)) - start;
        alignas(64) float weights[kExactRows][kTile];
        float share[kExactRows], sums[kExactRows][kMaxDim];
        const int64_t stride = round_up(dim, 16);
        combine({a.w.query + first * stride, stride, dim, keys + start, kTile, width, weights[0] + start, kTile}, rows);
        for (int i = 0; i < rows; ++i) share[i] = weigh(a, first + i, begin[i], end[i], start, width, weights[i]);
        combine({weights[0] + from, kTile, until - from, values + from * dim, dim, dim, sums[0], kMaxDim}, rows);
        for (int i = 0; i < rows; ++i)
            for (int d = 0; d < dim; ++d) a.exact(first + i)[d] += sums[i][d] * share[i];
    }

    // From scores to weights of a row that reads tokens `begin` to `end` of a tile; returns what its weights count by.
    template <class A>
    float weigh(A& a, int row, int begin, int end, int start, int width, float* weights) const {
        if (begin >= end) {
            std::memset(weights + start, 0, width * sizeof(float));
            return 0;
        }
        Wholes ramp;
        for (int i = 0; i < kRegister; ++i) ramp[i] = i;
        const auto read = [&](int t) { return (ramp + t >= begin) & (ramp + t < end); };
        Register top = Register{} + kNever, total{};
        for (int t = start; t < start + width; t += kRegister)
            top = larger(top, read(t) ? load<Register>(weights + t) : Register{} + kNever);
        const float largest_score = largest(top);
        for (int t = start; t < start + width; t += kRegister) {
            const Register p = read(t) ? exp2_below(load<Register>(weights + t) - largest_score) : Register{};
            total += p;
            store(weights + t, p);
        }
        const float share = a.rescale(row, largest_score);
        a.state(row).total += sum_of(total) * share;
        return share;
    }
};

}  // namespace
}  // namespace kvsplice
