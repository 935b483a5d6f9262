// What all instruction sets share. Compiled without fused multiply-adds: residuals must round as the reference's do.
#include "codec.h"

#include <bit>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <new>

namespace kvsplice {

Powers::Powers() {
    for (int k = 0; k < 32; ++k) {
        const double here = std::exp2(-k / 32.0) * 65535, there = std::exp2(-(k + 1) / 32.0) * 65535;
        const double above = (here + there) / 2 - std::exp2(-(k + 0.5) / 32.0) * 65535;
        start[k] = static_cast<uint16_t>(std::lround(here - above / 2));
        slope[k] = static_cast<uint16_t>(std::lround(here - there));
    }
}

const Powers kPowers;

void* allocate(size_t bytes) {
    void* memory = std::aligned_alloc(64, (bytes + 64) / 64 * 64);
    if (!memory) throw std::bad_alloc();
    return memory;
}

void release(void* memory) { std::free(memory); }

void* scratch(size_t bytes) {
    struct Held {
        void* memory = nullptr;
        size_t size = 0;
        ~Held() { release(memory); }
    };
    thread_local Held held;
    if (bytes > held.size) {
        release(held.memory);
        held.memory = allocate(bytes);
        held.size = bytes;
    }
    return held.memory;
}

static float from_bits(uint32_t bits) { return std::bit_cast<float>(bits); }
static uint32_t to_bits(float value) { return std::bit_cast<uint32_t>(value); }

void load_row(const void* data, Dtype dtype, int64_t offset, int count, float* out) {
    if (dtype == Dtype::kFloat32) {
        std::memcpy(out, static_cast<const float*>(data) + offset, count * sizeof(float));
        return;
    }
    const uint16_t* row = static_cast<const uint16_t*>(data) + offset;
    if (dtype == Dtype::kBfloat16) {
        for (int i = 0; i < count; ++i) out[i] = from_bits(static_cast<uint32_t>(row[i]) << 16);
        return;
    }
    // A half's exponent and fraction moved into place read as the same number times 2^-112, subnormal ones too.
    for (int i = 0; i < count; ++i) {
        const uint32_t sign = static_cast<uint32_t>(row[i] & 0x8000) << 16;
        const float size = from_bits(static_cast<uint32_t>(row[i] & 0x7fff) << 13) * 0x1p112f;
        out[i] = from_bits(to_bits(size) | sign);
    }
}

static uint16_t to_bfloat16(float value) {
    const uint32_t bits = to_bits(value);
    if ((bits & 0x7fffffff) > 0x7f800000) return static_cast<uint16_t>(bits >> 16 | 0x40);
    return static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

static uint16_t to_float16(float value) {
    const uint32_t bits = to_bits(value), sign = bits >> 16 & 0x8000, size = bits & 0x7fffffff;
    if (size > 0x7f800000) return static_cast<uint16_t>(sign | 0x7e00);
    if (size >= 0x477ff000) return static_cast<uint16_t>(sign | 0x7c00);
    // Below the smallest normal half: adding 0.5 leaves the rounded fraction in the low bits.
    if (size < 0x38800000) return static_cast<uint16_t>(sign | (to_bits(from_bits(size) + 0.5f) - 0x3f000000));
    return static_cast<uint16_t>(sign | ((size - 0x38000000 + 0xfff + (size >> 13 & 1)) >> 13));
}

void store_row(const float* row, Dtype dtype, int64_t offset, int count, void* out) {
    if (dtype == Dtype::kFloat32) {
        std::memcpy(static_cast<float*>(out) + offset, row, count * sizeof(float));
        return;
    }
    uint16_t* to = static_cast<uint16_t*>(out) + offset;
    for (int i = 0; i < count; ++i) to[i] = dtype == Dtype::kBfloat16 ? to_bfloat16(row[i]) : to_float16(row[i]);
}

void residual(const Layer& layer, const Half& half, bool key, int64_t position, const float* x, float* out) {
    if (position == 0) {
        for (int d = 0; d < layer.dim; ++d) out[d] = x[d] - half.sink[d];
        return;
    }
    const int pairs = key && layer.rotary ? layer.rotary->pairs : 0;
    for (int d = 2 * pairs; d < layer.dim; ++d) out[d] = x[d] - half.mean[d];
    if (pairs == 0) return;
    const float* cosine = layer.rotary->angles + position * 2 * pairs;
    const float* sine = cosine + pairs;
    const int step = layer.rotary->interleaved ? 2 : 1, apart = layer.rotary->interleaved ? 1 : pairs;
    for (int f = 0; f < pairs; ++f) {
        const int a = f * step, b = a + apart;
        out[a] = x[a] - (half.mean[a] * cosine[f] - half.mean[b] * sine[f]);
        out[b] = x[b] - (half.mean[a] * sine[f] + half.mean[b] * cosine[f]);
    }
}

}  // namespace kvsplice
