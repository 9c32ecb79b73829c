// Segmented LoRA: y[rows of g, slice n] += weight·scaling·(x·Aᵀ)·B, each slot at its own rank. Slices with a scale and
// a shift of the outputs (DoRA, an adapter's bias) get them in the same pass.
//
// Two phases: shrink computes h for every pair (segment, slice), expand adds to y. Shrink is split into units of equal
// cost. Expand is split into columns only: the thread that claims columns processes all segments for them, so that
// rows in several segments (composition) are summed in segment order, whatever the number of threads.
//
// An adapter may be anywhere in memory and serves few rows, so most of the time is spent loading it. Both phases
// prefetch the next data while they load the current.
#include <algorithm>
#include <vector>

#include "dot.h"
#include "team.h"

namespace {

constexpr int kVectors = 4;                          // of columns per expand tile
constexpr int kExpandTileRows = kLanes == 16 ? 6 : 2;  // with kVectors sums each, they fit in the registers
constexpr int64_t kExpandRows = 24;                  // rows multiplied together with a stretch of B
constexpr int64_t kColumns = kVectors * kLanes;
// How far ahead to prefetch: some microseconds' work, within a thread's share of the caches.
constexpr int64_t kBlocksAhead = 2;   // of A, kDotOuts rows each
constexpr int64_t kColumnsAhead = 4 * kColumns;
constexpr int64_t kElementsOfY = 64 << 10;  // computed by a thread before it copies them to y
constexpr int64_t kWorthAClaim = 1 << 18;   // products, a few microseconds' work
constexpr int64_t kUnitSums = kDotRows * kDotOuts;

// A slice changed by a segment's adapter.
struct Pair {
  int64_t segment, slice, rank;
  int64_t row_blocks;  // of kDotRows rows
  int64_t unit;        // first shrink unit: kDotOuts rows of A with kDotRows rows of x, ordered by blocks of A
  int64_t h;           // offset of its [rows, rank]
};

// Memory of one thread; grown once and kept.
template <typename X>
struct Work {
  std::vector<Pair> pairs;
  std::vector<float> sums;  // of units
  std::vector<X> y;
};

// A thread's weights and rows as float32, for products that are not computed in the weights' type.
struct Wide {
  std::vector<float> a, x;
};

template <typename X, typename W>
struct Lora {
  X* y;
  int64_t y_stride;
  const X* x;
  int64_t x_stride;
  const W* a;  // [L, N, R, I]
  const W* b;  // [L, R, O]
  const int32_t* rank;       // [L, N]
  const float* scaling;      // [L, N]
  const int32_t* is_affine;  // [L, N]
  const float* scale;        // [L, O], valid in affine slices only
  const float* shift;        // [L, O]
  const int32_t* slice_end;
  const int32_t* start;
  const int32_t* end;
  const int32_t* slot;
  const float* weight;
  int64_t num_segments, num_slices, max_rank, num_in, num_out;

  // Products use the weights' type if x has it too, else float32.
  static constexpr bool kSameType = std::is_same_v<X, W> && !std::is_same_v<X, _Float16>;
  using Product = std::conditional_t<kSameType, X, float>;

  int64_t place(const Pair& pair) const { return slot[pair.segment] * num_slices + pair.slice; }
  int64_t length(const Pair& pair) const { return end[pair.segment] - start[pair.segment]; }
  const W* block_of_a(const Pair& pair, int64_t block) const {
    return a + (place(pair) * max_rank + block * kDotOuts) * num_in;
  }
  static int64_t num_blocks(const Pair& pair) { return (pair.rank + kDotOuts - 1) / kDotOuts; }
  // Returns the block of A needed kBlocksAhead after this one; at the end, this one.
  const W* block_ahead(const std::vector<Pair>& pairs, size_t p, int64_t block) const {
    const W* own = block_of_a(pairs[p], block);
    for (block += kBlocksAhead; p < pairs.size(); block -= num_blocks(pairs[p++]))
      if (block < num_blocks(pairs[p])) return block_of_a(pairs[p], block);
    return own;
  }
  int64_t slice_begin(int64_t n) const { return n == 0 ? 0 : slice_end[n - 1]; }

  // Converts `count` rows of `size` features to adjacent rows of float32.
  template <typename T>
  static const float* widen_rows(const T* source, int64_t stride, int64_t count, int64_t size,
                                 std::vector<float>& out) {
    out.resize(count * size);
    for (int64_t k = 0; k < count; ++k)
      for_each_vector(size, [&](int64_t i, int64_t n) { store(load(source + k * stride + i, n), &out[k * size + i], n); });
    return out.data();
  }

  // Calls body(index of the pair, block of A, first row, rows, outputs) for the units from `unit` to `last`.
  template <typename Body>
  void for_each_unit(const std::vector<Pair>& pairs, int64_t unit, int64_t last, Body body) const {
    for (size_t p = 0; unit < last; ++p) {
      const Pair& pair = pairs[p];
      for (; unit < std::min(last, pair.unit + num_blocks(pair) * pair.row_blocks); ++unit) {
        const int64_t block = (unit - pair.unit) / pair.row_blocks;
        const int64_t row = (unit - pair.unit) % pair.row_blocks * kDotRows;
        body(p, block, row, std::min<int64_t>(kDotRows, length(pair) - row),
             std::min<int64_t>(kDotOuts, pair.rank - block * kDotOuts));
      }
    }
  }

  // Computes weight·scaling·x·Aᵀ for the units from `unit` to `last`, each [kDotRows, kDotOuts].
  void shrink(const std::vector<Pair>& pairs, int64_t unit, int64_t last, float* sums) const {
    Wide& wide = thread_own<Wide>();
    const W* widened = nullptr;  // the block of A that wide.a holds
    for_each_unit(pairs, unit, last, [&](size_t p, int64_t block, int64_t row, int64_t num_rows, int64_t outs) {
      const Pair& pair = pairs[p];
      const float factor = weight[pair.segment] * scaling[place(pair)];
      const W* own_a = block_of_a(pair, block);
      const W* next_a = row == 0 ? block_ahead(pairs, p, block) : own_a;
      const X* rows = x + (start[pair.segment] + row) * x_stride;
      for_each_row_tile<kDotRows>(num_rows, [&](auto count, int64_t) {
        if constexpr (kSameType) {
          dot_rows<count>(rows, x_stride, own_a, next_a, num_in, outs, num_in, sums, kDotOuts);
        } else {
          if (widened != own_a) widen_rows(own_a, num_in, outs, num_in, wide.a);
          widened = own_a;
          widen_rows(rows, x_stride, count, num_in, wide.x);
          dot_rows<count>(wide.x.data(), num_in, wide.a.data(), wide.a.data(), num_in, outs, num_in, sums, kDotOuts);
        }
      });
      for (int64_t i = 0; i < kUnitSums; ++i) sums[i] *= factor;
      sums += kUnitSums;
    });
  }

  // Copies the units' sums to their places in h, [rows, rank] per pair.
  void put(const std::vector<Pair>& pairs, int64_t unit, int64_t last, const float* sums, float* h) const {
    for_each_unit(pairs, unit, last, [&](size_t p, int64_t block, int64_t row, int64_t num_rows, int64_t outs) {
      const Pair& pair = pairs[p];
      for (int64_t k = 0; k < num_rows; ++k)
        std::memcpy(h + pair.h + (row + k) * pair.rank + block * kDotOuts, sums + k * kDotOuts, outs * sizeof(float));
      sums += kUnitSums;
    });
  }

  // The change of a pair's outputs after its term is added: scale·y + shift, or y without a scale.
  struct Affine {
    const float *scale, *shift;
    Floats operator()(Floats value, int64_t column, int64_t count = kLanes) const {
      return scale == nullptr ? value : value * load(scale + column, count) + load(shift + column, count);
    }
  };
  Affine affine(const Pair& pair) const {
    if (!is_affine[place(pair)]) return {nullptr, nullptr};
    return {scale + slot[pair.segment] * num_out, shift + slot[pair.segment] * num_out};
  }

  // Part of y: rows from `row` on, columns from `column` on.
  struct Part {
    X* y;
    int64_t stride, row, column;
    X* at(int64_t r, int64_t c) const { return y + (r - row) * stride + c - column; }
  };

  // out [kRows, kColumns] += h [kRows, own_rank]·B [own_rank, kColumns], at `column`.
  template <int kRows>
  void expand_tile(const float* h, int64_t own_rank, const W* own_b, const W* next_b, const Affine& change,
                   int64_t column, X* out, int64_t stride) const {
    Floats sum[kRows][kVectors] = {};
    for (int64_t r = 0; r < own_rank; ++r) {
      Floats row[kVectors];
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) row[v] = load(own_b + r * num_out + v * kLanes);
#pragma GCC unroll 4
      for (size_t byte = 0; byte < kColumns * sizeof(W); byte += 64)
        request(reinterpret_cast<const char*>(next_b + r * num_out) + byte);
      add_products(sum, h + r, own_rank, row);
    }
#pragma GCC unroll 6
    for (int k = 0; k < kRows; ++k)
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) {
        X* place = out + k * stride + v * kLanes;
        store(change(load(place) + sum[k][v], column + v * kLanes), place);
      }
  }

  // The same for one row and `count` < kColumns columns.
  void expand_rest(const float* h, int64_t own_rank, const W* own_b, int64_t count, const Affine& change,
                   int64_t column, X* out) const {
    for_each_vector(count, [&](int64_t i, int64_t n) {
      Floats total = {};
      for (int64_t r = 0; r < own_rank; ++r) total += h[r] * load(own_b + r * num_out + i, n);
      store(change(load(out + i, n) + total, column + i, n), out + i, n);
    });
  }

  struct Columns {
    int64_t first, last;
    int64_t count() const { return last - first; }
  };

  const W* columns_of_b(const Pair& pair) const { return b + slot[pair.segment] * max_rank * num_out; }

  // Adds a pair's term to its columns, and prefetches the next pair towards the end.
  void expand(const Pair& pair, Columns own, const Pair& next, Columns next_own, const float* h,
              const Part& part) const {
    const W* own_b = columns_of_b(pair);
    const Affine change = affine(pair);
    const int64_t ahead = std::min(kColumnsAhead, own.count());
    for (int64_t row = 0; row < length(pair); row += kExpandRows) {
      const int64_t num_rows = std::min(kExpandRows, length(pair) - row);
      const float* own_h = h + row * pair.rank;
      const int64_t first_row = start[pair.segment] + row;
      int64_t column = own.first;
      for (; column + kColumns <= own.last; column += kColumns) {
        const int64_t beyond = column + ahead - own.last;
        const W* next_b = beyond < 0                   ? own_b + column + ahead
                          : beyond < next_own.count() ? columns_of_b(next) + next_own.first + beyond
                                                       : own_b + column;
        for_each_row_tile<kExpandTileRows>(num_rows, [&](auto rows, int64_t k) {
          expand_tile<rows>(own_h + k * pair.rank, pair.rank, own_b + column, next_b, change, column,
                            part.at(first_row + k, column), part.stride);
        });
      }
      if (column < own.last)
        for (int64_t k = 0; k < num_rows; ++k)
          expand_rest(own_h + k * pair.rank, pair.rank, own_b + column, own.last - column, change, column,
                      part.at(first_row + k, column));
    }
  }

  // Returns the columns of a pair within `all`, maybe none.
  Columns columns(const Pair& pair, Columns all) const {
    return {std::max(slice_begin(pair.slice), all.first), std::min<int64_t>(slice_end[pair.slice], all.last)};
  }

  void expand_all(const std::vector<Pair>& pairs, Columns all, const float* h, const Part& part) const {
    for (size_t p = 0, next; p < pairs.size(); p = next) {
      const Columns own = columns(pairs[p], all);
      for (next = p + 1; next < pairs.size() && columns(pairs[next], all).count() <= 0;) ++next;
      const Pair& next_pair = pairs[next < pairs.size() ? next : p];
      if (own.count() > 0) expand(pairs[p], own, next_pair, columns(next_pair, all), h + pairs[p].h, part);
    }
  }

  void run(Worker& worker) const {
    Work<X>& work = thread_own<Work<X>>();
    std::vector<Pair>& pairs = work.pairs;
    pairs.clear();
    int64_t num_units = 0, size_of_h = 0, first_row = INT64_MAX, last_row = 0;
    for (int64_t g = 0; g < num_segments; ++g)
      for (int64_t n = 0; n < num_slices; ++n) {
        Pair pair{g, n, rank[slot[g] * num_slices + n], 0, num_units, size_of_h};
        const int64_t rows = length(pair);
        if ((pair.rank == 0 && !is_affine[place(pair)]) || rows <= 0) continue;
        pair.row_blocks = (rows + kDotRows - 1) / kDotRows;
        pairs.push_back(pair);
        num_units += pair.row_blocks * num_blocks(pair);
        size_of_h += rows * pair.rank;
        first_row = std::min<int64_t>(first_row, start[g]);
        last_row = std::max<int64_t>(last_row, end[g]);
      }
    if (pairs.empty()) return;

    float* h = worker.shared_floats(0, size_of_h);
    worker.repeatable(
        1, num_units, {std::max<int64_t>(1, kWorthAClaim / (kUnitSums * num_in)), 256},
        [&](int64_t unit, int64_t last, int64_t) {
          work.sums.resize(std::max<size_t>(work.sums.size(), (last - unit) * kUnitSums));
          shrink(pairs, unit, last, work.sums.data());
        },
        [&](int64_t unit, int64_t last) { put(pairs, unit, last, work.sums.data(), h); });

    const int64_t num_rows = last_row - first_row;
    const auto columns_of = [&](int64_t stretch, int64_t last) {
      return Columns{stretch * kColumns, std::min(num_out, last * kColumns)};
    };
    worker.repeatable(
        2, (num_out + kColumns - 1) / kColumns,
        {std::max<int64_t>(1, kWorthAClaim / (8 * num_rows * kColumns)),
         std::max<int64_t>(1, kElementsOfY / (num_rows * kColumns))},
        [&](int64_t stretch, int64_t last, int64_t) {
          const Columns own = columns_of(stretch, last);
          work.y.resize(std::max<size_t>(work.y.size(), num_rows * own.count()));
          const Part part{work.y.data(), own.count(), first_row, own.first};
          for (int64_t r = first_row; r < last_row; ++r)
            std::memcpy(part.at(r, own.first), y + r * y_stride + own.first, own.count() * sizeof(X));
          expand_all(pairs, own, h, part);
        },
        [&](int64_t stretch, int64_t last) {
          const Columns own = columns_of(stretch, last);
          const Part part{work.y.data(), own.count(), first_row, own.first};
          for (int64_t r = first_row; r < last_row; ++r)
            std::memcpy(y + r * y_stride + own.first, part.at(r, own.first), own.count() * sizeof(X));
        });
  }
};

}  // namespace

extern "C" {

void lf_lora_add(int dtype, int lora_dtype, void* y, int64_t y_stride, const void* x, int64_t x_stride, const void* a,
                 const void* b, const int32_t* rank, const float* scaling, const int32_t* is_affine,
                 const float* scale, const float* shift, const int32_t* slice_end, const int32_t* start,
                 const int32_t* end, const int32_t* slot, const float* weight,
                 int64_t num_segments, int64_t num_slices, int64_t max_rank, int64_t num_in, int64_t num_out) {
  with_dtype(dtype, [&](auto* x_tag) {
    with_dtype(lora_dtype, [&](auto* w_tag) {
      using X = element<decltype(x_tag)>;
      using W = element<decltype(w_tag)>;
      const Lora<X, W> lora{static_cast<X*>(y), y_stride, static_cast<const X*>(x), x_stride, static_cast<const W*>(a),
                            static_cast<const W*>(b), rank, scaling, is_affine, scale, shift, slice_end, start, end,
                            slot, weight, num_segments, num_slices, max_rank, num_in, num_out};
      run_call(true, [&](Worker& worker) { lora.run(worker); });
    });
  });
}

LF_REPLAYABLE(lf_lora_add)

}  // extern "C"
