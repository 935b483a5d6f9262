// Many query rows with AMX: prompts, and decoding with more than eight query heads per KV head.
//
// Everything stands on its side, sixteen query rows in the lanes of a register, so that softmax needs nothing from across:
//
//     scores [tokens, 16]  = keys x queries              either as `amx_absorbed.h` or as `amx_rebuilt.h` has them
//     sums   [latents, 16] = values x probabilities      two bytes of a probability, one of a value
//
// Absorbed queries, the exact window and outputs are products of bfloat16 numbers, or sums of two (`amx.h`).
#pragma once

#include "amx_rebuilt.h"
#include "amx_window.h"

namespace kvsplice {
namespace {

// Bytes between latents of a split's values: 512 would put all of them into the same few sets of the first cache.
constexpr int kValueRow = kSplit + 64;

// Rows of a block in groups of sixteen. Bytes from the right lie as tiles: [high, low][16][16 rows][4].
struct AmxPrompt {
    static constexpr int kGroups = AmxQueries::kGroups;
    // Pieces of two turns.
    static constexpr int kSlots = 2 * RebuiltKeys::kAtOnce;

    // A group's rows and a split.
    struct Piece {
        alignas(64) int32_t until[kLanes];   // tokens end that a row reads
        float largest[kLanes];               // its largest score
        float units[kLanes], shift[kLanes];  // 2048ths below the largest: units * score + shift
        float kept[kLanes], share[kLanes];   // of what was read before, and of this
        int group, first, tiles;             // tiles that some row reads
        bool whole;                          // every row reads every token
    };

    bool from_start;  // some row reads position 0
    bool rebuilds;    // of the block's keys
    int dim, wide;    // D, and rounded up to a product's rows
    int value_pairs;
    AmxQueries queries;
    AbsorbedKeys absorbed;
    RebuiltKeys rebuilt;
    Worth worth;
    int8_t* values;          // [latents, kValueRow]
    float* scores;           // [slots, kSplit, 16]
    uint8_t* probabilities;  // [slots, kSplit / 64] of tiles
    Products* products;      // of a step, then of pairs of values' tiles
    Piece* pieces;
    float* sums;        // [groups, latents, 16 rows], relative to 2^top
    uint16_t* latents;  // the same of all that was read, in bfloat16: [2, value pairs] of a group's tiles
    float* floats;      // [groups, wide, 16 rows]: the exact window's sums, then outputs
    float top[kManyRows], weight[kManyRows];
    int32_t stored[kManyRows];
    AmxWindow window;

    static int most_rows(const Step& step) {
        return RebuiltKeys::suits(step) ? RebuiltKeys::kRows : AbsorbedKeys::kRows;
    }

    template <class A>
    void lay_out(char*& at, const A& a) {
        dim = a.dim;
        wide = static_cast<int>(round_up(dim, kProductRows));
        value_pairs = static_cast<int>(ceil_div(a.value_latents, 32));
        queries.lay_out(at, a);
        absorbed.lay_out(at, a);
        rebuilt.lay_out(at, a);
        place(at, values, value_pairs * 32 * kValueRow);
        place(at, scores, kSlots * kSplit * kLanes);
        place(at, probabilities, kSlots * kSplit / 64 * 2 * kTileBytes);
        place(at, products, 1 + value_pairs * RebuiltKeys::kAtOnce);
        place(at, pieces, kGroups);
        place(at, sums, kGroups * value_pairs * 32 * kLanes);
        place(at, latents, 2 * value_pairs * kTileNumbers);
        place(at, floats, kGroups * wide * kLanes);
        window.lay_out(at, a);
    }

    float* sums_of(int group, int latent) const { return sums + (group * value_pairs * 32 + latent) * kLanes; }
    float* floats_of(int group) const { return floats + group * wide * kLanes; }
    static int groups_of(const Block& b) { return static_cast<int>(ceil_div(b.rows, kLanes)); }

    // --- before the context ------------------------------------------------------------------------------------------

    template <class A>
    void prepare(A& a, const Block& b) {
        from_start = a.load_first(b);
        rebuilds = b.rows >= RebuiltKeys::kWorth && RebuiltKeys::suits(a.step);
        for (int row = 0; row < groups_of(b) * kLanes; ++row)
            stored[row] = row < b.rows ? static_cast<int32_t>(a.w.stored[row]) : 0;
        queries.load(a, b);
        if (rebuilds)
            rebuilt.prepare(a, b, queries, from_start, worth);
        else
            absorbed.prepare(a, b, queries, from_start, worth);
    }

    // --- the stored context ------------------------------------------------------------------------------------------

    // Splits `first` to `last`.
    template <class A>
    void attend(const A& a, const Block& b, int first, int last) {
        clear(b);
        for (int split = first; split < last; ++split) attend_split(a, b, split, a.tiles_in(b, split));
    }

    void clear(const Block& b) {
        for (int row = 0; row < groups_of(b) * kLanes; ++row) top[row] = kNever;
        std::memset(weight, 0, groups_of(b) * kLanes * sizeof(float));
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
        const Half& value = a.layer.value[b.head];
        if (value.group_count) unpack_values(value, a.tiles_of(b, false, split, tiles));
        const int count = pieces_of(static_cast<int64_t>(split) * kSplit, groups_of(b));
        const auto run_with = [&](auto& keys) {
            keys.begin(a, b, split, tiles);
            run(keys, count, tiles);
        };
        rebuilds ? run_with(rebuilt) : run_with(absorbed);
    }

    void unpack_values(const Half& half, const Tiles& tiles) {
        for (int g = 0; g < half.group_count; ++g)
            Avx512::unpack_values(half, g, tiles, 0, tiles.count, values + g * 8 * kValueRow, kValueRow);
    }

    // Groups of which some row reads a split: from one on all, because later rows read more.
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
            const int end = least(kSplit, _mm512_reduce_max_epi32((__m512i)until));
            piece.tiles = static_cast<int>(ceil_div(end, kTile));
            count += end > piece.first;
        }
        return count;
    }

    // A turn takes kAtOnce pieces, and while they are softened the next turn's keys and the last one's values are multiplied:
    // the unit never sleeps.
    template <class Keys>
    void run(const Keys& keys, int count, int tiles) {
        constexpr int kStep = Keys::kStep, N = Keys::kAtOnce;
        const int steps = tiles * kTile / kStep, turns = static_cast<int>(ceil_div(count, N));
        const auto piece_of = [&](int turn, int n) {
            return turn >= 0 && turn * N + n < count ? pieces + turn * N + n : nullptr;
        };
        for (int i = -1; i <= turns; ++i) {
            Piece *next[N], *now[N], *last[N];
            each<N>([&](auto n) KV_LAMBDA {
                next[n] = piece_of(i + 1, n);
                now[n] = piece_of(i, n);
                last[n] = piece_of(i - 1, n);
            });
            const int slot = (i & 1) * N, other = N - slot;
            Floats largest[N];
            Ints total[N];
            each<N>([&](auto n) KV_LAMBDA {
                if (now[n]) level(*now[n]);
                largest[n] = splat(kNever);
                total[n] = Ints{};
            });
            for (int step = 0; step < steps; ++step) {
                const int first = value_pairs * step / steps, until = value_pairs * (step + 1) / steps;
                const int token = step * kStep;
                const Piece* longest = next[N - 1] ? next[N - 1] : next[0];
                const bool scored = longest && token < longest->tiles * kTile;
                if (scored) keys.multiply_tokens(queries, next[0]->group, token, products[0]);
                for (int pair = first; pair < until; ++pair)
                    each<N>([&](auto n) KV_LAMBDA {
                        if (last[n]) multiply_values(*last[n], other + n, pair, products[1 + (pair - first) * N + n]);
                    });
                each<N>([&](auto n) KV_LAMBDA {
                    if (now[n] && token < now[n]->tiles * kTile) total[n] += soften<kStep>(*now[n], slot + n, token);
                });
                each<N>([&](auto n) KV_LAMBDA {
                    if (scored && next[n])
                        largest[n] = larger(largest[n], join<Keys, n>(*next[n], other + n, token, products[0]));
                });
                for (int pair = first; pair < until; ++pair)
                    each<N>([&](auto n) KV_LAMBDA {
                        if (last[n]) add_values(*last[n], pair, products[1 + (pair - first) * N + n]);
                    });
            }
            each<N>([&](auto n) KV_LAMBDA {
                if (next[n]) store(next[n]->largest, largest[n]);
                if (now[n]) weigh(*now[n], total[n]);
            });
        }
    }

    // Brings a group to the maximum of what it has read and a piece.
    void level(Piece& piece) {
        const int row = piece.group * kLanes;
        const Floats largest = load(piece.largest), units = load(worth.unit + row), here = units * largest;
        store(piece.units, units * -2048.0f);
        const Ints read = largest > kNever;
        store(piece.shift, read ? here * 2048.0f : splat(65535));
        const Floats found = read ? here + load(worth.constant + row) : splat(kNever);
        const Floats old = load(top + row), all = larger(old, found);
        store(top + row, all);
        store(piece.kept, exp2_below(old - all));
        store(piece.share, exp2_below(found - all) * (1 / 32768.0f));
    }

    void weigh(const Piece& piece, Ints total) {
        float* at = weight + piece.group * kLanes;
        store(at, load(at) * load(piece.kept) + __builtin_convertvector(total, Floats) * load(piece.share));
    }

    // Scores of some tokens; returns each row's largest.
    template <class Keys, int N>
    KV_INLINE Floats join(const Piece& piece, int slot, int token, const Products& found) {
        return piece.whole ? join<Keys, N, false>(piece, slot, token, found)
                           : join<Keys, N, true>(piece, slot, token, found);
    }

    template <class Keys, int N, bool kMasked>
    KV_INLINE Floats join(const Piece& piece, int slot, int token, const Products& found) {
        Floats largest[4];
        each<4>([&](auto i) KV_LAMBDA { largest[i] = splat(kNever); });
        float* out = scores + (slot * kSplit + token) * kLanes;
        for (int t = 0; t < Keys::kStep; t += 4)
            each<4>([&](auto i) KV_LAMBDA {
                Floats score = Keys::score(found, N, t + i);
                if constexpr (kMasked) {
                    const Ints at = Ints{} + (token + t + i);
                    score = (at >= piece.first) & (at < load<Ints>(piece.until)) ? score : splat(kNever);
                }
                largest[i] = larger(largest[i], score);
                store(out + (t + i) * kLanes, score);
            });
        return larger(larger(largest[0], largest[1]), larger(largest[2], largest[3]));
    }

    // From scores to 15-bit probabilities relative to the piece's largest; returns their sums.
    template <int kStep>
    KV_INLINE Ints soften(const Piece& piece, int slot, int token) {
        return piece.whole ? soften<kStep, false>(piece, slot, token) : soften<kStep, true>(piece, slot, token);
    }

    template <int kStep, bool kMasked>
    KV_INLINE Ints soften(const Piece& piece, int slot, int token) {
        const Floats units = load(piece.units), shift = load(piece.shift);
        const float* score = scores + (slot * kSplit + token) * kLanes;
        uint8_t* out = probabilities + (slot * kSplit + token) / 64 * 2 * kTileBytes + token % 64 / 4 * 64;
        const __m512i ones = _mm512_set1_epi8(1);
        __m512i high = _mm512_setzero_si512(), low = high;
        for (int t = 0; t < kStep; t += 4, out += 64) {
            Ints below[4];
            each<4>([&](auto i) KV_LAMBDA {
                const Floats x = load(score + (t + i) * kLanes);
                below[i] = rounded(x * units + shift);
                if constexpr (kMasked) below[i] = x > kNever ? below[i] : Ints{} + 0xFFFF;
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
    KV_INLINE void multiply_values(const Piece& piece, int slot, int pair, Products& found) {
        const int8_t* value = values + pair * 32 * kValueRow;
        const uint8_t* probability = probabilities + slot * kSplit / 64 * 2 * kTileBytes;
        zero_sums();
        for (int t = 0; t < piece.tiles; ++t, value += 64, probability += 2 * kTileBytes) {
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
            const Ints sum = (load<Ints>(found.sums[r]) << 8) + load<Ints>(found.sums[32 + r]);
            store(out, load(out) * kept + __builtin_convertvector(sum, Floats) * share);
        }
    }

    // --- after the context -------------------------------------------------------------------------------------------

    template <class A>
    void finish(const A& a, const Block& b) {
        window.attend(a, b, [&](int group) { return queries.columns(group); }, floats);
        const Half& half = a.layer.value[b.head];
        const int depth = static_cast<int>(ceil_div(half.latents, kDepth));
        for (int group = 0; group < groups_of(b); ++group) {
            join_sums(a, half, group, depth);
            for (int d = 0; d < dim; d += kProductRows)
                multiply(synthesis_from(half, d), {latents, value_pairs * kTileNumbers, 2}, depth,
                         floats_of(group) + d * kLanes);
            put_out(a, b, group);
        }
    }

    // The context, position 0 and the exact window: latents for the last product, and all else to begin it with.
    template <class A>
    void join_sums(const A& a, const Half& half, int group, int depth) {
        const int row = group * kLanes;
        const Floats first = load<Ints>(stored + row) > 0 ? load(worth.first + row) : splat(kNever);
        const Floats tops[] = {load(top + row), first, load(window.top + row)};
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
        uint16_t* to = latents;
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
        float* rows = queries.turned;
        for (int d = 0; d < dim; d += 16)
            turn(floats_of(group) + d * kLanes, 64, [&](int lane) KV_LAMBDA { return rows + lane * wide + d; });
        for (int row = group * kLanes; row < b.rows && row < (group + 1) * kLanes; ++row)
            a.put_out(b, row, rows + row % kLanes * wide);
    }
};

}  // namespace
}  // namespace kvsplice
