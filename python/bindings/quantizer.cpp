#include <pybind11/numpy.h>
#include <pybind11/stl.h>

#include <tqai/quantizer.hpp>
#include <utility>

#include "bindings.hpp"

namespace tqai::python {
namespace {

// Inputs of other dtypes or orders are converted, as numpy functions do.
template <typename T>
using Array = py::array_t<T, py::array::c_style | py::array::forcecast>;

// Rows of a matrix [rows, columns]; throws ValueError for other shapes.
template <typename T>
std::int64_t rows_of(const Array<T>& array, std::int64_t columns, const char* name) {
  if (array.ndim() == 2 && array.shape(1) == columns) return array.shape(0);
  std::string given = "(";
  for (py::ssize_t i = 0; i < array.ndim(); ++i) {
    if (i > 0) given += ", ";
    given += std::to_string(array.shape(i));
  }
  throw ValueError(std::string(name) + " has shape " + given + "); needed: (rows, " +
                   std::to_string(columns) + ")");
}

py::tuple encode(const VectorQuantizer& quantizer, const Array<float>& vectors) {
  const std::int64_t rows = rows_of(vectors, quantizer.head_dim(), "vectors");
  py::array_t<std::uint8_t> codes({rows, static_cast<std::int64_t>(quantizer.code_bytes())});
  py::array_t<std::uint16_t> norms({rows, static_cast<std::int64_t>(quantizer.norm_count())});
  {
    const float* from = vectors.data();
    std::uint8_t* to = codes.mutable_data();
    std::uint16_t* norm = norms.mutable_data();
    const py::gil_scoped_release release;
    quantizer.encode(from, rows, to, norm);
  }
  return py::make_tuple(codes, norms.attr("view")("float16"));
}

[[noreturn]] void refuse_dtype(const py::array& array, const char* name, const char* needed) {
  throw ValueError(std::string(name) + " are of " + py::str(array.dtype()).cast<std::string>() +
                   "; needed: " + needed + ", as encode gives");
}

// Other numbers would wrap.
Array<std::uint8_t> code_bytes(const py::array& codes) {
  if (codes.dtype().kind() != 'u' || codes.itemsize() != 1) refuse_dtype(codes, "codes", "uint8");
  return Array<std::uint8_t>(codes);
}

// Norms are numpy float16; their bits are what the library reads.
Array<std::uint16_t> norm_bits(const py::array& norms) {
  if (norms.dtype().kind() != 'f') refuse_dtype(norms, "norms", "float16");
  return Array<std::uint16_t>(norms.attr("astype")("float16").attr("view")("uint16"));
}

std::int64_t encoded_rows(const VectorQuantizer& quantizer, const Array<std::uint8_t>& codes,
                          const Array<std::uint16_t>& norms) {
  const std::int64_t rows =
      rows_of(codes, static_cast<std::int64_t>(quantizer.code_bytes()), "codes");
  if (rows_of(norms, quantizer.norm_count(), "norms") != rows) {
    throw ValueError("norms has " + std::to_string(norms.shape(0)) + " rows; codes has " +
                     std::to_string(rows));
  }
  return rows;
}

py::array_t<float> decode(const VectorQuantizer& quantizer, const py::array& given,
                          const py::array& norms) {
  const Array<std::uint8_t> codes = code_bytes(given);
  const Array<std::uint16_t> bits = norm_bits(norms);
  const std::int64_t rows = encoded_rows(quantizer, codes, bits);
  py::array_t<float> vectors({rows, static_cast<std::int64_t>(quantizer.head_dim())});
  float* to = vectors.mutable_data();
  const std::uint8_t* code = codes.data();
  const std::uint16_t* norm = bits.data();
  const py::gil_scoped_release release;
  quantizer.decode(code, norm, rows, to);
  return vectors;
}

py::array_t<float> inner_products(const VectorQuantizer& quantizer, const Array<float>& queries,
                                  const py::array& given, const py::array& norms) {
  const Array<std::uint8_t> codes = code_bytes(given);
  const std::int64_t query_rows = rows_of(queries, quantizer.head_dim(), "queries");
  const Array<std::uint16_t> bits = norm_bits(norms);
  const std::int64_t rows = encoded_rows(quantizer, codes, bits);
  py::array_t<float> products({query_rows, rows});
  float* to = products.mutable_data();
  const float* query = queries.data();
  const std::uint8_t* code = codes.data();
  const std::uint16_t* norm = bits.data();
  const py::gil_scoped_release release;
  quantizer.inner_products(query, query_rows, code, norm, rows, to);
  return products;
}

Quantizer make_quantizer(int head_dim, int bits, const std::string& rotation, std::uint64_t seed,
                         const std::string& grid, bool norm_correction, const std::string& codes) {
  const QuantizerOptions options{head_dim,
                                 bits,
                                 rotation_from_name(rotation),
                                 seed,
                                 grid_from_name(grid),
                                 norm_correction,
                                 codes_from_name("codes", codes)};
  const py::gil_scoped_release release;
  return Quantizer(options);
}

ProdQuantizer make_prod_quantizer(int head_dim, int bits, const std::string& rotation,
                                  std::uint64_t seed, std::uint64_t projection_seed,
                                  const std::string& grid) {
  const ProdQuantizerOptions options{
      head_dim, bits, rotation_from_name(rotation), seed, projection_seed, grid_from_name(grid)};
  const py::gil_scoped_release release;
  return ProdQuantizer(options);
}

}  // namespace

void bind_quantizers(py::module_& module) {
  using py::arg;
  using py::kw_only;
  py::class_<VectorQuantizer>(module, "VectorQuantizer",
                              "What both quantisers do. Thread-safe; the GIL is released.")
      .def_property_readonly("head_dim", &VectorQuantizer::head_dim)
      .def_property_readonly("bits", &VectorQuantizer::bits)
      .def_property_readonly("code_bytes", &VectorQuantizer::code_bytes,
                             "Bytes of one vector's codes.")
      .def_property_readonly("norm_count", &VectorQuantizer::norm_count,
                             "FP16 norms of one vector.")
      .def("encode", &encode, arg("vectors"),
           R"(vectors [rows, head_dim] to codes [rows, code_bytes] uint8 and norms
[rows, norm_count] float16. ValueError for NaN, infinity and norms beyond FP16.)")
      .def("decode", &decode, arg("codes"), arg("norms"),
           "The inverse, up to the quantisation error: [rows, head_dim] float32.")
      .def("inner_products", &inner_products, arg("queries"), arg("codes"), arg("norms"),
           "[query_rows, rows] float32: each query [query_rows, head_dim] with each vector.");

  py::class_<Quantizer, VectorQuantizer>(
      module, "Quantizer",
      R"(Smallest mean squared error (arXiv:2504.19874, Alg. 1): a random rotation, then the nearest
centroid of each coordinate; the norm as FP16. With norm_correction reconstructions keep the length.
head_dim 8 to 576, bits 1 to 8, rotation "auto", "hadamard" or "haar", grid "exact" or "int8". codes
"trellis", of 1 to 4 bits, have levels of their own in place of the grid's.)")
      .def(py::init(&make_quantizer), arg("head_dim"), arg("bits") = 4, kw_only(),
           arg("rotation") = "auto", arg("seed") = QuantizerOptions{}.seed, arg("grid") = "exact",
           arg("norm_correction") = true, arg("codes") = "scalar")
      .def_property_readonly(
          "rotation", [](const Quantizer& q) { return std::string(name_of(q.rotation().kind())); });

  py::class_<ProdQuantizer, VectorQuantizer>(
      module, "ProdQuantizer",
      R"(Unbiased inner products (arXiv:2504.19874, Alg. 2): bits - 1 bits as in Quantizer, and the
signs of a Gaussian projection of the rest (QJL).)")
      .def(py::init(&make_prod_quantizer), arg("head_dim"), arg("bits") = 4, kw_only(),
           arg("rotation") = "auto", arg("seed") = ProdQuantizerOptions{}.seed,
           arg("projection_seed") = ProdQuantizerOptions{}.projection_seed, arg("grid") = "exact")
      .def_property_readonly("rotation", [](const ProdQuantizer& q) {
        return std::string(name_of(q.rotation().kind()));
      });
}

}  // namespace tqai::python
