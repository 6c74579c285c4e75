// lut_linear by tiles: sixteen rows of W at a time, decoded into cache and multiplied with every row of x. The kernels
// for any bits, groups, shape and batch; lut_regimes.h says where others are faster.
#pragma once

#include <cstdint>

#include "../tensor_view.h"
#include "code_check.h"
#include "lut_weights.h"

namespace qk::cpu {

// out [batch, N] = x [batch, K] W^T + bias; x and out of one type, sums in float32. bias null for none, highest null
// where every code has a center; a code that has none may go unseen in a batch of no rows.
void lut_tiles(int threads, const LutWeights& weights, int64_t bits, const float* bias, int64_t batch,
               const TensorView& x, const TensorView& out, HighestCode* highest);

}  // namespace qk::cpu
