// What DLPack's C exchange (https://dmlc.github.io/dlpack, version 1) says of a tensor, and the TensorView it becomes.
//
// Only what is read here is declared, in the layout of the standard: types that share an array library's tensors carry
// a table of functions, of which view_of_object fills a DLTensor from a Python object without taking a reference.
#pragma once

#include <cstdint>
#include <string>

#include "check.h"
#include "tensor_view.h"

namespace qk::dlpack {

constexpr uint32_t kMajorVersion = 1;  // another one may have another layout
constexpr int32_t kCpu = 1;

struct Device {
  int32_t type;
  int32_t index;
};

struct DataType {
  uint8_t code;
  uint8_t bits;
  uint16_t lanes;
};

struct Tensor {
  void* data;
  Device device;
  int32_t dim;
  DataType dtype;
  const int64_t* sizes;
  const int64_t* strides;  // in elements; null for a contiguous tensor
  uint64_t byte_offset;
};

struct ExchangeApi {
  uint32_t major_version;
  uint32_t minor_version;
  const ExchangeApi* previous;  // for an older major version
  void (*allocate)();           // these three are not called here
  void (*owning_tensor_of_object)();
  void (*object_of_tensor)();
  int (*view_of_object)(void* object, Tensor* out);  // 0, or -1 with a Python exception set; may be null
};

// Of another dtype than the five there are kernels for: fails.
inline Dtype dtype_of(const DataType& type) {
  constexpr DataType kTypes[kDtypes] = {{2, 32, 1}, {4, 16, 1}, {2, 16, 1}, {1, 8, 1}, {0, 64, 1}};
  for (int i = 0; i < kDtypes; ++i) {
    if (type.code == kTypes[i].code && type.bits == kTypes[i].bits && type.lanes == kTypes[i].lanes) {
      return static_cast<Dtype>(i);
    }
  }
  fail("native kernels need float32, bfloat16, float16, uint8 or int64 tensors",
       text("DLPack type ", type.code, " of ", type.bits, " bits"));
}

inline bool is_contiguous(const Tensor& tensor) {
  int64_t step = 1;
  bool contiguous = true;
  for (int32_t i = tensor.dim - 1; tensor.strides != nullptr && i >= 0; --i) {
    if (tensor.sizes[i] == 0) {
      return true;
    }
    contiguous = contiguous && (tensor.sizes[i] == 1 || tensor.strides[i] == step);
    step *= tensor.sizes[i];
  }
  return contiguous;
}

// Contiguous and on the CPU, or it fails. The view lives as long as the object it is of.
inline TensorView view_of(const Tensor& tensor) {
  QK_CHECK(tensor.device.type == kCpu, "native kernels need tensors on the CPU",
           text("DLPack device ", tensor.device.type));
  TensorView view;
  view.dtype = dtype_of(tensor.dtype);
  view.sizes.assign(tensor.sizes, tensor.sizes + tensor.dim);
  QK_CHECK(
      is_contiguous(tensor), "native kernels need contiguous tensors",
      text("strides ", shape_of({tensor.strides, tensor.strides + tensor.dim}), " for shape ", shape_of(view.sizes)));
  QK_CHECK(tensor.data != nullptr || view.numel() == 0, "native kernels need tensors with storage",
           text("none for shape ", shape_of(view.sizes)));
  view.data = static_cast<char*>(tensor.data) + tensor.byte_offset;
  return view;
}

}  // namespace qk::dlpack
