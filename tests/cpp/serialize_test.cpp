// Caches as bytes: what comes back, and that damaged bytes are refused.
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
using test::Tokens;

class Serialize : public testing::Test {
 protected:
  // Two rows that share tiles, one with padding, cropped into a tile and continued.
  KvCache filled(CacheOptions options) {
    KvCache cache(options, 2);
    const Tokens tokens(2, options.kv_heads, 320, options.head_dim, engine_);
    tokens.append_to(cache, 0, 30);
    cache.set_padding(std::vector<std::int64_t>{0, 7});
    tokens.append_to(cache, 30, 250);
    cache.seal();
    cache.crop(171);
    tokens.append_to(cache, 171, 120);
    cache.seal();
    cache.select(std::vector<std::int64_t>{1, 0, 1});
    return cache;
  }

  void expect_same(const KvCache& got, const KvCache& expected) {
    ASSERT_EQ(got.tokens(), expected.tokens());
    ASSERT_EQ(got.batch(), expected.batch());
    const Gathered a = gather(got, 0, got.tokens());
    const Gathered b = gather(expected, 0, got.tokens());
    EXPECT_EQ(a.keys.data, b.keys.data);
    EXPECT_EQ(a.values.data, b.values.data);
    const Array queries({got.batch(), 4, 3, got.options().head_dim}, engine_);
    EXPECT_EQ(attend(got, queries).data, attend(expected, queries).data);
    for (int row = 0; row < got.batch(); ++row) {
      EXPECT_EQ(got.packed_tokens(row), expected.packed_tokens(row));
      EXPECT_EQ(got.centering(row, 0), expected.centering(row, 0));
    }
  }

  std::mt19937_64 engine_ = test::random_engine(40);
};

TEST_F(Serialize, GivesTheSameCache) {
  for (const int bits : {2, 3, 4, 8}) {
    const KvCache cache = filled(geometry(48, bits, bits));
    const KvCache back = KvCache::deserialize(cache.serialize());
    expect_same(back, cache);
    EXPECT_EQ(back.memory().packed_bytes, cache.memory().packed_bytes) << "tiles stay shared";
    EXPECT_EQ(back.serialize(), cache.serialize());
  }
}

TEST_F(Serialize, KeepsRopeCentresAndGoesOnAlike) {
  CacheOptions options = geometry(64);
  options.centering = Centering::rope;
  options.rope = Rope{{}, Rope::Layout::interleaved, 32};
  for (int f = 0; f < 16; ++f) {
    options.rope->inv_freq.push_back(std::pow(100.0F, -static_cast<float>(f) / 16.0F));
  }
  KvCache cache = filled(options);
  ASSERT_EQ(cache.centering(0, 0), Centering::rope);
  KvCache back = KvCache::deserialize(cache.serialize());
  expect_same(back, cache);
  const Tokens more(3, options.kv_heads, 200, options.head_dim, engine_);
  for (KvCache* each : {&cache, &back}) {
    more.append_to(*each, 0, 200);
    each->seal();
  }
  expect_same(back, cache);
  for (KvCache* each : {&cache, &back}) each->crop(100);
  expect_same(back, cache);
}

TEST_F(Serialize, KeepsACacheWithoutTokens) {
  const KvCache back = KvCache::deserialize(KvCache(geometry(64), 3).serialize());
  EXPECT_EQ(back.batch(), 3);
  EXPECT_EQ(back.tokens(), 0);
}

TEST_F(Serialize, KeepsWhatASlidingWindowLeft) {
  CacheOptions options = geometry(64);
  options.sink_tokens = 0;
  KvCache cache = filled(options);
  cache.discard_before(150);
  ASSERT_GT(cache.first_token(), 0);
  const KvCache back = KvCache::deserialize(cache.serialize());
  EXPECT_EQ(back.first_token(), cache.first_token());
  expect_same(back, cache);
}

TEST_F(Serialize, LeavesNoMemoryBehind) {
  const std::size_t before = allocated_bytes();
  {
    const KvCache cache = filled(geometry(64));
    const auto bytes = cache.serialize();
    const KvCache back = KvCache::deserialize(bytes);
    EXPECT_THROW((void)KvCache::deserialize(std::span(bytes).first(bytes.size() - 1)), ValueError);
  }
  EXPECT_EQ(allocated_bytes(), before);
}

TEST_F(Serialize, RefusesEveryTruncation) {
  CacheOptions options = geometry(16, 2, 2, 1);
  const auto bytes = filled(options).serialize();
  for (std::size_t size = 0; size < bytes.size(); size += size < 200 ? 1 : 61) {
    EXPECT_THROW((void)KvCache::deserialize(std::span(bytes).first(size)), ValueError) << size;
  }
  auto longer = bytes;
  longer.push_back(std::byte{0});
  EXPECT_TRUE(contains(message_of([&] { (void)KvCache::deserialize(longer); }), "more bytes"));
}

// Whatever a damaged byte means, it is refused or gives a cache whose every member works.
TEST_F(Serialize, SurvivesDamage) {
  CacheOptions options = geometry(16, 3, 3, 1);
  options.rope = Rope{{1.0F, 0.1F}, Rope::Layout::half_split, 4};
  const auto bytes = filled(options).serialize();
  int refused = 0;
  for (int trial = 0; trial < 3000; ++trial) {
    auto damaged = bytes;
    const std::size_t at = trial < 400 ? static_cast<std::size_t>(trial) : engine_() % bytes.size();
    damaged[at] ^= static_cast<std::byte>(1U << (engine_() % 8));
    try {
      KvCache cache = KvCache::deserialize(damaged);
      const Array queries({cache.batch(), cache.options().kv_heads, 1, cache.options().head_dim},
                          engine_);
      (void)attend(cache, queries);
      (void)gather(cache, cache.first_token(), cache.tokens() - cache.first_token());
      cache.crop(cache.tokens() - 1);
    } catch (const ValueError&) {
      ++refused;
    }
  }
  EXPECT_GT(refused, 100);
}

TEST_F(Serialize, NamesAnotherVersion) {
  auto bytes = filled(geometry(64)).serialize();
  bytes[4] = std::byte{9};
  EXPECT_TRUE(contains(message_of([&] { (void)KvCache::deserialize(bytes); }), "version 9"));
  bytes[0] = std::byte{0};
  EXPECT_TRUE(contains(message_of([&] { (void)KvCache::deserialize(bytes); }), "not the bytes"));
}

}  // namespace
}  // namespace tqai
