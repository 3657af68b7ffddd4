// Eigen views of KvCache: turned into pointers and shapes in the caller's own code, so that nothing
// of Eigen reaches the compiled library.
#pragma once

#include <string>

namespace tqai {
namespace detail {

/// [1, heads, rows, dim] view of a matrix [rows, heads · dim].
template <typename TensorType, typename Matrix>
TensorType heads_of(Matrix& matrix, int dim, const char* name) {
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

}  // namespace detail

inline void KvCache::append(const Eigen::Ref<const RowMatrix>& keys,
                            const Eigen::Ref<const RowMatrix>& values) {
  append(detail::heads_of<ConstTensor>(keys, options().head_dim, "keys"),
         detail::heads_of<ConstTensor>(values, options().value_head_dim, "values"));
}

inline void KvCache::attend(const Eigen::Ref<const RowMatrix>& queries,
                            Eigen::Ref<RowMatrix> output, const AttendOptions& options) const {
  const auto rows = detail::heads_of<ConstTensor>(queries, this->options().head_dim, "queries");
  auto out = detail::heads_of<Tensor>(output, this->options().value_head_dim, "output");
  // The output tensor is [batch, queries, heads, dim].
  std::swap(out.shape[1], out.shape[2]);
  std::swap(out.strides[1], out.strides[2]);
  attend(rows, out, options);
}

}  // namespace tqai
