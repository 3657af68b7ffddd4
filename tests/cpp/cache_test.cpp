// KvCache against double-precision attention, at every level.
#include <cmath>
#include <cstring>
#include <tqai/cache.hpp>

#include "cache_helpers.hpp"

namespace tqai {
namespace {

using test::Array;
using test::attend;
using test::contains;
using test::gather;
using test::Gathered;
using test::geometry;
using test::message_of;
using test::rows_of_head;
using test::Tokens;
using test::worst_error;

constexpr double kExactError = 2e-6;

class EveryLevel : public testing::TestWithParam<Level> {
 protected:
  void SetUp() override {
    const auto levels = available_levels();
    if (std::find(levels.begin(), levels.end(), GetParam()) == levels.end()) {
      GTEST_SKIP() << "this processor has no " << name_of(GetParam());
    }
  }
};

INSTANTIATE_TEST_SUITE_P(All, EveryLevel,
                         testing::Values(Level::scalar, Level::avx2, Level::avx512),
                         [](const auto& param) { return test::level_text(param.param); });

TEST_P(EveryLevel, AttendsAsDoublePrecisionOverBitsDimsAndTileEdges) {
  auto engine = test::random_engine(10);
  for (const int dim : {16, 40, 64, 80, 96, 128, 256}) {
    for (int bits = 1; bits <= 8; ++bits) {
      for (const std::int64_t tokens : {1, 63, 64, 65, 127, 128, 129, 300}) {
        CacheOptions options = geometry(dim, bits, bits, 1);
        options.residual_window = 0;
        options.sink_tokens = tokens % 2 == 0 ? 0 : 1;
        options.level = GetParam();
        KvCache cache(options);
        const Tokens all(1, 1, tokens, dim, engine);
        all.append_to(cache, 0, tokens);
        cache.seal();
        ASSERT_EQ(cache.packed_tokens(0), (tokens - options.sink_tokens) / 64 * 64);
        const Array queries({1, 3, 1, dim}, engine);
        const Array output = attend(cache, queries);
        ASSERT_LT(worst_error(cache, queries, output), test::kPackedError)
            << "d " << dim << ", bits " << bits << ", tokens " << tokens;
        // Every level gives the bits of the scalar one.
        options.level = Level::scalar;
        KvCache scalar(options);
        all.append_to(scalar, 0, tokens);
        scalar.seal();
        ASSERT_EQ(output.data, attend(scalar, queries).data)
            << "d " << dim << ", bits " << bits << ", tokens " << tokens;
      }
    }
  }
}

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

class Cache : public testing::Test {
 protected:
  std::mt19937_64 engine_ = test::random_engine(20);
};

TEST_F(Cache, MasksCapsWindowsAndSinksAsTheReference) {
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

TEST_F(Cache, BooleanAndAdditiveMasksHideTheSame) {
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

TEST_F(Cache, ChunksReadThePastAsSingleStepsDo) {
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

TEST_F(Cache, SealedTokensCost52BytesAndMemoryIsWhatWasAllocated) {
  const std::size_t before = allocated_bytes();
  {
    CacheOptions options = geometry(64, 4, 2, 3);
    options.dtype = DType::f32;
    options.residual_window = 128;
    KvCache cache(options, 2);
    const Tokens all(2, 3, 1000, 64, engine_);
    for (std::int64_t t = 0; t < 1000; t += 100) {
      all.append_to(cache, t, 100);
      EXPECT_EQ(cache.memory().total_bytes(), allocated_bytes() - before);
    }
    cache.seal();
    const MemoryReport report = cache.memory();
    EXPECT_EQ(report.total_bytes(), allocated_bytes() - before);
    EXPECT_EQ(report.tokens, 2000);
    EXPECT_EQ(report.packed_tokens, 2 * 832);
    EXPECT_EQ(report.packed_bytes, 2U * 832 * 3 * 52);
    EXPECT_EQ(report.exact_bytes, 2U * (4 + 192) * 3 * 128 * 4);
    EXPECT_EQ(report.uncompressed_bytes, 2000U * 3 * 128 * 4);
    const KvCache copy(cache);
    EXPECT_LT(allocated_bytes() - before, report.total_bytes() + 2000);  // shares tiles
    cache.crop(500);
    EXPECT_LT(cache.memory().packed_bytes, report.packed_bytes);
    EXPECT_EQ(copy.memory().packed_bytes, report.packed_bytes);
  }
  EXPECT_EQ(allocated_bytes(), before);
}

TEST_F(Cache, CopiesAreIndependent) {
  KvCache cache(geometry(64));
  const Tokens all(1, 2, 400, 64, engine_);
  all.append_to(cache, 0, 250);
  cache.seal();
  const Gathered before = gather(cache, 0, 250);
  KvCache copy(cache);
  all.append_to(copy, 250, 150);
  copy.crop(30);
  all.append_to(copy, 0, 100);
  EXPECT_EQ(cache.tokens(), 250);
  EXPECT_EQ(gather(cache, 0, 250).keys.data, before.keys.data);
  EXPECT_EQ(gather(cache, 0, 250).values.data, before.values.data);
  cache = copy;
  EXPECT_EQ(cache.tokens(), 130);
  EXPECT_EQ(gather(cache, 0, 130).keys.data, gather(copy, 0, 130).keys.data);
}

TEST_F(Cache, CropKeepsWhatItKeeps) {
  const Tokens all(2, 2, 400, 64, engine_);
  for (const std::int64_t kept :
       {399, 390, 380, 300, 261, 260, 259, 197, 196, 69, 68, 67, 5, 4, 3, 1, 0}) {
    KvCache cache(geometry(64), 2);
    all.append_to(cache, 0, 400);
    cache.seal();
    const Gathered before = gather(cache, 0, kept);
    cache.crop(kept);
    EXPECT_EQ(cache.tokens(), kept);
    EXPECT_EQ(gather(cache, 0, kept).keys.data, before.keys.data) << kept;
    EXPECT_EQ(gather(cache, 0, kept).values.data, before.values.data) << kept;
    // Goes on as any cache does.
    all.append_to(cache, 0, 200);
    cache.seal();
    EXPECT_EQ(cache.tokens(), kept + 200);
    const Array queries({2, 4, 2, 64}, engine_);
    EXPECT_LT(worst_error(cache, queries, attend(cache, queries)), test::kPackedError) << kept;
  }
}

TEST_F(Cache, SelectReordersRepeatsAndShares) {
  KvCache cache(geometry(64), 2);
  const Tokens all(2, 2, 300, 64, engine_);
  all.append_to(cache, 0, 300);
  cache.seal();
  const Gathered before = gather(cache, 0, 300);
  const std::size_t bytes = allocated_bytes();
  cache.select(std::vector<std::int64_t>{1, 0, 1, 1});
  EXPECT_EQ(cache.batch(), 4);
  EXPECT_LT(allocated_bytes(), bytes + 1000);
  const Gathered after = gather(cache, 0, 300);
  const std::int64_t from[4] = {1, 0, 1, 1};
  for (std::int64_t b = 0; b < 4; ++b) {
    for (int h = 0; h < 2; ++h) {
      EXPECT_EQ(rows_of_head(after.keys, b, h), rows_of_head(before.keys, from[b], h));
    }
  }
  // Rows that share a window part ways when they grow.
  const Tokens more(4, 2, 100, 64, engine_);
  more.append_to(cache, 0, 100);
  cache.seal();
  const Array queries({4, 2, 1, 64}, engine_);
  EXPECT_LT(worst_error(cache, queries, attend(cache, queries)), test::kPackedError);
}

TEST_F(Cache, PaddingIsNeverSeenAndTakesNoSinks) {
  KvCache cache(geometry(64), 2);
  const Tokens all(2, 2, 200, 64, engine_);
  all.append_to(cache, 0, 200);
  cache.set_padding(std::vector<std::int64_t>{0, 37});
  cache.seal();
  EXPECT_EQ(cache.tokens(), 200);
  EXPECT_EQ(cache.packed_tokens(0), 128);
  EXPECT_EQ(cache.packed_tokens(1), 128);
  EXPECT_EQ(cache.memory().tokens, 363);
  // Row 1 is what a cache without the padding holds.
  KvCache alone(geometry(64));
  ConstTensor keys = Tokens::slice(all.keys, 37, 163);
  ConstTensor values = Tokens::slice(all.values, 37, 163);
  keys.data = all.keys.at(1, 0, 37);
  values.data = all.values.at(1, 0, 37);
  keys.shape[0] = values.shape[0] = 1;
  alone.append(keys, values);
  alone.seal();
  const Array queries({2, 4, 1, 64}, engine_);
  Array second({1, 4, 1, 64});
  std::copy_n(queries.at(1, 0, 0), 4 * 64, second.data.begin());
  const Array output = attend(cache, queries);
  const Array expected = attend(alone, second);
  for (std::size_t i = 0; i < expected.data.size(); ++i) {
    EXPECT_EQ(output.at(1, 0, 0)[i], expected.data[i]);
  }
  const Gathered gathered = gather(cache, 0, 200);
  EXPECT_EQ(test::norm(rows_of_head(gathered.keys, 1, 0)[36]), 0.0);
  EXPECT_NE(test::norm(rows_of_head(gathered.keys, 1, 0)[37]), 0.0);
}

TEST_F(Cache, DiscardFreesWholeTiles) {
  CacheOptions options = geometry(64);
  options.sink_tokens = 0;
  KvCache cache(options);
  const Tokens all(1, 2, 400, 64, engine_);
  all.append_to(cache, 0, 400);
  cache.seal();
  const std::size_t bytes = cache.memory().packed_bytes;
  AttendOptions window;
  window.window = 100;
  const Array queries({1, 4, 1, 64}, engine_);
  const Array before = attend(cache, queries, window);
  cache.discard_before(300);
  EXPECT_EQ(cache.first_token(), 256);
  EXPECT_LT(cache.memory().packed_bytes, bytes / 2);
  EXPECT_EQ(cache.tokens(), 400);
  const Array after = attend(cache, queries, window);
  for (std::size_t i = 0; i < after.data.size(); ++i) {
    EXPECT_NEAR(after.data[i], before.data[i], 1e-6F);
  }
  EXPECT_THROW(cache.crop(100), ValueError);
  cache.crop(300);
  EXPECT_EQ(cache.tokens(), 300);
  cache.crop(0);
  all.append_to(cache, 0, 100);
  EXPECT_EQ(cache.first_token(), 0);
}

TEST_F(Cache, CentresTheMeanWhereThereIsOne) {
  for (const bool biased : {true, false}) {
    KvCache cache(geometry(64));
    Tokens all(1, 2, 300, 64, engine_);
    if (!biased) all.keys.data = test::random_normal(all.keys.data.size(), engine_);
    EXPECT_FALSE(cache.centering(0, 0).has_value());
    all.append_to(cache, 0, 300);
    cache.seal();
    EXPECT_EQ(cache.centering(0, 1), biased ? Centering::mean : Centering::none);
  }
}

TEST_F(Cache, MeanCentredKeysAreCloser) {
  double error[2];
  for (const Centering centering : {Centering::none, Centering::mean}) {
    CacheOptions options = geometry(64);
    options.centering = centering;
    KvCache cache(options);
    auto engine = test::random_engine(21);
    const Tokens all(1, 2, 300, 64, engine);
    all.append_to(cache, 0, 300);
    cache.seal();
    const Gathered gathered = gather(cache, 0, 300);
    double sum = 0.0;
    for (std::size_t i = 0; i < gathered.keys.data.size(); ++i) {
      sum += std::pow(static_cast<double>(gathered.keys.data[i] - all.keys.data[i]), 2);
    }
    error[centering == Centering::none ? 0 : 1] = sum;
  }
  EXPECT_LT(error[1], 0.5 * error[0]);
}

TEST_F(Cache, HoldsHalfPrecisionAsItCame) {
  for (const DType dtype : {DType::f16, DType::bf16}) {
    CacheOptions options = geometry(64);
    options.dtype = dtype;
    KvCache cache(options);
    const Tokens all(1, 2, 150, 64, engine_);
    std::vector<std::uint16_t> keys(all.keys.data.size());
    std::vector<std::uint16_t> values(keys.size());
    convert_from_float(all.keys.data.data(), keys.size(), dtype, keys.data());
    convert_from_float(all.values.data.data(), keys.size(), dtype, values.data());
    cache.append({keys.data(), dtype, all.keys.shape, all.keys.strides()},
                 {values.data(), dtype, all.keys.shape, all.keys.strides()});
    cache.seal();
    EXPECT_EQ(cache.packed_tokens(0), 128);
    std::vector<std::uint16_t> tail(2 * 18 * 64);
    std::vector<std::uint16_t> tail_values(tail.size());
    const std::array<std::int64_t, 4> shape = {1, 2, 18, 64};
    const std::array<std::int64_t, 4> strides = {2 * 18 * 64, 18 * 64, 64, 1};
    cache.gather(132, {tail.data(), dtype, shape, strides},
                 {tail_values.data(), dtype, shape, strides});
    EXPECT_EQ(0, std::memcmp(tail.data(), keys.data() + 132 * 64, 18 * 64 * 2));
    const Array queries({1, 4, 1, 64}, engine_);
    EXPECT_LT(worst_error(cache, queries, attend(cache, queries)), test::kPackedError);
  }
}

TEST_F(Cache, ResultsDoNotDependOnHowTokensArrive) {
  const Tokens all(1, 2, 300, 64, engine_);
  KvCache whole(geometry(64));
  all.append_to(whole, 0, 300);
  whole.seal();
  KvCache later(geometry(64));
  all.append_to(later, 0, 290);
  later.seal();
  for (std::int64_t t = 290; t < 300; ++t) {
    all.append_to(later, t, 1);
    later.seal();
  }
  EXPECT_EQ(gather(whole, 0, 300).keys.data, gather(later, 0, 300).keys.data);
  EXPECT_EQ(whole.memory().total_bytes(), later.memory().total_bytes());
}

TEST_F(Cache, RefusesOptionsOutOfRange) {
  const auto make = [](auto change) {
    CacheOptions options = geometry(64);
    change(options);
    return message_of([&] { KvCache cache(options); });
  };
  EXPECT_TRUE(contains(make([](auto& o) { o.bits_k = 9; }), "bits_k = 9; allowed: 1…8"));
  EXPECT_TRUE(contains(make([](auto& o) { o.bits_v = 0; }), "bits_v = 0; allowed: 1…8"));
  EXPECT_TRUE(contains(make([](auto& o) { o.head_dim = 7; }), "head_dim = 7; allowed: 8…512"));
  EXPECT_TRUE(contains(make([](auto& o) { o.head_dim = 513; }), "allowed: 8…512"));
  EXPECT_TRUE(contains(make([](auto& o) { o.kv_heads = 0; }), "kv_heads = 0"));
  EXPECT_TRUE(contains(make([](auto& o) { o.sink_tokens = -1; }), "sink_tokens = -1"));
  EXPECT_TRUE(contains(make([](auto& o) { o.residual_window = -1; }), "residual_window = -1"));
  EXPECT_TRUE(contains(message_of([] { KvCache cache(geometry(64), 0); }), "batch = 0"));
  CacheOptions haar = geometry(96);
  haar.rotation = RotationKind::hadamard;
  EXPECT_TRUE(contains(message_of([&] { KvCache cache(haar); }), "96"));
}

TEST_F(Cache, RefusesBadTensorsAndStaysAsItWas) {
  KvCache cache(geometry(64));
  const Tokens all(1, 2, 200, 64, engine_);
  all.append_to(cache, 0, 150);
  cache.seal();
  const Gathered before = gather(cache, 0, 150);

  Tokens bad(1, 2, 5, 64, engine_);
  bad.values.at(0, 1, 3)[7] = std::numeric_limits<float>::quiet_NaN();
  EXPECT_TRUE(contains(message_of([&] { bad.append_to(cache, 0, 5); }), "values[0, 1, 3]"));
  bad.values.at(0, 1, 3)[7] = std::numeric_limits<float>::infinity();
  EXPECT_TRUE(contains(message_of([&] { bad.append_to(cache, 0, 5); }), "NaN or infinity"));
  bad.values.at(0, 1, 3)[7] = 20000.0F;
  EXPECT_TRUE(contains(message_of([&] { bad.append_to(cache, 0, 5); }), "norm 20000"));
  const Tokens other(1, 3, 5, 64, engine_);
  EXPECT_TRUE(contains(message_of([&] { other.append_to(cache, 0, 5); }), "[1, 3, 5, 64]"));
  const Tokens narrow(1, 2, 5, 32, engine_);
  EXPECT_TRUE(contains(message_of([&] { narrow.append_to(cache, 0, 5); }), "[1, 2, any, 64]"));
  ConstTensor half = Tokens::slice(all.keys, 0, 5);
  half.dtype = DType::f16;
  EXPECT_TRUE(contains(message_of([&] { cache.append(half, half); }), "float16"));
  ConstTensor sparse = Tokens::slice(all.keys, 0, 5);
  sparse.strides[3] = 2;
  EXPECT_TRUE(contains(message_of([&] { cache.append(sparse, sparse); }), "contiguous"));

  const Array queries({1, 3, 1, 64}, engine_);
  EXPECT_TRUE(contains(message_of([&] { attend(cache, queries); }), "3 heads"));
  const Array many({1, 2, 151, 64}, engine_);
  EXPECT_TRUE(contains(message_of([&] { attend(cache, many); }), "151 queries"));
  AttendOptions options;
  options.mask = Mask{queries.data.data(), Mask::Kind::f32, {1, 1, 1, 149}, {0, 0, 0, 1}};
  const Array good({1, 2, 1, 64}, engine_);
  EXPECT_TRUE(contains(message_of([&] { attend(cache, good, options); }), "[1, 1, 1, 149]"));
  EXPECT_TRUE(contains(message_of([&] { cache.crop(151); }), "0…150"));
  EXPECT_TRUE(contains(message_of([&] { cache.select({}); }), "1 or more"));
  EXPECT_THROW(cache.select(std::vector<std::int64_t>{0, 1}), IndexError);
  EXPECT_THROW((void)gather(cache, 100, 51), IndexError);
  EXPECT_THROW((void)cache.packed_tokens(1), IndexError);
  EXPECT_TRUE(
      contains(message_of([&] { cache.set_padding(std::vector<std::int64_t>{3}); }), "sealed"));

  EXPECT_EQ(cache.tokens(), 150);
  EXPECT_EQ(gather(cache, 0, 150).keys.data, before.keys.data);
  EXPECT_EQ(gather(cache, 0, 150).values.data, before.values.data);
  all.append_to(cache, 150, 50);  // and goes on
  EXPECT_EQ(cache.tokens(), 200);
}

TEST_F(Cache, DiscardGivesAPrefillsCapacityBack) {
  CacheOptions options = geometry(64);
  options.sink_tokens = 0;
  options.residual_window = 128;
  KvCache cache(options);  // as a layer that sees the last 8 tokens only
  const Tokens all(1, 2, 1000, 64, engine_);
  all.append_to(cache, 0, 1000);
  cache.discard_before(992);
  cache.seal();
  EXPECT_EQ(cache.packed_tokens(0), 0);
  EXPECT_LE(cache.memory().exact_bytes, 192U * cache.memory().uncompressed_bytes /
                                            static_cast<std::size_t>(cache.memory().tokens));
}

TEST_F(Cache, ZeroVectorsAreLegal) {
  KvCache cache(geometry(64));
  const Array zeros({1, 2, 200, 64});
  cache.append(zeros, zeros);
  cache.seal();
  EXPECT_EQ(cache.packed_tokens(0), 128);
  EXPECT_EQ(gather(cache, 0, 200).keys.data, zeros.data);
  const Array output = attend(cache, Array({1, 2, 1, 64}, engine_));
  for (const float value : output.data) EXPECT_EQ(value, 0.0F);
}

TEST_F(Cache, NanQueriesGiveNanForThemAlone) {
  KvCache cache(geometry(64));
  const Tokens all(1, 2, 200, 64, engine_);
  all.append_to(cache, 0, 200);
  cache.seal();
  Array queries({1, 2, 1, 64}, engine_);
  queries.at(0, 1, 0)[5] = std::numeric_limits<float>::quiet_NaN();
  const Array output = attend(cache, queries);
  EXPECT_TRUE(std::isnan(output.at(0, 0, 1)[0]));
  EXPECT_FALSE(std::isnan(output.at(0, 0, 0)[0]));
}

TEST_F(Cache, EigenViewsAreTheSameAttention) {
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
