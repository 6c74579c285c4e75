// dequantize: a table lookup, sixteen codes a step. Reads 1 byte and writes 4 an element; bound by memory.

#include "../kernels.h"
#include "code_check.h"
#include "rows.h"
#include "value_table.h"

namespace qk::cpu {
namespace {

constexpr const char* kOp = "dequantize";

template <int kBits>
void run_span(const uint8_t* codes, const ValueTable<kBits>& table, const Span& span, float* out) {
  int64_t i = span.begin;
  for (; i + kVec <= span.end; i += kVec) {
    store(table.of(load_bytes(codes + i)), out + i);
  }
  if (i < span.end) {
    uint8_t rest[kVec] = {};
    std::memcpy(rest, codes + i, static_cast<size_t>(span.end - i));
    store_some(table.of(load_bytes(rest)), static_cast<int>(span.end - i), out + i);
  }
}

}  // namespace

void dequantize(int threads, View codes, View centers, View out) {
  const Rows rows = rows_of(kOp, codes, centers);
  check_same(kOp, "out", out, codes);
  check_codes(kOp, threads, codes.as<uint8_t>(), codes.numel(), rows.levels);
  for_table_bits(rows.levels, [&](auto table_bits) {
    constexpr int kBits = decltype(table_bits)::value;
    for_each_run_of_spans(threads, spans_of(rows), 2, [&](const auto& each_span) {
      ValueTable<kBits> table;
      int64_t row = -1;
      each_span([&](const Span& span) {
        if (span.row != row) {
          table.fill(rows.centers_of(span.row), rows.levels);
          row = span.row;
        }
        run_span<kBits>(codes.as<uint8_t>(), table, span, out.as<float>());
      });
    });
  });
}

}  // namespace qk::cpu
