// lut_linear by tiles: sixteen rows of W at a time, decoded into cache and multiplied with every row of x. The kernels
// for any bits, groups, shape and batch; lut_regimes.h says where others are faster.
#pragma once

#include <cstdint>

#include "lut_output.h"

namespace qk::cpu {

// Sums in float32. Codes that have no center give NaN.
template <class T>
void lut_tiles(int threads, int64_t bits, const LutCall<T>& call);

// The same by products of bfloat16 pairs, for weights that pairs_fit: centers, x and sums below 2^-126 count as zero.
void lut_tiles_bf16(int threads, int64_t bits, const LutCall<bfloat16>& call);

// Whether the processor has such products, QUPEDKERN_DISABLE does not name them (avx512_bf16), and every center is a
// bfloat16 value.
bool pairs_fit(const LutWeights& weights);

}  // namespace qk::cpu
