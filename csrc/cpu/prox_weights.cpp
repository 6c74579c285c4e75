// prox_weights: the nearest center, then the move toward it, in one pass. Reads and writes 4 bytes an element.

#include "../math/prox_weights.h"

#include "../kernels.h"
#include "cells.h"
#include "chunk.h"
#include "rows.h"

namespace qk::cpu {
namespace {

constexpr const char* kOp = "prox_weights";

// move(y, q) is one of the two formulas with its strength.
template <class T, class Move>
void run_span(const T* x, const Cells& cells, const Span& span, T* out, Move move) {
  for_each_chunk(span.begin, span.end, [&](auto size, int64_t begin, int valid) {
    constexpr int Size = decltype(size)::value;
    alignas(64) float value[Size];
    alignas(64) float nearest[Size];
    load_chunk<Size>(x + begin, valid, 0.0f, value);
    nearest_of<Size>(cells, value, nearest);
    for (int i = 0; i < Size; ++i) {
      value[i] = move(value[i], nearest[i]);
    }
    store_chunk<Size>(value, valid, out + begin);
  });
}

}  // namespace

void prox_weights(int threads, View x, View centers, View strength, const std::string& norm, View out) {
  QK_CHECK(norm == "l1" || norm == "l2", text(kOp, ": norm must be 'l1' or 'l2'"), "'" + norm + "'");
  const Rows rows = rows_of(kOp, x, centers);
  const PerRow strengths = per_row(kOp, "strength", strength, rows);
  check_same_dtype(kOp, "out", out, x);
  for_float_type(x.dtype, [&](auto type) {
    using T = decltype(type);
    for_each_span(threads, spans_of(rows), rows.levels, [&](const Span& span) {
      const Cells cells(rows.centers_of(span.row), rows.levels);
      const float t = strengths.of(span.row);
      if (norm == "l1") {
        run_span(x.as<T>(), cells, span, out.as<T>(), [t](float y, float q) { return math::prox_l1(y, q, t); });
      } else {
        const float share = math::prox_l2_share(t);
        run_span(x.as<T>(), cells, span, out.as<T>(), [share](float y, float q) { return math::prox_l2(y, q, share); });
      }
    });
  });
}

}  // namespace qk::cpu
