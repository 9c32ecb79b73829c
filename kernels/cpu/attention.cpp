// Attention over paged keys and values: decode, chunked and ragged prefill through one path.
//
// A work item is (sequence, KV head, block of query rows); all query heads of the group ride along, so that a key is
// loaded once for all of them. Keys come in blocks; softmax is online (Milakov & Gimelshein 2018, Dao et al. 2022), so
// that no T×T matrix exists.
//
// bfloat16 is multiplied in pairs with float32 sums, the weights of a block rounded to bfloat16 for the product with the
// values, as FlashAttention does. float32 and float16 compute in float32 throughout. A `Unit` is what one lane of a
// product holds: a pair of bfloat16, or one float.
#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "dot.h"

namespace {

constexpr int64_t kKeys = 64;       // keys of a block
constexpr int64_t kQueryRows = 32;  // query positions of a work item
constexpr float kNone = -std::numeric_limits<float>::infinity();

template <typename T>
using Unit = std::conditional_t<std::is_same_v<T, bf16>, uint32_t, float>;
template <typename T>
constexpr int64_t kPerUnit = std::is_same_v<T, bf16> ? 2 : 1;

inline Words load_units(const uint32_t* p) { return load_words(p); }
inline Floats load_units(const float* p) { return load(p); }
inline Floats load_units(const bf16* p) { return load(p); }

// C [rows, cols] += A [rows, depth] · B [depth, cols]; cols a multiple of kLanes.
template <int kRows, int kVectors, typename A, typename B>
inline void tile(const A* a, int64_t lda, const B* b, int64_t ldb, float* c, int64_t ldc, int64_t depth) {
  Floats sum[kRows][kVectors];
#pragma GCC unroll 6
  for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) sum[r][v] = load(c + r * ldc + v * kLanes);
  for (int64_t k = 0; k < depth; ++k) {
    decltype(load_units(b)) row[kVectors];
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) row[v] = load_units(b + k * ldb + v * kLanes);
#pragma GCC unroll 6
    for (int r = 0; r < kRows; ++r) {
      const auto unit = broadcast(a[r * lda + k]);
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) sum[r][v] = multiply_add(sum[r][v], unit, row[v]);
    }
  }
#pragma GCC unroll 6
  for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) store(sum[r][v], c + r * ldc + v * kLanes);
}

template <typename A, typename B>
void multiply(const A* a, int64_t lda, const B* b, int64_t ldb, float* c, int64_t ldc, int64_t rows, int64_t cols,
              int64_t depth) {
  for (int64_t col = 0; col < cols;) {
    const bool wide = cols - col >= 4 * kLanes;
    for_each_row_tile<kDotRows>(rows, [&](auto tile_rows, int64_t row) {
      const A* rows_a = a + row * lda;
      float* rows_c = c + row * ldc + col;
      if (wide)
        tile<tile_rows, 4>(rows_a, lda, b + col, ldb, rows_c, ldc, depth);
      else
        tile<tile_rows, 1>(rows_a, lda, b + col, ldb, rows_c, ldc, depth);
    });
    col += wide ? 4 * kLanes : kLanes;
  }
}

// out [cols, out_stride] = the transpose of [rows, cols] 32-bit units, rows `stride` apart.
template <typename U>
void transpose(const U* source, int64_t stride, int64_t rows, int64_t cols, U* out, int64_t out_stride) {
  int64_t row = 0;
#if defined(__AVX512F__)
  for (; row + 16 <= rows; row += 16)
    for (int64_t col = 0; col < cols; col += 16) {
      const __mmask16 real = cols - col >= 16 ? 0xFFFF : static_cast<__mmask16>((1u << (cols - col)) - 1);
      __m512i v[16], w[16];
#pragma GCC unroll 16
      for (int i = 0; i < 16; ++i) v[i] = _mm512_maskz_loadu_epi32(real, source + (row + i) * stride + col);
      // 4×4 blocks within 128-bit lanes, then the lanes among the vectors.
#pragma GCC unroll 4
      for (int i = 0; i < 16; i += 4) {
        const __m512i t0 = _mm512_unpacklo_epi32(v[i], v[i + 1]), t1 = _mm512_unpackhi_epi32(v[i], v[i + 1]);
        const __m512i t2 = _mm512_unpacklo_epi32(v[i + 2], v[i + 3]), t3 = _mm512_unpackhi_epi32(v[i + 2], v[i + 3]);
        w[i] = _mm512_unpacklo_epi64(t0, t2), w[i + 1] = _mm512_unpackhi_epi64(t0, t2);
        w[i + 2] = _mm512_unpacklo_epi64(t1, t3), w[i + 3] = _mm512_unpackhi_epi64(t1, t3);
      }
#pragma GCC unroll 4
      for (int c = 0; c < 4; ++c) {
        const __m512i p = _mm512_shuffle_i32x4(w[c], w[4 + c], 0x88), q = _mm512_shuffle_i32x4(w[c], w[4 + c], 0xDD);
        const __m512i r = _mm512_shuffle_i32x4(w[8 + c], w[12 + c], 0x88);
        const __m512i s = _mm512_shuffle_i32x4(w[8 + c], w[12 + c], 0xDD);
        v[c] = _mm512_shuffle_i32x4(p, r, 0x88), v[8 + c] = _mm512_shuffle_i32x4(p, r, 0xDD);
        v[4 + c] = _mm512_shuffle_i32x4(q, s, 0x88), v[12 + c] = _mm512_shuffle_i32x4(q, s, 0xDD);
      }
      for (int64_t i = 0; i < std::min<int64_t>(16, cols - col); ++i)
        _mm512_storeu_si512(out + (col + i) * out_stride + row, v[i]);
    }
#endif
  for (; row < rows; ++row)
    for (int64_t col = 0; col < cols; ++col) out[col * out_stride + row] = source[row * stride + col];
}

struct Item {
  int32_t sequence;
  int32_t kv_head;
  int32_t first_row;  // within the sequence's rows of this step
  int32_t num_rows;
};

// Scratch of one thread, grown once and kept.
template <typename U>
struct Scratch {
  std::vector<U> query, rows, keys, values, weights;
  std::vector<float> scores, out, maximum, total;
};

template <typename T>
struct Attention {
  using U = Unit<T>;

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

  void run(const Item& item, Scratch<U>& s) const {
    const int64_t group = q_heads / kv_heads;
    const int64_t num_queries = item.num_rows * group;  // row-major: (position, head of the group)
    const int64_t context = context_len[item.sequence];
    const int64_t length = query_start[item.sequence + 1] - query_start[item.sequence];
    const int64_t first_position = context - length + item.first_row;
    const int64_t last_position = first_position + item.num_rows - 1;
    const int64_t padded = (dim + kLanes - 1) / kLanes * kLanes;
    const int64_t depth = dim / kPerUnit<T>;

    // With few queries turning keys and pairing values costs more than the products.
    const bool direct = !std::is_same_v<T, _Float16> && num_queries <= kDotRows && dim % kLanes == 0;

    s.query.resize(num_queries * depth);
    s.scores.resize(num_queries * kKeys);
    s.out.assign(num_queries * padded, 0.0f);
    s.maximum.assign(num_queries, kNone);
    s.total.assign(num_queries, 0.0f);
    if (!direct) {
      s.rows.resize(kKeys * depth);
      s.keys.resize(kKeys * depth);
      s.values.resize(kKeys / kPerUnit<T> * padded);
      s.weights.resize(num_queries * kKeys / kPerUnit<T>);
    }
    const int64_t row0 = query_start[item.sequence] + item.first_row;
    for (int64_t i = 0; i < item.num_rows; ++i)
      for (int64_t g = 0; g < group; ++g)
        to_units(q + (row0 + i) * q_stride + (item.kv_head * group + g) * dim, &s.query[(i * group + g) * depth]);

    const int64_t begin = window > 0 ? std::max<int64_t>(0, first_position - window + 1) : 0;
    for (int64_t key0 = begin; key0 <= last_position; key0 += kKeys) {
      const int64_t count = std::min(kKeys, last_position + 1 - key0);
      const auto soften_all = [&](auto* weights, int64_t stride) {
        for (int64_t i = 0; i < num_queries; ++i) {
          const int64_t position = first_position + i / group;
          const int64_t low = window > 0 ? std::max<int64_t>(0, position - window + 1 - key0) : 0;
          soften(i, std::min(low, kKeys), std::min(count, position + 1 - key0), padded, weights + i * stride, s);
        }
      };
      if constexpr (!std::is_same_v<T, _Float16>) {
        if (direct) {
          score_pages(item, key0, count, last_position + 1, num_queries, s);
          soften_all(s.scores.data(), kKeys);
          for_each_run(item, key0, count, [&](int64_t j, int64_t run, int64_t offset) {
            multiply(&s.scores[j], kKeys, v_cache + offset, dim, s.out.data(), padded, num_queries, dim, run);
          });
          continue;
        }
      }
      load_block(item, key0, count, padded, depth, s);
      std::fill(s.scores.begin(), s.scores.end(), 0.0f);
      multiply(s.query.data(), depth, s.keys.data(), kKeys, s.scores.data(), kKeys, num_queries, kKeys, depth);
      soften_all(s.weights.data(), kKeys / kPerUnit<T>);
      multiply(s.weights.data(), kKeys / kPerUnit<T>, s.values.data(), padded, s.out.data(), padded, num_queries,
               padded, (count + kPerUnit<T> - 1) / kPerUnit<T>);
    }
    for (int64_t i = 0; i < item.num_rows; ++i)
      for (int64_t g = 0; g < group; ++g) {
        const int64_t n = i * group + g;
        const Floats inverse = broadcast(1.0f / s.total[n]);
        T* row = out + ((row0 + i) * q_heads + item.kv_head * group + g) * dim;
        for_each_vector(dim, [&](int64_t d, int64_t lanes) {
          store(load(&s.out[n * padded + d]) * inverse, row + d, lanes);
        });
      }
  }

  // Calls body(j, run, offset) for keys key0 + j … key0 + j + run, which lie in one page, `offset` elements into the cache.
  template <typename Body>
  void for_each_run(const Item& item, int64_t key0, int64_t count, Body body) const {
    const int32_t* pages = page_table + item.sequence * table_stride;
    for (int64_t j = 0; j < count;) {
      const int64_t place = key0 + j;
      const int64_t run = std::min(count - j, page - place % page);
      body(j, run, ((pages[place / page] * kv_heads + item.kv_head) * page + place % page) * dim);
      j += run;
    }
  }

  // s.scores [queries, kKeys] straight from the pages. The values of this block and the keys of the next are asked for
  // meanwhile.
  void score_pages(const Item& item, int64_t key0, int64_t count, int64_t end, int64_t num_queries,
                   Scratch<U>& s) const {
    const int32_t* pages = page_table + item.sequence * table_stride;
    const T* query = reinterpret_cast<const T*>(s.query.data());
    for_each_run(item, key0, count, [&](int64_t j, int64_t run, int64_t offset) {
      prefetch(v_cache + offset, run * dim * sizeof(T));
      const int64_t next = key0 + j + kKeys;
      if (next < end)
        prefetch(k_cache + (pages[next / page] * kv_heads + item.kv_head) * page * dim, page * dim * sizeof(T));
      for_each_row_tile<kDotRows>(num_queries, [&](auto tile_rows, int64_t row) {
        dot_rows<tile_rows>(query + row * dim, dim, k_cache + offset, dim, run, dim, &s.scores[row * kKeys + j], kKeys);
      });
    });
  }

  void to_units(const T* source, U* units) const {
    if constexpr (std::is_same_v<T, bf16>) {
      std::memcpy(units, source, dim * sizeof(T));
    } else {
      for_each_vector(dim, [&](int64_t d, int64_t n) { store(load(source + d, n), units + d, n); });
    }
  }

  // Keys key0 … key0 + count of the item's sequence and head as s.keys [depth, kKeys], the values as s.values
  // [units of keys, padded]; what lies behind `count` or `dim` is 0, since 0 times what a free page holds may be NaN.
  void load_block(const Item& item, int64_t key0, int64_t count, int64_t padded, int64_t depth, Scratch<U>& s) const {
    if (count < kKeys) {
      std::fill(s.keys.begin(), s.keys.end(), U{0});
      std::fill(s.values.begin(), s.values.end(), U{0});
    }
    for_each_run(item, key0, count, [&](int64_t j, int64_t run, int64_t offset) {
      if constexpr (std::is_same_v<T, bf16>) {
        transpose(reinterpret_cast<const U*>(k_cache + offset), depth, run, depth, &s.keys[j], kKeys);
      } else {
        for (int64_t k = 0; k < run; ++k) to_units(k_cache + offset + k * dim, &s.rows[k * depth]);
        transpose(s.rows.data(), depth, run, depth, &s.keys[j], kKeys);
      }
      for (int64_t k = 0; k < run; ++k) load_value(j + k, v_cache + offset + k * dim, padded, s);
    });
  }

  void load_value(int64_t j, const T* value, int64_t padded, Scratch<U>& s) const {
    U* row = &s.values[j / kPerUnit<T> * padded];
    for_each_vector(dim, [&](int64_t d, int64_t n) {
      const Floats own = load(value + d, n);
      if constexpr (!std::is_same_v<T, bf16>) {
        store(own, row + d);
      } else {
        // The first of a pair leaves the upper half 0: it may be the last of the block.
        Words* pair = reinterpret_cast<Words*>(row + d);
        *pair = j % 2 == 0 ? as_words(own) >> 16 : *pair | as_words(own);
      }
    });
  }

  // Turns query i's scores into weights relative to the running maximum; keys outside [low, high) weigh nothing.
  // `weight` may be where the scores are.
  template <typename W>
  void soften(int64_t i, int64_t low, int64_t high, int64_t padded, W* weight, Scratch<U>& s) const {
    constexpr int kVectors = kKeys / kLanes;
    const float* score = &s.scores[i * kKeys];
    if (low >= high) {
      std::fill(weight, weight + (std::is_same_v<W, float> ? kKeys : kKeys / 2), W{0});
      return;
    }
    // bfloat16 keeps few digits of a weight: powers of 2 to five digits do.
    constexpr bool kBase2 = std::is_same_v<T, bf16>;
    const float factor = kBase2 ? scale * 1.44269504f : scale;
    Floats values[kVectors];
    Floats highest = broadcast(kNone);
    for (int v = 0; v < kVectors; ++v) {
      values[v] = load(score + v * kLanes) * factor;
      if (low > 0 || high < kKeys) values[v] = is_within(v, low, high) ? values[v] : broadcast(kNone);
      highest = values[v] > highest ? values[v] : highest;
    }
    const float maximum = std::max(s.maximum[i], max_lanes(highest));
    Floats sum = {};
    for (int v = 0; v < kVectors; ++v) {
      values[v] = kBase2 ? exp2_lanes(values[v] - maximum) : exp_lanes(values[v] - maximum);
      sum += values[v];
    }
    store_weights(values, weight);
    if (maximum != s.maximum[i]) {
      const float difference = s.maximum[i] - maximum;
      const float keep = kBase2 ? std::exp2(difference) : std::exp(difference);  // 0 for the first block
      s.maximum[i] = maximum;
      s.total[i] *= keep;
      for (int64_t d = 0; d < padded; d += kLanes) store(load(&s.out[i * padded + d]) * keep, &s.out[i * padded + d]);
    }
    s.total[i] += sum_lanes(sum);
  }

  // For each lane of the block's vector v, whether low <= key < high.
  static Ints is_within(int v, int64_t low, int64_t high) {
    Ints place;
    for (int l = 0; l < kLanes; ++l) place[l] = v * kLanes + l;
    return (place >= static_cast<int32_t>(low)) & (place < static_cast<int32_t>(high));
  }

  static void store_weights(const Floats (&values)[kKeys / kLanes], float* out) {
    for (int v = 0; v < kKeys / kLanes; ++v) store(values[v], out + v * kLanes);
  }
  static void store_weights(const Floats (&values)[kKeys / kLanes], uint32_t* out) {
    for (int v = 0; v < kKeys / kLanes; ++v) store(values[v], reinterpret_cast<bf16*>(out) + v * kLanes);
  }
};

}  // namespace

extern "C" {

void lf_paged_attention(int dtype, const void* q, int64_t q_stride, const void* k_cache, const void* v_cache,
                        const int32_t* page_table, int64_t table_stride, const int32_t* query_start,
                        const int32_t* context_len, void* out, int64_t sequences, int64_t q_heads, int64_t kv_heads,
                        int64_t dim, int64_t page, float scale, int64_t window) {
  static thread_local std::vector<Item> kept;
  kept.clear();
  for (int64_t s = 0; s < sequences; ++s) {
    const int32_t length = query_start[s + 1] - query_start[s];
    for (int32_t row = 0; row < length; row += kQueryRows)
      for (int32_t h = 0; h < kv_heads; ++h)
        kept.push_back({static_cast<int32_t>(s), h, row, std::min<int32_t>(kQueryRows, length - row)});
  }
  const Item* items = kept.data();  // inside the region `kept` would name each thread's own
  const int64_t num_items = kept.size();
  with_dtype(dtype, [&](auto* tag) {
    using T = element<decltype(tag)>;
    const Attention<T> attention{static_cast<const T*>(q), q_stride, static_cast<const T*>(k_cache),
                                 static_cast<const T*>(v_cache), page_table, table_stride, query_start, context_len,
                                 static_cast<T*>(out), q_heads, kv_heads, dim, page, scale, window};
#pragma omp parallel if (num_items > 1)
    {
      static thread_local Scratch<Unit<T>> scratch;
#pragma omp for schedule(dynamic)
      for (int64_t i = 0; i < num_items; ++i) attention.run(items[i], scratch);
    }
  });
}

LF_REPLAYABLE(lf_paged_attention)

}  // extern "C"
