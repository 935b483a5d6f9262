// What attention works on: blocks of query rows, tiles of what they read, and a thread's memory for a block.
#pragma once

#include "vectors.h"

namespace kvsplice {
namespace {

// Asks for a tile's bytes in planes that lie `stride` apart.
KV_INLINE void ask_planes(const uint8_t* first, int64_t count, int64_t stride) {
    for (int64_t c = 0; c < count; ++c) __builtin_prefetch(first + c * stride, 0, 2);
}

// Byte planes of some tiles of one half, and of the tiles whose turn comes next, to be asked for meanwhile (null: none).
// All at once those would hold up the core, so whoever unpacks a group asks for the same group's.
struct Tiles {
    const uint8_t* data[kSplitTiles];
    const uint8_t* next[kSplitTiles];
    int64_t stride;
    int count;

    KV_INLINE void ask(int tile, int64_t plane, int count) const {
        if (next[tile]) ask_planes(next[tile] + plane * stride, count, stride);
    }
};

// Query rows in whole numbers, and what their products are worth: score = unit * (product - offset).
struct Queries {
    const int16_t* numbers;
    int64_t stride;
    const float* unit;
    const int32_t* offset;
    int rows;

    Queries from(int row) const { return {numbers + row * stride, stride, unit + row, offset + row, rows - row}; }
};

// Token of a tile that stands at place `s` of its scores.
template <class Isa>
constexpr int token_at(int s) {
    return Isa::kQuads ? s / 4 % 4 * 16 + s / 16 * 4 + s % 4 : s;
}

template <class Isa>
struct Order {
    alignas(64) int32_t token[kTile];
    constexpr Order() : token() {
        for (int s = 0; s < kTile; ++s) token[s] = token_at<Isa>(s);
    }
};
template <class Isa>
constexpr Order<Isa> kOrder{};

// Consecutive query rows of one sequence and KV head, row = token * G + head of the group.
struct Block {
    int sequence, head, first, rows;
    int64_t query;     // index in the step of the sequence's first query
    int64_t context;   // tokens stored of the sequence
    int64_t queries;   // of the sequence
    int splits;        // that some row reads
    int ranges;        // that the splits are divided in; 1: all by whoever takes the block
    int pending;       // ranges not finished
    int64_t partials;  // where this block's partial results lie
};

// Everything a thread needs for a block of at most M rows: which tokens each reads, and what few of them need besides.
template <int M>
struct Workspace {
    float *query, *absorbed, *scores, *partial, *state, *first_key, *first_value;
    int16_t *quantised, *probability, *unpacked;
    int32_t* sums;
    uint8_t* tiles;
    float unit[M], top[M], weight[M];
    int32_t offset[M];
    int64_t stored[M], begin[M], last[M];  // stored positions end, exact ones begin and end
};

// A row's softmax so far, relative to 2^top: weights, then latents [R], then exact values [D].
struct State {
    float top, total, on_stored, on_sink;
    float* latents() { return reinterpret_cast<float*>(this + 1); }
};

}  // namespace
}  // namespace kvsplice
