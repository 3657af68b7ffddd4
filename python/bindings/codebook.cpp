#include <pybind11/numpy.h>

#include <tqai/codebook.hpp>
#include <tqai/trellis.hpp>

#include "bindings.hpp"

namespace tqai::python {
namespace {

template <typename T>
py::array_t<T> array_of(std::span<const T> values) {
  return py::array_t<T>(static_cast<py::ssize_t>(values.size()), values.data());
}

}  // namespace

Grid grid_from_name(const std::string& name) {
  if (name == "exact") return Grid::exact;
  if (name == "int8") return Grid::int8;
  throw ValueError("grid = \"" + name + "\"; allowed: exact, int8");
}

const char* name_of(Grid grid) { return grid == Grid::exact ? "exact" : "int8"; }

void bind_codebook(py::module_& module) {
  using py::arg;
  py::class_<Codebook>(module, "Codebook",
                       R"(Lloyd-Max centroids of one coordinate of a random unit vector.

grid "exact": the optimal ones; "int8": the best among integer multiples of one step, as the cache's
kernels use them. head_dim 8 to 576, bits 1 to 8, else ValueError.)")
      .def(py::init([](int head_dim, int bits, const std::string& grid) {
             const Grid kind = grid_from_name(grid);
             const py::gil_scoped_release release;
             return Codebook(head_dim, bits, kind);
           }),
           arg("head_dim"), arg("bits"), arg("grid") = "exact")
      .def_property_readonly("head_dim", &Codebook::head_dim)
      .def_property_readonly("bits", &Codebook::bits)
      .def_property_readonly("grid",
                             [](const Codebook& b) { return std::string(name_of(b.grid())); })
      .def_property_readonly("step", &Codebook::step,
                             "Distance of grid points; 0 for the exact grid.")
      .def_property_readonly("distortion", &Codebook::distortion,
                             "Expected squared error of a unit vector.")
      .def_property_readonly(
          "centroids", [](const Codebook& b) { return array_of(b.centroids()); },
          "[2^bits] float32, ascending.")
      .def_property_readonly(
          "boundaries", [](const Codebook& b) { return array_of(b.boundaries()); },
          "[2^bits - 1] float32: code i is nearest from boundary i-1 up to boundary i.")
      .def_property_readonly(
          "levels", [](const Codebook& b) { return array_of(b.levels()); },
          "[2^bits] int8 with centroid = step * level; empty for the exact grid.");

  py::class_<Trellis>(module, "Trellis",
                      R"(The levels of trellis codes, bits 1 to 4, else ValueError.

A code's window is the 8 bits of the stream of codes that end with its own. See
include/tqai/trellis.hpp.)")
      .def(py::init([](int bits) { return trellis(bits); }), arg("bits"))
      .def_readonly("bits", &Trellis::bits)
      .def("step", &Trellis::step, arg("head_dim"),
           "What a level of 1 stands for in vectors of length 1.")
      .def_property_readonly(
          "levels",
          [](const Trellis& t) {
            std::array<std::int8_t, 256> levels;
            for (unsigned window = 0; window < levels.size(); ++window) {
              levels[window] = static_cast<std::int8_t>(t.level(window));
            }
            return array_of(std::span<const std::int8_t>(levels));
          },
          "[256] int8, by window.");

  py::class_<KeyTrellis>(module, "KeyTrellis",
                         R"(The levels of trellis codes of keys, bits 2 to 4, else ValueError.

A code's window is its own bits and, below them, the upper ones of those before it, 6 in all. See
include/tqai/trellis.hpp.)")
      .def(py::init([](int bits) { return key_trellis(bits); }), arg("bits"))
      .def_readonly("bits", &KeyTrellis::bits)
      .def_readonly("start", &KeyTrellis::start, "What stands below the first code's bits.")
      .def("step", &KeyTrellis::step, arg("head_dim"),
           "What a level of 1 stands for in vectors of length 1.")
      .def_property_readonly(
          "levels",
          [](const KeyTrellis& t) { return array_of(std::span<const std::int8_t>(t.levels)); },
          "[64] int8, by window.");
}

}  // namespace tqai::python
