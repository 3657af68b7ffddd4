// Eigen views of tqai's buffers. Only views: an owning Eigen object never crosses into compiled
// code, since a library and an application built for different processors disagree about its
// alignment.
#pragma once

#include <Eigen/Core>

namespace tqai {

/// Row-major fp32 matrix, for callers that want to own one.
using RowMatrix = Eigen::Matrix<float, Eigen::Dynamic, Eigen::Dynamic, Eigen::RowMajor>;
/// Contiguous row-major views [rows, columns].
using Rows = Eigen::Map<RowMatrix>;
using ConstRows = Eigen::Map<const RowMatrix>;

/// View of an owned matrix.
inline Rows rows_of(RowMatrix& matrix) { return {matrix.data(), matrix.rows(), matrix.cols()}; }
inline ConstRows rows_of(const RowMatrix& matrix) {
  return {matrix.data(), matrix.rows(), matrix.cols()};
}

}  // namespace tqai
