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

template <class T>
void store_some(Vec v, int count, T* to) {
  T whole[kVec];
  store(v, whole);
  std::memcpy(to, whole, static_cast<size_t>(count) * sizeof(T));
}

}  // namespace qk::cpu
