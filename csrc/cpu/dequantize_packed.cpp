// dequantize_packed: the bit stream of codes straight to values, sixteen a step. Reads bits / 8 bytes and writes one
// value an element; bound by writing.

#include "../kernels.h"
#include "packed_values.h"
#include "rows.h"

namespace qk::cpu {
namespace {

constexpr const char* kOp = "dequantize_packed";

}  // namespace

void dequantize_packed(int threads, View packed, View centers, int64_t bits, const std::vector<int64_t>& shape,
                       View out) {
  QK_CHECK(out.sizes == shape, text(kOp, ": out must have shape ", shape_of(shape)), shape_of(out.sizes));
  const Rows rows = rows_of(kOp, out, centers);
  const PackedCodes codes = packed_codes_of(kOp, packed, bits, out.numel());
  check_levels(kOp, rows.levels, bits);
  check_packed_codes(kOp, threads, codes, out.numel(), rows.levels);
  for_packed_values(centers, rows, [&](auto type, auto table_bits) {
    using T = decltype(type);
    constexpr int kBits = decltype(table_bits)::value;
    const bool past_caches = should_stream(out.as<T>(), out.numel());
    for_each_run_of_spans(threads, spans_of(rows), 2, [&](const auto& each_span) {
      PackedValues<kBits, T> values(codes, centers.as<T>(), rows);
      each_span([&](const Span& span) {
        values.write(span.row, span.begin, span.end - span.begin, past_caches, out.as<T>() + span.begin);
      });
    });
  });
}

}  // namespace qk::cpu
