// AVX-512 with VBMI and VNNI: Ice Lake, Zen 4 and later.
#include "avx512.h"
#include "schedule.h"

namespace kvsplice {
const Kernels kAvx512 = {"avx512", attend<Avx512>, write};
}
