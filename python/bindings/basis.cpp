#include <pybind11/numpy.h>
#include <pybind11/stl.h>

#include <memory>
#include <tqai/half.hpp>
#include <tqai/key_basis.hpp>
#include <utility>

#include "bindings.hpp"

namespace tqai::python {
namespace {

// Inputs of other dtypes or orders are converted, as numpy functions do.
template <typename T>
using Array = py::array_t<T, py::array::c_style | py::array::forcecast>;

using BasisPointer = std::shared_ptr<KeyBasis>;

template <typename T>
std::span<const T> numbers_of(const Array<T>& array) {
  return {array.data(), static_cast<std::size_t>(array.size())};
}

void check_columns(const char* name, const py::array& array, int columns) {
  if (array.ndim() == 2 && array.shape(1) == columns) return;
  throw ValueError(std::string(name) + " have the shape " +
                   std::string(py::str(array.attr("shape"))) + "; needed: (tokens, " +
                   std::to_string(columns) + ")");
}

// Adds keys or queries.
template <typename Member>
auto adding(const char* name, Member member) {
  return [name, member](KeyMoments& moments, int head, const Array<float>& vectors,
                        const std::optional<Array<std::int64_t>>& positions) {
    check_columns(name, vectors, moments.head_dim());
    (moments.*member)(head, numbers_of(vectors),
                      positions ? numbers_of(*positions) : std::span<const std::int64_t>{});
  };
}

py::array_t<double> square(const std::vector<double>& values, int dim) {
  py::array_t<double> result({dim, dim});
  std::copy(values.begin(), values.end(), result.mutable_data());
  return result;
}

py::array_t<float> widened(std::span<const std::uint16_t> halves, float scale, int dim) {
  py::array_t<float> result({dim, dim});
  float* to = result.mutable_data();
  for (std::size_t i = 0; i < halves.size(); ++i) to[i] = from_half(halves[i]) * scale;
  return result;
}

py::tuple matrices(const KeyBasis& basis, int head) {
  const int dim = basis.head_dim();
  const KeyBasis::Head of = basis.head(head);
  py::array_t<float> lower({dim, dim});
  float* to = lower.mutable_data();
  std::size_t next = 0;
  for (int i = 0; i < dim; ++i) {
    for (int j = 0; j < dim; ++j) {
      to[i * dim + j] = j < i ? from_half(of.feedback[next++]) : i == j ? 1.0F : 0.0F;
    }
  }
  return py::make_tuple(widened(of.analysis, of.analysis_scale, dim), lower,
                        widened(of.synthesis, of.synthesis_scale, dim));
}

py::bytes serialize(const KeyBasis& basis) {
  const std::vector<std::byte> bytes = basis.serialize();
  return {reinterpret_cast<const char*>(bytes.data()), bytes.size()};
}

BasisPointer deserialize(const py::bytes& data) {
  const std::string_view bytes = data;
  return std::make_shared<KeyBasis>(
      KeyBasis::deserialize(std::as_bytes(std::span(bytes.data(), bytes.size()))));
}

}  // namespace

void bind_basis(py::module_& module) {
  using py::arg;
  py::class_<KeyMoments>(module, "KeyMoments", R"(Second moments of a layer's keys and queries.

rope: what they have been turned by, as KvCache takes it. Not to be used by several threads at once.
See include/tqai/key_basis.hpp.)")
      .def(py::init([](int kv_heads, int head_dim, const std::optional<RopeArguments>& rope) {
             return KeyMoments(kv_heads, head_dim,
                               rope ? std::optional(make_rope(*rope)) : std::nullopt);
           }),
           arg("kv_heads"), arg("head_dim"), arg("rope") = py::none())
      .def_property_readonly("kv_heads", &KeyMoments::kv_heads)
      .def_property_readonly("head_dim", &KeyMoments::head_dim)
      .def(
          "add_keys", adding("keys", &KeyMoments::add_keys), arg("head"), arg("keys"),
          arg("positions") = py::none(),
          R"(Adds keys of a kv head, [tokens, head_dim], as attention sees them. positions: what they were
turned by, [tokens] or [sections, tokens]; None: token i stands at i.)")
      .def("add_queries", adding("queries", &KeyMoments::add_queries), arg("head"), arg("queries"),
           arg("positions") = py::none(),
           "Adds queries that read a kv head, of any of its query heads; as add_keys().")
      .def(
          "add_prior",
          [](KeyMoments& moments, int head, const Array<double>& keys, const Array<double>& queries,
             double tokens) {
            moments.add_prior(head, numbers_of(keys), numbers_of(queries), tokens);
          },
          arg("head"), arg("keys"), arg("queries"), arg("tokens"),
          R"(Adds moments known beforehand, [head_dim, head_dim] each, of keys and queries turned back to
position 0, as much as so many tokens: scaled to what was added so far.)")
      .def("tokens", &KeyMoments::tokens, arg("head"), "Tokens of a head's keys that were added.")
      .def(
          "keys_until",
          [](const KeyMoments& moments, int head, std::int64_t last_position) {
            return square(moments.keys_until(head, last_position), moments.head_dim());
          },
          arg("head"), arg("last_position"),
          "Moments of a head's keys less their mean, as a mean over positions up to this one.")
      .def(
          "queries_until",
          [](const KeyMoments& moments, int head, std::int64_t last_position) {
            return square(moments.queries_until(head, last_position), moments.head_dim());
          },
          arg("head"), arg("last_position"), "The same of its queries.");

  py::class_<KeyBasis, BasisPointer>(
      module, "KeyBasis",
      R"(What a layer's keys are quantised in, in place of a rotation.

Immutable. See include/tqai/key_basis.hpp.)")
      .def_static(
          "learn",
          [](const KeyMoments& moments, int bits, std::int64_t last_position) {
            const py::gil_scoped_release release;
            return std::make_shared<KeyBasis>(KeyBasis::learn(moments, bits, last_position));
          },
          arg("moments"), arg("bits"), arg("last_position") = KeyBasis::kLastPosition,
          R"(The basis for codes of so many bits, good at positions up to last_position. ValueError for a
head without keys or queries.)")
      .def_property_readonly("kv_heads", &KeyBasis::kv_heads)
      .def_property_readonly("head_dim", &KeyBasis::head_dim)
      .def_property_readonly("bits", &KeyBasis::bits)
      .def_property_readonly("id", &KeyBasis::id, "Tells it from others.")
      .def_property_readonly("nbytes", &KeyBasis::bytes, "Bytes of its matrices.")
      .def_static("bytes_of", &KeyBasis::bytes_of, arg("kv_heads"), arg("head_dim"),
                  "nbytes of one for so many heads.")
      .def_property_readonly("largest_ratio", &KeyBasis::largest_ratio,
                             "|E r| / |L z| is up to this many times |r| / |z|, in any head.")
      .def(
          "matrices", &matrices, arg("head"),
          R"(A head's E, L and F, float32 [head_dim, head_dim]: a key less its centre, r, is quantised so that
n L z is near E r, and read as n F z.)")
      // Copies of what has a basis share it, as copies of caches do.
      .def("__copy__", [](const BasisPointer& basis) { return basis; })
      .def(
          "__deepcopy__", [](const BasisPointer& basis, const py::dict&) { return basis; },
          arg("memo"))
      .def("serialize", &serialize, "The basis as bytes.")
      .def_static("deserialize", &deserialize, arg("data"),
                  "The basis that serialize() wrote; ValueError for bytes that it did not write.")
      .def(py::pickle([](const KeyBasis& basis) { return py::make_tuple(serialize(basis)); },
                      [](const py::tuple& state) {
                        if (state.size() != 1) {
                          throw ValueError("not the state of a pickled KeyBasis");
                        }
                        return deserialize(state[0].cast<py::bytes>());
                      }));
}

}  // namespace tqai::python
