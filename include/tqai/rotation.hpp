// Fixed random orthogonal matrices.
#pragma once

#include <cstdint>
#include <span>
#include <tqai/export.hpp>
#include <tqai/matrix.hpp>
#include <vector>

namespace tqai {

/// `automatic`: hadamard where head_dim is a power of two, haar elsewhere.
enum class RotationKind : std::uint8_t { automatic, hadamard, haar };

/// A random orthogonal matrix R from a seed, the same on every platform up to rounding.
/// hadamard: R = H·diag(±1)/√d, d·log d operations; haar: uniform over the orthogonal group by QR
/// of a Gaussian with R's diagonal made positive (arXiv:math-ph/0609050), d² operations.
/// Both give the same quantisation error. Immutable and thread-safe.
class TQAI_API Rotation {
 public:
  /// Throws ValueError where head_dim is outside 8…576, or hadamard is asked for a head_dim that
  /// is no power of two.
  Rotation(int head_dim, RotationKind kind, std::uint64_t seed);

  /// Coordinates of the vectors it turns.
  int head_dim() const noexcept { return head_dim_; }
  /// hadamard or haar, never automatic.
  RotationKind kind() const noexcept { return kind_; }
  /// As given.
  std::uint64_t seed() const noexcept { return seed_; }

  /// y = R x for each row. `x`, `y`: [rows, head_dim] fp32; may be the same buffer, may not
  /// otherwise overlap. The kernels' own rotations give the same bits. Throws ValueError for
  /// negative rows.
  void apply(const float* x, float* y, std::int64_t rows) const;
  /// x = Rᵀ y for each row; as `apply`.
  void apply_transposed(const float* y, float* x, std::int64_t rows) const;

  /// [head_dim] of ±1; empty for haar.
  std::span<const float> signs() const noexcept { return signs_; }
  /// [head_dim, head_dim] row-major: column-major view of R (row i of this is column i of R); empty
  /// for hadamard.
  std::span<const float> transposed_matrix() const noexcept { return transposed_; }
  /// [head_dim, head_dim] row-major R; empty for hadamard.
  std::span<const float> matrix() const noexcept { return matrix_; }

  /// `apply` for Eigen's rows (needs <tqai/eigen.hpp>): x, y [rows, head_dim]; y is row-major.
  template <detail::EigenMatrix In, detail::EigenMatrix Out>
  void apply(const In& x, Out&& y) const {
    detail::EigenRows<In>::apply(*this, x, y);
  }
  /// `apply_transposed` for Eigen's rows: y, x [rows, head_dim].
  template <detail::EigenMatrix In, detail::EigenMatrix Out>
  void apply_transposed(const In& y, Out&& x) const {
    detail::EigenRows<In>::apply_transposed(*this, y, x);
  }

 private:
  template <typename Matrix>
  friend struct detail::EigenRows;

  void check_views(std::int64_t in_rows, std::int64_t in_cols, std::int64_t out_rows,
                   std::int64_t out_cols) const;

  int head_dim_;
  RotationKind kind_;
  std::uint64_t seed_;
  std::vector<float> signs_;
  std::vector<float> matrix_;
  std::vector<float> transposed_;
};

}  // namespace tqai

#if defined(TQAI_HEADER_ONLY) || defined(TQAI_IMPLEMENTATION)
#include <tqai/header_only.hpp>
#endif
