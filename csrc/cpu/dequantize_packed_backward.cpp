// dequantize_packed_backward: grad summed over the elements of each code, a block of codes unpacked at a time; the same
// bits as dequantize_backward.

#include "../kernels.h"
#include "packed_codes.h"
#include "row_sums.h"
#include "rows.h"
#include "sum_by_code.h"

namespace qk::cpu {
namespace {

constexpr const char* kOp = "dequantize_packed_backward";

}  // namespace

void dequantize_packed_backward(int threads, View grad, View packed, View centers, int64_t bits,
                                const std::vector<int64_t>& shape, View grad_centers) {
  QK_CHECK(grad.sizes == shape, text(kOp, ": grad must have shape ", shape_of(shape)), shape_of(grad.sizes));
  const Rows rows = rows_of(kOp, grad, centers);
  check_same(kOp, "grad_centers", grad_centers, centers);
  const PackedCodes codes = packed_codes_of(kOp, packed, bits, grad.numel());
  check_levels(kOp, rows.levels, bits);
  check_packed_codes(kOp, threads, codes, grad.numel(), rows.levels);
  for_float_type(grad.dtype, [&](auto type) {
    using T = decltype(type);
    sum_rows(threads, rows, rows.levels, grad_centers.as<float>(), [&](const Span& span, double* sums) {
      CodeSums by_code(rows.levels, sums);
      LanesByShift by_shift(codes.bits);
      alignas(64) uint8_t unpacked[kBlock];
      for_each_block(span, [&](const Span& block) {
        const int64_t count = block.end - block.begin;
        codes.unpack(by_shift, block.begin, count, unpacked);
        add_block(grad.as<T>() + block.begin, unpacked, count, by_code);
      });
    });
  });
}

}  // namespace qk::cpu
