// Products of AMX tiles: 16 rows of 16 pairs of bfloat16, with float32 sums.
//
// A sum adds its pairs in order, independent of the tile's other rows. So a row's result depends neither on the number
// of rows nor on its position among them.
#pragma once

#include "vectors.h"

#if defined(__AMX_BF16__)

constexpr int64_t kTileSide = 16;  // a tile's rows of x, outputs, and pairs to sum over
constexpr int64_t kTileElements = 2 * kTileSide * kTileSide;  // of x or w: 1 KiB

// The calling thread's tiles within the block: 0 to 3 sums [rows, 16], 4 and 5 x [rows, 16 pairs], 6 and 7 w [16 pairs,
// 16 outputs]. Configured each time, since others (oneDNN) use another layout, and released, since every context switch
// would have to save them.
class Tiles {
 public:
  explicit Tiles(int64_t rows) {
    struct alignas(64) {
      uint8_t palette = 1, start_row = 0, reserved[14] = {};
      uint16_t row_bytes[16] = {};
      uint8_t rows[16] = {};
    } layout;
    for (int tile = 0; tile < 8; ++tile) {
      layout.row_bytes[tile] = 64;
      layout.rows[tile] = static_cast<uint8_t>(tile < 6 ? rows : kTileSide);
    }
    _tile_loadconfig(&layout);
  }
  ~Tiles() { _tile_release(); }
  Tiles(const Tiles&) = delete;
  Tiles& operator=(const Tiles&) = delete;
};

// The division of `count` > 0 rows into tiles of equal size. They extend past the last row if there is room; otherwise
// the last tile begins at `first_within` and repeats rows of the one before, with the same result.
struct RowTiles {
  explicit RowTiles(int64_t count)
      : all(count), number((count + kTileSide - 1) / kTileSide), rows((count + number - 1) / number) {}
  int64_t all, number, rows;
  int64_t padded() const { return number * rows; }
  int64_t first_within(int64_t tile) const { return std::min(tile * rows, all - rows); }
};

// The sums of one or two tiles of rows, x0 and x1, with one or two of outputs, w and the adjacent w1, held in tiles.
template <int kRowTiles, int kGroups>
struct TileSums {
  static constexpr bool kTwoRows = kRowTiles == 2, kTwoGroups = kGroups == 2;

  static void clear() {
    _tile_zero(0);
    if constexpr (kTwoGroups) _tile_zero(1);
    if constexpr (kTwoRows) _tile_zero(2);
    if constexpr (kTwoRows && kTwoGroups) _tile_zero(3);
  }
  // += x·wᵀ over a tile of pairs. Rows of x are `x_bytes` apart, pairs of w `w_bytes`.
  static void add(const void* x0, const void* x1, int64_t x_bytes, const void* w0, const void* w1, int64_t w_bytes) {
    _tile_loadd(6, w0, w_bytes);
    _tile_loadd(4, x0, x_bytes);
    _tile_dpbf16ps(0, 4, 6);
    if constexpr (kTwoGroups) {
      _tile_loadd(7, w1, w_bytes);
      _tile_dpbf16ps(1, 4, 7);
    }
    if constexpr (kTwoRows) {
      _tile_loadd(5, x1, x_bytes);
      _tile_dpbf16ps(2, 5, 6);
    }
    if constexpr (kTwoRows && kTwoGroups) _tile_dpbf16ps(3, 5, 7);
  }
  // Load and store: rows `bytes` apart, the tiles of outputs adjacent.
  static void load(const float* rows0, const float* rows1, int64_t bytes) {
    _tile_loadd(0, rows0, bytes);
    if constexpr (kTwoGroups) _tile_loadd(1, rows0 + kTileSide, bytes);
    if constexpr (kTwoRows) _tile_loadd(2, rows1, bytes);
    if constexpr (kTwoRows && kTwoGroups) _tile_loadd(3, rows1 + kTileSide, bytes);
  }
  static void store(float* rows0, float* rows1, int64_t bytes) {
    _tile_stored(0, rows0, bytes);
    if constexpr (kTwoGroups) _tile_stored(1, rows0 + kTileSide, bytes);
    if constexpr (kTwoRows) _tile_stored(2, rows1, bytes);
    if constexpr (kTwoRows && kTwoGroups) _tile_stored(3, rows1 + kTileSide, bytes);
  }
};

#endif
