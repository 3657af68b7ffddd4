// Tokens that stand elsewhere than at 0, 1, 2 …, and rows whose later tokens need other centres.
#include <cmath>
#include <limits>

#include "cache/centres.hpp"
#include "cache/row.hpp"
#include "cache_helpers.hpp"
#include "kernels/parts.hpp"

namespace tqai {
namespace {

using test::Array;
using test::attend;
using test::contains;
using test::gather;
using test::Gathered;
using test::geometry;
using test::message_of;
using test::Tokens;
using test::worst_error;

// [sections, tokens] of one row or all.
struct Stand {
  std::vector<std::int64_t> numbers;
  std::int64_t tokens;

  std::int64_t sections() const { return std::ssize(numbers) / tokens; }
  std::int64_t at(std::int64_t section, std::int64_t token) const {
    return numbers[static_cast<std::size_t>(section * tokens + token)];
  }
  // Of tokens [first, first + count).
  PositionTensor slice(std::int64_t first, std::int64_t count) const {
    return {numbers.data() + first, {1, sections(), count}, {0, tokens, 1}};
  }
};

// Text, an image of 9 columns whose tokens share their time and rows, text, and text once more that
// stands far back; all sections where there is one.
Stand image_in_a_text(std::int64_t tokens, int sections) {
  Stand stand{std::vector<std::int64_t>(static_cast<std::size_t>(sections * tokens)), tokens};
  for (std::int64_t t = 0; t < tokens; ++t) {
    for (int s = 0; s < sections; ++s) {
      std::int64_t position = t;
      if (t >= 100 && t < 245) {
        const std::int64_t i = t - 100;
        position = 100 + (s == 0 ? 0 : s == 1 ? i / 9 : i % 9);
      } else if (t >= 245 && t < 500) {
        position = 117 + (t - 245);
      } else if (t >= 500) {
        position = 40 + (t - 500);
      }
      stand.numbers[static_cast<std::size_t>(s * tokens + t)] = position;
    }
  }
  return stand;
}

Rope rope_of(int dim, Rope::Layout layout, int sections, bool in_turn) {
  Rope rope = test::rope_of(dim, layout);
  for (int f = 0; sections > 1 && f < dim / 2; ++f) {
    rope.sections.push_back(
        static_cast<std::uint8_t>(in_turn ? f % sections : f * sections / (dim / 2)));
  }
  return rope;
}

// Turns a key as the embedding does, in double.
void turn(const Rope& rope, const Stand& stand, std::int64_t token, float* key) {
  const int pairs = rope.rotary_dim / 2;
  for (int f = 0; f < pairs; ++f) {
    const auto pair = static_cast<std::size_t>(f);
    Rope one{{rope.inv_freq[pair]}, Rope::Layout::interleaved, 2};
    const bool interleaved = rope.layout == Rope::Layout::interleaved;
    float& a = key[interleaved ? 2 * f : f];
    float& b = key[interleaved ? 2 * f + 1 : f + pairs];
    float two[2] = {a, b};
    const std::int64_t section = rope.sections.empty() ? 0 : rope.sections[pair];
    test::turn(one, static_cast<double>(stand.at(section, token)), two);
    a = two[0];
    b = two[1];
  }
}

// Keys with a strong bias before the embedding.
Tokens turned_tokens(int batch, const Stand& stand, int dim, const Rope& rope,
                     std::mt19937_64& engine) {
  Tokens all(batch, 2, stand.tokens, dim, engine);
  all.keys.data = test::random_normal(all.keys.data.size(), engine);
  const auto bias = test::random_normal(static_cast<std::size_t>(dim), engine, 8.0F);
  for (int b = 0; b < batch; ++b) {
    for (int h = 0; h < 2; ++h) {
      for (std::int64_t t = 0; t < stand.tokens; ++t) {
        float* key = all.keys.at(b, h, t);
        for (int c = 0; c < dim; ++c) key[c] += bias[static_cast<std::size_t>(c)];
        turn(rope, stand, t, key);
      }
    }
  }
  return all;
}

void append(KvCache& cache, const Tokens& all, const Stand& stand, std::int64_t first,
            std::int64_t count) {
  cache.append(Tokens::slice(all.keys, first, count), Tokens::slice(all.values, first, count),
               stand.slice(first, count));
}

double key_error(const KvCache& cache, const Tokens& all) {
  const Gathered gathered = gather(cache, 0, cache.tokens());
  double sum = 0.0;
  for (std::size_t i = 0; i < gathered.keys.data.size(); ++i) {
    sum += std::pow(static_cast<double>(gathered.keys.data[i] - all.keys.data[i]), 2);
  }
  return sum / static_cast<double>(gathered.keys.data.size());
}

class Standing : public testing::Test {
 protected:
  CacheOptions options(int dim, Rope::Layout layout, int sections, bool in_turn = false) const {
    CacheOptions options = geometry(dim);
    options.rope = rope_of(dim, layout, sections, in_turn);
    options.centering = Centering::rope;
    return options;
  }
  std::mt19937_64 engine_ = test::random_engine(70);
};

constexpr auto kSplit = Rope::Layout::half_split;

// Lengths of runs of consecutive positions, those of one token in any number of sections: a tile
// has 1 to 64 of them, which the kernels treat in different ways.
constexpr struct {
  int sections;
  std::int64_t run;
} kRuns[] = {{1, 1}, {1, 3}, {1, 4}, {1, 23}, {3, 1}};

// What the kernel adds at any position, and what is subtracted there, is the centre turned by it.
TEST_F(Standing, BiasIsTheDirectProduct) {
  for (const auto layout : {kSplit, Rope::Layout::interleaved}) {
    for (const int dim : {16, 80, 128}) {
      for (const auto [sections, run] : kRuns) {
        const CacheOptions wanted = options(dim, layout, sections, dim == 80);
        const Rope& rope = *wanted.rope;
        detail::Context context;
        context.options = wanted;
        context.options.kv_heads = 1;
        context.rope = detail::shared_rope_tables(rope);
        context.kernels = &kernels::kernels(default_level());
        detail::Centres centres(detail::CentreShape{1, dim, dim / 2});
        centres.kind(0) = Centering::rope;
        const auto means = test::random_normal(static_cast<std::size_t>(dim), engine_);
        std::copy(means.begin(), means.end(), centres.means(0));
        Stand stand = image_in_a_text(kTileTokens, sections);
        std::vector<std::int32_t> each;
        for (std::size_t i = 0; i < stand.numbers.size(); ++i) {
          const std::int64_t span = engine_() % 2 == 0 ? 5000 : KvCache::kMaxPosition - run;
          std::int64_t& position = stand.numbers[i];
          position =
              static_cast<std::int64_t>(i) % run > 0
                  ? stand.numbers[i - 1] + 1
                  : static_cast<std::int64_t>(engine_() % static_cast<std::uint64_t>(2 * span)) -
                        span;
          each.push_back(static_cast<std::int32_t>(position));
        }
        const kernels::TilePositions positions{0, each.data(), sections};
        detail::cover(*context.rope, positions);
        const Array queries({1, 1, 5, dim}, engine_);
        std::vector<float> factors(
            static_cast<std::size_t>(detail::CentreScores::factor_floats(context, 5)) + 16);
        float* aligned = factors.data();
        while (reinterpret_cast<std::uintptr_t>(aligned) % 64 != 0) ++aligned;
        const detail::CentreScores scores(context, centres, 0, queries.at(0, 0, 0), dim, 5,
                                          aligned);
        std::vector<float> rows(static_cast<std::size_t>(dim) * kTileTokens, 0.0F);
        detail::add_centre(context, centres, 0, positions, 1.0F, rows.data());
        std::vector<std::vector<float>> expected(kTileTokens,
                                                 std::vector<float>(static_cast<std::size_t>(dim)));
        for (std::size_t t = 0; t < kTileTokens; ++t) {
          for (int f = 0; f < dim / 2; ++f) {
            const bool interleaved = layout == Rope::Layout::interleaved;
            expected[t][static_cast<std::size_t>(interleaved ? 2 * f : f)] = centres.means(0)[f];
            expected[t][static_cast<std::size_t>(interleaved ? 2 * f + 1 : f + dim / 2)] =
                centres.means(0)[dim / 2 + f];
          }
          turn(rope, stand, static_cast<std::int64_t>(t), expected[t].data());
          for (std::size_t c = 0; c < expected[t].size(); ++c) {
            ASSERT_NEAR(rows[t * expected[t].size() + c], expected[t][c], 1e-5) << dim;
          }
        }
        for (const Level level : available_levels()) {
          float bias[5][kTileTokens] = {};
          kernels::parts(level).add_rope(scores.rope(), positions, 5, bias);
          // A row's is the same, bit for bit, beside any number of others.
          for (const int count : {1, 2, 3, 4}) {
            std::vector<float> own(
                static_cast<std::size_t>(detail::CentreScores::factor_floats(context, count)));
            const detail::CentreScores some(context, centres, 0, queries.at(0, 0, 0), dim, count,
                                            own.data());
            float fewer[4][kTileTokens] = {};
            kernels::parts(level).add_rope(some.rope(), positions, count, fewer);
            for (int r = 0; r < count; ++r) {
              ASSERT_TRUE(std::equal(fewer[r], fewer[r] + kTileTokens, bias[r])) << count;
            }
          }
          for (int r = 0; r < 5; ++r) {
            for (std::size_t t = 0; t < kTileTokens; ++t) {
              double direct = 0.0;
              for (int c = 0; c < dim; ++c) {
                direct += static_cast<double>(queries.at(0, 0, r)[c]) *
                          static_cast<double>(expected[t][static_cast<std::size_t>(c)]);
              }
              ASSERT_NEAR(bias[r][t], direct, 1e-4) << name_of(level) << ", d " << dim;
            }
          }
        }
      }
    }
  }
}

TEST_F(Standing, TruePositionsTakeTheErrorAway) {
  for (const auto layout : {kSplit, Rope::Layout::interleaved}) {
    for (const int sections : {1, 3}) {
      for (const bool in_turn : {false, true}) {
        const CacheOptions wanted = options(64, layout, sections, in_turn);
        const Stand stand = image_in_a_text(700, sections);
        const Tokens all = turned_tokens(2, stand, 64, *wanted.rope, engine_);
        KvCache told(wanted, 2);
        KvCache untold(wanted, 2);
        for (std::int64_t t = 0; t < 700; t += 175) {
          append(told, all, stand, t, 175);
          all.append_to(untold, t, 175);
        }
        told.seal();
        EXPECT_LT(key_error(told, all), 0.012);
        EXPECT_GT(key_error(untold, all), 3.0 * key_error(told, all));
        EXPECT_EQ(told.centre_sets(0), 1);
        const Array queries({2, 6, 3, 64}, engine_, 0.3F);
        EXPECT_LT(worst_error(told, queries, attend(told, queries)), test::kPackedError);
      }
    }
  }
}

TEST_F(Standing, GivesTheSameBitsAtEveryLevel) {
  const Stand stand = image_in_a_text(700, 3);
  CacheOptions wanted = options(80, kSplit, 3, true);
  const Tokens all = turned_tokens(1, stand, 80, *wanted.rope, engine_);
  const Array queries({1, 6, 3, 80}, engine_, 0.3F);
  Array scalar({1, 3, 6, 80});
  for (const Level level : available_levels()) {
    wanted.level = level;
    KvCache cache(wanted);
    append(cache, all, stand, 0, 700);
    cache.seal();
    const Array output = attend(cache, queries);
    if (level == Level::scalar) scalar = output;
    EXPECT_EQ(output.data, scalar.data) << name_of(level);
  }
}

TEST_F(Standing, ConsecutivePositionsAreTheDefault) {
  const CacheOptions wanted = options(64, kSplit, 3);
  Stand stand{std::vector<std::int64_t>(600), 600};
  for (std::int64_t t = 0; t < 600; ++t) stand.numbers[static_cast<std::size_t>(t)] = t;
  const Tokens all = turned_tokens(1, {stand.numbers, 600}, 64, test::rope_of(64), engine_);
  KvCache told(wanted);
  KvCache untold(wanted);
  append(told, all, stand, 0, 300);
  all.append_to(told, 300, 300);
  all.append_to(untold, 0, 300);
  append(untold, all, stand, 300, 300);
  const Array queries({1, 4, 2, 64}, engine_);
  EXPECT_EQ(attend(told, queries).data, attend(untold, queries).data);
  EXPECT_EQ(told.serialize(), untold.serialize());
  EXPECT_EQ(told.memory().total_bytes(), untold.memory().total_bytes());
}

// After the last token in the section where that is furthest, as M-RoPE has it.
TEST_F(Standing, GoesOnWhereTheLastTokenStood) {
  const CacheOptions wanted = options(64, kSplit, 3);
  const Stand stand = image_in_a_text(400, 3);
  const Tokens all = turned_tokens(1, stand, 64, *wanted.rope, engine_);
  for (const std::int64_t cut : {100, 150, 245, 300, 3}) {
    KvCache told(wanted);
    append(told, all, stand, 0, 400);
    told.seal();
    told.crop(cut);
    KvCache untold(told);
    Stand rest{std::vector<std::int64_t>(200), 200};
    std::int64_t next = 0;
    for (int s = 0; s < 3; ++s) next = std::max(next, stand.at(s, cut - 1) + 1);
    for (std::int64_t t = 0; t < 200; ++t) rest.numbers[static_cast<std::size_t>(t)] = next + t;
    append(told, all, rest, 0, 200);
    all.append_to(untold, 0, 200);
    told.seal();
    untold.seal();
    EXPECT_EQ(told.serialize(), untold.serialize()) << cut;
  }
}

TEST_F(Standing, SurvivesEveryChange) {
  const CacheOptions wanted = options(64, kSplit, 3, true);
  const Stand stand = image_in_a_text(700, 3);
  const Tokens all = turned_tokens(2, stand, 64, *wanted.rope, engine_);
  const std::size_t before = allocated_bytes();
  {
    KvCache cache(wanted, 2);
    append(cache, all, stand, 0, 20);
    cache.set_padding(std::vector<std::int64_t>{0, 9});
    for (std::int64_t t = 20; t < 700; t += 85) {
      append(cache, all, stand, t, 85);
      EXPECT_EQ(cache.memory().total_bytes(), allocated_bytes() - before);
    }
    cache.seal();
    const auto check = [&](std::vector<std::int64_t> padding) {
      const Array queries({cache.batch(), 4, 2, 64}, engine_, 0.3F);
      EXPECT_LT(worst_error(cache, queries, attend(cache, queries), {}, padding),
                test::kPackedError);
      EXPECT_EQ(cache.memory().total_bytes(), allocated_bytes() - before);
    };
    check({0, 9});
    cache.crop(170);  // inside the image
    append(cache, all, stand, 170, 400);
    cache.seal();
    check({0, 9});
    EXPECT_LT(key_error(cache,
                        [&] {
                          Tokens part(2, 2, 570, 64, engine_);
                          for (int b = 0; b < 2; ++b) {
                            for (int h = 0; h < 2; ++h) {
                              for (std::int64_t t = 0; t < 570; ++t) {
                                const bool padded = b == 1 && t < 9;
                                for (int c = 0; c < 64; ++c) {
                                  part.keys.at(b, h, t)[c] =
                                      padded ? 0.0F : all.keys.at(b, h, t)[c];
                                }
                              }
                            }
                          }
                          return part;
                        }()),
              0.012);
    cache.select(std::vector<std::int64_t>{1, 0, 1});
    check({9, 0, 9});
    {
      const KvCache back = KvCache::deserialize(cache.serialize());
      const Array queries({3, 4, 2, 64}, engine_);
      EXPECT_EQ(attend(back, queries).data, attend(cache, queries).data);
      EXPECT_EQ(back.serialize(), cache.serialize());
      EXPECT_EQ(back.memory().packed_bytes, cache.memory().packed_bytes);
    }
    cache.discard_before(200);
    EXPECT_EQ(cache.memory().total_bytes(), allocated_bytes() - before);
    cache.crop(0);
    EXPECT_EQ(cache.memory().packed_bytes, 0U);
  }
  EXPECT_EQ(allocated_bytes(), before);
}

// Runs that are each consecutive, with something between them, are of all sections.
TEST_F(Standing, GapsAndJumpsInAnImageSText) {
  const CacheOptions wanted = options(64, kSplit, 3);
  const Stand stand = image_in_a_text(400, 3);
  const Tokens all = turned_tokens(1, stand, 64, *wanted.rope, engine_);
  KvCache cache(wanted);
  all.append_to(cache, 0, 60);
  std::vector<std::uint8_t> hidden(60, 0);
  std::fill_n(hidden.begin() + 20, 10, std::uint8_t{1});
  cache.leave_out(hidden);
  const Array queries({1, 4, 2, 64}, engine_);
  const auto check = [&] {
    const KvCache back = KvCache::deserialize(cache.serialize());
    EXPECT_EQ(back.serialize(), cache.serialize());
    EXPECT_EQ(attend(back, queries).data, attend(cache, queries).data);
  };
  check();
  append(cache, all, stand, 60, 340);
  check();
  cache.seal();
  check();
  Tokens held(1, 2, 400, 64, engine_);
  held.keys.data = all.keys.data;
  for (int h = 0; h < 2; ++h) std::fill_n(held.keys.at(0, h, 20), 10 * 64, 0.0F);
  EXPECT_LT(key_error(cache, held), 0.012);
}

TEST_F(Standing, RefusesWhatIsNoPosition) {
  KvCache cache(options(64, kSplit, 3));
  const Tokens all(1, 2, 100, 64, engine_);
  const auto bytes = cache.serialize();
  using Limits = std::numeric_limits<std::int64_t>;
  for (const std::int64_t hostile : {Limits::max(), Limits::min(), KvCache::kMaxPosition + 1}) {
    Stand stand = image_in_a_text(100, 3);
    stand.numbers[250] = hostile;
    const auto message = message_of([&] { append(cache, all, stand, 0, 100); });
    EXPECT_TRUE(contains(message, std::to_string(hostile))) << message;
  }
  EXPECT_TRUE(contains(message_of([&] { append(cache, all, image_in_a_text(100, 2), 0, 100); }),
                       "[1, 2, 100]"));
  PositionTensor short_ones = image_in_a_text(100, 3).slice(0, 99);
  EXPECT_TRUE(contains(message_of([&] {
                         cache.append(Tokens::slice(all.keys, 0, 100),
                                      Tokens::slice(all.values, 0, 100), short_ones);
                       }),
                       "99"));
  EXPECT_EQ(cache.serialize(), bytes);
  // The furthest ones that there may be, and none after them.
  Stand far{std::vector<std::int64_t>(100, KvCache::kMaxPosition), 100};
  append(cache, all, far, 0, 100);
  cache.seal();
  const Array queries({1, 4, 2, 64}, engine_, 0.3F);
  EXPECT_LT(worst_error(cache, queries, attend(cache, queries)), test::kPackedError);
  EXPECT_TRUE(contains(message_of([&] { all.append_to(cache, 0, 1); }), "position"));
}

// Whatever a damaged byte means, it is refused or gives a cache whose every member works.
TEST_F(Standing, SurvivesDamage) {
  CacheOptions wanted = options(16, kSplit, 3, true);
  wanted.kv_heads = 1;
  wanted.bits_k = wanted.bits_v = 2;
  const Stand stand = image_in_a_text(330, 3);
  const Tokens all(2, 1, 330, 16, engine_);
  KvCache cache(wanted, 2);
  for (std::int64_t t = 0; t < 330; t += 110) append(cache, all, stand, t, 110);
  cache.seal();
  const auto bytes = cache.serialize();
  for (std::size_t size = 0; size < bytes.size(); size += 97) {
    EXPECT_THROW((void)KvCache::deserialize(std::span(bytes).first(size)), ValueError) << size;
  }
  int refused = 0;
  for (int trial = 0; trial < 1500; ++trial) {
    auto damaged = bytes;
    damaged[engine_() % bytes.size()] ^= static_cast<std::byte>(1U << (engine_() % 8));
    try {
      KvCache back = KvCache::deserialize(damaged);
      const Array queries({back.batch(), 1, 1, 16}, engine_);
      (void)attend(back, queries);
      (void)gather(back, back.first_token(), back.tokens() - back.first_token());
      back.crop(back.tokens() - 100);
      const Tokens more(2, 1, 90, 16, engine_);
      more.append_to(back, 0, 90);
      back.seal();
      (void)attend(back, queries);
    } catch (const ValueError&) {
      ++refused;
    }
  }
  EXPECT_GT(refused, 30);
}

TEST_F(Standing, SectionsAreOnePerFrequency) {
  CacheOptions wanted = options(64, kSplit, 3);
  wanted.rope->sections.pop_back();
  EXPECT_TRUE(contains(message_of([&] { KvCache cache(wanted); }), "31 frequencies"));
  wanted.rope->sections.push_back(Rope::kMaxSections);
  EXPECT_TRUE(contains(message_of([&] { KvCache cache(wanted); }), "number of sections"));
}

// Rows whose first tokens say little about the later ones.
class CentreSets : public Standing {
 protected:
  // `kinds[i]` is the mean that tokens 100 i … 100 i + 99 have.
  Tokens tokens(const std::vector<int>& kinds, const std::vector<float>& spread) {
    const auto count = static_cast<std::int64_t>(100 * kinds.size());
    Tokens all(1, 2, count, 64, engine_);
    all.keys.data = test::random_normal(all.keys.data.size(), engine_);
    for (int h = 0; h < 2; ++h) {
      for (std::int64_t t = 0; t < count; ++t) {
        const auto kind = static_cast<std::size_t>(kinds[static_cast<std::size_t>(t / 100)]);
        for (int c = 0; c < 64; ++c) {
          float& number = all.keys.at(0, h, t)[c];
          number = spread[kind] * number +
                   6.0F * std::sin(static_cast<float>(kind) * 7.0F + static_cast<float>(c));
        }
      }
    }
    return all;
  }
  KvCache filled(const Tokens& all, std::int64_t chunk) {
    KvCache cache(geometry(64));
    for (std::int64_t t = 0; t < all.keys.shape[2]; t += chunk) {
      all.append_to(cache, t, chunk);
      cache.seal();
    }
    return cache;
  }
};

TEST_F(CentreSets, LaterTokensGetTheirOwn) {
  const Tokens all = tokens({0, 0, 1, 1, 1, 1, 1, 1}, {0.01F, 1.0F});
  for (const std::int64_t chunk : {50, 200, 800}) {
    const KvCache cache = filled(all, chunk);
    EXPECT_GE(cache.centre_sets(0), 2) << chunk;
    EXPECT_LT(key_error(cache, all), 0.02) << chunk;
    const Array queries({1, 4, 2, 64}, engine_, 0.3F);
    EXPECT_LT(worst_error(cache, queries, attend(cache, queries)), test::kPackedError);
    const KvCache back = KvCache::deserialize(cache.serialize());
    EXPECT_EQ(attend(back, queries).data, attend(cache, queries).data);
    KvCache shorter(cache);
    shorter.crop(120);
    EXPECT_EQ(shorter.centre_sets(0), 1);
  }
}

TEST_F(CentreSets, OldOnesAreTakenAgain) {
  const KvCache cache =
      filled(tokens({0, 0, 0, 1, 1, 1, 0, 0, 0, 1, 1, 1, 0, 0, 0}, {1.0F, 1.0F}), 100);
  EXPECT_LE(cache.centre_sets(0), 4);  // a tile of both kinds may have one
}

TEST_F(CentreSets, TokensOfOneKindShareOne) {
  for (const std::int64_t chunk : {60, 1200}) {
    EXPECT_EQ(filled(tokens(std::vector<int>(12, 0), {1.0F}), chunk).centre_sets(0), 1);
  }
}

TEST_F(CentreSets, AreFewWhateverComes) {
  std::vector<int> kinds(60);
  for (std::size_t i = 0; i < kinds.size(); ++i) kinds[i] = static_cast<int>(i);
  const KvCache cache = filled(tokens(kinds, std::vector<float>(60, 0.3F)), 100);
  EXPECT_LE(cache.centre_sets(0), 8);  // of 93 tiles
  EXPECT_GE(cache.centre_sets(0), 6);
}

}  // namespace
}  // namespace tqai
