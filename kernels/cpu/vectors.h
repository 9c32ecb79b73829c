// Vectors shared by the CPU kernels: one register of the instruction set that this file is compiled for.
//
// GCC's generic vectors, so that one source serves AVX-512, AVX2, SSE and NEON. Intrinsics serve only for instructions
// without a generic form (bfloat16 dot products) or where GCC makes six of one (conversions between lane widths).
#pragma once

#include <algorithm>

#include "common.h"

#if defined(__AVX__)
#include <immintrin.h>
#endif

#if defined(__AVX512F__)
constexpr int kLanes = 16;
#elif defined(__AVX__)
constexpr int kLanes = 8;
#else
constexpr int kLanes = 4;
#endif

#define LF_VECTOR(type, bytes) __attribute__((vector_size(bytes), aligned(alignof(type)), may_alias))
typedef float Floats LF_VECTOR(float, 4 * kLanes);
typedef int32_t Ints LF_VECTOR(int32_t, 4 * kLanes);
typedef uint32_t Words LF_VECTOR(uint32_t, 4 * kLanes);  // also: pairs of bfloat16, the first one in the lower half
typedef uint16_t Halves LF_VECTOR(uint16_t, 2 * kLanes);
typedef _Float16 Float16s LF_VECTOR(_Float16, 2 * kLanes);

inline Floats as_floats(Words x) { return reinterpret_cast<Floats>(x); }
inline Words as_words(Floats x) { return reinterpret_cast<Words>(x); }

inline Floats load(const float* p) { return *reinterpret_cast<const Floats*>(p); }
inline Words widen(const uint16_t* p) {
#if defined(__AVX512F__)
  return (Words)_mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
#elif defined(__AVX2__)
  return (Words)_mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
#else
  return __builtin_convertvector(*reinterpret_cast<const Halves*>(p), Words);
#endif
}
inline void narrow(Words x, uint16_t* p) {
#if defined(__AVX512F__)
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtepi32_epi16((__m512i)x));
#else
  *reinterpret_cast<Halves*>(p) = __builtin_convertvector(x, Halves);
#endif
}
inline Floats load(const bf16* p) { return as_floats(widen(&p->bits) << 16); }
inline Floats load(const _Float16* p) {
#if defined(__AVX512F__)
  return (Floats)_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
#elif defined(__F16C__)
  return (Floats)_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
#else
  return __builtin_convertvector(*reinterpret_cast<const Float16s*>(p), Floats);
#endif
}
inline Words load_words(const void* p) { return *static_cast<const Words*>(p); }
inline uint32_t load_word(const bf16* pair) {
  uint32_t word;
  std::memcpy(&word, pair, 4);
  return word;
}

// Rounds each lane to bfloat16 bits, as from_float does.
inline Words round_bf16(Floats x) {
  const Words bits = as_words(x);
  const Words rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16;
  const Words nan = (bits >> 16) | 0x40;
  return (bits & 0x7FFFFFFF) > 0x7F800000 ? nan : rounded;
}

inline void store(Floats x, float* p) { *reinterpret_cast<Floats*>(p) = x; }
inline void store(Floats x, bf16* p) {
#if defined(__AVX512BF16__)
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), (__m256i)_mm512_cvtneps_pbh((__m512)x));
#else
  narrow(round_bf16(x), &p->bits);
#endif
}
inline void store(Floats x, _Float16* p) {
#if defined(__AVX512F__)
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtps_ph((__m512)x, _MM_FROUND_TO_NEAREST_INT));
#elif defined(__F16C__)
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_cvtps_ph((__m256)x, _MM_FROUND_TO_NEAREST_INT));
#else
  *reinterpret_cast<Float16s*>(p) = __builtin_convertvector(x, Float16s);
#endif
}

// Loads the first `count` <= kLanes elements; the other lanes are 0. Free if `count` is known to be kLanes.
template <typename T>
inline Floats load(const T* p, int64_t count) {
  if (count == kLanes) return load(p);
  T buffer[kLanes] = {};
  std::memcpy(buffer, p, count * sizeof(T));
  return load(buffer);
}
template <typename T>
inline void store(Floats x, T* p, int64_t count) {
  if (count == kLanes) return store(x, p);
  T buffer[kLanes];
  store(x, buffer);
  std::memcpy(p, buffer, count * sizeof(T));
}

// Calls body(first element, elements) for each vector of `count` elements; the last one may be partial.
template <typename Body>
inline void for_each_vector(int64_t count, Body body) {
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) body(i, int64_t{kLanes});
  if (i < count) body(i, count - i);
}

// Calls body(rows of the tile as a constant, first row) until all `rows` are covered.
template <int kMax, typename Body>
inline void for_each_row_tile(int64_t rows, Body body) {
  static_assert(kMax <= 6);
  int64_t row = 0;
  for (; row + kMax <= rows; row += kMax) body(std::integral_constant<int, kMax>{}, row);
  switch (rows - row) {
    case 1: return body(std::integral_constant<int, 1>{}, row);
    case 2: return body(std::integral_constant<int, std::min(2, kMax)>{}, row);
    case 3: return body(std::integral_constant<int, std::min(3, kMax)>{}, row);
    case 4: return body(std::integral_constant<int, std::min(4, kMax)>{}, row);
    case 5: return body(std::integral_constant<int, std::min(5, kMax)>{}, row);
  }
}

// Rounds x to T's precision.
template <typename T>
inline Floats round_to(Floats x) {
  if constexpr (std::is_same_v<T, float>) {
    return x;
  } else if constexpr (std::is_same_v<T, bf16>) {
    return as_floats(round_bf16(x) << 16);
  } else {
    _Float16 rounded[kLanes];
    store(x, rounded);
    return load(rounded);
  }
}

// Prefetches a cache line that the processor cannot predict (pages, adapters). Call it for one line at a time, between
// products: many prefetches at once fill the miss queue and stall all later loads. Into L2, since both the current and
// the next data would overfill L1.
inline void request(const void* place) { __builtin_prefetch(place, 0, 2); }

inline Floats broadcast(float x) { return x - Floats{}; }
inline Words broadcast(uint32_t x) { return x - Words{}; }

// Returns sum + a·b. Words are pairs of bfloat16; both products of a pair are added to its lane.
inline Floats multiply_add(Floats sum, Floats a, Floats b) { return sum + a * b; }
inline Floats multiply_add(Floats sum, Words a, Words b) {
#if defined(__AVX512BF16__)
  return (Floats)_mm512_dpbf16_ps((__m512)sum, (__m512bh)a, (__m512bh)b);
#else
  sum += as_floats(a << 16) * as_floats(b << 16);
  return sum + as_floats(a & 0xFFFF0000) * as_floats(b & 0xFFFF0000);
#endif
}

// sum[r][v] += factors[r·stride]·row[v]: one step of a register tile, a row of one operand times several of the other.
// Always inlined: its arguments are in registers.
template <int kRows, int kVectors, typename U, typename V>
__attribute__((always_inline)) inline void add_products(Floats (&sum)[kRows][kVectors], const U* factors,
                                                        int64_t stride, const V (&row)[kVectors]) {
#pragma GCC unroll 6
  for (int r = 0; r < kRows; ++r) {
    const V factor = broadcast(factors[r * stride]);
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) sum[r][v] = multiply_add(sum[r][v], factor, row[v]);
  }
}

inline float sum_lanes(Floats x) {
#if defined(__AVX512F__)
  return _mm512_reduce_add_ps((__m512)x);
#else
  float total = 0.0f;
  for (int i = 0; i < kLanes; ++i) total += x[i];
  return total;
#endif
}

// out[i] = the sum of x[i]'s lanes.
inline void sum_lanes4(const Floats (&x)[4], float* out) {
#if defined(__AVX512F__)
  // Add halves of two vectors, three times: 4 vectors become one with a quarter of each sum in 4 lanes.
  const __m512 a = (__m512)x[0], b = (__m512)x[1], c = (__m512)x[2], d = (__m512)x[3];
  const __m512 ab = _mm512_add_ps(_mm512_unpacklo_ps(a, b), _mm512_unpackhi_ps(a, b));
  const __m512 cd = _mm512_add_ps(_mm512_unpacklo_ps(c, d), _mm512_unpackhi_ps(c, d));
  const __m512 abcd = _mm512_add_ps(_mm512_shuffle_ps(ab, cd, 0x44), _mm512_shuffle_ps(ab, cd, 0xEE));
  const __m256 half = _mm256_add_ps(_mm512_castps512_ps256(abcd), _mm512_extractf32x8_ps(abcd, 1));
  _mm_storeu_ps(out, _mm_add_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1)));
#else
  for (int i = 0; i < 4; ++i) out[i] = sum_lanes(x[i]);
#endif
}

inline float max_lanes(Floats x) {
#if defined(__AVX512F__)
  return _mm512_reduce_max_ps((__m512)x);
#else
  float best = x[0];
  for (int i = 1; i < kLanes; ++i) best = x[i] > best ? x[i] : best;
  return best;
#endif
}

// exp(x) with a relative error below 2e-7: 2^n · P(r) with x = n·ln 2 + r, |r| <= ln 2 / 2 (Cephes' expf). -inf gives
// 0, NaN stays NaN, and results below the smallest normal number become 0.
inline Floats exp_lanes(Floats x) {
  const Floats bounded = x > 88.72f ? broadcast(88.72f) : x;  // a comparison with NaN is false: NaN passes
  const Floats shifted = bounded * 1.44269504f + 12582912.0f;  // 1.5 · 2^23: rounds to the nearest integer
  const Floats n = shifted - 12582912.0f;
  const Floats r = (bounded - n * 0.693359375f) + n * 2.12194440e-4f;
  Floats p = r * 1.9875691500e-4f + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r * r + r + 1.0f;
  const Words power = (as_words(shifted) + (127u - 0x4B400000u)) << 23;
  const Floats scaled = p * as_floats(power);
  const Floats result = x < -87.33f ? Floats{} : scaled;
  return x > 88.72f ? broadcast(__builtin_inff()) : result;
}

// 2^x for x <= 0 with a relative error below 5e-5: 2^n · P(r) with x = n + r, |r| <= 1/2, P the series of 2^r. NaN
// stays NaN; results below the smallest normal number, also for -inf, become 0.
inline Floats exp2_lanes(Floats x) {
#if defined(__AVX512F__)
  const Floats n = (Floats)_mm512_roundscale_ps((__m512)x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
#else
  const Floats shifted = x + 12582912.0f;  // 1.5 · 2^23: rounds to the nearest integer
  const Floats n = shifted - 12582912.0f;
#endif
  const Floats r = x - n;
  Floats p = r * 9.6181291e-3f + 5.5504109e-2f;
  p = p * r + 2.4022651e-1f;
  p = p * r + 6.9314718e-1f;
  p = p * r + 1.0f;
#if defined(__AVX512F__)
  const Floats scaled = (Floats)_mm512_scalef_ps((__m512)p, (__m512)n);
#else
  const Floats scaled = p * as_floats((as_words(shifted) + (127u - 0x4B400000u)) << 23);
#endif
  return x < -126.0f ? Floats{} : scaled;
}
