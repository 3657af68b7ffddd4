// Caches whose values are in trellis codes (CacheOptions::value_codes).
#include <cmath>
#include <cstring>
#include <limits>
#include <tqai/cache.hpp>

#include "any_operations.hpp"
#include "basis_helpers.hpp"
#include "cache_helpers.hpp"

namespace tqai {
namespace {

using test::Array;
using test::attend;
using test::contains;
using test::gather;
using test::Gathered;
using test::message_of;
using test::Tokens;

CacheOptions with_trellis(int dim, int bits_v, int bits_k = 4) {
  CacheOptions options = test::geometry(dim, bits_k, bits_v);
  options.value_codes = CodeKind::trellis;
  return options;
}

KvCache filled(const CacheOptions& options, const Tokens& tokens) {
  KvCache cache(options, static_cast<int>(tokens.keys.shape[0]));
  tokens.append_to(cache, 0, tokens.keys.shape[2]);
  cache.seal();
  return cache;
}

// Mean squared error of packed values, relative to their squares.
double value_error(const KvCache& cache, const Tokens& tokens) {
  const Gathered all = gather(cache, 0, cache.tokens());
  double error = 0.0;
  double square = 0.0;
  for (std::int64_t h = 0; h < tokens.values.shape[1]; ++h) {
    for (std::int64_t t = 4; t < 4 + cache.packed_tokens(0); ++t) {
      for (std::int64_t c = 0; c < tokens.values.shape[3]; ++c) {
        const double value = static_cast<double>(tokens.values.at(0, h, t)[c]);
        error += std::pow(value - static_cast<double>(all.values.at(0, h, t)[c]), 2.0);
        square += value * value;
      }
    }
  }
  return error / square;
}

TEST(TrellisCache, ValuesHaveLessErrorInTheSameBytesAndKeysAreTheSame) {
  auto engine = test::random_engine(60);
  constexpr double kMost[] = {.85, .73, .69, .69};
  for (int bits = 1; bits <= kMaxTrellisBits; ++bits) {
    const Tokens tokens(1, 2, 300, 64, engine);
    CacheOptions options = with_trellis(64, bits);
    const KvCache rings = filled(options, tokens);
    options.value_codes = CodeKind::scalar;
    const KvCache scalar = filled(options, tokens);
    ASSERT_EQ(rings.packed_tokens(0), scalar.packed_tokens(0));
    EXPECT_EQ(rings.options().value_codes, CodeKind::trellis);
    EXPECT_EQ(gather(rings, 0, 300).keys.data, gather(scalar, 0, 300).keys.data);
    EXPECT_LE(value_error(rings, tokens), kMost[bits - 1] * value_error(scalar, tokens)) << bits;
    EXPECT_EQ(rings.memory().packed_bytes, scalar.memory().packed_bytes);
    EXPECT_EQ(rings.memory().total_bytes(), scalar.memory().total_bytes());
  }
}

// Over decoded tokens in double precision, as tiles of scalar codes; and the same at every level.
TEST(TrellisCache, AttentionIsOverWhatIsGathered) {
  auto engine = test::random_engine(61);
  for (int bits = 1; bits <= kMaxTrellisBits; ++bits) {
    for (const int dim : {8, 40, 64, 128}) {
      for (const int group : {1, 3}) {
        const Tokens tokens(2, 2, 250, dim, engine);
        CacheOptions options = with_trellis(dim, bits);
        KvCache cache = filled(options, tokens);
        cache.crop(200);  // into a tile
        const Array queries({2, 2 * group, 3, dim}, engine);
        const Array output = attend(cache, queries);
        EXPECT_LE(test::worst_error(cache, queries, output), test::kPackedError)
            << "bits " << bits << ", d " << dim << ", group " << group;
        for (const Level level : available_levels()) {
          options.level = level;
          KvCache same = filled(options, tokens);
          same.crop(200);
          EXPECT_EQ(same.serialize(), cache.serialize());
          EXPECT_EQ(attend(same, queries).data, output.data);
          EXPECT_EQ(gather(same, 0, 200).values.data, gather(cache, 0, 200).values.data);
        }
      }
    }
  }
}

TEST(TrellisCache, BytesGiveTheSameCacheAndGoOnAlike) {
  auto engine = test::random_engine(62);
  for (const bool in_basis : {false, true}) {
    const Tokens tokens(1, 2, 300, 64, engine);
    CacheOptions options = with_trellis(64, 3);
    if (in_basis) {
      options.key_basis = std::make_shared<const KeyBasis>(
          KeyBasis::learn(test::moments_of(64, 200, 2), options.bits_k));
    }
    KvCache cache(options);
    tokens.append_to(cache, 0, 90);
    std::vector<std::uint8_t> hidden(90, 0);
    hidden[40] = 1;
    cache.leave_out(hidden);
    tokens.append_to(cache, 90, 100);
    cache.seal();
    const auto bytes = cache.serialize(BasisAs::matrices);
    std::uint32_t version = 0;
    std::memcpy(&version, bytes.data() + 4, sizeof version);
    EXPECT_EQ(version, 6U);
    KvCache back = KvCache::deserialize(bytes);
    EXPECT_EQ(back.options().value_codes, CodeKind::trellis);
    EXPECT_EQ(back.options().key_basis != nullptr, in_basis);
    EXPECT_EQ(back.left_out(0).size(), 1U);
    for (KvCache* each : {&cache, &back}) {
      tokens.append_to(*each, 190, 110);
      each->seal();
    }
    EXPECT_EQ(back.serialize(), cache.serialize());
    EXPECT_EQ(gather(back, 0, 300).values.data, gather(cache, 0, 300).values.data);
  }
}

TEST(TrellisCache, DamagedBytesAreRefusedOrGiveACache) {
  auto engine = test::random_engine(63);
  const auto bytes = filled(with_trellis(16, 2, 2), Tokens(1, 2, 120, 16, engine)).serialize();
  for (std::size_t size = 0; size < bytes.size(); size += size < 120 ? 1 : 97) {
    EXPECT_THROW((void)KvCache::deserialize(std::span(bytes).first(size)), ValueError) << size;
  }
  constexpr std::size_t kCodes = 8 + 7 * 4 + 4 + 8;  // after the seed, where there is no rope
  auto other = bytes;
  other[kCodes] = std::byte{2};
  EXPECT_TRUE(contains(message_of([&] { (void)KvCache::deserialize(other); }), "a kind of codes"));
  other[kCodes] = std::byte{0};  // the levels' checksum is a trellis's
  EXPECT_TRUE(contains(message_of([&] { (void)KvCache::deserialize(other); }), "codebook"));
  EXPECT_GT(test::refusals_of_damaged(bytes, 300, 120, engine), 40);
}

// All their length in one rotated coordinate, up to what tiles take.
TEST(TrellisCache, LongAndShortValuesKeepTheirLength) {
  auto engine = test::random_engine(64);
  for (const int dim : {64, 256}) {
    const KvCache empty(with_trellis(dim, 4));
    Tokens tokens(1, 2, 100, dim, engine);
    for (std::int64_t h = 0; h < 2; ++h) {
      for (std::int64_t t = 0; t < 100; ++t) {
        std::vector<float> spike(static_cast<std::size_t>(dim), 0.0F);
        spike[static_cast<std::size_t>(t % dim)] = t % 3 == 0 ? 9000.0F : 1e-4F;
        empty.value_rotation().apply_transposed(spike.data(), spike.data(), 1);
        std::copy(spike.begin(), spike.end(), tokens.values.data.begin() + (h * 100 + t) * dim);
      }
    }
    const KvCache cache = filled(with_trellis(dim, 4), tokens);
    ASSERT_EQ(cache.packed_tokens(0), 64);
    const Gathered all = gather(cache, 0, 100);
    for (std::int64_t t = 4; t < 68; ++t) {
      const auto length = [&](const Array& array) {
        double sum = 0.0;
        for (int c = 0; c < dim; ++c) sum += std::pow(double{array.at(0, 1, t)[c]}, 2.0);
        return std::sqrt(sum);
      };
      EXPECT_NEAR(length(all.values) / length(tokens.values), 1.0, 1e-3) << dim << ' ' << t;
    }
  }
}

TEST(TrellisCache, RefusesOtherWidths) {
  EXPECT_EQ(message_of([] { KvCache{with_trellis(64, 5)}; }),
            "bits_v = 5 where value_codes is trellis; allowed: 1…4, or scalar codes");
  CacheOptions options = with_trellis(64, 4);
  options.value_codes = static_cast<CodeKind>(7);
  EXPECT_EQ(message_of([&] { KvCache{options}; }), "value_codes = 7; allowed: 0…1");
}

}  // namespace
}  // namespace tqai
