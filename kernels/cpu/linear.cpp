// Linear layers: y = x·Wᵀ + bias, with W in x's type or, for bfloat16, in 8-bit integers with a scale per output.
//
// Packed W is [groups of 16 outputs][units of inputs][16][unit]; a unit is a pair of bfloat16 or integers, or one
// float. A vector holds one unit of inputs for several outputs and is multiplied with the same unit of x, broadcast.
// So a tile's sums are adjacent outputs: nothing is added across lanes, and both x and W are read in order. With few
// rows the cost is reading W once; with many, the tile's registers keep the multipliers busy. AMX's tiles use this
// order too.
#include <algorithm>
#include <vector>

#include "amx.h"
#include "dot.h"
#include "team.h"

namespace {

constexpr int64_t kGroup = 16;                         // outputs per group
constexpr int kTileRows = kLanes == 16 ? 6 : 2;        // with kTileVectors sums each, they fit in the registers
constexpr int kTileVectors = 4;
constexpr int64_t kLine = 64;  // bytes of a cache line
constexpr int64_t kTileOuts = kTileVectors * kLanes;
constexpr int64_t kTileGroups = kTileOuts / kGroup;
constexpr int64_t kBytesOfY = 128 << 10;  // computed by a thread before it copies them to y
constexpr int64_t kVectorsOfGroup = kGroup / kLanes;
static_assert(kTileOuts % kGroup == 0, "a tile is made of whole groups");

inline Words load_weights(const bf16* p) { return load_words(p); }
template <typename T>
inline Floats load_weights(const T* p) {
  return load(p);
}
inline uint32_t load_unit(const bf16* p) { return load_word(p); }
template <typename T>
inline float load_unit(const T* p) {
  return to_float(*p);
}

// Converts kLanes pairs of integers to pairs of bfloat16, exactly.
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

template <typename T>
struct Linear {
  const T* x;
  int64_t x_stride;
  const float* scale;  // [O]; null except for integers
  const T* bias;       // [O] or null
  T* y;                // outputs from y_first on
  int64_t y_stride, y_first, rows, units, num_out;

  static constexpr int64_t u = kUnit<T>;

  // Computes kRows rows from `row` on, kVectors vectors of outputs from `first` on, with weights from `w` on. Meanwhile
  // it prefetches one cache line per unit from `ahead` on: the multipliers are busy, the memory is not.
  template <int kRows, int kVectors, typename W>
  void tile(const W* w, int64_t row, int64_t first, const char* ahead) const {
    const int64_t group_size = units * kGroup * u;
    Floats sum[kRows][kVectors] = {};
    for (int64_t k = 0; k < units; ++k) {
      request(ahead + k * kLine);
      decltype(load_weights(w)) weight[kVectors];
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v)
        weight[v] = load_weights(w + v / kVectorsOfGroup * group_size + (k * kGroup + v % kVectorsOfGroup * kLanes) * u);
#pragma GCC unroll 6
      for (int r = 0; r < kRows; ++r) {
        const auto unit = broadcast(load_unit(x + (row + r) * x_stride + u * k));
#pragma GCC unroll 4
        for (int v = 0; v < kVectors; ++v) sum[r][v] = multiply_add(sum[r][v], unit, weight[v]);
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
    store(value, y + row * y_stride + first - y_first, count);
  }

  template <int kVectors, typename W>
  void all_rows(const W* w, int64_t first, const char* ahead) const {
    for_each_row_tile<kTileRows>(rows, [&](auto tile_rows, int64_t row) {
      tile<tile_rows, kVectors>(w, row, first, ahead + row / kTileRows % kTileGroups * units * kLine);
    });
  }

  // Computes all rows with the `count` <= kTileGroups groups of outputs from `group` on. `next`: the weights of the groups
  // that follow.
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

// Memory of one thread; grown once and kept.
template <typename T>
struct Scratch {
  std::vector<T> wide, y;
};

template <typename T>
T* grown(std::vector<T>& memory, int64_t size) {
  if (memory.size() < static_cast<size_t>(size)) memory.resize(size);
  return memory.data();
}

// Converts `size` integers to bfloat16 in the thread's scratch memory.
const bf16* widen_groups(const int8_t* w, int64_t size) {
  bf16* wide = grown(thread_own<Scratch<bf16>>().wide, size);
  for (int64_t i = 0; i < size; i += 2 * kLanes) *reinterpret_cast<Words*>(&wide[i]) = load_weights(w + i);
  return wide;
}

#if defined(__AMX_BF16__)
constexpr int64_t kAmxGroups = 2;          // computed together
constexpr int64_t kAmxBytesOfX = 1 << 20;  // rows computed together with all weights: they stay in the L2 cache
constexpr int64_t kFewIntegerRows = 4;     // up to here widening weights in memory costs more than tiles gain

// Rows of x in pairs of tiles, with two groups of outputs. If the inputs do not fill tiles, the rest is in copies
// padded with zeros.
class AmxLinear {
 public:
  explicit AmxLinear(const Linear<bf16>& linear)
      : l_(linear), steps_(linear.units / kTileSide), rest_(linear.units % kTileSide) {}

  // Computes `count` rows from `row` on with the groups from `group` to `last`; `after` comes next.
  template <typename W>
  void run(const W* w, int64_t row, int64_t count, int64_t group, int64_t last, int64_t after) {
    const RowTiles tiles(count);
    const Tiles own(tiles.rows);
    const int64_t group_size = l_.units * kGroup * 2;
    if (rest_ > 0) copy_rest_of_x(row, count);
    for (; group < last; group += kAmxGroups) {
      const int64_t num_groups = std::min(kAmxGroups, last - group);
      const W* next = w + (group + num_groups < last ? group + num_groups : after) * group_size;
      const bf16* weights;
      if constexpr (std::is_same_v<W, int8_t>) {
        weights = widen_groups(w + group * group_size, num_groups * group_size);
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
      // Each turn prefetches its share of the next groups' cache lines.
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
    const bf16* w1 = w + l_.units * kGroup * 2;
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
      std::memcpy(w_rest_ + g * kTileElements, w + g * l_.units * kGroup * 2 + steps_ * kTileElements,
                  rest_ * 2 * kGroup * sizeof(bf16));
  }

  const Linear<bf16> l_;
  const int64_t steps_, rest_;  // whole tiles of pairs, and pairs beyond
  std::vector<bf16> x_rest_;
  alignas(64) bf16 w_rest_[kAmxGroups * kTileElements] = {};
};
#endif

// Computes the groups from `first` to `last`; `after` comes next.
template <typename T, typename W>
void run_groups(const Linear<T>& l, const W* w, int64_t first, int64_t last, int64_t after) {
#if defined(__AMX_BF16__)
  if constexpr (std::is_same_v<T, bf16>) {
    if (std::is_same_v<W, bf16> || l.rows > kFewIntegerRows) {
      AmxLinear amx(l);
      const int64_t num_rows = std::max<int64_t>(2 * kTileSide, kAmxBytesOfX / (2 * l.units * sizeof(bf16)));
      for (int64_t row = 0; row < l.rows; row += num_rows)
        amx.run(w, row, std::min(num_rows, l.rows - row), first, last, after);
      return;
    }
  }
#endif
  const int64_t group_size = l.units * kGroup * l.u;
  for (int64_t group = first; group < last; group += kTileGroups) {
    const int64_t count = std::min(kTileGroups, last - group);
    const W* own = w + group * group_size;
    const W* next = group + count < last ? own + count * group_size : w + after * group_size;
    if constexpr (std::is_same_v<W, int8_t>) {
      if (l.rows > 2 * kTileRows) {
        l.groups(widen_groups(own, count * group_size), group, count, next);
        continue;
      }
    }
    l.groups(own, group, count, next);
  }
}

// Computes y by groups of outputs, with compute(own, first group, end, next group).
template <typename T, typename Compute>
void run_by_groups(const Linear<T>& l, Compute compute) {
  run_call(true, [&](Worker& worker) {
    const int64_t most = kBytesOfY / std::max<int64_t>(1, l.rows * kGroup * sizeof(T));
    const Cut cut{1, std::max<int64_t>(1, most), kTileGroups};
    Linear<T> own = l;
    worker.repeatable(
        0, (l.num_out + kGroup - 1) / kGroup, cut,
        [&](int64_t first, int64_t last, int64_t after) {
          own.y_first = first * kGroup;
          own.y_stride = (last - first) * kGroup;
          own.y = grown(thread_own<Scratch<T>>().y, l.rows * own.y_stride);
          compute(own, first, last, after);
        },
        [&](int64_t first, int64_t last) {
          const int64_t count = std::min(last * kGroup, l.num_out) - first * kGroup;
          for (int64_t r = 0; r < l.rows; ++r)
            std::memcpy(l.y + r * l.y_stride + first * kGroup, own.y + r * own.y_stride, count * sizeof(T));
        });
  });
}

// For packed W, in T or in integers.
template <typename T, typename W>
void run_packed(const void* x, int64_t x_stride, const W* w, const float* scale, const void* bias, void* y, int64_t rows,
                int64_t units, int64_t num_out) {
  const Linear<T> l{static_cast<const T*>(x), x_stride, scale, static_cast<const T*>(bias), static_cast<T*>(y), num_out, 0,
                    rows, units, num_out};
  run_by_groups(l, [w](const Linear<T>& own, int64_t first, int64_t last, int64_t after) {
    run_groups(own, w, first, last, after);
  });
}

}  // namespace

extern "C" {

// x [rows, I], w [O, I] in checkpoint order, bfloat16 → y [rows, O]. For few rows: the products run along the inputs.
void lf_linear(const void* x, int64_t x_stride, const void* w, const void* bias, void* y, int64_t rows, int64_t num_in,
               int64_t num_out) {
  const bf16* weights = static_cast<const bf16*>(w);
  const Linear<bf16> l{static_cast<const bf16*>(x), x_stride, nullptr, static_cast<const bf16*>(bias),
                       static_cast<bf16*>(y), num_out, 0, rows, 0, num_out};
  run_by_groups(l, [=](const Linear<bf16>& own, int64_t group, int64_t last, int64_t) {
    for (int64_t first = group * kGroup; first < std::min(last * kGroup, num_out); first += kGroup) {
      const int64_t count = std::min(kGroup, num_out - first);
      const bf16 *own_w = weights + first * num_in, *next_w = own_w + count * num_in;
      for_each_row_tile<kDotRows>(rows, [&](auto tile_rows, int64_t row) {
        float sums[tile_rows][kGroup] = {};
        dot_rows<tile_rows>(own.x + row * x_stride, x_stride, own_w, next_w, num_in, count, num_in, sums[0], kGroup);
        for (int r = 0; r < tile_rows; ++r)
          for (int64_t o = 0; o < count; o += kLanes) own.finish(load(&sums[r][o]), row + r, first + o);
      });
    }
  });
}

// x [rows, I], packed w → y [rows, O]; units: of the inputs.
void lf_linear_packed(int dtype, const void* x, int64_t x_stride, const void* w, const void* bias, void* y, int64_t rows,
                      int64_t units, int64_t num_out) {
  with_dtype(dtype, [&](auto* tag) {
    using T = element<decltype(tag)>;
    run_packed<T>(x, x_stride, static_cast<const T*>(w), nullptr, bias, y, rows, units, num_out);
  });
}

// The same in bfloat16 with w in 8-bit integers; output o is multiplied by scale[o].
void lf_linear_packed_int8(const void* x, int64_t x_stride, const void* w, const float* scale, const void* bias,
                           void* y, int64_t rows, int64_t units, int64_t num_out) {
  run_packed<bf16>(x, x_stride, static_cast<const int8_t*>(w), scale, bias, y, rows, units, num_out);
}

LF_REPLAYABLE(lf_linear)
LF_REPLAYABLE(lf_linear_packed)
LF_REPLAYABLE(lf_linear_packed_int8)

}  // extern "C"
