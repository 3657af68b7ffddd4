// KvCache::attend against double-precision attention, at every level.
#include <cmath>
#include <cstring>
#include <tqai/cache.hpp>
#include <tqai/eigen.hpp>

#include "cache_helpers.hpp"
#include "every_level.hpp"

namespace tqai {
namespace {

using test::Array;
using test::attend;
using test::contains;
using test::EveryLevel;
using test::gather;
using test::Gathered;
using test::geometry;
using test::message_of;
using test::Tokens;
using test::worst_error;

constexpr double kExactError = 2e-6;

// Over bits, dims and the edges of tiles: the scalar level against double precision over the

// decoded tokens, and every other level against the scalar one bit for bit.

class TileEdges : public testing::TestWithParam<int> {};

INSTANTIATE_TEST_SUITE_P(Dims, TileEdges, testing::Values(16, 40, 64, 80, 96, 128, 256));

TEST_P(TileEdges, LevelsAgreeWithScalarAndScalarWithDouble) {
  const int dim = GetParam();
  auto engine = test::random_engine(10);
  const Tokens all(1, 1, 4097, dim, engine);
  for (int bits = 1; bits <= 8; ++bits) {
    for (const std::int64_t tokens : {0, 1, 63, 64, 65, 127, 128, 129, 4097}) {
      const Array queries({1, 3, tokens == 0 ? 0 : 1, dim}, engine);
      Array scalar({0, 0, 0, 0});
      for (const Level level : available_levels()) {
        CacheOptions options = geometry(dim, bits, bits, 1);
        options.residual_window = 0;
        options.sink_tokens = tokens % 2 == 0 ? 0 : 1;
        options.level = level;
        KvCache cache(options);
        all.append_to(cache, 0, tokens);
        cache.seal();
        ASSERT_EQ(cache.packed_tokens(0),
                  std::max<std::int64_t>(tokens - options.sink_tokens, 0) / 64 * 64);
        const Array output = attend(cache, queries);
        if (level == Level::scalar) {
          scalar = output;
          ASSERT_LT(worst_error(cache, queries, output), test::kPackedError)
              << "bits " << bits << ", tokens " << tokens;
        }
        ASSERT_EQ(output.data, scalar.data)
            << name_of(level) << ", bits " << bits << ", tokens " << tokens;
      }
    }
  }
}

TQAI_AT_EVERY_LEVEL(EveryLevel);

TEST_P(EveryLevel, LongContextIsSplitAndMerged) {
  auto engine = test::random_engine(11);
  for (const int dim : {64, 80}) {
    CacheOptions options = geometry(dim);
    options.level = GetParam();
    KvCache cache(options);
    const Tokens all(1, 2, 4097, dim, engine);
    all.append_to(cache, 0, 4097);
    cache.seal();
    const Array queries({1, 6, 5, dim}, engine, 2.0F);
    EXPECT_LT(worst_error(cache, queries, attend(cache, queries)), test::kPackedError);
  }
}

// What attention over the latents of DeepSeek's MLA reads: keys of 512 + 64 coordinates, the most
// that there are, and values of 512. Queries along a key have the largest products that there are.
TEST_P(EveryLevel, LatentsOf576Coordinates) {
  auto engine = test::random_engine(18);
  for (const int bits : {2, 4, 6, 8}) {
    CacheOptions options = geometry(576, bits, bits, 1);
    options.value_head_dim = 512;
    options.level = GetParam();
    options.centering = Centering::none;
    KvCache cache(options);
    Array keys({1, 1, 250, 576}, engine);
    const Array values({1, 1, 250, 512}, engine);
    cache.append(keys, values);
    cache.seal();
    ASSERT_GT(cache.packed_tokens(0), 128);
    Array queries({1, 4, 2, 576}, engine);
    for (int c = 0; c < 576; ++c) queries.at(0, 1, 1)[c] = 40.0F * keys.at(0, 0, 100)[c];
    const Array output = attend(cache, queries);
    EXPECT_LT(worst_error(cache, queries, output), 1.5e-2) << bits;
    options.level = Level::scalar;
    KvCache scalar(options);
    scalar.append(keys, values);
    scalar.seal();
    EXPECT_EQ(output.data, attend(scalar, queries).data) << bits;
    EXPECT_EQ(cache.serialize(), scalar.serialize()) << bits;
  }
}

TEST_P(EveryLevel, PeakySoftmaxKeepsItsPeak) {
  // Keys of up to 4 bits take queries in one int8 term, finer ones in two.
  for (const auto& [bits, bound] : {std::pair{4, 2e-2}, std::pair{8, 3e-3}}) {
    auto engine = test::random_engine(12);
    CacheOptions options = geometry(64, bits, 4);
    options.level = GetParam();
    KvCache cache(options);
    const Tokens all(1, 2, 500, 64, engine);
    all.append_to(cache, 0, 500);
    cache.seal();
    // A query along key 100: nearly all weight there.
    const Gathered gathered = gather(cache, 0, 500);
    Array queries({1, 2, 1, 64});
    for (int h = 0; h < 2; ++h) {
      for (int c = 0; c < 64; ++c) queries.at(0, h, 0)[c] = 2.0F * gathered.keys.at(0, h, 100)[c];
    }
    EXPECT_LT(worst_error(cache, queries, attend(cache, queries)), bound);
  }
}

TEST_P(EveryLevel, ExactTokensAreAttendedInFp32) {
  auto engine = test::random_engine(13);
  for (const int dim : {8, 40, 64, 256}) {
    CacheOptions options = geometry(dim);
    options.residual_window = 1000;
    options.level = GetParam();
    KvCache cache(options);
    const Tokens all(1, 2, 150, dim, engine);
    all.append_to(cache, 0, 150);
    cache.seal();
    ASSERT_EQ(cache.packed_tokens(0), 0);
    const Array queries({1, 4, 7, dim}, engine);
    EXPECT_LT(worst_error(cache, queries, attend(cache, queries)), kExactError) << dim;
  }
}

// In one running sum each of many equal terms is rounded the same way.
TEST_P(EveryLevel, ManyEqualExactTokensKeepTheirValue) {
  for (const DType dtype : {DType::f32, DType::bf16}) {
    CacheOptions options = geometry(16, 4, 4, 1);
    options.level = GetParam();
    options.residual_window = 1 << 20;
    options.dtype = dtype;
    KvCache cache(options);
    const std::int64_t tokens = 100'000;
    const auto value = from_bfloat16(to_bfloat16(0.7F));
    const std::vector<float> wide(16, value);
    const std::vector<std::uint16_t> narrow(16, to_bfloat16(value));
    const ConstTensor same{dtype == DType::f32 ? static_cast<const void*>(wide.data())
                                               : static_cast<const void*>(narrow.data()),
                           dtype,
                           {1, 1, tokens, 16},
                           {0, 0, 0, 1}};
    cache.append(same, same);
    const Array output = attend(cache, Array({1, 1, 1, 16}, 1.0F));
    for (const float x : output.data) EXPECT_NEAR(x, value, 1e-6 * static_cast<double>(value));
  }
}

// Sinks and the tail are cut into parts together.
TEST_P(EveryLevel, PartsOfExactTokensAgreeWithDouble) {
  auto engine = test::random_engine(77);
  const Tokens all(1, 1, 9100, 16, engine);
  for (const int sinks : {0, 4, 4200}) {
    CacheOptions options = geometry(16, 4, 4, 1);
    options.level = GetParam();
    options.sink_tokens = sinks;
    options.residual_window = 4300;
    KvCache cache(options);
    all.append_to(cache, 0, 9100);
    cache.seal();
    ASSERT_GT(cache.packed_tokens(0), 0);
    KvCache exact = [&] {
      CacheOptions wide = options;
      wide.residual_window = 10'000;
      KvCache held(wide);
      all.append_to(held, 0, 9100);
      return held;
    }();
    const Array queries({1, 2, 3, 16}, engine);
    for (const std::int64_t window : {0, 6000}) {
      AttendOptions attend_options;
      attend_options.window = window;
      test::ReferenceOptions reference;
      reference.window = window;
      EXPECT_LT(worst_error(exact, queries, attend(exact, queries, attend_options), reference),
                kExactError);
      EXPECT_LT(worst_error(cache, queries, attend(cache, queries, attend_options), reference),
                test::kPackedError);
    }
  }
}

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

class Attention : public testing::Test {
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

TEST_F(Attention, MasksCapsWindowsAndSinksAsTheReference) {
  KvCache cache(geometry(64));
  const Tokens all(1, 2, 400, 64, engine_);
  all.append_to(cache, 0, 400);
  cache.seal();
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
TEST_F(Attention, AWindowHidesLaterTokensWhateverCausalSays) {
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

TEST_F(Attention, BooleanAndAdditiveMasksHideTheSame) {
  KvCache cache(geometry(64));
  const Tokens all(1, 2, 200, 64, engine_);
  all.append_to(cache, 0, 200);
  cache.seal();
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
TEST_F(Attention, BooleanMasksOfLongStretchesHideWhatAdditiveOnesDo) {
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

TEST_F(Attention, MasksOfSixteenBitsAddTheirValues) {
  KvCache cache(geometry(64));
  const Tokens all(1, 2, 200, 64, engine_);
  all.append_to(cache, 0, 200);
  cache.seal();
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

TEST_F(Attention, ChunksReadThePastAsSingleStepsDo) {
  KvCache chunked(geometry(64));
  KvCache single(geometry(64));
  const Tokens all(1, 2, 300, 64, engine_);
  all.append_to(chunked, 0, 280);
  all.append_to(single, 0, 280);
  const Array queries({1, 4, 20, 64}, engine_);
  all.append_to(chunked, 280, 20);  // seals what had left the window before
  const Array together = attend(chunked, queries);
  single.seal();
  for (std::int64_t q = 0; q < 20; ++q) {
    // Without sealing in between, so that both read the same codes.
    KvCache step(chunked);
    step.crop(280 + q + 1);
    Array one({1, 4, 1, 64});
    for (int h = 0; h < 4; ++h) std::copy_n(queries.at(0, h, q), 64, one.at(0, h, 0));
    const Array output = attend(step, one);
    for (std::size_t i = 0; i < output.data.size(); ++i) {
      EXPECT_EQ(output.data[i], together.at(0, q, 0)[i]);
    }
  }
}

// What a mask does to whole tiles is found beforehand: the same as adding it to each score. A
// number that is too small to change a score keeps a run of 64 columns from being one of zeros.
TEST_F(Attention, MasksInRunsAreWhatEachColumnSays) {
  KvCache cache(geometry(64));
  const Tokens all(1, 2, 900, 64, engine_);
  all.append_to(cache, 0, 900);
  cache.seal();
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

TEST_F(Attention, NanQueriesGiveNanForThemAlone) {
  KvCache cache = sealed_cache(200);
  Array queries({1, 2, 1, 64}, engine_);
  queries.at(0, 1, 0)[5] = std::numeric_limits<float>::quiet_NaN();
  const Array output = attend(cache, queries);
  EXPECT_TRUE(std::isnan(output.at(0, 0, 1)[0]));
  EXPECT_FALSE(std::isnan(output.at(0, 0, 0)[0]));
}

TEST_F(Attention, MasksThatAddNanOrInfinityGiveNanForTheirRow) {
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

TEST_F(Attention, EigenViewsAreTheSameAttention) {
  KvCache cache(geometry(64));
  KvCache expected(geometry(64));
  // Token-major, as a projection leaves them: [tokens, heads · dim].
  RowMatrix keys(200, 2 * 64);
  RowMatrix values(200, 2 * 64);
  const auto k = test::random_normal(200 * 128, engine_);
  std::copy(k.begin(), k.end(), keys.data());
  values = keys * 0.5F;
  cache.append(keys, values);
  const std::array<std::int64_t, 4> shape = {1, 2, 200, 64};
  const std::array<std::int64_t, 4> strides = {0, 64, 128, 1};
  expected.append({keys.data(), DType::f32, shape, strides},
                  {values.data(), DType::f32, shape, strides});
  RowMatrix queries = RowMatrix::Ones(3, 4 * 64);
  RowMatrix output(3, 4 * 64);
  cache.attend(queries, output);
  const Array ones({1, 4, 3, 64}, 1.0F);
  const Array other = attend(expected, ones);
  for (std::int64_t i = 0; i < output.size(); ++i) {
    EXPECT_EQ(output.data()[i], other.data[static_cast<std::size_t>(i)]);
  }
  RowMatrix odd(3, 100);
  EXPECT_TRUE(contains(message_of([&] { cache.attend(odd, output); }), "100 columns"));
}

}  // namespace
}  // namespace tqai
