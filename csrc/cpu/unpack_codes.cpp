// unpack_codes: `bits` bytes make eight codes, so groups of eight are independent.

#include "../kernels.h"
#include "../math/pack_codes.h"
#include "bit_stream.h"

namespace qk::cpu {
namespace {

constexpr const char* kOp = "unpack_codes";

template <int Bits>
void unpack_groups(const uint8_t* packed, int64_t numel, int64_t first, int64_t last, uint8_t* codes) {
  const int64_t whole = std::min(last, numel / 8);
  for (int64_t group = first; group < whole; ++group) {
    math::store_bytes(math::unpack_eight<Bits>(math::load_bytes(packed + group * Bits, Bits)), 8, codes + group * 8);
  }
  if (whole < last) {
    const int rest = codes_in_group(whole, numel);
    const uint64_t word = math::load_bytes(packed + whole * Bits, (rest * Bits + 7) / 8);
    math::store_bytes(math::unpack_eight<Bits>(word), rest, codes + whole * 8);
  }
}

}  // namespace

void unpack_codes(int threads, View packed, int64_t bits, const std::vector<int64_t>& shape, View codes) {
  for_bits(kOp, bits, [&](auto constant) {
    constexpr int Bits = decltype(constant)::value;
    QK_CHECK(codes.sizes == shape, text(kOp, ": codes must have shape ", shape_of(shape)), shape_of(codes.sizes));
    const int64_t numel = codes.numel();
    QK_CHECK(packed.numel() == packed_bytes(numel, Bits),
             text(kOp, ": packed must have ", packed_bytes(numel, Bits), " bytes for shape ", shape_of(shape), " at ",
                  Bits, " bits"),
             std::to_string(packed.numel()));
    for_each_group(threads, numel, [&](int64_t first, int64_t last) {
      unpack_groups<Bits>(packed.as<uint8_t>(), numel, first, last, codes.as<uint8_t>());
    });
  });
}

}  // namespace qk::cpu
