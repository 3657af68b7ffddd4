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

}  // namespace

TensorReference reference_of(const py::tuple& tuple, const char* name) {
  if (tuple.size() != 4) {
    throw ValueError(std::string(name) + " is a tuple of " + std::to_string(tuple.size()) +
                     "; (address, dtype, shape, strides) is needed");
  }
  return {reinterpret_cast<void*>(tuple[0].cast<std::uintptr_t>()), type_of(tuple[1]),
          numbers<4>(tuple[2], name), numbers<4>(tuple[3], name)};
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
