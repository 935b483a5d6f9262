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
            unpack_keys(half, tiles, tile, keys);
            multiply_keys(queries, keys, depth);
            keep(sums);
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
            zero();
            for (int t = 0; t < tiles.count; t += kChunk) {
                const int count = least(kChunk, tiles.count - t);
                unpack_values(half, first / 8, tiles, t, count, values);
                for (int i = 0; i < count; ++i) multiply_values(values + i * kTile, turned + (t + i) * kTileBytes);
            }
            keep(found);
            for (int r = 0; r < kLatents && first + r < half.latents; r += 16)
                put_sums(found + r * kLanes, rows, sums + first + r, stride);
        }
    }

  private:
    // Four tiles of sums.
    static constexpr int kSumBytes = 4 * kTileBytes;

    static KV_INLINE void zero() {
        _tile_zero(0);
        _tile_zero(1);
        _tile_zero(2);
        _tile_zero(3);
    }

    // Tile registers 0 to 3.
    static KV_INLINE void keep(int32_t* sums) {
        char* at = reinterpret_cast<char*>(sums);
        _tile_stored(0, at, 64);
        _tile_stored(1, at + kTileBytes, 64);
        _tile_stored(2, at + 2 * kTileBytes, 64);
        _tile_stored(3, at + 3 * kTileBytes, 64);
    }

    // Keys of a tile, [16 depth quads of latents][64 tokens][4].
    static void unpack_keys(const Half& half, const Tiles& tiles, int tile, uint8_t* out) {
        for (int g = 0; g < half.group_count;)
            with_constant<8>(half.groups[g].width, [&](auto width) KV_LAMBDA {
                do {
                    const Coded<width, true> keys(half, g, tiles);
                    keys.ask(tile);
                    __m512i quads[8];
                    keys.quads(tile, quads);
                    each<8>([&](auto i) KV_LAMBDA { _mm512_store_si512(out + (8 * g + i) * 64, quads[i]); });
                } while (++g < half.group_count && half.groups[g].width == width);
            });
    }

    // Sixteen tokens in each of the tile registers 0 to 3.
    static KV_INLINE void multiply_keys(const Queries& queries, const uint8_t* keys, int depth) {
        const int8_t* query = reinterpret_cast<const int8_t*>(queries.numbers);
        zero();
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

    // Values of up to eight groups from `first` on in `count` tiles from `tile` on, rows of `kRow` bytes.
    static void unpack_values(const Half& half, int first, const Tiles& tiles, int tile, int count, int8_t* out) {
        const int last = least(half.group_count, first + kLatents / 8);
        for (int g = first; g < last; ++g, out += 8 * kRow)
            with_constant<8>(half.groups[g].width, [&](auto width) KV_LAMBDA {
                const Coded<width, false> values(half, g, tiles);
                for (int t = 0; t < count; ++t) {
                    values.ask(tile + t);
                    each<8>([&](auto i) KV_LAMBDA {
                        _mm512_store_si512(out + i * kRow + t * kTile, values.template latent<i>(tile + t));
                    });
                }
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
