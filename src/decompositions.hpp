// Decompositions of small dense matrices in double, for what is learnt once. Own code, for the same
// reason as haar.cpp's: a header library's would carry weak symbols into the application, and other
// versions of it would give other results.
#pragma once

#include <cstddef>
#include <vector>

namespace tqai {

/// A square matrix, row-major.
class SquareMatrix {
 public:
  explicit SquareMatrix(std::size_t dim) : dim_(dim), values_(dim * dim) {}
  static SquareMatrix identity(std::size_t dim);

  std::size_t dim() const noexcept { return dim_; }
  double* row(std::size_t i) noexcept { return values_.data() + i * dim_; }
  const double* row(std::size_t i) const noexcept { return values_.data() + i * dim_; }
  double trace() const noexcept;

 private:
  std::size_t dim_;
  std::vector<double> values_;
};

/// a · b.
SquareMatrix product(const SquareMatrix& a, const SquareMatrix& b);

SquareMatrix transposed(const SquareMatrix& matrix);

/// Eigenvalues, largest first, and their vectors of length 1, as rows.
struct Spectrum {
  std::vector<double> values;
  SquareMatrix vectors;
};

/// Of a symmetric matrix, finite: Householder's reflections make it tridiagonal, and implicit QL
/// steps with Wilkinson's shift diagonal (Golub, Van Loan: Matrix Computations, §§8.3.1, 8.3.5).
/// Errors are a few roundings of the largest eigenvalue. About 7 dim³ multiply-adds: 2 ms for 64,
/// 0.1 s for 256. Throws std::bad_alloc.
Spectrum eigenvectors(const SquareMatrix& symmetric);

/// The geometric mean decomposition diag(s) = Q R Pᵀ of numbers s > 0: Q and P orthogonal, R upper
/// triangular with the geometric mean of s all along its diagonal (Jiang, Hager, Li: The geometric
/// mean decomposition, Linear Algebra and its Applications 396, 2005). There are many: of the pairs
/// that each step may turn, this takes the most unequal one after which Q's column has about the
/// mean moment at most. moments: symmetric and positive semidefinite; then Qᵀ · moments · Q has no
/// large entries on its diagonal. `rows` become Pᵀ · rows. Returns Rᵀ over the mean of s: unit
/// lower triangular. O(dim³). Throws std::bad_alloc.
SquareMatrix geometric_mean_decomposition(std::vector<double> s, SquareMatrix& rows,
                                          SquareMatrix moments);

/// The inverse, by elimination with pivots; `matrix` must have one. Throws std::bad_alloc.
SquareMatrix inverse(SquareMatrix matrix);

}  // namespace tqai
