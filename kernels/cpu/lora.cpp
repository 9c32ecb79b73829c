// Segmented LoRA: y[rows of g, slice n] += weight·scaling·(x·Aᵀ)·B, each slot at its own rank.
//
// Two phases with a barrier between: shrink fills h for every (segment row, slice), expand adds to y. Expand is split over
// columns only: each thread goes through all segments for its columns, so that rows in several segments (composition)
// are added to by one thread, in segment order, whatever the number of threads.
#include <algorithm>
#include <vector>

#include "common.h"

namespace {

constexpr int64_t kColumns = 64;
constexpr int64_t kShrinkRows = 16;

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

  // h [rank] = weight·scaling·A·x for one row.
  void shrink_row(const float* row, const W* own_a, int64_t own_rank, float factor, float* h) const {
    int64_t r = 0;
    for (; r + 4 <= own_rank; r += 4) {
      const W* a0 = own_a + r * num_in;
      const W *a1 = a0 + num_in, *a2 = a1 + num_in, *a3 = a2 + num_in;
      float s0 = 0, s1 = 0, s2 = 0, s3 = 0;
#pragma omp simd reduction(+ : s0, s1, s2, s3)
      for (int64_t i = 0; i < num_in; ++i) {
        s0 += row[i] * to_float(a0[i]);
        s1 += row[i] * to_float(a1[i]);
        s2 += row[i] * to_float(a2[i]);
        s3 += row[i] * to_float(a3[i]);
      }
      h[r] = factor * s0, h[r + 1] = factor * s1, h[r + 2] = factor * s2, h[r + 3] = factor * s3;
    }
    for (; r < own_rank; ++r) {
      const W* own = own_a + r * num_in;
      float sum = 0;
#pragma omp simd reduction(+ : sum)
      for (int64_t i = 0; i < num_in; ++i) sum += row[i] * to_float(own[i]);
      h[r] = factor * sum;
    }
  }

  // y[row, first … last] += h · B[:, first … last].
  void expand_row(const float* h, const float* own_b, int64_t own_rank, int64_t count, X* out) const {
    float sum[kColumns];
    for (int64_t c = 0; c < kColumns; ++c) sum[c] = 0.0f;
    for (int64_t r = 0; r < own_rank; ++r) {
      const float* row = own_b + r * kColumns;
      for (int64_t c = 0; c < kColumns; ++c) sum[c] += h[r] * row[c];
    }
#pragma omp simd
    for (int64_t c = 0; c < count; ++c) out[c] = from_float<X>(to_float(out[c]) + sum[c]);
  }
};

struct Rows {
  int64_t segment, slice, first, count;
};

struct Columns {
  int64_t slice, first, count;
};

template <typename X, typename W>
void run(const Lora<X, W>& l) {
  std::vector<Rows> shrinks;
  std::vector<int64_t> offset(l.num_segments);  // of each segment's rows in h
  int64_t num_rows = 0;
  for (int64_t g = 0; g < l.num_segments; ++g) {
    offset[g] = num_rows;
    const int64_t length = l.end[g] - l.start[g];
    for (int64_t n = 0; n < l.num_slices; ++n)
      if (l.rank[l.slot[g] * l.num_slices + n] > 0)
        for (int64_t first = 0; first < length; first += kShrinkRows)
          shrinks.push_back({g, n, first, std::min(kShrinkRows, length - first)});
    num_rows += length;
  }
  if (shrinks.empty()) return;
  std::vector<Columns> expands;
  for (int64_t n = 0, begin = 0; n < l.num_slices; begin = l.slice_end[n++])
    for (int64_t first = begin; first < l.slice_end[n]; first += kColumns)
      expands.push_back({n, first, std::min<int64_t>(kColumns, l.slice_end[n] - first)});
  const int64_t width = l.num_slices * l.max_rank;
  std::vector<float> h(num_rows * width);

#pragma omp parallel
  {
    std::vector<float> row(l.num_in);
#pragma omp for schedule(dynamic)
    for (size_t i = 0; i < shrinks.size(); ++i) {
      const Rows& item = shrinks[i];
      const int64_t place = l.slot[item.segment] * l.num_slices + item.slice;
      const float factor = l.weight[item.segment] * l.scaling[place];
      for (int64_t k = item.first; k < item.first + item.count; ++k) {
        load_floats(l.x + (l.start[item.segment] + k) * l.x_stride, row.data(), l.num_in);
        l.shrink_row(row.data(), l.a + place * l.max_rank * l.num_in, l.rank[place], factor,
                     h.data() + (offset[item.segment] + k) * width + item.slice * l.max_rank);
      }
    }
    std::vector<float> own_b(l.max_rank * kColumns);
#pragma omp for schedule(dynamic)
    for (size_t i = 0; i < expands.size(); ++i) {
      const Columns& item = expands[i];
      for (int64_t g = 0; g < l.num_segments; ++g) {
        const int64_t own_rank = l.rank[l.slot[g] * l.num_slices + item.slice];
        if (own_rank == 0 || l.start[g] == l.end[g]) continue;
        for (int64_t r = 0; r < own_rank; ++r) {
          float* out = own_b.data() + r * kColumns;
          load_floats(l.b + (l.slot[g] * l.max_rank + r) * l.num_out + item.first, out, item.count);
          for (int64_t c = item.count; c < kColumns; ++c) out[c] = 0.0f;
        }
        for (int64_t k = 0; k < l.end[g] - l.start[g]; ++k)
          l.expand_row(h.data() + (offset[g] + k) * width + item.slice * l.max_rank, own_b.data(), own_rank,
                       item.count, l.y + (l.start[g] + k) * l.y_stride + item.first);
      }
    }
  }
}

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
      run(Lora<X, W>{static_cast<X*>(y), y_stride, static_cast<const X*>(x), x_stride, static_cast<const W*>(a),
                     static_cast<const W*>(b), rank, scaling, slice_end, start, end, slot, weight, num_segments,
                     num_slices, max_rank, num_in, num_out});
    });
  });
}

}  // extern "C"
