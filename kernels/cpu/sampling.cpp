// Sampling: one token per row, greedy or drawn using temperature, min_p, top_k, top_p and the row's random number.
// Rows run in parallel. A row that changes is copied to float32 and changed there; the copy stays in the core's cache.
//
// Nothing is sorted. A row is read once for its best token and, unless it is greedy or has a small top_k, again for
// its weights exp(-distance), where distance = (best - x) / temperature. A cheap bound first excludes tokens that
// top_k and top_p can never keep. Among the others, listed in vocabulary order, radix selection on the digits of the
// distance finds the last one to keep.
#include <cmath>
#include <limits>
#include <numeric>
#include <vector>

#include "logit_changes.h"
#include "team.h"
#include "vectors.h"

namespace {

constexpr float kInfinity = std::numeric_limits<float>::infinity();
constexpr int64_t kGroup = 8 * kLanes;  // elements with one maximum per lane and one sum: relative error below 1e-6
constexpr float kMaxDistance = 87.33f;  // exp_lanes returns 0 beyond it

// One thread's memory, as large as its largest row so far.
struct Scratch {
  std::vector<float> changed;  // a row after its changes
  std::vector<float> bests;    // [groups, kLanes] maxima
  std::vector<double> sums;    // [groups] of weights
  std::vector<float> ordered;  // [groups]
  // The candidates, in vocabulary order.
  std::vector<uint32_t> index, key;  // key: the bits of the distance, in the same order
  std::vector<float> weight;
  std::vector<uint32_t> member;  // candidates that share the digits processed so far
};

struct Options {
  float temperature;
  int64_t top_k;
  float top_p, min_p;
  double uniform;
};

inline bool any(Ints mask) {
#if defined(__AVX512F__)
  return _mm512_test_epi32_mask((__m512i)mask, (__m512i)mask) != 0;
#else
  int32_t all = 0;
  for (int i = 0; i < kLanes; ++i) all |= mask[i];
  return all != 0;
#endif
}

// Like load(p, count), but the other lanes are -inf.
template <typename T>
inline Floats load_logits(const T* p, int64_t count) {
  if (count == kLanes) return load(p);
  float buffer[kLanes];
  for (int i = 0; i < kLanes; ++i) buffer[i] = i < count ? to_float(p[i]) : -kInfinity;
  return load(buffer);
}

template <typename T>
struct Row {
  const T* x;
  int64_t size;
  Scratch& scratch;
  int64_t num_groups = (size + kGroup - 1) / kGroup;
  float best = -kInfinity;
  float temperature = 1.0f;
  float limit = kInfinity;  // min_p's: larger distances have weight 0
  int64_t num_candidates = 0;

  // Calls body(first element, elements) for each vector of a group.
  template <typename Body>
  void for_each_of_group(int64_t group, Body body) const {
    const int64_t first = group * kGroup;
    if (first + kGroup <= size) {
#pragma GCC unroll 8
      for (int64_t i = first; i < first + kGroup; i += kLanes) body(i, int64_t{kLanes});
    } else {
      for_each_vector(size - first, [&](int64_t i, int64_t n) { body(first + i, n); });
    }
  }

  // Finds the maxima. Returns false if the row has NaN or +inf, or only -inf.
  bool find_best() {
    scratch.bests.resize(num_groups * kLanes);
    Floats maximum = broadcast(-kInfinity);
    Ints magnitude = {};  // the maximum above ignores NaN, but NaN's bits exceed all others
    for (int64_t g = 0; g < num_groups; ++g) {
      Floats own = broadcast(-kInfinity);
      for_each_of_group(g, [&](int64_t i, int64_t n) {
        const Floats value = load_logits(x + i, n);
        const Ints bits = reinterpret_cast<Ints>(value) & 0x7FFFFFFF;
        own = value > own ? value : own;
        magnitude = bits > magnitude ? bits : magnitude;
      });
      store(own, &scratch.bests[g * kLanes]);
      maximum = own > maximum ? own : maximum;
    }
    best = max_lanes(maximum) + 0.0f;  // never -0, so that no distance is -0
    return !any(magnitude > 0x7F800000) && std::isfinite(best);
  }

  int64_t first_best() const {
    for (int64_t g = 0; g < num_groups; ++g)
      if (any(load(&scratch.bests[g * kLanes]) == best))
        for (int64_t i = g * kGroup; i < size; ++i)
          if (to_float(x[i]) == best) return i;
    return 0;
  }

  Floats distance(Floats value) const { return (best - value) / temperature; }
  Floats weights(Floats distances) const {
    const Floats weight = exp_lanes(-distances);
    return distances > limit ? Floats{} : weight;
  }

  // Returns the sum of all weights; leaves each group's in scratch.sums.
  double sum_weights() {
    scratch.sums.resize(num_groups);
    double total = 0.0;
    for (int64_t g = 0; g < num_groups; ++g) {
      Floats sum = {};
      for_each_of_group(g, [&](int64_t i, int64_t n) { sum += weights(distance(load_logits(x + i, n))); });
      scratch.sums[g] = sum_lanes(sum);
      total += scratch.sums[g];
    }
    return total;
  }

  // Inverts the cumulative distribution of the whole row.
  int64_t draw_from_all(double target) const {
    double before = 0.0, next = 0.0;
    int64_t group = 0;  // the last with a weight, also if rounding put the target past the end
    for (int64_t g = 0; g < num_groups && next <= target; ++g) {
      if (scratch.sums[g] == 0.0) continue;
      before = next;
      next += scratch.sums[g];
      group = g;
    }
    int64_t token = -1;
    for_each_of_group(group, [&](int64_t i, int64_t n) {
      float weight[kLanes];
      store(weights(distance(load_logits(x + i, n))), weight);
      for (int64_t lane = 0; lane < n && before <= target; ++lane) {
        if (weight[lane] == 0.0f) continue;
        before += weight[lane];
        token = i + lane;
      }
    });
    return token;
  }

  // Makes all elements within `bound` candidates.
  void list(float bound) {
    bound = std::min({bound, limit, kMaxDistance});
    const size_t most = size + 1;  // the loop writes one past the last
    if (scratch.index.size() < most) {
      scratch.index.resize(most);
      scratch.key.resize(most);
      scratch.weight.resize(most);
      scratch.member.resize(most);
    }
    uint32_t *index = scratch.index.data(), *key = scratch.key.data();
    float* weight = scratch.weight.data();
    int64_t count = 0;
    for (int64_t g = 0; g < num_groups; ++g) {
      if (!any(distance(load(&scratch.bests[g * kLanes])) <= bound)) continue;
      for_each_of_group(g, [&](int64_t i, int64_t n) {
        const Floats distances = distance(load_logits(x + i, n));
        const Ints near = distances <= bound;
        if (!any(near)) return;
        const Words keys = as_words(distances);
        const Floats all = exp_lanes(-distances);
        for (int lane = 0; lane < kLanes; ++lane) {
          index[count] = i + lane;
          key[count] = keys[lane];
          weight[count] = all[lane];
          count -= near[lane];
        }
      });
    }
    num_candidates = count;
  }

  // Returns a distance within which there are at least k elements: that of the k-th best group's best.
  float bound_of_top(int64_t k) const {
    if (k > num_groups) return kInfinity;
    std::vector<float>& ordered = scratch.ordered;
    ordered.resize(num_groups);
    for (int64_t g = 0; g < num_groups; ++g) ordered[g] = max_lanes(load(&scratch.bests[g * kLanes]));
    std::nth_element(ordered.begin(), ordered.begin() + (k - 1), ordered.end(), [](float a, float b) { return a > b; });
    return (best - ordered[k - 1]) / temperature;
  }

  double sum_candidates() const {
    double total = 0.0;
    for (int64_t i = 0; i < num_candidates; ++i) total += scratch.weight[i];
    return total;
  }

  // Keeps the candidates whose predecessors, in order of distance and then of vocabulary, have a measure sum below
  // `most`; always keeps the first. `measure(i)` is 1 to keep a number of candidates, or the weight.
  template <typename Measure>
  void keep_first(double most, Measure measure) {
    uint32_t *index = scratch.index.data(), *key = scratch.key.data(), *member = scratch.member.data();
    float* weight = scratch.weight.data();
    int64_t num_members = num_candidates;
    std::iota(member, member + num_members, 0u);
    double before = 0.0;  // the measure of all candidates nearer than the members
    for (int shift : {20, 10, 0}) {  // a distance has no sign bit: digits of 11, 10 and 10 bits
      constexpr uint32_t kDigits = 1 << 11;
      const uint32_t mask = (shift == 20 ? kDigits : kDigits / 2) - 1;
      double sums[kDigits] = {};
      uint32_t last = 0;
      for (int64_t m = 0; m < num_members; ++m) {
        const uint32_t digit = key[member[m]] >> shift & mask;
        sums[digit] += measure(member[m]);
        last = std::max(last, digit);
      }
      uint32_t digit = 0;
      while (digit < last && before + sums[digit] < most) before += sums[digit++];
      if (shift == 20 && before + sums[digit] < most) return;  // keep all
      int64_t num_left = 0;
      for (int64_t m = 0; m < num_members; ++m) {
        const uint32_t own = member[m];
        member[num_left] = own;
        num_left += (key[own] >> shift & mask) == digit;
      }
      num_members = num_left;
    }
    // The members are at equal distance: keep the first ones.
    const uint32_t last_key = key[member[0]];
    const double wanted = std::ceil((most - before) / measure(member[0]));
    int64_t quota = wanted < 1.0 ? 1 : wanted < num_members ? static_cast<int64_t>(wanted) : num_members;
    int64_t count = 0;
    for (int64_t i = 0; i < num_candidates; ++i) {
      const uint32_t own = key[i];
      const bool tied = own == last_key;
      const bool kept = (own < last_key) | (tied & (quota > 0));  // branch-free: a branch would be unpredictable
      index[count] = index[i];
      key[count] = own;
      weight[count] = weight[i];
      count += kept;
      quota -= tied;
    }
    num_candidates = count;
  }

  int64_t draw_from_candidates(double target) const {
    double before = 0.0;
    int64_t i = 0;
    while (i < num_candidates - 1 && (before += scratch.weight[i]) <= target) ++i;
    return scratch.index[i];
  }

  int64_t draw(const Options& options) {
    temperature = options.temperature;
    if (options.min_p > 0.0f) limit = -std::log(options.min_p);
    const bool cuts_k = 0 < options.top_k && options.top_k < size, cuts_p = options.top_p < 1.0f;
    double total;
    if (cuts_k) {
      list(bound_of_top(options.top_k));
      keep_first(static_cast<double>(options.top_k), [](uint32_t) { return 1.0; });
      total = sum_candidates();
    } else {
      total = sum_weights();
      if (!cuts_p) return draw_from_all(options.uniform * total);
      // If all weights were below this, they would sum to what top_p leaves out; the small term is for rounding.
      const double least = (1.0 - options.top_p) * total / static_cast<double>(size);
      list(static_cast<float>(-std::log(least)) + 1e-4f);
    }
    if (cuts_p) {
      keep_first(options.top_p * total, [&](uint32_t i) { return static_cast<double>(scratch.weight[i]); });
      total = sum_candidates();
    }
    return draw_from_candidates(options.uniform * total);
  }
};

struct Sampled {
  int64_t token_id = 0;
  bool is_finite = false, is_possible = false;
};

template <typename T>
int64_t pick(Row<T>& row, const Options& options) {
  return options.temperature > 0.0f ? row.draw(options) : row.first_best();
}

template <typename T>
Sampled sample(const T* x, int64_t size, const Options& options) {
  Row<T> row{x, size, thread_own<Scratch>()};
  if (!row.find_best()) return {};
  return {pick(row, options), true, true};
}

// Returns false if the row has NaN or +inf, or only -inf.
template <typename T>
bool copy(const T* x, int64_t size, float* out) {
  Ints magnitude = {};
  Floats maximum = broadcast(-kInfinity);
  for_each_vector(size, [&](int64_t i, int64_t n) {
    const Floats value = load_logits(x + i, n);
    const Ints bits = reinterpret_cast<Ints>(value) & 0x7FFFFFFF;
    magnitude = bits > magnitude ? bits : magnitude;
    maximum = value > maximum ? value : maximum;
    store(value, out + i, n);
  });
  return !any(magnitude > 0x7F800000) && std::isfinite(max_lanes(maximum));
}

template <typename T>
Sampled sample_changed(const T* x, int64_t size, const Options& options, const LogitChanges& changes, int64_t place) {
  Scratch& scratch = thread_own<Scratch>();
  if (static_cast<int64_t>(scratch.changed.size()) < size) scratch.changed.resize(size);
  float* own = scratch.changed.data();
  if (!copy(x, size, own)) return {};
  changes.apply(place, own, size);
  Row<float> row{own, size, scratch};
  if (!row.find_best()) return {0, true, false};
  return {pick(row, options), true, true};
}

}  // namespace

extern "C" {

// logits [rows, size], rows `stride` elements apart, options [rows] each, changes or null → token_ids [rows], finite
// [rows], and possible [rows] if there are changes.
void lf_sample_tokens(int dtype, const void* logits, int64_t stride, const float* temperature, const int64_t* top_k,
                      const float* top_p, const float* min_p, const double* uniform, const void* changes,
                      int64_t* token_ids, bool* finite, bool* possible, int64_t rows, int64_t size) {
  const auto* changed = static_cast<const LogitChanges*>(changes);
  with_dtype(dtype, [&](auto* tag) {
    using T = element<decltype(tag)>;
    run_call(rows > 1, [&](Worker& worker) {
      Sampled sampled;
      worker.repeatable(
          0, rows, {1, 1},
          [&](int64_t r, int64_t, int64_t) {
            const T* x = static_cast<const T*>(logits) + r * stride;
            const Options options{temperature[r], top_k[r], top_p[r], min_p[r], uniform[r]};
            const int64_t place = changed == nullptr ? -1 : changed->place[r];
            sampled = place < 0 ? sample(x, size, options) : sample_changed(x, size, options, *changed, place);
          },
          [&](int64_t r, int64_t) {
            token_ids[r] = sampled.token_id;
            finite[r] = sampled.is_finite;
            if (possible != nullptr) possible[r] = sampled.is_possible;
          });
    });
  });
}

// Adds to each list the token that its row has got.
void lf_add_sampled(SeenToken* const* lists, const int64_t* row, const int64_t* token_ids, int64_t count) {
  for (int64_t i = 0; i < count; ++i) {
    SeenToken* list = lists[i];
    const int32_t token = static_cast<int32_t>(token_ids[row[i]]), size = list->token;
    int64_t n = 1;
    while (n <= size && list[n].token != token) ++n;
    if (n <= size) {
      list[n].code += 2;
    } else {
      list[n] = {token, 2};
      ++list->token;
    }
  }
}

}  // extern "C"
