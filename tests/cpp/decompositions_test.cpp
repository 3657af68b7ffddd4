#include "decompositions.hpp"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <vector>

#include "basis_helpers.hpp"
#include "reference.hpp"

namespace tqai {
namespace {

using test::gaussian;
using test::largest_difference;
using test::random_engine;
using test::random_normal;

constexpr int kDims[] = {1, 2, 3, 8, 9, 33, 64};

SquareMatrix diagonal(const std::vector<double>& values) {
  SquareMatrix result(values.size());
  for (std::size_t i = 0; i < values.size(); ++i) result.row(i)[i] = values[i];
  return result;
}

void expect_eigenvectors(const SquareMatrix& a) {
  const Spectrum of = eigenvectors(a);
  const double bound = 1e-13 * static_cast<double>(a.dim()) *
                       std::max({std::abs(of.values.front()), std::abs(of.values.back()), 1e-300});
  EXPECT_TRUE(std::is_sorted(of.values.rbegin(), of.values.rend()));
  const SquareMatrix columns = transposed(of.vectors);
  EXPECT_LE(largest_difference(product(columns, product(diagonal(of.values), of.vectors)), a),
            bound);
  EXPECT_LE(largest_difference(product(of.vectors, columns), SquareMatrix::identity(a.dim())),
            1e-13 * static_cast<double>(a.dim()));
}

TEST(Decompositions, EigenvectorsGiveTheMatrixBack) {
  for (const int dim : kDims) {
    const SquareMatrix a = gaussian(static_cast<std::size_t>(dim), 1);
    const SquareMatrix squares = product(a, transposed(a));
    expect_eigenvectors(squares);
    SquareMatrix sum = a;
    for (std::size_t i = 0; i < a.dim(); ++i) {
      for (std::size_t j = 0; j < a.dim(); ++j) sum.row(i)[j] += a.row(j)[i];
    }
    expect_eigenvectors(sum);  // of both signs
  }
}

TEST(Decompositions, EigenvectorsOfDegenerateMatrices) {
  expect_eigenvectors(SquareMatrix(16));
  expect_eigenvectors(SquareMatrix::identity(16));
  expect_eigenvectors(diagonal({3.0, 1.0, 2.0, 2.0, 1e-30, 0.0, 1e6, -4.0}));
  SquareMatrix ones(24);
  std::fill_n(ones.row(0), 24 * 24, 1.0);
  expect_eigenvectors(ones);
  SquareMatrix blocks(12);  // falls apart in the middle
  for (std::size_t i = 0; i < 12; ++i) {
    for (std::size_t j = i / 6 * 6; j < i / 6 * 6 + 6; ++j) {
      blocks.row(i)[j] = 1.0 / (1.0 + static_cast<double>(i + j));
    }
  }
  expect_eigenvectors(blocks);
}

TEST(Decompositions, EigenvectorsOfAWideSpectrum) {
  const Spectrum turn = eigenvectors([] {
    const SquareMatrix a = gaussian(48, 2);
    return product(a, transposed(a));
  }());
  std::vector<double> values(48);
  for (std::size_t i = 0; i < 48; ++i) values[i] = std::pow(10.0, -0.25 * static_cast<double>(i));
  const SquareMatrix a = product(transposed(turn.vectors), product(diagonal(values), turn.vectors));
  const auto found = eigenvectors(a).values;
  for (std::size_t i = 0; i < 48; ++i) EXPECT_NEAR(found[i], values[i], 1e-13) << i;
}

TEST(Decompositions, GeometricMeansStandOnTheDiagonal) {
  for (const int dim : kDims) {
    for (const double spread : {0.0, 0.1, 1.0, 4.0}) {
      const auto size = static_cast<std::size_t>(dim);
      auto engine = random_engine(3);
      std::vector<double> lengths;
      double mean = 0.0;
      for (const float value : random_normal(size, engine)) {
        lengths.push_back(std::exp(spread * static_cast<double>(value)));
        mean += spread * static_cast<double>(value) / dim;
      }
      mean = std::exp(mean);
      SquareMatrix rows = SquareMatrix::identity(size);  // becomes Pᵀ
      const SquareMatrix lower =
          geometric_mean_decomposition(lengths, rows, SquareMatrix::identity(size));
      for (std::size_t i = 0; i < size; ++i) {
        EXPECT_EQ(lower.row(i)[i], 1.0);
        for (std::size_t j = i + 1; j < size; ++j) EXPECT_EQ(lower.row(i)[j], 0.0);
      }
      EXPECT_LE(largest_difference(product(rows, transposed(rows)), SquareMatrix::identity(size)),
                1e-12);
      // Pᵀ diag(s²) P = Rᵀ R, R = mean · Lᵀ.
      std::vector<double> squares;
      for (const double length : lengths) squares.push_back(length * length / (mean * mean));
      const SquareMatrix turned = product(rows, product(diagonal(squares), transposed(rows)));
      EXPECT_LE(largest_difference(turned, product(lower, transposed(lower))),
                1e-11 * *std::max_element(squares.begin(), squares.end()))
          << "d " << dim << ", spread " << spread;
    }
  }
}

TEST(Decompositions, GeometricMeansSpreadMoments) {
  for (const int dim : {16, 64, 128}) {
    const auto size = static_cast<std::size_t>(dim);
    auto engine = random_engine(5);
    std::vector<double> lengths;
    double mean = 0.0;
    for (const float value : random_normal(size, engine)) {
      lengths.push_back(std::exp(0.5 * static_cast<double>(value)));
      mean += 0.5 * static_cast<double>(value) / dim;
    }
    mean = std::exp(mean);
    // Larger where lengths are, as queries' are.
    const SquareMatrix a = product(diagonal(lengths), gaussian(size, 6));
    const SquareMatrix moments = product(a, transposed(a));
    SquareMatrix rows = SquareMatrix::identity(size);  // becomes Pᵀ
    const SquareMatrix lower = geometric_mean_decomposition(lengths, rows, moments);
    // Qᵀ = R⁻ᵀ Pᵀ diag(s), R = mean · Lᵀ.
    const SquareMatrix columns = product(inverse(lower), product(rows, diagonal(lengths)));
    double largest = 0.0;
    const SquareMatrix turned = product(columns, product(moments, transposed(columns)));
    for (std::size_t i = 0; i < size; ++i) {
      largest = std::max(largest, turned.row(i)[i] / (mean * mean));
    }
    EXPECT_NEAR(turned.trace() / (mean * mean), moments.trace(), 1e-9 * moments.trace());
    EXPECT_LE(largest, 2.0 * moments.trace() / dim) << "d " << dim;  // 3.7 to 9.2 otherwise
  }
}

TEST(Decompositions, InverseTimesTheMatrixIsTheIdentity) {
  for (const int dim : kDims) {
    SquareMatrix a = gaussian(static_cast<std::size_t>(dim), 4);
    if (dim > 1) a.row(0)[0] = 0.0;  // no pivot where one is looked for first
    EXPECT_LE(largest_difference(product(inverse(a), a),
                                 SquareMatrix::identity(static_cast<std::size_t>(dim))),
              1e-10);
  }
}

}  // namespace
}  // namespace tqai
