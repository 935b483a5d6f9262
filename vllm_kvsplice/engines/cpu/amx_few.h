// Few query rows with AMX: codes are unpacked and scores softened as AVX-512 does it, but tiles are multiplied.
//
//     scores [2 rows, 16 tokens]  = queries [2 rows, 64 latents]  x keys [64 latents, 16 tokens]
//     sums   [16 latents, 2 rows] = values [16 latents, 64 tokens] x probabilities [64 tokens, 2 rows]
//
// Two rows each: high and low bytes. Sums are AVX-512's to the last bit. What is multiplied has to lie in memory, which three
// rows are better off without; longer stretches of it gain nothing, and where they fill the first cache they lose.
#pragma once

#include "amx.h"

namespace kvsplice {
namespace {

struct AmxFew : Avx512 {
    // Rows whose bytes fill a tile, and the fewest that are worth it.
    static constexpr int kFewRows = kLanes / 2, kWorth = 4;
    // Values that are multiplied at once, latents and tiles, and the bytes between latents (not 128, which would put
    // sixteen into few sets of the first cache).
    static constexpr int kLatents = 64, kChunk = 2, kRow = (kChunk + 1) * kTile;

    static int64_t key_places(int latents) {
        return most<int64_t>(Avx512::key_places(latents), (kTile * round_up(latents, 64) + kSumBytes) / 2);
    }
    static int64_t value_places(int latents) {
        return most<int64_t>(Avx512::value_places(latents),
                             (kSplitTiles * kTileBytes + kLatents * kRow + kSumBytes) / 2);
    }

    // As AVX-512 wants them, and zeros for what fills the last product's depth.
    static void pack_query(const int16_t* numbers, int count, int64_t stride, int16_t* out) {
        char* bytes = reinterpret_cast<char*>(out);
        for (char* half : {bytes, bytes + stride}) std::memset(half + count, 0, round_up(count, 64) - count);
        Avx512::pack_query(numbers, count, stride, out);
    }

    static void score_latents(const Half& half, const Tiles& tiles, const Queries& queries, int16_t* places,
                              float* scores) {
        if (queries.rows < kWorth) return Avx512::score_latents(half, tiles, queries, places, scores);
        int32_t* sums = reinterpret_cast<int32_t*>(places);
        uint8_t* keys = reinterpret_cast<uint8_t*>(places) + kSumBytes;
        const int depth = static_cast<int>(ceil_div(half.latents, 64));
        for (int tile = 0; tile < tiles.count; ++tile, scores += kTile) {
            unpack_keys<true>(half, tiles, tile, keys);
            multiply_keys(queries, keys, depth);
            keep_sums(sums);
            for (int row = 0; row < queries.rows; ++row) add_scores(queries, row, sums, scores + row * kSplit);
        }
    }

    static void sum_values(const Half& half, const Tiles& tiles, int16_t* probability, int rows, int16_t* places,
                           int32_t* sums, int64_t stride) {
        if (rows < kWorth) return Avx512::sum_values(half, tiles, probability, rows, places, sums, stride);
        int32_t* found = reinterpret_cast<int32_t*>(places);
        int8_t* turned = reinterpret_cast<int8_t*>(places) + kSumBytes;
        int8_t* values = turned + kSplitTiles * kTileBytes;
        for (int t = 0; t < tiles.count; ++t)
            turn(reinterpret_cast<const char*>(probability) + t * kTile, kSplit,
                 [&](int quad) KV_LAMBDA { return turned + t * kTileBytes + quad * 64; });
        for (int first = 0; first < half.latents; first += kLatents) {
            const int groups = least(kLatents, half.latents - first) / 8;
            zero_sums();
            for (int t = 0; t < tiles.count; t += kChunk) {
                const int count = least(kChunk, tiles.count - t);
                for (int g = 0; g < groups; ++g)
                    unpack_values(half, first / 8 + g, tiles, t, count, values + 8 * g * kRow, kRow);
                for (int i = 0; i < count; ++i) multiply_values(values + i * kTile, turned + (t + i) * kTileBytes);
            }
            keep_sums(found);
            for (int r = 0; r < kLatents && first + r < half.latents; r += 16)
                put_sums(found + r * kLanes, rows, sums + first + r, stride);
        }
    }

  private:
    // Four tiles of sums.
    static constexpr int kSumBytes = 4 * kTileBytes;

    // Sixteen tokens in each of the tile registers 0 to 3.
    static KV_INLINE void multiply_keys(const Queries& queries, const uint8_t* keys, int depth) {
        const int8_t* query = reinterpret_cast<const int8_t*>(queries.numbers);
        zero_sums();
        for (int k = 0; k < depth; ++k, query += 64, keys += 16 * 4 * 64) {
            _tile_loadd(4, query, queries.stride);
            _tile_loadd(5, keys, 4 * 64);
            _tile_dpbsud(0, 4, 5);
            _tile_loadd(6, keys + 64, 4 * 64);
            _tile_dpbsud(1, 4, 6);
            _tile_loadd(5, keys + 128, 4 * 64);
            _tile_dpbsud(2, 4, 5);
            _tile_loadd(6, keys + 192, 4 * 64);
            _tile_dpbsud(3, 4, 6);
        }
    }

    static KV_INLINE void add_scores(const Queries& queries, int row, const int32_t* sums, float* scores) {
        each<4>([&](auto i) KV_LAMBDA {
            const int32_t* high = sums + i * kTileBytes / 4 + 2 * row * kLanes;
            const Ints sum = (load<Ints>(high) << 8) + load<Ints>(high + kLanes) - queries.offset[row];
            store(scores + 16 * i, load(scores + 16 * i) + queries.unit[row] * __builtin_convertvector(sum, Floats));
        });
    }

    // Sixteen latents in each of the tile registers 0 to 3.
    static KV_INLINE void multiply_values(const int8_t* values, const int8_t* probabilities) {
        _tile_loadd(4, probabilities, 64);
        _tile_loadd(5, values, kRow);
        _tile_dpbsud(0, 5, 4);
        _tile_loadd(6, values + 16 * kRow, kRow);
        _tile_dpbsud(1, 6, 4);
        _tile_loadd(5, values + 32 * kRow, kRow);
        _tile_dpbsud(2, 5, 4);
        _tile_loadd(6, values + 48 * kRow, kRow);
        _tile_dpbsud(3, 6, 4);
    }

    // Sixteen latents' sums [16, 2 rows], to each row's.
    static KV_INLINE void put_sums(const int32_t* found, int rows, int32_t* sums, int64_t stride) {
        alignas(64) int32_t columns[kLanes][kLanes];
        turn(found, 64, [&](int column) KV_LAMBDA { return columns[column]; });
        for (int row = 0; row < rows; ++row)
            store(sums + row * stride, (load<Ints>(columns[2 * row]) << 8) + load<Ints>(columns[2 * row + 1]));
    }
};

}  // namespace
}  // namespace kvsplice
