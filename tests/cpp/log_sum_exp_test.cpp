// AttendOptions::log_sum_exp: against double precision, and for merging attention over several sets
// of tokens.
#include <cmath>
#include <limits>
#include <tqai/cache.hpp>

#include "cache_helpers.hpp"
#include "every_level.hpp"

namespace tqai {
namespace {

using test::Array;
using test::contains;
using test::EveryLevel;
using test::geometry;
using test::message_of;
using test::Tokens;

constexpr int kDim = 40;
constexpr std::int64_t kHeads = 4;  // of queries; two of keys
constexpr float kInfinity = std::numeric_limits<float>::infinity();

struct Attended {
  Array output;
  Array logs;
};

Attended attend_with_logs(const KvCache& cache, const Array& queries, AttendOptions options = {}) {
  Attended result{
      Array({queries.shape[0], queries.shape[2], queries.shape[1], cache.options().value_head_dim}),
      Array({queries.shape[0], queries.shape[2], queries.shape[1], 1}, 7.0F)};
  options.log_sum_exp = result.logs;
  cache.attend(queries, result.output, options);
  return result;
}

// In double: log Σ exp of what the query of token `position` sees of one head.
double expected_log(const KvCache& cache, const Array& queries, std::int64_t head,
                    std::int64_t query, const AttendOptions& options) {
  const auto all = test::gather(cache, 0, cache.tokens());
  const std::int64_t position = cache.tokens() - queries.shape[2] + query;
  double sum = options.sink_scores == nullptr
                   ? 0.0
                   : std::exp(static_cast<double>(options.sink_scores[head]));
  for (std::int64_t t = options.first_token; t < cache.tokens(); ++t) {
    if (options.causal && t > position) continue;
    if (options.window > 0 && (t <= position - options.window || t > position)) continue;
    double score = 0.0;
    for (int c = 0; c < kDim; ++c) {
      score += static_cast<double>(queries.at(0, head, query)[c]) *
               static_cast<double>(all.keys.at(0, head / 2, t)[c]);
    }
    score /= std::sqrt(kDim);
    if (options.soft_cap > 0.0F) {
      const auto cap = static_cast<double>(options.soft_cap);
      score = cap * std::tanh(score / cap);
    }
    sum += std::exp(score);
  }
  return std::log(sum);
}

CacheOptions exact(Level level) {
  CacheOptions options = geometry(kDim);
  options.residual_window = 1000;
  options.level = level;
  return options;
}

TQAI_AT_EVERY_LEVEL(EveryLevel);

TEST_P(EveryLevel, IsThatOfDoublePrecision) {
  auto engine = test::random_engine(301);
  const Tokens tokens(1, 2, 300, kDim, engine);
  KvCache cache(exact(GetParam()));
  tokens.append_to(cache, 0, 300);
  const Array queries({1, kHeads, 5, kDim}, engine);
  const float sinks[kHeads] = {0.5F, -1.0F, 3.0F, 6.0F};
  AttendOptions windowed;
  windowed.window = 70;
  AttendOptions later;
  later.first_token = 290;
  AttendOptions capped;
  capped.soft_cap = 2.0F;
  AttendOptions far_capped;
  far_capped.soft_cap = 1e6F;
  AttendOptions never_capped;
  never_capped.soft_cap = 1e30F;
  AttendOptions with_sinks;
  with_sinks.sink_scores = sinks;
  AttendOptions all;
  all.causal = false;
  for (const AttendOptions& options :
       {AttendOptions{}, windowed, later, capped, far_capped, never_capped, with_sinks, all}) {
    const Array logs = attend_with_logs(cache, queries, options).logs;
    for (std::int64_t h = 0; h < kHeads; ++h) {
      for (std::int64_t q = 0; q < 5; ++q) {
        EXPECT_NEAR(*logs.at(0, q, h), expected_log(cache, queries, h, q, options), 2e-6);
      }
    }
  }
}

// Tiles are read by integer arithmetic, which scores feel less than outputs do.
TEST_P(EveryLevel, OfTilesIsWithinTheKernelsBound) {
  auto engine = test::random_engine(302);
  const Tokens tokens(1, 2, 5000, kDim, engine);
  CacheOptions options = geometry(kDim);
  options.level = GetParam();
  KvCache cache(options);
  tokens.append_to(cache, 0, 5000);
  cache.seal();
  const Array queries({1, kHeads, 1, kDim}, engine);
  const Array logs = attend_with_logs(cache, queries).logs;
  for (std::int64_t h = 0; h < kHeads; ++h) {
    EXPECT_NEAR(*logs.at(0, 0, h), expected_log(cache, queries, h, 0, {}), 5e-3);
  }
}

// (e^s a + e^t b) / (e^s + e^t), in double.
std::vector<double> merged(const Attended& a, const Attended& b, std::int64_t query,
                           std::int64_t head) {
  const auto s = static_cast<double>(*a.logs.at(0, query, head));
  const auto t = static_cast<double>(*b.logs.at(0, query, head));
  const double share = 1.0 / (1.0 + std::exp(t - s));
  std::vector<double> row;
  for (int c = 0; c < kDim; ++c) {
    row.push_back(share * static_cast<double>(a.output.at(0, query, head)[c]) +
                  (1.0 - share) * static_cast<double>(b.output.at(0, query, head)[c]));
  }
  return row;
}

TEST_P(EveryLevel, HalvesMergeToTheWhole) {
  auto engine = test::random_engine(303);
  const Tokens tokens(1, 2, 256, kDim, engine);
  KvCache whole(exact(GetParam()));
  tokens.append_to(whole, 0, 256);
  KvCache first = whole;
  first.crop(100);
  const Array queries({1, kHeads, 1, kDim}, engine);
  AttendOptions later;
  later.first_token = 100;
  const Attended a = attend_with_logs(first, queries);
  const Attended b = attend_with_logs(whole, queries, later);
  const auto all = test::gather(whole, 0, 256);
  test::ReferenceOptions reference;
  reference.scale = 1.0 / std::sqrt(kDim);
  for (std::int64_t h = 0; h < kHeads; ++h) {
    const std::vector<double> row = merged(a, b, 0, h);
    const std::vector<double> expected =
        test::attention(queries.at(0, h, 0), test::rows_of_head(all.keys, 0, h / 2),
                        test::rows_of_head(all.values, 0, h / 2), 255, reference);
    for (std::size_t c = 0; c < row.size(); ++c) EXPECT_NEAR(row[c], expected[c], 1e-6);
  }
}

// What a runtime does that keeps the last tokens itself: the tiles' part comes from here.
TEST_P(EveryLevel, TilesMergeWithExactTokensElsewhere) {
  auto engine = test::random_engine(304);
  const Tokens tokens(1, 2, 4 + 128 + 70, kDim, engine);
  CacheOptions options = geometry(kDim);
  options.level = GetParam();
  KvCache whole(options);
  tokens.append_to(whole, 0, 202);
  whole.seal();
  ASSERT_EQ(whole.packed_tokens(0), 128);
  KvCache tiles = whole;  // with the sinks
  tiles.crop(132);
  KvCache rest(exact(GetParam()));
  tokens.append_to(rest, 132, 70);
  const Array queries({1, kHeads, 1, kDim}, engine);
  const Attended a = attend_with_logs(tiles, queries);
  const Attended b = attend_with_logs(rest, queries);
  const Attended expected = attend_with_logs(whole, queries);
  for (std::int64_t h = 0; h < kHeads; ++h) {
    const std::vector<double> row = merged(a, b, 0, h);
    for (std::size_t c = 0; c < row.size(); ++c) {
      EXPECT_NEAR(row[c], static_cast<double>(expected.output.at(0, 0, h)[c]), 1e-6);
    }
    const double log = std::log(std::exp(static_cast<double>(*a.logs.at(0, 0, h))) +
                                std::exp(static_cast<double>(*b.logs.at(0, 0, h))));
    EXPECT_NEAR(log, static_cast<double>(*expected.logs.at(0, 0, h)), 2e-6);
  }
}

TEST(LogSumExp, OfNothingIsMinusInfinityAndOfNanNan) {
  auto engine = test::random_engine(305);
  const Tokens tokens(1, 2, 10, kDim, engine);
  KvCache cache(geometry(kDim));
  tokens.append_to(cache, 0, 10);
  Array queries({1, kHeads, 1, kDim}, engine);
  queries.at(0, 1, 0)[3] = std::numeric_limits<float>::quiet_NaN();
  AttendOptions blind;
  blind.first_token = 10;
  EXPECT_EQ(*attend_with_logs(cache, queries, blind).logs.at(0, 0, 0), -kInfinity);
  EXPECT_TRUE(std::isnan(*attend_with_logs(cache, queries, blind).logs.at(0, 0, 1)));
  const Attended seen = attend_with_logs(cache, queries);
  EXPECT_TRUE(std::isfinite(*seen.logs.at(0, 0, 0)));
  EXPECT_TRUE(std::isnan(*seen.logs.at(0, 0, 1)));
}

TEST(LogSumExp, IsWrittenAtAnyStridesAndChangesNoOutput) {
  auto engine = test::random_engine(306);
  const Tokens tokens(2, 2, 50, kDim, engine);
  KvCache cache(geometry(kDim), 2);
  tokens.append_to(cache, 0, 50);
  const Array queries({2, kHeads, 3, kDim}, engine);
  const Attended expected = attend_with_logs(cache, queries);
  EXPECT_EQ(test::attend(cache, queries).data, expected.output.data);
  Array by_head({2, kHeads, 3, 1});  // as other libraries have it
  AttendOptions options;
  options.log_sum_exp = by_head;
  options.log_sum_exp->shape = {2, 3, kHeads, 1};
  std::swap(options.log_sum_exp->strides[1], options.log_sum_exp->strides[2]);
  Array output({2, 3, kHeads, kDim});
  cache.attend(queries, output, options);
  for (std::int64_t b = 0; b < 2; ++b) {
    for (std::int64_t q = 0; q < 3; ++q) {
      for (std::int64_t h = 0; h < kHeads; ++h) {
        EXPECT_EQ(*by_head.at(b, h, q), *expected.logs.at(b, q, h));
      }
    }
  }
}

TEST(LogSumExp, OfAnotherShapeTypeOrPlaceIsRefused) {
  auto engine = test::random_engine(307);
  const Tokens tokens(1, 2, 50, kDim, engine);
  KvCache cache(geometry(kDim));
  tokens.append_to(cache, 0, 50);
  const Array queries({1, kHeads, 1, kDim}, engine);
  Array output({1, 1, kHeads, kDim}, 5.0F);
  const auto refused = [&](const Tensor& logs) {
    AttendOptions options;
    options.log_sum_exp = logs;
    const std::string message = message_of([&] { cache.attend(queries, output, options); });
    EXPECT_EQ(output.data, Array({1, 1, kHeads, kDim}, 5.0F).data);
    return message;
  };
  Array wrong({1, kHeads, 1, 1});
  EXPECT_TRUE(contains(refused(wrong), "batch, queries, query_heads, 1"));
  Array logs({1, 1, kHeads, 1});
  Tensor half = logs;
  half.dtype = DType::f16;
  EXPECT_TRUE(contains(refused(half), "float32"));
  Tensor within = logs;
  within.data = output.data.data();
  EXPECT_TRUE(contains(refused(within), "log_sum_exp overlaps output"));
}

}  // namespace
}  // namespace tqai
