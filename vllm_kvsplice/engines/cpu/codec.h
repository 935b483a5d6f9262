// The codec of one layer as the kernels read it, and the step they work on. Plain C++20, no torch.
//
// A key of position j and a value, for one KV head (docs/codec.md):
//
//     key_j   = R(j) mean_k + D_k k_j        k_j, y_j: whole numbers of eight bits, from the codes
//     value_j = mean_v      + D_v y_j
//
// Attention of a query row q (scaled, in units of log2) to everything stored, without rebuilding either:
//
//     score_j = q . R(j) mean_k + (D_k^T q) . k_j            a cosine series per tile, and integer dot products
//     output  = D_v (sum_j p_j y_j) + mean_v                 integer dot products, one small product at the end
//
// Dimension key: T tokens of the step   H KV heads   G query heads per KV head   D head dimensions
//                R latents of a head that have bits       F rotated pairs of dimensions
#pragma once

#include <cstddef>
#include <cstdint>

namespace kvsplice {

// Tokens that one 512-bit register of byte codes holds; tiles lie at absolute positions 64 k of a sequence.
constexpr int kTile = 64;
// Tokens whose probabilities share one maximum; also absolute, so that a row's arithmetic never depends on its company.
// 512: sums of 512 products of 15 and 8 bits still fit 32 bits.
constexpr int kSplit = 512;
constexpr int kSplitTiles = kSplit / kTile;
constexpr int kMaxDim = 256;
// Columns of a matrix that lie together.
constexpr int kColumns = 64;
constexpr float kNever = -1e30f;

enum class Dtype { kFloat32, kBfloat16, kFloat16 };
constexpr size_t size_of(Dtype dtype) { return dtype == Dtype::kFloat32 ? 4 : 2; }

// Eight latents of one width: `width` byte planes from `plane` on in every page.
struct Group {
    int width;
    int64_t plane;
    // Levels by code, repeated until the table is full, so that lookups may ignore the bits above the code; and plus 128.
    alignas(64) int8_t levels[128];
    alignas(64) uint8_t raised[128];
    // Code by ceil(2 z) + 256, for z from -128 to 127.5: levels are whole, so thresholds are whole halves.
    // Three more, because four bytes are read at each.
    uint8_t codes[512 + 3];
};

// The keys' or the values' codec of one KV head. Only groups and latents with bits are here.
// Pointers, because code compiled for one instruction set must not share inline functions of containers with the rest.
struct Half {
    const Group* groups;
    int group_count;
    int latents;               // R = 8 * group_count
    const float *mean, *sink;  // [D]
    const float* sink_scale;   // [R]
    // Matrices for few rows, 64 columns after the other, so that they are read as they lie: none is at hand when a layer begins.
    const float* analysis;   // [D, R]
    const float* doubt;      // [R]: how far off twice a latent summed in float32 may be, for a residual of norm 1
    const float* synthesis;  // keys [D, R], values [R, D]
    // Its columns, keys [R, D] and values [D, R], as sums of two bfloat16 matrices, `part` numbers apart; rows are filled up
    // with zeros to 64, and to a length of `depth`, a multiple of 32.
    const uint16_t* parts;
    int64_t depth, part;
};

// A pair that turns by little from a tile's centre to its end is as well a sum of up to this many even and as many odd
// Chebyshev polynomials, and all such pairs of a row add up to one; within this.
constexpr int kTerms = 6;
constexpr double kSlack = 2e-7;

// Where many rows share the work (`amx_prompt.h`), series go around the centres of this many tokens, and pairs that turn by less
// than 2.6 radians from there to the end are Chebyshev polynomials up to this degree (within 1e-6).
constexpr int kSegment = 256;
// Those that turn by less than 0.2 need none above the fourth (within 2e-7).
constexpr int kDegree = 10, kLowDegree = 4;
constexpr float kSlow = 2.6f, kSlower = 0.2f;
// The largest number that two signed bytes hold.
constexpr int kWhole = 127 * 256 + 127;

// Tables of one rotation for segments, in whole numbers.
struct Series {
    const float* centres;  // [segments, F, 2]: cosines and sines of the positions 256 k + 127.5
    const float* slow;  // [F - fast, kDegree + 2]: coefficients of the polynomials of offset / 128, and their largest
    const int8_t *high, *low;  // [kSegment, columns]: cosine and sine, then polynomials from degree 1, times kWhole
    int fast, slower;          // pairs from `fast` on are slow, those from `slower` on slower
    int used, columns;         // columns that are used, and rounded up to 64
};

// 2^-x between multiples of 1/32, in 2^16ths: start - slope * (32 x - k), off by at most 3e-5 of itself.
struct Powers {
    alignas(64) uint16_t start[32], slope[32];
    Powers();
};
extern const Powers kPowers;

// Tables of one rotation, shared by all layers and grown as positions appear.
struct Rotary {
    const float* angles;  // [positions, 2, F]: cosines, sines
    // Pairs from `slow[n]` on are polynomials of n terms within a tile, those before `slow[kTerms]` are none.
    const float* centres;       // [splits, F, 4, 8]: cos, -sin, sin, cos of the eight tiles' positions 64 k + 31.5
    const float* coefficients;  // [F - fast, kTerms, 2, 8]: of the even, then the odd polynomials of offset / 32
    // [fast + kTerms, 2, 32]: cosines and sines of the offsets from a tile's centre to half of its tokens, then polynomials. The
    // other half are their mirror images. In the order in which the instruction set holds a tile's tokens: as they are, or
    // quads transposed.
    const float *offsets_in_order, *offsets_in_quads;
    Series series;
    int pairs, slow[kTerms + 1];  // F
    bool interleaved;

    int fast() const { return slow[kTerms]; }
    int terms() const { return fast() + (fast() < pairs ? kTerms : 0); }
};

struct Layer {
    int heads, dim;
    int64_t code_bytes;       // of a token; what follows in its page is zero
    const Half *key, *value;  // [H]
    const Rotary* rotary;     // null where keys carry no position
};

// Strides are in elements. The last dimension is contiguous.
struct Tokens {
    const void* data;
    Dtype dtype;
    int64_t token_stride, head_stride;
};

// Paged memory: block b begins at data + b * block_stride (bytes).
struct Pages {
    uint8_t* data;
    int64_t block_stride;
    int block;  // N, tokens in a block
    int64_t token_bytes;
};

struct Window {
    const uint8_t* data = nullptr;
    Dtype dtype = Dtype::kFloat32;
    int64_t block_stride = 0, head_stride = 0;  // in bytes
    int block = 0;
    int64_t size = 0;
    bool whole_chunk = false;
    const int32_t* table = nullptr;
    int64_t table_stride = 0;
};

struct Step {
    const Layer* layer;
    Tokens query;
    int group;  // G
    float scale;
    Pages pages;
    Window window;  // size 0: none
    int sequences;
    const int32_t* query_start;
    const int32_t* seq_lens;
    const int32_t* table;
    int64_t table_stride;
    void* output;  // [T, H * G, D], contiguous rows of D
    Dtype output_dtype;
    int64_t output_token_stride;
    int threads;
};

struct Writing {
    const Layer* layer;
    Tokens key, value;
    const int64_t* positions;
    const int64_t* slots;
    int64_t tokens;
    Pages pages;
    int threads;
};

// What an instruction set implements; chosen once at run time.
struct Kernels {
    const char* name;
    void (*attend)(const Step&);
    void (*write)(const Writing&);
};

extern const Kernels kPortable, kAvx2, kAvx512, kAmx;

// Memory aligned to 64 bytes: of this thread, reused by every call, and until it is released.
void* scratch(size_t bytes);
void* allocate(size_t bytes);
void release(void* memory);
// x - m(position) in float32, rounded like the reference engine's: [D].
void residual(const Layer& layer, const Half& half, bool key, int64_t position, const float* x, float* __restrict out);

}  // namespace kvsplice
