// Linear layers: y = x·Wᵀ + bias in bfloat16, W in bfloat16 or in 8-bit integers with a scale per output.
//
// Packed W is [groups of 16 outputs][pairs of inputs][16][2]: a vector holds one pair of inputs for several outputs and is
// multiplied with the same pair of x, broadcast. A tile's sums then are outputs side by side: nothing is added across
// lanes, and both x and W are read in order. With few rows all that counts is to read W once; with many, the tile's
// registers keep the multipliers busy. The same order is that of AMX's tiles.
#include <algorithm>
#include <vector>

#include <omp.h>

#include "amx.h"
#include "dot.h"

namespace {

constexpr int64_t kGroup = 16;                         // outputs of a group
constexpr int kTileRows = kLanes == 16 ? 6 : 2;        // with kTileVectors sums each, they fit the registers
constexpr int kTileVectors = 4;
constexpr int64_t kLine = 64;  // bytes of a cache line
constexpr int64_t kTileOuts = kTileVectors * kLanes;
constexpr int64_t kTileGroups = kTileOuts / kGroup;
constexpr int64_t kVectorsOfGroup = kGroup / kLanes;
static_assert(kTileOuts % kGroup == 0, "a tile is made of whole groups");

inline Words load_weights(const bf16* p) { return load_words(p); }

// kLanes pairs of integers as pairs of bfloat16, which holds them exactly.
inline Words load_weights(const int8_t* p) {
#if defined(__AVX512BF16__)
  const __m512 low = _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))));
  const __m512 high = _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p + 16))));
  return (Words)_mm512_cvtne2ps_pbh(high, low);
#else
  const Ints pair = reinterpret_cast<Ints>(widen(reinterpret_cast<const uint16_t*>(p)));
  const Floats first = __builtin_convertvector(pair << 24 >> 24, Floats);
  const Floats second = __builtin_convertvector(pair << 16 >> 24, Floats);
  return as_words(first) >> 16 | as_words(second);
#endif
}

struct Linear {
  const bf16* x;
  int64_t x_stride;
  const float* scale;  // [O]; null for bfloat16 weights
  const bf16* bias;    // [O] or null
  bf16* y;
  int64_t rows, pairs, num_out;

  // kRows rows from `row` on, kVectors vectors of outputs from `first` on, whose weights begin at `w`. On the way as
  // many cache lines as there are pairs are requested from `ahead` on: the multipliers are busy, the memory is not.
  template <int kRows, int kVectors, typename W>
  void tile(const W* w, int64_t row, int64_t first, const char* ahead) const {
    const int64_t group_size = pairs * kGroup * 2;
    Floats sum[kRows][kVectors] = {};
    for (int64_t k = 0; k < pairs; ++k) {
      request(ahead + k * kLine);
      Words weight[kVectors];
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v)
        weight[v] = load_weights(w + v / kVectorsOfGroup * group_size + (k * kGroup + v % kVectorsOfGroup * kLanes) * 2);
#pragma GCC unroll 6
      for (int r = 0; r < kRows; ++r) {
        const Words pair = broadcast(load_word(x + (row + r) * x_stride + 2 * k));
#pragma GCC unroll 4
        for (int v = 0; v < kVectors; ++v) sum[r][v] = multiply_add(sum[r][v], pair, weight[v]);
      }
    }
#pragma GCC unroll 6
    for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) finish(sum[r][v], row + r, first + v * kLanes);
  }

  void finish(Floats value, int64_t row, int64_t first) const {
    const int64_t count = std::min<int64_t>(kLanes, num_out - first);
    if (count <= 0) return;
    if (scale != nullptr) value *= load(scale + first, count);
    if (bias != nullptr) value += load(bias + first, count);
    store(value, y + row * num_out + first, count);
  }

  template <int kVectors, typename W>
  void all_rows(const W* w, int64_t first, const char* ahead) const {
    for_each_row_tile<kTileRows>(rows, [&](auto tile_rows, int64_t row) {
      tile<tile_rows, kVectors>(w, row, first, ahead + row / kTileRows % kTileGroups * pairs * kLine);
    });
  }

  // All rows with the `count` <= kTileGroups groups of outputs from `group` on; the weights of those that follow
  // lie at `next`.
  template <typename W>
  void groups(const W* w, int64_t group, int64_t count, const void* next) const {
    const char* ahead = static_cast<const char*>(next);
    switch (count) {
      case 1: return all_rows<std::min<int>(kTileVectors, kVectorsOfGroup)>(w, group * kGroup, ahead);
      case 2: return all_rows<std::min<int>(kTileVectors, 2 * kVectorsOfGroup)>(w, group * kGroup, ahead);
      case 3: return all_rows<std::min<int>(kTileVectors, 3 * kVectorsOfGroup)>(w, group * kGroup, ahead);
      case 4: return all_rows<std::min<int>(kTileVectors, 4 * kVectorsOfGroup)>(w, group * kGroup, ahead);
    }
  }
};

// `size` integers as bfloat16, in `wide`.
void widen_groups(const int8_t* w, int64_t size, std::vector<bf16>& wide) {
  wide.resize(size);
  for (int64_t i = 0; i < size; i += 2 * kLanes) *reinterpret_cast<Words*>(&wide[i]) = load_weights(w + i);
}

#if defined(__AMX_BF16__)
constexpr int64_t kAmxGroups = 2;          // that are computed together
constexpr int64_t kAmxBytesOfX = 1 << 20;  // rows that go through all weights together: they stay in the second level
constexpr int64_t kFewIntegerRows = 4;     // for which widening the weights in memory costs more than tiles gain

// Rows of x by pairs of tiles, with groups of outputs by two. Where the inputs do not fill tiles, the rest lies in
// copies filled up with zeros.
class AmxLinear {
 public:
  explicit AmxLinear(const Linear& linear)
      : l_(linear), steps_(linear.pairs / kTileSide), rest_(linear.pairs % kTileSide) {}

  // `count` rows from `row` on with the groups from `group` to `last`.
  template <typename W>
  void run(const W* w, int64_t row, int64_t count, int64_t group, int64_t last) {
    const RowTiles tiles(count);
    const Tiles own(tiles.rows);
    const int64_t group_size = l_.pairs * kGroup * 2;
    if (rest_ > 0) copy_rest_of_x(row, count);
    for (; group < last; group += kAmxGroups) {
      const int64_t num_groups = std::min(kAmxGroups, last - group);
      const W* next = w + (group + num_groups) * group_size;
      const bf16* weights;
      if constexpr (std::is_same_v<W, int8_t>) {
        widen_groups(w + group * group_size, num_groups * group_size, wide_);
        weights = wide_.data();
      } else {
        weights = w + group * group_size;
      }
      if (rest_ > 0) copy_rest_of_w(weights, num_groups);
      if (num_groups == 2)
        all_rows<2>(weights, tiles, row, group * kGroup, next);
      else
        all_rows<1>(weights, tiles, row, group * kGroup, next);
    }
  }

 private:
  template <int kGroups>
  void all_rows(const bf16* w, const RowTiles& tiles, int64_t row, int64_t first, const void* next) {
    const int64_t num_turns = (tiles.number + 1) / 2;
    for (int64_t turn = 0; turn < num_turns; ++turn) {
      // Each turn requests its share of the lines of the next groups.
      const int64_t lines = (kTileSide * kGroups + num_turns - 1) / num_turns;
      const char* ahead = static_cast<const char*>(next) + turn * lines * kLine;
      const int64_t own = std::min(lines, kTileSide * kGroups - turn * lines);
      if (2 * turn + 1 < tiles.number)
        product<2, kGroups>(w, tiles.first_within(2 * turn), tiles.first_within(2 * turn + 1), tiles.rows, row, first,
                            ahead, own);
      else
        product<1, kGroups>(w, tiles.first_within(2 * turn), 0, tiles.rows, row, first, ahead, own);
    }
  }

  template <int kRowTiles, int kGroups>
  void product(const bf16* w, int64_t tile0, int64_t tile1, int64_t num_rows, int64_t row, int64_t first,
               const char* ahead, int64_t lines_ahead) {
    using Sums = TileSums<kRowTiles, kGroups>;
    const bf16* x0 = l_.x + (row + tile0) * l_.x_stride;
    const bf16* x1 = l_.x + (row + tile1) * l_.x_stride;
    const bf16* w1 = w + l_.pairs * kGroup * 2;
    const int64_t x_bytes = l_.x_stride * sizeof(bf16);
    Sums::clear();
    for (int64_t step = 0; step < steps_; ++step) {
      for (int64_t line = 0; line < lines_ahead; ++line) request(ahead + (step * kTileSide * kGroups + line) * kLine);
      Sums::add(x0 + step * 2 * kTileSide, x1 + step * 2 * kTileSide, x_bytes, w + step * kTileElements,
                w1 + step * kTileElements, 64);
    }
    if (rest_ > 0)
      Sums::add(&x_rest_[tile0 * 2 * kTileSide], &x_rest_[tile1 * 2 * kTileSide], 64, w_rest_, w_rest_ + kTileElements,
                64);
    alignas(64) float sums[kRowTiles * kTileSide * kGroups * kTileSide];
    Sums::store(sums, sums + kTileSide * kGroups * kTileSide, kGroups * kTileSide * sizeof(float));
    for (int64_t t = 0; t < kRowTiles; ++t)
      for (int64_t r = 0; r < num_rows; ++r)
        for (int64_t g = 0; g < kGroups; ++g)
          l_.finish(load(&sums[((t * kTileSide + r) * kGroups + g) * kTileSide]), row + (t ? tile1 : tile0) + r,
                    first + g * kTileSide);
  }

  void copy_rest_of_x(int64_t row, int64_t count) {
    x_rest_.assign(count * 2 * kTileSide, bf16{0});
    for (int64_t r = 0; r < count; ++r)
      std::memcpy(&x_rest_[r * 2 * kTileSide], l_.x + (row + r) * l_.x_stride + steps_ * 2 * kTileSide,
                  rest_ * 2 * sizeof(bf16));
  }
  void copy_rest_of_w(const bf16* w, int64_t num_groups) {
    for (int64_t g = 0; g < num_groups; ++g)
      std::memcpy(w_rest_ + g * kTileElements, w + g * l_.pairs * kGroup * 2 + steps_ * kTileElements,
                  rest_ * 2 * kGroup * sizeof(bf16));
  }

  const Linear l_;
  const int64_t steps_, rest_;  // whole tiles of pairs, and pairs beyond
  std::vector<bf16> wide_, x_rest_;
  alignas(64) bf16 w_rest_[kAmxGroups * kTileElements] = {};
};
#endif

// The groups from `first` to `last`, a thread's share.
template <typename W>
void run_groups(const Linear& l, const W* w, int64_t first, int64_t last) {
#if defined(__AMX_BF16__)
  if (std::is_same_v<W, bf16> || l.rows > kFewIntegerRows) {
    AmxLinear amx(l);
    const int64_t num_rows = std::max<int64_t>(2 * kTileSide, kAmxBytesOfX / (2 * l.pairs * sizeof(bf16)));
    for (int64_t row = 0; row < l.rows; row += num_rows) amx.run(w, row, std::min(num_rows, l.rows - row), first, last);
    return;
  }
#endif
  const int64_t group_size = l.pairs * kGroup * 2;
  std::vector<bf16> wide;  // integers of a tile, widened once for many rows
  for (int64_t group = first; group < last; group += kTileGroups) {
    const int64_t count = std::min(kTileGroups, last - group);
    const W* own = w + group * group_size;
    if constexpr (std::is_same_v<W, int8_t>) {
      if (l.rows > 2 * kTileRows) {
        widen_groups(own, count * group_size, wide);
        l.groups(wide.data(), group, count, own + count * group_size);
        continue;
      }
    }
    l.groups(own, group, count, own + count * group_size);
  }
}

template <typename W>
void run_packed(const Linear& l, const W* w) {
  const int64_t num_groups = (l.num_out + kGroup - 1) / kGroup;
#pragma omp parallel
  {
    // Shares of whole groups, which differ by one group at most.
    const int64_t threads = omp_get_num_threads(), thread = omp_get_thread_num();
    run_groups(l, w, num_groups * thread / threads, num_groups * (thread + 1) / threads);
  }
}

// W [O, I] as it lies in a checkpoint, for few rows: the products run along the inputs.
void run_plain(const Linear& l, const bf16* w, int64_t num_in) {
#pragma omp parallel for schedule(static)
  for (int64_t first = 0; first < l.num_out; first += kGroup) {
    const int64_t count = std::min(kGroup, l.num_out - first);
    for_each_row_tile<kDotRows>(l.rows, [&](auto tile_rows, int64_t row) {
      float sums[tile_rows][kGroup] = {};
      dot_rows<tile_rows>(l.x + row * l.x_stride, l.x_stride, w + first * num_in, w + (first + count) * num_in, num_in,
                          count, num_in, sums[0], kGroup);
      for (int r = 0; r < tile_rows; ++r)
        for (int64_t o = 0; o < count; o += kLanes) l.finish(load(&sums[r][o]), row + r, first + o);
    });
  }
}

}  // namespace

extern "C" {

// x [rows, I], w [O, I] → y [rows, O].
void lf_linear(const void* x, int64_t x_stride, const void* w, const void* bias, void* y, int64_t rows, int64_t num_in,
               int64_t num_out) {
  run_plain(Linear{static_cast<const bf16*>(x), x_stride, nullptr, static_cast<const bf16*>(bias),
                   static_cast<bf16*>(y), rows, 0, num_out},
            static_cast<const bf16*>(w), num_in);
}

// x [rows, 2·pairs], w packed → y [rows, O].
void lf_linear_packed(const void* x, int64_t x_stride, const void* w, const void* bias, void* y, int64_t rows,
                      int64_t pairs, int64_t num_out) {
  run_packed(Linear{static_cast<const bf16*>(x), x_stride, nullptr, static_cast<const bf16*>(bias), static_cast<bf16*>(y),
             rows, pairs, num_out},
      static_cast<const bf16*>(w));
}

// The same with w in 8-bit integers, each output o times scale[o].
void lf_linear_packed_int8(const void* x, int64_t x_stride, const void* w, const float* scale, const void* bias,
                           void* y, int64_t rows, int64_t pairs, int64_t num_out) {
  run_packed(Linear{static_cast<const bf16*>(x), x_stride, scale, static_cast<const bf16*>(bias), static_cast<bf16*>(y), rows,
             pairs, num_out},
      static_cast<const int8_t*>(w));
}

LF_REPLAYABLE(lf_linear)
LF_REPLAYABLE(lf_linear_packed)
LF_REPLAYABLE(lf_linear_packed_int8)

}  // extern "C"
