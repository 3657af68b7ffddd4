// Caches as bytes: what comes back, and that damaged bytes are refused.
#include <cmath>
#include <cstring>
#include <functional>
#include <limits>
#include <tqai/cache.hpp>
#include <tqai/codebook.hpp>

#include "any_operations.hpp"
#include "cache_helpers.hpp"
#include "crc32.hpp"

#if defined(__linux__)
#include <sys/resource.h>
#endif

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

// Whatever damaged bytes mean, they are refused or give a cache that any operations may follow on.
TEST_F(Serialize, SurvivesDamage) {
  CacheOptions options = geometry(16, 3, 3, 1);
  options.rope = Rope{{1.0F, 0.1F}, Rope::Layout::half_split, 4};
  const auto bytes = filled(options).serialize();
  EXPECT_GT(test::refusals_of_damaged(bytes, 1200, 400, engine_), 40);
}

TEST_F(Serialize, NamesAnotherVersion) {
  auto bytes = filled(geometry(64)).serialize();
  bytes[4] = std::byte{9};
  EXPECT_TRUE(contains(message_of([&] { (void)KvCache::deserialize(bytes); }), "version 9"));
  bytes[0] = std::byte{0};
  EXPECT_TRUE(contains(message_of([&] { (void)KvCache::deserialize(bytes); }), "not the bytes"));
}

// A cache as it may be written, number by number, for changes that no damaged byte would make: one
// row of one head with sink tokens, a tile and a tail, in fp32.
struct Hostile {
  static constexpr int kDim = 16;
  static constexpr std::uint32_t kNothing = 0xFFFF'FFFF;

  std::int32_t kv_heads = 1;
  std::int32_t head_dim = kDim;
  std::int32_t sink_tokens = 4;
  Centering centering = Centering::automatic;
  bool rope = true;
  std::vector<float> inv_freq = {1.0F, 0.1F};
  std::int64_t tokens = 4 + 64 + 10;
  std::vector<std::int64_t> exact = {4, 10};  // tokens of the sinks and of the tail
  float number = 0.5F;                        // all of theirs
  std::int64_t block_first = 4;
  std::int64_t block_position = 4;
  std::vector<std::int32_t> places;  // of 64 tokens, in one section
  std::uint16_t norm = 0x3C00;
  std::uint32_t centres = 1;
  float centre = 0.25F;  // all numbers of it
  Centering kind = Centering::rope;
  bool ends_at_centres = false;
  std::uint32_t rows = 1;
  std::int64_t first = 0;
  std::uint32_t sinks = 0;
  std::uint32_t tail = 1;
  std::int64_t next_position = 78;
  std::int64_t sink_position = 0;
  std::int64_t tail_position = 68;
  std::uint64_t tail_numbers = 0;
  std::uint32_t sets = 1;
  std::uint32_t tiles = 1;
  std::int32_t tile_tokens = 64;
  std::int32_t tile_set = 0;
  std::byte padding{0};
  std::uint32_t levels_mark = 0;  // 0: the codebook's
  float step_factor = 1.0F;

  std::vector<std::byte> bytes() const {
    std::vector<std::byte> bytes;
    const auto put = [&bytes](const auto& value) {
      const std::size_t end = bytes.size();
      bytes.resize(end + sizeof(value));
      std::memcpy(bytes.data() + end, &value, sizeof(value));
    };
    put(std::uint32_t{0x4941'5154});
    put(std::uint32_t{3});
    const std::int32_t window = 16;
    for (const std::int32_t option : {kv_heads, head_dim, head_dim, 4, 4, sink_tokens, window}) {
      put(option);
    }
    put(DType::f32);
    put(RotationKind::automatic);
    put(centering);
    put(static_cast<std::uint8_t>(rope ? 1 : 0));
    put(std::uint64_t{1});
    if (rope) {
      put(static_cast<std::int32_t>(2 * inv_freq.size()));
      put(Rope::Layout::half_split);
      put(static_cast<std::uint32_t>(inv_freq.size()));
      for (const float frequency : inv_freq) put(frequency);
      put(std::uint32_t{0});
    }
    const bool valid = head_dim >= 8 && head_dim <= 576;
    const Codebook& book = codebook(valid ? head_dim : kDim, 4, Grid::int8);
    for (int side = 0; side < 2; ++side) {
      put(levels_mark != 0 ? levels_mark : detail::crc32(std::as_bytes(book.levels())));
      put(step_factor * book.step());
    }
    put(tokens);
    put(static_cast<std::uint32_t>(exact.size()));
    for (const std::int64_t count : exact) {
      put(count);
      for (std::int64_t i = 0; i < count * 2 * head_dim; ++i) put(number);
    }
    put(tiles);
    if (tiles > 0) {
      put(block_first);
      put(block_position);
      put(static_cast<std::uint32_t>(places.empty() ? 0 : 1));
      for (const std::int32_t place : places) put(place);
    }
    put(centres);
    if (ends_at_centres) return bytes;
    for (std::uint32_t i = 0; i < centres; ++i) {
      const std::size_t count =
          static_cast<std::size_t>(head_dim) + (rope ? 2 * inv_freq.size() : 0);
      for (std::size_t c = 0; c < count; ++c) put(centre);
      put(1.0F);
      put(kind);
    }
    put(rows);
    put(first);
    put(sinks);
    put(tail);
    put(next_position);
    put(sink_position);
    put(std::uint64_t{0});
    put(tail_position);
    put(tail_numbers);
    put(sets);
    for (std::uint32_t i = 0; i < sets; ++i) put(std::uint32_t{0});
    put(tiles);
    if (tiles > 0) {
      put(std::uint32_t{0});
      put(tile_tokens);
      put(tile_set);
    }
    while (bytes.size() % kLineBytes != 0) bytes.push_back(padding);
    if (tiles > 0) {
      bytes.insert(bytes.end(), 2 * packed_bytes(head_dim, 4), std::byte{0x35});
      for (int i = 0; i < 2 * kTileTokens; ++i) put(norm);
    }
    return bytes;
  }
};

TEST(HostileBytes, AreRefusedWithWhatTheyGiveAndWhatIsAllowed) {
  EXPECT_EQ(KvCache::deserialize(Hostile{}.bytes()).tokens(), 78);
  EXPECT_EQ(KvCache::deserialize(Hostile{}.bytes()).serialize(), Hostile{}.bytes());
  struct Change {
    std::function<void(Hostile&)> make;
    const char* message;
  };
  constexpr std::int64_t kMost = KvCache::kMaxPosition;
  const Change changes[] = {
      {[](Hostile& h) { h.levels_mark = 1; }, "another codebook"},
      {[](Hostile& h) { h.step_factor = 1.001F; }, "another codebook"},
      {[](Hostile& h) { h.step_factor = NAN; }, "another codebook"},
      {[](Hostile& h) { h.padding = std::byte{1}; }, "padding"},
      {[](Hostile& h) { h.sink_tokens = 3; }, "a row's sink tokens = 4; allowed: 0…3"},
      {[](Hostile& h) { h.exact[0] = 70, h.block_first = 70, h.tokens = 144; },
       "a row's sink tokens = 70; allowed: 0…4"},
      {[](Hostile& h) { h.sets = h.tiles = h.centres = 0, h.tokens = 14; },
       "sink tokens of a row without centres"},
      {[](Hostile& h) { h.sets = 0, h.sinks = Hostile::kNothing, h.block_first = 0; },
       "tiles of a row without centres"},
      {[](Hostile& h) { h.sets = 33; }, "a row's number of centre sets = 33; allowed: 0…32"},
      {[](Hostile& h) { h.tile_set = 1; }, "a tile's centre set = 1 where there are 1"},
      {[](Hostile& h) { h.tile_set = -1; }, "a tile's centre set = -1"},
      {[](Hostile& h) { h.tile_tokens = 65; }, "a tile's tokens = 65; allowed: 1…64"},
      {[](Hostile& h) { h.tile_tokens = 0; }, "a tile's tokens = 0"},
      {[](Hostile& h) { h.block_first = 5; }, "a tile's first token = 5; allowed: 4…4"},
      {[](Hostile& h) { h.first = 1; }, "a tile's first token = 4; allowed: 5…5"},
      {[](Hostile& h) { h.tokens = 79; }, "a row's number of tokens = 78; allowed: 79…79"},
      {[](Hostile& h) { h.tail = 2; }, "a part's index = 2 where there are 2"},
      {[](Hostile& h) { h.first = -1; }, "a row's first token = -1"},
      {[](Hostile& h) { h.rows = 0; }, "a number of rows = 0"},
      {[](Hostile& h) { h.norm = 0x7C00; }, "a norm's FP16 bits = 31744; allowed: 0…31743"},
      {[](Hostile& h) { h.norm = 0xBC00; }, "a norm's FP16 bits"},
      {[](Hostile& h) { h.number = std::nanf(""); }, "NaN or infinity"},
      // Tables of an embedding end where positions do, and all tokens must be within.
      {[](Hostile& h) { h.tail_position = kMost; }, "a token's position = 1073741832; allowed"},
      {[](Hostile& h) { h.sink_position = kMost - 2; }, "a token's position = 1073741824"},
      {[](Hostile& h) { h.block_position = -kMost - 1; }, "a token's position = -1073741824"},
      {[](Hostile& h) { h.next_position = kMost + 2; },
       "the position after a row's tokens = 1073741825"},
      {[](Hostile& h) { h.next_position = std::numeric_limits<std::int64_t>::min(); },
       "the position after a row's tokens = -9223372036854775808"},
      {[](Hostile& h) { h.places.assign(64, 1 << 30); }, "a token's position = 1073741824"},
      {[](Hostile& h) { h.tail_numbers = 9; }, "a number of positions = 9; allowed: 0 or 10"},
      {[](Hostile& h) { h.tail_numbers = std::uint64_t{1} << 62; }, "a number of positions"},
      {[](Hostile& h) { h.rope = false, h.kind = Centering::mean, h.places.assign(64, 1); },
       "a tile's number of sections = 1; allowed: 0"},
      // What a centre leaves of a key must fit the encoder and FP16.
      {[](Hostile& h) { h.centre = std::nanf(""); }, "a centre of length nan"},
      {[](Hostile& h) { h.centre = 3e38F; }, "a centre of length inf; allowed: up to 16376"},
      {[](Hostile& h) { h.centre = 4000.0F; }, "a centre of length 17888.5; allowed: up to 16376"},
      {[](Hostile& h) { h.kind = static_cast<Centering>(0); }, "a head's centring = 0"},
      {[](Hostile& h) { h.kind = static_cast<Centering>(200); }, "a head's centring = 200"},
      {[](Hostile& h) { h.centering = Centering::none; },
       "a head's centring = 3 in a cache whose centring = 1"},
      {[](Hostile& h) { h.rope = false; }, "without a rotary embedding"},
      {[](Hostile& h) { h.tokens = std::int64_t{1} << 41; }, "a number of tokens"},
      {[](Hostile& h) { h.exact = {-1}; }, "a number of exact tokens = -1"},
  };
  for (const Change& change : changes) {
    Hostile hostile;
    change.make(hostile);
    const std::string message = message_of([&] { (void)KvCache::deserialize(hostile.bytes()); });
    EXPECT_TRUE(contains(message, change.message)) << change.message << ", not: " << message;
  }
}

// Positions mean nothing there, but tokens that follow one another must go on to: else what is
// sealed has positions of its own, which no reader accepts.
TEST(HostileBytes, WithoutPositionsGoOnWhereTheirTokensEnd) {
  auto engine = test::random_engine(5);
  const Tokens more(1, 1, 100, Hostile::kDim, engine);
  for (const std::int64_t wrong : {-5, 0, 1000}) {
    Hostile hostile;
    hostile.rope = false;
    hostile.kind = Centering::mean;
    hostile.next_position = wrong;
    KvCache cache = KvCache::deserialize(hostile.bytes());
    cache.append(more.keys, more.values);
    cache.seal();
    EXPECT_GT(cache.packed_tokens(0), 64);
    const std::vector<std::byte> bytes = cache.serialize();
    EXPECT_EQ(KvCache::deserialize(bytes).serialize(), bytes);
  }
}

#if defined(__linux__)

std::size_t most_resident_bytes() {
  rusage usage{};
  getrusage(RUSAGE_SELF, &usage);
  return static_cast<std::size_t>(usage.ru_maxrss) * 1024;
}

// Tables over positions would take 37 MB here, and the centres that do not follow 268 MB.
TEST(HostileBytes, CostNoMoreThanTheyAre) {
  constexpr std::size_t kAllowed = std::size_t{16} << 20;
  Hostile far;
  far.head_dim = 512;
  far.inv_freq.assign(256, 0.01F);
  (void)KvCache::deserialize(far.bytes());  // codebooks are made once
  far.block_position = -KvCache::kMaxPosition;
  const std::size_t before = most_resident_bytes();
  KvCache cache = KvCache::deserialize(far.bytes());
  cache.discard_before(cache.tokens());
  EXPECT_LT(most_resident_bytes() - before, kAllowed);

  Hostile wide;
  wide.kv_heads = 1 << 16;
  wide.head_dim = 512;
  wide.exact.clear();
  wide.tiles = 0;
  wide.ends_at_centres = true;
  std::vector<std::byte> bytes = wide.bytes();
  bytes.resize(bytes.size() + (1 << 17));
  EXPECT_TRUE(contains(message_of([&] { (void)KvCache::deserialize(bytes); }), "ends too early"));
  EXPECT_LT(most_resident_bytes() - before, kAllowed);
}

#endif

}  // namespace
}  // namespace tqai
