// Encoding: residual, analysis, nearest levels, packing and scatter of a step's tokens, in one pass.
#pragma once

#include "vectors.h"

namespace kvsplice {
namespace {

// Multiply-adds: below about 30 microseconds of work, waking threads costs more than it saves.
constexpr int64_t kWorthThreadsWriting = 1 << 20;
// Tokens that share a pass over the analysis matrix.
constexpr int kTokens = 4;

inline uint8_t* first_byte(const Writing& writing, int64_t token) {
    const int64_t slot = writing.slots[token], block = writing.pages.block;
    return writing.pages.data + slot / block * writing.pages.block_stride + slot % block;
}

// Codes of up to four tokens of one head and kind, into their pages. Latents are summed in float64 like the reference's.
inline void write_half(const Writing& writing, const Half& half, const Tokens& source, bool key, int head,
                       const int64_t* tokens, int count) {
    const int dim = writing.layer->dim;
    // Widened once, so that every group's products read them as they are.
    double difference[kTokens][kMaxDim] = {};
    for (int t = 0; t < count; ++t) {
        float x[kMaxDim];
        load_row(source.data, source.dtype, tokens[t] * source.token_stride + head * source.head_stride, dim, x);
        float narrow[kMaxDim];
        residual(*writing.layer, half, key, writing.positions[tokens[t]], x, narrow);
        for (int d = 0; d < dim; ++d) difference[t][d] = narrow[d];
    }
    for (int g = 0; g < half.group_count; ++g) {
        const Group& group = half.groups[g];
        Doubles sums[kTokens] = {};
        for (int d = 0; d < dim; ++d) {
            const Doubles row =
                __builtin_convertvector(load<HalfFloats>(half.analysis + d * half.latents + 8 * g), Doubles);
            for (int t = 0; t < kTokens; ++t) sums[t] += row * difference[t][d];
        }
        for (int t = 0; t < count; ++t) {
            double latents[8];
            store(latents, sums[t]);
            const bool first = writing.positions[tokens[t]] == 0;
            uint8_t codes[8];
            for (int i = 0; i < 8; ++i) {
                const double scale = half.sink_scale[8 * g + i];
                if (first) latents[i] = scale > 0 ? latents[i] / scale : 0;
                const float doubled = 2 * static_cast<float>(latents[i]);
                // A latent that is no number gets the last code, as from the reference engine.
                const float place = doubled <= 255 ? __builtin_ceilf(most(doubled, -256.0f)) : 255.0f;
                codes[i] = group.codes[static_cast<int>(place) + 256];
            }
            uint8_t* byte = first_byte(writing, tokens[t]) + group.plane * writing.pages.block;
            int low = 0;
            for (int bits = 8; bits; bits /= 2) {
                if (group.width - low < bits) continue;
                const int per_byte = 8 / bits;
                for (int i = 0; i < 8; i += per_byte, byte += writing.pages.block) {
                    int packed = 0;
                    for (int j = 0; j < per_byte; ++j) packed |= (codes[i + j] >> low & ((1 << bits) - 1)) << j * bits;
                    *byte = static_cast<uint8_t>(packed);
                }
                low += bits;
            }
        }
    }
}

inline void write(const Writing& writing) {
    const int64_t batches = ceil_div(writing.tokens, kTokens), tasks = batches * writing.layer->heads * 2;
    const int64_t products = writing.tokens * writing.layer->heads * 2 * writing.layer->dim * writing.layer->dim;
    const int threads = products < kWorthThreadsWriting ? 1 : static_cast<int>(least<int64_t>(writing.threads, tasks));
#pragma omp parallel for num_threads(threads) if (threads > 1)
    for (int64_t task = 0; task < tasks; ++task) {
        const int64_t batch = task % batches;
        const int head = static_cast<int>(task / batches / 2);
        const bool key = task / batches % 2 == 0;
        int64_t tokens[kTokens];
        int count = 0;
        for (int64_t t = batch * kTokens; t < least(writing.tokens, (batch + 1) * kTokens); ++t)
            if (writing.slots[t] >= 0) tokens[count++] = t;
        if (count == 0) continue;
        for (int t = 0; t < count && key && head == 0; ++t) {
            uint8_t* byte = first_byte(writing, tokens[t]);
            for (int64_t c = writing.layer->code_bytes; c < writing.pages.token_bytes; ++c)
                byte[c * writing.pages.block] = 0;
        }
        const Half& half = (key ? writing.layer->key : writing.layer->value)[head];
        write_half(writing, half, key ? writing.key : writing.value, key, head, tokens, count);
    }
}

}  // namespace
}  // namespace kvsplice
