// Float arithmetic in vectors of 16, which the compiler splits where registers are shorter. Every instruction set has its
// own copy of what is here, and of all that includes it: nothing may be shared between code compiled for different ones.
#pragma once

#if defined(__AVX512F__) || defined(__BMI2__)
#include <immintrin.h>
#endif

#include <utility>

#include "numbers.h"

namespace kvsplice {
namespace {

typedef float Floats __attribute__((vector_size(64)));
typedef int32_t Ints __attribute__((vector_size(64)));
typedef float HalfFloats __attribute__((vector_size(32)));
// What one register holds: the compiler takes a number apart that is multiplied by a longer vector, lane by lane.
#if defined(__AVX512F__)
constexpr int kRegisterBytes = 64;
#elif defined(__AVX2__)
constexpr int kRegisterBytes = 32;
#else
constexpr int kRegisterBytes = 16;
#endif
typedef float Register __attribute__((vector_size(kRegisterBytes)));
typedef int32_t Wholes __attribute__((vector_size(kRegisterBytes)));
constexpr int kRegister = kRegisterBytes / sizeof(float);

#define KV_INLINE inline __attribute__((always_inline))

#define KV_LAMBDA __attribute__((always_inline))

// f(0), ..., f(N - 1) with constants: arrays indexed by them stay in registers, which unrolled loops do not ensure.
template <int N, class F>
KV_INLINE void each(F f) {
    [&]<int... I>(std::integer_sequence<int, I...>)
        KV_LAMBDA { (f(std::integral_constant<int, I>{}), ...); }(std::make_integer_sequence<int, N>{});
}

// f(n) with n, from 1 to `Last`, as a constant.
template <int Last, class F>
KV_INLINE void with_constant(int n, F f) {
    each<Last>([&](auto i) KV_LAMBDA {
        if (n == i + 1) f(std::integral_constant<int, i + 1>{});
    });
}

template <class V = Floats>
KV_INLINE V load(const void* from) {
    V v;
    std::memcpy(&v, from, sizeof v);
    return v;
}
template <class V>
KV_INLINE void store(void* to, V v) {
    std::memcpy(to, &v, sizeof v);
}
KV_INLINE Register reversed(Register x) {
    Wholes last_first;
    for (int i = 0; i < kRegister; ++i) last_first[i] = kRegister - 1 - i;
    return __builtin_shuffle(x, last_first);
}
KV_INLINE Floats splat(float x) { return Floats{} + x; }

// Exchanges the lanes of `a` that have the bit S in their number for those of `b` that have not.
template <int S>
KV_INLINE void exchange(HalfFloats& a, HalfFloats& b) {
    typedef int32_t HalfInts __attribute__((vector_size(32)));
    HalfInts first, second;
    for (int i = 0; i < 8; ++i) {
        first[i] = i & S ? 8 + i - S : i;
        second[i] = i & S ? 8 + i : i + S;
    }
    const HalfFloats kept = a;
    a = __builtin_shuffle(kept, b, first);
    b = __builtin_shuffle(kept, b, second);
}
KV_INLINE void transpose(HalfFloats (&square)[8]) {
    each<4>([&](auto i) KV_LAMBDA { exchange<1>(square[2 * i], square[2 * i + 1]); });
    each<4>([&](auto i) KV_LAMBDA { exchange<2>(square[i / 2 * 4 + i % 2], square[i / 2 * 4 + i % 2 + 2]); });
    each<4>([&](auto i) KV_LAMBDA { exchange<4>(square[i], square[i + 4]); });
}

constexpr int64_t round_up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }
constexpr int64_t ceil_div(int64_t n, int64_t by) { return (n + by - 1) / by; }
template <class T>
constexpr T least(T a, T b) {
    return a < b ? a : b;
}
template <class T>
constexpr T most(T a, T b) {
    return a > b ? a : b;
}

// A mask of the lowest `bits` bits of eight bytes; those bits side by side, and back.
KV_INLINE uint64_t lowest(int bits) { return ((1 << bits) - 1) * 0x0101010101010101ull; }
KV_INLINE uint64_t fields(uint64_t bytes, int bits) {
    const uint64_t mask = lowest(bits);
#ifdef __BMI2__
    return _pext_u64(bytes, mask);
#else
    uint64_t packed = 0;
    for (int i = 0; i < 8; ++i) packed |= ((bytes & mask) >> 8 * i & 0xff) << bits * i;
    return packed;
#endif
}
KV_INLINE uint64_t spread(uint64_t packed, int bits) {
    const uint64_t mask = lowest(bits);
#ifdef __BMI2__
    return _pdep_u64(packed, mask);
#else
    uint64_t bytes = 0;
    for (int i = 0; i < 8; ++i) bytes |= (packed >> bits * i & mask & 0xff) << 8 * i;
    return bytes;
#endif
}

template <class V>
KV_INLINE V larger(V a, V b) {
#ifdef __AVX512F__
    if constexpr (sizeof(V) == 64) return _mm512_max_ps(a, b);
#endif
#ifdef __AVX2__
    if constexpr (sizeof(V) == 32) return _mm256_max_ps(a, b);
#endif
    return a > b ? a : b;
}

// How far ahead a matrix is asked for: two pages of memory, because the processor looks ahead no further than to a page's end.
constexpr int kFloatsAhead = 2048;

// out[n, d] = sum_r weights[n, r] matrix[r, d]: `rows` small vectors by one matrix.
struct Product {
    const float* weights;
    int64_t weights_stride;
    int count;  // of r
    const float* matrix;
    int64_t matrix_stride;
    int width;  // of d, a multiple of 8
    float* out;
    int64_t out_stride;
};

// N rows from `first` by V vectors from `d`, whose sums do not wait for each other.
template <int N, int V, class Vector>
KV_INLINE void combine_block(const Product& p, int first, int d) {
    constexpr int lanes = sizeof(Vector) / sizeof(float);
    Vector sums[N][V];
    each<N * V>([&](auto i) KV_LAMBDA { sums[i / V][i % V] = Vector{}; });
    for (int r = 0; r < p.count; ++r) {
        const float* row = p.matrix + r * p.matrix_stride + d;
        Vector values[V];
        ask(row + kFloatsAhead, V * sizeof(Vector));
        each<V>([&](auto v) KV_LAMBDA { values[v] = load<Vector>(row + lanes * v); });
        each<N>([&](auto n) KV_LAMBDA {
            const float weight = p.weights[(first + n) * p.weights_stride + r];
            each<V>([&](auto v) KV_LAMBDA { sums[n][v] += weight * values[v]; });
        });
    }
    each<N * V>([&](auto i) KV_LAMBDA {
        store(p.out + (first + i / V) * p.out_stride + d + lanes * (i % V), sums[i / V][i % V]);
    });
}

template <int N>
void combine_rows(const Product& p, int first) {
    int d = 0;
    for (; d + 4 * kRegister <= p.width; d += 4 * kRegister) combine_block<N, 4, Register>(p, first, d);
    const int left = (p.width - d) / kRegister;
    if (left == 3) combine_block<N, 3, Register>(p, first, d);
    if (left == 2) combine_block<N, 2, Register>(p, first, d);
    if (left == 1) combine_block<N, 1, Register>(p, first, d);
    for (d += left * kRegister; d < p.width; d += 8) combine_block<N, 1, HalfFloats>(p, first, d);
}

inline void combine(const Product& p, int rows) {
    int row = 0;
    for (; row + 4 <= rows; row += 4) combine_rows<4>(p, row);
    if (rows - row == 3) return combine_rows<3>(p, row);
    if (rows - row == 2) return combine_rows<2>(p, row);
    if (rows - row == 1) return combine_rows<1>(p, row);
}

// 2^x for x <= 15, within 3e-6 (minimax of degree 4 between whole numbers); zero far below.
template <class V>
KV_INLINE V exp2_below(V x) {
    typedef int32_t Whole __attribute__((vector_size(sizeof(V))));
    x = larger(x, V{} - 100.0f);
    // Adding 1.5 * 2^23 rounds to whole numbers and leaves them in the low bits.
    const V shifted = x + 12582912.0f;
    const V f = x - (shifted - 12582912.0f);
    V p = V{} + 0.0095701018f;
    p = p * f + 0.0559178621f;
    p = p * f + 0.2402474485f;
    p = p * f + 0.6931218145f;
    p = p * f + 0.9999992614f;
    return (V)((Whole)p + ((Whole)shifted << 23));
}

template <class V>
KV_INLINE float largest(V v) {
    float lanes[sizeof(V) / sizeof(float)], found = kNever;
    store(lanes, v);
    for (float x : lanes) found = most(found, x);
    return found;
}

template <class V>
KV_INLINE float sum_of(V v) {
    float lanes[sizeof(V) / sizeof(float)], total = 0;
    store(lanes, v);
    for (float x : lanes) total += x;
    return total;
}

// Products of `count` numbers, a multiple of 8, added up to 16.
KV_INLINE Floats products(const float* a, const float* b, int count) {
    Floats sum{};
    int i = 0;
    for (; i + 16 <= count; i += 16) sum += load(a + i) * load(b + i);
    if (i == count) return sum;
    float last[16] = {};
    store(last, load<HalfFloats>(a + i) * load<HalfFloats>(b + i));
    return sum + load(last);
}

// Take memory for `count` numbers at `at`, from a place of 64 bytes on.
template <class T>
void place(char*& at, T*& where, int64_t count) {
    where = reinterpret_cast<T*>(at);
    at += round_up(count * sizeof(T), 64);
}

}  // namespace
}  // namespace kvsplice
