// dequantize_backward: grad summed over the elements of each code.

#include "../kernels.h"
#include "chunk.h"
#include "code_check.h"
#include "row_sums.h"
#include "rows.h"
#include "sum_by_code.h"

namespace qk::cpu {
namespace {

constexpr const char* kOp = "dequantize_backward";

template <class T>
void add_block(const T* grad, const uint8_t* codes, const Span& block, CodeSums& sums) {
  for_each_chunk(block.begin, block.end, [&](auto size, int64_t begin, int valid) {
    constexpr int Size = decltype(size)::value;
    alignas(64) float g[Size];
    alignas(64) int32_t code[Size];
    load_chunk<Size>(grad + begin, valid, 0.0f, g);
    for (int i = 0; i < Size; ++i) {
      code[i] = i < valid ? codes[begin + i] : 0;
    }
    sums.add<Size>(g, code, valid);
  });
  sums.end_block();
}

}  // namespace

void dequantize_backward(int threads, View grad, View codes, View centers, View grad_centers) {
  const Rows rows = rows_of(kOp, codes, centers);
  check_same(kOp, "grad", grad, codes);
  check_same(kOp, "grad_centers", grad_centers, centers);
  HighestCode highest;
  for_float_type(grad.dtype, [&](auto type) {
    using T = decltype(type);
    sum_rows(threads, rows, rows.levels, grad_centers.as<float>(), [&](const Span& span, double* sums) {
      const uint8_t* first = codes.as<uint8_t>() + span.begin;
      const int seen = highest_of(first, span.end - span.begin);
      highest.see(seen);
      if (seen >= rows.levels) {
        return;  // before a sum is indexed by it
      }
      CodeSums by_code(rows.levels, sums);
      for_each_block(span, [&](const Span& block) { add_block(grad.as<T>(), codes.as<uint8_t>(), block, by_code); });
    });
  });
  check_codes_below_levels(kOp, highest, rows.levels);
}

}  // namespace qk::cpu
