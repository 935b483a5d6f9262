// Encoding: residual, analysis, nearest levels, packing and scatter of a step's tokens, in one pass.
#pragma once

#include "vectors.h"

namespace kvsplice {
namespace {

// Multiply-adds: from about 20 microseconds of work on, two threads take hardly more than half as long.
constexpr int64_t kWorthThreadsWriting = 1 << 18;
// Tokens that share a pass over the analysis matrix.
constexpr int kTokens = 4;

inline uint8_t* first_byte(const Writing& writing, int64_t token) {
    const int64_t slot = writing.slots[token], block = writing.pages.block;
    return writing.pages.data + slot / block * writing.pages.block_stride + slot % block;
}

// Nearest levels of a group's latents, a byte each. `scale`: of position 0's latents, where these are its.
KV_INLINE uint64_t codes_of(const Group& group, Doubles latents, const float* scale) {
    if (scale)
        for (int i = 0; i < 8; ++i) latents[i] = scale[i] > 0 ? latents[i] / static_cast<double>(scale[i]) : 0;
    float doubled[8];
    store(doubled, 2 * __builtin_convertvector(latents, HalfFloats));
    uint64_t codes = 0;
    for (int i = 0; i < 8; ++i) {
        // A latent that is no number gets the last code, as from the reference engine.
        const float place = doubled[i] <= 255 ? __builtin_ceilf(most(doubled[i], -256.0f)) : 255.0f;
        codes |= static_cast<uint64_t>(group.codes[static_cast<int>(place) + 256]) << 8 * i;
    }
    return codes;
}

// The lowest `bits` bits of eight bytes, side by side.
KV_INLINE uint64_t fields(uint64_t bytes, int bits) {
    const uint64_t mask = ((1 << bits) - 1) * 0x0101010101010101ull;
#ifdef __BMI2__
    return _pext_u64(bytes, mask);
#else
    uint64_t packed = 0;
    for (int i = 0; i < 8; ++i) packed |= ((bytes & mask) >> 8 * i & 0xff) << bits * i;
    return packed;
#endif
}

// A group's codes into a token's byte planes.
KV_INLINE void scatter(uint64_t codes, const Group& group, uint8_t* byte, int64_t block) {
    byte += group.plane * block;
    int low = 0;
    for (int bits = 8; bits; bits /= 2) {
        if (group.width - low < bits) continue;
        uint64_t packed = fields(codes >> low, bits);
        for (int i = 0; i < bits; ++i, byte += block, packed >>= 8) *byte = static_cast<uint8_t>(packed);
        low += bits;
    }
}

// N groups from `first` of up to four tokens of one head and kind. Latents are summed in float64 like the reference's.
template <int N>
KV_INLINE void write_groups(const Writing& writing, const Half& half, int first, const double (*difference)[kMaxDim],
                            const int64_t* tokens, int count) {
    Doubles sums[N][kTokens] = {};
    for (int d = 0; d < writing.layer->dim; ++d)
        each<N>([&](auto n) KV_LAMBDA {
            const float* row = half.analysis + d * half.latents + 8 * (first + n);
            const Doubles wide = widened(load<HalfFloats>(row));
            each<kTokens>([&](auto t) KV_LAMBDA { sums[n][t] += wide * difference[t][d]; });
        });
    for (int n = 0; n < N; ++n)
        for (int t = 0; t < count; ++t) {
            const Group& group = half.groups[first + n];
            const bool sink = writing.positions[tokens[t]] == 0;
            const uint64_t codes = codes_of(group, sums[n][t], sink ? half.sink_scale + 8 * (first + n) : nullptr);
            scatter(codes, group, first_byte(writing, tokens[t]), writing.pages.block);
        }
}

// Codes of up to four tokens of one head and kind, into their pages.
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
    // Two groups at once: sums enough that none waits for its last term, and whole lines of the matrix.
    int g = 0;
    for (; g + 2 <= half.group_count; g += 2) write_groups<2>(writing, half, g, difference, tokens, count);
    if (g < half.group_count) write_groups<1>(writing, half, g, difference, tokens, count);
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
