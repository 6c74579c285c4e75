// The CUDA kernels as a Python module (../module.h); the context of a call is (device index, stream handle).

#include <string>

#include "../module.h"
#include "kernels.h"

#if defined(QK_CUDA_EMULATED)
#include "run.h"
#endif

namespace pybind11::detail {

template <>
struct type_caster<qk::cuda::Stream> {
  PYBIND11_TYPE_CASTER(qk::cuda::Stream, const_name("tuple[int, int]"));

  bool load(handle source, bool /*convert*/) {
    if (!PyTuple_Check(source.ptr()) || PyTuple_GET_SIZE(source.ptr()) != 2) {
      return false;
    }
    value.device = static_cast<int>(PyLong_AsLong(PyTuple_GET_ITEM(source.ptr(), 0)));
    value.handle = static_cast<cudaStream_t>(PyLong_AsVoidPtr(PyTuple_GET_ITEM(source.ptr(), 1)));
    if (PyErr_Occurred()) {
      PyErr_Clear();
      return false;
    }
    return true;
  }
};

}  // namespace pybind11::detail

namespace {

template <>
struct Entered<qk::cuda::Stream> : qk::cuda::OnDevice {
  explicit Entered(const qk::cuda::Stream& stream) : OnDevice(stream.device) {}
};

// Defines module.<op>_workspace(*arguments in schema order), the bytes of scratch memory that the kernel wants.
template <class... Args>
void workspace(py::module_& module, const char* op, int64_t (*bytes)(Args...)) {
  module.def(qk::text(op, "_workspace").c_str(), bytes);
}

// Empty where a GPU can be used; does not start it.
std::string driver_problem() {
#if defined(QK_CUDA_EMULATED)
  return "";
#else
  int count = 0;
  const cudaError_t status = cudaGetDeviceCount(&count);
  return status == cudaSuccess ? "" : cudaGetErrorString(status);
#endif
}

}  // namespace

PYBIND11_MODULE(QK_MODULE, module, py::mod_gil_not_used()) {
  namespace cuda = qk::cuda;
  const Dtypes any = {qk::Dtype::float32, qk::Dtype::bfloat16, qk::Dtype::float16};
  const Dtypes f32 = {qk::Dtype::float32};
  const Dtypes i64 = {qk::Dtype::int64};
  const Dtypes u8 = {qk::Dtype::uint8};

  module.doc() = "qupedkern's CUDA kernels; called by qupedkern.backends.cuda.";
  module.attr("KERNELS") = py::dict();
  module.def("driver_problem", &driver_problem, "Why the CUDA runtime finds no GPU; empty where it finds one.");
#if defined(QK_CUDA_EMULATED)
  module.def("set_order", &qk::emulator::set_order,
             "forward, backward or shuffled with a seed: which threads go first.");
  module.def(
      "special_functions", [] { return qk::emulator::special_functions; },
      "How many exponentials, reciprocals and roots kernels have asked for so far.");
#endif

  kernel(module, "dequantize_packed", &cuda::dequantize_packed, {{"packed", u8}, {"centers", any}, {"out", any}});
  kernel(module, "lut_linear", &cuda::lut_linear,
         {{"x", any}, {"packed", u8}, {"centers", f32}, {"bias", f32}, {"out", any}, {"workspace", u8}});
  workspace(module, "lut_linear", &cuda::lut_linear_workspace);
  kernel(module, "quped_step", &cuda::quped_step,
         {{"x", f32},
          {"grad", f32},
          {"quantized_grad", f32},
          {"first", f32},
          {"second", f32},
          {"centers", f32},
          {"sharpness", f32},
          {"strength", f32},
          {"center_grad", f32},
          {"counts", i64},
          {"sums", f32},
          {"distance", f32},
          {"codes", u8},
          {"workspace", u8}});
  workspace(module, "quped_step", &cuda::quped_step_workspace);
  kernel(module, "soft_quantize", &cuda::soft_quantize,
         {{"x", any}, {"centers", f32}, {"sharpness", f32}, {"out", any}});
  kernel(module, "soft_quantize_backward", &cuda::soft_quantize_backward,
         {{"grad", any},
          {"x", any},
          {"centers", f32},
          {"sharpness", f32},
          {"grad_x", any},
          {"grad_centers", f32},
          {"workspace", u8}});
  workspace(module, "soft_quantize_backward", &cuda::soft_quantize_backward_workspace);
}
