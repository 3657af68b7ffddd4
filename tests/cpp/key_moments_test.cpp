#include <gtest/gtest.h>

#include <cmath>
#include <limits>
#include <span>
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
using test::largest_difference;
using test::matrix;
using test::message_of;
using test::mixture;
using test::random_engine;
using test::rope_of;

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

TEST(KeyMoments, PriorsOfAnySizeAreBlendedOrRefused) {
  constexpr int kDim = 16;
  auto engine = random_engine(11);
  const auto keys = correlated(kDim, 100, mixture(kDim, 12), engine);
  const auto prior_of = [](double size) {
    std::vector<double> prior(kDim * kDim);
    for (std::size_t i = 0; i < kDim; ++i) {
      prior[i * kDim + i] = size * static_cast<double>(1 + i % 3);
    }
    return prior;
  };
  const auto blended = [&](double size) {
    KeyMoments moments(1, kDim);
    moments.add_keys(0, keys);
    moments.add_queries(0, keys);
    moments.add_prior(0, prior_of(size), prior_of(size), 50.0);
    return moments;
  };
  const KeyMoments expected = blended(1.0);
  for (const double size : {1e-163, 1e-300, 1e200}) {
    const KeyMoments moments = blended(size);
    EXPECT_LE(largest_difference(matrix(moments.keys_until(0, 0), kDim),
                                 matrix(expected.keys_until(0, 0), kDim)),
              1e-9)
        << size;
    EXPECT_NEAR(KeyBasis::learn(moments, 4).largest_ratio(),
                KeyBasis::learn(expected, 4).largest_ratio(), 1e-3)
        << size;
  }
  KeyMoments alone(1, kDim);
  alone.add_prior(0, prior_of(1e300), prior_of(1e300), 1e10);
  EXPECT_TRUE(contains(message_of([&] { KeyBasis::learn(alone, 4); }), "too large"));
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

}  // namespace
}  // namespace tqai
