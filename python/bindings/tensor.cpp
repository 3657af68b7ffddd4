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

template <std::size_t kCount>
std::array<std::int64_t, kCount> numbers(const py::handle& object, const char* name) {
  const auto sequence = py::reinterpret_borrow<py::sequence>(object);
  if (!PySequence_Check(object.ptr()) || py::len(sequence) != kCount) {
    throw ValueError(
        std::string(name) + " has " +
        (PySequence_Check(object.ptr()) ? std::to_string(py::len(sequence)) : std::string("no")) +
        " dimensions; " + std::to_string(kCount) + " are needed");
  }
  std::array<std::int64_t, kCount> values{};
  for (std::size_t i = 0; i < kCount; ++i) values[i] = sequence[i].cast<std::int64_t>();
  return values;
}

}  // namespace

TensorReference reference_of(const py::tuple& tuple, const char* name) {
  if (tuple.size() != 4) {
    throw ValueError(std::string(name) + " is a tuple of " + std::to_string(tuple.size()) +
                     "; (address, dtype, shape, strides) is needed");
  }
  return {reinterpret_cast<void*>(tuple[0].cast<std::uintptr_t>()), tuple[1].cast<ElementType>(),
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
