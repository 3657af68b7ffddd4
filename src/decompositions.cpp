#include "decompositions.hpp"

#include <algorithm>
#include <cmath>
#include <limits>
#include <numeric>
#include <tqai/export.hpp>
#include <utility>

namespace tqai {
namespace TQAI_LOCAL {

TQAI_INLINE double dot_product(const double* a, const double* b, std::size_t count) noexcept {
  // Four sums: one would wait for each addition.
  double sums[4] = {};
  std::size_t i = 0;
  for (; i + 4 <= count; i += 4) {
    for (std::size_t s = 0; s < 4; ++s) sums[s] += a[i + s] * b[i + s];
  }
  for (; i < count; ++i) sums[0] += a[i] * b[i];
  return (sums[0] + sums[1]) + (sums[2] + sums[3]);
}

// to += factor · from
TQAI_INLINE void add_multiple(const double* from, double factor, std::size_t count,
                              double* to) noexcept {
  for (std::size_t i = 0; i < count; ++i) to[i] += factor * from[i];
}

// (a, b) ← (c a + s b, c b − s a)
TQAI_INLINE void turn_rows(double* a, double* b, double c, double s, std::size_t count) noexcept {
  for (std::size_t i = 0; i < count; ++i) {
    const double turned = c * a[i] + s * b[i];
    b[i] = c * b[i] - s * a[i];
    a[i] = turned;
  }
}

// A symmetric matrix A = Qᵀ T Q, T tridiagonal.
struct Tridiagonal {
  std::vector<double> diagonal;
  std::vector<double> beside;  // [dim], of i and i + 1; the last is 0
  SquareMatrix rows;           // Q
};

TQAI_INLINE Tridiagonal tridiagonal(SquareMatrix a) {
  const std::size_t dim = a.dim();
  // Column k below the diagonal goes to a multiple of the first unit vector by I − 2 v vᵀ, v being
  // row k, of length 1 and zero up to k.
  SquareMatrix reflections(dim);
  std::vector<double> product(dim);
  for (std::size_t k = 0; k + 2 < dim; ++k) {
    double* v = reflections.row(k);
    std::copy(a.row(k) + k + 1, a.row(k) + dim, v + k + 1);
    const double below = dot_product(v + k + 2, v + k + 2, dim - k - 2);
    if (below == 0.0) {
      std::fill_n(v, dim, 0.0);
      continue;
    }
    const double length = std::sqrt(below + v[k + 1] * v[k + 1]);
    v[k + 1] += std::copysign(length, v[k + 1]);  // nothing cancels
    const double inverse = 1.0 / std::sqrt(below + v[k + 1] * v[k + 1]);
    for (std::size_t i = k + 1; i < dim; ++i) v[i] *= inverse;
    // A ← A − v wᵀ − w vᵀ with w = 2 (A v − (vᵀ A v) v), in rows and columns from k on.
    const std::size_t left = dim - k - 1;
    for (std::size_t i = k; i < dim; ++i) {
      product[i] = 2.0 * dot_product(a.row(i) + k + 1, v + k + 1, left);
    }
    const double both = dot_product(product.data() + k + 1, v + k + 1, left);
    add_multiple(v + k + 1, -both, left, product.data() + k + 1);
    for (std::size_t i = k; i < dim; ++i) {
      add_multiple(product.data() + k, -v[i], dim - k, a.row(i) + k);
      add_multiple(v + k, -product[i], dim - k, a.row(i) + k);
    }
  }
  Tridiagonal result{std::vector<double>(dim), std::vector<double>(dim),
                     SquareMatrix::identity(dim)};
  for (std::size_t i = 0; i < dim; ++i) {
    result.diagonal[i] = a.row(i)[i];
    if (i + 1 < dim) result.beside[i] = a.row(i)[i + 1];
  }
  // Q = … H₁ H₀ from the right, so that what is still the identity is left out.
  for (std::size_t k = dim < 2 ? 0 : dim - 2; k-- > 0;) {
    const double* v = reflections.row(k);
    for (std::size_t i = k + 1; i < dim; ++i) {
      double* row = result.rows.row(i) + k + 1;
      const double along = 2.0 * dot_product(row, v + k + 1, dim - k - 1);
      add_multiple(v + k + 1, -along, dim - k - 1, row);
    }
  }
  return result;
}

// The last of the values that hang together with number `first`.
TQAI_INLINE std::size_t block_end(const std::vector<double>& d, const std::vector<double>& e,
                                  std::size_t first) noexcept {
  std::size_t last = first;
  while (last + 1 < d.size()) {
    const double size = std::abs(d[last]) + std::abs(d[last + 1]);
    if (std::abs(e[last]) <= std::numeric_limits<double>::epsilon() * size) break;
    ++last;
  }
  return last;
}

// One implicit QL step on a tridiagonal block: a rotation makes an entry outside the band, and the
// next ones chase it from the block's end to its beginning. Rotations go to `rows` as well.
TQAI_INLINE void ql_step(std::vector<double>& d, std::vector<double>& e, std::size_t first,
                         std::size_t last, SquareMatrix& rows) noexcept {
  // Wilkinson's shift: the eigenvalue of the first 2 × 2 block that is nearer to d[first].
  const double half = (d[first + 1] - d[first]) / (2.0 * e[first]);
  const double shift = d[first] - e[first] / (half + std::copysign(std::hypot(half, 1.0), half));
  double bulge = d[last] - shift;
  double sine = 1.0;
  double cosine = 1.0;
  double moved = 0.0;  // from one diagonal entry to the next
  for (std::size_t i = last; i-- > first;) {
    const double outside = sine * e[i];
    const double inside = cosine * e[i];
    const double length = std::hypot(outside, bulge);
    e[i + 1] = length;
    if (length == 0.0) {  // the block falls apart here
      d[i + 1] -= moved;
      e[last] = 0.0;
      return;
    }
    sine = outside / length;
    cosine = bulge / length;
    const double above = d[i + 1] - moved;
    const double turned = (d[i] - above) * sine + 2.0 * cosine * inside;
    moved = sine * turned;
    d[i + 1] = above + moved;
    bulge = cosine * turned - inside;
    turn_rows(rows.row(i + 1), rows.row(i), cosine, sine, rows.dim());
  }
  d[first] -= moved;
  e[first] = bulge;
  e[last] = 0.0;
}

// How much larger than the mean of all a moment may be.
constexpr double kMostMoment = 4.0 / 3.0;

// A pair of what is not yet decomposed, s[above] ≥ mean ≥ s[below], and what turns it: of P and R's
// columns by `cosine` and ±`sine`, of Q and R's rows by `row_cosine` and ±`row_sine`.
struct MeanPair {
  MeanPair(double above, double below, double mean) noexcept {
    const double a = above * above;
    const double b = below * below;
    if (a - b <= 1e-12 * mean * mean) return;
    cosine = std::sqrt(std::clamp((mean * mean - b) / (a - b), 0.0, 1.0));
    sine = std::sqrt(std::clamp((a - mean * mean) / (a - b), 0.0, 1.0));
    row_cosine = cosine * above / mean;
    row_sine = sine * below / mean;
  }

  double cosine = 1.0;
  double sine = 0.0;
  double row_cosine = 1.0;
  double row_sine = 0.0;
};

// What is taken for step k.
struct PairChoice {
  std::size_t above;
  std::size_t below;
  double sign;
};

// Of all pairs the one with the largest quotient among those whose column of Q gets a moment of not
// much more than their mean; where there is none, the one with the least moment.
TQAI_INLINE PairChoice choose_pair(const std::vector<double>& s, std::size_t k, double mean,
                                   const SquareMatrix& moments, double mean_moment) {
  const std::size_t dim = s.size();
  PairChoice best{k, k + 1, 1.0};
  bool found_even = false;
  double best_quotient = 0.0;
  double least = std::numeric_limits<double>::infinity();
  for (std::size_t i = k; i < dim; ++i) {
    if (s[i] < mean) continue;
    for (std::size_t j = k; j < dim; ++j) {
      if (j == i || s[j] > mean || (found_even && s[i] <= best_quotient * s[j])) continue;
      const MeanPair pair(s[i], s[j], mean);
      const double own = pair.row_cosine * pair.row_cosine * moments.row(i)[i] +
                         pair.row_sine * pair.row_sine * moments.row(j)[j];
      const double cross = 2.0 * pair.row_cosine * pair.row_sine * moments.row(i)[j];
      const double moment = own - std::abs(cross);
      if (moment <= kMostMoment * mean_moment) {
        found_even = true;
        best_quotient = s[i] / s[j];
      } else if (found_even || moment >= least) {
        continue;
      }
      least = moment;
      best = {i, j, cross > 0.0 ? -1.0 : 1.0};
    }
  }
  return best;
}

// Rows and columns i and j of a symmetric matrix.
TQAI_INLINE void swap_both(SquareMatrix& symmetric, std::size_t i, std::size_t j) {
  const std::size_t dim = symmetric.dim();
  std::swap_ranges(symmetric.row(i), symmetric.row(i) + dim, symmetric.row(j));
  for (std::size_t r = 0; r < dim; ++r) std::swap(symmetric.row(r)[i], symmetric.row(r)[j]);
}
TQAI_INLINE void turn_both(SquareMatrix& symmetric, std::size_t i, double c, double s) {
  turn_rows(symmetric.row(i), symmetric.row(i + 1), c, s, symmetric.dim());
  for (std::size_t r = 0; r < symmetric.dim(); ++r) {
    double* pair = symmetric.row(r) + i;
    turn_rows(pair, pair + 1, c, s, 1);
  }
}

}  // namespace TQAI_LOCAL

TQAI_INLINE SquareMatrix SquareMatrix::identity(std::size_t dim) {
  SquareMatrix result(dim);
  for (std::size_t i = 0; i < dim; ++i) result.row(i)[i] = 1.0;
  return result;
}

TQAI_INLINE double SquareMatrix::trace() const noexcept {
  double sum = 0.0;
  for (std::size_t i = 0; i < dim_; ++i) sum += row(i)[i];
  return sum;
}

TQAI_INLINE SquareMatrix product(const SquareMatrix& a, const SquareMatrix& b) {
  const std::size_t dim = a.dim();
  SquareMatrix result(dim);
  for (std::size_t i = 0; i < dim; ++i) {
    for (std::size_t k = 0; k < dim; ++k) add_multiple(b.row(k), a.row(i)[k], dim, result.row(i));
  }
  return result;
}

TQAI_INLINE SquareMatrix transposed(const SquareMatrix& matrix) {
  SquareMatrix turned(matrix.dim());
  for (std::size_t i = 0; i < matrix.dim(); ++i) {
    for (std::size_t j = 0; j < matrix.dim(); ++j) turned.row(j)[i] = matrix.row(i)[j];
  }
  return turned;
}

TQAI_INLINE Spectrum eigenvectors(const SquareMatrix& symmetric) {
  const std::size_t dim = symmetric.dim();
  auto [d, e, rows] = tridiagonal(symmetric);
  // A value takes two or three steps; the limit is against what is no number.
  constexpr int kMostSteps = 60;
  for (std::size_t first = 0; first < dim; ++first) {
    for (int step = 0; step < kMostSteps; ++step) {
      const std::size_t last = block_end(d, e, first);
      if (last == first) break;
      ql_step(d, e, first, last, rows);
    }
  }
  std::vector<std::size_t> order(dim);
  std::iota(order.begin(), order.end(), std::size_t{0});
  // Stable by itself: std::stable_sort asks for memory of its own.
  std::sort(order.begin(), order.end(), [&values = d](std::size_t a, std::size_t b) {
    return values[a] > values[b] || (values[a] == values[b] && a < b);
  });
  Spectrum result{std::vector<double>(dim), SquareMatrix(dim)};
  for (std::size_t i = 0; i < dim; ++i) {
    result.values[i] = d[order[i]];
    std::copy_n(rows.row(order[i]), dim, result.vectors.row(i));
  }
  return result;
}

TQAI_INLINE SquareMatrix geometric_mean_decomposition(std::vector<double> s, SquareMatrix& rows,
                                                      SquareMatrix moments) {
  const std::size_t dim = s.size();
  double logarithms = 0.0;
  for (const double value : s) logarithms += std::log(value);
  const double mean = std::exp(logarithms / static_cast<double>(dim));
  const double mean_moment = moments.trace() / static_cast<double>(dim);
  SquareMatrix lower(dim);  // Rᵀ: its row k is R's column k
  const auto exchange = [&](std::size_t i, std::size_t j, std::size_t k) {
    if (i == j) return;
    std::swap(s[i], s[j]);
    std::swap_ranges(lower.row(i), lower.row(i) + k, lower.row(j));
    std::swap_ranges(rows.row(i), rows.row(i) + dim, rows.row(j));
    swap_both(moments, i, j);
  };
  for (std::size_t k = 0; k + 1 < dim; ++k) {
    const PairChoice choice = choose_pair(s, k, mean, moments, mean_moment);
    exchange(k, choice.above, k);
    exchange(k + 1, choice.below == k ? choice.above : choice.below, k);
    // Columns k and k + 1 of R and P are turned so that column k gets the mean's length; then rows
    // k and k + 1 of R, and columns of Q, so that it stands on the diagonal.
    const MeanPair pair(s[k], s[k + 1], mean);
    const double cosine = pair.cosine;
    const double sine = choice.sign * pair.sine;
    turn_rows(rows.row(k), rows.row(k + 1), cosine, sine, dim);
    turn_rows(lower.row(k), lower.row(k + 1), cosine, sine, k);
    turn_both(moments, k, pair.row_cosine, choice.sign * pair.row_sine);
    lower.row(k)[k] = mean;
    lower.row(k + 1)[k] = -cosine * sine * (s[k] * s[k] - s[k + 1] * s[k + 1]) / mean;
    s[k + 1] = s[k] * s[k + 1] / mean;
  }
  for (std::size_t i = 0; i < dim; ++i) {
    for (std::size_t j = 0; j < i; ++j) lower.row(i)[j] /= mean;
    lower.row(i)[i] = 1.0;
  }
  return lower;
}

TQAI_INLINE SquareMatrix inverse(SquareMatrix matrix) {
  const std::size_t dim = matrix.dim();
  SquareMatrix result = SquareMatrix::identity(dim);
  for (std::size_t k = 0; k < dim; ++k) {
    std::size_t pivot = k;
    for (std::size_t i = k + 1; i < dim; ++i) {
      if (std::abs(matrix.row(i)[k]) > std::abs(matrix.row(pivot)[k])) pivot = i;
    }
    if (pivot != k) {
      std::swap_ranges(matrix.row(k), matrix.row(k) + dim, matrix.row(pivot));
      std::swap_ranges(result.row(k), result.row(k) + dim, result.row(pivot));
    }
    const double factor = 1.0 / matrix.row(k)[k];
    for (std::size_t c = 0; c < dim; ++c) {
      matrix.row(k)[c] *= factor;
      result.row(k)[c] *= factor;
    }
    for (std::size_t i = 0; i < dim; ++i) {
      const double times = -matrix.row(i)[k];
      if (i == k || times == 0.0) continue;
      add_multiple(matrix.row(k) + k, times, dim - k, matrix.row(i) + k);
      add_multiple(result.row(k), times, dim, result.row(i));
    }
  }
  return result;
}

}  // namespace tqai
