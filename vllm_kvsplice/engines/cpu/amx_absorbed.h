// Keys of many query rows as they are stored: scores are products of whole numbers,
//
//     scores [tokens, 16] = [keys | series] x [absorbed queries | factors]
//
// `series` are cosines, sines and polynomials of a token's offset from its segment's centre, the same for every row, head and
// layer; `factors` are what a row's mean series has for them there. Numbers of 16 bits are two bytes, so a product of two
// is one of high bytes, worth 256, and two of a high and a low one; keys are single bytes and cost two.
#pragma once

#include "amx_queries.h"
#include "means.h"

namespace kvsplice {
namespace {

KV_INLINE Ints rounded(Floats x) { return (Ints)_mm512_cvtps_epi32((__m512)x); }

struct AbsorbedKeys {
    // Tokens and groups whose scores are multiplied at once: two tiles, of sums of high and of low bytes.
    static constexpr int kStep = 32, kAtOnce = 1;
    // Of a block: more gain nothing, and 1024 cost a tenth.
    static constexpr int kRows = 192, kGroups = kRows / kLanes;
    // What a unit of scores is worth in factors: 256 times a high byte of `series`.
    static constexpr float kFactor = kWhole / 256.0f;

    int wide;  // D, rounded up to a product's rows
    int key_tiles, factor_tiles, pairs;
    int64_t width;  // of a token's keys
    const Series* tables;
    int8_t* queries;       // [groups, key tiles] of tiles, high and low
    int8_t* factors;       // [segments of a split, groups, factor tiles] of these
    int32_t* constants;    // [segments of a split, groups, 16 rows]: of the series, in units
    float* absorbed;       // [groups, wide, 16 rows]
    float* series;         // [groups, 2, pairs, 16 rows]: of the mean keys, in units
    int8_t *quads, *keys;  // of a tile; [key tiles, kSplit, 64]

    template <class A>
    void lay_out(char*& at, const A& a) {
        wide = static_cast<int>(round_up(a.dim, kProductRows));
        pairs = a.means.pairs;
        tables = pairs ? &a.layer.rotary->series : nullptr;
        key_tiles = static_cast<int>(ceil_div(a.key_latents, 64));
        factor_tiles = tables ? tables->columns / 64 : 0;
        width = 64 * key_tiles;
        place(at, queries, kGroups * key_tiles * 2 * kTileBytes);
        place(at, factors, kSplit / kSegment * kGroups * factor_tiles * 2 * kTileBytes);
        place(at, constants, kSplit / kSegment * kGroups * kLanes);
        place(at, absorbed, kGroups * wide * kLanes);
        place(at, series, kGroups * pairs * 2 * kLanes);
        place(at, quads, kTile * width);
        place(at, keys, kSplit * width);
    }

    int8_t* factors_of(int segment, int group) const {
        return factors + (segment * kGroups + group) * factor_tiles * 2 * kTileBytes;
    }
    int32_t* constants_of(int segment, int group) const { return constants + (segment * kGroups + group) * kLanes; }

    // --- before the context ------------------------------------------------------------------------------------------

    // `from_start`: some row reads position 0.
    template <class A>
    void prepare(A& a, const Block& b, AmxQueries& asked, bool from_start, Worth& worth) {
        const Half& half = a.layer.key[b.head];
        const int groups = static_cast<int>(ceil_div(b.rows, kLanes));
        if (!factor_tiles) std::memset(constants, 0, kSplit / kSegment * kGroups * kLanes * sizeof(int32_t));
        std::memset(absorbed, 0, groups * wide * kLanes * sizeof(float));
        for (int group = 0; group < groups; ++group)
            for (int r = 0; r < half.latents; r += kProductRows)
                multiply(synthesis_from(half, r), asked.columns(group), asked.depth,
                         absorbed + (group * wide + r) * kLanes);
        for (int group = 0; group < groups; ++group) quantise(a, half, group, asked, from_start, worth);
    }

    // Queries and series of a group as whole numbers of one unit a row; the score of position 0, in float.
    template <class A>
    void quantise(const A& a, const Half& half, int group, AmxQueries& asked, bool from_start, Worth& worth) {
        const int row = group * kLanes;
        const Floats scale = splat(a.step.scale * kLog2E);
        asked.scale(group, scale);
        const float* turned = asked.turned;
        float *to = series + row * 2 * pairs, *latents = absorbed + row * wide;
        store(worth.constant + row,
              split_mean(a.layer, half, reinterpret_cast<const Floats*>(turned), reinterpret_cast<Floats*>(to)));
        Floats sizes = reach(a.layer.rotary, to) * (1 / kFactor), score{};
        for (int r = 0; r < half.latents; ++r) {
            const Floats x = load(latents + r * kLanes) * scale;
            store(latents + r * kLanes, x);
            sizes = larger(sizes, larger(x, -x));
            if (from_start) score += x * a.w.first_key[r];
        }
        if (from_start)
            for (int d = 0; d < asked.dim; ++d) score += load(turned + d * kLanes) * half.sink[d];
        store(worth.first + row, score);
        const Floats inverse = sizes > 0 ? kWhole / sizes : Floats{};
        store(worth.unit + row, sizes * (1.0f / kWhole));
        for (int r = 0; r < width; r += 4) {
            Ints whole[4];
            each<4>([&](auto i) KV_LAMBDA { whole[i] = rounded(load(latents + (r + i) * kLanes) * inverse); });
            int8_t* out = queries + (group * key_tiles + r / 64) * 2 * kTileBytes + r % 64 / 4 * 64;
            split_bytes(whole, out, out + kTileBytes);
        }
        for (int f = 0; f < 2 * pairs; ++f) store(to + f * kLanes, load(to + f * kLanes) * inverse * (1 / kFactor));
    }

    // No factor of a row is larger: those of slow pairs are added up.
    static Floats reach(const Rotary* rotary, const float* rows) {
        Floats slow{}, fast{};
        for (int f = 0; rotary && f < rotary->pairs; ++f) {
            const Floats p = load(rows + f * kLanes), s = load(rows + (rotary->pairs + f) * kLanes);
            const Floats size = _mm512_sqrt_ps(p * p + s * s);
            if (f < rotary->series.fast)
                fast = larger(fast, size);
            else
                slow += size * slow_pair(rotary->series, f)[kDegree + 1];
        }
        return larger(fast, slow);
    }

    static const float* slow_pair(const Series& series, int pair) {
        return series.slow + (pair - series.fast) * (kDegree + 2);
    }

    // --- a split -----------------------------------------------------------------------------------------------------

    template <class A>
    void begin(const A& a, const Block& b, int split, int tiles) {
        const Half& half = a.layer.key[b.head];
        const int64_t base = static_cast<int64_t>(split) * kSplit;
        if (half.group_count) {
            const Tiles coded = a.tiles_of(b, true, split, tiles);
            for (int tile = 0; tile < tiles; ++tile)
                unpack_tokens(half, coded, tile, quads, [&](int part, int token) KV_LAMBDA {
                    return keys + (part * kSplit + tile * kTile + token) * 64;
                });
        }
        for (int segment = 0; factor_tiles && segment * kSegment < tiles * kTile; ++segment)
            for (int group = 0; group < ceil_div(b.rows, kLanes); ++group)
                turn_series(base / kSegment + segment, group, factors_of(segment, group), constants_of(segment, group));
    }

    // The rows' series around a segment's centre, as the factors of its cosines, sines and polynomials. What is constant
    // there is what sums of low bytes begin with.
    void turn_series(int64_t segment, int group, int8_t* out, int32_t* constants) {
        const float *centre = tables->centres + segment * 2 * pairs, *row = series + group * pairs * 2 * kLanes;
        Ints whole[kMaxDim + kDegree + 2];
        Floats polynomials[kDegree + 1] = {};
        const auto turn_pairs = [&](int first, int last, auto use) KV_LAMBDA {
            for (int f = first; f < last; ++f) {
                const Floats p = load(row + f * kLanes), s = load(row + (pairs + f) * kLanes);
                const float cosine = centre[2 * f], sine = centre[2 * f + 1];
                const Floats turned[] = {p * cosine + s * sine, s * cosine - p * sine};
                use(f, turned);
            }
        };
        const auto add_up = [&]<int kDegrees>(int f, const Floats* turned) KV_LAMBDA {
            each<kDegrees + 1>([&](auto degree) KV_LAMBDA {
                polynomials[degree] += slow_pair(*tables, f)[degree] * turned[degree % 2];
            });
        };
        turn_pairs(0, tables->fast, [&](int f, const Floats* turned) KV_LAMBDA {
            each<2>([&](auto i) KV_LAMBDA { whole[2 * f + i] = rounded(turned[i]); });
        });
        turn_pairs(tables->fast, tables->slower,
                   [&](int f, const Floats* turned) KV_LAMBDA { add_up.template operator()<kDegree>(f, turned); });
        turn_pairs(tables->slower, pairs,
                   [&](int f, const Floats* turned) KV_LAMBDA { add_up.template operator()<kLowDegree>(f, turned); });
        if (tables->fast < pairs)
            each<kDegree>([&](auto i) KV_LAMBDA { whole[2 * tables->fast + i] = rounded(polynomials[i + 1]); });
        store(constants, rounded(polynomials[0] * kFactor));
        whole[tables->used] = whole[tables->used + 1] = Ints{};
        for (int i = 0; i < tables->used; i += 4) {
            int8_t* at = out + i / 64 * 2 * kTileBytes + i % 64 / 4 * 64;
            split_bytes(whole + i, at, at + kTileBytes);
        }
    }

    // High bytes add up in tile registers 0 and 1, sixteen tokens each, low ones in 2 and 3.
    KV_INLINE void multiply_tokens(const AmxQueries&, int group, int token, Products& found) const {
        _tile_zero(0);
        _tile_zero(1);
        // One line, sixteen times.
        _tile_loadd(2, constants_of(token / kSegment, group), 0);
        _tile_loadd(3, constants_of(token / kSegment, group), 0);
        add_keys(keys + token * 64, queries + group * key_tiles * 2 * kTileBytes);
        if (factor_tiles) {
            const int64_t at = token % kSegment * tables->columns;
            add_series(tables->high + at, tables->low + at, tables->columns, factors_of(token / kSegment, group));
        }
        keep_sums(&found);
    }

    static KV_INLINE Floats score(const Products& found, int, int token) {
        const Ints high = load<Ints>(found.sums[token]), low = load<Ints>(found.sums[kStep + token]);
        return __builtin_convertvector((high << 8) + low, Floats);
    }

  private:
    KV_INLINE void add_keys(const int8_t* key, const int8_t* query) const {
        for (int tile = 0; tile < key_tiles; ++tile, key += kSplit * 64, query += 2 * kTileBytes) {
            _tile_loadd(4, key, 64);
            _tile_loadd(6, query, 64);
            _tile_dpbssd(0, 4, 6);
            _tile_loadd(5, key + kTileBytes, 64);
            _tile_dpbssd(1, 5, 6);
            _tile_loadd(7, query + kTileBytes, 64);
            _tile_dpbssd(2, 4, 7);
            _tile_dpbssd(3, 5, 7);
        }
    }

    KV_INLINE void add_series(const int8_t* high, const int8_t* low, int64_t columns, const int8_t* factor) const {
        for (int tile = 0; tile < factor_tiles; ++tile, high += 64, low += 64, factor += 2 * kTileBytes) {
            _tile_loadd(4, high, columns);
            _tile_loadd(6, factor, 64);
            _tile_dpbssd(0, 4, 6);
            _tile_loadd(5, high + 16 * columns, columns);
            _tile_dpbssd(1, 5, 6);
            _tile_loadd(7, factor + kTileBytes, 64);
            _tile_dpbssd(2, 4, 7);
            _tile_dpbssd(3, 5, 7);
            _tile_loadd(4, low, columns);
            _tile_dpbssd(2, 4, 6);
            _tile_loadd(5, low + 16 * columns, columns);
            _tile_dpbssd(3, 5, 6);
        }
    }
};

}  // namespace
}  // namespace kvsplice
