// prox_weights per element: y moves toward q, the nearest center. Every operation is rounded on its own, none is fused,
// so the result equals the same formula in eager float32 to the bit: a weight on its center stays, and strength 0 is
// the identity.
#pragma once

#include "macros.h"

namespace qk::math {

// q where |y - q| <= t, else y - t sign(y - q)
QK_HD float prox_l1(float y, float q, float strength) {
  const float gap = y - q;
  const float size = float_of(bits_of(gap) & 0x7fffffffu);
  const float moved =
      gap > 0.0f ? y - strength : y + strength;  // a NaN gap comes from a NaN or infinite y, which stays
  return size <= strength ? q : moved;
}

// 2t / (1 + 2t), the share of the way to q, in a form whose terms do not overflow
QK_HD float prox_l2_share(float strength) { return strength / (0.5f + strength); }

// y - (y - q) share, but never past q, where the rounding of a large gap can carry it out of the cell; NaN stays
QK_HD float prox_l2(float y, float q, float share) {
  const float gap = y - q;
  const float moved = y - gap * share;
  const bool past = gap > 0.0f ? moved < q : moved > q;
  return past ? q : moved;
}

}  // namespace qk::math
