// One element of torch.optim.SGD: the same operations, each rounded as torch's CPU kernels round it.
#pragma once

#include "fused.h"

namespace qk::math {

enum class Momentum { kNone, kFirst, kRunning };  // kFirst: the buffer is written, not read

struct Sgd {
  float minus_rate;
  float decay;
  float momentum;
  float weight;  // 1 - dampening
};

template <bool kDecay, Momentum kMomentum, bool kNesterov>
QK_HD float sgd(const Sgd& s, float x, float g, float& buffer) {
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
