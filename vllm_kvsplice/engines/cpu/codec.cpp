// What all instruction sets share. Compiled without fused multiply-adds: residuals must round as the reference's do.
#include "codec.h"

#include <cmath>
#include <cstdlib>
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

// Compiled several times, because it is a tenth of encoding, and here, because nothing may be contracted: the processor's own
// copy is found when the library is loaded.
#if defined(__x86_64__) && defined(__GLIBC__)
__attribute__((target_clones("avx512f", "avx2", "default")))
#endif
void residual(const Layer& layer, const Half& half, bool key, int64_t position, const float* x, float* __restrict out) {
    if (position == 0) {
        for (int d = 0; d < layer.dim; ++d) out[d] = x[d] - half.sink[d];
        return;
    }
    const int pairs = key && layer.rotary ? layer.rotary->pairs : 0;
    for (int d = 2 * pairs; d < layer.dim; ++d) out[d] = x[d] - half.mean[d];
    if (pairs == 0) return;
    const float *cosine = layer.rotary->angles + position * 2 * pairs, *sine = cosine + pairs, *mean = half.mean;
    // Without `simd` compilers do not see that what a pair writes is not read by the next.
    if (layer.rotary->interleaved) {
#pragma omp simd
        for (int f = 0; f < pairs; ++f) {
            const int a = 2 * f, b = a + 1;
            out[a] = x[a] - (mean[a] * cosine[f] - mean[b] * sine[f]);
            out[b] = x[b] - (mean[a] * sine[f] + mean[b] * cosine[f]);
        }
    } else {
        const float *x_far = x + pairs, *mean_far = mean + pairs;
        float* out_far = out + pairs;
#pragma omp simd
        for (int f = 0; f < pairs; ++f) {
            out[f] = x[f] - (mean[f] * cosine[f] - mean_far[f] * sine[f]);
            out_far[f] = x_far[f] - (mean[f] * sine[f] + mean_far[f] * cosine[f]);
        }
    }
}

}  // namespace kvsplice
