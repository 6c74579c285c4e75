// One element of quped_step from its total gradient to its new weight: csrc/math's optimizers and prox, the rule chosen
// at run time by branches that all threads take alike.
#pragma once

#include "../math/prox_weights.h"
#include "../math/step_factors.h"
#include "platform.h"

namespace qk::cuda {

template <bool kFromEnd>
__device__ __forceinline__ float adam_of(const math::StepFactors& f, float x, float g, float& first, float& second) {
  if (f.decay == math::Decay::kCoupled) {
    math::decay_adam<math::Decay::kCoupled>(f.adam, x, g);
  } else if (f.decay == math::Decay::kDecoupled) {
    math::decay_adam<math::Decay::kDecoupled>(f.adam, x, g);
  }
  return math::adam<math::Decay::kNone, kFromEnd>(f.adam, x, g, first, second);
}

template <bool kDecay>
__device__ __forceinline__ float sgd_of(const math::StepFactors& f, float x, float g, float& buffer) {
  using math::Momentum;
  if (!f.momentum) {
    return math::sgd<kDecay, Momentum::kNone, false>(f.sgd, x, g, buffer);
  }
  if (f.first_step) {
    return f.nesterov ? math::sgd<kDecay, Momentum::kFirst, true>(f.sgd, x, g, buffer)
                      : math::sgd<kDecay, Momentum::kFirst, false>(f.sgd, x, g, buffer);
  }
  return f.nesterov ? math::sgd<kDecay, Momentum::kRunning, true>(f.sgd, x, g, buffer)
                    : math::sgd<kDecay, Momentum::kRunning, false>(f.sgd, x, g, buffer);
}

// x - eta g with the optimizer's state.
template <bool kAdaptive>
__device__ __forceinline__ float moved_weight(const math::StepFactors& f, float x, float g, float& first,
                                              float& second) {
  if constexpr (kAdaptive) {
    return f.from_end ? adam_of<true>(f, x, g, first, second) : adam_of<false>(f, x, g, first, second);
  } else {
    return f.decay == math::Decay::kNone ? sgd_of<false>(f, x, g, first) : sgd_of<true>(f, x, g, first);
  }
}

// pull: the strength, or with norm l2 the share of the way. NaN stays.
__device__ __forceinline__ float prox(float y, float q, float pull, bool l1) {
  return l1 ? math::prox_l1(y, q, pull) : math::prox_l2(y, q, pull);
}

__device__ __forceinline__ float clamped(float value) { return value > 1.0f ? 1.0f : value < -1.0f ? -1.0f : value; }

}  // namespace qk::cuda
