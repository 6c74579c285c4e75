// Cells: the midpoint between two neighbouring centers, and the rules that hang on it.
#pragma once

#include "macros.h"

namespace qk::math {

// Halves are added so that nothing overflows. Rounded in float32: this is the boundary, not an approximation of it.
QK_HD float midpoint(float lower, float upper) { return 0.5f * lower + 0.5f * upper; }

// A tie stays in the lower cell; NaN is above nothing.
QK_HD bool is_above(float x, float midpoint) { return x > midpoint; }

}  // namespace qk::math
