#include "packed_exercises.h"

#include "arguments.h"
#include "kernels.h"

namespace driver::of_packed {

namespace cpu = qk::cpu;

namespace {

// A packed weight [groups, length] of exactly its bytes, at the least bits and at all eight.
struct Packed {
  int bits;
  Tensor stream;

  Packed(const Arguments& a, int bits_) : bits(bits_), stream(Dtype::uint8, {cpu::packed_bytes(numel(a), bits_)}) {
    cpu::pack_codes(1, a.codes, bits, stream);
  }

  static int64_t numel(const Arguments& a) { return a.codes.view().numel(); }
};

std::vector<int> widths(const Setting& s) {
  return bits_of(s) == 8 ? std::vector<int>{8} : std::vector<int>{bits_of(s), bits_of(s) + 1, 8};
}

// A code past the last center, where there is room for one, in element `at`: refused.
void refused_with_a_wrong_code(const Setting& s, const Arguments& a, int bits, int64_t at,
                               const std::vector<Tensor>& written, const std::function<Call(const Packed&)>& call) {
  if (Packed::numel(a) == 0 || s.levels >= 1 << bits) {
    return;
  }
  const uint8_t kept = a.codes.view().as<uint8_t>()[at];
  a.codes.view().as<uint8_t>()[at] = static_cast<uint8_t>(s.levels);
  const Packed wrong(a, bits);
  a.codes.view().as<uint8_t>()[at] = kept;
  refused(s, written, call(wrong));
}

// Rows of the table [V, D]: the first, the last, some many times.
Tensor some_rows(int64_t count, int64_t rows, Random& random) {
  Tensor indices(Dtype::int64, {count});
  for (int64_t i = 0; i < count; ++i) {
    const int64_t any = static_cast<int64_t>(random() % static_cast<unsigned>(rows));
    indices.view().as<int64_t>()[i] = i == 0 ? rows - 1 : i % 3 == 0 ? 0 : any;
  }
  return indices;
}

constexpr int64_t kTokens = 9;

// The same weight as tables of several widths: a row of centers owns one row of the table, several, or parts of them.
std::vector<Sizes> tables(const Setting& s) {
  std::vector<Sizes> found;
  if (s.groups > 0) {
    found.push_back({s.groups, s.length});
  }
  const int64_t numel = s.groups * s.length;
  for (int64_t width : {int64_t{1}, int64_t{5}, s.length * 2}) {
    if (width > 0 && numel > 0 && numel % width == 0) {
      found.push_back({numel / width, width});
    }
  }
  return found;
}

}  // namespace

void dequantize_packed(const Setting& s) {
  const Arguments a(s);
  const Sizes shape = a.codes.view().sizes;
  Tensor narrow(s.dtype, a.centers.view().sizes);
  for (int64_t i = 0; i < narrow.view().numel(); ++i) {
    narrow.set(i, a.centers.view().as<float>()[i]);
  }
  for (int bits : widths(s)) {
    const auto call = [&](const Packed& packed) -> Call {
      return [&](int threads, Outputs& out) {
        cpu::dequantize_packed(threads, packed.stream, narrow, packed.bits, shape, out[0]);
      };
    };
    const Packed packed(a, bits);
    same_for_all_threads(s, {like(a.x)}, call(packed));
    refused_with_a_wrong_code(s, a, bits, Packed::numel(a) - 1, {like(a.x)}, call);
  }
}

void dequantize_packed_backward(const Setting& s) {
  const Arguments a(s);
  const Sizes shape = a.codes.view().sizes;
  for (int bits : widths(s)) {
    const auto call = [&](const Packed& packed) -> Call {
      return [&](int threads, Outputs& out) {
        cpu::dequantize_packed_backward(threads, a.grad, packed.stream, a.centers, packed.bits, shape, out[0]);
      };
    };
    const Packed packed(a, bits);
    same_for_all_threads(s, {like(a.centers)}, call(packed));
    refused_with_a_wrong_code(s, a, bits, Packed::numel(a) / 2, {like(a.centers)}, call);
  }
}

void packed_embedding(const Setting& s) {
  Arguments a(s);
  for (int bits : widths(s)) {
    for (const Sizes& shape : tables(s)) {
      const Tensor indices = some_rows(kTokens, shape[0], a.random);
      const auto call = [&](const Packed& packed) -> Call {
        return [&](int threads, Outputs& out) {
          cpu::packed_embedding(threads, indices, packed.stream, a.centers, packed.bits, shape, out[0]);
        };
      };
      const Packed packed(a, bits);
      const std::vector<Tensor> written = {Tensor(Dtype::float32, {kTokens, shape[1]})};
      same_for_all_threads(s, written, call(packed));
      refused_with_a_wrong_code(s, a, bits, Packed::numel(a) - 1, written, call);  // the last row is looked up
      indices.view().as<int64_t>()[kTokens - 1] = shape[0];
      refused(s, written, call(packed));
    }
  }
}

void packed_embedding_backward(const Setting& s) {
  Arguments a(s);
  for (int bits : widths(s)) {
    for (const Sizes& shape : tables(s)) {
      const Tensor indices = some_rows(kTokens, shape[0], a.random);
      const Tensor grad = normal(s.dtype, {kTokens, shape[1]}, 1.0f, s.hostile, a.random);
      const auto call = [&](const Packed& packed) -> Call {
        return [&](int threads, Outputs& out) {
          cpu::packed_embedding_backward(threads, grad, indices, packed.stream, a.centers, packed.bits, shape, out[0]);
        };
      };
      const Packed packed(a, bits);
      same_for_all_threads(s, {like(a.centers)}, call(packed));
      refused_with_a_wrong_code(s, a, bits, Packed::numel(a) - 1, {like(a.centers)}, call);
      indices.view().as<int64_t>()[kTokens - 1] = -1;
      refused(s, {like(a.centers)}, call(packed));
    }
  }
}

}  // namespace driver::of_packed
