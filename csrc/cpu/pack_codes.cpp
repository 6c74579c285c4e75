// pack_codes: eight codes make `bits` whole bytes, so groups of eight are independent.

#include "../math/pack_codes.h"

#include "../kernels.h"
#include "bit_stream.h"
#include "code_check.h"

namespace qk::cpu {
namespace {

constexpr const char* kOp = "pack_codes";

template <int Bits>
void pack_groups(const uint8_t* codes, int64_t numel, int64_t first, int64_t last, uint8_t* packed) {
  const int64_t whole = std::min(last, numel / 8);
  for (int64_t group = first; group < whole; ++group) {
    math::store_bytes(math::pack_eight<Bits>(math::load_bytes(codes + group * 8, 8)), Bits, packed + group * Bits);
  }
  if (whole < last) {
    const int rest = codes_in_group(whole, numel);
    const uint64_t word = math::pack_eight<Bits>(math::load_bytes(codes + whole * 8, rest));
    math::store_bytes(word, (rest * Bits + 7) / 8, packed + whole * Bits);
  }
}

}  // namespace

void pack_codes(int threads, View codes, int64_t bits, View packed) {
  for_bits(kOp, bits, [&](auto constant) {
    constexpr int Bits = decltype(constant)::value;
    const int64_t numel = codes.numel();
    QK_CHECK(packed.numel() == packed_bytes(numel, Bits),
             text(kOp, ": packed must have ", packed_bytes(numel, Bits), " bytes"), std::to_string(packed.numel()));
    HighestCode highest;
    for_each_group(threads, numel, [&](int64_t first, int64_t last) {
      const int seen = highest_of(codes.as<uint8_t>() + first * 8, std::min(last * 8, numel) - first * 8);
      highest.see(seen);
      if (seen < (1 << Bits)) {
        pack_groups<Bits>(codes.as<uint8_t>(), numel, first, last, packed.as<uint8_t>());
      }
    });
    QK_CHECK(highest.value() < (1 << Bits), text(kOp, ": codes must be below 2**", Bits, " = ", 1 << Bits),
             std::to_string(highest.value()));
  });
}

}  // namespace qk::cpu
