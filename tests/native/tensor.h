// Tensors that own exactly the bytes they show, so that a sanitizer sees an access one element past either end; random
// and hostile contents.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <memory>
#include <random>
#include <vector>

#include "cpu/half.h"
#include "tensor_view.h"

namespace driver {

using qk::Dtype;
using Sizes = std::vector<int64_t>;

inline size_t bytes_of(Dtype dtype) {
  switch (dtype) {
    case Dtype::int64:
      return 8;
    case Dtype::float32:
      return 4;
    case Dtype::bfloat16:
    case Dtype::float16:
      return 2;
    default:
      return 1;
  }
}

class Tensor {
 public:
  // One element past the allocator's alignment, as a slice of a larger tensor may be.
  Tensor(Dtype dtype, Sizes sizes) : view_{nullptr, std::move(sizes), dtype} {
    const size_t skip = bytes_of(dtype);
    memory_.reset(static_cast<uint8_t*>(std::malloc(skip + size())), std::free);
    view_.data = memory_.get() + skip;
    std::memset(view_.data, 0xA5, size());
  }

  size_t size() const { return static_cast<size_t>(view_.numel()) * bytes_of(view_.dtype); }
  const qk::TensorView& view() const { return view_; }
  operator const qk::TensorView&() const { return view_; }

  Tensor copy() const {
    Tensor other(view_.dtype, view_.sizes);
    std::memcpy(other.view_.data, view_.data, size());
    return other;
  }

  bool same_bytes(const Tensor& other) const { return std::memcmp(view_.data, other.view_.data, size()) == 0; }

  void set(int64_t i, float value) {
    float eight[8] = {value};
    if (view_.dtype == Dtype::float32) {
      view_.as<float>()[i] = value;
    } else if (view_.dtype == Dtype::bfloat16) {
      qk::bfloat16 narrow[8];
      qk::cpu::from_float<8>(eight, narrow);
      view_.as<qk::bfloat16>()[i] = narrow[0];
    } else {
      qk::float16 narrow[8];
      qk::cpu::from_float<8>(eight, narrow);
      view_.as<qk::float16>()[i] = narrow[0];
    }
  }

 private:
  std::shared_ptr<uint8_t> memory_;
  qk::TensorView view_;
};

using Random = std::mt19937;

inline Tensor normal(Dtype dtype, Sizes sizes, float scale, bool hostile, Random& random) {
  constexpr float kInfinity = std::numeric_limits<float>::infinity();
  const float specials[] = {0.0f, -0.0f, kInfinity, -kInfinity, std::nanf(""), 1e-40f, -3e38f, 3e38f, 1.0f};
  std::normal_distribution<float> values(0.0f, scale);
  Tensor tensor(dtype, std::move(sizes));
  for (int64_t i = 0; i < tensor.view().numel(); ++i) {
    const float value = values(random);
    tensor.set(i, hostile && random() % 8 == 0 ? specials[random() % std::size(specials)] : value);
  }
  return tensor;
}

inline Tensor uniform(Sizes sizes, float low, float high, Random& random) {
  std::uniform_real_distribution<float> values(low, high);
  Tensor tensor(Dtype::float32, std::move(sizes));
  for (int64_t i = 0; i < tensor.view().numel(); ++i) {
    tensor.set(i, values(random));
  }
  return tensor;
}

inline Tensor below(int count, Sizes sizes, Random& random) {
  Tensor tensor(Dtype::uint8, std::move(sizes));
  for (size_t i = 0; i < tensor.size(); ++i) {
    tensor.view().as<uint8_t>()[i] = static_cast<uint8_t>(random() % static_cast<unsigned>(count));
  }
  return tensor;
}

}  // namespace driver
