// The cuts of rows and streams at sizes no test could allocate: every element in exactly one span, in order, and no
// intermediate that leaves 64 bits (UBSan watches the products).

#include "index_arithmetic.h"

#include <stdexcept>

#include "cpu/bit_stream.h"
#include "cpu/rows.h"

namespace driver {
namespace {

namespace cpu = qk::cpu;

void require(bool holds, const char* what, int64_t rows, int64_t length) {
  if (!holds) {
    throw std::runtime_error(qk::text(what, " for ", rows, " rows of ", length));
  }
}

void check_rows(int64_t count, int64_t length) {
  const cpu::Spans spans = cpu::spans_of(cpu::Rows{count, length, 2, nullptr});
  require(spans.count == spans.per_row * count, "the spans are not those of the rows", count, length);
  int64_t next = 0;
  int64_t visited = 0;
  cpu::for_each_span(1, spans, 4, [&](const cpu::Span& span) {
    require(span.index == visited++, "spans are out of order", count, length);
    require(span.row == span.index / spans.per_row, "a span has the wrong row", count, length);
    require(span.begin == next && span.end >= span.begin, "spans leave a gap", count, length);
    require(span.end <= (span.row + 1) * length, "a span leaves its row", count, length);
    next = span.end;
    const cpu::Span last{span.index, span.row, std::max(span.begin, span.end - 3 * cpu::kBlock), span.end};
    int64_t covered = last.begin;
    cpu::for_each_block(last, [&](const cpu::Span& block) {
      require(block.begin == covered, "blocks leave a gap", count, length);
      covered = block.end;
    });
    require(covered == span.end, "blocks miss the end of their span", count, length);
  });
  require(visited == spans.count && next == count * length, "spans miss elements", count, length);
}

void check_stream(int64_t numel) {
  for (int64_t bits = 1; bits <= cpu::kMaxBits; ++bits) {
    // numel * bits passes 2^63 before the division where numel does 2^60: 128 bits hold it
    const auto exact = static_cast<int64_t>((static_cast<__int128>(numel) * bits + 7) / 8);
    require(cpu::packed_bytes(numel, bits) == exact, "packed bytes are miscounted", bits, numel);
    const int64_t last = (numel + 7) / 8 - 1;
    const int rest = cpu::codes_in_group(last, numel);
    require(last * 8 + rest == numel && last * bits + (rest * bits + 7) / 8 == exact, "the last group ends elsewhere",
            bits, numel);
  }
}

}  // namespace

void check_index_arithmetic() {
  constexpr int64_t kOne = 1;
  for (int64_t length : {kOne << 30, (kOne << 31) - 1, kOne << 31, (kOne << 32) + 1, (kOne << 36) + 4095, kOne << 40}) {
    for (int64_t rows : {1, 2, 3, 127, 128, 129, 1000}) {
      check_rows(rows, length);
    }
  }
  check_rows(kOne << 20, (kOne << 20) + 1);
  for (int64_t numel : {(kOne << 31) - 1, (kOne << 32) + 3, (kOne << 40) + 5, (kOne << 60) + 7}) {
    check_stream(numel);
  }
}

}  // namespace driver
