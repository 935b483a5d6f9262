// Encoding: residual, analysis, nearest levels, packing and scatter of a step's tokens, in one pass.
#pragma once

#include "vectors.h"

namespace kvsplice {
namespace {

// Multiply-adds. One token's take few microseconds, but its layer's matrices come from memory, and that two threads do sooner.
constexpr int64_t kWorthThreadsWriting = 1 << 14;
// Tokens whose latents are found, and looked up, together.
constexpr int kTokens = 8;
// Residuals of a larger norm, or whose norm is no number, could overflow float32; squares below the least may have underflown.
constexpr float kLargestNorm = 1e18f, kLeastNorm = 2e-18f;

inline uint8_t* first_byte(const Writing& writing, int64_t token) {
    const int64_t slot = writing.slots[token], block = writing.pages.block;
    return writing.pages.data + slot / block * writing.pages.block_stride + slot % block;
}

// What some tokens' keys or values of one head are beside the mean.
struct Residuals {
    float of[kTokens][kMaxDim], norm[kTokens];
    bool first[kTokens];  // at position 0
};

// Their latents in some columns of the analysis, and how far off twice a latent may be.
struct Latents {
    float of[kTokens][kColumns], slack[kTokens][kColumns];
};

#ifdef __AVX512VBMI__
// Where a group's table of codes has those of sixteen latents, from twice the latents.
KV_INLINE __m256i places_of(__m512 doubled) {
    // A latent that is no number gets the last code, as from the reference engine: minimum and maximum answer their second.
    const __m512 within = _mm512_max_ps(_mm512_min_ps(doubled, splat(255)), splat(-256));
    constexpr int kUp = _MM_FROUND_TO_POS_INF | _MM_FROUND_NO_EXC;
    return _mm512_cvtepi32_epi16(_mm512_add_epi32(_mm512_cvt_roundps_epi32(within, kUp), _mm512_set1_epi32(256)));
}

// Nearest levels of a group's latents of eight tokens, eight bytes a token: places of 9 bits in a table of eight registers.
KV_INLINE __m512i look_up(const Group& group, const __m512 (&doubled)[4]) {
    __m512i places[2];
    each<2>([&](auto i) KV_LAMBDA {
        places[i] =
            _mm512_inserti64x4(_mm512_castsi256_si512(places_of(doubled[2 * i])), places_of(doubled[2 * i + 1]), 1);
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
    return _mm512_mask_mov_epi8(low, last, high);
}

// Codes of the least and of the largest that latents of a group can be, eight bytes a token; tokens go by twos.
KV_INLINE void find_codes(const Group& group, const Latents& latents, int column, int count, uint64_t* least_codes,
                          uint64_t* largest_codes) {
    const auto two = [](const float* a, const float* b) KV_LAMBDA {
        return _mm512_insertf32x8(_mm512_castps256_ps512(_mm256_loadu_ps(a)), _mm256_loadu_ps(b), 1);
    };
    __m512 least_doubled[4] = {}, largest_doubled[4] = {};
    each<4>([&](auto i) KV_LAMBDA {
        if (2 * i >= count) return;
        const Floats latent = two(latents.of[2 * i] + column, latents.of[2 * i + 1] + column),
                     slack = two(latents.slack[2 * i] + column, latents.slack[2 * i + 1] + column);
        least_doubled[i] = latent + latent - slack;
        largest_doubled[i] = latent + latent + slack;
    });
    _mm512_storeu_si512(least_codes, look_up(group, least_doubled));
    _mm512_storeu_si512(largest_codes, look_up(group, largest_doubled));
}
#else
// Nearest levels of eight latents of a group, a byte each, from twice the latents.
KV_INLINE uint64_t look_up(const Group& group, HalfFloats doubled) {
    typedef int32_t HalfInts __attribute__((vector_size(32)));
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

KV_INLINE void find_codes(const Group& group, const Latents& latents, int column, int count, uint64_t* least_codes,
                          uint64_t* largest_codes) {
    for (int t = 0; t < count; ++t) {
        const HalfFloats latent = load<HalfFloats>(latents.of[t] + column),
                         slack = load<HalfFloats>(latents.slack[t] + column);
        least_codes[t] = look_up(group, latent + latent - slack);
        largest_codes[t] = look_up(group, latent + latent + slack);
    }
}
#endif

// The code of one latent as the reference finds it: summed in float64 along its column of the analysis.
inline uint64_t exact_code(const Group& group, const float* column, int64_t stride, const float* difference, int dim,
                           const float* scale) {
    double latent = 0;
    for (int d = 0; d < dim; ++d) latent += static_cast<double>(column[d * stride]) * difference[d];
    if (scale) latent = *scale > 0 ? latent / *scale : 0;
    float doubled = 2 * static_cast<float>(latent);
    doubled = doubled <= 255.0f ? doubled : 255.0f;
    doubled = doubled >= -256.0f ? doubled : -256.0f;
    return group.codes[static_cast<int>(__builtin_ceilf(doubled)) + 256];
}

// A group's codes of W bits into a token's byte planes: those of the largest power of two in W, then of what is left.
template <int W>
KV_INLINE void scatter(uint64_t codes, uint8_t* byte, int64_t block) {
    constexpr int bits = W >= 8 ? 8 : W >= 4 ? 4 : W >= 2 ? 2 : 1;
    const uint64_t packed = fields(codes, bits);
    each<bits>([&](auto i) KV_LAMBDA { byte[i * block] = static_cast<uint8_t>(packed >> 8 * i); });
    if constexpr (W > bits) scatter<W - bits>(codes >> bits, byte + bits * block, block);
}

// Some tokens of a step, and where they go in their pages.
struct Batch {
    int count = 0;
    int64_t tokens[kTokens];
    uint8_t* bytes[kTokens];
};

// A group's codes of some tokens, into their pages.
template <int W>
void write_group(const Batch& batch, const Group& group, const uint64_t* codes, int64_t block) {
    for (int t = 0; t < batch.count; ++t) scatter<W>(codes[t], batch.bytes[t] + group.plane * block, block);
}

// Asks for a group's codes, and for where they go.
inline void ask_group(const Batch& batch, const Group& group, int64_t block) {
    ask(group.codes, sizeof group.codes);
    for (int t = 0; t < batch.count; ++t)
        for (int c = 0; c < group.width; ++c) __builtin_prefetch(batch.bytes[t] + (group.plane + c) * block, 1);
}

inline void find_norms(Residuals& residuals, int dim, int count) {
    HalfFloats squares[8] = {};
    for (int t = 0; t < count; ++t)
        for (int d = 0; d < dim; d += 8) {
            const HalfFloats x = load<HalfFloats>(residuals.of[t] + d);
            squares[t] += x * x;
        }
    transpose(squares);
    for (int i = 1; i < 8; ++i) squares[0] += squares[i];
    for (int t = 0; t < count; ++t) residuals.norm[t] = __builtin_sqrtf(squares[0][t]) + kLeastNorm;
}

// The reference sums latents in float64. Here they are summed in float32, which is off by no more than `doubt` times the
// residual's norm, and only where a threshold lies within that, in one vector of a hundred, a latent is summed once more.
inline void find_latents(const Half& half, const float* matrix, int first, int columns, int dim,
                         const Residuals& residuals, int count, Latents& found) {
    combine({residuals.of[0], kMaxDim, dim, matrix, columns, columns, found.of[0], kColumns}, count);
    for (int t = 0; t < count; ++t) {
        float *latent = found.of[t], *slack = found.slack[t];
        for (int i = 0; i < columns; i += 8)
            store(slack + i, load<HalfFloats>(half.doubt + first + i) * residuals.norm[t]);
        // Position 0's latents have units of their own.
        for (int i = 0; residuals.first[t] && i < columns; ++i) {
            const float scale = half.sink_scale[first + i], inverse = scale > 0 ? 1 / scale : 0;
            latent[i] *= inverse;
            slack[i] *= inverse;
        }
    }
}

// The reference's codes where bytes of `doubtful` are not zero, of a token's group that begins at `column` of some columns.
inline void settle(const Half& half, const float* matrix, int first, int columns, int column, int dim,
                   const Residuals& residuals, int token, uint64_t doubtful, uint64_t& codes) {
    const Group& group = half.groups[(first + column) / 8];
    for (int i = 0; i < 8; ++i) {
        if (!(doubtful >> 8 * i & 0xff)) continue;
        const float* scale = residuals.first[token] ? half.sink_scale + first + column + i : nullptr;
        const uint64_t code = exact_code(group, matrix + column + i, columns, residuals.of[token], dim, scale);
        codes = (codes & ~(0xffull << 8 * i)) | code << 8 * i;
    }
}

// Codes of some tokens of one head and kind, into their pages.
inline void write_half(const Writing& writing, const Half& half, const Tokens& source, bool key, int head,
                       const Batch& batch) {
    const int dim = writing.layer->dim, count = batch.count;
    const int64_t block = writing.pages.block;
    Residuals residuals;
    for (int t = 0; t < count; ++t) {
        float x[kMaxDim], *difference = residuals.of[t];
        const int64_t token = batch.tokens[t], position = writing.positions[token],
                      at = token * source.token_stride + head * source.head_stride;
        // Of the pass after next: a twentieth of the time.
        ask_row(source.data, source.dtype, at + 2 * kTokens * source.token_stride, dim);
        load_row(source.data, source.dtype, at, dim, x);
        residual(*writing.layer, half, key, position, x, difference);
        residuals.first[t] = position == 0;
    }
    find_norms(residuals, dim, count);
    for (int first = 0; first < half.latents; first += kColumns) {
        const int columns = least(kColumns, half.latents - first);
        const float* matrix = half.analysis + first * dim;
        const Group* groups = half.groups + first / 8;
        // A prompt has them at hand.
        for (int g = 0; writing.tokens <= kTokens && g < columns / 8; ++g) ask_group(batch, groups[g], block);
        Latents latents;
        find_latents(half, matrix, first, columns, dim, residuals, count, latents);
        for (int g = 0; g < columns / 8; ++g) {
            uint64_t codes[kTokens], others[kTokens];
            find_codes(groups[g], latents, 8 * g, count, codes, others);
            for (int t = 0; t < count; ++t) {
                const uint64_t doubtful = residuals.norm[t] < kLargestNorm ? codes[t] ^ others[t] : ~0ull;
                if (doubtful) settle(half, matrix, first, columns, 8 * g, dim, residuals, t, doubtful, codes[t]);
            }
            with_constant<8>(groups[g].width,
                             [&](auto width) KV_LAMBDA { write_group<width>(batch, groups[g], codes, block); });
        }
    }
}

inline void write(const Writing& writing) {
    const int64_t batches = ceil_div(writing.tokens, kTokens), tasks = batches * writing.layer->heads * 2;
    const int64_t products = writing.tokens * writing.layer->heads * 2 * writing.layer->dim * writing.layer->dim;
    const int threads = products < kWorthThreadsWriting ? 1 : static_cast<int>(least<int64_t>(writing.threads, tasks));
#pragma omp parallel for num_threads(threads) if (threads > 1)
    for (int64_t task = 0; task < tasks; ++task) {
        const int64_t first = task % batches * kTokens;
        const int head = static_cast<int>(task / batches / 2);
        const bool key = task / batches % 2 == 0;
        Batch batch;
        for (int64_t t = first; t < least(writing.tokens, first + kTokens); ++t) {
            if (writing.slots[t] < 0) continue;
            batch.tokens[batch.count] = t;
            batch.bytes[batch.count++] = first_byte(writing, t);
        }
        if (batch.count == 0) continue;
        for (int t = 0; t < batch.count && key && head == 0; ++t)
            for (int64_t c = writing.layer->code_bytes; c < writing.pages.token_bytes; ++c)
                batch.bytes[t][c * writing.pages.block] = 0;
        const Half& half = (key ? writing.layer->key : writing.layer->value)[head];
        const Tokens& source = key ? writing.key : writing.value;
        write_half(writing, half, source, key, head, batch);
    }
}

}  // namespace
}  // namespace kvsplice
