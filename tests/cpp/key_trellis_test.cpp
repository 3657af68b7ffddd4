// Keys in trellis codes (CacheOptions::key_codes), at every level: their kernels against the
// description of the bytes, and what they are worth.
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <memory>
#include <set>
#include <string>
#include <tqai/cache.hpp>
#include <tqai/half.hpp>
#include <tqai/key_basis.hpp>
#include <tqai/packing.hpp>
#include <tqai/trellis.hpp>
#include <utility>
#include <vector>

#include "basis_helpers.hpp"
#include "cache/codec.hpp"
#include "cache_helpers.hpp"
#include "kernels/kernels.hpp"
#include "kernels_helpers.hpp"

namespace tqai {
namespace {

using test::Array;
using test::contains;
using test::correlated;
using test::gather;
using test::geometry;
using test::learnt;
using test::message_of;
using test::mixture;
using test::random_engine;

constexpr int kDims[] = {8, 9, 16, 40, 64, 80, 128};

CacheOptions options_of(int dim, int bits, int heads = 1) {
  CacheOptions options = geometry(dim, bits, 4, heads);
  options.value_head_dim = dim;
  options.key_basis = learnt(dim, bits, heads);
  options.key_codes = CodeKind::trellis;
  return options;
}

// Levels of a token by what trellis.hpp says, in the order of its path.
std::vector<int> levels_of(const std::uint8_t* packed, int padded, int bits, int token) {
  std::vector<std::uint8_t> codes(static_cast<std::size_t>(padded) * kTileTokens);
  unpack_keys(packed, padded, bits, codes.data());
  std::vector<int> stream;  // bits, the first code's highest last
  const KeyTrellis& tables = key_trellis(bits);
  for (int k = 0; k < KeyTrellis::kWindowBits - bits; ++k) {
    stream.push_back(static_cast<int>(tables.start >> k & 1U));
  }
  std::vector<int> levels;
  for (int byte = 0; byte < 4; ++byte) {
    for (int c = byte; c < padded; c += 4) {
      const int code = codes[static_cast<std::size_t>(c * kTileTokens + token)];
      for (int k = 0; k < bits; ++k) stream.push_back(code >> k & 1);
      unsigned window = 0;
      for (int k = 0; k < KeyTrellis::kWindowBits; ++k) {
        const std::size_t at =
            stream.size() - KeyTrellis::kWindowBits + static_cast<std::size_t>(k);
        window |= static_cast<unsigned>(stream[at]) << k;
      }
      levels.push_back(tables.levels[window]);
    }
  }
  return levels;
}

std::vector<std::uint8_t> random_bytes(std::size_t count, std::mt19937_64& engine) {
  std::vector<std::uint8_t> bytes(count);
  for (std::uint8_t& byte : bytes) byte = static_cast<std::uint8_t>(engine());
  return bytes;
}

TEST(KeyTrellis, AWindowAndItsComplementAreOppositeLevels) {
  for (int bits = kMinKeyTrellisBits; bits <= kMaxTrellisBits; ++bits) {
    const KeyTrellis& tables = key_trellis(bits);
    EXPECT_EQ(tables.bits, bits);
    EXPECT_LT(tables.start, 1U << (KeyTrellis::kWindowBits - bits));
    int most = 0;
    for (std::size_t window = 0; window < KeyTrellis::kWindows; ++window) {
      EXPECT_EQ(tables.levels[window], -tables.levels[KeyTrellis::kWindows - 1 - window]);
      most = std::max<int>(most, tables.levels[window]);
    }
    EXPECT_EQ(most, kMaxNarrowLevel);
    EXPECT_FLOAT_EQ(tables.step(64), static_cast<float>(tables.unit / 8.0));
  }
}

// So a path's levels say what its codes are.
TEST(KeyTrellis, CodesAfterTheSameStateAreLevelsOfTheirOwn) {
  for (int bits = kMinKeyTrellisBits; bits <= kMaxTrellisBits; ++bits) {
    const KeyTrellis& tables = key_trellis(bits);
    const unsigned states = KeyTrellis::kWindows >> bits;
    for (unsigned state = 0; state < states; ++state) {
      std::set<int> levels;
      for (unsigned window = state; window < KeyTrellis::kWindows; window += states) {
        levels.insert(tables.levels[window]);
      }
      EXPECT_EQ(levels.size(), 1U << bits) << bits << " bits, state " << state;
    }
  }
}

TEST(KeyTrellis, WindowsAreTheUpperBitsOfWhatCameBefore) {
  for (int bits = kMinKeyTrellisBits; bits <= kMaxTrellisBits; ++bits) {
    const KeyTrellis& tables = key_trellis(bits);
    const unsigned first = tables.next(tables.before_first(), 1);
    EXPECT_EQ(first, tables.start | 1U << (KeyTrellis::kWindowBits - bits));
    EXPECT_EQ(tables.next(first, 2), first >> bits | 2U << (KeyTrellis::kWindowBits - bits));
  }
  std::vector<bool> seen(32, false);
  for (int i = 0; i < 32; ++i) seen[static_cast<std::size_t>(key_coordinate(i, 32))] = true;
  EXPECT_TRUE(std::all_of(seen.begin(), seen.end(), [](bool each) { return each; }));
  EXPECT_EQ(key_coordinate(7, 32), 28);
  EXPECT_EQ(key_coordinate(8, 32), 1);
}

TEST(KeyTrellis, RefusesOtherWidths) {
  EXPECT_EQ(message_of([] { key_trellis(1); }), "bits of keys' trellis codes = 1; allowed: 2…4");
  EXPECT_EQ(message_of([] { key_trellis(5); }), "bits of keys' trellis codes = 5; allowed: 2…4");
}

class KeyPathLevels : public test::Levels {};

TEST_P(KeyPathLevels, ScoresAreExact) {
  auto engine = random_engine(71);
  for (int bits = kMinKeyTrellisBits; bits <= kMaxTrellisBits; ++bits) {
    for (const int dim : {16, 32, 80, 128, 512}) {
      CacheOptions options = geometry(dim, bits, 4, 1);
      options.value_head_dim = dim;
      options.key_codes = CodeKind::trellis;
      const detail::Codec codec(options);
      const auto packed = random_bytes(packed_bytes(dim, bits), engine);
      std::vector<std::vector<int>> levels;
      for (int t = 0; t < kTileTokens; ++t)
        levels.push_back(levels_of(packed.data(), dim, bits, t));
      for (int rows = 1; rows <= kernels::kMaxRows; ++rows) {
        std::vector<std::int8_t> queries(static_cast<std::size_t>(rows * dim));
        for (auto& q : queries)
          q = static_cast<std::int8_t>(static_cast<int>(engine() % 255) - 127);
        std::fill_n(queries.begin(), dim, std::int8_t{127});
        // Small ones, whose products avx2 adds up in 16 bits: all, or some groups among others.
        for (std::size_t i = 0; i < queries.size(); ++i) {
          if (rows % 3 == 0 || (rows % 3 == 1 && i / 8 % 3 != 0)) {
            queries[i] = static_cast<std::int8_t>(queries[i] / 4);
          }
        }
        std::vector<std::int32_t> scores(static_cast<std::size_t>(rows) * kTileTokens);
        parts().score(codec.plan().keys.segments[0], packed.data(), queries.data(), rows,
                      scores.data());
        for (int r = 0; r < rows; ++r) {
          for (int t = 0; t < kTileTokens; ++t) {
            int expected = 0;
            for (int c = 0; c < dim; ++c) {
              expected += queries[static_cast<std::size_t>(r * dim + key_coordinate(c, dim))] *
                          levels[static_cast<std::size_t>(t)][static_cast<std::size_t>(c)];
            }
            ASSERT_EQ(scores[static_cast<std::size_t>(r * kTileTokens + t)], expected)
                << "bits " << bits << ", d " << dim << ", row " << r << " of " << rows << ", " << t;
          }
        }
      }
    }
  }
}

// Keys like those learnt from, of all sizes, subnormal norms and 0 among them.
std::vector<float> keys_of_all_sizes(int dim, std::mt19937_64& engine) {
  auto rows = correlated(dim, kTileTokens, mixture(dim, 6), engine);
  for (int t = 0; t < kTileTokens; ++t) {
    const float size = t == 0 ? 0.0F : std::ldexp(1.0F, 3 - t % 32);
    for (int c = 0; c < dim; ++c) rows[static_cast<std::size_t>(t * dim + c)] *= size;
  }
  return rows;
}

TEST_P(KeyPathLevels, GiveTheSameBits) {
  auto engine = random_engine(72);
  for (const int dim : kDims) {
    test::Memory memory(kernels::key_path_coding_bytes(dim));
    const auto rows = keys_of_all_sizes(dim, engine);
    for (int bits = kMinKeyTrellisBits; bits <= kMaxTrellisBits; ++bits) {
      const CacheOptions options = options_of(dim, bits);
      const detail::Codec codec(options);
      const kernels::KeyTransform transform(options.key_basis->head(0));
      const kernels::SidePlan& side = codec.plan().keys;
      std::vector<std::uint8_t> expected(codec.layout().bytes(), 0);
      std::vector<std::uint8_t> found(expected.size(), 0);
      scalar().encode_in_basis(side, transform, rows.data(), expected.data(), memory.bytes());
      level().encode_in_basis(side, transform, rows.data(), found.data(), memory.bytes());
      ASSERT_EQ(found, expected) << "d " << dim << ", bits " << bits;
      std::vector<float> by_scalar(rows.size());
      std::vector<float> by_level(rows.size());
      scalar().decode_in_basis(side, transform, found.data(), by_scalar.data(), memory.bytes());
      level().decode_in_basis(side, transform, found.data(), by_level.data(), memory.bytes());
      ASSERT_EQ(by_level, by_scalar) << "d " << dim << ", bits " << bits;
    }
  }
}

// What is decoded is n' F z, z being what the bytes mean.
TEST_P(KeyPathLevels, AreReadAsDescribed) {
  auto engine = random_engine(73);
  for (int bits = kMinKeyTrellisBits; bits <= kMaxTrellisBits; ++bits) {
    for (const int dim : {40, 64}) {
      const CacheOptions options = options_of(dim, bits);
      const detail::Codec codec(options);
      const test::Matrices of = test::matrices_of(*options.key_basis, 0);
      test::Memory memory(kernels::key_path_coding_bytes(dim));
      auto tile = random_bytes(codec.layout().bytes(), engine);
      for (int t = 0; t < kTileTokens; ++t) {
        const std::uint16_t two = to_half(2.0F);
        std::memcpy(tile.data() + codec.layout().key_norms() + 2 * t, &two, sizeof two);
      }
      std::vector<float> rows(static_cast<std::size_t>(dim) * kTileTokens);
      level().decode_in_basis(codec.plan().keys, kernels::KeyTransform(options.key_basis->head(0)),
                              tile.data(), rows.data(), memory.bytes());
      const double step = double(key_trellis(bits).step(dim));
      for (int t = 0; t < kTileTokens; ++t) {
        const auto levels = levels_of(tile.data(), padded_dim(dim), bits, t);
        for (std::size_t i = 0; i < static_cast<std::size_t>(dim); ++i) {
          double sum = 0.0;
          double size = 0.0;
          for (std::size_t k = 0; k < static_cast<std::size_t>(dim); ++k) {
            const double term = 2.0 * step * of.synthesis.row(i)[k] * levels[k];
            sum += term;
            size += std::abs(term);
          }
          ASSERT_NEAR(rows[static_cast<std::size_t>(t * dim) + i], sum, 1e-5 * size)
              << "bits " << bits << ", d " << dim << ", token " << t << ", " << i;
        }
      }
    }
  }
}

// Squared error in y, of keys like those learnt from, relative to their length in y: the median, as
// few that go beyond the outermost levels have most of the sum.
double error_of(const CacheOptions& options, float size) {
  const int dim = options.head_dim;
  const detail::Codec codec(options);
  const kernels::KeyTransform transform(options.key_basis->head(0));
  const test::Matrices of = test::matrices_of(*options.key_basis, 0);
  test::Memory memory(kernels::key_path_coding_bytes(dim));
  const auto& kernels = kernels::kernels(default_level());
  auto engine = random_engine(74);
  std::vector<double> errors;
  for (int tile_number = 0; tile_number < 4; ++tile_number) {
    auto rows = correlated(dim, kTileTokens, mixture(dim, 6), engine);
    for (float& x : rows) x *= size;
    std::vector<std::uint8_t> tile(codec.layout().bytes());
    std::vector<float> back(rows.size());
    kernels.encode_in_basis(codec.plan().keys, transform, rows.data(), tile.data(), memory.bytes());
    kernels.decode_in_basis(codec.plan().keys, transform, tile.data(), back.data(), memory.bytes());
    for (std::size_t t = 0; t < kTileTokens; ++t) {
      double error = 0.0;
      double squares = 0.0;
      for (std::size_t i = 0; i < of.analysis.dim(); ++i) {
        double rest = 0.0;
        double whole = 0.0;
        for (std::size_t k = 0; k < of.analysis.dim(); ++k) {
          const double e = of.analysis.row(i)[k];
          const std::size_t at = t * of.analysis.dim() + k;
          rest += e * (double(rows[at]) - double(back[at]));
          whole += e * double(rows[at]);
        }
        error += rest * rest;
        squares += whole * whole;
      }
      errors.push_back(error / squares);
    }
  }
  std::nth_element(errors.begin(), errors.begin() + static_cast<std::ptrdiff_t>(errors.size() / 2),
                   errors.end());
  return errors[errors.size() / 2];
}

TEST(KeyTrellis, ErrorsAreLessThanOfScalarCodes) {
  for (const int dim : {64, 128}) {
    for (int bits = kMinKeyTrellisBits; bits <= (dim == 64 ? 3 : kMaxTrellisBits); ++bits) {
      CacheOptions options = options_of(dim, bits);
      const double paths = error_of(options, 1.0F);
      options.key_codes = CodeKind::scalar;
      const double scalar = error_of(options, 1.0F);
      EXPECT_LT(paths, 0.9 * scalar) << "d " << dim << ", bits " << bits;
    }
  }
}

TEST(KeyTrellis, ShortKeysAreAsPreciseAsOthers) {
  for (const int bits : {2, 4}) {
    const CacheOptions options = options_of(64, bits);
    const double usual = error_of(options, 1.0F);
    for (const float size : {1000.0F, 1e-2F, 1e-3F, 1e-4F, 1e-5F}) {
      EXPECT_LT(error_of(options, size), 1.3 * usual) << "size " << size << ", bits " << bits;
    }
    EXPECT_EQ(error_of(options, 1e-15F), 1.0);
  }
}

// A path of a few levels near 0 is what the longest key that is sealed may get.
TEST(KeyTrellis, NoPathIsShorterThanTheShortest) {
  auto engine = random_engine(75);
  for (int bits = kMinKeyTrellisBits; bits <= kMaxTrellisBits; ++bits) {
    for (const int dim : {8, 64}) {
      const detail::Codec codec(options_of(dim, bits));
      const double shortest = double(codec.shortest_codes()) / double(key_trellis(bits).step(dim));
      const auto packed = random_bytes(packed_bytes(padded_dim(dim), bits), engine);
      for (int t = 0; t < kTileTokens; ++t) {
        const auto levels = levels_of(packed.data(), padded_dim(dim), bits, t);
        double squares = 0.0;
        for (int c = 0; c < dim; ++c) squares += std::pow(levels[static_cast<std::size_t>(c)], 2);
        EXPECT_GE(std::sqrt(squares), shortest * (1.0 - 1e-6));
      }
      EXPECT_GT(shortest, 0.0);
    }
  }
}

class KeyPathCaches : public test::EveryLevel {};

// Heads with a structure, and a mean that centring takes.
std::pair<Array, Array> tokens_of(int heads, int tokens, int dim) {
  Array keys({1, heads, tokens, dim});
  Array values({1, heads, tokens, dim});
  auto engine = random_engine(76);
  values.data = test::random_normal(values.data.size(), engine);
  for (int head = 0; head < heads; ++head) {
    const auto drawn =
        correlated(dim, tokens, mixture(dim, 6 + static_cast<std::uint64_t>(head)), engine);
    std::copy(drawn.begin(), drawn.end(), keys.at(0, head, 0));
  }
  for (std::size_t i = 0; i < keys.data.size(); ++i) {
    keys.data[i] += 2.0F * std::sin(static_cast<float>(i % static_cast<std::size_t>(dim)));
  }
  return {std::move(keys), std::move(values)};
}

TEST_P(KeyPathCaches, AttendAsExactAttentionOverWhatTheyHold) {
  auto engine = random_engine(77);
  for (const int dim : {16, 40, 64, 128}) {
    const auto [keys, values] = tokens_of(2, 204, dim);
    for (int bits = kMinKeyTrellisBits; bits <= kMaxTrellisBits; ++bits) {
      CacheOptions options = options_of(dim, bits, 2);
      options.level = GetParam();
      options.value_codes = CodeKind::trellis;
      if (dim % 16 == 0) options.rope = test::rope_of(dim);
      KvCache cache(options);
      cache.append(keys, values);
      cache.seal();
      ASSERT_GE(cache.packed_tokens(0), 128);
      for (const int group : {1, 3, 7}) {
        Array queries({1, 2 * group, 2, dim}, engine);
        for (float& q : queries.data) q *= 0.3F;
        EXPECT_LT(test::worst_error(cache, queries, test::attend(cache, queries)),
                  test::kPackedError)
            << "d " << dim << ", bits " << bits << ", group " << group;
      }
    }
  }
}

// Of many rows of a head, for which codes may be looked up once.
TEST_P(KeyPathCaches, AttendManyRowsAsTheScalarLevel) {
  auto engine = random_engine(78);
  for (const int dim : {16, 40, 128}) {
    const auto [keys, values] = tokens_of(2, 204, dim);
    for (int bits = kMinKeyTrellisBits; bits <= kMaxTrellisBits; ++bits) {
      const Array queries({1, 6, 17, dim}, engine);
      std::vector<float> found[2];
      for (const bool scalar : {false, true}) {
        CacheOptions options = options_of(dim, bits, 2);
        options.level = scalar ? Level::scalar : GetParam();
        options.value_codes = CodeKind::trellis;
        KvCache cache(options);
        cache.append(keys, values);
        cache.seal();
        found[scalar ? 1 : 0] = test::attend(cache, queries).data;
      }
      EXPECT_EQ(found[0], found[1]) << "d " << dim << ", bits " << bits;
    }
  }
}

TQAI_AT_EVERY_LEVEL(KeyPathLevels);
TQAI_AT_EVERY_LEVEL(KeyPathCaches);

KvCache sealed(const CacheOptions& options) {
  const auto [keys, values] = tokens_of(options.kv_heads, 100, options.head_dim);
  KvCache cache(options);
  cache.append(keys, values);
  cache.seal();
  return cache;
}

TEST(KeyTrellisCache, ComesBackFromBytes) {
  const CacheOptions options = options_of(32, 2, 2);
  const KvCache cache = sealed(options);
  const auto bytes = cache.serialize(BasisAs::matrices);
  const KvCache back = KvCache::deserialize(bytes);
  EXPECT_EQ(back.options().key_codes, CodeKind::trellis);
  EXPECT_EQ(back.options().value_codes, CodeKind::scalar);
  EXPECT_EQ(back.serialize(BasisAs::matrices), bytes);
  EXPECT_EQ(gather(back, 0, 100).keys.data, gather(cache, 0, 100).keys.data);
  CacheOptions scalar = options;
  scalar.key_codes = CodeKind::scalar;
  const KvCache other = sealed(scalar);
  EXPECT_EQ(other.memory().total_bytes(), cache.memory().total_bytes());
  EXPECT_NE(other.serialize(), cache.serialize());
}

TEST(KeyTrellisCache, RefusesDamagedBytes) {
  const auto bytes = sealed(options_of(8, 2)).serialize(BasisAs::matrices);
  for (std::size_t size = 0; size < bytes.size(); size += 3) {
    EXPECT_THROW(KvCache::deserialize(std::span(bytes).first(size)), ValueError) << size;
  }
  constexpr std::size_t kCodes = 48;  // of values, a flag, and of keys
  for (const auto& [at, value] : {std::pair{kCodes + 1, 0}, {kCodes + 2, 0}, {kCodes + 2, 2}}) {
    auto damaged = bytes;
    damaged[at] = static_cast<std::byte>(value);
    EXPECT_THROW(KvCache::deserialize(damaged), ValueError) << at << ' ' << value;
  }
}

TEST(KeyTrellisCache, RefusesWhatItCannotBe) {
  CacheOptions options = options_of(32, 4);
  options.key_basis = nullptr;
  EXPECT_TRUE(contains(message_of([&] { KvCache cache(options); }), "there is no key_basis"));
  options.key_basis = learnt(32, 5);
  options.bits_k = 5;
  EXPECT_EQ(message_of([&] { KvCache cache(options); }),
            "bits_k = 5 where key_codes is trellis; allowed: 2…4, or scalar codes");
  options.key_codes = static_cast<CodeKind>(9);
  EXPECT_EQ(message_of([&] { KvCache cache(options); }), "key_codes = 9; allowed: 0…1");
}

}  // namespace
}  // namespace tqai
