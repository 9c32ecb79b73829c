// Attention over paged keys and values: one path for decode, chunked and ragged prefill.
//
// A work item is (sequence, KV head, block of query rows) with all query heads of the group, so that a key is loaded
// once for all of them. Keys come in blocks; softmax is online (Milakov & Gimelshein 2018, Dao et al. 2022), so no T×T
// matrix exists.
//
// bfloat16 is multiplied in pairs with float32 sums; a block's weights are rounded to bfloat16 for the product with
// the values, as in FlashAttention. float32 and float16 compute in float32 throughout. A `Unit` is the content of one
// lane in a product: a pair of bfloat16, or one float. Pages hold units in multiplication order (paged_kv.h), so both
// products read them in place; only sizes that do not fill a register are copied first.
#include <algorithm>
#include <cmath>
#include <limits>
#include <optional>
#include <vector>

#include "amx.h"
#include "paged_kv.h"
#include "team.h"
#include "vectors.h"

namespace {

constexpr int64_t kKeys = 64;                             // keys per block
constexpr int64_t kQueryRows = 32;                        // query positions per work item
constexpr int64_t kMinTileQueries = 8;                    // minimum query rows per item for AMX's tiles
constexpr int64_t kKeyVectors = kKeys / kLanes;
constexpr int kTileRows = kLanes == 16 ? 6 : 2;           // with kTileVectors sums each, they fit in the registers
constexpr int kTileVectors = 4;
constexpr float kNone = -std::numeric_limits<float>::infinity();

// The type of a lane, and its type in a page.
template <typename T>
using Unit = std::conditional_t<std::is_same_v<T, bf16>, uint32_t, float>;
template <typename T>
using Stored = std::conditional_t<std::is_same_v<T, bf16>, uint32_t, T>;

inline Words load_units(const uint32_t* p) { return load_words(p); }
template <typename T>
inline Floats load_units(const T* p) {
  return load(p);
}

// When a tile loads a row of its block, it prefetches the same row of the next block.
//
// scores [kRows, kTileVectors·kLanes] = query [kRows, depth] · keys; vector v of unit k is at keys[v] + k·stride.
template <int kRows, typename U, typename S>
inline void score_tile(const U* query, int64_t depth, const S* const* keys, const S* const* next_keys, int64_t stride,
                       float* scores) {
  Floats sum[kRows][kTileVectors] = {};
  const S *k0 = keys[0], *k1 = keys[1], *k2 = keys[2], *k3 = keys[3];
  const S *n0 = next_keys[0], *n1 = next_keys[1], *n2 = next_keys[2], *n3 = next_keys[3];
  for (int64_t k = 0; k < depth; ++k) {
    const decltype(load_units(k0)) row[kTileVectors] = {load_units(k0 + k * stride), load_units(k1 + k * stride),
                                                        load_units(k2 + k * stride), load_units(k3 + k * stride)};
    request(n0 + k * stride), request(n1 + k * stride), request(n2 + k * stride), request(n3 + k * stride);
    add_products(sum, query + k, depth, row);
  }
#pragma GCC unroll 6
  for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 4
    for (int v = 0; v < kTileVectors; ++v) store(sum[r][v], scores + r * kKeys + v * kLanes);
}

// out [kRows, kVectors·kLanes] += weights [kRows, depth] · values; unit k is at values[k] + column.
template <int kRows, int kVectors, typename U, typename S>
inline void value_tile(const U* weights, int64_t weight_stride, const S* const* values, const S* const* next_values,
                       int64_t column, int64_t depth, float* out, int64_t out_stride) {
  Floats sum[kRows][kVectors];
#pragma GCC unroll 6
  for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) sum[r][v] = load(out + r * out_stride + v * kLanes);
  for (int64_t k = 0; k < depth; ++k) {
    const S* place = values[k] + column;
    decltype(load_units(place)) row[kVectors];
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) {
      row[v] = load_units(place + v * kLanes);
      request(next_values[k] + column + v * kLanes);
    }
    add_products(sum, weights + k, weight_stride, row);
  }
#pragma GCC unroll 6
  for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) store(sum[r][v], out + r * out_stride + v * kLanes);
}

struct Item {
  int32_t sequence;
  int32_t kv_head;
  int32_t first_row;  // within the sequence's rows of this step
  int32_t num_rows;
};

// Pointers to a block's keys and values. Every pointer is readable; data after the last key is never used.
template <typename T>
struct Block {
  const Stored<T>* key_vectors[kKeyVectors];
  const Stored<T>* value_rows[kKeys];
};

// Scratch memory of one thread; grown once and kept.
template <typename T>
struct Scratch {
  std::vector<Unit<T>> query, weights;
  std::vector<Stored<T>> keys, values;  // copies of data that cannot be read in place
  std::vector<float> scores, out, maximum, total;
  Block<T> block, next;
};

template <typename T>
struct Attention {
  using U = Unit<T>;
  using S = Stored<T>;
  static constexpr int64_t u = kUnit<T>;

  const T* q;
  int64_t q_stride;
  const T* k_cache;
  const T* v_cache;
  const int32_t* page_table;
  int64_t table_stride;
  const int32_t* query_start;
  const int32_t* context_len;
  T* out;
  int64_t q_heads;
  Pages pages;
  float scale;
  int64_t window;

  int64_t first_position(const Item& item) const {
    const int64_t length = query_start[item.sequence + 1] - query_start[item.sequence];
    return context_len[item.sequence] - length + item.first_row;
  }
  int64_t first_block(const Item& item) const {
    return window > 0 ? std::max<int64_t>(0, first_position(item) - window + 1) / kKeys * kKeys : 0;
  }
  int64_t num_keys(const Item& item) const { return first_position(item) + item.num_rows; }

  // Leaves the sums in s.out and their divisors in s.total; `put` stores the quotients.
  void run(const Item& item, const Item* next, Scratch<T>& s) const {
    const int64_t dim = pages.dim, group = q_heads / pages.kv_heads;
    const int64_t num_queries = item.num_rows * group;  // row-major: (position, head of the group)
    const int64_t position0 = first_position(item), end = num_keys(item);
    const int64_t padded = (dim + kLanes - 1) / kLanes * kLanes;
    const int64_t depth = dim / u;
    const bool keys_in_place = pages.page % kLanes == 0, values_in_place = dim == padded;

#if defined(__AMX_BF16__)
    std::optional<RowTiles> tiles;
    std::optional<Tiles> registers;
    if (std::is_same_v<T, bf16> && num_queries >= kMinTileQueries && dim % (2 * kTileSide) == 0 && keys_in_place) {
      tiles.emplace(num_queries);
      registers.emplace(tiles->rows);
    }
    const int64_t num_places = tiles ? tiles->padded() : num_queries;
#else
    const int64_t num_places = num_queries;
#endif
    s.query.resize(num_places * depth);
    s.scores.resize(num_places * kKeys);
    s.weights.resize(num_places * kKeys / u);
    s.out.assign(num_places * padded, 0.0f);
    s.maximum.assign(num_queries, kNone);
    s.total.assign(num_queries, 0.0f);
    s.keys.resize(kKeys * depth);
    s.values.resize(kKeys / u * padded);
    const int64_t row0 = query_start[item.sequence] + item.first_row;
    for (int64_t i = 0; i < item.num_rows; ++i)
      for (int64_t g = 0; g < group; ++g)
        to_units(q + (row0 + i) * q_stride + (item.kv_head * group + g) * dim, &s.query[(i * group + g) * depth]);

    const int64_t key_stride = keys_in_place ? pages.page : kKeys;
    find(item, first_block(item), s.next);
    for (int64_t key0 = first_block(item); key0 < end; key0 += kKeys) {
      const int64_t count = std::min(kKeys, end - key0);
      s.block = s.next;
      if (key0 + kKeys < end)
        find(item, key0 + kKeys, s.next);
      else if (next)
        find(*next, first_block(*next), s.next);
      if (!keys_in_place) copy_keys(item, key0, count, s);
#if defined(__AMX_BF16__)
      if (tiles) {
        run_tiles(*tiles, position0, key0, count, s);
        continue;
      }
#endif
      copy_values(count, values_in_place ? 0 : padded, s);
      for (int64_t v = 0; v * kLanes < count; v += kTileVectors)
        for_each_row_tile<kTileRows>(num_queries, [&](auto rows, int64_t row) {
          score_tile<rows>(&s.query[row * depth], depth, s.block.key_vectors + v, s.next.key_vectors + v, key_stride,
                           &s.scores[row * kKeys + v * kLanes]);
        });
      for (int64_t i = 0; i < num_queries; ++i) soften(i, position0 + i / group, key0, count, padded, s);
      const int64_t num_units = (count + u - 1) / u;
      for (int64_t column = 0; column < padded;) {
        const bool wide = padded - column >= kTileVectors * kLanes;
        for_each_row_tile<kTileRows>(num_queries, [&](auto rows, int64_t row) {
          const U* weights = &s.weights[row * kKeys / u];
          float* place = &s.out[row * padded + column];
          if (wide)
            value_tile<rows, kTileVectors>(weights, kKeys / u, s.block.value_rows, s.next.value_rows, column, num_units,
                                           place, padded);
          else
            value_tile<rows, 1>(weights, kKeys / u, s.block.value_rows, s.next.value_rows, column, num_units, place,
                                padded);
        });
        column += wide ? kTileVectors * kLanes : kLanes;
      }
    }
  }

  void put(const Item& item, const Scratch<T>& s) const {
    const int64_t dim = pages.dim, group = q_heads / pages.kv_heads, padded = (dim + kLanes - 1) / kLanes * kLanes;
    const int64_t row0 = query_start[item.sequence] + item.first_row;
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

#if defined(__AMX_BF16__)
  // Handles a block of keys and values for all queries of an item, two tiles of queries at a time.
  void run_tiles(const RowTiles& tiles, int64_t position0, int64_t key0, int64_t count, Scratch<T>& s) const {
    for (int64_t tile = 0; tile < tiles.number; tile += 2) {
      if (tile + 1 < tiles.number)
        score_tiles<2>(tile * tiles.rows, (tile + 1) * tiles.rows, count, s);
      else
        score_tiles<1>(tile * tiles.rows, 0, count, s);
    }
    const int64_t group = q_heads / pages.kv_heads;
    for (int64_t i = 0; i < tiles.all; ++i) {
      request_share(i, tiles.all, s.next);
      soften(i, position0 + i / group, key0, count, pages.dim, s);
    }
    copy_values(count, pages.dim, s);
    // Fill the units up to the end of the last tile with numbers: a weight of 0 does not cancel NaN.
    const int64_t num_units = (count + 1) / 2, num_steps = (num_units + kTileSide - 1) / kTileSide;
    std::fill(s.values.begin() + num_units * pages.dim, s.values.begin() + num_steps * kTileSide * pages.dim, S{0});
    for (int64_t tile = 0; tile < tiles.number; tile += 2) {
      if (tile + 1 < tiles.number)
        value_tiles<2>(tile * tiles.rows, (tile + 1) * tiles.rows, num_steps, s);
      else
        value_tiles<1>(tile * tiles.rows, 0, num_steps, s);
    }
  }

  template <int kRowTiles>
  void score_tiles(int64_t row0, int64_t row1, int64_t count, Scratch<T>& s) const {
    using Sums = TileSums<kRowTiles, 2>;
    const int64_t depth = pages.dim / 2;
    for (int64_t v = 0; v * kLanes < count; v += 2) {
      Sums::clear();
      for (int64_t k = 0; k < depth; k += kTileSide)
        Sums::add(&s.query[row0 * depth + k], &s.query[row1 * depth + k], depth * sizeof(U),
                  s.block.key_vectors[v] + k * pages.page, s.block.key_vectors[v + 1] + k * pages.page,
                  pages.page * sizeof(S));
      Sums::store(&s.scores[row0 * kKeys + v * kLanes], &s.scores[row1 * kKeys + v * kLanes], kKeys * sizeof(float));
    }
  }

  // Prefetches query i's share of the next block's cache lines.
  void request_share(int64_t i, int64_t num_queries, const Block<T>& next) const {
    const int64_t depth = pages.dim / 2, per_row = pages.dim / kLanes;
    for (int64_t k = depth * i / num_queries; k < depth * (i + 1) / num_queries; ++k)
      for (int64_t v = 0; v < kKeyVectors; ++v) request(next.key_vectors[v] + k * pages.page);
    for (int64_t j = kKeys / 2 * i / num_queries; j < kKeys / 2 * (i + 1) / num_queries; ++j)
      for (int64_t v = 0; v < per_row; ++v) request(next.value_rows[j] + v * kLanes);
  }

  // out += weights · values.
  template <int kRowTiles>
  void value_tiles(int64_t row0, int64_t row1, int64_t num_steps, Scratch<T>& s) const {
    using Sums = TileSums<kRowTiles, 2>;
    const int64_t dim = pages.dim;
    for (int64_t column = 0; column < dim; column += 2 * kTileSide) {
      float *out0 = &s.out[row0 * dim + column], *out1 = &s.out[row1 * dim + column];
      Sums::load(out0, out1, dim * sizeof(float));
      for (int64_t k = 0; k < num_steps * kTileSide; k += kTileSide) {
        const S* values = &s.values[k * dim + column];
        Sums::add(&s.weights[row0 * kKeys / 2 + k], &s.weights[row1 * kKeys / 2 + k], kKeys / 2 * sizeof(U), values,
                  values + kTileSide, dim * sizeof(S));
      }
      Sums::store(out0, out1, dim * sizeof(float));
    }
  }
#endif

  // Returns the first element of the page and head that hold key `place`.
  int64_t start(const Item& item, int64_t place) const {
    return pages.start(page_table[item.sequence * table_stride + place / pages.page], item.kv_head);
  }

  static const S* units(const T* p) { return reinterpret_cast<const S*>(p); }

  void find(const Item& item, int64_t key0, Block<T>& block) const {
    const int64_t count = std::min(kKeys, num_keys(item) - key0);
    for (int64_t v = 0; v < kKeyVectors; ++v) {
      const int64_t place = key0 + (v * kLanes < count ? v * kLanes : 0);
      block.key_vectors[v] = units(k_cache + start(item, place)) + place % pages.page;
    }
    for (int64_t j = 0, end_of_page; j < count; j = end_of_page) {
      const int64_t offset = (key0 + j) % pages.page;
      const S* row = units(v_cache + start(item, key0 + j)) + offset / u * pages.dim;
      end_of_page = std::min(count, j + pages.page - offset);
      for (; j < end_of_page; j += u, row += pages.dim) block.value_rows[j / u] = row;
    }
    for (int64_t j = (count + u - 1) / u; j < kKeys / u; ++j) block.value_rows[j] = block.value_rows[0];
  }

  // For pages smaller than a vector: copies the keys to s.keys [units, kKeys].
  void copy_keys(const Item& item, int64_t key0, int64_t count, Scratch<T>& s) const {
    for (int64_t j = 0; j < count; j += pages.page) {
      const S* page = units(k_cache + start(item, key0 + j));
      for (int64_t k = 0; k < pages.dim / u; ++k)
        std::memcpy(&s.keys[k * kKeys + j], page + k * pages.page, pages.page * sizeof(S));
    }
    for (int64_t v = 0; v < kKeyVectors; ++v) s.block.key_vectors[v] = &s.keys[v * kLanes];
  }

  // Copies values whose rows do not fill vectors to s.values [units, padded]. Also copies a unit that extends past the
  // last key, with 0 there, since 0 times the content of a free place may be NaN.
  void copy_values(int64_t count, int64_t padded, Scratch<T>& s) const {
    for (int64_t j = padded > 0 ? 0 : count / u; j < (count + u - 1) / u; ++j) {
      S* copy = &s.values[j * std::max(padded, pages.dim)];
      std::memcpy(copy, s.block.value_rows[j], pages.dim * sizeof(S));
      if constexpr (u == 2)
        if (j == count / u)
          for (int64_t d = 0; d < pages.dim; ++d) copy[d] &= 0xFFFF;
      s.block.value_rows[j] = copy;
    }
  }

  void to_units(const T* source, U* units) const {
    if constexpr (std::is_same_v<T, bf16>) {
      std::memcpy(units, source, pages.dim * sizeof(T));
    } else {
      for_each_vector(pages.dim, [&](int64_t d, int64_t n) { store(load(source + d, n), units + d, n); });
    }
  }

  // Turns query i's scores of the `count` keys from `key0` on into weights relative to the running maximum. Keys not
  // visible from its position get weight 0.
  void soften(int64_t i, int64_t position, int64_t key0, int64_t count, int64_t padded, Scratch<T>& s) const {
    const int64_t low = window > 0 ? std::min(kKeys, std::max<int64_t>(0, position - window + 1 - key0)) : 0;
    const int64_t high = std::min(count, position + 1 - key0);
    constexpr int kVectors = kKeyVectors;
    const float* score = &s.scores[i * kKeys];
    U* weight = &s.weights[i * kKeys / u];
    if (low >= high) {
      std::fill(weight, weight + kKeys / u, U{0});
      return;
    }
    // bfloat16 keeps few digits of a weight, so five digits of a power of 2 suffice.
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

  // Returns, for each lane of the block's vector v, whether low <= key < high.
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

// Builds the calling thread's list of work items, the same on all threads.
const std::vector<Item>& list_items(const int32_t* query_start, int64_t sequences, int64_t kv_heads) {
  std::vector<Item>& items = thread_own<std::vector<Item>>();
  items.clear();
  for (int64_t s = 0; s < sequences; ++s) {
    const int32_t length = query_start[s + 1] - query_start[s];
    for (int32_t row = 0; row < length; row += kQueryRows)
      for (int32_t h = 0; h < kv_heads; ++h)
        items.push_back({static_cast<int32_t>(s), h, row, std::min<int32_t>(kQueryRows, length - row)});
  }
  return items;
}

}  // namespace

extern "C" {

void lf_paged_attention(int dtype, const void* q, int64_t q_stride, const void* k_cache, const void* v_cache,
                        const int32_t* page_table, int64_t table_stride, const int32_t* query_start,
                        const int32_t* context_len, void* out, int64_t sequences, int64_t q_heads, int64_t kv_heads,
                        int64_t dim, int64_t page, float scale, int64_t window) {
  with_dtype(dtype, [&](auto* tag) {
    using T = element<decltype(tag)>;
    const Attention<T> attention{static_cast<const T*>(q), q_stride, static_cast<const T*>(k_cache),
                                 static_cast<const T*>(v_cache), page_table, table_stride, query_start, context_len,
                                 static_cast<T*>(out), q_heads, Pages{kv_heads, page, dim}, scale, window};
    run_call(sequences * kv_heads > 1 || query_start[sequences] > kQueryRows, [&](Worker& worker) {
      const std::vector<Item>& items = list_items(query_start, sequences, kv_heads);
      const int64_t count = static_cast<int64_t>(items.size());
      Scratch<T>& scratch = thread_own<Scratch<T>>();
      // Meanwhile the first keys of the item likely to be claimed next are prefetched.
      worker.repeatable(
          0, count, {1, 1},
          [&](int64_t i, int64_t, int64_t next) { attention.run(items[i], next < count ? &items[next] : nullptr, scratch); },
          [&](int64_t i, int64_t) { attention.put(items[i], scratch); });
    });
  });
}

LF_REPLAYABLE(lf_paged_attention)

}  // extern "C"
