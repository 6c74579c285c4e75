// dequantize_backward: grad summed over the elements of each code.

#include "../kernels.h"
#include "code_check.h"
#include "row_sums.h"
#include "rows.h"
#include "sum_by_code.h"

namespace qk::cpu {
namespace {

constexpr const char* kOp = "dequantize_backward";

}  // namespace

void dequantize_backward(int threads, View grad, View codes, View centers, View grad_centers) {
  const Rows rows = rows_of(kOp, codes, centers);
  check_same(kOp, "grad", grad, codes);
  check_same(kOp, "grad_centers", grad_centers, centers);
  check_codes(kOp, threads, codes.as<uint8_t>(), codes.numel(), rows.levels);
  for_float_type(grad.dtype, [&](auto type) {
    using T = decltype(type);
    sum_rows(threads, rows, rows.levels, grad_centers.as<float>(), [&](const Span& span, double* sums) {
      CodeSums by_code(rows.levels, sums);
      for_each_block(span, [&](const Span& block) {
        const int64_t count = block.end - block.begin;
        add_block(grad.as<T>() + block.begin, codes.as<uint8_t>() + block.begin, count, by_code);
      });
    });
  });
}

}  // namespace qk::cpu
