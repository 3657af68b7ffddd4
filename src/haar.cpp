// Householder's QR (Golub, Van Loan: Matrix Computations, §5.2), and not a library's: compiled
// here, a header library's code would carry weak symbols into the application, where the linker
// merges them with the application's own, which may be built for another processor and align
// otherwise.
#include "haar.hpp"

#include <cmath>
#include <cstddef>
#include <tqai/export.hpp>

#include "random.hpp"

namespace tqai {
namespace TQAI_LOCAL {

// A square matrix, row-major, whose rows and columns from some index on are reflected.
class Square {
 public:
  explicit Square(std::size_t dim) : dim_(dim), values_(dim * dim), sums_(dim) {}

  double* row(std::size_t i) noexcept { return values_.data() + i * dim_; }
  std::vector<double>& values() noexcept { return values_; }

  // The part from row and column `first` on becomes (I − 2 v vᵀ) times itself. v: [dim], of length
  // 1, zero before `first`.
  void reflect(const double* v, std::size_t first) noexcept {
    for (std::size_t j = first; j < dim_; ++j) sums_[j] = 0.0;
    for (std::size_t i = first; i < dim_; ++i) {
      const double* from = row(i);
      for (std::size_t j = first; j < dim_; ++j) sums_[j] += v[i] * from[j];
    }
    for (std::size_t i = first; i < dim_; ++i) {
      double* to = row(i);
      const double factor = 2.0 * v[i];
      for (std::size_t j = first; j < dim_; ++j) to[j] -= factor * sums_[j];
    }
  }

 private:
  std::size_t dim_;
  std::vector<double> values_;
  std::vector<double> sums_;
};

}  // namespace TQAI_LOCAL

TQAI_INLINE std::vector<double> haar_matrix(int dim, std::uint64_t seed) {
  const auto size = static_cast<std::size_t>(dim);
  Gaussian random(seed);
  Square gaussian(size);
  for (double& value : gaussian.values()) value = random.next();

  // Column k goes to a multiple of the k-th unit vector, by the reflection along reflections[k].
  std::vector<double> reflections(size * size);
  std::vector<double> signs(size);
  for (std::size_t k = 0; k < size; ++k) {
    double* v = reflections.data() + k * size;
    double squares = 0.0;
    for (std::size_t i = k; i < size; ++i) {
      v[i] = gaussian.row(i)[k];
      squares += v[i] * v[i];
    }
    const double length = std::sqrt(squares);
    // Away from the column's own side, so that nothing cancels; R's diagonal has that sign.
    signs[k] = v[k] < 0.0 ? 1.0 : -1.0;
    squares -= v[k] * v[k];
    v[k] -= signs[k] * length;
    squares += v[k] * v[k];
    const double inverse = 1.0 / std::sqrt(squares);
    for (std::size_t i = k; i < size; ++i) v[i] *= inverse;
    gaussian.reflect(v, k);
  }

  Square q(size);
  for (std::size_t k = 0; k < size; ++k) q.row(k)[k] = signs[k];
  for (std::size_t k = size; k-- > 0;) q.reflect(reflections.data() + k * size, k);
  return std::move(q.values());
}

}  // namespace tqai
