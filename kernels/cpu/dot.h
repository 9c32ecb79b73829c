// Dot products of rows with rows, x·wᵀ: a register tile of sums; both operands are read in order along the features.
#pragma once

#include "vectors.h"

constexpr int kDotOuts = 4;                             // rows of w per tile
constexpr int kDotRows = kLanes == 16 ? 6 : 2;          // rows of x: 24 sums and 4 weights in 32 registers, or 8 and 4 in 16

inline Words load_products(const bf16* p) { return load_words(p); }
inline Floats load_products(const float* p) { return load(p); }

// out [kRows, kDotOuts] = x·wᵀ over `size` features, T bfloat16 or float. Prefetches as many rows from `next_w`.
template <int kRows, typename T>
inline void dot_tile(const T* x, int64_t x_stride, const T* w, const T* next_w, int64_t w_stride, int64_t size,
                     float* out, int64_t out_stride) {
  constexpr int64_t kStep = sizeof(Floats) / sizeof(T);
  Floats sum[kRows][kDotOuts] = {};
  int64_t i = 0;
  for (; i + kStep <= size; i += kStep) {
    decltype(load_products(w)) weight[kDotOuts];
#pragma GCC unroll 4
    for (int o = 0; o < kDotOuts; ++o) {
      weight[o] = load_products(w + o * w_stride + i);
      request(next_w + o * w_stride + i);
    }
#pragma GCC unroll 6
    for (int r = 0; r < kRows; ++r) {
      const auto row = load_products(x + r * x_stride + i);
#pragma GCC unroll 4
      for (int o = 0; o < kDotOuts; ++o) sum[r][o] = multiply_add(sum[r][o], row, weight[o]);
    }
  }
#pragma GCC unroll 6
  for (int r = 0; r < kRows; ++r) sum_lanes4(sum[r], out + r * out_stride);
  for (; i < size; ++i)
    for (int r = 0; r < kRows; ++r)
      for (int o = 0; o < kDotOuts; ++o)
        out[r * out_stride + o] += to_float(x[r * x_stride + i]) * to_float(w[o * w_stride + i]);
}

// out [kRows, count] = x·wᵀ for any number of rows of w; the rows from `next_w` on are needed next. Each of the last
// few rows is computed kDotOuts times to fill a tile: the memory after them may belong to others.
template <int kRows, typename T>
inline void dot_rows(const T* x, int64_t x_stride, const T* w, const T* next_w, int64_t w_stride, int64_t count,
                     int64_t size, float* out, int64_t out_stride) {
  int64_t o = 0;
  for (; o + kDotOuts <= count; o += kDotOuts) {
    const T* next = o + 2 * kDotOuts <= count ? w + (o + kDotOuts) * w_stride : next_w;
    dot_tile<kRows>(x, x_stride, w + o * w_stride, next, w_stride, size, out + o, out_stride);
  }
  for (; o < count; ++o) {
    float same[kRows * kDotOuts];
    dot_tile<kRows>(x, x_stride, w + o * w_stride, next_w, 0, size, same, kDotOuts);
    for (int r = 0; r < kRows; ++r) out[r * out_stride + o] = same[r * kDotOuts];
  }
}

