// The arithmetic of platform.h that CPUs do not have: approximate special functions as exact ones moved, by a hash of
// the argument, to anywhere within what PTX documents, so that no test rests on one GPU's bits; tensor cores from PTX's
// fragment layout.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#include "../../csrc/cpu/half.h"
#include "../../csrc/math/macros.h"
#include "../../csrc/tensor_view.h"

namespace qk::emulator {

inline int64_t special_functions = 0;  // calls so far: what tests tell one way to a result from another by

// value (1 + d), |d| <= relative with the rounding to float32 counted in; zeros, infinities and NaN stay.
inline float perturbed(double value, double relative, float argument) {
  if (value == 0.0 || !std::isfinite(value)) {
    return static_cast<float>(value);
  }
  const uint32_t hash = (math::bits_of(argument) ^ 0x9e3779b9u) * 0x85ebca6bu;
  const double part = static_cast<double>((hash ^ (hash >> 15)) & 0xffffu) / 32767.5 - 1.0;
  return static_cast<float>(value * (1.0 + part * (relative - 0x1p-24)));
}

inline float flushed(float value) { return std::fabs(value) < 0x1p-126f ? std::copysign(0.0f, value) : value; }

struct Mma {
  float* d;
  const uint32_t* a;
  const uint32_t* b;
};

void multiply(void* const* lanes, float (*value_of)(uint16_t));

}  // namespace qk::emulator

namespace qk::cuda {

inline float exp2_approx(float a) {
  ++emulator::special_functions;
  return emulator::flushed(emulator::perturbed(std::exp2(static_cast<double>(emulator::flushed(a))), 0x1p-22, a));
}

inline float rcp_approx(float a) {
  ++emulator::special_functions;
  return emulator::flushed(emulator::perturbed(1.0 / static_cast<double>(emulator::flushed(a)), 0x1p-23, a));
}

inline float rsqrt_approx(float a) {
  ++emulator::special_functions;
  return emulator::flushed(
      emulator::perturbed(1.0 / std::sqrt(static_cast<double>(emulator::flushed(a))), 0x1.8p-23, a));
}

inline float min_or_nan(float a, float b) { return a != a ? a : b != b ? b : b < a ? b : a; }
inline float max_or_nan(float a, float b) { return a != a ? a : b != b ? b : a < b ? b : a; }

inline uint4 load_streaming(const uint4* from) { return *from; }
inline void store_streaming(uint4* to, uint4 value) { *to = value; }

// Copies at once: a kernel that reads before it waits is not caught.
inline void copy_async_16(void* shared, const void* global) {
  *static_cast<uint4*>(shared) = *static_cast<const uint4*>(global);
}
inline void copy_async_commit() {}
template <int kPending>
void copy_async_wait() {}

inline float to_float(float value) { return value; }
template <class T>
float to_float(T value) {
  float wide;
  cpu::to_float<1>(&value, &wide);
  return wide;
}

template <class T>
T from_float(float value) {
  T narrow;
  cpu::from_float<1>(&value, &narrow);
  return narrow;
}

template <class T>
void unpack_pair(uint32_t word, float& low, float& high) {
  low = to_float(T{static_cast<uint16_t>(word)});
  high = to_float(T{static_cast<uint16_t>(word >> 16)});
}

template <class T>
uint32_t pack_pair(float low, float high) {
  return from_float<T>(low).bits | static_cast<uint32_t>(from_float<T>(high).bits) << 16;
}

inline void mma_m16n8k16_bf16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], QK_SITE) {
  emulator::Mma mine{d, a, b};
  const auto complete = [](void* const* lanes) {
    emulator::multiply(lanes, [](uint16_t bits) { return to_float(bfloat16{bits}); });
  };
  emulator::collective(0xffffffffu, complete, &mine, file, line);
}

inline void mma_m16n8k16_f16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], QK_SITE) {
  emulator::Mma mine{d, a, b};
  const auto complete = [](void* const* lanes) {
    emulator::multiply(lanes, [](uint16_t bits) { return to_float(float16{bits}); });
  };
  emulator::collective(0xffffffffu, complete, &mine, file, line);
}

}  // namespace qk::cuda
