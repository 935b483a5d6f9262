// Rows of 16-bit and 32-bit floats, to and from float32. Every file has its own copy, for the instructions that it may use.
#pragma once

#include <bit>
#include <cstring>

#include "codec.h"

namespace kvsplice {
namespace {

inline float from_bits(uint32_t bits) { return std::bit_cast<float>(bits); }
inline uint32_t to_bits(float value) { return std::bit_cast<uint32_t>(value); }

inline float from_bfloat16(uint16_t bits) { return from_bits(static_cast<uint32_t>(bits) << 16); }

// A half's exponent and fraction moved into place read as the same number times 2^-112, subnormal ones too.
inline float from_float16(uint16_t bits) {
    const uint32_t sign = static_cast<uint32_t>(bits & 0x8000) << 16;
    return from_bits(to_bits(from_bits(static_cast<uint32_t>(bits & 0x7fff) << 13) * 0x1p112f) | sign);
}

inline uint16_t to_bfloat16(float value) {
    const uint32_t bits = to_bits(value), rounded = bits + 0x7fff + (bits >> 16 & 1);
    return static_cast<uint16_t>(((bits & 0x7fffffff) > 0x7f800000 ? bits | 0x400000 : rounded) >> 16);
}

inline uint16_t to_float16(float value) {
    const uint32_t bits = to_bits(value), sign = bits >> 16 & 0x8000, size = bits & 0x7fffffff;
    if (size > 0x7f800000) return static_cast<uint16_t>(sign | 0x7e00);
    if (size >= 0x477ff000) return static_cast<uint16_t>(sign | 0x7c00);
    // Below the smallest normal half: adding 0.5 leaves the rounded fraction in the low bits.
    if (size < 0x38800000) return static_cast<uint16_t>(sign | (to_bits(from_bits(size) + 0.5f) - 0x3f000000));
    return static_cast<uint16_t>(sign | ((size - 0x38000000 + 0xfff + (size >> 13 & 1)) >> 13));
}

// `count` numbers from the `offset`-th of `data` on.
inline void load_row(const void* data, Dtype dtype, int64_t offset, int count, float* out) {
    const uint16_t* row = static_cast<const uint16_t*>(data) + offset;
    if (dtype == Dtype::kFloat32)
        std::memcpy(out, static_cast<const float*>(data) + offset, count * sizeof(float));
    else if (dtype == Dtype::kBfloat16)
        for (int i = 0; i < count; ++i) out[i] = from_bfloat16(row[i]);
    else
        for (int i = 0; i < count; ++i) out[i] = from_float16(row[i]);
}

inline int64_t bytes_of(Dtype dtype) { return dtype == Dtype::kFloat32 ? 4 : 2; }

// Asks for memory that will be read soon; it may lie anywhere. Into the second cache, as the first holds what is read now.
inline void ask(const void* data, int64_t bytes) {
    for (int64_t byte = 0; byte < bytes; byte += 64) __builtin_prefetch(static_cast<const char*>(data) + byte, 0, 2);
}

inline void ask_row(const void* data, Dtype dtype, int64_t offset, int count) {
    ask(static_cast<const char*>(data) + offset * bytes_of(dtype), count * bytes_of(dtype));
}

// And back, rounded to even.
inline void store_row(const float* row, Dtype dtype, int64_t offset, int count, void* out) {
    uint16_t* to = static_cast<uint16_t*>(out) + offset;
    if (dtype == Dtype::kFloat32)
        std::memcpy(static_cast<float*>(out) + offset, row, count * sizeof(float));
    else if (dtype == Dtype::kBfloat16)
        for (int i = 0; i < count; ++i) to[i] = to_bfloat16(row[i]);
    else
        for (int i = 0; i < count; ++i) to[i] = to_float16(row[i]);
}

// From one type to another, or as it is.
inline void copy_row(const void* data, Dtype dtype, int64_t offset, int count, void* out, Dtype out_dtype,
                     int64_t out_offset) {
    if (dtype == out_dtype) {
        const int64_t size = bytes_of(dtype);
        std::memcpy(static_cast<char*>(out) + out_offset * size, static_cast<const char*>(data) + offset * size,
                    count * size);
        return;
    }
    float row[kMaxDim];
    load_row(data, dtype, offset, count, row);
    store_row(row, out_dtype, out_offset, count, out);
}

}  // namespace
}  // namespace kvsplice
