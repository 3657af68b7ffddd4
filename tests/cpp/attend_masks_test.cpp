// What queries of KvCache::attend see: masks, soft caps, windows and sinks, against
// double-precision attention and against one another.
#include <cmath>
#include <limits>
#include <tqai/cache.hpp>

#include "cache_helpers.hpp"
#include "every_level.hpp"

namespace tqai {
namespace {

using test::Array;
using test::attend;
using test::EveryLevel;
using test::gather;
using test::Gathered;
using test::geometry;
using test::Tokens;
using test::worst_error;

constexpr double kExactError = 2e-6;

TQAI_AT_EVERY_LEVEL(EveryLevel);

TEST_P(EveryLevel, NothingToSeeGivesZeros) {
  CacheOptions options = geometry(64);
  options.level = GetParam();
  KvCache cache(options);
  const Array none({1, 2, 0, 64});
  EXPECT_EQ(attend(cache, none).data.size(), 0U);  // an empty cache, no queries
  auto engine = test::random_engine(14);
  const Tokens all(1, 2, 200, 64, engine);
  all.append_to(cache, 0, 200);
  cache.seal();
  const std::vector<std::uint8_t> mask(200, 0);
  AttendOptions hidden;
  hidden.mask = Mask{mask.data(), Mask::Kind::boolean, {1, 1, 1, 200}, {0, 0, 0, 1}};
  const Array output = attend(cache, Array({1, 2, 1, 64}, engine), hidden);
  for (const float value : output.data) EXPECT_EQ(value, 0.0F);
}

// In units of the longest of the outputs.
double largest_difference(const Array& a, const Array& b) {
  double most = 0.0;
  double scale = 0.0;
  for (std::size_t i = 0; i < a.data.size(); ++i) {
    most =
        std::max(most, std::abs(static_cast<double>(a.data[i]) - static_cast<double>(b.data[i])));
    scale = std::max(scale, std::abs(static_cast<double>(b.data[i])));
  }
  return most / scale;
}

TEST_P(EveryLevel, LargeSoftCapsAreAsGoodAsNone) {
  CacheOptions options = geometry(64);
  options.residual_window = 1000;
  options.level = GetParam();
  KvCache cache(options);
  auto engine = test::random_engine(25);
  const Tokens all(1, 2, 150, 64, engine);
  all.append_to(cache, 0, 150);
  const Array queries({1, 4, 3, 64}, engine);
  const Array none = attend(cache, queries);
  AttendOptions capped;
  for (const float cap : {1e6F, 1e8F, 1e15F, 1e30F, std::numeric_limits<float>::max()}) {
    capped.soft_cap = cap;
    EXPECT_LT(largest_difference(attend(cache, queries, capped), none), 1e-5) << cap;
  }
  capped.soft_cap = 50.0F;
  test::ReferenceOptions reference;
  reference.soft_cap = 50.0;
  EXPECT_LT(worst_error(cache, queries, attend(cache, queries, capped), reference), 1e-5);
}

// Sums with the lowest numbers are all the same, as in any softmax in fp32.
TEST_P(EveryLevel, AdditiveMasksOfTheLowestNumbersHideUnlessAllIsHidden) {
  constexpr std::int64_t kTokens = 400;
  auto engine = test::random_engine(26);
  const Tokens all(1, 2, kTokens, 64, engine);
  const Array queries({1, 2, 2, 64}, engine);
  for (const int window : {16, 1000}) {
    CacheOptions cache_options = geometry(64);
    cache_options.residual_window = window;
    cache_options.level = GetParam();
    KvCache cache(cache_options);
    all.append_to(cache, 0, kTokens);
    cache.seal();
    const Gathered held = gather(cache, 0, kTokens);
    const double bound = window == 16 ? test::kPackedError : kExactError;
    for (const float lowest : {std::numeric_limits<float>::lowest(), -3e38F}) {
      Array mask({1, 1, 2, kTokens}, lowest);
      mask.at(0, 0, 1)[200] = 0.0F;
      AttendOptions options;
      options.causal = false;
      options.mask = Mask{mask.data.data(), Mask::Kind::f32, mask.shape, {0, 0, kTokens, 1}};
      Array logs({1, 2, 2, 1});
      options.log_sum_exp = logs;
      const Array output = attend(cache, queries, options);
      for (std::int64_t h = 0; h < 2; ++h) {
        for (int c = 0; c < 64; ++c) {
          double mean = 0.0;
          for (std::int64_t t = 0; t < kTokens; ++t) {
            mean += static_cast<double>(held.values.at(0, h, t)[c]) / kTokens;
          }
          EXPECT_NEAR(output.at(0, 0, h)[c], mean, bound) << lowest;
          EXPECT_NEAR(output.at(0, 1, h)[c], held.values.at(0, h, 200)[c], bound) << lowest;
        }
        EXPECT_TRUE(std::isfinite(*logs.at(0, 0, h)));
        EXPECT_LT(*logs.at(0, 0, h), -2e38F);
        EXPECT_LT(std::abs(*logs.at(0, 1, h)), 100.0F);
      }
      std::fill_n(mask.data.data(), kTokens, -std::numeric_limits<float>::infinity());
      const Array hidden = attend(cache, queries, options);
      for (std::int64_t h = 0; h < 2; ++h) {
        EXPECT_EQ(hidden.at(0, 0, h)[5], 0.0F);
        EXPECT_EQ(*logs.at(0, 0, h), -std::numeric_limits<float>::infinity());
      }
    }
  }
}

TEST_P(EveryLevel, SinksOfAnyScoreTakeTheirShare) {
  constexpr float kInfinity = std::numeric_limits<float>::infinity();
  CacheOptions cache_options = geometry(64);
  cache_options.level = GetParam();
  KvCache cache(cache_options);
  auto engine = test::random_engine(27);
  const Tokens all(1, 2, 400, 64, engine);
  all.append_to(cache, 0, 400);
  cache.seal();
  const Array queries({1, 6, 1, 64}, engine);
  const float sinks[6] = {
      std::numeric_limits<float>::quiet_NaN(), kInfinity, 3e38F, -kInfinity, -3e38F, 1e30F};
  AttendOptions options;
  options.sink_scores = sinks;
  Array logs({1, 1, 6, 1});
  options.log_sum_exp = logs;
  const Array output = attend(cache, queries, options);
  const Array none = attend(cache, queries);
  for (int c = 0; c < 64; ++c) {
    EXPECT_TRUE(std::isnan(output.at(0, 0, 0)[c]));
    for (const int h : {1, 2, 5}) EXPECT_EQ(output.at(0, 0, h)[c], 0.0F) << h;
    for (const int h : {3, 4}) EXPECT_EQ(output.at(0, 0, h)[c], none.at(0, 0, h)[c]) << h;
  }
  EXPECT_TRUE(std::isnan(*logs.at(0, 0, 0)));
  EXPECT_EQ(*logs.at(0, 0, 1), kInfinity);
  EXPECT_GT(*logs.at(0, 0, 2), 2e38F);
  EXPECT_TRUE(std::isfinite(*logs.at(0, 0, 2)));
  for (const int h : {3, 4}) EXPECT_LT(std::abs(*logs.at(0, 0, h)), 100.0F) << h;
  EXPECT_FLOAT_EQ(*logs.at(0, 0, 5), 1e30F);
}

class AttendMasks : public testing::Test {
 protected:
  // Random tokens, two heads of 64.
  KvCache sealed_cache(std::int64_t tokens) {
    KvCache cache(geometry(64));
    const Tokens all(1, 2, tokens, 64, engine_);
    all.append_to(cache, 0, tokens);
    cache.seal();
    return cache;
  }

  std::mt19937_64 engine_ = test::random_engine(20);
};

TEST_F(AttendMasks, MasksCapsWindowsAndSinksAsTheReference) {
  KvCache cache = sealed_cache(400);
  const Array queries({1, 4, 9, 64}, engine_, 3.0F);

  AttendOptions options;
  test::ReferenceOptions reference;
  options.scale = 0.2F;
  reference.scale = static_cast<double>(0.2F);
  EXPECT_LT(worst_error(cache, queries, attend(cache, queries, options), reference),
            test::kPackedError);
  options.soft_cap = 3.0F;
  reference.soft_cap = 3.0;
  EXPECT_LT(worst_error(cache, queries, attend(cache, queries, options), reference),
            test::kPackedError);
  options.window = 100;
  reference.window = 100;
  EXPECT_LT(worst_error(cache, queries, attend(cache, queries, options), reference),
            test::kPackedError);
  options.first_token = 350;
  reference.first_token = 350;
  EXPECT_LT(worst_error(cache, queries, attend(cache, queries, options), reference),
            test::kPackedError);
  options.causal = false;
  reference.causal = false;
  EXPECT_LT(worst_error(cache, queries, attend(cache, queries, options), reference),
            test::kPackedError);
  const float sinks[4] = {1.5F, 1.5F, 1.5F, 1.5F};
  options.sink_scores = sinks;
  reference.sink_score = 1.5;
  EXPECT_LT(worst_error(cache, queries, attend(cache, queries, options), reference),
            test::kPackedError);
}

// Equal keys: the output is the mean number of the tokens that are seen.
TEST_F(AttendMasks, AWindowHidesLaterTokensWhateverCausalSays) {
  KvCache cache(geometry(64, 4, 4, 1));
  constexpr std::int64_t kTokens = 10;
  Array values({1, 1, kTokens, 64});
  for (std::int64_t t = 0; t < kTokens; ++t) {
    std::fill_n(values.at(0, 0, t), 64, static_cast<float>(t));
  }
  cache.append(Array({1, 1, kTokens, 64}), values);
  const Array queries({1, 1, kTokens, 64}, 1.0F);
  for (const bool causal : {true, false}) {
    AttendOptions options;
    options.causal = causal;
    for (const std::int64_t window : {1, 2, 3, 100}) {
      options.window = window;
      const Array output = attend(cache, queries, options);
      for (std::int64_t t = 0; t < kTokens; ++t) {
        const std::int64_t first = std::max<std::int64_t>(t - window + 1, 0);
        EXPECT_NEAR(output.at(0, t, 0)[5], 0.5 * static_cast<double>(first + t), 1e-5)
            << "window " << window << ", token " << t;
      }
    }
    options.window = 0;
    EXPECT_NEAR(attend(cache, queries, options).at(0, 3, 0)[5], causal ? 1.5 : 4.5, 1e-5);
  }
}

TEST_F(AttendMasks, BooleanAndAdditiveMasksHideTheSame) {
  KvCache cache = sealed_cache(200);
  const Array queries({1, 4, 3, 64}, engine_);
  std::vector<std::uint8_t> seen(3 * 200);
  std::vector<float> added(seen.size());
  for (std::size_t i = 0; i < seen.size(); ++i) {
    seen[i] = i % 3 == 0 ? 1 : 0;
    added[i] = seen[i] != 0 ? 0.0F : std::numeric_limits<float>::lowest();
  }
  AttendOptions boolean;
  boolean.mask = Mask{seen.data(), Mask::Kind::boolean, {1, 1, 3, 200}, {0, 0, 200, 1}};
  AttendOptions additive;
  additive.mask = Mask{added.data(), Mask::Kind::f32, {1, 1, 3, 200}, {0, 0, 200, 1}};
  EXPECT_EQ(attend(cache, queries, boolean).data, attend(cache, queries, additive).data);
  // And differently from no mask.
  EXPECT_NE(attend(cache, queries, boolean).data, attend(cache, queries).data);
  // A mask of the visible columns alone, from token 150 on.
  AttendOptions late;
  late.first_token = 150;
  late.mask = Mask{seen.data() + 150, Mask::Kind::boolean, {1, 1, 3, 50}, {0, 0, 200, 1}};
  AttendOptions whole = boolean;
  whole.first_token = 0;
  std::vector<std::uint8_t> seen_late(seen);
  for (std::size_t q = 0; q < 3; ++q) {
    for (std::size_t t = 0; t < 150; ++t) seen_late[q * 200 + t] = 0;
  }
  whole.mask = Mask{seen_late.data(), Mask::Kind::boolean, {1, 1, 3, 200}, {0, 0, 200, 1}};
  EXPECT_EQ(attend(cache, queries, late).data, attend(cache, queries, whole).data);
}

// Masks are looked at in runs of 64 columns, and of those that say the same several at once.
TEST_F(AttendMasks, BooleanMasksOfLongStretchesHideWhatAdditiveOnesDo) {
  constexpr std::int64_t kTokens = 64 * 40 + 17;
  const KvCache cache = sealed_cache(kTokens);
  const Array queries({1, 4, 3, 64}, engine_);
  for (int i = 0; i < 20; ++i) {
    std::vector<std::uint8_t> seen;
    while (std::ssize(seen) < 3 * kTokens) {
      // A stretch that begins and ends anywhere, or with a run; any byte but 0 shows a token.
      const std::size_t count = engine_() % 3 == 0 ? engine_() % 200 : 64 * (engine_() % 24);
      seen.insert(seen.end(), count, static_cast<std::uint8_t>(engine_() % 2 * (engine_() % 256)));
      if (engine_() % 2 == 0) seen.push_back(static_cast<std::uint8_t>(engine_() % 2 * 128));
    }
    std::vector<float> added(seen.size());
    std::transform(seen.begin(), seen.end(), added.begin(), [](std::uint8_t byte) {
      return byte != 0 ? 0.0F : -std::numeric_limits<float>::infinity();
    });
    AttendOptions boolean;
    boolean.mask = Mask{seen.data(), Mask::Kind::boolean, {1, 1, 3, kTokens}, {0, 0, kTokens, 1}};
    AttendOptions additive;
    additive.mask = Mask{added.data(), Mask::Kind::f32, {1, 1, 3, kTokens}, {0, 0, kTokens, 1}};
    ASSERT_EQ(attend(cache, queries, boolean).data, attend(cache, queries, additive).data) << i;
  }
}

TEST_F(AttendMasks, MasksOfSixteenBitsAddTheirValues) {
  KvCache cache = sealed_cache(200);
  const Array queries({1, 4, 1, 64}, engine_);
  const float values[] = {0.0F, -1.5F, 0.25F, -std::numeric_limits<float>::infinity()};
  std::vector<float> added(200);
  std::vector<std::uint16_t> half(added.size());
  std::vector<std::uint16_t> bfloat(added.size());
  for (std::size_t i = 0; i < added.size(); ++i) {
    added[i] = values[i % 4];
    half[i] = to_half(added[i]);
    bfloat[i] = to_bfloat16(added[i]);
  }
  const auto masked = [&](const void* data, Mask::Kind kind) {
    AttendOptions options;
    options.mask = Mask{data, kind, {1, 1, 1, 200}, {0, 0, 0, 1}};
    return attend(cache, queries, options).data;
  };
  const auto expected = masked(added.data(), Mask::Kind::f32);
  EXPECT_NE(expected, attend(cache, queries).data);
  EXPECT_EQ(masked(half.data(), Mask::Kind::f16), expected);
  EXPECT_EQ(masked(bfloat.data(), Mask::Kind::bf16), expected);
}

// What a mask does to whole tiles is found beforehand: the same as adding it to each score. A
// number that is too small to change a score keeps a run of 64 columns from being one of zeros.
TEST_F(AttendMasks, MasksInRunsAreWhatEachColumnSays) {
  KvCache cache = sealed_cache(900);
  const Array queries({1, 4, 3, 64}, engine_);
  for (const std::int64_t first : {0, 37}) {
    for (const std::int64_t longest : {5, 70, 400}) {
      const std::int64_t columns = 900 - first;
      std::vector<std::uint8_t> seen;
      std::uniform_int_distribution<std::int64_t> length(1, longest);
      bool visible = true;
      while (std::ssize(seen) < 3 * columns) {
        seen.insert(seen.end(), static_cast<std::size_t>(length(engine_)), visible ? 1 : 0);
        visible = !visible;
      }
      seen.resize(static_cast<std::size_t>(3 * columns));
      std::vector<float> zeros;
      std::vector<float> nearly;
      for (const std::uint8_t x : seen) {
        zeros.push_back(x != 0 ? 0.0F : -std::numeric_limits<float>::infinity());
        nearly.push_back(x != 0 ? 1e-30F : -std::numeric_limits<float>::infinity());
      }
      AttendOptions options;
      options.first_token = first;
      const std::array<std::int64_t, 4> shape = {1, 1, 3, columns};
      const std::array<std::int64_t, 4> strides = {0, 0, columns, 1};
      options.mask = Mask{nearly.data(), Mask::Kind::f32, shape, strides};
      const Array expected = attend(cache, queries, options);
      options.mask = Mask{zeros.data(), Mask::Kind::f32, shape, strides};
      EXPECT_EQ(attend(cache, queries, options).data, expected.data) << first << ", " << longest;
      options.mask = Mask{seen.data(), Mask::Kind::boolean, shape, strides};
      EXPECT_EQ(attend(cache, queries, options).data, expected.data) << first << ", " << longest;
    }
  }
}

TEST_F(AttendMasks, MasksThatAddNanOrInfinityGiveNanForTheirRow) {
  KvCache cache = sealed_cache(200);
  Array queries({1, 2, 1, 64}, engine_);
  for (const float bad :
       {std::numeric_limits<float>::quiet_NaN(), std::numeric_limits<float>::infinity()}) {
    Array mask({1, 2, 1, 200});
    mask.at(0, 1, 0)[20] = bad;
    AttendOptions options;
    options.mask = Mask{};
    options.mask->data = mask.data.data();
    options.mask->kind = Mask::Kind::f32;
    options.mask->shape = {1, 2, 1, 200};
    options.mask->strides = {400, 200, 200, 1};
    const Array output = attend(cache, queries, options);
    EXPECT_TRUE(std::isnan(output.at(0, 0, 1)[0]));
    EXPECT_FALSE(std::isnan(output.at(0, 0, 0)[0]));
  }
}

}  // namespace
}  // namespace tqai
