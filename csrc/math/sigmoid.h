// sigmoid(z) and its slope, with no cancellation where the sigmoid is close to 1.
#pragma once

#include "exp.h"

namespace qk::math {

struct Sigmoid {
  float value;  // s = 1 / (1 + exp(-z))
  float slope;  // s (1 - s)
};

QK_HD float magnitude(float z) { return float_of(bits_of(z) & 0x7fffffffu); }

QK_HD float sigmoid(float z) {
  const float e = exp_of_nonpositive(-magnitude(z));
  return (z >= 0.0f ? 1.0f : e) / (1.0f + e);
}

QK_HD Sigmoid sigmoid_and_slope(float z) {
  const float e = exp_of_nonpositive(-magnitude(z));
  const float r = 1.0f / (1.0f + e);
  const float er = e * r;
  return {z >= 0.0f ? r : er, er * r};
}

}  // namespace qk::math
