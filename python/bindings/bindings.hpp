// What the parts of the Python module share.
#pragma once

#include <pybind11/pybind11.h>

#include <array>
#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <tqai/cache.hpp>
#include <tqai/codebook.hpp>
#include <tqai/key_basis.hpp>
#include <tqai/trellis.hpp>
#include <tuple>
#include <variant>
#include <vector>

namespace tqai::python {

namespace py = pybind11;

/// Element types as Python sees them; bool for masks alone.
enum class ElementType : std::uint8_t { float32, float16, bfloat16, boolean };

/// A tensor as Python hands it in: (address, ElementType, shape, strides in elements), and as a
/// fifth whether it may only be read, where that is so. The caller keeps it alive during the call.
/// Integers cost a third of what DLPack does.
struct TensorReference {
  void* data;
  ElementType type;
  std::array<std::int64_t, 4> shape;
  std::array<std::int64_t, 4> strides;
  bool read_only;

  ConstTensor constant(const char* name) const;
  /// Throws ValueError where it may only be read.
  Tensor writable(const char* name) const;
  Mask mask() const;
};

/// Throws ValueError where the tuple is not such a reference.
TensorReference reference_of(const py::tuple& tuple, const char* name);

/// A TensorReference of what has the buffer protocol: numpy's arrays and mlx's, which are evaluated
/// for it. `dtype` says what the elements are where the
/// buffer does not; throws ValueError where it cannot be.
py::tuple borrowed(const py::object& array, const std::optional<ElementType>& dtype);

/// Of (address of int64, shape, strides in elements), each of 3 numbers; throws ValueError.
PositionTensor positions_of(const py::tuple& tuple);

/// Frequencies, layout, rotary_dim, and the section of each frequency where there are several.
using RopeOfSections = std::tuple<std::vector<float>, std::string, int, std::vector<int>>;
using RopeArguments =
    std::variant<RopeOfSections, std::tuple<std::vector<float>, std::string, int>>;

/// Throws ValueError.
Rope make_rope(const RopeArguments& arguments);

/// Bases as Python hands them over, as the library takes them.
std::vector<std::shared_ptr<const KeyBasis>> bases_of(
    const std::vector<std::shared_ptr<KeyBasis>>& bases);

RotationKind rotation_from_name(const std::string& name);
const char* name_of(RotationKind kind);

/// name: "scalar" or "trellis"; what: the argument that it was given for.
CodeKind codes_from_name(const char* what, const std::string& name);
const char* name_of(CodeKind kind);

Grid grid_from_name(const std::string& name);
const char* name_of(Grid grid);

void bind_basis(py::module_& module);
void bind_cache(py::module_& module);
void bind_codebook(py::module_& module);
void bind_files(py::module_& module);
void bind_quantizers(py::module_& module);
void bind_sequences(py::module_& module);

}  // namespace tqai::python
