#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <span>
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
using test::largest_difference;
using test::Matrices;
using test::matrices_of;
using test::matrix;
using test::message_of;
using test::moments_of;
using test::random_engine;
using test::random_normal;

TEST(KeyBasis, SynthesisUndoesAnalysisUpToTheFeedback) {
  for (const int dim : {8, 9, 40, 64}) {
    for (const int bits : {1, 4, 8}) {
      const KeyBasis basis = KeyBasis::learn(moments_of(dim, 4 * dim, 2), bits);
      const int halves = (5 * dim * dim - dim) / 2;
      const int numbers = (dim + 1) / 2 * 2 * padded_dim(dim);
      EXPECT_EQ(basis.bytes(),
                static_cast<std::size_t>(2 * (2 * (halves + numbers) + 4 * (dim + 3))));
      EXPECT_EQ(KeyBasis::bytes_of(2, dim), basis.bytes());
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

// To half of a unit, and with columns whose products with queries stay in 32 bits.
TEST(KeyBasis, HasTheSynthesisInIntegersForQueries) {
  for (const int dim : {8, 9, 40, 64, 256}) {
    const KeyBasis basis = KeyBasis::learn(moments_of(dim, 4 * dim, 2), 4);
    const auto size = static_cast<std::size_t>(dim);
    const auto padded = static_cast<std::size_t>(padded_dim(dim));
    for (int head = 0; head < 2; ++head) {
      const KeyBasis::Head of = basis.head(head);
      const Matrices matrices = matrices_of(basis, head);
      ASSERT_EQ(of.query_numbers.size(), (size + 1) / 2 * padded * 2);
      ASSERT_EQ(of.query_factors.size(), size);
      double longest = 0.0;
      for (std::size_t c = 0; c < padded; ++c) {
        double length2 = 0.0;
        for (std::size_t k = 0; k < (size + 1) / 2 * 2; ++k) {
          const int number =
              of.query_numbers[((c / 16 * ((size + 1) / 2) + k / 2) * 16 + c % 16) * 2 + k % 2];
          length2 += static_cast<double>(number) * number;
          if (k >= size || c >= size) {
            ASSERT_EQ(number, 0);
          } else {
            const double unit = static_cast<double>(of.query_scale) * of.query_factors[k];
            ASSERT_NEAR(matrices.synthesis.row(k)[c], number * unit, 0.501 * unit);
          }
        }
        longest = std::max(longest, std::sqrt(length2));
      }
      EXPECT_LE(longest, KeyBasis::kMostColumn);
      EXPECT_GE(longest, KeyBasis::kMostColumn - 24);
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

// Before there is room for what they say they hold.
TEST(KeyBasis, IsRefusedByTheLengthOfItsBytes) {
  std::vector<std::byte> bytes = KeyBasis::learn(moments_of(8, 30), 2).serialize();
  const std::int32_t most[] = {65536, 576};  // kv_heads, head_dim: 75 GB
  std::memcpy(bytes.data() + 8, most, sizeof most);
  EXPECT_TRUE(contains(message_of([&] { (void)KeyBasis::deserialize(bytes); }),
                       "bytes where its numbers make"));
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
