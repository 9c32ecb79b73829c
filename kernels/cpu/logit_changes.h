// Changes of a row's logits before sampling, see kernels/logit_changes.py, and the lists of tokens that penalties read,
// see kernels/seen_tokens.py.
#pragma once

#include <algorithm>
#include <limits>

#include "vectors.h"

struct SeenToken {
  int32_t token, code;  // of a list's first entry: the number of the others, 0
};

// Arrays by row, or by place among the rows that change. Null: no such changes.
struct LogitChanges {
  const int64_t* place;  // [rows]; -1: the row does not change
  const int64_t* bias_start;  // [places + 1]
  const int64_t* bias_token;
  const float* bias_value;
  const SeenToken* const* seen;  // [places]; null: no penalties
  const float* factors;          // [places, 3]: repetition, frequency, presence
  const int32_t* const* mask;    // [places]; null: no mask
  int64_t num_words;             // of a mask

  void apply(int64_t at, float* x, int64_t size) const {
    if (bias_start != nullptr)
      for (int64_t n = bias_start[at]; n < bias_start[at + 1]; ++n) x[bias_token[n]] += bias_value[n];
    if (seen != nullptr && seen[at] != nullptr) penalise(seen[at], factors + 3 * at, x, size);
    if (mask != nullptr && mask[at] != nullptr) keep_allowed(mask[at], x, size);
  }

 private:
  static void penalise(const SeenToken* list, const float* factors, float* x, int64_t size) {
    const float repetition = factors[0], frequency = factors[1], presence = factors[2];
    for (int64_t n = 1; n <= list->token; ++n) {
      const auto [token, code] = list[n];
      if (token >= size) continue;
      const int32_t count = code >> 1;
      float value = x[token];
      value = value > 0.0f ? value / repetition : value * repetition;
      value -= frequency * static_cast<float>(count);
      if (count > 0) value -= presence;
      x[token] = std::min(value, std::numeric_limits<float>::max());
    }
  }

  void keep_allowed(const int32_t* words, float* x, int64_t size) const {
    constexpr float kForbidden = -std::numeric_limits<float>::infinity();
    const int64_t known = std::min(size, 32 * num_words);
    for (int64_t first = 0; first < known; first += 32) {
      const uint32_t word = words[first / 32];
      const int64_t count = std::min(known - first, int64_t{32});
      float* own = x + first;
      if (word == 0)
        std::fill(own, own + count, kForbidden);
      else if (word != 0xFFFFFFFF)
        for (int64_t i = 0; i < count; ++i) own[i] = word >> i & 1 ? own[i] : kForbidden;
    }
    std::fill(x + known, x + size, kForbidden);
  }
};
