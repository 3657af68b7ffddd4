// What a basis for keys is learnt from, the decompositions behind it, and what comes out.
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <tqai/cache.hpp>
#include <tqai/half.hpp>
#include <tqai/key_basis.hpp>
#include <vector>

#include "basis_helpers.hpp"
#include "cache_helpers.hpp"
#include "decompositions.hpp"
#include "reference.hpp"

namespace tqai {
namespace {

using test::contains;
using test::correlated;
using test::gaussian;
using test::Matrices;
using test::matrices_of;
using test::message_of;
using test::mixture;
using test::moments_of;
using test::random_engine;
using test::random_normal;
using test::rope_of;

constexpr int kDims[] = {1, 2, 3, 8, 9, 33, 64};

SquareMatrix transposed(const SquareMatrix& a) {
  SquareMatrix result(a.dim());
  for (std::size_t i = 0; i < a.dim(); ++i) {
    for (std::size_t j = 0; j < a.dim(); ++j) result.row(i)[j] = a.row(j)[i];
  }
  return result;
}

SquareMatrix diagonal(const std::vector<double>& values) {
  SquareMatrix result(values.size());
  for (std::size_t i = 0; i < values.size(); ++i) result.row(i)[i] = values[i];
  return result;
}

double largest_difference(const SquareMatrix& a, const SquareMatrix& b) {
  double most = 0.0;
  for (std::size_t i = 0; i < a.dim() * a.dim(); ++i) {
    most = std::max(most, std::abs(a.row(0)[i] - b.row(0)[i]));
  }
  return most;
}

SquareMatrix matrix(std::span<const double> values, std::size_t dim) {
  SquareMatrix result(dim);
  std::copy(values.begin(), values.end(), result.row(0));
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

TEST(KeyMoments, AreThoseOfKeysLessTheirMeanAndOfQueries) {
  KeyMoments moments(2, 8);
  const std::vector<float> keys = {1, 2, 3, 4, 5, 6, 7, 8, 3, 2, 3, 4, 5, 6, 7, 0};
  moments.add_keys(1, std::span(keys).first(8));
  moments.add_keys(1, std::span(keys).last(8));
  moments.add_queries(1, keys);
  EXPECT_EQ(moments.tokens(0), 0.0);
  EXPECT_EQ(moments.tokens(1), 2.0);
  const auto central = moments.keys_until(1, 0);
  const auto plain = moments.queries_until(1, 0);
  EXPECT_DOUBLE_EQ(central[0], 1.0);
  EXPECT_DOUBLE_EQ(central[7], -4.0);
  EXPECT_DOUBLE_EQ(central[7 * 8], -4.0);
  EXPECT_DOUBLE_EQ(central[9], 0.0);
  EXPECT_DOUBLE_EQ(plain[0], 5.0);
  EXPECT_DOUBLE_EQ(plain[7], 4.0);
}

TEST(KeyMoments, AreTurnedBackToPositionZero) {
  constexpr int kDim = 24;
  constexpr int kTokens = 40;
  for (const auto layout : {Rope::Layout::half_split, Rope::Layout::interleaved}) {
    Rope rope = rope_of(16, layout);  // part of the head
    rope.sections = {0, 1, 0, 1, 1, 1, 0, 0};
    auto engine = random_engine(7);
    const auto plain = correlated(kDim, kTokens, mixture(kDim, 8), engine);
    auto turned = plain;
    std::vector<std::int64_t> positions(2 * kTokens);
    for (int t = 0; t < kTokens; ++t) {
      positions[static_cast<std::size_t>(t)] = 7 * t - 30;
      positions[static_cast<std::size_t>(kTokens + t)] = 1000 - t;
      std::vector<float> by_section[2];
      for (int section = 0; section < 2; ++section) {
        by_section[section].assign(plain.begin() + t * kDim, plain.begin() + (t + 1) * kDim);
        Rope one = rope;
        test::turn(one,
                   static_cast<double>(positions[static_cast<std::size_t>(section * kTokens + t)]),
                   by_section[section].data());
      }
      for (int f = 0; f < 8; ++f) {
        const auto& from = by_section[rope.sections[static_cast<std::size_t>(f)]];
        const bool half = layout == Rope::Layout::half_split;
        for (const int c : {half ? f : 2 * f, half ? f + 8 : 2 * f + 1}) {
          turned[static_cast<std::size_t>(t * kDim + c)] = from[static_cast<std::size_t>(c)];
        }
      }
    }
    KeyMoments of_plain(1, kDim);
    of_plain.add_keys(0, plain);
    of_plain.add_queries(0, plain);
    KeyMoments of_turned(1, kDim, rope);
    of_turned.add_keys(0, turned, positions);
    of_turned.add_queries(0, turned, positions);
    const auto size = static_cast<std::size_t>(kDim);
    EXPECT_LE(largest_difference(matrix(of_plain.keys_until(0, 0), size),
                                 matrix(of_turned.keys_until(0, 0), size)),
              1e-4);
    EXPECT_LE(largest_difference(matrix(of_plain.queries_until(0, 0), size),
                                 matrix(of_turned.queries_until(0, 0), size)),
              1e-4);
  }
}

TEST(KeyMoments, AreMeansOverPositions) {
  constexpr int kDim = 16;
  const Rope rope = rope_of(kDim);
  auto engine = random_engine(9);
  const auto keys = correlated(kDim, 30, mixture(kDim, 10), engine);
  KeyMoments moments(1, kDim, rope);
  // All at position 0: what was added is what is kept.
  moments.add_keys(0, keys, std::vector<std::int64_t>(30));
  for (const int last : {960, 2048, 4096, 32768}) {
    // Evenly spaced to 4096; beyond, the middle one of them is 2048: 32768 / 2^4.
    const int power = last == 32768 ? 4 : 1;
    std::vector<double> expected(kDim * kDim);
    for (int i = 0; i < 97; ++i) {
      auto turned = keys;
      const double position = std::floor(last * std::pow(i / 96.0, power));
      for (int t = 0; t < 30; ++t) test::turn(rope, position, turned.data() + t * kDim);
      KeyMoments there(1, kDim);
      there.add_keys(0, turned);
      const auto of_there = there.keys_until(0, 0);
      for (std::size_t k = 0; k < expected.size(); ++k) expected[k] += of_there[k] / 97;
    }
    EXPECT_LE(largest_difference(matrix(expected, kDim), matrix(moments.keys_until(0, last), kDim)),
              1e-4)
        << "to " << last;
  }
}

TEST(KeyMoments, PriorsWeighAsManyTokensAsTheySay) {
  constexpr int kDim = 8;
  std::vector<double> prior(kDim * kDim);
  for (std::size_t i = 0; i < kDim; ++i) prior[i * kDim + i] = i == 0 ? 800.0 : 0.0;
  KeyMoments moments(1, kDim);
  std::vector<float> keys(2 * kDim);
  keys[1] = 4.0F;  // mean 2, variance 4
  moments.add_keys(0, keys);
  moments.add_queries(0, keys);
  moments.add_queries(0, keys);  // two query heads
  moments.add_prior(0, prior, prior, 6.0);
  EXPECT_EQ(moments.tokens(0), 8.0);
  // Of one energy, 4 and 8, a quarter from the data.
  const auto of_keys = moments.keys_until(0, 0);
  EXPECT_NEAR(of_keys[0], 3.0, 1e-12);
  EXPECT_NEAR(of_keys[kDim + 1], 1.0, 1e-12);
  const auto of_queries = moments.queries_until(0, 0);
  EXPECT_NEAR(of_queries[0], 6.0, 1e-12);
  EXPECT_NEAR(of_queries[kDim + 1], 2.0, 1e-12);
  KeyMoments alone(1, kDim);
  alone.add_prior(0, prior, prior, 6.0);
  EXPECT_NEAR(alone.keys_until(0, 0)[0], 800.0, 1e-9);
}

TEST(KeyMoments, RefuseWhatHasNone) {
  KeyMoments moments(2, 16, rope_of(16));
  std::vector<float> keys(32, 1.0F);
  EXPECT_THROW(moments.add_keys(2, keys), IndexError);
  EXPECT_THROW(moments.add_queries(-1, keys), IndexError);
  EXPECT_THROW(moments.tokens(2), IndexError);
  EXPECT_TRUE(contains(message_of([&] { moments.add_keys(0, std::span(keys).first(17)); }),
                       "17 numbers; needed: [tokens, 16]"));
  EXPECT_TRUE(contains(message_of([&] { moments.add_keys(0, keys, std::vector<std::int64_t>(3)); }),
                       "3 positions"));
  keys[20] = std::numeric_limits<float>::infinity();
  EXPECT_TRUE(contains(message_of([&] { moments.add_queries(1, keys); }), "queries[1] holds NaN"));
  EXPECT_EQ(moments.tokens(0), 0.0);
  EXPECT_TRUE(contains(message_of([&] { KeyBasis::learn(moments, 4); }), "no keys"));
  keys[20] = 0.0F;
  moments.add_keys(0, keys);
  EXPECT_TRUE(contains(message_of([&] { KeyBasis::learn(moments, 4); }), "no queries"));
  std::vector<double> prior(256);
  EXPECT_TRUE(contains(message_of([&] { moments.add_prior(0, prior, prior, 0.0); }), "0 tokens"));
  prior[1] = 1.0;
  EXPECT_TRUE(
      contains(message_of([&] { moments.add_prior(0, prior, prior, 1.0); }), "no second moments"));
  EXPECT_TRUE(contains(message_of([&] { moments.keys_until(0, -1); }), "last_position"));
  EXPECT_TRUE(contains(message_of([&] { KeyMoments(1, 7); }), "head_dim"));
  EXPECT_TRUE(contains(message_of([&] { KeyMoments(0, 16); }), "kv_heads"));
  EXPECT_TRUE(contains(message_of([&] { KeyMoments(1, 8, rope_of(16)); }), "rotary_dim"));
}

TEST(KeyBasis, SynthesisUndoesAnalysisUpToTheFeedback) {
  for (const int dim : {8, 9, 40, 64}) {
    for (const int bits : {1, 4, 8}) {
      const KeyBasis basis = KeyBasis::learn(moments_of(dim, 4 * dim, 2), bits);
      EXPECT_EQ(basis.bytes(), static_cast<std::size_t>(2 * (5 * dim * dim - dim) / 2 * 2));
      for (int head = 0; head < 2; ++head) {
        const Matrices of = matrices_of(basis, head);
        double most = 0.0;
        for (std::size_t i = 0; i < of.lower.dim() * of.lower.dim(); ++i) {
          most = std::max(most, std::abs(of.lower.row(0)[i]));
        }
        EXPECT_LE(largest_difference(product(of.analysis, of.synthesis), of.lower), 2e-3 * most)
            << "d " << dim << ", bits " << bits;
      }
    }
  }
}

// What makes one width right for all coordinates.
TEST(KeyBasis, InnovationsOfTheKeysAreEquallyLarge) {
  constexpr int kDim = 64;
  const KeyMoments moments = moments_of(kDim, 1000);
  const Matrices of = matrices_of(KeyBasis::learn(moments, 8), 0);
  // Less its prediction from those before, y = E r is L⁻¹ y.
  const SquareMatrix innovations = product(inverse(of.lower), of.analysis);
  SquareMatrix keys = matrix(moments.keys_until(0, 0), kDim);
  const double even = 0.05 * keys.trace() / kDim;
  for (std::size_t i = 0; i < kDim; ++i) {
    for (std::size_t j = 0; j < kDim; ++j)
      keys.row(i)[j] = 0.95 * keys.row(i)[j] + (i == j ? even : 0.0);
  }
  const SquareMatrix found = product(innovations, product(keys, transposed(innovations)));
  double sum = 0.0;
  for (std::size_t i = 0; i < kDim; ++i) sum += found.row(i)[i];
  for (std::size_t i = 0; i < kDim; ++i) {
    EXPECT_NEAR(found.row(i)[i] / (sum / kDim), 1.0, 0.02) << i;
    for (std::size_t j = 0; j < i; ++j) EXPECT_LT(std::abs(found.row(i)[j]), 0.02 * sum / kDim);
  }
  // Their length is what the norms' range is made for.
  EXPECT_NEAR(std::sqrt(sum) * 64, 1.0, 0.02);
}

TEST(KeyBasis, LeavesLongKeysRoom) {
  for (const float size : {1e-12F, 1e-3F, 1.0F, 300.0F, 1e6F, 1e15F}) {
    KeyMoments moments(1, 16);
    auto engine = random_engine(11);
    moments.add_keys(0, random_normal(16 * 50, engine, size));
    moments.add_queries(0, random_normal(16 * 50, engine));
    const KeyBasis basis = KeyBasis::learn(moments, 4);
    const KeyBasis::Head of = basis.head(0);
    EXPECT_LE(of.synthesis_scale, std::ldexp(1.0F, 17));
    EXPECT_GE(of.synthesis_scale, std::ldexp(1.0F, -40));
    for (const auto& halves : {of.analysis, of.synthesis}) {
      float largest = 0.0F;
      for (const std::uint16_t half : halves) {
        largest = std::max(largest, std::abs(from_half(half)));
      }
      EXPECT_LE(largest, 1.0F);
      EXPECT_GE(largest, 0.49F);
    }
    if (size > 1e-10F && size < 1e3F) {
      EXPECT_LT(basis.largest_ratio() * 4.0F * size, 1.0F);
    }
  }
}

TEST(KeyBasis, BoundsWhatItMakesOfKeys) {
  const KeyBasis basis = KeyBasis::learn(moments_of(40, 100, 2), 4);
  for (int head = 0; head < 2; ++head) {
    const Matrices of = matrices_of(basis, head);
    const SquareMatrix both = product(inverse(of.lower), of.analysis);
    // The largest stretch of L⁻¹ E is below the product of the bounds.
    EXPECT_LE(std::sqrt(eigenvectors(product(transposed(both), both)).values.front()),
              basis.largest_ratio());
  }
}

TEST(KeyBasis, HeadsWithoutEnergyGetOneAllTheSame) {
  KeyMoments moments(1, 16);
  const std::vector<float> same(16 * 4, 3.0F);  // no key differs from the mean
  moments.add_keys(0, same);
  moments.add_queries(0, std::vector<float>(16, 0.0F));
  const Matrices of = matrices_of(KeyBasis::learn(moments, 4), 0);
  EXPECT_LE(largest_difference(of.lower, SquareMatrix::identity(16)), 1e-6);
  EXPECT_LE(largest_difference(product(of.analysis, of.synthesis), of.lower), 1e-3);
}

TEST(KeyBasis, ComesBackFromItsBytes) {
  const KeyBasis basis = KeyBasis::learn(moments_of(24, 60, 3), 2);
  const std::vector<std::byte> bytes = basis.serialize();
  const KeyBasis back = KeyBasis::deserialize(bytes);
  EXPECT_EQ(back.kv_heads(), 3);
  EXPECT_EQ(back.head_dim(), 24);
  EXPECT_EQ(back.bits(), 2);
  EXPECT_EQ(back.id(), basis.id());
  EXPECT_EQ(back.largest_ratio(), basis.largest_ratio());
  EXPECT_EQ(back.serialize(), bytes);
  EXPECT_NE(KeyBasis::learn(moments_of(24, 60, 3), 3).id(), basis.id());
  EXPECT_EQ(KeyBasis::learn(moments_of(24, 60, 3), 2).id(), basis.id());
}

TEST(KeyBasis, RefusesOtherBytes) {
  const std::vector<std::byte> bytes = KeyBasis::learn(moments_of(8, 20), 4).serialize();
  for (std::size_t size = 0; size < bytes.size(); ++size) {
    EXPECT_THROW(KeyBasis::deserialize(std::span(bytes).first(size)), ValueError) << size;
  }
  auto longer = bytes;
  longer.push_back(std::byte{0});
  EXPECT_THROW(KeyBasis::deserialize(longer), ValueError);
  for (std::size_t i = 0; i < bytes.size(); ++i) {
    auto damaged = bytes;
    damaged[i] ^= std::byte{1};
    EXPECT_THROW(KeyBasis::deserialize(damaged), ValueError) << i;
  }
  auto later = bytes;
  later[4] = std::byte{2};
  EXPECT_TRUE(contains(message_of([&] { KeyBasis::deserialize(later); }), "format version 2"));
}

TEST(KeyBasis, RefusesWhatItCannotBeFor) {
  const KeyMoments moments = moments_of(8, 20);
  EXPECT_TRUE(contains(message_of([&] { KeyBasis::learn(moments, 9); }), "bits = 9"));
  EXPECT_TRUE(contains(message_of([&] { KeyBasis::learn(moments, 4, -1); }), "last_position"));
  EXPECT_THROW(KeyBasis::learn(moments, 4).head(1), IndexError);
}

}  // namespace
}  // namespace tqai
