// Vec, sixteen floats, and Ints, sixteen 32-bit integers, whatever the instruction set: one AVX-512 register, two AVX2
// registers, or a plain array. One kernel source serves every build.
//
// larger(a, b) and smaller(a, b) give b where either is NaN, as the hardware does.
#pragma once

#include <cstdint>
#include <cstring>

#include "../tensor_view.h"
#include "half.h"

#if defined(__AVX512F__) && defined(__AVX512BW__)
#include "simd_avx512.h"
#elif defined(__AVX2__) && defined(__FMA__)
#include "simd_avx2.h"
#else
#include "simd_portable.h"
#endif

namespace qk::cpu {

constexpr int kVec = 16;

// The first `count` elements, zeros behind them; nothing past them is read.
template <class T>
Vec load_some(const T* from, int count) {
  T whole[kVec] = {};
  std::memcpy(whole, from, static_cast<size_t>(count) * sizeof(T));
  return load(whole);
}

// Whether an output of this many bytes should go past the caches: at twice the size of a last-level cache and more it
// cannot stay there, and lines that are not read first save a third of the traffic.
constexpr int64_t kStreamBytes = int64_t{1} << 26;
template <class T>
bool should_stream(const T* to, int64_t count) {
  return sizeof(T) == sizeof(float) && count * static_cast<int64_t>(sizeof(T)) >= kStreamBytes &&
         reinterpret_cast<uintptr_t>(to) % (kVec * sizeof(float)) == 0;
}

// Copies past the caches to an address aligned to 64 bytes; end_stream() before another thread may read it.
template <class T>
void stream_block(const T* from, int64_t n, T* to) {
  if constexpr (sizeof(T) == sizeof(float)) {  // should_stream says no to others
    int64_t i = 0;
    for (; i + kVec <= n; i += kVec) {
      stream(load(from + i), to + i);
    }
    std::memcpy(to + i, from + i, static_cast<size_t>(n - i) * sizeof(float));
  }
}

template <class T>
void store_some(Vec v, int count, T* to) {
  T whole[kVec];
  store(v, whole);
  std::memcpy(to, whole, static_cast<size_t>(count) * sizeof(T));
}

}  // namespace qk::cpu
