#include <bit>
#include <cmath>
#include <cstring>
#include <string>
#include <tqai/error.hpp>
#include <tqai/rotation.hpp>

#include "haar.hpp"
#include "random.hpp"
#include "ranges.hpp"
#include "rotate.hpp"
#include "threads.hpp"

namespace tqai {
namespace TQAI_LOCAL {

TQAI_INLINE bool is_power_of_two(int value) {
  return std::has_single_bit(static_cast<unsigned>(value));
}

TQAI_INLINE RotationKind resolved(RotationKind kind, int head_dim) {
  check_enumerator("rotation", kind, RotationKind::haar);
  if (kind == RotationKind::automatic) {
    return is_power_of_two(head_dim) ? RotationKind::hadamard : RotationKind::haar;
  }
  if (kind == RotationKind::hadamard && !is_power_of_two(head_dim)) {
    throw ValueError("head_dim = " + std::to_string(head_dim) +
                     " with a Hadamard rotation; allowed: powers of two, or a Haar rotation");
  }
  return kind;
}

TQAI_INLINE void check_rows(const void* from, const void* to, std::int64_t rows) {
  if (rows < 0) throw ValueError("rows = " + std::to_string(rows) + "; allowed: 0 or more");
  if (rows > 0 && (from == nullptr || to == nullptr)) {
    throw ValueError("null pointer for rows = " + std::to_string(rows) +
                     "; allowed: only for no rows");
  }
}

TQAI_INLINE float hadamard_scale(int head_dim) {
  return 1.0F / std::sqrt(static_cast<float>(head_dim));
}

/// Each row times the matrix whose columns are the rows of `columns`.
TQAI_INLINE void multiply_rows(const std::vector<float>& columns, const float* from, float* to,
                               std::int64_t rows, int dim) {
  float result[kMaxHeadDim];  // `from` and `to` may be the same
  for (std::int64_t r = 0; r < rows; ++r) {
    matrix_row(columns.data(), from + r * dim, dim, result);
    std::memcpy(to + r * dim, result, static_cast<std::size_t>(dim) * sizeof(float));
  }
}

}  // namespace TQAI_LOCAL

TQAI_INLINE Rotation::Rotation(int head_dim, RotationKind kind, std::uint64_t seed)
    : head_dim_(checked_head_dim("head_dim", head_dim)),
      kind_(resolved(kind, head_dim)),
      seed_(seed) {
  const UsualArithmetic usual;
  const auto dim = static_cast<std::size_t>(head_dim);
  if (kind_ == RotationKind::hadamard) {
    Xoshiro256 random(seed);
    signs_.resize(dim);
    for (float& sign : signs_) sign = random.sign();
    return;
  }
  const std::vector<double> matrix = haar_matrix(head_dim, seed);
  matrix_.resize(dim * dim);
  transposed_.resize(dim * dim);
  for (std::size_t i = 0; i < dim; ++i) {
    for (std::size_t j = 0; j < dim; ++j) {
      matrix_[i * dim + j] = static_cast<float>(matrix[i * dim + j]);
      transposed_[j * dim + i] = matrix_[i * dim + j];
    }
  }
}

TQAI_INLINE void Rotation::apply(const float* x, float* y, std::int64_t rows) const {
  check_rows(x, y, rows);
  const UsualArithmetic usual;
  if (kind_ == RotationKind::haar) return multiply_rows(transposed_, x, y, rows, head_dim_);
  const float scale = hadamard_scale(head_dim_);
  for (std::int64_t r = 0; r < rows; ++r) {
    float* row = y + r * head_dim_;
    multiply_row(x + r * head_dim_, signs_.data(), head_dim_, row);
    fwht_row(row, head_dim_);
    scale_row(row, head_dim_, scale);
  }
}

TQAI_INLINE void Rotation::apply_transposed(const float* y, float* x, std::int64_t rows) const {
  check_rows(y, x, rows);
  const UsualArithmetic usual;
  if (kind_ == RotationKind::haar) return multiply_rows(matrix_, y, x, rows, head_dim_);
  const float scale = hadamard_scale(head_dim_);
  for (std::int64_t r = 0; r < rows; ++r) {
    float* row = x + r * head_dim_;
    std::memmove(row, y + r * head_dim_, static_cast<std::size_t>(head_dim_) * sizeof(float));
    fwht_row(row, head_dim_);
    scale_signed_row(row, head_dim_, scale, signs_.data());
  }
}

TQAI_INLINE void Rotation::check_views(std::int64_t in_rows, std::int64_t in_cols,
                                       std::int64_t out_rows, std::int64_t out_cols) const {
  if (in_cols == head_dim_ && out_cols == head_dim_ && in_rows == out_rows) return;
  const auto shape = [](std::int64_t rows, std::int64_t cols) {
    return "[" + std::to_string(rows) + ", " + std::to_string(cols) + "]";
  };
  throw ValueError("rotation of " + shape(in_rows, in_cols) + " into " + shape(out_rows, out_cols) +
                   "; allowed: both [rows, " + std::to_string(head_dim_) + "]");
}

}  // namespace tqai
