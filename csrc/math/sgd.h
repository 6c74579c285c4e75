// One element of torch.optim.SGD: the same operations, each rounded as torch's CPU kernels round it. Number is float,
// or a vector of them that has `fused`.
#pragma once

#include "fused.h"

namespace qk::math {

enum class Momentum { kNone, kFirst, kRunning };  // kFirst: the buffer is written, not read

template <class Number>
struct Sgd {
  Number minus_rate;
  Number decay;
  Number momentum;
  Number weight;  // 1 - dampening
};

template <bool kDecay, Momentum kMomentum, bool kNesterov, class Number>
QK_HD Number sgd(const Sgd<Number>& s, Number x, Number g, Number& buffer) {
  if constexpr (kDecay) {
    g = fused(x, s.decay, g);
  }
  if constexpr (kMomentum != Momentum::kNone) {
    buffer = kMomentum == Momentum::kFirst ? g : fused(g, s.weight, buffer * s.momentum);
    g = kNesterov ? fused(buffer, s.momentum, g) : buffer;
  }
  return fused(g, s.minus_rate, x);
}

}  // namespace qk::math
