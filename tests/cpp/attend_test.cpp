// KvCache::attend against double-precision attention, at every level.
#include <cmath>
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

TEST(Attention, ChunksReadThePastAsSingleStepsDo) {
  auto engine = test::random_engine(20);
  KvCache chunked(geometry(64));
  KvCache single(geometry(64));
  const Tokens all(1, 2, 300, 64, engine);
  all.append_to(chunked, 0, 280);
  all.append_to(single, 0, 280);
  const Array queries({1, 4, 20, 64}, engine);
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

TEST(Attention, NanQueriesGiveNanForThemAlone) {
  auto engine = test::random_engine(21);
  KvCache cache(geometry(64));
  const Tokens all(1, 2, 200, 64, engine);
  all.append_to(cache, 0, 200);
  cache.seal();
  Array queries({1, 2, 1, 64}, engine);
  queries.at(0, 1, 0)[5] = std::numeric_limits<float>::quiet_NaN();
  const Array output = attend(cache, queries);
  EXPECT_TRUE(std::isnan(output.at(0, 0, 1)[0]));
  EXPECT_FALSE(std::isnan(output.at(0, 0, 0)[0]));
}

TEST(Attention, EigenViewsAreTheSameAttention) {
  auto engine = test::random_engine(22);
  KvCache cache(geometry(64));
  KvCache expected(geometry(64));
  // Token-major, as a projection leaves them: [tokens, heads · dim].
  RowMatrix keys(200, 2 * 64);
  RowMatrix values(200, 2 * 64);
  const auto k = test::random_normal(200 * 128, engine);
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
