// The kernels of lut_linear and what decides between them: the one place that knows.
#pragma once

#include <type_traits>

#include "lut_call.h"
#include "lut_pieces.h"

namespace qk::cuda {

enum class LutForm { mma, fma, any };

// 1 to 4 bits.
template <int Bits>
Slices lut_mma_slices(int64_t N, int64_t K);
template <int Bits>
void lut_mma(const LutCall& call, int64_t slices, cudaStream_t stream);
// 1, 2, 3, 4 and 8 bits.
template <int Bits>
Slices lut_fma_slices(int64_t N, int64_t K);
template <int Bits>
void lut_fma(const LutCall& call, int64_t slices, cudaStream_t stream);
Slices lut_any_slices(int64_t N, int64_t K);
void lut_any(const LutCall& call, int bits, int64_t slices, cudaStream_t stream);

// The batch does not enter: a row of x gets the same bits in every one.
inline LutForm lut_form(const LutCall& call, int bits) {
  constexpr int64_t kMost = 1 << 22;  // columns: what a block reads then lies within 32 bits
  const bool small = call.K > 0 && call.K <= kMost && call.N < INT32_MAX - 1024 && call.batch < INT32_MAX - 1024;
  const bool pieces = small && pieces_fit(call.packed, call.K, bits);
  const bool one_table = call.length == call.N * call.K;
  if (pieces && one_table && bits <= 4 && call.dtype != Dtype::float32) {
    return LutForm::mma;
  }
  const bool by_row = call.K > 0 && call.length % call.K == 0;
  const bool known = bits <= 4 || (bits == 8 && one_table);
  return pieces && by_row && known ? LutForm::fma : LutForm::any;
}

// body(std::integral_constant<int, bits>) for the widths that pieces have kernels for.
template <class Body>
auto for_piece_bits(int bits, Body&& body) {
  switch (bits) {
    case 1:
      return body(std::integral_constant<int, 1>{});
    case 2:
      return body(std::integral_constant<int, 2>{});
    case 3:
      return body(std::integral_constant<int, 3>{});
    case 4:
      return body(std::integral_constant<int, 4>{});
    default:
      return body(std::integral_constant<int, 8>{});
  }
}

}  // namespace qk::cuda
