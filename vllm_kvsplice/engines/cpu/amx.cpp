// AMX: a tile of 16 x 64 bytes times another in sixteen cycles, eight times what `vpdpbusd` does in them. Codes are unpacked
// as for AVX-512; what differs is who multiplies.
//
// Keys: four latents of a token in a 32-bit lane are a tile's layout already, so queries (a row of high and a row of low
// bytes each) come from the left and give [16 rows of bytes, 16 tokens].
// Values: a register of 64 tokens is a tile's row, so latents come from the left and probabilities, turned on their side,
// from the right: [16 latents, 16 columns of bytes].
#include "avx512.h"

namespace kvsplice {
namespace {

// So many query rows are done sooner without tiles, which have to go through memory.
constexpr int kFewRows = 4;
// Query rows whose high and low bytes fill a tile.
constexpr int kTileRows = 8;

struct Amx : Avx512 {
    // Latents of values whose sums stay in registers at once.
    static constexpr int kLatents = 64;

    static int64_t key_places(int latents) { return kBatch * kTile * round_up(latents, 64) / 2; }
    static int64_t value_places(int) { return kSplit * kLatents / 2; }

    // Tile registers 0 to 4 get `rows` rows of 64 bytes, 5 to 7 all sixteen.
    static void shape(int rows) {
        struct {
            uint8_t palette = 1, start_row = 0, reserved[14] = {};
            uint16_t bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
            uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
        } shape;
        for (int i = 0; i < 5; ++i) shape.rows[i] = static_cast<uint8_t>(rows);
        _tile_loadconfig(&shape);
    }

    struct Session {
        Session() { shape(16); }
        ~Session() { _tile_release(); }
    };

    // Latents past the last would meet whatever the keys' buffer holds there: zeros keep it out.
    static void pack_query(const int16_t* numbers, int count, int64_t stride, int16_t* out) {
        std::memset(out, 0, 2 * stride);
        Avx512::pack_query(numbers, count, stride, out);
    }

    // Products of a tile with up to eight rows: [4 x 16 tokens][high and low bytes of rows][16].
    struct Products {
        alignas(64) int32_t sums[4][16][16];
        int first, tile;
    };

    // A tile is unpacked while the one before is multiplied, and a product is read back only after the next one is under way:
    // nobody waits for what was just stored.
    static void score_latents(const Half& half, const Tiles& tiles, const Queries& queries, int16_t* keys,
                              float* scores) {
        if (queries.rows <= kFewRows) return Avx512::score_latents(half, tiles, queries, keys, scores);
        const int64_t tile_bytes = kTile * round_up(half.latents, 64);
        int8_t* unpacked = reinterpret_cast<int8_t*>(keys);
        shape(2 * least(queries.rows, kTileRows));
        Products products[2];
        int made = 0;
        unpack_keys(half, tiles, 0, 1, unpacked, tile_bytes);
        for (int tile = 0; tile < tiles.count; ++tile) {
            if (tile + 1 < tiles.count)
                unpack_keys(half, tiles, tile + 1, 1, unpacked + (tile + 1) % 2 * tile_bytes, tile_bytes);
            for (int row = 0; row < queries.rows; row += kTileRows, ++made) {
                Products& now = products[made % 2];
                now.first = row;
                now.tile = tile;
                multiply_keys(unpacked + tile % 2 * tile_bytes, half.latents, queries.numbers + row * queries.stride,
                              queries.stride, now);
                if (made) add_scores(products[1 - made % 2], queries, scores);
            }
        }
        add_scores(products[1 - made % 2], queries, scores);
    }

    static KV_INLINE void multiply_keys(const int8_t* keys, int latents, const int16_t* rows, int64_t stride,
                                        Products& products) {
        const int8_t* query = reinterpret_cast<const int8_t*>(rows);
        _tile_zero(0);
        _tile_zero(1);
        _tile_zero(2);
        _tile_zero(3);
        for (int r = 0; r < latents; r += 64, query += 64, keys += 64 * kTile) {
            _tile_loadd(4, query, stride);
            _tile_loadd(5, keys, 256);
            _tile_dpbsud(0, 4, 5);
            _tile_loadd(6, keys + 64, 256);
            _tile_dpbsud(1, 4, 6);
            _tile_loadd(5, keys + 128, 256);
            _tile_dpbsud(2, 4, 5);
            _tile_loadd(6, keys + 192, 256);
            _tile_dpbsud(3, 4, 6);
        }
        _tile_stored(0, products.sums[0], 64);
        _tile_stored(1, products.sums[1], 64);
        _tile_stored(2, products.sums[2], 64);
        _tile_stored(3, products.sums[3], 64);
    }

    static KV_INLINE void add_scores(const Products& products, const Queries& queries, float* scores) {
        for (int n = 0; n < kTileRows && products.first + n < queries.rows; ++n) {
            const int row = products.first + n;
            float* at = scores + row * kSplit + products.tile * kTile;
            each<4>([&](auto i) KV_LAMBDA {
                const Ints high = load<Ints>(products.sums[i][2 * n]), low = load<Ints>(products.sums[i][2 * n + 1]);
                const Ints sum = (high << 8) + low - queries.offset[row];
                store(at + 16 * i, load(at + 16 * i) + queries.unit[row] * __builtin_convertvector(sum, Floats));
            });
        }
    }

    // Probabilities as tiles read them, in place: four tokens of a row's high or low bytes become a column.
    static void turn_probabilities(int16_t* probability, int rows, int tiles) {
        for (int first = 0; first < rows; first += kTileRows)
            for (int tile = 0; tile < tiles; ++tile) {
                char* at = reinterpret_cast<char*>(probability + first * kSplit) + tile * kTile;
                rows - first > kTileRows / 2 ? turn_tile<4>(at) : turn_tile<2>(at);
            }
    }

    // 16 x 16 numbers of 32 bits whose rows lie kSplit bytes apart; with N = 2 only the first eight rows matter.
    template <int N>
    static KV_INLINE void turn_tile(char* at) {
        __m512i x[N][4];
        each<N>([&](auto n) KV_LAMBDA {
            __m512i a[4], b[4];
            each<4>([&](auto i) KV_LAMBDA { a[i] = load_bytes(at + (4 * n + i) * kSplit); });
            b[0] = _mm512_unpacklo_epi32(a[0], a[1]);
            b[1] = _mm512_unpackhi_epi32(a[0], a[1]);
            b[2] = _mm512_unpacklo_epi32(a[2], a[3]);
            b[3] = _mm512_unpackhi_epi32(a[2], a[3]);
            x[n][0] = _mm512_unpacklo_epi64(b[0], b[2]);
            x[n][1] = _mm512_unpackhi_epi64(b[0], b[2]);
            x[n][2] = _mm512_unpacklo_epi64(b[1], b[3]);
            x[n][3] = _mm512_unpackhi_epi64(b[1], b[3]);
        });
        // x[n][i]: lane l holds columns 4 n.. of row 4 l + i.
        const __m512i low = _mm512_setr_epi64(0, 1, 8, 9, 2, 3, 10, 11),
                      high = _mm512_setr_epi64(4, 5, 12, 13, 6, 7, 14, 15);
        each<4>([&](auto i) KV_LAMBDA {
            __m512i halves[N / 2][2];
            each<N / 2>([&](auto n) KV_LAMBDA {
                halves[n][0] = _mm512_permutex2var_epi64(x[2 * n][i], low, x[2 * n + 1][i]);
                halves[n][1] = _mm512_permutex2var_epi64(x[2 * n][i], high, x[2 * n + 1][i]);
            });
            each<4>([&](auto l) KV_LAMBDA {
                each<N / 2>([&](auto n) KV_LAMBDA {
                    const __m512i pair = halves[n][l / 2];
                    _mm256_storeu_si256(reinterpret_cast<__m256i*>(at + (4 * l + i) * kSplit + 32 * n),
                                        l % 2 ? _mm512_extracti64x4_epi64(pair, 1) : _mm512_castsi512_si256(pair));
                });
            });
        });
    }

    static void sum_values(const Half& half, const Tiles& tiles, int16_t* probability, int rows, int16_t* values,
                           int32_t* sums, int64_t stride) {
        if (rows <= kFewRows) return Avx512::sum_values(half, tiles, probability, rows, values, sums, stride);
        shape(16);
        turn_probabilities(probability, rows, tiles.count);
        int8_t* unpacked = reinterpret_cast<int8_t*>(values);
        for (int r = 0; r < half.latents; r += kLatents) {
            const int latents = least(kLatents, half.latents - r);
            if (rows <= kTileRows)
                sum_few(half, r / 8, latents, tiles, probability, rows, unpacked, sums + r, stride);
            else
                sum_many(half, r / 8, latents, tiles, probability, rows, unpacked, sums + r, stride);
        }
    }

    // Up to eight rows: a tile is unpacked while the one before is multiplied, four times 16 latents by all rows.
    static void sum_few(const Half& half, int group, int latents, const Tiles& tiles, const int16_t* probability,
                        int rows, int8_t* values, int32_t* sums, int64_t stride) {
        constexpr int kRow = 2 * kTile;
        _tile_zero(0);
        _tile_zero(1);
        _tile_zero(2);
        _tile_zero(3);
        unpack_values(half, group, latents / 8, tiles, 0, 1, values, kRow);
        for (int tile = 0; tile < tiles.count; ++tile) {
            if (tile + 1 < tiles.count)
                unpack_values(half, group, latents / 8, tiles, tile + 1, 1, values + (tile + 1) % 2 * kTile, kRow);
            const int8_t* v = values + tile % 2 * kTile;
            _tile_loadd(4, reinterpret_cast<const int8_t*>(probability) + tile * kTile, kSplit);
            _tile_loadd(6, v, kRow);
            _tile_dpbsud(0, 6, 4);
            _tile_loadd(7, v + 16 * kRow, kRow);
            _tile_dpbsud(1, 7, 4);
            _tile_loadd(6, v + 32 * kRow, kRow);
            _tile_dpbsud(2, 6, 4);
            _tile_loadd(7, v + 48 * kRow, kRow);
            _tile_dpbsud(3, 7, 4);
        }
        Sums found;
        found.take();
        for (int part = 0; part < ceil_div(latents, 16); ++part)
            add_up(found.tiles[part], rows, sums + 16 * part, stride);
    }

    // Many rows: all tiles are unpacked, then multiplied in squares of 32 latents by sixteen rows.
    static void sum_many(const Half& half, int group, int latents, const Tiles& tiles, const int16_t* probability,
                         int rows, int8_t* values, int32_t* sums, int64_t stride) {
        unpack_values(half, group, latents / 8, tiles, 0, tiles.count, values, kSplit);
        for (int r = 0; r < latents; r += 32)
            for (int row = 0; row < rows; row += 2 * kTileRows) {
                const int8_t* v = values + r * kSplit;
                const int8_t* p = reinterpret_cast<const int8_t*>(probability + row * kSplit);
                _tile_zero(0);
                _tile_zero(1);
                _tile_zero(2);
                _tile_zero(3);
                for (int t = 0; t < tiles.count * kTile; t += kTile) {
                    _tile_loadd(4, p + t, kSplit);
                    _tile_loadd(6, v + t, kSplit);
                    _tile_dpbsud(0, 6, 4);
                    _tile_loadd(7, v + 16 * kSplit + t, kSplit);
                    _tile_dpbsud(1, 7, 4);
                    _tile_loadd(5, p + 16 * kSplit + t, kSplit);
                    _tile_dpbsud(2, 6, 5);
                    _tile_dpbsud(3, 7, 5);
                }
                Sums found;
                found.take();
                for (int i = 0; i < 4; ++i) {
                    const int part = r + 16 * (i % 2), first = row + i / 2 * kTileRows;
                    if (part < latents && first < rows)
                        add_up(found.tiles[i], least(rows - first, kTileRows), sums + first * stride + part, stride);
                }
            }
    }

    // What the first four tile registers hold.
    struct Sums {
        alignas(64) int32_t tiles[4][16][16];

        KV_INLINE void take() {
            _tile_stored(0, tiles[0], 64);
            _tile_stored(1, tiles[1], 64);
            _tile_stored(2, tiles[2], 64);
            _tile_stored(3, tiles[3], 64);
        }
    };

    // [16 latents, high and low bytes of rows] as whole numbers of [rows, 16 latents].
    static KV_INLINE void add_up(int32_t (*found)[16], int rows, int32_t* sums, int64_t stride) {
        const __m512i latent =
            _mm512_setr_epi32(0, 16, 32, 48, 64, 80, 96, 112, 128, 144, 160, 176, 192, 208, 224, 240);
        for (int row = 0; row < rows; ++row) {
            const Ints high = (Ints)_mm512_i32gather_epi32(latent, &found[0][2 * row], 4);
            const Ints low = (Ints)_mm512_i32gather_epi32(latent, &found[0][2 * row + 1], 4);
            store(sums + row * stride, (high << 8) + low);
        }
    }
};

}  // namespace

const Kernels kAmx = {"amx", attend<Amx>, write};

}  // namespace kvsplice
