// QK_HD marks a formula shared by the CPU loop and a CUDA kernel; QK_FMA is a * b + c, fused exactly where the target
// fuses it.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__CUDACC__)
#define QK_HD __host__ __device__ __forceinline__
#elif defined(__GNUC__)
#define QK_HD inline __attribute__((always_inline))
#else
#define QK_HD inline
#endif

#if defined(__CUDA_ARCH__)
#define QK_FMA(a, b, c) fmaf((a), (b), (c))
#elif defined(__FMA__) || defined(__ARM_FEATURE_FMA) || defined(QK_CUDA_EMULATED)
#define QK_FMA(a, b, c) __builtin_fmaf((a), (b), (c))
#else
#define QK_FMA(a, b, c) ((a) * (b) + (c))
#endif

namespace qk::math {

QK_HD uint32_t bits_of(float value) {
  uint32_t bits;
  memcpy(&bits, &value, sizeof bits);
  return bits;
}

QK_HD float float_of(uint32_t bits) {
  float value;
  memcpy(&value, &bits, sizeof value);
  return value;
}

}  // namespace qk::math
