// Any processor.
#include "schedule.h"
#include "wide.h"

namespace kvsplice {
const Kernels kPortable = {"portable", attend<Wide>, write};
}
