// packed_embedding: rows of a packed table by index. A row is read where it lies in the bit stream, which may be in the
// middle of a byte. Reads bits / 8 bytes and writes one value an element; bound by writing.

#include "../kernels.h"
#include "packed_rows.h"
#include "packed_values.h"

namespace qk::cpu {
namespace {

constexpr const char* kOp = "packed_embedding";

}  // namespace

void packed_embedding(int threads, View indices, View packed, View centers, int64_t bits,
                      const std::vector<int64_t>& shape, View out) {
  const PackedRows table = packed_rows_of(kOp, threads, indices, packed, centers, bits, shape);
  QK_CHECK(out.numel() == table.tokens * table.width, text(kOp, ": out must have ", table.width, " values an index"),
           shape_of(out.sizes));
  for_packed_values(centers, table.rows, [&](auto type, auto table_bits) {
    using T = decltype(type);
    constexpr int kBits = decltype(table_bits)::value;
    const bool past_caches = should_stream(out.as<T>(), out.numel());
    parallel_for(threads, table.tokens, table.grain(), [&](int64_t first, int64_t last) {
      PackedValues<kBits, T> values(table.codes, centers.as<T>(), table.rows);
      for (int64_t token = first; token < last; ++token) {
        T* to = out.as<T>() + token * table.width;
        table.for_each_piece(table.index[token], [&](int64_t row, int64_t begin, int64_t count, int64_t offset) {
          values.write(row, begin, count, past_caches, to + offset);
        });
      }
    });
  });
}

}  // namespace qk::cpu
