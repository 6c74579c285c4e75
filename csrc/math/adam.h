// One element of torch.optim.Adam and AdamW: the same operations, each rounded as torch's CPU kernels round it, but for
// the square root, which is correctly rounded here.
#pragma once

#include "fused.h"

namespace qk::math {

enum class Decay { kNone, kCoupled, kDecoupled };

struct Adam {
  float decay;       // kCoupled: weight_decay; kDecoupled: 1 - lr weight_decay
  float weight;      // 1 - beta1
  float beta2;       //
  float share;       // 1 - beta2
  float correction;  // sqrt(1 - beta2^step)
  float eps;
  float minus_rate;  // -lr / (1 - beta1^step)
};

// torch.lerp: from whichever end is nearer.
template <bool kFromEnd>
QK_HD float lerp(float start, float end, float weight) {
  const float difference = end - start;
  return kFromEnd ? fused(weight - 1.0f, difference, end) : fused(weight, difference, start);
}

template <Decay kDecay, bool kFromEnd>
QK_HD float adam(const Adam& a, float x, float g, float& first, float& second) {
  if constexpr (kDecay == Decay::kCoupled) {
    g = fused(x, a.decay, g);
  } else if constexpr (kDecay == Decay::kDecoupled) {
    x = x * a.decay;
  }
  first = lerp<kFromEnd>(first, g, a.weight);
  second = fused(a.share * g, g, second * a.beta2);
  const float size = __builtin_sqrtf(second) / a.correction + a.eps;
  return x + (a.minus_rate * first) / size;
}

}  // namespace qk::math
