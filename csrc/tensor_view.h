// TensorView: the only thing that crosses from Python. The caller owns the memory, which is contiguous.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

namespace qk {

// The codes are shared with qupedkern/backends/cpp.py.
enum class Dtype : int { float32 = 0, bfloat16 = 1, float16 = 2, uint8 = 3, int64 = 4 };
constexpr int kDtypes = 5;

inline const char* name_of(Dtype dtype) {
  constexpr const char* names[kDtypes] = {"float32", "bfloat16", "float16", "uint8", "int64"};
  return names[static_cast<int>(dtype)];
}

// Storage of the half types; arithmetic is always float32.
struct bfloat16 {
  uint16_t bits;
};
struct float16 {
  uint16_t bits;
};

struct TensorView {
  void* data = nullptr;
  std::vector<int64_t> sizes;
  Dtype dtype = Dtype::float32;

  int64_t dim() const { return static_cast<int64_t>(sizes.size()); }

  int64_t numel() const {
    int64_t product = 1;
    for (int64_t size : sizes) {
      product *= size;
    }
    return product;
  }

  template <class T>
  T* as() const {
    return static_cast<T*>(data);
  }
};

inline std::string shape_of(const std::vector<int64_t>& sizes) {
  std::string shape = "(";
  for (size_t i = 0; i < sizes.size(); ++i) {
    shape += (i ? ", " : "") + std::to_string(sizes[i]);
  }
  return shape + (sizes.size() == 1 ? ",)" : ")");
}

// Calls f with a value of the C++ type that holds the elements of a float32, bfloat16 or float16 tensor.
template <class F>
void for_float_type(Dtype dtype, F&& f) {
  if (dtype == Dtype::bfloat16) {
    f(bfloat16{});
  } else if (dtype == Dtype::float16) {
    f(float16{});
  } else {
    f(float{});
  }
}

}  // namespace qk
