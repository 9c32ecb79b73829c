// Norms, SiLU·mul, and RoPE with the write into the paged KV cache, row by row. Most work in place, so that each row
// is computed once.
#include <cmath>
#include <vector>

#include "paged_kv.h"
#include "team.h"
#include "vectors.h"

namespace {

constexpr int64_t kMaxHeadDim = 512;

// out = x / sqrt(mean(x²) + eps), rounded to T, times weight, with the rounding of transformers' RMSNorm.
template <typename T>
void normalise(const float* x, const T* weight, float eps, T* out, int64_t size) {
  Floats squares = {};
  for_each_vector(size, [&](int64_t i, int64_t n) {
    const Floats value = load(x + i, n);
    squares += value * value;
  });
  const Floats scale = broadcast(1.0f / std::sqrt(sum_lanes(squares) / static_cast<float>(size) + eps));
  for_each_vector(size, [&](int64_t i, int64_t n) {
    store(round_to<T>(load(x + i, n) * scale) * load(weight + i, n), out + i, n);
  });
}

// Calls body(row) for each row, on several threads if there are more than `few` rows.
template <typename Body>
void for_rows(int64_t rows, int64_t few, Body body) {
  run_call(rows > few, [&](Worker& worker) {
    worker.once(0, rows, {few}, [&](int64_t first, int64_t last) {
      for (int64_t r = first; r < last; ++r) body(r);
    });
  });
}

struct Scratch {
  std::vector<float> row;
};

// Returns memory of the calling thread.
float* row_of_floats(int64_t size) {
  std::vector<float>& memory = thread_own<Scratch>().row;
  if (memory.size() < static_cast<size_t>(size)) memory.resize(size);
  return memory.data();
}

// Returns row r's weight by its index among several of `size`; without indices the first.
template <typename T>
const T* weight_of(const void* weights, const int32_t* which, int64_t r, int64_t size) {
  return static_cast<const T*>(weights) + (which == nullptr ? 0 : which[r] * size);
}

template <typename T>
void rotate_head(T* head, const T* norm, float eps, const float* cos_sin, int64_t dim) {
  if (norm != nullptr) {
    float x[kMaxHeadDim];
    for_each_vector(dim, [&](int64_t i, int64_t n) { store(load(head + i, n), x + i, n); });
    normalise(x, norm, eps, head, dim);
  }
  const int64_t half = dim / 2;
  for_each_vector(half, [&](int64_t i, int64_t n) {
    const Floats cosine = load(cos_sin + i, n), sine = load(cos_sin + half + i, n);
    const Floats a = load(head + i, n), b = load(head + half + i, n);
    store(a * cosine - b * sine, head + i, n);
    store(b * cosine + a * sine, head + half + i, n);
  });
}

}  // namespace

extern "C" {

// x [rows, size] → out [rows, size].
void lf_rms_norm(int dtype, const void* x, const void* weight, const int32_t* which, float eps, void* out,
                 int64_t rows, int64_t size) {
  with_dtype(dtype, [&](auto* tag) {
    using T = element<decltype(tag)>;
    for_rows(rows, 8, [&](int64_t r) {
      float* row = row_of_floats(size);
      const T* own = static_cast<const T*>(x) + r * size;
      for_each_vector(size, [&](int64_t i, int64_t n) { store(load(own + i, n), row + i, n); });
      normalise(row, weight_of<T>(weight, which, r, size), eps, static_cast<T*>(out) + r * size, size);
    });
  });
}

// residual += x, x = norm(residual)·weight, both [rows, size], in place.
void lf_fused_add_rms_norm(int dtype, void* x, void* residual, const void* weight, const int32_t* which, float eps,
                           int64_t rows, int64_t size) {
  with_dtype(dtype, [&](auto* tag) {
    using T = element<decltype(tag)>;
    for_rows(rows, 8, [&](int64_t r) {
      float* row = row_of_floats(size);
      T* own = static_cast<T*>(x) + r * size;
      T* stream = static_cast<T*>(residual) + r * size;
      for_each_vector(size, [&](int64_t i, int64_t n) {
        const Floats sum = round_to<T>(load(stream + i, n) + load(own + i, n));
        store(sum, stream + i, n);
        store(sum, row + i, n);
      });
      normalise(row, weight_of<T>(weight, which, r, size), eps, own, size);
    });
  });
}

// gate_up [rows, 2·size] → out [rows, size] = silu(gate)·up, with silu rounded to T as by a separate op.
void lf_silu_mul(int dtype, const void* gate_up, void* out, int64_t rows, int64_t size) {
  with_dtype(dtype, [&](auto* tag) {
    using T = element<decltype(tag)>;
    for_rows(rows, 4, [&](int64_t r) {
      const T* gate = static_cast<const T*>(gate_up) + r * 2 * size;
      const T* up = gate + size;
      T* row = static_cast<T*>(out) + r * size;
      for_each_vector(size, [&](int64_t i, int64_t n) {
        const Floats g = load(gate + i, n);
        store(round_to<T>(g / (1.0f + exp_lanes(-g))) * load(up + i, n), row + i, n);
      });
    });
  });
}

// Rotates q and k of each fused row in place and writes k and v to the caches.
void lf_rope_kv_write(int dtype, void* qkv, int64_t stride, const float* cos_sin, const int64_t* positions,
                      void* k_cache, void* v_cache, const int64_t* slot_mapping, int64_t rows, int64_t q_heads,
                      int64_t kv_heads, int64_t dim, int64_t page, const void* q_norm, const void* k_norm,
                      const int32_t* which, float eps) {
  with_dtype(dtype, [&](auto* tag) {
    using T = element<decltype(tag)>;
    const Pages pages{kv_heads, page, dim};
    for_rows(rows, 4, [&](int64_t r) {
      T* row = static_cast<T*>(qkv) + r * stride;
      const float* angles = cos_sin + positions[r] * dim;
      const T* own_q_norm = q_norm == nullptr ? nullptr : weight_of<T>(q_norm, which, r, dim);
      const T* own_k_norm = k_norm == nullptr ? nullptr : weight_of<T>(k_norm, which, r, dim);
      for (int64_t h = 0; h < q_heads; ++h) rotate_head(row + h * dim, own_q_norm, eps, angles, dim);
      T* keys = row + q_heads * dim;
      const T* values = keys + kv_heads * dim;
      const int64_t slot = slot_mapping[r];
      for (int64_t h = 0; h < kv_heads; ++h) {
        rotate_head(keys + h * dim, own_k_norm, eps, angles, dim);
        pages.write(keys + h * dim, values + h * dim, slot, h, static_cast<T*>(k_cache), static_cast<T*>(v_cache));
      }
    });
  });
}

LF_REPLAYABLE(lf_rms_norm)
LF_REPLAYABLE(lf_fused_add_rms_norm)
LF_REPLAYABLE(lf_silu_mul)
LF_REPLAYABLE(lf_rope_kv_write)

}  // extern "C"
