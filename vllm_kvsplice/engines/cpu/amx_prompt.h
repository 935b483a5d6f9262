// Many query rows with AMX: prompts, and decoding with more than eight query heads per KV head.
//
// Everything stands on its side, sixteen query rows in the lanes of a register, so that softmax needs nothing from across:
//
//     scores [tokens, 16]  = [keys | series] x [absorbed queries | factors]
//     sums   [latents, 16] = values x probabilities
//
// Absorbed queries, the exact window and outputs are products of bfloat16 numbers, or sums of two (`amx.h`).
//
// `series` are cosines, sines and polynomials of a token's offset from its segment's centre, the same for every row, head and
// layer; `factors` are what a row's mean series has for them there. Numbers of 16 bits are two bytes, so a product of two
// is one of high bytes, worth 256, and two of a high and a low one; keys and values are single bytes and cost two.
#pragma once

#include "amx_window.h"

namespace kvsplice {
namespace {

// Tokens whose scores are multiplied at once.
constexpr int kStep = 32;
// Bytes between latents of a split's values: 512 would put all of them into the same few sets of the first cache.
constexpr int kValueRow = kSplit + 64;
// Score of a token that a row does not read.
constexpr int32_t kUnread = INT32_MIN;

KV_INLINE Ints rounded(Floats x) { return (Ints)_mm512_cvtps_epi32((__m512)x); }
KV_INLINE Ints larger(Ints a, Ints b) { return (Ints)_mm512_max_epi32((__m512i)a, (__m512i)b); }

// Rows of a block in groups of sixteen. Bytes from the right lie as tiles: [high, low][16][16 rows][4].
struct AmxPrompt {
    static constexpr int kGroups = kManyRows / kLanes;
    // What a unit of scores is worth in factors: 256 times a high byte of `series`.
    static constexpr float kFactor = kWhole / 256.0f;

    // Sums of one product's high and low bytes.
    struct Products {
        alignas(64) int32_t high[kStep][kLanes], low[kStep][kLanes];
    };

    // A group's rows and a split.
    struct Piece {
        alignas(64) int32_t until[kLanes], largest[kLanes];  // tokens end that a row reads; its largest score
        float units[kLanes], shift[kLanes];                  // 2048ths below the largest: units * score + shift
        float kept[kLanes], share[kLanes];                   // of what was read before, and of this
        int group, first;
        bool whole;  // every row reads every token
    };

    bool from_start;  // some row reads position 0
    int dim, wide;    // D, and rounded up to a product's rows
    int key_tiles, value_pairs, factor_tiles, pairs;
    int asked_tiles, asked_parts;  // of queries in bfloat16
    int64_t width;                 // of a token's keys
    const Series* tables;
    uint16_t *rows, *asked;         // queries: [2, 16, wide] of a group, [groups, parts, tiles]
    float* turned;                  // a group's queries in units of log2, then its outputs: [wide, 16 rows]
    int8_t *queries, *factors;      // [groups, key tiles], [segments of a split, groups, factor tiles] of tiles
    int32_t* constants;             // [segments of a split, groups, 16 rows]: of the series, in units
    float* series;                  // [groups, 2, pairs, 16 rows]: of the mean keys, in units
    int8_t *quads, *keys, *values;  // of a tile; [key tiles, kSplit, 64], [latents, kValueRow]
    int32_t* scores;                // [2, kSplit, 16]
    uint8_t* probabilities;         // [2, kSplit / 64] of tiles
    Products* products;             // of a step, then of pairs of values' tiles
    Piece* pieces;
    float* sums;        // [groups, latents, 16 rows], relative to 2^top
    uint16_t* latents;  // the same of all that was read, in bfloat16: [groups, 2, value pairs] of tiles
    float unit[kManyRows], constant[kManyRows], first[kManyRows], top[kManyRows], weight[kManyRows];
    float* floats;  // [groups, wide, 16 rows]: absorbed queries, then the exact window's sums, then outputs
    int32_t stored[kManyRows];
    AmxWindow window;

    template <class A>
    void lay_out(char*& at, const A& a) {
        dim = a.dim;
        wide = static_cast<int>(round_up(dim, kProductRows));
        pairs = a.means.pairs;
        tables = pairs ? &a.layer.rotary->series : nullptr;
        key_tiles = static_cast<int>(ceil_div(a.key_latents, 64));
        value_pairs = static_cast<int>(ceil_div(a.value_latents, 32));
        factor_tiles = tables ? tables->columns / 64 : 0;
        asked_tiles = static_cast<int>(ceil_div(dim, kDepth));
        asked_parts = parts_of(a.step.query.dtype);
        width = 64 * key_tiles;
        place(at, rows, 2 * kLanes * wide);
        place(at, asked, kGroups * asked_parts * asked_tiles * kTileNumbers);
        place(at, turned, wide * kLanes);
        place(at, queries, kGroups * key_tiles * 2 * kTileBytes);
        place(at, factors, kSplit / kSegment * kGroups * factor_tiles * 2 * kTileBytes);
        place(at, constants, kSplit / kSegment * kGroups * kLanes);
        place(at, series, kGroups * pairs * 2 * kLanes);
        place(at, quads, kTile * width);
        place(at, keys, kSplit * width);
        place(at, values, value_pairs * 32 * kValueRow);
        place(at, scores, 2 * kSplit * kLanes);
        place(at, probabilities, 2 * kSplit / 64 * 2 * kTileBytes);
        place(at, products, 1 + ceil_div(value_pairs, kTile / kStep));
        place(at, pieces, kGroups);
        place(at, sums, kGroups * value_pairs * 32 * kLanes);
        place(at, latents, kGroups * 2 * value_pairs * kTileNumbers);
        place(at, floats, kGroups * wide * kLanes);
        window.lay_out(at, a);
    }

    int8_t* factors_of(int segment, int group) const {
        return factors + (segment * kGroups + group) * factor_tiles * 2 * kTileBytes;
    }
    int32_t* constants_of(int segment, int group) const { return constants + (segment * kGroups + group) * kLanes; }
    float* sums_of(int group, int latent) const { return sums + (group * value_pairs * 32 + latent) * kLanes; }
    float* floats_of(int group) const { return floats + group * wide * kLanes; }
    static int groups_of(const Block& b) { return static_cast<int>(ceil_div(b.rows, kLanes)); }
    Columns latents_of(int group) const {
        const int64_t part = value_pairs * kTileNumbers;
        return {latents + group * 2 * part, part, 2};
    }
    uint16_t* asked_part(int group, int part) const {
        return asked + (group * asked_parts + part) * asked_tiles * kTileNumbers;
    }
    Columns asked_of(int group) const { return {asked_part(group, 0), asked_tiles * kTileNumbers, asked_parts}; }

    // --- before the context ------------------------------------------------------------------------------------------

    template <class A>
    void prepare(A& a, const Block& b) {
        const Half& half = a.layer.key[b.head];
        from_start = a.load_first(b);
        for (int row = 0; row < kManyRows; ++row)
            stored[row] = row < b.rows ? static_cast<int32_t>(a.w.stored[row]) : 0;
        if (!factor_tiles) std::memset(constants, 0, kSplit / kSegment * kGroups * kLanes * sizeof(int32_t));
        const int groups = groups_of(b);
        for (int group = 0; group < groups; ++group) load_queries(a, b, group);
        std::memset(floats, 0, groups * wide * kLanes * sizeof(float));
        for (int group = 0; group < groups; ++group)
            for (int r = 0; r < half.latents; r += kProductRows)
                multiply(synthesis_from(half, r), asked_of(group), asked_tiles, floats_of(group) + r * kLanes);
        for (int group = 0; group < groups; ++group) quantise(a, half, group);
    }

    // Queries and series of a group as whole numbers of one unit a row; the score of position 0, in float.
    template <class A>
    void quantise(const A& a, const Half& half, int group) {
        const int row = group * kLanes;
        const Floats scale = splat(a.step.scale * kLog2E);
        scale_queries(group, scale);
        float *to = series + row * 2 * pairs, *absorbed = floats_of(group);
        store(constant + row,
              split_mean(a.layer, half, reinterpret_cast<const Floats*>(turned), reinterpret_cast<Floats*>(to)));
        Floats sizes = reach(a.layer.rotary, to) * (1 / kFactor), score{};
        for (int r = 0; r < half.latents; ++r) {
            const Floats x = load(absorbed + r * kLanes) * scale;
            store(absorbed + r * kLanes, x);
            sizes = larger(sizes, larger(x, -x));
            if (from_start) score += x * a.w.first_key[r];
        }
        if (from_start)
            for (int d = 0; d < dim; ++d) score += load(turned + d * kLanes) * half.sink[d];
        store(first + row, load<Ints>(stored + row) > 0 ? score : splat(kNever));
        const Floats inverse = sizes > 0 ? kWhole / sizes : Floats{};
        store(unit + row, sizes * (1.0f / kWhole));
        for (int r = 0; r < width; r += 4) {
            Ints whole[4];
            each<4>([&](auto i) KV_LAMBDA { whole[i] = rounded(load(absorbed + (r + i) * kLanes) * inverse); });
            int8_t* out = queries + (group * key_tiles + r / 64) * 2 * kTileBytes + r % 64 / 4 * 64;
            split_bytes(whole, out, out + kTileBytes);
        }
        for (int f = 0; f < 2 * pairs; ++f) store(to + f * kLanes, load(to + f * kLanes) * inverse * (1 / kFactor));
    }

    // A group's queries as tiles of bfloat16 numbers.
    template <class A>
    void load_queries(const A& a, const Block& b, int group) {
        const Tokens& from = a.step.query;
        std::memset(rows, 0, 2 * kLanes * wide * sizeof(uint16_t));
        for (int lane = 0; lane < kLanes && group * kLanes + lane < b.rows; ++lane) {
            const int64_t at = a.find_query(b, group * kLanes + lane);
            load_parts(from.data, from.dtype, at, dim, rows + lane * wide, rows + (kLanes + lane) * wide);
        }
        for (int part = 0; part < asked_parts; ++part) {
            uint16_t* tiles = asked_part(group, part);
            for (int tile = 0; tile < asked_tiles; ++tile)
                turn(rows + part * kLanes * wide + tile * kDepth, wide * sizeof(uint16_t),
                     [&](int c) KV_LAMBDA { return tiles + tile * kTileNumbers + c * kDepth; });
        }
    }

    // And as floats.
    void scale_queries(int group, Floats scale) {
        for (int d = 0; d < dim; d += 2) {
            const Ints high = load<Ints>(asked_part(group, 0) + d / 2 * kDepth);
            Floats even = even_of(high), odd = odd_of(high);
            if (asked_parts == 2) {
                const Ints low = load<Ints>(asked_part(group, 1) + d / 2 * kDepth);
                even += even_of(low);
                odd += odd_of(low);
            }
            store(turned + d * kLanes, even * scale);
            store(turned + (d + 1) * kLanes, odd * scale);
        }
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

    // --- the stored context ------------------------------------------------------------------------------------------

    // Splits `first` to `last`.
    template <class A>
    void attend(const A& a, const Block& b, int first, int last) {
        clear(b);
        for (int split = first; split < last; ++split) attend_split(a, b, split, a.tiles_in(b, split));
    }

    void clear(const Block& b) {
        for (float& x : top) x = kNever;
        std::memset(weight, 0, sizeof weight);
        std::memset(sums, 0, groups_of(b) * value_pairs * 32 * kLanes * sizeof(float));
    }

    // What was read, to and from `partial`: tops, weights and latents of all groups.
    void save(const Block& b, float* partial) const {
        const int64_t lanes = round_up(b.rows, kLanes);
        std::memcpy(partial, top, lanes * sizeof(float));
        std::memcpy(partial + lanes, weight, lanes * sizeof(float));
        std::memcpy(partial + 2 * lanes, sums, lanes * value_pairs * 32 * sizeof(float));
    }

    void merge(const Block& b, const float* partial) {
        const int64_t lanes = round_up(b.rows, kLanes);
        const float* from = partial + 2 * lanes;
        for (int row = 0; row < lanes; row += kLanes) {
            const Floats old = load(top + row), found = load(partial + row), all = larger(old, found),
                         kept = exp2_below(old - all), share = exp2_below(found - all);
            store(top + row, all);
            store(weight + row, load(weight + row) * kept + load(partial + lanes + row) * share);
            float* sum = sums_of(row / kLanes, 0);
            for (int r = 0; r < value_pairs * 32; ++r, sum += kLanes, from += kLanes)
                store(sum, load(sum) * kept + load(from) * share);
        }
    }

    template <class A>
    void attend_split(const A& a, const Block& b, int split, int tiles) {
        const Half &key = a.layer.key[b.head], &value = a.layer.value[b.head];
        const int groups = groups_of(b);
        const int64_t base = static_cast<int64_t>(split) * kSplit;
        if (key.group_count) unpack_keys(key, a.tiles_of(b, true, split, tiles));
        if (value.group_count) unpack_values(value, a.tiles_of(b, false, split, tiles));
        for (int segment = 0; factor_tiles && segment * kSegment < tiles * kTile; ++segment)
            for (int group = 0; group < groups; ++group)
                turn_series(base / kSegment + segment, group, factors_of(segment, group), constants_of(segment, group));
        run(pieces_of(base, groups), tiles);
    }

    void unpack_values(const Half& half, const Tiles& tiles) {
        for (int g = 0; g < half.group_count; ++g)
            Avx512::unpack_values(half, g, tiles, 0, tiles.count, values + g * 8 * kValueRow, kValueRow);
    }

    // Token by token, from quads of latents.
    void unpack_keys(const Half& half, const Tiles& tiles) {
        for (int tile = 0; tile < tiles.count; ++tile) {
            Avx512::unpack_keys<false>(half, tiles, tile, quads);
            for (int part = 0; part < ceil_div(half.latents, 64); ++part)
                for (int j = 0; j < 4; ++j)
                    turn(quads + part * 64 * kTile + 64 * j, 256, [&](int c) KV_LAMBDA {
                        return keys + (part * kSplit + tile * kTile + c / 4 * 16 + 4 * j + c % 4) * 64;
                    });
        }
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

    // Groups of which some row reads a split.
    int pieces_of(int64_t base, int groups) {
        int count = 0;
        for (int group = 0; group < groups; ++group) {
            Piece& piece = pieces[count];
            piece.group = group;
            // Position 0 is not here (`Attention::start`).
            piece.first = base == 0;
            const Ints until = load<Ints>(stored + group * kLanes) - static_cast<int32_t>(base);
            const auto after = [&](int token) {
                return _mm512_cmpgt_epi32_mask((__m512i)until, _mm512_set1_epi32(token));
            };
            store(piece.until, until);
            piece.whole = !piece.first && after(kSplit - 1) == 0xFFFF;
            count += after(piece.first) != 0;
        }
        return count;
    }

    // While a piece is softened, the next one's keys and the last one's values are multiplied: the unit never sleeps.
    void run(int count, int tiles) {
        const int steps = tiles * kTile / kStep;
        for (int i = -1; i <= count; ++i) {
            Piece* next = i + 1 < count ? pieces + i + 1 : nullptr;
            Piece* now = i >= 0 && i < count ? pieces + i : nullptr;
            const Piece* last = i > 0 ? pieces + i - 1 : nullptr;
            const int slot = i & 1, other = 1 - slot;
            if (now) level(*now);
            Ints largest = Ints{} + kUnread, total{};
            for (int step = 0; step < steps; ++step) {
                const int first = value_pairs * step / steps, until = value_pairs * (step + 1) / steps;
                if (next) multiply_keys(*next, step * kStep, products[0]);
                for (int pair = first; last && pair < until; ++pair)
                    multiply_values(*last, other, pair, tiles, products[1 + pair - first]);
                if (now) total += soften(*now, slot, step * kStep);
                if (next) largest = larger(largest, join(*next, other, step * kStep, products[0]));
                for (int pair = first; last && pair < until; ++pair)
                    add_values(*last, pair, products[1 + pair - first]);
            }
            if (next) store(next->largest, largest);
            if (now) weigh(*now, total);
        }
    }

    // Brings a group to the maximum of what it has read and a piece.
    void level(Piece& piece) {
        const int row = piece.group * kLanes;
        const Ints largest = load<Ints>(piece.largest);
        const Floats units = load(unit + row), here = units * __builtin_convertvector(largest, Floats);
        store(piece.units, units * -2048.0f);
        const Ints read = largest != kUnread;
        store(piece.shift, read ? here * 2048.0f : splat(65535));
        const Floats found = read ? here + load(constant + row) : splat(kNever);
        const Floats old = load(top + row), all = larger(old, found);
        store(top + row, all);
        store(piece.kept, exp2_below(old - all));
        store(piece.share, exp2_below(found - all) * (1 / 32768.0f));
    }

    void weigh(const Piece& piece, Ints total) {
        float* at = weight + piece.group * kLanes;
        store(at, load(at) * load(piece.kept) + __builtin_convertvector(total, Floats) * load(piece.share));
    }

    KV_INLINE void multiply_keys(const Piece& piece, int token, Products& found) {
        _tile_zero(0);
        _tile_zero(1);
        // One line, sixteen times.
        _tile_loadd(2, constants_of(token / kSegment, piece.group), 0);
        _tile_loadd(3, constants_of(token / kSegment, piece.group), 0);
        add_keys(keys + token * 64, queries + piece.group * key_tiles * 2 * kTileBytes);
        if (factor_tiles) {
            const int64_t at = token % kSegment * tables->columns;
            add_series(tables->high + at, tables->low + at, tables->columns, factors_of(token / kSegment, piece.group));
        }
        keep_sums(&found);
    }

    // High bytes add up in tile registers 0 and 1, sixteen tokens each, low ones in 2 and 3.
    KV_INLINE void add_keys(const int8_t* key, const int8_t* query) {
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

    KV_INLINE void add_series(const int8_t* high, const int8_t* low, int64_t columns, const int8_t* factor) {
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

    // Whole scores of some tokens; returns each row's largest.
    KV_INLINE Ints join(const Piece& piece, int slot, int token, const Products& found) {
        return piece.whole ? join<false>(piece, slot, token, found) : join<true>(piece, slot, token, found);
    }

    template <bool kMasked>
    KV_INLINE Ints join(const Piece& piece, int slot, int token, const Products& found) {
        Ints largest[4];
        each<4>([&](auto i) KV_LAMBDA { largest[i] = Ints{} + kUnread; });
        int32_t* out = scores + (slot * kSplit + token) * kLanes;
        for (int t = 0; t < kStep; t += 4)
            each<4>([&](auto i) KV_LAMBDA {
                Ints score = (load<Ints>(found.high[t + i]) << 8) + load<Ints>(found.low[t + i]);
                if constexpr (kMasked) {
                    const Ints at = Ints{} + (token + t + i);
                    score = (at >= piece.first) & (at < load<Ints>(piece.until)) ? score : Ints{} + kUnread;
                }
                largest[i] = larger(largest[i], score);
                store(out + (t + i) * kLanes, score);
            });
        return larger(larger(largest[0], largest[1]), larger(largest[2], largest[3]));
    }

    // From scores to 15-bit probabilities relative to the piece's largest; returns their sums.
    KV_INLINE Ints soften(const Piece& piece, int slot, int token) {
        return piece.whole ? soften<false>(piece, slot, token) : soften<true>(piece, slot, token);
    }

    template <bool kMasked>
    KV_INLINE Ints soften(const Piece& piece, int slot, int token) {
        const Floats units = load(piece.units), shift = load(piece.shift);
        const int32_t* score = scores + (slot * kSplit + token) * kLanes;
        uint8_t* out = probabilities + (slot * kSplit + token) / 64 * 2 * kTileBytes + token % 64 / 4 * 64;
        const __m512i ones = _mm512_set1_epi8(1);
        __m512i high = _mm512_setzero_si512(), low = high;
        for (int t = 0; t < kStep; t += 4, out += 64) {
            Ints below[4];
            each<4>([&](auto i) KV_LAMBDA {
                const Ints whole = load<Ints>(score + (t + i) * kLanes);
                below[i] = rounded(__builtin_convertvector(whole, Floats) * units + shift);
                if constexpr (kMasked) below[i] = whole != kUnread ? below[i] : Ints{} + 0xFFFF;
            });
            const __m512i first = exp2_of(_mm512_packus_epi32((__m512i)below[0], (__m512i)below[1])),
                          second = exp2_of(_mm512_packus_epi32((__m512i)below[2], (__m512i)below[3]));
            const __m512i bytes = _mm512_set1_epi16(255);
            const __m512i h = by_row(_mm512_packus_epi16(_mm512_srli_epi16(first, 8), _mm512_srli_epi16(second, 8)));
            const __m512i l =
                by_row(_mm512_packus_epi16(_mm512_and_si512(first, bytes), _mm512_and_si512(second, bytes)));
            _mm512_store_si512(out, h);
            _mm512_store_si512(out + kTileBytes, l);
            dot(high, h, ones);
            dot(low, l, ones);
        }
        return ((Ints)high << 8) + (Ints)low;
    }

    // Bytes of four rows by four tokens in every quarter, the other way around.
    static KV_INLINE __m512i by_row(__m512i x) {
        return _mm512_shuffle_epi8(x, _mm512_set4_epi32(0x0F0B0703, 0x0E0A0602, 0x0D090501, 0x0C080400));
    }

    // 2^15 times 2^(-y / 2048), rounded: a chord between the powers of 2^(1/32), shifted by the whole part of y / 2048.
    static KV_INLINE __m512i exp2_of(__m512i y) {
        const __m512i index = _mm512_srli_epi16(y, 6);
        const __m512i start = _mm512_permutexvar_epi16(index, load_bytes(kPowers.start)),
                      slope = _mm512_permutexvar_epi16(index, load_bytes(kPowers.slope));
        const __m512i power = _mm512_sub_epi16(start, _mm512_mulhi_epu16(slope, _mm512_slli_epi16(y, 10)));
        return _mm512_avg_epu16(_mm512_srlv_epi16(power, _mm512_srli_epi16(y, 11)), _mm512_setzero_si512());
    }

    // Two times sixteen latents; sums lie as those of scores do.
    KV_INLINE void multiply_values(const Piece& piece, int slot, int pair, int tiles, Products& found) {
        const int8_t* value = values + pair * 32 * kValueRow;
        const uint8_t* probability = probabilities + slot * kSplit / 64 * 2 * kTileBytes;
        zero_sums();
        for (int t = 0; t < tiles; ++t, value += 64, probability += 2 * kTileBytes) {
            _tile_loadd(4, value, kValueRow);
            _tile_loadd(6, probability, 64);
            _tile_dpbsud(0, 4, 6);
            _tile_loadd(5, value + 16 * kValueRow, kValueRow);
            _tile_dpbsud(1, 5, 6);
            _tile_loadd(7, probability + kTileBytes, 64);
            _tile_dpbsud(2, 4, 7);
            _tile_dpbsud(3, 5, 7);
        }
        keep_sums(&found);
    }

    KV_INLINE void add_values(const Piece& piece, int pair, const Products& found) {
        const Floats kept = load(piece.kept), share = load(piece.share);
        float* out = sums_of(piece.group, 32 * pair);
        for (int r = 0; r < 32; ++r, out += kLanes) {
            const Ints sum = (load<Ints>(found.high[r]) << 8) + load<Ints>(found.low[r]);
            store(out, load(out) * kept + __builtin_convertvector(sum, Floats) * share);
        }
    }

    // --- after the context -------------------------------------------------------------------------------------------

    template <class A>
    void finish(const A& a, const Block& b) {
        window.attend(a, b, [&](int group) { return asked_of(group); }, floats);
        const Half& half = a.layer.value[b.head];
        const int groups = groups_of(b), depth = static_cast<int>(ceil_div(half.latents, kDepth));
        for (int group = 0; group < groups; ++group) join_sums(a, half, group, depth);
        for (int group = 0; group < groups; ++group)
            for (int d = 0; d < dim; d += kProductRows)
                multiply(synthesis_from(half, d), latents_of(group), depth, floats_of(group) + d * kLanes);
        for (int group = 0; group < groups; ++group) put_out(a, b, group);
    }

    // The context, position 0 and the exact window: latents for the last product, and all else to begin it with.
    template <class A>
    void join_sums(const A& a, const Half& half, int group, int depth) {
        const int row = group * kLanes;
        const Floats tops[] = {load(top + row), load(first + row), load(window.top + row)};
        const Floats all = larger(larger(tops[0], tops[1]), tops[2]);
        Floats share[3];
        each<3>([&](auto i) KV_LAMBDA { share[i] = tops[i] > kNever ? exp2_below(tops[i] - all) : Floats{}; });
        Floats on_stored = load(weight + row) * share[0];
        const Floats inverse = 1.0f / (on_stored + share[1] + load(window.weight + row) * share[2]);
        each<3>([&](auto i) KV_LAMBDA { share[i] *= inverse; });
        on_stored *= inverse;
        float* out = floats_of(group);
        for (int d = 0; d < dim; ++d)
            store(out + d * kLanes,
                  load(out + d * kLanes) * share[2] + on_stored * half.mean[d] + share[1] * half.sink[d]);
        uint16_t* to = latents + group * 2 * value_pairs * kTileNumbers;
        for (int r = 0; r < depth * kDepth; r += 2, to += kDepth) {
            Floats sum[2];
            each<2>([&](auto i) KV_LAMBDA {
                sum[i] = load(sums_of(group, r + i)) * share[0];
                if (from_start && r + i < half.latents) sum[i] += a.w.first_value[r + i] * share[1];
            });
            split_parts(sum[0], sum[1], to, to + value_pairs * kTileNumbers);
        }
    }

    template <class A>
    void put_out(const A& a, const Block& b, int group) {
        for (int d = 0; d < dim; d += 16)
            turn(floats_of(group) + d * kLanes, 64, [&](int lane) KV_LAMBDA { return turned + lane * wide + d; });
        for (int row = group * kLanes; row < b.rows && row < (group + 1) * kLanes; ++row)
            a.put_out(b, row, turned + row % kLanes * wide);
    }
};

}  // namespace
}  // namespace kvsplice
