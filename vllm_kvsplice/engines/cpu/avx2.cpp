// AVX2 and FMA.
#include "schedule.h"
#include "wide.h"

namespace kvsplice {
const Kernels kAvx2 = {"avx2", attend<Wide>, write};
}
