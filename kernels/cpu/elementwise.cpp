// Norms, SiLU·mul, and RoPE with the write into the paged KV cache. One row per iteration, rows in parallel.
#include <cmath>

#include "common.h"

namespace {

constexpr int64_t kMaxHeadDim = 512;

// out = x / sqrt(mean(x²) + eps), rounded to T, times weight, as transformers' RMSNorm rounds.
template <typename T>
void normalise(const float* x, const T* weight, float eps, T* out, int64_t size) {
  float sum = 0.0f;
#pragma omp simd reduction(+ : sum)
  for (int64_t i = 0; i < size; ++i) sum += x[i] * x[i];
  const float scale = 1.0f / std::sqrt(sum / static_cast<float>(size) + eps);
#pragma omp simd
  for (int64_t i = 0; i < size; ++i) {
    const float rounded = to_float(from_float<T>(x[i] * scale));
    out[i] = from_float<T>(rounded * to_float(weight[i]));
  }
}

template <typename T>
void rotate_head(T* head, const T* norm, float eps, const float* cos_sin, int64_t dim) {
  float x[kMaxHeadDim];
  if (norm != nullptr) {
    load_floats(head, x, dim);
    normalise(x, norm, eps, head, dim);
  }
  load_floats(head, x, dim);
  const int64_t half = dim / 2;
  const float* cosine = cos_sin;
  const float* sine = cos_sin + half;
#pragma omp simd
  for (int64_t i = 0; i < half; ++i) {
    head[i] = from_float<T>(x[i] * cosine[i] - x[i + half] * sine[i]);
    head[i + half] = from_float<T>(x[i + half] * cosine[i] + x[i] * sine[i]);
  }
}

}  // namespace

extern "C" {

// x [rows, size] → out [rows, size].
void lf_rms_norm(int dtype, const void* x, const void* weight, float eps, void* out, int64_t rows, int64_t size) {
  with_dtype(dtype, [&](auto* tag) {
    using T = element<decltype(tag)>;
#pragma omp parallel if (rows > 8)
    {
      float* row = new float[size];
#pragma omp for schedule(static)
      for (int64_t r = 0; r < rows; ++r) {
        load_floats(static_cast<const T*>(x) + r * size, row, size);
        normalise(row, static_cast<const T*>(weight), eps, static_cast<T*>(out) + r * size, size);
      }
      delete[] row;
    }
  });
}

// residual += x, x = norm(residual)·weight, both [rows, size], in place.
void lf_fused_add_rms_norm(int dtype, void* x, void* residual, const void* weight, float eps, int64_t rows,
                           int64_t size) {
  with_dtype(dtype, [&](auto* tag) {
    using T = element<decltype(tag)>;
#pragma omp parallel if (rows > 8)
    {
      float* row = new float[size];
#pragma omp for schedule(static)
      for (int64_t r = 0; r < rows; ++r) {
        T* own = static_cast<T*>(x) + r * size;
        T* stream = static_cast<T*>(residual) + r * size;
#pragma omp simd
        for (int64_t i = 0; i < size; ++i) {
          stream[i] = from_float<T>(to_float(stream[i]) + to_float(own[i]));
          row[i] = to_float(stream[i]);
        }
        normalise(row, static_cast<const T*>(weight), eps, own, size);
      }
      delete[] row;
    }
  });
}

// gate_up [rows, 2·size] → out [rows, size] = silu(gate)·up.
void lf_silu_mul(int dtype, const void* gate_up, void* out, int64_t rows, int64_t size) {
  with_dtype(dtype, [&](auto* tag) {
    using T = element<decltype(tag)>;
#pragma omp parallel for schedule(static) if (rows > 4)
    for (int64_t r = 0; r < rows; ++r) {
      const T* gate = static_cast<const T*>(gate_up) + r * 2 * size;
      const T* up = gate + size;
      T* row = static_cast<T*>(out) + r * size;
#pragma omp simd
      for (int64_t i = 0; i < size; ++i) {
        const float g = to_float(gate[i]);
        // Rounded in between, as two separate ops would.
        const float silu = to_float(from_float<T>(g / (1.0f + std::exp(-g))));
        row[i] = from_float<T>(silu * to_float(up[i]));
      }
    }
  });
}

// Rotates q and k of each fused row in place and writes k and v to the caches [pages, kv_heads, page, dim].
void lf_rope_kv_write(int dtype, void* qkv, int64_t stride, const float* cos_sin, const int64_t* positions,
                      void* k_cache, void* v_cache, const int64_t* slot_mapping, int64_t rows, int64_t q_heads,
                      int64_t kv_heads, int64_t dim, int64_t page, const void* q_norm, const void* k_norm, float eps) {
  with_dtype(dtype, [&](auto* tag) {
    using T = element<decltype(tag)>;
#pragma omp parallel for schedule(static) if (rows > 4)
    for (int64_t r = 0; r < rows; ++r) {
      T* row = static_cast<T*>(qkv) + r * stride;
      const float* angles = cos_sin + positions[r] * dim;
      for (int64_t h = 0; h < q_heads; ++h)
        rotate_head(row + h * dim, static_cast<const T*>(q_norm), eps, angles, dim);
      T* keys = row + q_heads * dim;
      const T* values = keys + kv_heads * dim;
      const int64_t slot = slot_mapping[r];
      for (int64_t h = 0; h < kv_heads; ++h) {
        rotate_head(keys + h * dim, static_cast<const T*>(k_norm), eps, angles, dim);
        const int64_t place = (((slot / page) * kv_heads + h) * page + slot % page) * dim;
        std::memcpy(static_cast<T*>(k_cache) + place, keys + h * dim, dim * sizeof(T));
        std::memcpy(static_cast<T*>(v_cache) + place, values + h * dim, dim * sizeof(T));
      }
    }
  });
}

}  // extern "C"
