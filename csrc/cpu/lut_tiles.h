// lut_linear by tiles: dequantise a tile of W into cache, multiply it with every row of x. The kernel for any bits,
// groups, shape and batch; lut_regimes.h says where others are faster.
#pragma once

#include <cstdint>

#include "../tensor_view.h"
#include "lut_weights.h"

namespace qk::cpu {

// out [batch, N] = x [batch, K] W^T + bias; x and out of one type, sums in float32. bias null for none.
void lut_tiles(int threads, const LutWeights& weights, int64_t bits, const float* bias, int64_t batch,
               const TensorView& x, const TensorView& out);

}  // namespace qk::cpu
