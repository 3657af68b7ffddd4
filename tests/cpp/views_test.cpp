// What a cache shows of its tiles is what it reads, and memory that is set aside is used.
#include <cmath>
#include <tqai/cache.hpp>
#include <tqai/codebook.hpp>
#include <tqai/half.hpp>
#include <tqai/packing.hpp>

#include "cache_helpers.hpp"
#include "failing_allocations.hpp"

namespace tqai {
namespace {

using test::Array;
using test::contains;
using test::geometry;
using test::message_of;
using test::Tokens;

// Keys or values of a block's head from the bytes alone, [64, dim].
std::vector<float> decoded(const KvCache& cache, const SealedBlock& block, int head, bool keys) {
  const CacheOptions& options = cache.options();
  const int dim = keys ? options.head_dim : options.value_head_dim;
  const int bits = keys ? options.bits_k : options.bits_v;
  const int padded = padded_dim(dim);
  std::vector<std::uint8_t> codes(static_cast<std::size_t>(padded) * kTileTokens);
  const auto packed = keys ? block.key_codes(head) : block.value_codes(head);
  EXPECT_EQ(packed.size(), packed_bytes(padded, bits));
  const auto* bytes = reinterpret_cast<const std::uint8_t*>(packed.data());
  if (keys) {
    unpack_keys(bytes, padded, bits, codes.data());
  } else {
    unpack_values(bytes, padded, bits, codes.data());
  }
  const auto norms = keys ? block.key_norms(head) : block.value_norms(head);
  const Codebook& book = codebook(dim, bits, Grid::int8);
  const Rotation& rotation = keys ? cache.key_rotation() : cache.value_rotation();
  std::vector<float> lengths(norms.size());
  convert_to_float(norms.data(), DType::f16, norms.size(), lengths.data());
  std::vector<float> rows;
  for (std::size_t t = 0; t < kTileTokens; ++t) {
    std::vector<float> y;
    for (std::size_t c = 0; c < static_cast<std::size_t>(dim); ++c) {
      y.push_back(lengths[t] *
                  book.centroids()[codes[c * static_cast<std::size_t>(kTileTokens) + t]]);
    }
    rotation.apply_transposed(y.data(), y.data(), 1);
    rows.insert(rows.end(), y.begin(), y.end());
  }
  return rows;
}

// The centre at a position, added to a key.
void add_centre(const KvCache& cache, const CentreView& centre, double position, float* key) {
  for (std::size_t c = 0; c < centre.constant.size(); ++c) key[c] += centre.constant[c];
  if (centre.real.empty()) return;
  const Rope& rope = *cache.options().rope;
  const std::size_t pairs = rope.inv_freq.size();
  for (std::size_t f = 0; f < pairs; ++f) {
    const double angle = position * static_cast<double>(rope.inv_freq[f]);
    const double re = static_cast<double>(centre.real[f]);
    const double im = static_cast<double>(centre.imaginary[f]);
    key[f] += static_cast<float>(re * std::cos(angle) - im * std::sin(angle));
    key[f + pairs] += static_cast<float>(re * std::sin(angle) + im * std::cos(angle));
  }
}

struct Kind {
  int dim;
  int bits_k;
  int bits_v;
  Centering centering;
  bool gaps;  // between positions
};

class Views : public testing::TestWithParam<Kind> {};

TEST_P(Views, TheBytesSayWhatTheCacheReads) {
  const Kind kind = GetParam();
  CacheOptions options = geometry(kind.dim, kind.bits_k, kind.bits_v);
  options.centering = kind.centering;
  options.rope = test::rope_of(kind.dim);
  KvCache cache(options, 2);
  auto engine = test::random_engine(350);
  const Tokens tokens(2, 2, 300, kind.dim, engine);
  std::vector<std::int64_t> positions;
  for (std::int64_t t = 0; t < 300; ++t) positions.push_back(kind.gaps ? 2 * t + t % 3 : t);
  cache.append(tokens.keys, tokens.values,
               PositionTensor{positions.data(), {1, 1, 300}, {0, 0, 1}});
  cache.seal();
  cache.crop(200);  // a block keeps its first tokens
  const KvCache kept = cache;
  cache.crop(0);
  EXPECT_TRUE(cache.sealed_blocks(1).empty());
  for (int row = 0; row < 2; ++row) {
    const auto blocks = kept.sealed_blocks(row);
    ASSERT_EQ(blocks.size(), 4U);
    EXPECT_EQ(blocks[3].tokens, 200 - 4 - 3 * 64);
    std::int64_t next = 4;
    for (const SealedBlock& block : blocks) {
      EXPECT_EQ(block.first_token, next);
      EXPECT_EQ(block.layout, &kept.tile_layout());
      EXPECT_EQ(reinterpret_cast<std::uintptr_t>(block.tiles.data()) % 64, 0U);
      EXPECT_EQ(block.tiles.size(), 2 * kept.tile_layout().bytes());
      EXPECT_EQ(block.positions.empty(), !kind.gaps);
      const test::Gathered all = test::gather(kept, next, block.tokens);
      for (int head = 0; head < 2; ++head) {
        std::vector<float> keys = decoded(kept, block, head, true);
        const std::vector<float> values = decoded(kept, block, head, false);
        const CentreView centre = kept.centre(row, block.centre_set, head);
        EXPECT_EQ(centre.kind, kind.centering);
        for (int t = 0; t < block.tokens; ++t) {
          const auto at = static_cast<std::size_t>(t) * static_cast<std::size_t>(kind.dim);
          const std::int64_t position = block.positions.empty()
                                            ? block.first_position + t
                                            : block.positions[static_cast<std::size_t>(t)];
          EXPECT_EQ(position, positions[static_cast<std::size_t>(next + t)]);
          add_centre(kept, centre, static_cast<double>(position), &keys[at]);
          for (std::size_t c = 0; c < static_cast<std::size_t>(kind.dim); ++c) {
            ASSERT_NEAR(keys[at + c], all.keys.at(row, head, t)[c], 2e-4) << t << ", " << c;
            ASSERT_NEAR(values[at + c], all.values.at(row, head, t)[c], 1e-4) << t << ", " << c;
          }
        }
      }
      next += block.tokens;
    }
  }
}

INSTANTIATE_TEST_SUITE_P(Kinds, Views,
                         testing::Values(Kind{64, 4, 2, Centering::rope, false},
                                         Kind{64, 2, 4, Centering::rope, true},
                                         Kind{40, 3, 8, Centering::mean, false},
                                         Kind{80, 8, 1, Centering::none, false}));

TEST(ViewsOfNothing, AreEmptyOrRefused) {
  KvCache cache(geometry(16));
  EXPECT_TRUE(cache.sealed_blocks(0).empty());
  EXPECT_THROW((void)cache.sealed_blocks(1), IndexError);
  EXPECT_THROW((void)cache.sealed_blocks(-1), IndexError);
  EXPECT_THROW((void)cache.centre(0, 0, 0), IndexError);
}

class Reserved : public testing::Test {
 protected:
  std::mt19937_64 engine_ = test::random_engine(351);
  Tokens tokens_{2, 2, 1000, 32, engine_};
  KvCache cache_{geometry(32), 2};
};

TEST_F(Reserved, TilesTakeNoMoreMemory) {
  cache_.reserve(1000);
  const std::size_t held = allocated_bytes();
  const MemoryReport empty = cache_.memory();
  EXPECT_EQ(empty.packed_bytes, 0U);
  EXPECT_EQ(empty.total_bytes(), held);
  KvCache plain(geometry(32), 2);
  for (std::int64_t first = 0; first < 1000; first += 50) {
    tokens_.append_to(cache_, first, 50);
    tokens_.append_to(plain, first, 50);
  }
  cache_.seal();
  plain.seal();
  EXPECT_TRUE(cache_.serialize() == plain.serialize());
  const MemoryReport full = cache_.memory();
  EXPECT_EQ(full.packed_bytes, plain.memory().packed_bytes);
  // Tiles came out of what was set aside; what is left of it is the list.
  EXPECT_LT(full.overhead_bytes, plain.memory().overhead_bytes + 2000);
}

TEST_F(Reserved, ReservesAreOfTheCacheAlone) {
  cache_.reserve(1000);
  const std::size_t held = allocated_bytes();
  const KvCache copy = cache_;
  EXPECT_LT(allocated_bytes() - held, 2000U);
  EXPECT_LT(copy.memory().total_bytes(), 2000U);
  cache_.reserve(1000);  // it is there
  EXPECT_LT(allocated_bytes(), held + 3000);
  tokens_.append_to(cache_, 0, 600);
  const std::vector<std::int64_t> padding = {3, 0};
  cache_.set_padding(padding);
  cache_.seal();
  cache_.reserve(0);
  EXPECT_LT(cache_.memory().overhead_bytes, 20000U);
  const std::string message = message_of([&] { cache_.reserve(-1); });
  EXPECT_TRUE(contains(message, "tokens to be reserved = -1")) << message;
}

TEST_F(Reserved, MemoryThatRunsOutChangesNothing) {
  tokens_.append_to(cache_, 0, 300);
  cache_.reserve(400);
  const std::size_t held = allocated_bytes();
  const std::vector<std::byte> before = cache_.serialize();
  const auto unchanged = [&] {
    EXPECT_EQ(allocated_bytes(), held);
    EXPECT_EQ(cache_.serialize(), before);
  };
  EXPECT_GT(test::fail_each([] {}, [&] { cache_.reserve(1000); }, unchanged), 2);
  cache_.reserve(400);
  const std::size_t now = allocated_bytes();
  limit_memory(now + 10000);
  EXPECT_THROW(cache_.reserve(100000), MemoryLimitError);
  EXPECT_EQ(allocated_bytes(), now);
  limit_memory(0);
  EXPECT_EQ(cache_.serialize(), before);
}

}  // namespace
}  // namespace tqai
