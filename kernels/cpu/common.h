// Element types and vectors shared by the CPU kernels.
//
// Every kernel computes in float32 whatever types it loads and stores. Vectors are GCC's generic ones: the compiler
// lowers them to AVX-512, AVX2 or SSE, so that one source serves every machine. No -ffast-math: NaN must stay NaN.
#pragma once

#include <cstdint>
#include <cstring>
#include <type_traits>
#include <utility>

enum DType : int { kFloat32 = 0, kBFloat16 = 1, kFloat16 = 2 };

struct bf16 {
  uint16_t bits;
};

// Elements that are multiplied together and adjacent in memory.
template <typename T>
constexpr int64_t kUnit = std::is_same_v<T, bf16> ? 2 : 1;

inline float to_float(float x) { return x; }
inline float to_float(_Float16 x) { return static_cast<float>(x); }
inline float to_float(bf16 x) {
  uint32_t bits = static_cast<uint32_t>(x.bits) << 16;
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}

template <typename T>
inline T from_float(float x) {
  return static_cast<T>(x);
}
template <>
inline bf16 from_float<bf16>(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  // Round to nearest even; a NaN keeps its upper bits and gets one set, so that it stays a NaN.
  uint32_t rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16;
  uint32_t nan = (bits >> 16) | 0x40;
  return bf16{static_cast<uint16_t>((bits & 0x7FFFFFFF) > 0x7F800000 ? nan : rounded)};
}

template <typename T>
inline void load_floats(const T* __restrict source, float* __restrict out, int64_t count) {
#pragma omp simd
  for (int64_t i = 0; i < count; ++i) out[i] = to_float(source[i]);
}

template <typename T>
inline void store_floats(const float* __restrict source, T* __restrict out, int64_t count) {
#pragma omp simd
  for (int64_t i = 0; i < count; ++i) out[i] = from_float<T>(source[i]);
}

// Calls `call` with a null pointer of the element type named by `dtype`.
template <typename Call>
inline void with_dtype(int dtype, Call call) {
  switch (dtype) {
    case kFloat32: call(static_cast<float*>(nullptr)); break;
    case kBFloat16: call(static_cast<bf16*>(nullptr)); break;
    case kFloat16: call(static_cast<_Float16*>(nullptr)); break;
  }
}

// Makes a library function callable with its arguments in an array of 64-bit words, see replay.cpp.
template <typename T>
inline T from_word(const uint64_t& word) {
  T value;
  std::memcpy(&value, &word, sizeof(T));
  return value;
}
template <auto kFace>
struct Replayable;
template <typename... Arguments, void (*kFace)(Arguments...)>
struct Replayable<kFace> {
  template <size_t... kIndex>
  static void call(const uint64_t* words, std::index_sequence<kIndex...>) {
    kFace(from_word<Arguments>(words[kIndex])...);
  }
  static void call(const uint64_t* words) { call(words, std::index_sequence_for<Arguments...>{}); }
};
#define LF_REPLAYABLE(face) \
  void face##_replay(const uint64_t* words) { Replayable<face>::call(words); }

template <typename P>
using element = std::remove_pointer_t<P>;

// The calling thread's object of a type, kept between calls. Never inlined: if GCC sees a thread-local, it recomputes
// the address at each use, by a call around which every vector is saved, in innermost loops too.
template <typename T>
__attribute__((noinline)) T& thread_own() {
  static thread_local T object;
  return object;
}
