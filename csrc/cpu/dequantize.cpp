// dequantize: a table lookup. Few centers: compare and select, which vectorises everywhere; more: a table of 256
// entries, so that no code reads past its end. Reads 1 byte and writes 4 an element; bound by memory for small m.

#include "../kernels.h"
#include "chunk.h"
#include "code_check.h"
#include "rows.h"

namespace qk::cpu {
namespace {

constexpr const char* kOp = "dequantize";
constexpr int kFewSelections = 16;

template <int Size>
void select_chunk(const uint8_t* code, const float* centers, int levels, float* value) {
  for (int i = 0; i < Size; ++i) {
    value[i] = centers[0];
  }
  for (int k = 1; k < levels; ++k) {
    const float center = centers[k];
    for (int i = 0; i < Size; ++i) {
      value[i] = code[i] == k ? center : value[i];
    }
  }
}

void run_span(const uint8_t* codes, const float* centers, int levels, const Span& span, float* out) {
  float table[kMaxLevels];
  if (levels > kFewSelections) {
    std::fill(std::copy_n(centers, levels, table), table + kMaxLevels, 0.0f);
  }
  for_each_chunk(span.begin, span.end, [&](auto size, int64_t begin, int valid) {
    constexpr int Size = decltype(size)::value;
    alignas(64) uint8_t code[Size] = {};
    alignas(64) float value[Size];
    std::memcpy(code, codes + begin, static_cast<size_t>(valid));
    if (levels > kFewSelections) {
      for (int i = 0; i < Size; ++i) {
        value[i] = table[code[i]];
      }
    } else {
      select_chunk<Size>(code, centers, levels, value);
    }
    store_chunk<Size>(value, valid, out + begin);
  });
}

}  // namespace

void dequantize(int threads, View codes, View centers, View out) {
  const Rows rows = rows_of(kOp, codes, centers);
  check_same(kOp, "out", out, codes);
  HighestCode highest;
  const int64_t work = std::min(rows.levels, kFewSelections);
  for_each_span(threads, spans_of(rows), work, [&](const Span& span) {
    run_span(codes.as<uint8_t>(), rows.centers_of(span.row), rows.levels, span, out.as<float>());
    highest.see(highest_of(codes.as<uint8_t>() + span.begin, span.end - span.begin));
  });
  check_codes_below_levels(kOp, highest, rows.levels);
}

}  // namespace qk::cpu
