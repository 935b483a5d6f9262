// Who does what: a step's blocks of query rows, and the threads that share them.
#pragma once

#include "attend.h"

namespace kvsplice {
namespace {

// Splits times rows times dimensions: below a few microseconds of work, waking threads costs more than it saves.
constexpr int64_t kWorthThreads = 512;

// Of a partial result.
inline int64_t padded_rows(const Block& b) { return round_up(b.rows, 16); }

struct Plan {
    Block* blocks;
    int count;
    int64_t range;  // splits a task takes at most
    int64_t tasks;
    int64_t partial_rows;  // in all blocks that several threads share
};

// Query rows of a block at most.
template <class Isa>
int most_rows_of(const Step& step) {
    if constexpr (Isa::kRows > Isa::kFewRows) return Isa::Prompt::most_rows(step);
    return Isa::kRows;
}

// A block that several threads share keeps one partial result of every row a split, or a range of splits where an `Isa` has
// its own way; whoever finishes last merges them in order.
inline Plan plan(const Step& step, int most_rows, Block* blocks, int& threads) {
    Plan made{blocks, 0, 0, 0, 0};
    int64_t splits = 0, work = 0;
    // Head by head, so that its matrices are at hand for the next sequence.
    for (int h = 0; h < step.layer->heads; ++h)
        for (int s = 0; s < step.sequences; ++s) {
            const int64_t queries = step.query_start[s + 1] - step.query_start[s], rows = queries * step.group;
            const int64_t context = step.seq_lens[s];
            // As few blocks as may be, and those alike.
            const int64_t count = most<int64_t>(1, ceil_div(rows, most_rows)),
                          even = round_up(ceil_div(rows, count), 16);
            for (int64_t first = 0; first < rows; first += even) {
                Block b{};
                b.sequence = s;
                b.head = h;
                b.first = static_cast<int>(first);
                b.rows = static_cast<int>(least<int64_t>(even, rows - first));
                b.query = step.query_start[s];
                b.context = context;
                b.queries = queries;
                int64_t stored = context - queries + (first + b.rows - 1) / step.group + 1 - step.window.size;
                if (step.window.size && step.window.whole_chunk) stored = least(stored, context - queries);
                b.splits = static_cast<int>(ceil_div(most<int64_t>(0, stored), kSplit));
                splits += b.splits;
                work += static_cast<int64_t>(b.splits + 1) * b.rows * step.layer->dim;
                blocks[made.count++] = b;
            }
        }
    if (work < kWorthThreads) threads = 1;
    // Eight tasks a thread even out what blocks of different lengths leave idle.
    made.range = threads > 1 ? most<int64_t>(1, ceil_div(splits, 8 * threads)) : INT32_MAX;
    for (int i = 0; i < made.count; ++i) {
        Block& b = blocks[i];
        b.ranges = b.pending = static_cast<int>(most<int64_t>(1, ceil_div(b.splits, made.range)));
        b.partials = made.partial_rows;
        if (b.ranges > 1) made.partial_rows += b.splits * padded_rows(b);
        made.tasks += b.ranges;
    }
    return made;
}

template <class Isa>
void run_task(Attention<Isa>& a, Block& b, int range, int64_t length, float* partials) {
    const int first = static_cast<int>(range * length),
              last = static_cast<int>(least<int64_t>(b.splits, first + length));
    const bool shared = b.ranges > 1;
    const auto partial = [&](int part) {
        return shared ? partials + (b.partials + part * padded_rows(b)) * a.partial_size : a.w.partial;
    };
    const auto unfinished = [&] { return shared && __atomic_sub_fetch(&b.pending, 1, __ATOMIC_ACQ_REL); };
    a.prepare(b, first);
    if constexpr (Isa::kRows > Isa::kFewRows)
        if (b.rows > Isa::kFewRows) {
            a.prompt.attend(a, b, first, last);
            if (shared) a.prompt.save(b, partial(range));
            if (unfinished()) return;
            if (shared) a.prompt.clear(b);
            for (int part = 0; shared && part < b.ranges; ++part) a.prompt.merge(b, partial(part));
            return a.prompt.finish(a, b);
        }
    if (!shared) a.start(b);
    for (int split = first; split < last; ++split) {
        a.attend_split(b, split, partial(split));
        if (!shared) a.merge(b, partial(split));
    }
    if (unfinished()) return;
    if (shared) a.start(b);
    for (int part = 0; shared && part < b.splits; ++part) a.merge(b, partial(part));
    a.finish(b);
}

template <class Isa>
void attend(const Step& step) {
    const int most_rows = most_rows_of<Isa>(step);
    int64_t capacity = 0;
    for (int s = 0; s < step.sequences; ++s)
        capacity +=
            step.layer->heads *
            ceil_div(static_cast<int64_t>(step.query_start[s + 1] - step.query_start[s]) * step.group, most_rows);
    Block* blocks = static_cast<Block*>(allocate(capacity * sizeof(Block)));
    int threads = step.threads;
    const Plan made = plan(step, most_rows, blocks, threads);
    float* partials =
        static_cast<float*>(allocate(made.partial_rows * Attention<Isa>::partial_size_of(*step.layer) * sizeof(float)));
    int next_block = 0, next_range = 0;
    threads = static_cast<int>(least<int64_t>(threads, made.tasks));
#pragma omp parallel num_threads(threads) if (threads > 1)
    {
        const typename Isa::Session session;
        Attention<Isa> attention(step);
        for (;;) {
            int block, range;
#pragma omp critical(kvsplice_next_task)
            {
                block = next_block;
                range = next_range++;
                if (block < made.count && next_range == blocks[block].ranges) {
                    ++next_block;
                    next_range = 0;
                }
            }
            if (block >= made.count) break;
            attention.next = block + threads < made.count ? blocks + block + threads : nullptr;
            run_task(attention, blocks[block], range, made.range, partials);
        }
    }
    release(partials);
    release(blocks);
}

}  // namespace
}  // namespace kvsplice
