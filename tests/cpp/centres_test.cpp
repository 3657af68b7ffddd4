// RoPE-aware and mean centring, through the cache.
#include "cache/centres.hpp"

#include <cmath>
#include <numeric>

#include "cache/row.hpp"
#include "cache_helpers.hpp"
#include "kernels/parts.hpp"

namespace tqai {
namespace {

using test::Array;
using test::attend;
using test::contains;
using test::gather;
using test::geometry;
using test::message_of;
using test::Tokens;
using test::worst_error;

// Keys with a strong bias before the embedding, as Qwen2's: the bias turns with the position.
Tokens turned_tokens(int batch, std::int64_t tokens, int dim, const Rope& rope,
                     std::mt19937_64& engine) {
  Tokens all(batch, 2, tokens, dim, engine);
  all.keys.data = test::random_normal(all.keys.data.size(), engine);
  const auto bias = test::random_normal(static_cast<std::size_t>(dim), engine, 8.0F);
  for (int b = 0; b < batch; ++b) {
    for (int h = 0; h < 2; ++h) {
      for (std::int64_t t = 0; t < tokens; ++t) {
        float* key = all.keys.at(b, h, t);
        for (int c = 0; c < dim; ++c) key[c] += bias[static_cast<std::size_t>(c)];
        test::turn(rope, static_cast<double>(t), key);
      }
    }
  }
  return all;
}

double key_error(const KvCache& cache, const Tokens& all) {
  const auto gathered = gather(cache, 0, cache.tokens());
  double sum = 0.0;
  for (std::size_t i = 0; i < gathered.keys.data.size(); ++i) {
    sum += std::pow(static_cast<double>(gathered.keys.data[i] - all.keys.data[i]), 2);
  }
  return sum / static_cast<double>(gathered.keys.data.size());
}

class Centres : public testing::Test {
 protected:
  std::mt19937_64 engine_ = test::random_engine(40);
};

TEST_F(Centres, RopeIsChosenForTurnedBiasesAndTakesTheErrorAway) {
  for (const auto layout : {Rope::Layout::half_split, Rope::Layout::interleaved}) {
    for (const int dim : {40, 64, 128}) {
      const Rope rope = test::rope_of(dim, layout);
      const Tokens all = turned_tokens(1, 600, dim, rope, engine_);
      double error[3];
      int i = 0;
      for (const Centering centering : {Centering::none, Centering::mean, Centering::automatic}) {
        CacheOptions options = geometry(dim);
        options.rope = rope;
        options.centering = centering;
        KvCache cache(options);
        all.append_to(cache, 0, 600);
        cache.seal();
        if (centering == Centering::automatic) {
          EXPECT_EQ(cache.centering(0, 0), Centering::rope);
        }
        error[i++] = key_error(cache, all);
      }
      // 64 times the noise's energy is bias; what is left is the noise's own error at 4 bits.
      EXPECT_LT(error[2], 0.05 * error[0]) << dim;
      EXPECT_LT(error[2], 0.1 * error[1]) << dim;
      EXPECT_LT(error[2], 0.012) << dim;
    }
  }
}

// Over a few tokens slow frequencies hardly turn, and the mean takes their bias away as well as the
// turned mean does; not for tokens that stand elsewhere.
TEST_F(Centres, AMeanThatHoldsHereAloneIsNotChosen) {
  Rope rope = test::rope_of(64);
  for (std::size_t f = 0; f < rope.inv_freq.size(); ++f) {
    rope.inv_freq[f] = 1e-3F / static_cast<float>(1 + f % 8);
  }
  const Tokens all = turned_tokens(1, 3300, 64, rope, engine_);
  CacheOptions options = geometry(64);
  options.rope = rope;
  KvCache cache(options);
  all.append_to(cache, 0, 100);
  cache.seal();
  std::vector<std::int64_t> stand(300);
  std::iota(stand.begin(), stand.end(), std::int64_t{3000});
  cache.append(Tokens::slice(all.keys, 3000, 300), Tokens::slice(all.values, 3000, 300),
               PositionTensor{stand.data(), {1, 1, 300}, {0, 300, 1}});
  cache.seal();
  EXPECT_EQ(cache.packed_tokens(0), 64 + 256);
  EXPECT_EQ(cache.centre_sets(0), 1);
  for (int head = 0; head < 2; ++head) EXPECT_EQ(cache.centering(0, head), Centering::rope);
  const auto gathered = gather(cache, 100, 256);
  double sum = 0.0;
  for (int head = 0; head < 2; ++head) {
    for (std::int64_t t = 0; t < 256; ++t) {
      for (int c = 0; c < 64; ++c) {
        const float* got = gathered.keys.at(0, head, t);
        sum += std::pow(static_cast<double>(got[c] - all.keys.at(0, head, 3000 + t)[c]), 2);
      }
    }
  }
  EXPECT_LT(sum / (2 * 256 * 64), 0.012);
}

TEST_F(Centres, OtherLayoutsOrFrequenciesDoNotHelp) {
  const Tokens all = turned_tokens(1, 600, 64, test::rope_of(64), engine_);
  CacheOptions options = geometry(64);
  options.centering = Centering::rope;
  options.rope = test::rope_of(64);
  KvCache right(options);
  options.rope = test::rope_of(64, Rope::Layout::interleaved);
  KvCache wrong(options);
  for (KvCache* cache : {&right, &wrong}) {
    all.append_to(*cache, 0, 600);
    cache->seal();
  }
  EXPECT_GT(key_error(wrong, all), 10.0 * key_error(right, all));
}

TEST_F(Centres, ScoresCarryTheCentreAtEveryLevel) {
  const Rope rope = test::rope_of(64);
  const Tokens all = turned_tokens(2, 700, 64, rope, engine_);
  const Array queries({2, 6, 3, 64}, engine_, 0.3F);
  Array scalar({0, 0, 0, 0});
  for (const Level level : available_levels()) {
    CacheOptions options = geometry(64);
    options.rope = rope;
    options.centering = Centering::rope;
    options.level = level;
    KvCache cache(options, 2);
    all.append_to(cache, 0, 700);
    cache.seal();
    const Array output = attend(cache, queries);
    EXPECT_LT(worst_error(cache, queries, output), test::kPackedError) << name_of(level);
    if (level == Level::scalar) scalar = output;
    EXPECT_EQ(output.data, scalar.data) << name_of(level);
  }
}

// The bias that the kernel adds is the direct product of query and centre, as the layout says.
TEST_F(Centres, BiasIsTheDirectProduct) {
  for (const auto layout : {Rope::Layout::half_split, Rope::Layout::interleaved}) {
    for (const int dim : {16, 64, 80, 128, 256}) {
      Rope rope = test::rope_of(dim, layout);
      const Tokens all = turned_tokens(1, 320, dim, rope, engine_);
      detail::Context context;
      context.options = geometry(dim);
      context.options.value_head_dim = dim;
      context.options.centering = Centering::rope;
      context.rope = detail::shared_rope_tables(rope);
      context.kernels = &kernels::kernels(default_level());
      detail::Centres centres(detail::CentreShape{1, dim, dim / 2});
      const auto* keys = reinterpret_cast<const std::byte*>(all.keys.at(0, 0, 0));
      context.rope->cover(-2'000'000, 100'003);
      std::vector<detail::Moments> moments(5, detail::Moments(context));
      std::vector<const detail::Moments*> parts;
      std::vector<float> rows(static_cast<std::size_t>(dim) * kTileTokens, 0.0F);
      for (std::size_t i = 0; i < moments.size(); ++i) {
        detail::find_moments(
            context, context.rope->phasors(), keys + i * kTileTokens * context.key_bytes(),
            {7 + static_cast<std::int64_t>(i) * kTileTokens}, rows.data(), moments[i]);
        parts.push_back(&moments[i]);
      }
      detail::choose_centre(context, detail::pooled(parts), 0, centres);
      const Array queries({1, 1, 5, dim}, engine_);
      for (const std::int64_t first : {0, 7, 64, 1000, 100003, -5, -1'999'950}) {
        std::vector<float> factors(
            static_cast<std::size_t>(detail::CentreScores::factor_floats(context, 5)));
        const detail::CentreScores scores(context, centres, 0, queries.at(0, 0, 0), dim, 5,
                                          factors.data());
        rows.assign(rows.size(), 0.0F);
        detail::add_centre(context, centres, 0, {first}, 1.0F, rows.data());
        for (const Level level : available_levels()) {
          float bias[5][kTileTokens];
          for (int r = 0; r < 5; ++r) std::fill_n(bias[r], kTileTokens, scores.constants()[r]);
          kernels::parts(level).add_rope(scores.rope(), {first}, 5, bias);
          // A row's is the same, bit for bit, beside any number of others.
          for (const int count : {1, 2, 3, 4}) {
            std::vector<float> own(
                static_cast<std::size_t>(detail::CentreScores::factor_floats(context, count)));
            const detail::CentreScores some(context, centres, 0, queries.at(0, 0, 0), dim, count,
                                            own.data());
            float fewer[4][kTileTokens];
            for (int r = 0; r < count; ++r) std::fill_n(fewer[r], kTileTokens, some.constants()[r]);
            kernels::parts(level).add_rope(some.rope(), {first}, count, fewer);
            for (int r = 0; r < count; ++r) {
              ASSERT_TRUE(std::equal(fewer[r], fewer[r] + kTileTokens, bias[r])) << count;
            }
          }
          for (int r = 0; r < 5; ++r) {
            for (int t = 0; t < kTileTokens; ++t) {
              // Directly, in double: the mean pairs turned to the position.
              double direct = 0.0;
              double scale = 0.0;
              for (int f = 0; f < dim / 2; ++f) {
                const bool split = layout == Rope::Layout::half_split;
                const int a = split ? f : 2 * f;
                const int b = split ? f + dim / 2 : 2 * f + 1;
                const double angle =
                    static_cast<double>(first + t) *
                    static_cast<double>(rope.inv_freq[static_cast<std::size_t>(f)]);
                const double real = static_cast<double>(centres.means(0)[f]);
                const double imaginary = static_cast<double>(centres.means(0)[dim / 2 + f]);
                const double c_a = real * std::cos(angle) - imaginary * std::sin(angle);
                const double c_b = real * std::sin(angle) + imaginary * std::cos(angle);
                const float* query = queries.at(0, 0, r);
                direct += static_cast<double>(query[a]) * c_a + static_cast<double>(query[b]) * c_b;
                scale += std::hypot(static_cast<double>(query[a]), static_cast<double>(query[b])) *
                         std::hypot(real, imaginary);
                EXPECT_NEAR(rows[static_cast<std::size_t>(t * dim + a)], c_a, 1e-5 * 10.0);
              }
              ASSERT_NEAR(bias[r][t], direct, 1e-5 * scale) << dim << " " << first << " " << t;
            }
          }
        }
      }
    }
  }
}

TEST_F(Centres, PartialRotaryAndSlidingAndCroppedAndPaddedRows) {
  Rope rope = test::rope_of(32);  // of 64 coordinates
  const Tokens all = turned_tokens(2, 500, 64, rope, engine_);
  CacheOptions options = geometry(64);
  options.rope = rope;
  options.centering = Centering::rope;
  KvCache cache(options, 2);
  all.append_to(cache, 0, 400);
  cache.set_padding(std::vector<std::int64_t>{0, 29});
  cache.seal();
  const Array queries({2, 4, 2, 64}, engine_, 0.3F);
  EXPECT_LT(worst_error(cache, queries, attend(cache, queries), {}, {0, 29}), test::kPackedError);
  cache.crop(237);
  all.append_to(cache, 237, 200);
  cache.seal();
  EXPECT_LT(worst_error(cache, queries, attend(cache, queries), {}, {0, 29}), test::kPackedError);
  cache.select(std::vector<std::int64_t>{1, 1});
  EXPECT_LT(worst_error(cache, queries, attend(cache, queries), {}, {29, 29}), test::kPackedError);
}

TEST_F(Centres, NoiseGetsNone) {
  CacheOptions options = geometry(64);
  options.rope = test::rope_of(64);
  KvCache cache(options);
  Tokens all(1, 2, 300, 64, engine_);
  all.keys.data = test::random_normal(all.keys.data.size(), engine_);
  EXPECT_FALSE(cache.centering(0, 0).has_value());
  all.append_to(cache, 0, 300);
  cache.seal();
  EXPECT_EQ(cache.centering(0, 0), Centering::none);
  EXPECT_EQ(cache.centering(0, 1), Centering::none);
}

TEST_F(Centres, FarPositionsStayExact) {
  // Phasors come from double angles: at position 200 000 the centre is as good as at the start.
  const Rope rope = test::rope_of(64);
  const detail::RopeTables tables(rope);
  tables.cover(0, 204'799);
  const float* tiles = tables.phasors().tiles;
  const std::size_t tile = 3125;  // 200 000 / 64
  for (std::size_t f = 0; f < 32; ++f) {
    const double angle = (200000.0 + 31.5) * static_cast<double>(rope.inv_freq[f]);
    EXPECT_NEAR(tiles[tile * 64 + f], std::cos(angle), 1e-6);
    EXPECT_NEAR(tiles[tile * 64 + 32 + f], std::sin(angle), 1e-6);
  }
}

TEST_F(Centres, RefusesBadRopes) {
  CacheOptions options = geometry(64);
  options.centering = Centering::rope;
  EXPECT_TRUE(contains(message_of([&] { KvCache cache(options); }), "no rope was given"));
  options.rope = test::rope_of(64);
  options.rope->rotary_dim = 66;
  EXPECT_TRUE(contains(message_of([&] { KvCache cache(options); }), "rotary_dim = 66"));
  options.rope->rotary_dim = 32;
  EXPECT_TRUE(contains(message_of([&] { KvCache cache(options); }), "32 frequencies"));
  options.rope = test::rope_of(64);
  options.rope->inv_freq[3] = std::numeric_limits<float>::infinity();
  EXPECT_TRUE(contains(message_of([&] { KvCache cache(options); }), "NaN or infinite"));
}

// Denormal numbers are right, and a hundred times as slow.
TEST(RopeTables, HoldNoDenormalNumbers) {
  Rope rope;
  for (int f = 0; f < 32; ++f) {
    rope.inv_freq.push_back((f % 2 == 0 ? 1.0F : -1.0F) *
                            std::pow(1e9F, -static_cast<float>(f) / 32.0F));
  }
  rope.rotary_dim = 64;
  const detail::RopeTables tables(rope);
  constexpr int kTerms = 2 * kernels::kRopePowers;
  for (int i = 0; i < 32 * kTerms; ++i) {
    const float term = tables.terms()[i];
    EXPECT_TRUE(term == 0.0F || std::abs(term) >= 1e-20F) << i << ": " << term;
  }
  // The sine's first term is never left out.
  for (int f = 0; f < 32; ++f) EXPECT_NE(tables.terms()[kTerms * f + 1], 0.0F) << f;
}

TEST(RopeTables, PolynomialsOfSlowFrequencies) {
  for (const double angle : {1.0, -1.0, 0.3, 1e-3, 1e-9}) {
    Rope rope;
    rope.inv_freq = {static_cast<float>(angle / 32.0)};
    rope.rotary_dim = 2;
    const detail::RopeTables tables(rope);
    ASSERT_TRUE(tables.is_slow(0));
    for (double x = -1.0; x <= 1.0; x += 1.0 / 64.0) {
      double cosine = 0.0;
      double sine = 0.0;
      for (int power = kernels::kRopePowers - 1; power >= 0; --power) {
        cosine = cosine * x * x + static_cast<double>(tables.terms()[2 * power]);
        sine = sine * x * x + static_cast<double>(tables.terms()[2 * power + 1]);
      }
      const double turned = 32.0 * static_cast<double>(rope.inv_freq[0]) * x;
      EXPECT_NEAR(cosine, std::cos(turned), 3e-7) << angle << " " << x;
      EXPECT_NEAR(sine * x, std::sin(turned), 3e-7) << angle << " " << x;
    }
  }
}

}  // namespace
}  // namespace tqai
