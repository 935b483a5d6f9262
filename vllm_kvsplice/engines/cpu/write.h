// Encoding: residual, analysis, nearest levels, packing and scatter of a step's tokens, in one pass.
#pragma once

#include "vectors.h"

namespace kvsplice {
namespace {

// Multiply-adds. One token's take few microseconds, but its layer's matrices come from memory, and that two threads do sooner.
constexpr int64_t kWorthThreadsWriting = 1 << 14;
// Tokens that share a pass over the analysis matrix at most: every number of it is widened once a pass.
constexpr int kTokens = kRegisterBytes == 64 ? 8 : 4;

inline uint8_t* first_byte(const Writing& writing, int64_t token) {
    const int64_t slot = writing.slots[token], block = writing.pages.block;
    return writing.pages.data + slot / block * writing.pages.block_stride + slot % block;
}

#ifdef __AVX512VBMI__
// Where a group's table of codes has those of sixteen latents.
KV_INLINE __m256i places_of(const double* latents) {
    const __m512 narrow = _mm512_insertf32x8(_mm512_castps256_ps512(_mm512_cvtpd_ps(_mm512_loadu_pd(latents))),
                                             _mm512_cvtpd_ps(_mm512_loadu_pd(latents + 8)), 1);
    // A latent that is no number gets the last code, as from the reference engine: minimum and maximum answer their second.
    const __m512 doubled = _mm512_max_ps(_mm512_min_ps(narrow + narrow, splat(255)), splat(-256));
    constexpr int kUp = _MM_FROUND_TO_POS_INF | _MM_FROUND_NO_EXC;
    return _mm512_cvtepi32_epi16(_mm512_add_epi32(_mm512_cvt_roundps_epi32(doubled, kUp), _mm512_set1_epi32(256)));
}

// Nearest levels of a group's latents, eight bytes a token: places of 9 bits in a table of eight registers. Fewer tokens than
// four count as four.
template <int T>
KV_INLINE void find_codes(const Group& group, const double (*latents)[8], uint64_t* codes) {
    __m512i places[2] = {};
    each<(T + 3) / 4>([&](auto i) KV_LAMBDA {
        places[i] =
            _mm512_inserti64x4(_mm512_castsi256_si512(places_of(latents[4 * i])), places_of(latents[4 * i + 2]), 1);
    });
    const __m512i bytes =
        _mm512_inserti64x4(_mm512_castsi256_si512(_mm512_cvtepi16_epi8(places[0])), _mm512_cvtepi16_epi8(places[1]), 1);
    const __m512i upper = _mm512_set1_epi16(256);
    const __mmask64 second = _mm512_movepi8_mask(bytes),
                    last = _mm512_test_epi16_mask(places[0], upper) |
                           static_cast<__mmask64>(_mm512_test_epi16_mask(places[1], upper)) << 32;
    __m512i found[4];
    each<4>([&](auto i) KV_LAMBDA {
        found[i] = _mm512_permutex2var_epi8(_mm512_loadu_si512(group.codes + 128 * i), bytes,
                                            _mm512_loadu_si512(group.codes + 128 * i + 64));
    });
    const __m512i low = _mm512_mask_mov_epi8(found[0], second, found[1]),
                  high = _mm512_mask_mov_epi8(found[2], second, found[3]);
    alignas(64) uint64_t all[8];
    _mm512_store_si512(all, _mm512_mask_mov_epi8(low, last, high));
    for (int t = 0; t < T; ++t) codes[t] = all[t];
}
#else
// Nearest levels of eight latents of a group, a byte each.
KV_INLINE uint64_t codes_of(const Group& group, const double* latents) {
    typedef int32_t HalfInts __attribute__((vector_size(32)));
    HalfFloats doubled;
    for (int i = 0; i < 8; ++i) doubled[i] = 2 * static_cast<float>(latents[i]);
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

template <int T>
KV_INLINE void find_codes(const Group& group, const double (*latents)[8], uint64_t* codes) {
    for (int t = 0; t < T; ++t) codes[t] = codes_of(group, latents[t]);
}
#endif

// Position 0's latents have units of their own.
inline void divide(double* latents, const float* scale) {
    for (int i = 0; i < 8; ++i) latents[i] = scale[i] > 0 ? latents[i] / scale[i] : 0;
}

// A group's codes of W bits into a token's byte planes: those of the largest power of two in W, then of what is left.
template <int W>
KV_INLINE void scatter(uint64_t codes, uint8_t* byte, int64_t block) {
    constexpr int bits = W >= 8 ? 8 : W >= 4 ? 4 : W >= 2 ? 2 : 1;
    const uint64_t packed = fields(codes, bits);
    each<bits>([&](auto i) KV_LAMBDA { byte[i * block] = static_cast<uint8_t>(packed >> 8 * i); });
    if constexpr (W > bits) scatter<W - bits>(codes >> bits, byte + bits * block, block);
}

// A group's codes of some tokens, into their pages.
template <int W>
void write_group(const Writing& writing, const Group& group, const uint64_t* codes, const int64_t* tokens, int count) {
    const int64_t block = writing.pages.block;
    for (int t = 0; t < count; ++t) scatter<W>(codes[t], first_byte(writing, tokens[t]) + group.plane * block, block);
}

// Asks for a group's codes, and for where they go.
inline void ask_group(const Writing& writing, const Group& group, const int64_t* tokens, int count) {
    ask(group.codes, sizeof group.codes);
    for (int t = 0; t < count; ++t)
        for (int c = 0; c < group.width; ++c)
            __builtin_prefetch(first_byte(writing, tokens[t]) + (group.plane + c) * writing.pages.block, 1);
}

// N groups from `first` of up to T tokens of one head and kind. Latents are summed in float64 like the reference's.
template <int N, int T>
KV_INLINE void write_groups(const Writing& writing, const Half& half, int first, const double (*difference)[kMaxDim],
                            const int64_t* tokens, int count) {
    static constexpr decltype(&write_group<1>) by_width[] = {write_group<1>, write_group<2>, write_group<3>,
                                                             write_group<4>, write_group<5>, write_group<6>,
                                                             write_group<7>, write_group<8>};
    constexpr int kLanes = sizeof(Doubles) / sizeof(double), kParts = 8 / kLanes;
    // A prompt has them at hand.
    if (writing.tokens <= kTokens)
        for (int n = 0; n < N; ++n) ask_group(writing, half.groups[first + n], tokens, count);
    const int column = 8 * first / kColumns * kColumns, stride = least(kColumns, half.latents - column);
    const float* matrix = half.analysis + column * writing.layer->dim + 8 * first - column;
    Doubles sums[N][kParts][T] = {};
    for (int d = 0; d < writing.layer->dim; ++d) {
        ask(matrix + d * stride + kFloatsAhead, 8 * N * sizeof(float));
        each<N * kParts>([&](auto i) KV_LAMBDA {
            constexpr int n = i / kParts, part = i % kParts;
            const Doubles wide = widened(matrix + d * stride + 8 * n + kLanes * part);
            each<T>([&](auto t) KV_LAMBDA { sums[n][part][t] += wide * difference[t][d]; });
        });
    }
    double latents[N][most(T, 4)][8];
    if constexpr (T < 4) std::memset(latents, 0, sizeof latents);
    each<N * kParts * T>([&](auto i) KV_LAMBDA {
        constexpr int n = i / T / kParts, part = i / T % kParts, t = i % T;
        store(latents[n][t] + kLanes * part, sums[n][part][t]);
    });
    for (int n = 0; n < N; ++n) {
        for (int t = 0; t < count; ++t)
            if (writing.positions[tokens[t]] == 0) divide(latents[n][t], half.sink_scale + 8 * (first + n));
        uint64_t codes[T];
        find_codes<T>(half.groups[first + n], latents[n], codes);
        by_width[half.groups[first + n].width - 1](writing, half.groups[first + n], codes, tokens, count);
    }
}

// All groups from `first` on, N at once and fewer in the end.
template <int N, int T>
void write_all(const Writing& writing, const Half& half, int first, const double (*difference)[kMaxDim],
               const int64_t* tokens, int count) {
    for (; first + N <= half.group_count; first += N)
        write_groups<N, T>(writing, half, first, difference, tokens, count);
    if constexpr (N > 1) write_all<N / 2, T>(writing, half, first, difference, tokens, count);
}

// Codes of up to T tokens of one head and kind, into their pages.
template <int T>
void write_half(const Writing& writing, const Half& half, const Tokens& source, bool key, int head,
                const int64_t* tokens, int count) {
    const int dim = writing.layer->dim;
    // Widened once, so that every group's products read them as they are.
    double difference[T][kMaxDim];
    for (int t = 0; t < T; ++t) {
        if (t >= count) {
            std::memset(difference[t], 0, dim * sizeof(double));
            continue;
        }
        float x[kMaxDim], narrow[kMaxDim];
        const int64_t at = tokens[t] * source.token_stride + head * source.head_stride;
        // Of the pass after next: a twentieth of the time.
        ask_row(source.data, source.dtype, at + 2 * T * source.token_stride, dim);
        load_row(source.data, source.dtype, at, dim, x);
        residual(*writing.layer, half, key, writing.positions[tokens[t]], x, narrow);
        for (int d = 0; d < dim; ++d) difference[t][d] = narrow[d];
    }
    // Eight sums at once: enough that none waits for its last term.
    write_all<kRegisterBytes == 64 ? 8 / T : 1, T>(writing, half, 0, difference, tokens, count);
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
        const Tokens& source = key ? writing.key : writing.value;
        const auto write_tokens = count > 4 ? write_half<kTokens> : count > 1 ? write_half<4> : write_half<1>;
        write_tokens(writing, half, source, key, head, tokens, count);
    }
}

}  // namespace
}  // namespace kvsplice
