// bfloat16 and float16 to float32 and back, Size elements at a time: exact one way, to nearest even the other; NaN
// stays NaN.
#pragma once

#include <cstdint>
#include <cstring>

#include "../math/macros.h"
#include "../tensor_view.h"

#if defined(__F16C__)
#include "intrinsics.h"
#endif

namespace qk::cpu {

template <int Size>
void to_float(const float* from, float* to) {
  std::memcpy(to, from, Size * sizeof(float));
}

template <int Size>
void from_float(const float* from, float* to) {
  std::memcpy(to, from, Size * sizeof(float));
}

template <int Size>
void to_float(const bfloat16* from, float* to) {
  for (int i = 0; i < Size; ++i) {
    to[i] = math::float_of(static_cast<uint32_t>(from[i].bits) << 16);
  }
}

template <int Size>
void from_float(const float* from, bfloat16* to) {
  for (int i = 0; i < Size; ++i) {
    const uint32_t bits = math::bits_of(from[i]);
    const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;  // half of the last place, ties to even
    const uint32_t quiet = (bits >> 16) | 0x40u;  // NaN: no rounding, which could make it infinite
    to[i].bits = static_cast<uint16_t>((bits & 0x7fffffffu) > 0x7f800000u ? quiet : rounded);
  }
}

#if defined(__F16C__)

template <int Size>
void to_float(const float16* from, float* to) {
  static_assert(Size % 8 == 0, "eight values a conversion");
  for (int i = 0; i < Size; i += 8) {
    _mm256_storeu_ps(to + i, _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from + i))));
  }
}

template <int Size>
void from_float(const float* from, float16* to) {
  for (int i = 0; i < Size; i += 8) {
    const __m128i half = _mm256_cvtps_ph(_mm256_loadu_ps(from + i), _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    _mm_storeu_si128(reinterpret_cast<__m128i*>(to + i), half);
  }
}

#else

template <int Size>
void to_float(const float16* from, float* to) {
  for (int i = 0; i < Size; ++i) {
    const uint32_t half = from[i].bits;
    const uint32_t sign = (half & 0x8000u) << 16;
    const uint32_t magnitude = (half & 0x7fffu) << 13;
    const float finite = math::float_of(magnitude) * 0x1p112f;  // exponent bias 127 - 15; exact for denormals too
    const uint32_t special = magnitude | 0x7f800000u;           // infinity and NaN
    to[i] = math::float_of(sign | (magnitude >= 0x0f800000u ? special : math::bits_of(finite)));
  }
}

template <int Size>
void from_float(const float* from, float16* to) {
  for (int i = 0; i < Size; ++i) {
    const uint32_t bits = math::bits_of(from[i]);
    const uint32_t sign = (bits >> 16) & 0x8000u;
    const uint32_t magnitude = bits & 0x7fffffffu;
    const uint32_t normal = (magnitude - 0x38000000u + 0xfffu + ((magnitude >> 13) & 1u)) >> 13;
    // Below 2^-14: 0.5 has the last place of a float16 denormal, 2^-24, so the addition rounds as needed.
    const uint32_t denormal = math::bits_of(math::float_of(magnitude) + 0.5f) - 0x3f000000u;
    uint32_t half = magnitude < 0x38800000u ? denormal : normal;
    half = magnitude >= 0x477ff000u ? 0x7c00u : half;  // 65520 and above round to infinity
    half = magnitude > 0x7f800000u ? 0x7e00u | ((magnitude >> 13) & 0x3ffu) : half;  // NaN
    to[i].bits = static_cast<uint16_t>(sign | half);
  }
}

#endif

}  // namespace qk::cpu
