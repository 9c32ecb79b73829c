// Segmented LoRA: y[rows of g, slice n] += weight·scaling·(x·Aᵀ)·B, each slot at its own rank.
//
// Two phases with a barrier between: shrink fills h for every (segment row, slice), expand adds to y. Expand is split over
// columns only: each thread goes through all segments for its columns, so that rows in several segments (composition)
// are added to by one thread, in segment order, whatever the number of threads.
#include <algorithm>
#include <vector>

#include <omp.h>

#include "dot.h"

namespace {

constexpr int64_t kShrinkRows = kDotRows;  // rows of a work item: few, so that one adapter's rows keep all threads busy
constexpr int64_t kExpandRows = 24;        // rows that go through a stretch of B together
constexpr int kVectors = 4;        // of columns in an expand tile
constexpr int64_t kColumns = kVectors * kLanes;

struct ShrinkItem {
  int64_t segment, slice, first, count;
};

// What the calling thread lays out for all of them.
struct Work {
  std::vector<ShrinkItem> items;
  std::vector<int64_t> offset;  // of each segment's rows in h
  std::vector<float> h;
};

// A thread's weights and rows as float32, where products are not taken in their own type.
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
  const int32_t* rank;   // [L, N]
  const float* scaling;  // [L, N]
  const int32_t* slice_end;
  const int32_t* start;
  const int32_t* end;
  const int32_t* slot;
  const float* weight;
  int64_t num_segments, num_slices, max_rank, num_in, num_out;

  // Products are taken in the weights' own type where x has it too, else in float32.
  static constexpr bool kSameType = std::is_same_v<X, W> && !std::is_same_v<X, _Float16>;
  using Product = std::conditional_t<kSameType, X, float>;

  template <typename T>
  static const Product* products(const T* source, int64_t count, std::vector<float>& scratch) {
    if constexpr (kSameType) {
      return source;
    } else {
      scratch.resize(count);
      for_each_vector(count, [&](int64_t i, int64_t n) { store(load(source + i, n), &scratch[i], n); });
      return scratch.data();
    }
  }

  // An adapter lies anywhere in memory, so its part is asked for while the one before it is computed.
  void prefetch_a(const ShrinkItem& item) const {
    const int64_t place = slot[item.segment] * num_slices + item.slice;
    prefetch(a + place * max_rank * num_in, rank[place] * num_in * sizeof(W));
  }

  void prefetch_b(int64_t g, int64_t n, int64_t first, int64_t last) const {
    const W* own_b = b + slot[g] * max_rank * num_out;
    for (int64_t r = 0; r < rank[slot[g] * num_slices + n]; ++r)
      prefetch(own_b + r * num_out + first, (last - first) * sizeof(W));
  }

  // h [rows of the item, rank] = weight·scaling·x·Aᵀ, rows `h_stride` apart.
  void shrink(const ShrinkItem& item, float* h, int64_t h_stride) const {
    Wide& wide = thread_own<Wide>();
    const int64_t place = slot[item.segment] * num_slices + item.slice;
    const int64_t own_rank = rank[place];
    const float factor = weight[item.segment] * scaling[place];
    const Product* own_a = products(a + place * max_rank * num_in, own_rank * num_in, wide.a);
    const X* rows = x + (start[item.segment] + item.first) * x_stride;
    for_each_row_tile<kDotRows>(item.count, [&](auto tile_rows, int64_t row) {
      const Product* own_x;
      int64_t own_stride = x_stride;
      if constexpr (kSameType) {
        own_x = rows + row * x_stride;
      } else {
        wide.x.resize(tile_rows * num_in);
        for (int64_t k = 0; k < tile_rows; ++k)
          for_each_vector(num_in, [&](int64_t i, int64_t n) {
            store(load(rows + (row + k) * x_stride + i, n), &wide.x[k * num_in + i], n);
          });
        own_x = wide.x.data();
        own_stride = num_in;
      }
      float* own_h = h + row * h_stride;
      dot_rows<tile_rows>(own_x, own_stride, own_a, num_in, own_rank, num_in, own_h, h_stride);
      for (int64_t k = 0; k < tile_rows; ++k)
        for (int64_t r = 0; r < own_rank; ++r) own_h[k * h_stride + r] *= factor;
    });
  }

  // y [kRows, count] += h [kRows, rank]·B [rank, count], count <= kColumns.
  template <int kRows>
  void expand_tile(const float* h, int64_t h_stride, const W* own_b, int64_t own_rank, int64_t count, X* out) const {
    Floats sum[kRows][kVectors] = {};
    if (count == kColumns) {
      for (int64_t r = 0; r < own_rank; ++r) {
        Floats row[kVectors];
#pragma GCC unroll 4
        for (int v = 0; v < kVectors; ++v) row[v] = load(own_b + r * num_out + v * kLanes);
#pragma GCC unroll 4
        for (int k = 0; k < kRows; ++k) {
          const Floats factor = broadcast(h[k * h_stride + r]);
#pragma GCC unroll 4
          for (int v = 0; v < kVectors; ++v) sum[k][v] += factor * row[v];
        }
      }
#pragma GCC unroll 4
      for (int k = 0; k < kRows; ++k)
#pragma GCC unroll 4
        for (int v = 0; v < kVectors; ++v) {
          X* place = out + k * y_stride + v * kLanes;
          store(load(place) + sum[k][v], place);
        }
      return;
    }
    for (int k = 0; k < kRows; ++k)
      for_each_vector(count, [&](int64_t i, int64_t n) {
        Floats total = {};
        for (int64_t r = 0; r < own_rank; ++r) total += h[k * h_stride + r] * load(own_b + r * num_out + i, n);
        X* place = out + k * y_stride + i;
        store(load(place, n) + total, place, n);
      });
  }

  // Segment g's rows, columns `first` … `last` of slice n.
  void expand(int64_t g, int64_t n, int64_t first, int64_t last, const float* h, int64_t h_stride) const {
    const int64_t own_rank = rank[slot[g] * num_slices + n];
    if (own_rank == 0) return;
    const W* own_b = b + slot[g] * max_rank * num_out;
    const int64_t length = end[g] - start[g];
    for (int64_t block = 0; block < length; block += kExpandRows) {
      const int64_t stop = std::min(length, block + kExpandRows);
      for (int64_t column = first; column < last; column += kColumns) {
        const int64_t count = std::min(kColumns, last - column);
        int64_t k = block;
        for (; k + 4 <= stop; k += 4)
          expand_tile<4>(h + k * h_stride, h_stride, own_b + column, own_rank, count,
                         y + (start[g] + k) * y_stride + column);
        for (; k < stop; ++k)
          expand_tile<1>(h + k * h_stride, h_stride, own_b + column, own_rank, count,
                         y + (start[g] + k) * y_stride + column);
      }
    }
  }

  void run() const {
    Work& work = thread_own<Work>();
    work.items.clear();
    work.offset.clear();
    int64_t num_rows = 0;
    for (int64_t g = 0; g < num_segments; ++g) {
      work.offset.push_back(num_rows);
      const int64_t length = end[g] - start[g];
      for (int64_t n = 0; n < num_slices; ++n)
        if (rank[slot[g] * num_slices + n] > 0)
          for (int64_t first = 0; first < length; first += kShrinkRows)
            work.items.push_back({g, n, first, std::min(kShrinkRows, length - first)});
      num_rows += length;
    }
    if (work.items.empty()) return;
    const int64_t width = num_slices * max_rank;
    work.h.resize(num_rows * width);
    const ShrinkItem* items = work.items.data();
    const int64_t num_items = work.items.size();
    const int64_t* row_offset = work.offset.data();
    float* h = work.h.data();

#pragma omp parallel
    {
      const int64_t threads = omp_get_num_threads(), thread = omp_get_thread_num();
#pragma omp for schedule(dynamic)
      for (int64_t i = 0; i < num_items; ++i) {
        const ShrinkItem& item = items[i];
        if (i + threads < num_items && items[i + threads].first == 0) prefetch_a(items[i + threads]);
        shrink(item, h + (row_offset[item.segment] + item.first) * width + item.slice * max_rank, width);
      }
      const int64_t num_blocks = (num_out + kColumns - 1) / kColumns;
      const int64_t own_first = num_blocks * thread / threads * kColumns;
      const int64_t own_last = std::min(num_out, num_blocks * (thread + 1) / threads * kColumns);
      for (int64_t g = 0; g < num_segments; ++g)
        for (int64_t n = 0, begin = 0; n < num_slices; begin = slice_end[n++]) {
          const int64_t first = std::max<int64_t>(begin, own_first), last = std::min<int64_t>(slice_end[n], own_last);
          if (first >= last) continue;
          if (g + 1 < num_segments) prefetch_b(g + 1, n, first, last);
          expand(g, n, first, last, h + row_offset[g] * width + n * max_rank, width);
        }
    }
  }
};

}  // namespace

extern "C" {

void lf_lora_add(int dtype, int lora_dtype, void* y, int64_t y_stride, const void* x, int64_t x_stride, const void* a,
                 const void* b, const int32_t* rank, const float* scaling, const int32_t* slice_end,
                 const int32_t* start, const int32_t* end, const int32_t* slot, const float* weight,
                 int64_t num_segments, int64_t num_slices, int64_t max_rank, int64_t num_in, int64_t num_out) {
  with_dtype(dtype, [&](auto* x_tag) {
    with_dtype(lora_dtype, [&](auto* w_tag) {
      using X = element<decltype(x_tag)>;
      using W = element<decltype(w_tag)>;
      Lora<X, W>{static_cast<X*>(y), y_stride, static_cast<const X*>(x), x_stride, static_cast<const W*>(a),
                 static_cast<const W*>(b), rank, scaling, slice_end, start, end, slot, weight, num_segments,
                 num_slices, max_rank, num_in, num_out}
          .run();
    });
  });
}

LF_REPLAYABLE(lf_lora_add)

}  // extern "C"
