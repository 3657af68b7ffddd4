// Eigen's matrices for what tqai takes and gives: with this header KvCache, Rotation and the
// quantisers take them. Only views: they become pointers and shapes in the caller's own code, since
// a library and an application built for different processors disagree about the alignment of an
// owning Eigen object.
#pragma once

#include <Eigen/Core>
#include <cstdint>
#include <string>
#include <tqai/cache.hpp>
#include <tqai/error.hpp>
#include <tqai/matrix.hpp>
#include <tqai/quantizer.hpp>
#include <tqai/rotation.hpp>
#include <utility>

static_assert(EIGEN_VERSION_AT_LEAST(3, 4, 0), "tqai needs Eigen 3.4 or newer");

namespace tqai {

/// Row-major fp32 matrix, for callers that want to own one.
using RowMatrix = Eigen::Matrix<float, Eigen::Dynamic, Eigen::Dynamic, Eigen::RowMajor>;
/// Row-major views [rows, columns] of matrices, maps and blocks; columns are contiguous, rows may
/// lie further apart. A read-only view of anything else is a copy.
using Rows = Eigen::Ref<RowMatrix>;
/// The same, to be read.
using ConstRows = Eigen::Ref<const RowMatrix>;

/// A quantiser's row-major codes [rows, code_bytes()].
using CodeMatrix = Eigen::Matrix<std::uint8_t, Eigen::Dynamic, Eigen::Dynamic, Eigen::RowMajor>;
/// A view of codes.
using CodeRows = Eigen::Ref<CodeMatrix>;
/// The same, to be read.
using ConstCodeRows = Eigen::Ref<const CodeMatrix>;
/// A quantiser's FP16 norms [rows, norm_count()].
using NormMatrix = Eigen::Matrix<std::uint16_t, Eigen::Dynamic, Eigen::Dynamic, Eigen::RowMajor>;
/// A view of norms.
using NormRows = Eigen::Ref<NormMatrix>;
/// The same, to be read.
using ConstNormRows = Eigen::Ref<const NormMatrix>;

namespace detail {

template <EigenMatrix Matrix>
struct EigenRows<Matrix> {
  static void append(KvCache& cache, const ConstRows& keys, const ConstRows& values,
                     const Resources& resources) {
    cache.append(heads_of<ConstTensor>(keys, cache.options().head_dim, "keys"),
                 heads_of<ConstTensor>(values, cache.options().value_head_dim, "values"), {},
                 resources);
  }

  static void attend(const KvCache& cache, const ConstRows& queries, Rows output,
                     const AttendOptions& options, const Resources& resources) {
    const auto rows = heads_of<ConstTensor>(queries, cache.options().head_dim, "queries");
    auto out = heads_of<Tensor>(output, cache.options().value_head_dim, "output");
    // The output tensor is [batch, queries, heads, dim].
    std::swap(out.shape[1], out.shape[2]);
    std::swap(out.strides[1], out.strides[2]);
    cache.attend(rows, out, options, resources);
  }

  static void apply(const Rotation& rotation, const ConstRows& x, Rows y) {
    rotation.check_views(x.rows(), x.cols(), y.rows(), y.cols());
    for (Eigen::Index r = 0; r < x.rows(); ++r) {
      rotation.apply(x.data() + r * x.outerStride(), y.data() + r * y.outerStride(), 1);
    }
  }

  static void apply_transposed(const Rotation& rotation, const ConstRows& y, Rows x) {
    rotation.check_views(y.rows(), y.cols(), x.rows(), x.cols());
    for (Eigen::Index r = 0; r < y.rows(); ++r) {
      rotation.apply_transposed(y.data() + r * y.outerStride(), x.data() + r * x.outerStride(), 1);
    }
  }

  static void encode(const VectorQuantizer& quantizer, const ConstRows& vectors, CodeRows codes,
                     NormRows norms) {
    const Eigen::Index rows = vectors.rows();
    check_view("vectors", vectors, rows, quantizer.head_dim());
    check_view("codes", codes, rows, static_cast<std::int64_t>(quantizer.code_bytes()));
    check_view("norms", norms, rows, quantizer.norm_count());
    quantizer.encode(vectors.data(), rows, codes.data(), norms.data());
  }

  static void decode(const VectorQuantizer& quantizer, const ConstCodeRows& codes,
                     const ConstNormRows& norms, Rows vectors) {
    const Eigen::Index rows = codes.rows();
    check_view("codes", codes, rows, static_cast<std::int64_t>(quantizer.code_bytes()));
    check_view("norms", norms, rows, quantizer.norm_count());
    check_view("vectors", vectors, rows, quantizer.head_dim());
    quantizer.decode(codes.data(), norms.data(), rows, vectors.data());
  }

  static void inner_products(const VectorQuantizer& quantizer, const ConstRows& queries,
                             const ConstCodeRows& codes, const ConstNormRows& norms,
                             Rows products) {
    const Eigen::Index rows = codes.rows();
    check_view("queries", queries, queries.rows(), quantizer.head_dim());
    check_view("codes", codes, rows, static_cast<std::int64_t>(quantizer.code_bytes()));
    check_view("norms", norms, rows, quantizer.norm_count());
    check_view("products", products, queries.rows(), rows);
    quantizer.inner_products(queries.data(), queries.rows(), codes.data(), norms.data(), rows,
                             products.data());
  }

 private:
  /// [1, heads, rows, dim] view of a matrix [rows, heads · dim].
  template <typename TensorType, typename View>
  static TensorType heads_of(View& matrix, int dim, const char* name) {
    if (matrix.cols() % dim != 0) {
      throw ValueError(std::string(name) + " has " + std::to_string(matrix.cols()) +
                       " columns; a multiple of the head dimension, " + std::to_string(dim) +
                       ", is needed");
    }
    TensorType tensor;
    tensor.data = matrix.data();
    tensor.dtype = DType::f32;
    tensor.shape = {1, matrix.cols() / dim, matrix.rows(), dim};
    tensor.strides = {0, dim, matrix.outerStride(), 1};
    return tensor;
  }

  template <typename View>
  static void check_view(const char* name, const View& view, std::int64_t rows,
                         std::int64_t columns) {
    VectorQuantizer::check_shape(name, {view.rows(), view.cols()}, {rows, columns},
                                 view.outerStride());
  }
};

}  // namespace detail
}  // namespace tqai
