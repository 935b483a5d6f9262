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
KV_INLINE uint64_t codes_of(const Group& group, const double* latents, const float* scale) {
    typedef int32_t HalfInts __attribute__((vector_size(32)));
    HalfFloats doubled;
    for (int i = 0; i < 8; ++i)
        doubled[i] = 2 * static_cast<float>(!scale ? latents[i] : scale[i] > 0 ? latents[i] / scale[i] : 0);
    // A latent that is no number gets the last code, as from the reference engine.
    doubled = doubled <= 255.0f ? doubled : HalfFloats{} + 255.0f;
    doubled = doubled >= -256.0f ? doubled : HalfFloats{} - 256.0f;
    const HalfInts whole = __builtin_convertvector(doubled, HalfInts);
    // Rounded up: true is -1.
    const HalfInts place = whole - (__builtin_convertvector(whole, HalfFloats) < doubled) + 256;
#ifdef __AVX2__
    const __m256i found = _mm256_i32gather_epi32(reinterpret_cast<const int*>(group.codes), (__m256i)place, 1);
    const __m256i bytes = _mm256_shuffle_epi8(found, _mm256_set1_epi32(0x0C080400));
    return static_cast<uint32_t>(_mm256_extract_epi32(bytes, 0)) | static_cast<uint64_t>(_mm256_extract_epi32(bytes, 4))
                                                                       << 32;
#else
    uint64_t codes = 0;
    for (int i = 0; i < 8; ++i) codes |= static_cast<uint64_t>(group.codes[place[i]]) << 8 * i;
    return codes;
#endif
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

// A group's codes of W bits into a token's byte planes: those of the largest power of two in W, then of what is left.
template <int W>
KV_INLINE void scatter(uint64_t codes, uint8_t* byte, int64_t block) {
    constexpr int bits = W >= 8 ? 8 : W >= 4 ? 4 : W >= 2 ? 2 : 1;
    const uint64_t packed = fields(codes, bits);
    each<bits>([&](auto i) KV_LAMBDA { byte[i * block] = static_cast<uint8_t>(packed >> 8 * i); });
    if constexpr (W > bits) scatter<W - bits>(codes >> bits, byte + bits * block, block);
}

// A group's latents of up to four tokens of one head and kind.
struct Latents {
    const Writing& writing;
    const Half& half;
    int group;
    const double (*sums)[8];  // of each token
    const int64_t* tokens;
    int count;
};

template <int W>
void write_group(const Latents& latents) {
    const Group& group = latents.half.groups[latents.group];
    const int64_t block = latents.writing.pages.block;
    for (int t = 0; t < latents.count; ++t) {
        const bool sink = latents.writing.positions[latents.tokens[t]] == 0;
        const uint64_t codes =
            codes_of(group, latents.sums[t], sink ? latents.half.sink_scale + 8 * latents.group : nullptr);
        scatter<W>(codes, first_byte(latents.writing, latents.tokens[t]) + group.plane * block, block);
    }
}

// N groups from `first` of up to four tokens of one head and kind. Latents are summed in float64 like the reference's.
template <int N>
KV_INLINE void write_groups(const Writing& writing, const Half& half, int first, const double (*difference)[kMaxDim],
                            const int64_t* tokens, int count) {
    static constexpr decltype(&write_group<1>) by_width[] = {write_group<1>, write_group<2>, write_group<3>,
                                                             write_group<4>, write_group<5>, write_group<6>,
                                                             write_group<7>, write_group<8>};
    constexpr int kLanes = sizeof(Doubles) / sizeof(double), kParts = 8 / kLanes;
    Doubles sums[N][kParts][kTokens] = {};
    for (int d = 0; d < writing.layer->dim; ++d)
        each<N * kParts>([&](auto i) KV_LAMBDA {
            constexpr int n = i / kParts, part = i % kParts;
            const Doubles wide = widened(half.analysis + d * half.latents + 8 * (first + n) + kLanes * part);
            each<kTokens>([&](auto t) KV_LAMBDA { sums[n][part][t] += wide * difference[t][d]; });
        });
    double latents[N][kTokens][8];
    each<N * kParts * kTokens>([&](auto i) KV_LAMBDA {
        constexpr int n = i / kTokens / kParts, part = i / kTokens % kParts, t = i % kTokens;
        store(latents[n][t] + kLanes * part, sums[n][part][t]);
    });
    for (int n = 0; n < N; ++n)
        by_width[half.groups[first + n].width - 1]({writing, half, first + n, latents[n], tokens, count});
}

// Codes of up to four tokens of one head and kind, into their pages.
inline void write_half(const Writing& writing, const Half& half, const Tokens& source, bool key, int head,
                       const int64_t* tokens, int count) {
    const int dim = writing.layer->dim;
    // Widened once, so that every group's products read them as they are.
    double difference[kTokens][kMaxDim] = {};
    for (int t = 0; t < count; ++t) {
        float x[kMaxDim];
        const int64_t at = tokens[t] * source.token_stride + head * source.head_stride;
        // Of the pass after next: a twentieth of the time.
        ask_row(source.data, source.dtype, at + 2 * kTokens * source.token_stride, dim);
        load_row(source.data, source.dtype, at, dim, x);
        float narrow[kMaxDim];
        residual(*writing.layer, half, key, writing.positions[tokens[t]], x, narrow);
        for (int d = 0; d < dim; ++d) difference[t][d] = narrow[d];
    }
    // Eight sums at once: enough that none waits for its last term.
    constexpr int kAtOnce = kRegisterBytes == 64 ? 2 : 1;
    int g = 0;
    for (; g + kAtOnce <= half.group_count; g += kAtOnce)
        write_groups<kAtOnce>(writing, half, g, difference, tokens, count);
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
