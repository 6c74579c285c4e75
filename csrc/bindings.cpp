// The only file that knows Python: (data_ptr, sizes, dtype code) -> TensorView, a list of these -> std::vector, None ->
// std::nullopt; one line per kernel with the dtypes it takes.
//
// module.<op>(threads, *arguments in schema order, *outputs) runs without the GIL. module.KERNELS maps each op to its
// tensor arguments, outputs last, as (name, dtype codes); the backend makes its refusals from that.

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <exception>
#include <optional>
#include <stdexcept>
#include <string>
#include <type_traits>
#include <utility>
#include <vector>

#include "check.h"
#include "cpu/instruction_sets.h"
#include "cpu/lut_regimes.h"
#include "kernels.h"
#include "tensor_view.h"

namespace py = pybind11;

namespace pybind11::detail {

template <>
struct type_caster<qk::TensorView> {
  PYBIND11_TYPE_CASTER(qk::TensorView, const_name("tuple[int, tuple[int, ...], int]"));

  bool load(handle source, bool /*convert*/) {
    if (!PyTuple_Check(source.ptr()) || PyTuple_GET_SIZE(source.ptr()) != 3) {
      return false;
    }
    PyObject* sizes = PyTuple_GET_ITEM(source.ptr(), 1);
    if (!PyTuple_Check(sizes)) {
      return false;
    }
    value.data = PyLong_AsVoidPtr(PyTuple_GET_ITEM(source.ptr(), 0));
    const Py_ssize_t dim = PyTuple_GET_SIZE(sizes);
    value.sizes.resize(static_cast<size_t>(dim));
    for (Py_ssize_t i = 0; i < dim; ++i) {
      value.sizes[static_cast<size_t>(i)] = PyLong_AsLongLong(PyTuple_GET_ITEM(sizes, i));
    }
    const long code = PyLong_AsLong(PyTuple_GET_ITEM(source.ptr(), 2));
    if (PyErr_Occurred()) {
      PyErr_Clear();
      return false;
    }
    value.dtype = static_cast<qk::Dtype>(code);
    return code >= 0 && code < qk::kDtypes;
  }
};

}  // namespace pybind11::detail

namespace {

using Dtypes = std::vector<qk::Dtype>;

struct Argument {
  const char* name;
  Dtypes dtypes;
};

void check_dtype(const char* op, const Argument& argument, const qk::TensorView& tensor) {
  std::string needed;
  for (qk::Dtype dtype : argument.dtypes) {
    if (dtype == tensor.dtype) {
      return;
    }
    needed += (needed.empty() ? "" : " or ") + std::string(qk::name_of(dtype));
  }
  qk::fail(qk::text(op, ": ", argument.name, " must be ", needed), qk::name_of(tensor.dtype));
}

template <class T>
void check_argument(const char*, std::vector<Argument>::const_iterator&, const T&) {}

void check_argument(const char* op, std::vector<Argument>::const_iterator& argument, const qk::TensorView& tensor) {
  check_dtype(op, *argument++, tensor);
}

[[maybe_unused]] void check_argument(const char* op, std::vector<Argument>::const_iterator& argument,
                                     const std::optional<qk::TensorView>& tensor) {
  const Argument& stated = *argument++;
  if (tensor) {
    check_dtype(op, stated, *tensor);
  }
}

void check_argument(const char* op, std::vector<Argument>::const_iterator& argument,
                    const std::vector<qk::TensorView>& tensors) {
  const Argument& stated = *argument++;
  for (const qk::TensorView& tensor : tensors) {
    check_dtype(op, stated, tensor);
  }
}

template <class T>
constexpr bool is_tensor_argument =
    std::is_same_v<T, const qk::TensorView&> || std::is_same_v<T, const std::optional<qk::TensorView>&> ||
    std::is_same_v<T, const std::vector<qk::TensorView>&>;

// Not py::gil_scoped_release: at interpreter exit CPython ends a thread inside PyEval_RestoreThread by unwinding it,
// which must not happen in a destructor.
template <class Body>
void without_gil(Body&& body) {
  std::exception_ptr error;
  PyThreadState* state = PyEval_SaveThread();
  try {
    body();
  } catch (...) {
    error = std::current_exception();
  }
  PyEval_RestoreThread(state);
  if (error) {
    std::rethrow_exception(error);
  }
}

// Defines module.<op> and lists it in module.KERNELS. `tensors`: its tensor arguments in order, a list or one that may
// be left out counting as one.
template <class... Args>
void kernel(py::module_& module, const char* op, void (*run)(int, Args...), std::vector<Argument> tensors) {
  constexpr size_t expected = (size_t{is_tensor_argument<Args>} + ...);
  if (tensors.size() != expected) {
    throw std::logic_error(
        qk::text(op, ": ", expected, " tensor arguments, but dtypes are stated for ", tensors.size()));
  }
  py::list listed;
  for (const Argument& argument : tensors) {
    py::list codes;
    for (qk::Dtype dtype : argument.dtypes) {
      codes.append(static_cast<int>(dtype));
    }
    listed.append(py::make_tuple(argument.name, py::tuple(codes)));
  }
  module.attr("KERNELS")[op] = py::tuple(listed);
  module.def(op, [op, run, tensors = std::move(tensors)](int threads, Args... args) {
    auto argument = tensors.cbegin();
    (check_argument(op, argument, args), ...);
    without_gil([&] { run(threads, args...); });
  });
}

}  // namespace

PYBIND11_MODULE(QK_MODULE, module, py::mod_gil_not_used()) {
  namespace cpu = qk::cpu;
  const Dtypes any = {qk::Dtype::float32, qk::Dtype::bfloat16, qk::Dtype::float16};
  const Dtypes f32 = {qk::Dtype::float32};
  const Dtypes u8 = {qk::Dtype::uint8};
  const Dtypes i64 = {qk::Dtype::int64};

  module.doc() = "qupedkern's CPU kernels for one instruction set; called by qupedkern.backends.cpp.";
  module.attr("KERNELS") = py::dict();
  module.def("supported_instruction_sets", &cpu::supported_instruction_sets,
             "Those this processor and system run, widest last.");

  module.def("set_batch_invariant", &cpu::set_batch_invariant,
             "Pin lut_linear to the one regime that sums alike for every batch.");

  kernel(module, "assign", &cpu::assign, {{"x", any}, {"centers", f32}, {"codes", u8}});
  kernel(module, "center_step", &cpu::center_step,
         {{"centers", f32}, {"center_grad", f32}, {"counts", i64}, {"sums", f32}, {"strength", f32}, {"rate", f32}});
  kernel(module, "dequantize", &cpu::dequantize, {{"codes", u8}, {"centers", f32}, {"out", f32}});
  kernel(module, "dequantize_backward", &cpu::dequantize_backward,
         {{"grad", any}, {"codes", u8}, {"centers", f32}, {"grad_centers", f32}});
  kernel(module, "dequantize_packed", &cpu::dequantize_packed, {{"packed", u8}, {"centers", any}, {"out", any}});
  kernel(module, "dequantize_packed_backward", &cpu::dequantize_packed_backward,
         {{"grad", any}, {"packed", u8}, {"centers", f32}, {"grad_centers", f32}});
  kernel(module, "distillation_loss", &cpu::distillation_loss,
         {{"student_logits", any}, {"teacher_logits", any}, {"loss", f32}, {"statistics", f32}});
  kernel(module, "distillation_loss_backward", &cpu::distillation_loss_backward,
         {{"grad", f32},
          {"student_logits", any},
          {"teacher_logits", any},
          {"statistics", f32},
          {"grad_student", any},
          {"grad_teacher", any}});
  kernel(module, "distance", &cpu::distance, {{"x", any}, {"centers", f32}, {"out", f32}});
  kernel(module, "distance_backward", &cpu::distance_backward,
         {{"grad", f32}, {"x", any}, {"centers", f32}, {"grad_x", any}, {"grad_centers", f32}});
  kernel(module, "foreach_soft_quantize", &cpu::foreach_soft_quantize,
         {{"x", any}, {"centers", f32}, {"sharpness", f32}, {"out", any}});
  kernel(module, "foreach_soft_quantize_backward", &cpu::foreach_soft_quantize_backward,
         {{"grad", any}, {"x", any}, {"centers", f32}, {"sharpness", f32}, {"grad_x", any}, {"grad_centers", f32}});
  kernel(module, "hard_quantize", &cpu::hard_quantize, {{"x", any}, {"centers", f32}, {"out", any}});
  kernel(module, "hard_quantize_backward", &cpu::hard_quantize_backward,
         {{"grad", any}, {"x", any}, {"centers", f32}, {"grad_x", any}, {"grad_centers", f32}});
  kernel(module, "init_centers", &cpu::init_centers, {{"x", any}, {"weights", any}, {"centers", f32}});
  kernel(module, "lut_linear", &cpu::lut_linear,
         {{"x", any}, {"packed", u8}, {"centers", f32}, {"bias", f32}, {"out", any}});
  kernel(module, "pack_codes", &cpu::pack_codes, {{"codes", u8}, {"packed", u8}});
  kernel(module, "packed_embedding", &cpu::packed_embedding,
         {{"indices", i64}, {"packed", u8}, {"centers", any}, {"out", any}});
  kernel(module, "packed_embedding_backward", &cpu::packed_embedding_backward,
         {{"grad", any}, {"indices", i64}, {"packed", u8}, {"centers", f32}, {"grad_centers", f32}});
  kernel(module, "prox_centers", &cpu::prox_centers,
         {{"centers", f32}, {"x", any}, {"strength", f32}, {"at", f32}, {"out", f32}});
  kernel(module, "prox_weights", &cpu::prox_weights, {{"x", any}, {"centers", f32}, {"strength", f32}, {"out", any}});
  kernel(module, "quped_step", &cpu::quped_step,
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
          {"codes", u8}});
  kernel(module, "soft_quantize", &cpu::soft_quantize,
         {{"x", any}, {"centers", f32}, {"sharpness", f32}, {"out", any}});
  kernel(module, "soft_quantize_backward", &cpu::soft_quantize_backward,
         {{"grad", any}, {"x", any}, {"centers", f32}, {"sharpness", f32}, {"grad_x", any}, {"grad_centers", f32}});
  kernel(module, "unpack_codes", &cpu::unpack_codes, {{"packed", u8}, {"codes", u8}});
}
