// Mean keys of few rows: q . R(j) mean, as series around the centres of a split's tiles (docs/cpu.md).
#pragma once

#include "block.h"

namespace kvsplice {
namespace {

// q . R(j) mean = sum over pairs of P cos(w j) + S sin(w j), and a constant from dimensions that do not turn, returned.
// `T` is one row's numbers or many's.
template <class T>
T split_mean(const Layer& layer, const Half& half, const T* q, T* cosine) {
    const int pairs = layer.rotary ? layer.rotary->pairs : 0;
    const bool adjacent = pairs && layer.rotary->interleaved;
    const int step = adjacent ? 2 : 1, apart = adjacent ? 1 : pairs;
    const float *mean = half.mean, *mean_far = mean + apart;
    const T* q_far = q + apart;
    for (int f = 0; f < pairs; ++f) {
        cosine[f] = q[f * step] * mean[f * step] + q_far[f * step] * mean_far[f * step];
        cosine[pairs + f] = q_far[f * step] * mean[f * step] - q[f * step] * mean_far[f * step];
    }
    T constant{};
    for (int d = 2 * pairs; d < layer.dim; ++d) constant += q[d] * half.mean[d];
    return constant;
}

template <class Isa>
struct Means {
    const Layer& layer;
    int pairs;
    float *queries, *turned;  // factors of the rows' cosines and sines, and of their series around a split's tiles
    float constant[Isa::kFewRows];

    explicit Means(const Layer& l) : layer(l), pairs(l.rotary ? l.rotary->pairs : 0) {}

    void lay_out(char*& at) {
        place(at, queries, Isa::kFewRows * 2 * pairs);
        place(at, turned, kTurned * turned_size());
    }

    // Takes in a row's query [D].
    void prepare(const Half& half, int row, const float* q) {
        constant[row] = split_mean(layer, half, q, queries + row * 2 * pairs);
    }

    // Scores of the means of a split's tiles, `scores` [rows, kSplit].
    void score(int rows, int split, int tiles, float* scores) {
        if (!pairs) {
            for (int row = 0; row < rows; ++row)
                for (int t = 0; t < tiles * kTile; t += 16) store(scores + row * kSplit + t, splat(constant[row]));
            return;
        }
        const float* offsets = Isa::kQuads ? layer.rotary->offsets_in_quads : layer.rotary->offsets_in_order;
        const float* centres = layer.rotary->centres + static_cast<int64_t>(split) * 4 * pairs * kSplitTiles;
        for (int row = 0; row < rows; ++row) {
            const int place = row % kTurned;
            if (place == 0) rows - row < kTurned ? turn<1>(row, centres) : turn<kTurned>(row, centres);
            const float* factors = turned + place * turned_size();
            float* out = scores + row * kSplit;
            int tile = 0;
            // As many tiles as registers hold the sums of.
            constexpr int kAtOnce = kRegisterBytes == 64 ? 4 : 1;
            for (; tile + kAtOnce <= tiles; tile += kAtOnce)
                series<kAtOnce>(offsets, factors + tile, constant[row], out + tile * kTile);
            for (; tile < tiles; ++tile) series<1>(offsets, factors + tile, constant[row], out + tile * kTile);
        }
    }

  private:
    // Rows whose series are turned together, because loads are what that waits for.
    static constexpr int kTurned = kRegisterBytes == 64 ? 2 : 1;
    int64_t turned_size() const { return kSplitTiles * 2 * (pairs + kTerms); }

    // Series of N rows around the centres of a split's tiles, [terms, 2, 8] each: factors of cosines (even), then of sines (odd).
    template <int N>
    void turn(int row, const float* centres) {
        constexpr int kStep = 2 * kSplitTiles;
        const Rotary& rotary = *layer.rotary;
        const float *first = queries + row * 2 * pairs, *coefficients = rotary.coefficients;
        const int64_t size = turned_size();
        const auto turn_pair = [&](int f, Floats* out) KV_LAMBDA {
            const float *at = centres + f * 2 * kStep, *cosine = first + f;
            const Floats one = load(at), other = load(at + kStep);
            each<N>([&](auto n)
                        KV_LAMBDA { out[n] = cosine[n * 2 * pairs] * one + cosine[(n * 2 + 1) * pairs] * other; });
        };
        Floats both[N], sums[N][kTerms];
        float* out = turned;
        int f = 0;
        for (; f < rotary.fast(); ++f, out += kStep) {
            turn_pair(f, both);
            each<N>([&](auto n) KV_LAMBDA { store(out + n * size, both[n]); });
        }
        if (f == pairs) return;
        each<N * kTerms>([&](auto i) KV_LAMBDA { sums[i / kTerms][i % kTerms] = Floats{}; });
        each<kTerms>([&](auto i) KV_LAMBDA {
            constexpr int used = kTerms - i;
            for (; f < rotary.slow[used - 1]; ++f, coefficients += kTerms * kStep) {
                turn_pair(f, both);
                each<used>([&](auto k) KV_LAMBDA {
                    const Floats factor = load(coefficients + kStep * k);
                    each<N>([&](auto n) KV_LAMBDA { sums[n][k] += factor * both[n]; });
                });
            }
        });
        each<N * kTerms>([&](auto i) KV_LAMBDA {
            store(out + i / kTerms * size + kStep * (i % kTerms), sums[i / kTerms][i % kTerms]);
        });
    }

    // sum_f even_f cos(w_f t) +- odd_f sin(w_f t) for N tiles: half the products serve both halves of a tile.
    template <int N>
    void series(const float* offsets, const float* factors, float constant, float* out) {
        constexpr int kParts = kTile / 2 / kRegister;
        const int terms = layer.rotary->terms();
        Register even[N][kParts] = {}, odd[N][kParts] = {};
        for (int f = 0; f < terms; ++f, factors += 2 * kSplitTiles, offsets += kTile) {
            each<kParts>([&](auto part) KV_LAMBDA {
                const Register c = load<Register>(offsets + kRegister * part),
                               s = load<Register>(offsets + kTile / 2 + kRegister * part);
                each<N>([&](auto n) KV_LAMBDA {
                    even[n][part] += factors[n] * c;
                    odd[n][part] += factors[kSplitTiles + n] * s;
                });
            });
        }
        each<N * kParts>([&](auto i) KV_LAMBDA {
            constexpr int n = i / kParts, part = i % kParts;
            float* middle = out + n * kTile + kTile / 2;
            store(middle + kRegister * part, even[n][part] + odd[n][part] + constant);
            store(middle - kRegister * (part + 1), reversed(even[n][part] - odd[n][part] + constant));
        });
    }
};

}  // namespace
}  // namespace kvsplice
