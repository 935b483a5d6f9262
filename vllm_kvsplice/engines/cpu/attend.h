// Attention, but for what differs between instruction sets: `Isa` unpacks codes and multiplies integers.
//
// Nothing that a row computes depends on the rows beside it, on threads, or on how its sequence was cut into steps: tiles
// and splits lie at absolute positions and are added up in order, so answers are the same to the last bit. But for one
// thing: where an `Isa` has a way of its own for many rows, whether a row is one of many.
//
// An `Isa` has:
//     kRows              query rows that share what is unpacked
//     kFewRows, Prompt   blocks of more rows than these are its own, from queries to outputs; `Nobody` where there is none
//     kQuads             the order of a tile's tokens in scores: false as they are, true with its 4 x 4 quads transposed
//     Session            what a thread holds while it attends
//     pack_query         16-bit numbers of a row, as its score_latents reads them; 2 bytes each
//     pack_probability   15-bit numbers of a tile, as its sum_values reads them; 2 bytes each
//     key_places, value_places   16-bit places of memory that the next two want for heads of so many latents
//     score_latents      adds unit * (sum of products of queries and keys) to the rows' scores of a split
//     sum_values         sums of products of probabilities and values over a split, [rows, stride]
#pragma once

#include "means.h"
#include "window.h"

namespace kvsplice {
namespace {

// How many rows before a query is read its memory is asked for.
constexpr int kRowsAhead = 8;
constexpr float kLog2E = 1.4426950408889634f;

struct Nobody {
    template <class A>
    void lay_out(char*&, const A&) {}
};

template <class Isa>
struct Attention {
    static constexpr int kRows = Isa::kRows, kFewRows = Isa::kFewRows;

    const Step& step;
    const Layer& layer;
    Workspace<kRows> w;
    Means<Isa> means;
    ExactWindow window;
    typename Isa::Prompt prompt;
    const Block* next = nullptr;
    int dim, key_latents, value_latents, state_size, partial_size;

    explicit Attention(const Step& s) : step(s), layer(*s.layer), means(layer), dim(s.layer->dim) {
        key_latents = value_latents = 0;
        int64_t planes = 0;
        for (int h = 0; h < layer.heads; ++h) {
            key_latents = most(key_latents, layer.key[h].latents);
            value_latents = most(value_latents, layer.value[h].latents);
            planes = most(planes, most(plane_count(layer.key[h]), plane_count(layer.value[h])));
        }
        state_size = sizeof(State) / sizeof(float) + round_up(value_latents, 16) + round_up(dim, 16);
        partial_size = partial_size_of(layer);
        char* at = nullptr;
        lay_out(at, planes);
        at = static_cast<char*>(scratch(reinterpret_cast<size_t>(at)));
        lay_out(at, planes);
    }

    void lay_out(char*& at, int64_t planes) {
        place(at, w.query, kFewRows * round_up(dim, 16));
        place(at, w.absorbed, kFewRows * round_up(key_latents, 16));
        place(at, w.scores, kFewRows * kSplit);
        place(at, w.partial, kFewRows * partial_size);
        place(at, w.state, kFewRows * state_size);
        place(at, w.first_key, round_up(key_latents, 16));
        place(at, w.first_value, round_up(value_latents, 16));
        place(at, w.quantised, kFewRows * round_up(key_latents, 64));
        place(at, w.probability, kFewRows * kSplit);
        place(at, w.unpacked, most(Isa::key_places(key_latents), Isa::value_places(value_latents)));
        place(at, w.sums, kFewRows * round_up(value_latents, 64));
        place(at, w.tiles, kSplit * planes);
        means.lay_out(at);
        window.lay_out(at, *this);
        prompt.lay_out(at, *this);
    }

    static int64_t plane_count(const Half& half) {
        if (!half.group_count) return 0;
        const Group& last = half.groups[half.group_count - 1];
        return last.plane + last.width - half.groups[0].plane;
    }

    // What a row keeps of some splits: top, weight and latents.
    static int partial_size_of(const Layer& layer) {
        int latents = 0;
        for (int h = 0; h < layer.heads; ++h) latents = most(latents, layer.value[h].latents);
        return static_cast<int>(round_up(latents, 32)) + 2;
    }

    State& state(int row) { return *reinterpret_cast<State*>(w.state + row * state_size); }
    float* exact(int row) { return state(row).latents() + round_up(value_latents, 16); }
    const int32_t* table(const Block& b) const { return step.table + b.sequence * step.table_stride; }

    // --- before the context ------------------------------------------------------------------------------------------

    // `split` is the first that this thread reads.
    void prepare(const Block& b, int split) {
        const Half& half = layer.key[b.head];
        const int64_t first_query = b.context - b.queries;
        for (int row = 0; row < b.rows; ++row) {
            w.last[row] = first_query + (b.first + row) / step.group;
            w.begin[row] = w.last[row] + 1 - step.window.size;
            if (step.window.size && step.window.whole_chunk) w.begin[row] = least(w.begin[row], first_query);
            w.stored[row] = most<int64_t>(0, w.begin[row]);
        }
        if constexpr (kRows > kFewRows)
            if (b.rows > kFewRows) return prompt.prepare(*this, b);
        ask_ahead(b, split);
        for (int row = 0; row < b.rows; ++row) {
            float* q = w.query + row * round_up(dim, 16);
            load_row(step.query.data, step.query.dtype, find_query(b, row), dim, q);
            for (int d = 0; d < dim; ++d) q[d] *= step.scale * kLog2E;
            means.prepare(half, row, q);
        }
        multiply(w.query, round_up(dim, 16), dim, half.synthesis, half.latents, w.absorbed, round_up(key_latents, 16),
                 b.rows);
        for (int row = 0; row < b.rows; ++row) quantise(half, row);
    }

    // What few rows read first comes while their queries are absorbed: a split's first tile and up to a tile of exact tokens.
    void ask_ahead(const Block& b, int split) const {
        const int64_t position = static_cast<int64_t>(split) * kSplit;
        for (const Half* half : {layer.key + b.head, layer.value + b.head}) {
            if (!half->group_count || position >= b.context) continue;
            ask_planes(page_of(b, *half, position), plane_count(*half), step.pages.block);
        }
        const Window& exact = step.window;
        const int64_t begin = most<int64_t>(0, w.begin[0]), end = least(begin + kTile, w.last[b.rows - 1] + 1);
        for (int64_t i = begin; exact.size && i < end; ++i)
            ask_row(ExactWindow::find(exact, b, i), exact.dtype, i % exact.block * 2 * dim, 2 * dim);
    }

    // A row's token in the step, and its query head.
    int64_t token_of(const Block& b, int row) const { return b.query + (b.first + row) / step.group; }
    int64_t head_of(const Block& b, int row) const { return b.head * step.group + (b.first + row) % step.group; }

    // Where a row's query begins. Tokens lie far apart, so nobody else asks for the next ones in time: a tenth of a short
    // prompt's time.
    int64_t find_query(const Block& b, int row) const {
        const int64_t at = token_of(b, row) * step.query.token_stride + head_of(b, row) * step.query.head_stride,
                      ahead = kRowsAhead / step.group + 1;
        ask_row(step.query.data, step.query.dtype, at + ahead * step.query.token_stride, dim);
        return at;
    }

    void put_out(const Block& b, int row, const float* output) const {
        const int64_t at = token_of(b, row) * step.output_token_stride + head_of(b, row) * dim;
        store_row(output, step.output_dtype, at, dim, step.output);
    }

    // Rows by one of a codec's matrices, in columns of kColumns.
    static void multiply(const float* rows, int64_t stride, int count, const float* matrix, int width, float* out,
                         int64_t out_stride, int row_count) {
        for (int d = 0; d < width; d += kColumns) {
            const int columns = least(kColumns, width - d);
            combine({rows, stride, count, matrix + d * count, columns, columns, out + d, out_stride}, row_count);
        }
    }

    // An absorbed query in 16 bits.
    void quantise(const Half& half, int row) {
        float* absorbed = w.absorbed + row * round_up(key_latents, 16);
        if (half.latents % 16) store(absorbed + half.latents, HalfFloats{});
        Floats sizes = splat(0);
        for (int r = 0; r < half.latents; r += 16)
            sizes = larger(sizes, larger(load(absorbed + r), -load(absorbed + r)));
        const float size = largest(sizes);
        const float inverse = size > 0 ? kWhole / size : 0;
        int16_t rounded[kMaxDim];
        int32_t total = 0;
        for (int r = 0; r < half.latents; ++r) {
            rounded[r] = static_cast<int16_t>(__builtin_rintf(absorbed[r] * inverse));
            total += rounded[r];
        }
        w.unit[row] = size / kWhole;
        w.offset[row] = Isa::kKeyOffset * total;
        const int64_t stride = round_up(key_latents, 64);
        Isa::pack_query(rounded, half.latents, stride, w.quantised + row * stride);
    }

    // Position 0 has the sink in place of its mean and latents in units of its own, so it is a softmax of its own, in float.
    void start(const Block& b) {
        const Half &key = layer.key[b.head], &value = layer.value[b.head];
        load_first(b);
        for (int row = 0; row < b.rows; ++row) {
            State& s = state(row);
            std::memset(&s, 0, state_size * sizeof(float));
            s.top = kNever;
            if (w.stored[row] == 0) continue;
            const float *q = w.query + row * round_up(dim, 16),
                        *absorbed = w.absorbed + row * round_up(key_latents, 16);
            s.top = sum_of(products(q, key.sink, dim) + products(absorbed, w.first_key, key.latents));
            s.total = s.on_sink = 1;
            std::memcpy(s.latents(), w.first_value, value.latents * sizeof(float));
        }
    }

    // Position 0's latents, where some row reads them.
    bool load_first(const Block& b) {
        bool read = false;
        for (int row = 0; row < b.rows; ++row) read |= w.stored[row] > 0;
        if (!read) return false;
        const uint8_t* page = step.pages.data + table(b)[0] * step.pages.block_stride;
        first_levels(layer.key[b.head], page, w.first_key);
        first_levels(layer.value[b.head], page, w.first_value);
        return true;
    }

    void first_levels(const Half& half, const uint8_t* page, float* levels) {
        for (int g = 0; g < half.group_count; ++g, levels += 8) {
            const Group& group = half.groups[g];
            const uint8_t* byte = page + group.plane * step.pages.block;
            uint64_t codes = 0;
            for (int bits = 8, low = 0; bits; bits /= 2) {
                if (group.width - low < bits) continue;
                uint64_t packed = 0;
                for (int i = 0; i < bits; ++i, byte += step.pages.block)
                    packed |= static_cast<uint64_t>(*byte) << 8 * i;
                codes |= spread(packed, bits) << low;
                low += bits;
            }
            for (int i = 0; i < 8; ++i) {
                const int code = codes >> 8 * i & 0xff, level = group.width == 8 ? code - 128 : group.levels[code];
                levels[i] = static_cast<float>(level) * half.sink_scale[8 * g + i];
            }
        }
    }

    // --- the stored context ------------------------------------------------------------------------------------------

    const uint8_t* page_of(const Block& b, const Half& half, int64_t position) const {
        const int block = step.pages.block;
        return step.pages.data + table(b)[position / block] * step.pages.block_stride + half.groups[0].plane * block +
               position % block;
    }

    // Where block sizes hold no whole tile: gather one, 16 tokens at a time. What lies past the sequence stays unread.
    const uint8_t* gathered(const Block& b, const Half& half, int64_t position, uint8_t* to) const {
        const int64_t count = plane_count(half);
        for (int64_t t = 0; t < kTile && position + t < b.context; t += 16) {
            const uint8_t* from = page_of(b, half, position + t);
            for (int64_t c = 0; c < count; ++c) std::memcpy(to + c * kTile + t, from + c * step.pages.block, 16);
        }
        return to;
    }

    // The first `count` tiles of a split, and what is to be asked for: the next split's, or after a sequence's last split the
    // first of the block that this thread probably takes next.
    Tiles tiles_of(const Block& b, bool key, int split, int count) const {
        const Half& half = (key ? layer.key : layer.value)[b.head];
        const bool whole = step.pages.block % kTile == 0;
        Tiles found{{}, {}, whole ? step.pages.block : kTile, count};
        const int64_t base = static_cast<int64_t>(split) * kSplit;
        for (int t = 0; t < count; ++t)
            found.data[t] = whole ? page_of(b, half, base + t * kTile)
                                  : gathered(b, half, base + t * kTile, w.tiles + t * kTile * plane_count(half));
        if (!whole) return found;
        const bool ended = split + 1 >= b.splits;
        const Block* ahead = ended ? next : &b;
        if (!ahead) return found;
        const Half& other = (key ? layer.key : layer.value)[ahead->head];
        for (int t = 0; t < count && other.group_count; ++t) {
            const int64_t position = (ended ? 0 : base + kSplit) + t * kTile;
            if (position < ahead->context) found.next[t] = page_of(*ahead, other, position);
        }
        return found;
    }

    // Tiles of a split that some row reads.
    int tiles_in(const Block& b, int split) const {
        int64_t end = 0;
        for (int row = 0; row < b.rows; ++row) end = most(end, w.stored[row]);
        return static_cast<int>(
            least<int64_t>(kSplitTiles, ceil_div(end - static_cast<int64_t>(split) * kSplit, kTile)));
    }

    // One split of 512 positions: top, weight and latents of every row, into `partial` [rows, partial_size].
    void attend_split(const Block& b, int split, float* partial) {
        const int tiles = tiles_in(b, split);
        means.score(b.rows, split, tiles, w.scores);
        score_latents(b, split, tiles);
        for (int row = 0; row < b.rows; ++row) soften(row, static_cast<int64_t>(split) * kSplit, tiles);
        sum_values(b, split, tiles, partial);
    }

    void score_latents(const Block& b, int split, int tiles) {
        const Half& half = layer.key[b.head];
        if (!half.group_count) return;
        Isa::score_latents(half, tiles_of(b, true, split, tiles),
                           {w.quantised, round_up(key_latents, 64), w.unit, w.offset, b.rows}, w.unpacked, w.scores);
    }

    // From scores to 15-bit probabilities relative to the row's largest of this split.
    void soften(int row, int64_t base, int tiles) {
        float* scores = w.scores + row * kSplit;
        int16_t* probability = w.probability + row * kSplit;
        // Position 0 is not here (`start`).
        const int from = base == 0, until = static_cast<int>(least<int64_t>(kSplit, w.stored[row] - base));
        w.top[row] = kNever;
        w.weight[row] = 0;
        if (until <= from) {
            std::memset(probability, 0, kSplit * sizeof(int16_t));
            return;
        }
        for (int tile = 0; tile < tiles; ++tile) {
            if (tile * kTile >= from && (tile + 1) * kTile <= until) continue;
            for (int t = 0; t < kTile; t += 16) {
                const Ints token = load<Ints>(kOrder<Isa>.token + t) + tile * kTile;
                float* at = scores + tile * kTile + t;
                store(at, (token >= from) & (token < until) ? load(at) : splat(kNever));
            }
        }
        Register tops[4];
        each<4>([&](auto i) KV_LAMBDA { tops[i] = load<Register>(scores + kRegister * i); });
        for (int t = 4 * kRegister; t < tiles * kTile; t += 4 * kRegister)
            each<4>([&](auto i) KV_LAMBDA { tops[i] = larger(tops[i], load<Register>(scores + t + kRegister * i)); });
        w.top[row] = largest(larger(larger(tops[0], tops[1]), larger(tops[2], tops[3])));
        const float top = w.top[row];
        Wholes total{};
        for (int tile = 0; tile < tiles; ++tile) {
            Wholes rounded[kTile / kRegister];
            each<kTile / kRegister>([&](auto i) KV_LAMBDA {
                const Register p = exp2_below(load<Register>(scores + tile * kTile + kRegister * i) - top);
                rounded[i] = __builtin_convertvector(p * 32767.0f + 0.5f, Wholes);
                total += rounded[i];
            });
            Isa::pack_probability(rounded, probability, tile);
        }
        int32_t lanes[kRegister], weight = 0;
        store(lanes, total);
        for (int32_t x : lanes) weight += x;
        w.weight[row] = static_cast<float>(weight) * (1 / 32767.0f);
    }

    void sum_values(const Block& b, int split, int tiles, float* partial) {
        const Half& half = layer.value[b.head];
        for (int row = 0; row < b.rows; ++row) {
            partial[row * partial_size] = w.top[row];
            partial[row * partial_size + 1] = w.weight[row];
        }
        if (!half.group_count) return;
        const int64_t stride = round_up(value_latents, 64);
        Isa::sum_values(half, tiles_of(b, false, split, tiles), w.probability, b.rows, w.unpacked, w.sums, stride);
        for (int row = 0; row < b.rows; ++row)
            for (int r = 0; r < half.latents; r += 16)
                store(partial + row * partial_size + 2 + r,
                      __builtin_convertvector(load<Ints>(w.sums + row * stride + r), Floats) * (1 / 32767.0f));
    }

    void merge(const Block& b, const float* partial) {
        const int latents = layer.value[b.head].latents;
        for (int row = 0; row < b.rows; ++row, partial += partial_size) {
            if (partial[1] == 0) continue;
            State& s = state(row);
            const float share = rescale(row, partial[0]);
            s.total += partial[1] * share;
            s.on_stored += partial[1] * share;
            for (int r = 0; r < latents; r += 16)
                store(s.latents() + r, load(s.latents() + r) + load(partial + 2 + r) * share);
        }
    }

    // Bring a row's state to the maximum of its own and `top`; what stood at `top` counts by the returned factor.
    float rescale(int row, float top) {
        State& s = state(row);
        if (top <= s.top) return __builtin_exp2f(top - s.top);
        const float kept = __builtin_exp2f(s.top - top);
        float* sums = &s.total;
        for (int i = 0; i < state_size - 1; ++i) sums[i] *= kept;
        s.top = top;
        return 1;
    }

    // --- after the context -------------------------------------------------------------------------------------------

    void finish(const Block& b) {
        if (step.window.size) window.attend(*this, b);
        const Half& half = layer.value[b.head];
        // Queries are done with: their place takes the outputs.
        multiply(state(0).latents(), state_size, half.latents, half.synthesis, dim, w.query, round_up(dim, 16), b.rows);
        for (int row = 0; row < b.rows; ++row) {
            State& s = state(row);
            float* output = w.query + row * round_up(dim, 16);
            const float inverse = 1 / s.total;
            const float* read = exact(row);
            for (int d = 0; d < dim; ++d)
                output[d] = (output[d] + read[d] + s.on_stored * half.mean[d] + s.on_sink * half.sink[d]) * inverse;
            put_out(b, row, output);
        }
    }
};

}  // namespace
}  // namespace kvsplice
