// Caches whose keys are in a learnt basis, at every level: the kernels of it, and what they are
// worth.
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <filesystem>
#include <limits>
#include <memory>
#include <random>
#include <string>
#include <tqai/cache.hpp>
#include <tqai/files.hpp>
#include <tqai/half.hpp>
#include <tqai/key_basis.hpp>
#include <tqai/trellis.hpp>
#include <vector>

#include "basis_helpers.hpp"
#include "cache/codec.hpp"
#include "cache_helpers.hpp"
#include "every_level.hpp"
#include "kernels/kernels.hpp"
#include "kernels_helpers.hpp"
#include "pack.hpp"

namespace tqai {
namespace {

using test::Array;
using test::contains;
using test::correlated;
using test::gather;
using test::geometry;
using test::learnt;
using test::Matrices;
using test::message_of;
using test::mixture;
using test::random_engine;

constexpr int kDims[] = {8, 9, 16, 40, 64, 80, 128};

// Keys like those learnt from, of all sizes; the first is 0.
std::vector<float> keys_of_all_sizes(int dim, std::mt19937_64& engine) {
  auto rows = correlated(dim, kTileTokens, mixture(dim, 6), engine);
  for (int t = 0; t < kTileTokens; ++t) {
    const float size = t == 0 ? 0.0F : std::ldexp(1.0F, 3 - t % 32);
    for (int c = 0; c < dim; ++c) rows[static_cast<std::size_t>(t * dim + c)] *= size;
  }
  return rows;
}

struct Tile {
  explicit Tile(const detail::Codec& codec) : bytes(codec.layout().bytes()) {}
  std::vector<std::uint8_t> bytes;
};

class BasisLevels : public test::Levels {};

TEST_P(BasisLevels, GiveTheSameBits) {
  for (const int dim : kDims) {
    const test::Memory memory(kernels::basis_coding_bytes(dim));
    auto* scratch = const_cast<test::Memory&>(memory).bytes();
    auto engine = random_engine(41);
    const auto rows = keys_of_all_sizes(dim, engine);
    for (int bits = 1; bits <= 8; ++bits) {
      const auto basis = learnt(dim, bits);
      const kernels::KeyTransform transform(basis->head(0));
      const detail::Codec codec = test::make_codec(dim, bits);
      const kernels::SidePlan& side = codec.plan().keys;
      Tile expected(codec);
      Tile found(codec);
      scalar().encode_in_basis(side, transform, rows.data(), expected.bytes.data(), scratch);
      level().encode_in_basis(side, transform, rows.data(), found.bytes.data(), scratch);
      ASSERT_EQ(found.bytes, expected.bytes) << "d " << dim << ", bits " << bits;
      std::vector<float> by_scalar(rows.size());
      std::vector<float> by_level(rows.size());
      scalar().decode_in_basis(side, transform, found.bytes.data(), by_scalar.data(), scratch);
      level().decode_in_basis(side, transform, found.bytes.data(), by_level.data(), scratch);
      ASSERT_EQ(by_level, by_scalar) << "d " << dim << ", bits " << bits;
    }
  }
}

// The closed loop in double, at one norm.
struct Loop {
  std::vector<double> decoded;  // L z
  std::vector<int> codes;
};

Loop closed_loop(const Matrices& of, const Codebook& book, const std::vector<double>& y,
                 double norm) {
  Loop loop;
  const auto levels = book.levels();
  std::vector<double> z;
  for (std::size_t i = 0; i < y.size(); ++i) {
    double before = 0.0;
    for (std::size_t j = 0; j < i; ++j) before += of.lower.row(i)[j] * z[j];
    const double left = y[i] / norm - before;
    int best = 0;
    for (int code = 0; code < static_cast<int>(levels.size()); ++code) {
      const auto distance = [&](int c) {
        return std::abs(left - double(levels[static_cast<std::size_t>(c)]) * double(book.step()));
      };
      if (distance(code) < distance(best)) best = code;
    }
    loop.codes.push_back(best);
    z.push_back(double(levels[static_cast<std::size_t>(best)]) * double(book.step()));
    loop.decoded.push_back(before + z.back());
  }
  return loop;
}

std::vector<double> times(const SquareMatrix& a, const float* x) {
  std::vector<double> result(a.dim());
  for (std::size_t i = 0; i < a.dim(); ++i) {
    for (std::size_t k = 0; k < a.dim(); ++k) result[i] += a.row(i)[k] * double(x[k]);
  }
  return result;
}

// Encoding against a reference in double. A number next to a boundary may get another code, and all
// after it then; such vectors are as good, and few.
TEST_P(BasisLevels, EncodeAsTheReference) {
  for (const int dim : {9, 64}) {
    for (const int bits : {2, 4, 8}) {
      const auto basis = learnt(dim, bits);
      const Matrices of = test::matrices_of(*basis, 0);
      const SquareMatrix inverse_lower = inverse(of.lower);
      const detail::Codec codec = test::make_codec(dim, bits);
      const Codebook& book = codebook(dim, bits, Grid::int8);
      test::Memory memory(kernels::basis_coding_bytes(dim));
      auto engine = random_engine(42);
      const auto rows = correlated(dim, kTileTokens, mixture(dim, 6), engine);
      Tile tile(codec);
      level().encode_in_basis(codec.plan().keys, kernels::KeyTransform(basis->head(0)), rows.data(),
                              tile.bytes.data(), memory.bytes());
      std::vector<std::uint8_t> codes(static_cast<std::size_t>(padded_dim(dim) * kTileTokens));
      unpack_keys(tile.bytes.data(), padded_dim(dim), bits, codes.data());
      std::uint16_t norms[kTileTokens];
      std::memcpy(norms, tile.bytes.data() + codec.layout().key_norms(), sizeof norms);
      int others = 0;
      for (int t = 0; t < kTileTokens; ++t) {
        const auto y = times(of.analysis, rows.data() + t * dim);
        double innovations = 0.0;
        for (std::size_t i = 0; i < y.size(); ++i) {
          double v = 0.0;
          for (std::size_t j = 0; j <= i; ++j) v += inverse_lower.row(i)[j] * y[j];
          innovations += v * v;
        }
        double least = std::numeric_limits<double>::infinity();
        double norm = 0.0;
        Loop best;
        for (const double tried : {1.0, 1.25, 1.6, 2.5}) {
          const Loop loop = closed_loop(of, book, y, std::sqrt(innovations) * tried);
          const double corrected = test::norm(y) / test::norm(loop.decoded);
          double error = 0.0;
          for (std::size_t i = 0; i < y.size(); ++i) {
            error += std::pow(y[i] - corrected * loop.decoded[i], 2);
          }
          if (error < least) {
            least = error;
            norm = corrected;
            best = loop;
          }
        }
        bool same = true;
        for (int c = 0; c < dim; ++c) {
          same = same && codes[static_cast<std::size_t>(c * kTileTokens + t)] ==
                             best.codes[static_cast<std::size_t>(c)];
        }
        if (same) {
          EXPECT_NEAR(double(from_half(norms[t])) / norm, 1.0, 6e-4);
        }
        others += same ? 0 : 1;
        double error = 0.0;
        std::vector<double> z;
        for (std::size_t i = 0; i < y.size(); ++i) {
          const int code = codes[i * kTileTokens + static_cast<std::size_t>(t)];
          z.push_back(double(book.levels()[static_cast<std::size_t>(code)]) * double(book.step()));
          double decoded = 0.0;
          for (std::size_t j = 0; j <= i; ++j) decoded += of.lower.row(i)[j] * z[j];
          error += std::pow(y[i] - double(from_half(norms[t])) * decoded, 2);
        }
        const double rounding = 3e-7 * std::pow(test::norm(y), 2);
        EXPECT_LE(error, 1.05 * least + rounding) << "d " << dim << ", bits " << bits;
      }
      EXPECT_LE(others, bits == 8 ? 10 : 3) << "d " << dim << ", bits " << bits;
    }
  }
}

TEST_P(BasisLevels, AreAsPreciseForShortKeysAsForOthers) {
  constexpr int kDim = 64;
  for (const int bits : {2, 4, 8}) {
    const auto basis = learnt(kDim, bits);
    const detail::Codec codec = test::make_codec(kDim, bits);
    test::Memory memory(kernels::basis_coding_bytes(kDim));
    auto engine = random_engine(43);
    const auto plain = correlated(kDim, kTileTokens, mixture(kDim, 6), engine);
    const auto error_at = [&](float size) {
      auto rows = plain;
      for (float& value : rows) value *= size;
      Tile tile(codec);
      std::vector<float> back(rows.size());
      level().encode_in_basis(codec.plan().keys, kernels::KeyTransform(basis->head(0)), rows.data(),
                              tile.bytes.data(), memory.bytes());
      level().decode_in_basis(codec.plan().keys, kernels::KeyTransform(basis->head(0)),
                              tile.bytes.data(), back.data(), memory.bytes());
      double error = 0.0;
      double squares = 0.0;
      for (std::size_t i = 0; i < rows.size(); ++i) {
        error += std::pow(double(rows[i]) - double(back[i]), 2);
        squares += std::pow(double(rows[i]), 2);
      }
      return std::sqrt(error / squares);
    };
    const double ordinary = error_at(1.0F);
    // Norms are 1/64 of these, so that they are coarse from 1/256 down.
    for (const float size : {1000.0F, 1e-2F, 1e-3F, 1e-4F, 1e-5F}) {
      EXPECT_LT(error_at(size), 1.25 * ordinary) << "size " << size << ", bits " << bits;
    }
    EXPECT_LE(error_at(1e-12F), 1.0);
    EXPECT_EQ(error_at(1e-15F), 1.0);
  }
}

TQAI_AT_EVERY_LEVEL(BasisLevels);

class BasisCaches : public test::EveryLevel {
 protected:
  static CacheOptions options_of(int dim, int bits, int heads = 2) {
    CacheOptions options = geometry(dim, bits, 4, heads);
    options.key_basis = learnt(dim, bits, heads);
    options.level = GetParam();
    return options;
  }
};

// Keys and queries of heads as the moments' (moments_of), and a mean that centring takes.
struct Structured {
  Array keys;
  Array values;
  Array queries;

  Structured(int heads, int tokens, int dim, int count)
      : keys({1, heads, tokens, dim}),
        values({1, heads, tokens, dim}),
        queries({1, 2 * heads, count, dim}) {
    auto engine = random_engine(44);
    values.data = test::random_normal(values.data.size(), engine);
    for (int head = 0; head < heads; ++head) {
      const auto of_head = static_cast<std::uint64_t>(head);
      const auto drawn = correlated(dim, tokens, mixture(dim, 6 + of_head), engine);
      std::copy(drawn.begin(), drawn.end(), keys.at(0, head, 0));
      for (int q = 2 * head; q < 2 * head + 2; ++q) {
        const auto asked = correlated(dim, count, mixture(dim, 16 + of_head), engine);
        std::copy(asked.begin(), asked.end(), queries.at(0, q, 0));
      }
    }
    for (std::size_t i = 0; i < keys.data.size(); ++i) {
      keys.data[i] += 2.0F * std::sin(static_cast<float>(i % static_cast<std::size_t>(dim)));
    }
    for (float& value : queries.data) value *= 0.3F;
  }
};

TEST_P(BasisCaches, AttendAsExactAttentionOverWhatTheyHold) {
  for (const int dim : {16, 40, 64, 128}) {
    const Structured all(2, 204, dim, 3);
    for (const int bits : {1, 2, 4, 6, 8}) {
      CacheOptions options = options_of(dim, bits);
      if (dim % 16 == 0) options.rope = test::rope_of(dim);
      KvCache cache(options);
      cache.append(all.keys, all.values);
      cache.seal();
      ASSERT_GE(cache.packed_tokens(0), 128);
      EXPECT_LT(test::worst_error(cache, all.queries, test::attend(cache, all.queries)),
                test::kPackedError)
          << "d " << dim << ", bits " << bits;
    }
  }
}

// Squared error of the scores of sealed keys, as one constant for all keys of a query is no error.
double score_error(const KvCache& cache, const Structured& all) {
  const auto held = gather(cache, 4, 256);
  const auto dim = static_cast<std::size_t>(all.keys.shape[3]);
  double error = 0.0;
  for (std::int64_t h = 0; h < all.queries.shape[1]; ++h) {
    for (std::int64_t q = 0; q < all.queries.shape[2]; ++q) {
      double sum = 0.0;
      double squares = 0.0;
      for (std::int64_t t = 0; t < 256; ++t) {
        double score = 0.0;
        for (std::size_t c = 0; c < dim; ++c) {
          score += double(all.queries.at(0, h, q)[c]) *
                   (double(held.keys.at(0, h / 2, t)[c]) - double(all.keys.at(0, h / 2, t + 4)[c]));
        }
        sum += score;
        squares += score * score;
      }
      error += squares / 256 - (sum / 256) * (sum / 256);
    }
  }
  return error;
}

TEST_P(BasisCaches, ScoreStructuredKeysBetterThanRotatedOnes) {
  for (const int dim : {64, 128}) {
    const Structured all(2, 300, dim, 40);
    for (const int bits : {2, 3, 4}) {
      CacheOptions options = options_of(dim, bits);
      KvCache in_basis(options);
      options.key_basis = nullptr;
      KvCache rotated(options);
      for (KvCache* cache : {&in_basis, &rotated}) {
        cache->append(all.keys, all.values);
        cache->seal();
      }
      EXPECT_LT(score_error(in_basis, all), 0.25 * score_error(rotated, all))
          << "d " << dim << ", bits " << bits;
    }
  }
}

// What a basis is learnt from stands at the beginning of a text, what is read may stand far in it.
TEST(BasisCache, ScoresKeysFromFarPositionsAsWellAsARotatedOne) {
  constexpr int kDim = 64;
  constexpr int kHeads = 4;  // one alone may fare otherwise by chance
  const Rope rope = test::rope_of(kDim);
  const Structured all(kHeads, 300, kDim, 40);
  KeyMoments moments(kHeads, kDim, rope);
  for (int head = 0; head < kHeads; ++head) {
    moments.add_keys(head, {all.keys.at(0, head, 0), 300 * kDim}, std::vector<std::int64_t>(300));
    moments.add_queries(head, {all.queries.at(0, 2 * head, 0), 80 * kDim},
                        std::vector<std::int64_t>(80));
  }
  const auto basis = std::make_shared<const KeyBasis>(KeyBasis::learn(moments, 2));
  for (const std::int64_t first : {0, 1000, 4000, 12000, 30000}) {
    Structured there = all;
    for (std::int64_t h = 0; h < kHeads; ++h) {
      for (std::int64_t t = 0; t < 300; ++t) {
        test::turn(rope, static_cast<double>(first + t), there.keys.at(0, h, t));
      }
    }
    for (std::int64_t h = 0; h < 2 * kHeads; ++h) {
      for (std::int64_t q = 0; q < 40; ++q) {
        test::turn(rope, static_cast<double>(first + 300), there.queries.at(0, h, q));
      }
    }
    CacheOptions options = geometry(kDim, 2, 4, kHeads);
    options.rope = rope;
    KvCache rotated(options);
    options.key_basis = basis;
    KvCache in_basis(options);
    for (KvCache* cache : {&in_basis, &rotated}) {
      cache->append(there.keys, there.values);
      cache->seal();
    }
    const double most = first < 2048 ? 0.9 : 1.1;  // where most positions are that it is made for
    EXPECT_LT(score_error(in_basis, there), most * score_error(rotated, there)) << "at " << first;
  }
}

TEST_P(BasisCaches, HoldAndDropTokensAsOthers) {
  const Structured all(2, 300, 32, 3);
  KvCache cache(options_of(32, 4));
  cache.append(all.keys, all.values);
  cache.seal();
  const auto before = gather(cache, 0, 300);
  const KvCache copy = cache;
  cache.crop(130);
  const std::int64_t rows[] = {0, 0};
  cache.select(rows);
  const auto after = gather(cache, 0, 130);
  for (int row = 0; row < 2; ++row) {
    for (int head = 0; head < 2; ++head) {
      EXPECT_EQ(0, std::memcmp(after.keys.at(row, head, 0), before.keys.at(0, head, 0),
                               130 * 32 * sizeof(float)));
    }
  }
  EXPECT_EQ(gather(copy, 0, 300).keys.data, before.keys.data);
}

TEST_P(BasisCaches, KeepKeysExactThatNoNormIsLargeEnoughFor) {
  CacheOptions options = options_of(64, 4, 1);
  options.residual_window = 0;
  Structured all(1, 204, 64, 1);
  for (int c = 0; c < 64; ++c) all.keys.at(0, 0, 140)[c] *= 1e6F;
  KvCache cache(options);
  cache.append(all.keys, all.values);
  EXPECT_GT(cache.seal(), 0);
  EXPECT_EQ(cache.packed_tokens(0), 128);
}

// Bytes of a basis with any numbers that a reader lets pass.
std::vector<std::byte> any_basis(int dim, int bits, std::mt19937_64& engine) {
  std::vector<std::byte> bytes = learnt(dim, bits)->serialize();
  constexpr std::size_t kScales = 20;
  constexpr std::size_t kMatrices = kScales + 2 * sizeof(float);
  const auto full = static_cast<std::size_t>(dim * dim);
  const float scales[] = {std::ldexp(1.0F, static_cast<int>(engine() % 127) - 64),
                          std::ldexp(1.0F, static_cast<int>(engine() % 81) - 64)};
  std::memcpy(bytes.data() + kScales, scales, sizeof scales);
  const std::size_t count = (bytes.size() - kMatrices - 8) / 2;
  for (std::size_t i = 0; i < count; ++i) {
    const bool square = i < full || i >= count - full;
    const auto most = static_cast<std::uint64_t>(square ? 0x3C00 : 0x7BFF);
    const auto half = static_cast<std::uint16_t>(engine() % (most + 1) | (engine() & 0x8000));
    std::memcpy(bytes.data() + kMatrices + 2 * i, &half, sizeof half);
  }
  std::uint64_t hash = 0xCBF2'9CE4'8422'2325;
  for (std::size_t i = 0; i < bytes.size() - 8; ++i) {
    hash = (hash ^ static_cast<std::uint64_t>(bytes[i])) * 0x0000'0100'0000'01B3;
  }
  std::memcpy(bytes.data() + bytes.size() - 8, &hash, sizeof hash);
  return bytes;
}

// A basis from elsewhere may make keys of any size and none; sealing then keeps them exact, or
// holds something, and reading gives numbers.
TEST_P(BasisCaches, ComeThroughAnyBasis) {
  auto engine = random_engine(45);
  std::int64_t packed = 0;
  for (int i = 0; i < 60; ++i) {
    const int dim = i % 2 == 0 ? 8 : 24;
    const int bits = i % 8 + 1;
    CacheOptions options = geometry(dim, bits, 4, 1);
    options.level = GetParam();
    options.key_basis =
        std::make_shared<const KeyBasis>(KeyBasis::deserialize(any_basis(dim, bits, engine)));
    const bool has_trellis = bits >= kMinKeyTrellisBits && bits <= kMaxTrellisBits;
    if (has_trellis && i / 8 % 2 == 0) options.key_codes = CodeKind::trellis;
    Structured all(1, 204, dim, 2);
    const float size = std::ldexp(1.0F, static_cast<int>(engine() % 60) - 50);
    for (float& value : all.keys.data) value *= size;
    KvCache cache(options);
    cache.append(all.keys, all.values);
    cache.seal();
    const auto held = gather(cache, 0, 204);
    const auto finite = [](float value) { return std::isfinite(value); };
    EXPECT_TRUE(std::all_of(held.keys.data.begin(), held.keys.data.end(), finite)) << i;
    const Array output = test::attend(cache, all.queries);
    EXPECT_TRUE(std::all_of(output.data.begin(), output.data.end(), finite)) << i;
    packed += cache.packed_tokens(0);
  }
  EXPECT_GT(packed, 0);
}

TQAI_AT_EVERY_LEVEL(BasisCaches);

TEST(BasisCache, SaysWhatItHolds) {
  CacheOptions options = geometry(32, 4, 4, 2);
  options.key_basis = learnt(32, 4, 2);
  const KvCache cache(options);
  EXPECT_EQ(cache.options().key_basis, options.key_basis);
  EXPECT_EQ(cache.memory().basis_bytes, options.key_basis->bytes());
  EXPECT_EQ(cache.memory().total_bytes(), KvCache(geometry(32, 4, 4, 2)).memory().total_bytes());
  EXPECT_EQ(KvCache(geometry(32, 4, 4, 2)).memory().basis_bytes, 0U);
  EXPECT_THROW(cache.key_rotation(), ValueError);
  EXPECT_EQ(cache.value_rotation().head_dim(), 32);
}

KvCache sealed(const CacheOptions& options, int tokens = 100) {
  const Structured all(options.kv_heads, tokens, options.head_dim, 1);
  KvCache cache(options);
  cache.append(all.keys, all.values);
  cache.seal();
  return cache;
}

TEST(BasisCache, HasABasisOfItsOwnWhereNobodyElseHasIt) {
  std::vector<std::byte> bytes;
  {
    CacheOptions options = geometry(32, 4, 4, 2);
    options.key_basis = std::make_shared<const KeyBasis>(
        KeyBasis::learn(test::moments_of(32, 100, 2), options.bits_k));
    bytes = sealed(options).serialize(BasisAs::matrices);
  }
  const KvCache first = KvCache::deserialize(bytes);
  const KvCache second = KvCache::deserialize(bytes);
  EXPECT_EQ(first.options().key_basis, second.options().key_basis);
  EXPECT_EQ(first.options().key_basis.use_count(), 2);
}

TEST(BasisCache, ComesBackFromBytesWithItsBasisOrToIt) {
  CacheOptions options = geometry(32, 4, 4, 2);
  options.key_basis = learnt(32, 4, 2);
  const KvCache cache = sealed(options);
  const auto before = gather(cache, 0, 100);
  const auto alone = cache.serialize(BasisAs::matrices);
  const KvCache own = KvCache::deserialize(alone);
  EXPECT_EQ(own.options().key_basis, options.key_basis);  // shared with the cache that is here
  EXPECT_EQ(gather(own, 0, 100).keys.data, before.keys.data);
  EXPECT_EQ(own.serialize(BasisAs::matrices), alone);

  const auto bytes = cache.serialize();
  EXPECT_EQ(bytes.size(), cache.serialized_bytes());
  EXPECT_EQ(alone.size(), cache.serialized_bytes(BasisAs::matrices));
  EXPECT_GT(alone.size(), bytes.size() + 2 * (5 * 32 * 32 - 32));  // FP16, of two heads
  const std::shared_ptr<const KeyBasis> bases[] = {learnt(32, 3, 2), nullptr, options.key_basis};
  for (const auto& each : {bytes, alone}) {
    KvCache shared = KvCache::deserialize(each, {}, bases);
    EXPECT_EQ(shared.options().key_basis, options.key_basis);
    EXPECT_EQ(gather(shared, 0, 100).keys.data, before.keys.data);
    shared.append(Structured(2, 1, 32, 1).keys, Structured(2, 1, 32, 1).values);
  }
  EXPECT_TRUE(contains(message_of([&] { KvCache::deserialize(bytes); }), "none of the 0 given"));
  EXPECT_TRUE(
      contains(message_of([&] { KvCache::deserialize(bytes, {}, std::span(bases).first(2)); }),
               "none of the 2 given"));
  // A cache in no basis needs none.
  options.key_basis = nullptr;
  EXPECT_EQ(KvCache::deserialize(sealed(options).serialize(), {}, bases).options().key_basis,
            nullptr);
}

TEST(BasisCache, RefusesDamagedBytes) {
  CacheOptions options = geometry(8, 2, 4, 1);
  options.key_basis = learnt(8, 2, 1);
  const auto bytes = sealed(options).serialize(BasisAs::matrices);
  for (std::size_t size = 0; size < bytes.size(); size += 3) {
    EXPECT_THROW(KvCache::deserialize(std::span(bytes).first(size)), ValueError) << size;
  }
  // Options, id and basis: nothing of these can be another without being noticed, but for what an
  // option may be as well.
  const std::size_t end = 52 + 9 + 8 + options.key_basis->serialize().size();
  for (std::size_t i = 48; i < end; ++i) {
    auto damaged = bytes;
    damaged[i] ^= std::byte{1};
    EXPECT_THROW(KvCache::deserialize(damaged), ValueError) << i;
  }
}

TEST(BasisCache, ComesBackFromFiles) {
  CacheOptions options = geometry(32, 4, 4, 2);
  options.key_basis = learnt(32, 4, 2);
  const KvCache cache = sealed(options);
  const KvCache* const layers[] = {&cache, &cache};
  // Of this process: the tests of other levels run beside it.
  const auto path = std::filesystem::temp_directory_path() /
                    ("tqai_key_basis_cache_" + std::to_string(std::random_device()()));
  for (const BasisAs basis : {BasisAs::id, BasisAs::matrices}) {
    save_caches(path, layers, "{}", basis);
    for (const bool mapped : {false, true}) {
      LoadOptions loading;
      loading.mapped = mapped;
      if (basis == BasisAs::id) {
        EXPECT_THROW(load_caches(path, loading), ValueError);
        loading.key_bases = {options.key_basis};
      }
      for (const KvCache& back : load_caches(path, loading)) {
        EXPECT_EQ(gather(back, 0, 100).keys.data, gather(cache, 0, 100).keys.data);
      }
    }
  }
  std::filesystem::remove(path);
}

TEST(BasisCache, RefusesOthersBases) {
  CacheOptions options = geometry(32, 4, 4, 2);
  options.key_basis = learnt(32, 2, 2);
  EXPECT_TRUE(contains(message_of([&] { KvCache cache(options); }), "at 2 bits"));
  options.key_basis = learnt(32, 4, 1);
  EXPECT_TRUE(contains(message_of([&] { KvCache cache(options); }), "1 kv heads"));
  options.key_basis = learnt(40, 4, 2);
  EXPECT_TRUE(contains(message_of([&] { KvCache cache(options); }), "40 coordinates"));
}

}  // namespace
}  // namespace tqai
