// AMX: a tile of 16 x 64 bytes times another in sixteen cycles, eight times what `vpdpbusd` does in them. What it multiplies
// has to lie in memory, which pays where rows share it.
#include "amx_few.h"
#include "amx_prompt.h"
#include "schedule.h"

namespace kvsplice {
namespace {

struct Amx : AmxFew {
    static constexpr int kRows = kManyRows;
    using Prompt = AmxPrompt;

    // Every tile has sixteen rows of 64 bytes.
    struct Session {
        Session() {
            struct {
                uint8_t palette = 1, start_row = 0, reserved[14] = {};
                uint16_t bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
                uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
            } shape;
            _tile_loadconfig(&shape);
        }
        ~Session() { _tile_release(); }
    };
};

}  // namespace

const Kernels kAmx = {"amx", attend<Amx>, write};

}  // namespace kvsplice
