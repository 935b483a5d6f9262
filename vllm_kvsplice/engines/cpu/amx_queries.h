// What keys of many query rows are scored with: the rows' queries, sixteen in the lanes of a register.
//
// `AbsorbedKeys` and `RebuiltKeys` are two ways to score keys. Both have:
//     kRows            query rows of a block at most
//     kStep, kAtOnce   tokens, and groups of sixteen rows, that are multiplied at once
//     prepare          takes in a block's queries: what scores will be worth, and what position 0 scores
//     begin            takes in a split's keys
//     multiply_tokens  multiplies the kStep tokens from one on with the kAtOnce groups from one on
//     score            what that found for one group and token
#pragma once

#include "amx.h"

namespace kvsplice {
namespace {

// A block's queries as tiles of bfloat16 numbers, [groups, parts, tiles], and a group's as floats. `A` is that of attend.h.
struct AmxQueries {
    static constexpr int kGroups = kManyRows / kLanes;

    int dim, wide;  // D, and rounded up to a product's rows
    int depth;      // in tiles
    int parts;
    uint16_t *rows, *tiles;  // of a group, [2, 16, wide]; of all
    float* turned;           // of a group, in units of log2: [wide, 16 rows]

    template <class A>
    void lay_out(char*& at, const A& a) {
        dim = a.dim;
        wide = static_cast<int>(round_up(dim, kProductRows));
        depth = static_cast<int>(ceil_div(dim, kDepth));
        parts = parts_of(a.step.query.dtype);
        place(at, rows, 2 * kLanes * wide);
        // One group more, of nobody: the last of an odd number is multiplied together with it.
        place(at, tiles, (kGroups + 1) * parts * depth * kTileNumbers);
        place(at, turned, wide * kLanes);
    }

    uint16_t* part(int group, int part) const { return tiles + (group * parts + part) * depth * kTileNumbers; }
    Columns columns(int group) const { return {part(group, 0), depth * kTileNumbers, parts}; }

    template <class A>
    void load(const A& a, const Block& b) {
        for (int group = 0; group < ceil_div(b.rows, kLanes); ++group) load_group(a, b, group);
    }

    // A group's queries as floats, in `turned`.
    void scale(int group, Floats by) {
        for (int d = 0; d < dim; d += 2) {
            const Ints high = kvsplice::load<Ints>(part(group, 0) + d / 2 * kDepth);
            Floats even = even_of(high), odd = odd_of(high);
            if (parts == 2) {
                const Ints low = kvsplice::load<Ints>(part(group, 1) + d / 2 * kDepth);
                even += even_of(low);
                odd += odd_of(low);
            }
            store(turned + d * kLanes, even * by);
            store(turned + (d + 1) * kLanes, odd * by);
        }
    }

  private:
    template <class A>
    void load_group(const A& a, const Block& b, int group) {
        const Tokens& from = a.step.query;
        std::memset(rows, 0, 2 * kLanes * wide * sizeof(uint16_t));
        for (int lane = 0; lane < kLanes && group * kLanes + lane < b.rows; ++lane) {
            const int64_t at = a.find_query(b, group * kLanes + lane);
            load_parts(from.data, from.dtype, at, dim, rows + lane * wide, rows + (kLanes + lane) * wide);
        }
        for (int p = 0; p < parts; ++p)
            for (int tile = 0; tile < depth; ++tile)
                turn(rows + p * kLanes * wide + tile * kDepth, wide * sizeof(uint16_t),
                     [&](int c) KV_LAMBDA { return part(group, p) + tile * kTileNumbers + c * kDepth; });
    }
};

// What rows' scores are worth, in units of log2: unit * score + constant; and what position 0 scores.
struct Worth {
    float unit[kManyRows], constant[kManyRows], first[kManyRows];
};

}  // namespace
}  // namespace kvsplice
