#include <pybind11/gil_safe_call_once.h>

#include "bindings.hpp"

namespace tqai::python {
namespace {

DType dtype_of(ElementType type, const char* name) {
  switch (type) {
    case ElementType::float32: return DType::f32;
    case ElementType::float16: return DType::f16;
    case ElementType::bfloat16: return DType::bf16;
    default: throw ValueError(std::string(name) + " are bool; float32, float16 or bfloat16 needed");
  }
}

// Like pybind11's cast, which takes longer for a tuple's items than a token's numbers do to be
// copied.
std::int64_t integer(PyObject* object) {
  const long long value = PyLong_AsLongLong(object);
  if (value == -1 && PyErr_Occurred() != nullptr) throw py::error_already_set();
  return value;
}

template <std::size_t kCount>
std::array<std::int64_t, kCount> numbers(const py::handle& object, const char* name) {
  const bool is_sequence = PySequence_Check(object.ptr()) != 0;
  if (!is_sequence || py::len(object) != kCount) {
    throw ValueError(std::string(name) + " has " +
                     (is_sequence ? std::to_string(py::len(object)) : std::string("no")) +
                     " dimensions; " + std::to_string(kCount) + " are needed");
  }
  std::array<std::int64_t, kCount> values{};
  for (std::size_t i = 0; i < kCount; ++i) {
    const auto place = static_cast<Py_ssize_t>(i);
    values[i] = PyTuple_Check(object.ptr())
                    ? integer(PyTuple_GET_ITEM(object.ptr(), place))
                    : integer(py::object(py::reinterpret_borrow<py::sequence>(object)[i]).ptr());
  }
  return values;
}

// A cast asks the enumeration for the member's value, in Python.
ElementType type_of(const py::handle& member) {
  PYBIND11_CONSTINIT static py::gil_safe_call_once_and_store<std::array<py::object, 4>> storage;
  const auto& members = storage
                            .call_once_and_store_result([] {
                              return std::array<py::object, 4>{
                                  py::cast(ElementType::float32), py::cast(ElementType::float16),
                                  py::cast(ElementType::bfloat16), py::cast(ElementType::boolean)};
                            })
                            .get_stored();
  for (std::size_t i = 0; i < members.size(); ++i) {
    if (members[i].is(member)) return static_cast<ElementType>(i);
  }
  return member.cast<ElementType>();  // throws
}

// An array's memory while it is looked at.
class BorrowedBuffer {
 public:
  explicit BorrowedBuffer(const py::handle& array) {
    if (PyObject_GetBuffer(array.ptr(), &view_, PyBUF_RECORDS_RO) != 0)
      throw py::error_already_set();
  }
  BorrowedBuffer(const BorrowedBuffer&) = delete;
  BorrowedBuffer& operator=(const BorrowedBuffer&) = delete;
  ~BorrowedBuffer() { PyBuffer_Release(&view_); }

  const Py_buffer* operator->() const { return &view_; }

 private:
  Py_buffer view_{};
};

// As struct writes them, and as mlx writes what struct has no letter for.
ElementType type_of_format(const std::string& format) {
  if (format == "f") return ElementType::float32;
  if (format == "e") return ElementType::float16;
  if (format == "?") return ElementType::boolean;
  if (format == "bfloat16") return ElementType::bfloat16;
  throw ValueError("an array of \"" + format + "\"; bool, float32, float16 or bfloat16 needed");
}

py::ssize_t bytes_of(ElementType type) {
  return type == ElementType::boolean ? 1 : type == ElementType::float32 ? 4 : 2;
}

}  // namespace

TensorReference reference_of(const py::tuple& tuple, const char* name) {
  if (tuple.size() != 4 && tuple.size() != 5) {
    throw ValueError(std::string(name) + " is a tuple of " + std::to_string(tuple.size()) +
                     "; (address, dtype, shape, strides) is needed");
  }
  return {reinterpret_cast<void*>(tuple[0].cast<std::uintptr_t>()), type_of(tuple[1]),
          numbers<4>(tuple[2], name), numbers<4>(tuple[3], name),
          tuple.size() == 5 && tuple[4].cast<bool>()};
}

py::tuple borrowed(const py::object& array, const std::optional<ElementType>& dtype) {
  const BorrowedBuffer view(array);
  const ElementType type = dtype ? *dtype : type_of_format(view->format);
  if (view->itemsize != bytes_of(type)) {
    throw ValueError("an array with elements of " + std::to_string(view->itemsize) +
                     " bytes; the dtype has " + std::to_string(bytes_of(type)));
  }
  py::tuple shape(view->ndim), strides(view->ndim);
  for (int i = 0; i < view->ndim; ++i) {
    shape[i] = view->shape[i];
    strides[i] = view->strides[i] / view->itemsize;
  }
  const auto address = reinterpret_cast<std::uintptr_t>(view->buf);
  if (view->readonly != 0) return py::make_tuple(address, type, shape, strides, true);
  return py::make_tuple(address, type, shape, strides);
}

PositionTensor positions_of(const py::tuple& tuple) {
  if (tuple.size() != 3) {
    throw ValueError("positions are a tuple of " + std::to_string(tuple.size()) +
                     "; (address, shape, strides) is needed");
  }
  return {reinterpret_cast<const std::int64_t*>(tuple[0].cast<std::uintptr_t>()),
          numbers<3>(tuple[1], "positions"), numbers<3>(tuple[2], "positions")};
}

ConstTensor TensorReference::constant(const char* name) const {
  return {data, dtype_of(type, name), shape, strides};
}

Tensor TensorReference::writable(const char* name) const {
  if (read_only) {
    throw ValueError(std::string(name) + " is read-only; what is written to must be writable");
  }
  return {data, dtype_of(type, name), shape, strides};
}

Mask TensorReference::mask() const {
  Mask result;
  result.data = data;
  result.shape = shape;
  result.strides = strides;
  switch (type) {
    case ElementType::float32: result.kind = Mask::Kind::f32; break;
    case ElementType::float16: result.kind = Mask::Kind::f16; break;
    case ElementType::bfloat16: result.kind = Mask::Kind::bf16; break;
    case ElementType::boolean: result.kind = Mask::Kind::boolean; break;
  }
  return result;
}

CodeKind codes_from_name(const char* what, const std::string& name) {
  if (name == "scalar") return CodeKind::scalar;
  if (name == "trellis") return CodeKind::trellis;
  throw ValueError(std::string(what) + " = \"" + name + "\"; allowed: scalar, trellis");
}

const char* name_of(CodeKind kind) { return kind == CodeKind::scalar ? "scalar" : "trellis"; }

RotationKind rotation_from_name(const std::string& name) {
  if (name == "auto") return RotationKind::automatic;
  if (name == "hadamard") return RotationKind::hadamard;
  if (name == "haar") return RotationKind::haar;
  throw ValueError("rotation = \"" + name + "\"; allowed: auto, hadamard, haar");
}

const char* name_of(RotationKind kind) {
  switch (kind) {
    case RotationKind::hadamard: return "hadamard";
    case RotationKind::haar: return "haar";
    default: return "auto";
  }
}

}  // namespace tqai::python
