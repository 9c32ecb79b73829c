// Attention over paged keys and values: decode, chunked and ragged prefill through one path.
//
// A work item is (sequence, KV head, block of query rows); all query heads of the group ride along, so that a key is
// loaded once for all of them. Keys come in blocks; softmax is online (Milakov & Gimelshein 2018, Dao et al. 2022), so
// that no T×T matrix exists.
#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "common.h"

namespace {

constexpr int64_t kKeys = 64;      // keys of a block
constexpr int64_t kQueryRows = 32; // query positions of a work item
constexpr int64_t kLanes = 16;

typedef float Lanes __attribute__((vector_size(4 * kLanes), aligned(4)));

// C [rows, cols] += A [rows, depth] · B [depth, cols]; cols a multiple of 16.
template <int kRows, int kVectors>
inline void tile(const float* a, int64_t lda, const float* b, int64_t ldb, float* c, int64_t ldc, int64_t depth) {
  Lanes sum[kRows][kVectors];
  for (int r = 0; r < kRows; ++r)
    for (int v = 0; v < kVectors; ++v) sum[r][v] = *reinterpret_cast<const Lanes*>(c + r * ldc + v * kLanes);
  for (int64_t k = 0; k < depth; ++k)
    for (int v = 0; v < kVectors; ++v) {
      const Lanes row = *reinterpret_cast<const Lanes*>(b + k * ldb + v * kLanes);
      for (int r = 0; r < kRows; ++r) sum[r][v] += a[r * lda + k] * row;
    }
  for (int r = 0; r < kRows; ++r)
    for (int v = 0; v < kVectors; ++v) *reinterpret_cast<Lanes*>(c + r * ldc + v * kLanes) = sum[r][v];
}

void multiply_add(const float* a, int64_t lda, const float* b, int64_t ldb, float* c, int64_t ldc, int64_t rows,
                  int64_t cols, int64_t depth) {
  for (int64_t col = 0; col < cols;) {
    const bool wide = cols - col >= 4 * kLanes;
    int64_t row = 0;
    for (; row + 4 <= rows; row += 4) {
      const float* rows_a = a + row * lda;
      float* rows_c = c + row * ldc + col;
      if (wide)
        tile<4, 4>(rows_a, lda, b + col, ldb, rows_c, ldc, depth);
      else
        tile<4, 1>(rows_a, lda, b + col, ldb, rows_c, ldc, depth);
    }
    for (; row < rows; ++row) {
      if (wide)
        tile<1, 4>(a + row * lda, lda, b + col, ldb, c + row * ldc + col, ldc, depth);
      else
        tile<1, 1>(a + row * lda, lda, b + col, ldb, c + row * ldc + col, ldc, depth);
    }
    col += wide ? 4 * kLanes : kLanes;
  }
}

struct Item {
  int32_t sequence;
  int32_t kv_head;
  int32_t first_row;  // within the sequence's rows of this step
  int32_t num_rows;
};

// Scratch of one thread, grown once and kept.
struct Scratch {
  std::vector<float> query, keys, values, scores, out, maximum, total;
};

template <typename T>
struct Attention {
  const T* q;
  int64_t q_stride;
  const T* k_cache;
  const T* v_cache;
  const int32_t* page_table;
  int64_t table_stride;
  const int32_t* query_start;
  const int32_t* context_len;
  T* out;
  int64_t q_heads, kv_heads, dim, page;
  float scale;
  int64_t window;

  void run(const Item& item, Scratch& s) const {
    const int64_t group = q_heads / kv_heads;
    const int64_t num_queries = item.num_rows * group;  // row-major: (position, head of the group)
    const int64_t context = context_len[item.sequence];
    const int64_t length = query_start[item.sequence + 1] - query_start[item.sequence];
    const int64_t first_position = context - length + item.first_row;
    const int64_t last_position = first_position + item.num_rows - 1;
    const int64_t padded = (dim + kLanes - 1) / kLanes * kLanes;
    const bool transposed = num_queries >= 8;  // below, turning the keys costs more than it saves

    s.query.resize(num_queries * dim);
    s.keys.resize(kKeys * padded);
    s.values.resize(kKeys * padded);
    s.scores.resize(num_queries * kKeys);
    s.out.assign(num_queries * padded, 0.0f);
    s.maximum.assign(num_queries, -std::numeric_limits<float>::infinity());
    s.total.assign(num_queries, 0.0f);
    const int64_t row0 = query_start[item.sequence] + item.first_row;
    for (int64_t i = 0; i < item.num_rows; ++i)
      for (int64_t g = 0; g < group; ++g) {
        float* query = s.query.data() + (i * group + g) * dim;
        load_floats(q + (row0 + i) * q_stride + (item.kv_head * group + g) * dim, query, dim);
        for (int64_t d = 0; d < dim; ++d) query[d] *= scale;
      }

    const int64_t begin = window > 0 ? std::max<int64_t>(0, first_position - window + 1) : 0;
    for (int64_t key0 = begin; key0 <= last_position; key0 += kKeys) {
      const int64_t count = std::min(kKeys, last_position + 1 - key0);
      load_block(item, key0, count, padded, transposed, s);
      score_block(num_queries, count, transposed, s);
      for (int64_t i = 0; i < num_queries; ++i) {
        const int64_t position = first_position + i / group;
        const int64_t low = window > 0 ? std::max<int64_t>(0, position - window + 1 - key0) : 0;
        const int64_t high = std::min(count, position + 1 - key0);
        soften(i, std::min(low, kKeys), high, padded, s);
      }
      multiply_add(s.scores.data(), kKeys, s.values.data(), padded, s.out.data(), padded, num_queries, padded, count);
    }
    for (int64_t i = 0; i < item.num_rows; ++i)
      for (int64_t g = 0; g < group; ++g) {
        const int64_t n = i * group + g;
        float* row = s.out.data() + n * padded;
        const float inverse = 1.0f / s.total[n];
        for (int64_t d = 0; d < dim; ++d) row[d] *= inverse;
        store_floats(row, out + ((row0 + i) * q_heads + item.kv_head * group + g) * dim, dim);
      }
  }

  // Keys and values key0 … key0 + count of the item's sequence and head, as floats.
  void load_block(const Item& item, int64_t key0, int64_t count, int64_t padded, bool transposed, Scratch& s) const {
    const int32_t* pages = page_table + item.sequence * table_stride;
    if (transposed && count < kKeys) std::fill(s.keys.begin(), s.keys.end(), 0.0f);
    float key[512];
    for (int64_t j = 0; j < count; ++j) {
      const int64_t place = key0 + j;
      const int64_t offset = ((pages[place / page] * kv_heads + item.kv_head) * page + place % page) * dim;
      float* value = s.values.data() + j * padded;
      load_floats(v_cache + offset, value, dim);
      for (int64_t d = dim; d < padded; ++d) value[d] = 0.0f;
      if (transposed) {
        load_floats(k_cache + offset, key, dim);
        for (int64_t d = 0; d < dim; ++d) s.keys[d * kKeys + j] = key[d];
      } else {
        load_floats(k_cache + offset, s.keys.data() + j * dim, dim);
      }
    }
  }

  // scores [queries, kKeys] = query · keys, of the first `count` keys.
  void score_block(int64_t num_queries, int64_t count, bool transposed, Scratch& s) const {
    if (transposed) {
      std::fill(s.scores.begin(), s.scores.end(), 0.0f);
      multiply_add(s.query.data(), dim, s.keys.data(), kKeys, s.scores.data(), kKeys, num_queries, kKeys, dim);
      return;
    }
    for (int64_t i = 0; i < num_queries; ++i) {
      const float* query = s.query.data() + i * dim;
      for (int64_t j = 0; j < count; ++j) {
        const float* key = s.keys.data() + j * dim;
        float sum = 0.0f;
#pragma omp simd reduction(+ : sum)
        for (int64_t d = 0; d < dim; ++d) sum += query[d] * key[d];
        s.scores[i * kKeys + j] = sum;
      }
    }
  }

  // Turns query i's scores into weights relative to the running maximum; keys outside [low, high) weigh nothing.
  void soften(int64_t i, int64_t low, int64_t high, int64_t padded, Scratch& s) const {
    float* score = s.scores.data() + i * kKeys;
    if (low >= high) {
      std::fill(score, score + kKeys, 0.0f);
      return;
    }
    float maximum = s.maximum[i];
    for (int64_t j = low; j < high; ++j) maximum = std::max(maximum, score[j]);
    float total = 0.0f;
    for (int64_t j = 0; j < low; ++j) score[j] = 0.0f;
#pragma omp simd reduction(+ : total)
    for (int64_t j = low; j < high; ++j) {
      score[j] = std::exp(score[j] - maximum);
      total += score[j];
    }
    for (int64_t j = high; j < kKeys; ++j) score[j] = 0.0f;
    const float keep = std::exp(s.maximum[i] - maximum);  // 0 for the first block
    s.maximum[i] = maximum;
    s.total[i] = s.total[i] * keep + total;
    if (keep != 1.0f) {
      float* row = s.out.data() + i * padded;
      for (int64_t d = 0; d < padded; ++d) row[d] *= keep;
    }
  }
};

}  // namespace

extern "C" {

void lf_paged_attention(int dtype, const void* q, int64_t q_stride, const void* k_cache, const void* v_cache,
                        const int32_t* page_table, int64_t table_stride, const int32_t* query_start,
                        const int32_t* context_len, void* out, int64_t sequences, int64_t q_heads, int64_t kv_heads,
                        int64_t dim, int64_t page, float scale, int64_t window) {
  std::vector<Item> items;
  for (int64_t s = 0; s < sequences; ++s) {
    const int32_t length = query_start[s + 1] - query_start[s];
    for (int32_t row = 0; row < length; row += kQueryRows)
      for (int32_t h = 0; h < kv_heads; ++h)
        items.push_back({static_cast<int32_t>(s), h, row, std::min<int32_t>(kQueryRows, length - row)});
  }
  with_dtype(dtype, [&](auto* tag) {
    using T = element<decltype(tag)>;
    const Attention<T> attention{static_cast<const T*>(q), q_stride, static_cast<const T*>(k_cache),
                                 static_cast<const T*>(v_cache), page_table, table_stride, query_start, context_len,
                                 static_cast<T*>(out), q_heads, kv_heads, dim, page, scale, window};
#pragma omp parallel if (items.size() > 1)
    {
      static thread_local Scratch scratch;
#pragma omp for schedule(dynamic)
      for (size_t i = 0; i < items.size(); ++i) attention.run(items[i], scratch);
    }
  });
}

}  // extern "C"
