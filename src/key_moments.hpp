// What of moments their matrices and the bases that are learnt from them share.
#pragma once

#include <cstddef>
#include <vector>

#include "decompositions.hpp"

namespace tqai::detail {

inline constexpr int kMostKvHeads = 1 << 16;

/// values, [dim, dim] row-major, times `factor`. Throws std::bad_alloc.
SquareMatrix matrix_of(const std::vector<double>& values, std::size_t dim, double factor);

/// The mean of [dim, dim] moments' diagonal.
double mean_diagonal(const std::vector<double>& moments, std::size_t dim) noexcept;

}  // namespace tqai::detail
