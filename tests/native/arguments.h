// Arguments of the kernels for a setting, and outputs shaped like them.
#pragma once

#include "cpu/bit_stream.h"
#include "exercises.h"

namespace driver {

using Outputs = std::vector<Tensor>;

// What most kernels take, all from the setting's seed.
struct Arguments {
  Random random;
  Tensor x, grad, centers, sharpness, strength, codes;

  explicit Arguments(const Setting& s)
      : random(s.seed),
        x(normal(s.dtype, {s.groups, s.length}, 1.0f, s.hostile, random)),
        grad(normal(s.dtype, {s.groups, s.length}, 1.0f, s.hostile, random)),
        centers(normal(Dtype::float32, {s.groups, s.levels}, 1.0f, false, random)),
        sharpness(uniform({s.groups}, 0.5f, s.hostile ? 1e4f : 20.0f, random)),
        strength(uniform({1}, 0.0f, 0.2f, random)),
        codes(below(s.levels, {s.groups, s.length}, random)) {
    auto* first = centers.view().as<float>();
    for (int64_t row = 0; row < s.groups; ++row, first += s.levels) {
      if (s.hostile) {
        first[s.levels / 2] = first[0];  // equal centers
      }
      std::sort(first, first + s.levels);
    }
  }
};

inline int bits_of(const Setting& s) {
  int bits = 1;
  while ((1 << bits) < s.levels) {
    ++bits;
  }
  return bits;
}

inline Tensor like(const Tensor& tensor, Dtype dtype) { return Tensor(dtype, tensor.view().sizes); }
inline Tensor like(const Tensor& tensor) { return like(tensor, tensor.view().dtype); }

inline std::vector<qk::TensorView> views(const Outputs& out, size_t first, size_t count) {
  return {out.begin() + static_cast<std::ptrdiff_t>(first), out.begin() + static_cast<std::ptrdiff_t>(first + count)};
}

}  // namespace driver
