// What the other headers know of Eigen: enough to take its matrices where <tqai/eigen.hpp> is
// included, and to say so where it is not. Eigen itself takes most of the time to compile them.
#pragma once

namespace tqai::detail {

/// A matrix, map, block or expression of Eigen's.
template <typename Type>
concept EigenMatrix = requires(const Type& matrix) {
  matrix.derived().rows();
  matrix.derived().cols();
  matrix.derived().eval();
};

/// Turns Eigen's matrices into pointers and shapes; <tqai/eigen.hpp> has it. A template, so that it
/// is looked for only where a program hands over a matrix.
template <typename Matrix>
struct EigenRows {
  static_assert(!EigenMatrix<Matrix>,
                "#include <tqai/eigen.hpp> or <tqai/tqai.hpp> to hand Eigen's matrices to tqai");
};

}  // namespace tqai::detail
