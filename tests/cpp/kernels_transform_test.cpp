// Queries for keys in a basis, multiplied in integers: every level beside the scalar one, and that
// beside double.
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <span>
#include <tqai/key_basis.hpp>
#include <vector>

#include "basis_helpers.hpp"
#include "every_level.hpp"
#include "kernels/kernels.hpp"
#include "kernels_helpers.hpp"

namespace tqai {
namespace {

using test::learnt;
using test::random_engine;

constexpr int kDims[] = {8, 9, 16, 40, 64, 80, 128};

class TransformLevels : public test::Levels {};

// y = Fᵀ x in double, and how far roundings may take integers from it.
struct Product {
  Product(const KeyBasis::Head& of, const test::Matrices& matrices, std::span<const float> x,
          int c) {
    double largest = 0.0;
    double lengths = 0.0;  // Σ |x_k f_k|
    double column = 0.0;   // Σ |F_kc / f_k|
    for (std::size_t k = 0; k < x.size(); ++k) {
      const double number = matrices.synthesis.row(k)[c];
      const double factor = of.query_factors[k];
      const double part = std::abs(x[k] * factor);
      sum += number * x[k];
      largest = std::max(largest, part);
      lengths += part;
      column += std::abs(number / factor);
    }
    const double unit = largest / kernels::most_query_number(static_cast<int>(x.size()));
    bound = 0.5 * (unit * column + of.query_scale * lengths) +
            0.25 * static_cast<double>(x.size()) * unit * of.query_scale + 1e-6 * std::abs(sum);
  }

  double sum = 0.0;
  double bound = 0.0;
};

TEST_P(TransformLevels, MultiplyQueriesAlike) {
  auto engine = random_engine(43);
  for (const int dim : kDims) {
    const auto basis = learnt(dim, 4);
    const KeyBasis::Head of = basis->head(0);
    const kernels::QueryTransform transform(of);
    const test::Matrices matrices = test::matrices_of(*basis, 0);
    const std::int64_t stride = padded_dim(dim);
    for (int count = 1; count <= kernels::kMaxRows; ++count) {
      auto queries = test::random_normal(static_cast<std::size_t>(count * stride), engine);
      if (count == 2) std::fill_n(queries.begin(), stride, 0.0F);
      if (count == 3) std::fill_n(queries.begin(), stride, 1e30F);
      std::vector<float> by_scalar(queries.size(), -1.0F);
      std::vector<float> by_level(queries.size(), -1.0F);
      scalar().transform_queries(transform, dim, queries.data(), count, stride, by_scalar.data());
      level().transform_queries(transform, dim, queries.data(), count, stride, by_level.data());
      ASSERT_EQ(by_level, by_scalar) << "d " << dim << ", rows " << count;
      for (int r = 0; r < count; ++r) {
        const auto row = std::span(queries).subspan(static_cast<std::size_t>(r * stride),
                                                    static_cast<std::size_t>(dim));
        for (int c = 0; c < dim; ++c) {
          const Product product(of, matrices, row, c);
          ASSERT_NEAR(by_level[static_cast<std::size_t>(r * stride + c)], product.sum,
                      product.bound);
        }
        for (std::int64_t c = dim; c < stride; ++c) {
          ASSERT_EQ(by_level[static_cast<std::size_t>(r * stride + c)], 0.0F);
        }
      }
    }
  }
}

// Integers as large as they may be: all of a query, and of a column, of one size and sign.
TEST_P(TransformLevels, MultiplyTheLargestQueries) {
  for (const int dim : kDims) {
    const int most = kernels::most_query_number(dim);
    const auto size = static_cast<std::size_t>(dim);
    const auto padded = static_cast<std::size_t>(padded_dim(dim));
    const auto number = static_cast<std::int16_t>(KeyBasis::kMostColumn / std::sqrt(dim));
    std::vector<std::int16_t> numbers((size + 1) / 2 * padded * 2);
    for (std::size_t k = 0; k < size; ++k) {
      for (std::size_t c = 0; c < size; ++c) {
        numbers[((c / 16 * ((size + 1) / 2) + k / 2) * 16 + c % 16) * 2 + k % 2] =
            c % 2 == 0 ? number : static_cast<std::int16_t>(-number);
      }
    }
    const std::vector<float> factors(size, 1.0F);
    KeyBasis::Head of{};
    of.query_numbers = numbers;
    of.query_factors = factors;
    of.query_scale = 1.0F;
    const std::vector<float> query(padded, static_cast<float>(most));
    std::vector<float> found(padded);
    level().transform_queries(kernels::QueryTransform(of), dim, query.data(), 1,
                              static_cast<std::int64_t>(padded), found.data());
    const double expected = static_cast<double>(dim) * number * most;
    ASSERT_LT(expected, std::ldexp(1.0, 31));
    for (std::size_t c = 0; c < size; ++c) {
      ASSERT_NEAR(found[c], c % 2 == 0 ? expected : -expected, 2e-7 * expected);
    }
  }
}

TQAI_AT_EVERY_LEVEL(TransformLevels);

}  // namespace
}  // namespace tqai
