// One element of torch.optim.Adam and AdamW: the same operations, each rounded as torch's CPU kernels round it, but for
// the square root, which is correctly rounded here. Number is float, or a vector of them that has `fused` and
// `square_root`.
#pragma once

#include "fused.h"

namespace qk::math {

enum class Decay { kNone, kCoupled, kDecoupled };

template <class Number>
struct Adam {
  Number decay;       // kCoupled: weight_decay; kDecoupled: 1 - lr weight_decay
  Number weight;      // 1 - beta1; minus beta1 where lerp starts from the end
  Number beta2;       //
  Number share;       // 1 - beta2
  Number correction;  // sqrt(1 - beta2^step)
  Number eps;
  Number minus_rate;  // -lr / (1 - beta1^step)
};

#if defined(__CUDA_ARCH__)
QK_HD float square_root(float a) { return sqrtf(a); }  // nvcc rounds it correctly unless told otherwise
#else
QK_HD float square_root(float a) { return __builtin_sqrtf(a); }
#endif

template <Decay kDecay, class Number>
QK_HD void decay_adam(const Adam<Number>& a, Number& x, Number& g) {
  if constexpr (kDecay == Decay::kCoupled) {
    g = fused(x, a.decay, g);
  } else if constexpr (kDecay == Decay::kDecoupled) {
    x = x * a.decay;
  }
}

// kFromEnd: as torch.lerp does where the weight is 1/2 or more.
template <Decay kDecay, bool kFromEnd, class Number>
QK_HD Number adam(const Adam<Number>& a, Number x, Number g, Number& first, Number& second) {
  decay_adam<kDecay>(a, x, g);
  first = fused(a.weight, g - first, kFromEnd ? g : first);
  second = fused(a.share * g, g, second * a.beta2);
  const Number size = square_root(second) / a.correction + a.eps;
  return x + (a.minus_rate * first) / size;
}

}  // namespace qk::math
