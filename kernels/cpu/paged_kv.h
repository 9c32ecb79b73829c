// Places of keys and values in a page; for the reasons see kernels/paged_kv.py.
#pragma once

#include "common.h"

struct Pages {
  int64_t kv_heads, page, dim;

  // Returns the first element of a page and head, the same for keys and values.
  int64_t start(int64_t number, int64_t head) const { return (number * kv_heads + head) * page * dim; }

  // Writes a token's keys and values of one head to `slot`.
  template <typename T>
  void write(const T* key, const T* value, int64_t slot, int64_t head, T* k_cache, T* v_cache) const {
    constexpr int64_t u = kUnit<T>;
    const int64_t first = start(slot / page, head), offset = slot % page;
    T* keys = k_cache + first + offset * u;
    for (int64_t d = 0; d < dim; d += u) std::memcpy(keys + d * page, key + d, u * sizeof(T));
    T* values = v_cache + first + offset / u * u * dim + offset % u;
    for (int64_t d = 0; d < dim; ++d) values[d * u] = value[d];
  }
};
