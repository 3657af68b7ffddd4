// Eigen views of tqai's buffers. Only views: an owning Eigen object never crosses into compiled
// code, since a library and an application built for different processors disagree about its
// alignment.
#pragma once

#include <Eigen/Core>

namespace tqai {

/// Row-major fp32 matrix, for callers that want to own one.
using RowMatrix = Eigen::Matrix<float, Eigen::Dynamic, Eigen::Dynamic, Eigen::RowMajor>;
/// Row-major views [rows, columns] of matrices, maps and blocks; columns are contiguous, rows may
/// lie further apart. A read-only view of anything else is a copy.
using Rows = Eigen::Ref<RowMatrix>;
using ConstRows = Eigen::Ref<const RowMatrix>;

}  // namespace tqai
