// Keys and queries with a structure, and bases learnt from them.
#pragma once

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <map>
#include <memory>
#include <random>
#include <span>
#include <tqai/half.hpp>
#include <tqai/key_basis.hpp>
#include <tuple>
#include <vector>

#include "decompositions.hpp"
#include "reference.hpp"

namespace tqai::test {

inline double largest_difference(const SquareMatrix& a, const SquareMatrix& b) {
  double most = 0.0;
  for (std::size_t i = 0; i < a.dim() * a.dim(); ++i) {
    most = std::max(most, std::abs(a.row(0)[i] - b.row(0)[i]));
  }
  return most;
}

inline SquareMatrix matrix(std::span<const double> values, std::size_t dim) {
  SquareMatrix result(dim);
  std::copy(values.begin(), values.end(), result.row(0));
  return result;
}

inline SquareMatrix gaussian(std::size_t dim, std::uint64_t seed) {
  auto engine = random_engine(seed);
  SquareMatrix result(dim);
  const auto values = random_normal(dim * dim, engine);
  std::copy(values.begin(), values.end(), result.row(0));
  return result;
}

// Vectors x = A g with g Gaussian: moments A Aᵀ.
inline std::vector<float> correlated(int dim, int tokens, const SquareMatrix& a,
                                     std::mt19937_64& engine) {
  const auto size = static_cast<std::size_t>(dim);
  std::vector<float> vectors(size * static_cast<std::size_t>(tokens));
  for (std::size_t t = 0; t < static_cast<std::size_t>(tokens); ++t) {
    const auto g = random_normal(size, engine);
    for (std::size_t i = 0; i < size; ++i) {
      double sum = 0.0;
      for (std::size_t k = 0; k < size; ++k) sum += a.row(i)[k] * static_cast<double>(g[k]);
      vectors[t * size + i] = static_cast<float>(sum);
    }
  }
  return vectors;
}

// A mixture with a spectrum that falls.
inline SquareMatrix mixture(int dim, std::uint64_t seed, double fall = 0.1) {
  SquareMatrix a = gaussian(static_cast<std::size_t>(dim), seed);
  for (std::size_t i = 0; i < a.dim(); ++i) {
    for (std::size_t j = 0; j < a.dim(); ++j) {
      a.row(i)[j] *= std::exp(-fall * static_cast<double>(j));
    }
  }
  return a;
}

inline KeyMoments moments_of(int dim, int tokens, int heads = 1, std::uint64_t seed = 5) {
  KeyMoments moments(heads, dim);
  auto engine = random_engine(seed);
  for (int head = 0; head < heads; ++head) {
    const auto of_head = static_cast<std::uint64_t>(head);
    moments.add_keys(head, correlated(dim, tokens, mixture(dim, 6 + of_head), engine));
    moments.add_queries(head, correlated(dim, 2 * tokens, mixture(dim, 16 + of_head), engine));
  }
  return moments;
}

// The basis of `moments_of`'s keys and queries, one of each kind for all tests of a program.
inline std::shared_ptr<const KeyBasis> learnt(int dim, int bits, int heads = 1) {
  static std::map<std::tuple<int, int, int>, std::shared_ptr<const KeyBasis>> bases;
  auto& basis = bases[{dim, bits, heads}];
  if (!basis) {
    basis =
        std::make_shared<const KeyBasis>(KeyBasis::learn(moments_of(dim, 3 * dim, heads), bits));
  }
  return basis;
}

// E, L and F of a head.
struct Matrices {
  SquareMatrix analysis;
  SquareMatrix lower;
  SquareMatrix synthesis;
};

inline Matrices matrices_of(const KeyBasis& basis, int head) {
  const auto dim = static_cast<std::size_t>(basis.head_dim());
  const KeyBasis::Head halves = basis.head(head);
  Matrices result{SquareMatrix(dim), SquareMatrix::identity(dim), SquareMatrix(dim)};
  for (std::size_t i = 0; i < dim * dim; ++i) {
    result.analysis.row(0)[i] = from_half(halves.analysis[i]) * halves.analysis_scale;
    result.synthesis.row(0)[i] = from_half(halves.synthesis[i]) * halves.synthesis_scale;
  }
  std::size_t next = 0;
  for (std::size_t i = 0; i < dim; ++i) {
    for (std::size_t j = 0; j < i; ++j) result.lower.row(i)[j] = from_half(halves.feedback[next++]);
  }
  EXPECT_EQ(next, halves.feedback.size());
  return result;
}

}  // namespace tqai::test
