// What the modules of native kernels share: a tensor -> TensorView, a list of these -> std::vector, None ->
// std::nullopt; and the line of a kernel, with the dtypes it takes. Only bindings.cpp files include this.
//
// A tensor is (data_ptr, sizes, dtype code) or, where read_tensors has been given its type, itself.
// module.<op>(context, *arguments in schema order, *outputs) runs without the GIL. module.KERNELS maps each op to its
// tensor arguments, outputs last, as (name, dtype codes); the backend makes its refusals from that.
#pragma once

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
#include "dlpack.h"
#include "tensor_view.h"

namespace py = pybind11;

namespace {

// The type whose objects are read by DLPack's C exchange, and how; null until read_tensors.
PyTypeObject* tensor_type = nullptr;
int (*view_of_object)(void*, qk::dlpack::Tensor*) = nullptr;

// Lets kernels take CPU tensors of this type as they are, which costs a fifth of describing each in a tuple. False
// where the type has no such exchange (torch before 2.10).
[[maybe_unused]] bool read_tensors(const py::type& type) {
  const py::object capsule = py::getattr(type, "__dlpack_c_exchange_api__", py::none());
  if (!PyCapsule_CheckExact(capsule.ptr())) {
    return false;
  }
  const auto* api =
      static_cast<const qk::dlpack::ExchangeApi*>(PyCapsule_GetPointer(capsule.ptr(), "dlpack_exchange_api"));
  if (api == nullptr) {
    throw py::error_already_set();
  }
  while (api != nullptr && api->major_version != qk::dlpack::kMajorVersion) {
    api = api->previous;
  }
  if (api == nullptr || api->view_of_object == nullptr) {
    return false;
  }
  view_of_object = api->view_of_object;
  tensor_type = reinterpret_cast<PyTypeObject*>(py::type(type).release().ptr());  // kept for ever
  return true;
}

}  // namespace

namespace pybind11::detail {

template <>
struct type_caster<qk::TensorView> {
  PYBIND11_TYPE_CASTER(qk::TensorView, const_name("Tensor | tuple[int, tuple[int, ...], int]"));

  bool load(handle source, bool /*convert*/) {
    if (tensor_type != nullptr && PyObject_TypeCheck(source.ptr(), tensor_type)) {
      qk::dlpack::Tensor tensor;
      if (view_of_object(source.ptr(), &tensor) != 0) {
        PyErr_Clear();
        qk::fail("native kernels need dense tensors of a plain type", "one that DLPack cannot describe");
      }
      value = qk::dlpack::view_of(tensor);  // throws, for pybind11's own sentence would print the tensors
      return true;
    }
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

[[maybe_unused]] void check_argument(const char* op, std::vector<Argument>::const_iterator& argument,
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

// What a kernel runs in: a number of threads on the CPU, a stream on a GPU. Entered is a scope in which it does.
template <class Context>
struct Entered {
  explicit Entered(const Context&) {}
};

// Defines module.<op> and lists it in module.KERNELS. `tensors`: its tensor arguments in order, a list or one that may
// be left out counting as one.
template <class Context, class... Args>
void kernel(py::module_& module, const char* op, void (*run)(Context, Args...), std::vector<Argument> tensors) {
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
  module.def(op, [op, run, tensors = std::move(tensors)](Context context, Args... args) {
    auto argument = tensors.cbegin();
    (check_argument(op, argument, args), ...);
    without_gil([&] {
      const Entered<Context> entered(context);
      run(context, args...);
    });
  });
}

}  // namespace
