// distance per element, from gap = x - q to the nearest center q: |gap| or gap^2 and their slopes in x.
#pragma once

#include "macros.h"

namespace qk::math {

QK_HD float distance_l1(float gap) { return float_of(bits_of(gap) & 0x7fffffffu); }

QK_HD float distance_l2(float gap) { return gap * gap; }

// The sign of the gap; 0 on the center, and for NaN as torch.sign has it.
QK_HD float distance_l1_slope(float gap) { return (gap > 0.0f ? 1.0f : 0.0f) - (gap < 0.0f ? 1.0f : 0.0f); }

QK_HD float distance_l2_slope(float gap) { return 2.0f * gap; }

}  // namespace qk::math
