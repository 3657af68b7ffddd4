// Memory that runs out, at each allocation of each member: all or nothing, and nothing is lost.
#include <atomic>
#include <cstring>
#include <functional>
#include <new>
#include <tqai/cache.hpp>

#include "cache_helpers.hpp"
#include "failing_allocations.hpp"
#include "openmp.hpp"
#include "threads.hpp"

namespace tqai {
namespace {

using test::Array;
using test::attend;
using test::fail_each;
using test::g_before_failure;
using test::g_living;
using test::geometry;
using test::Tokens;

enum class Kind { plain, mean, rope, rope_at_positions };

struct Setting {
  Kind kind;
  int batch;
  int threads;
};

std::ostream& operator<<(std::ostream& out, const Setting& setting) {
  return out << "kind " << static_cast<int>(setting.kind) << ", batch " << setting.batch << ", "
             << setting.threads << " threads";
}

class Allocations : public testing::TestWithParam<Setting> {
 protected:
  static constexpr int kHeads = 4;
  static constexpr int kDim = 8;
  static constexpr std::int64_t kMost = 600;

  Allocations()
      : count_(GetParam().threads), tokens_(GetParam().batch, kHeads, kMost, kDim, engine_) {
    options_ = geometry(kDim, 4, 4, kHeads);
    switch (GetParam().kind) {
      case Kind::plain: options_.centering = Centering::none; break;
      case Kind::mean:
        options_.centering = Centering::mean;
        options_.value_codes = CodeKind::trellis;
        break;
      case Kind::rope:
      case Kind::rope_at_positions:
        options_.centering = Centering::rope;
        options_.rope = test::rope_of(kDim);
        break;
    }
    for (std::int64_t t = 0; t < kMost; ++t) positions_.push_back(1000 + t * t % 97);
    // Keys that the first tiles' centres do not serve.
    for (int b = 0; b < GetParam().batch; ++b) {
      for (int h = 0; h < kHeads; ++h) {
        for (std::int64_t t = 200; t < kMost; ++t) tokens_.keys.at(b, h, t)[h] += 40.0F;
      }
    }
  }

  void append(KvCache& cache, std::int64_t first, std::int64_t count) const {
    std::optional<PositionTensor> positions;
    if (GetParam().kind == Kind::rope_at_positions) {
      positions = PositionTensor{positions_.data() + first, {1, 1, count}, {0, 0, 1}};
    }
    const auto rows_of = [&](const Array& all) {
      ConstTensor tensor = Tokens::slice(all, first, count);
      tensor.shape[0] = count_of_rows_;
      return tensor;
    };
    cache.append(rows_of(tokens_.keys), rows_of(tokens_.values), positions);
  }
  // With 4 sinks and a window of 16: two tiles sealed, and the last 50 tokens where they may be.
  KvCache unsealed(std::int64_t count) const {
    KvCache cache(options_, GetParam().batch);
    append(cache, 0, count);
    return cache;
  }
  KvCache sealed(std::int64_t more) const {
    KvCache cache = unsealed(160);
    cache.seal();
    append(cache, 160, more);
    return cache;
  }

  // `change` is all or nothing, and done at last it gives what it gives without failures.
  void expect_all_or_nothing(const char* name, const std::function<KvCache()>& make,
                             const std::function<void(KvCache&)>& change) {
    SCOPED_TRACE(name);
    KvCache untroubled = make();
    change(untroubled);
    const std::vector<std::byte> before = make().serialize();
    const std::vector<std::byte> after = untroubled.serialize();
    const long living = g_living;
    {
      std::optional<KvCache> cache;
      std::optional<Array> output;
      const auto outputs = [&] {
        const Array queries({cache->batch(), kHeads, cache->tokens() > 0 ? 1 : 0, kDim}, 0.5F);
        return attend(*cache, queries).data;
      };
      cache = make();
      const std::vector<float> outputs_before = outputs();
      const int failures = fail_each([&] { cache = make(); }, [&] { change(*cache); },
                                     [&] {
                                       EXPECT_TRUE(cache->serialize() == before);
                                       EXPECT_EQ(outputs(), outputs_before);
                                     });
      EXPECT_GT(failures, 0);
      EXPECT_TRUE(cache->serialize() == after);
      // What failed leaves nothing in the way of another attempt.
      cache = make();
      for (int n = 0; n < failures; ++n) {
        g_before_failure = n;
        try {
          change(*cache);
        } catch (const std::bad_alloc&) {
          g_before_failure = -1;
          continue;
        }
        g_before_failure = -1;
        break;
      }
      if (cache->serialize() != after) change(*cache);
      EXPECT_TRUE(cache->serialize() == after);
    }
    EXPECT_EQ(g_living, living) << "something was lost, or is kept";
  }

  const test::ThreadCount count_;
  const std::int64_t count_of_rows_ = GetParam().batch;
  std::mt19937_64 engine_ = test::random_engine(51);
  CacheOptions options_;
  Tokens tokens_;
  std::vector<std::int64_t> positions_;
};

TEST_P(Allocations, Append) {
  expect_all_or_nothing(
      "to nothing", [&] { return unsealed(0); }, [&](KvCache& c) { append(c, 0, 200); });
  expect_all_or_nothing(
      "before sealing", [&] { return unsealed(40); }, [&](KvCache& c) { append(c, 40, 200); });
  expect_all_or_nothing(
      "first sealing", [&] { return unsealed(160); }, [&](KvCache& c) { append(c, 160, 1); });
  expect_all_or_nothing(
      "sealing, and more than there is room for", [&] { return sealed(100); },
      [&](KvCache& c) { append(c, 260, 200); });
  expect_all_or_nothing(
      "to a copy", [&] { return sealed(10); },
      [&](KvCache& c) {
        const KvCache copy = c;
        append(c, 170, 3);
      });
}

TEST_P(Allocations, Seal) {
  // Enough tiles for threads.
  expect_all_or_nothing("first", [&] { return unsealed(300); }, [](KvCache& c) { c.seal(); });
  if (GetParam().threads > 1 || GetParam().batch > 2) return;
  expect_all_or_nothing(
      "another centre", [&] { return sealed(340); }, [](KvCache& c) { c.seal(); });
}

TEST_P(Allocations, Crop) {
  for (const std::int64_t tokens : {165, 70, 3, 0}) {
    expect_all_or_nothing("crop", [&] { return sealed(20); }, [=](KvCache& c) { c.crop(tokens); });
  }
}

// As after each step of speculative decoding: no token is copied.
TEST_P(Allocations, CroppingTheLastTokensTakesListsAlone) {
  KvCache cache = sealed(20);
  const auto taken = [](KvCache& from, std::int64_t tokens) {
    constexpr long kPlenty = 1'000'000;
    g_before_failure = kPlenty;
    from.crop(tokens);
    return kPlenty - g_before_failure.exchange(-1);
  };
  const long alone = taken(cache, cache.tokens() - 4);
  EXPECT_LE(alone, 1 + GetParam().batch);  // positions of each row, where they are told
  KvCache copy = cache;
  EXPECT_GT(taken(copy, copy.tokens() - 4), alone);  // what the other one sees stays
  EXPECT_EQ(cache.tokens(), copy.tokens() + 4);
}

TEST_P(Allocations, SelectAndCopy) {
  const std::vector<std::int64_t> rows = {GetParam().batch - 1, 0, 0};
  expect_all_or_nothing("select", [&] { return sealed(20); }, [&](KvCache& c) { c.select(rows); });
  expect_all_or_nothing(
      "assignment", [&] { return sealed(20); },
      [&](KvCache& c) {
        const KvCache copy = c;
        c = copy;
      });
}

TEST_P(Allocations, SetPadding) {
  expect_all_or_nothing(
      "set_padding", [&] { return unsealed(60); },
      [](KvCache& c) {
        std::vector<std::int64_t> counts;
        for (int b = 0; b < c.batch(); ++b) counts.push_back(7 + 20 * b);
        c.set_padding(counts);
      });
}

TEST_P(Allocations, LeaveOut) {
  const auto every_third = [](const KvCache& cache, std::int64_t last) {
    std::vector<std::uint8_t> hidden(static_cast<std::size_t>(cache.batch() * last));
    for (std::size_t i = 0; i < hidden.size(); i += 3) hidden[i] = 1;
    return hidden;
  };
  expect_all_or_nothing(
      "leave_out", [&] { return unsealed(60); },
      [&](KvCache& c) { c.leave_out(every_third(c, 40)); });
  expect_all_or_nothing(
      "leave_out of what is behind tiles", [&] { return sealed(20); },
      [&](KvCache& c) { c.leave_out(every_third(c, 9)); });
  // With gaps in the way.
  const auto with_gaps = [&] {
    KvCache cache = unsealed(60);
    cache.leave_out(every_third(cache, 40));
    append(cache, 60, 100);
    return cache;
  };
  expect_all_or_nothing("append", with_gaps, [&](KvCache& c) { append(c, 160, 150); });
  expect_all_or_nothing("seal", with_gaps, [](KvCache& c) { c.seal(); });
  expect_all_or_nothing("crop", with_gaps, [](KvCache& c) { c.crop(50); });
  expect_all_or_nothing("discard_before", with_gaps, [](KvCache& c) { c.discard_before(150); });
}

TEST_P(Allocations, DiscardBefore) {
  for (const std::int64_t token : {2, 100, 280}) {
    expect_all_or_nothing(
        "discard_before", [&] { return sealed(140); },
        [=](KvCache& c) { c.discard_before(token); });
  }
  expect_all_or_nothing(
      "discard_before of rows of several lengths",
      [&] {
        KvCache cache = unsealed(160);
        std::vector<std::int64_t> counts;
        for (int b = 0; b < cache.batch(); ++b) counts.push_back(30 * b);
        cache.set_padding(counts);
        return cache;
      },
      [](KvCache& c) { c.discard_before(150); });
}

TEST_P(Allocations, Deserialize) {
  const std::vector<std::byte> bytes = sealed(20).serialize();
  expect_all_or_nothing(
      "deserialize", [&] { return unsealed(10); },
      [&](KvCache& c) { c = KvCache::deserialize(bytes); });
}

// Of settings that no other cache has: rotations and tables are made.
TEST_P(Allocations, AnotherCache) {
  CacheOptions other = options_;
  (void)KvCache(other, 2);  // codebooks stay
  const long living = g_living;
  const int failures = fail_each(
      [&] {
        ++other.seed;
        if (other.rope) other.rope->inv_freq[0] *= 0.99F;
      },
      [&] { (void)KvCache(other, 2); }, [] {});
  EXPECT_GT(failures, 0);
  EXPECT_LE(g_living, living);
}

TEST_P(Allocations, WhatReadsWritesAllOrNothing) {
  const KvCache cache = sealed(140);
  const Array queries({cache.batch(), 2 * kHeads, 3, kDim}, 0.5F);
  const Array none({cache.batch(), 3, 2 * kHeads, kDim}, 7.0F);
  Array output = none;
  const auto is_untouched = [&] { EXPECT_EQ(output.data, none.data); };
  EXPECT_GT(fail_each([] {}, [&] { cache.attend(queries, output); }, is_untouched), 0);
  EXPECT_EQ(output.data, attend(cache, queries).data);

  const test::Gathered expected = test::gather(cache, 0, cache.tokens());
  const Array no_keys({cache.batch(), kHeads, cache.tokens(), kDim}, 7.0F);
  Array keys = no_keys;
  Array values = no_keys;
  EXPECT_GT(fail_each([] {}, [&] { cache.gather(0, keys, values); },
                      [&] {
                        EXPECT_EQ(keys.data, no_keys.data);
                        EXPECT_EQ(values.data, no_keys.data);
                      }),
            0);
  EXPECT_EQ(keys.data, expected.keys.data);
  EXPECT_EQ(values.data, expected.values.data);

  EXPECT_GT(fail_each([] {}, [&] { (void)cache.serialize(); }, [] {}), 0);
  EXPECT_GT(fail_each([] {}, [&] { (void)cache.memory(); }, [] {}), 0);
}

INSTANTIATE_TEST_SUITE_P(, Allocations,
                         testing::Values(Setting{Kind::plain, 1, 1}, Setting{Kind::mean, 3, 1},
                                         Setting{Kind::rope, 3, 1}, Setting{Kind::rope, 1, 2},
                                         Setting{Kind::rope_at_positions, 2, 1}));

// Options come from files: what caches of many of them shared is not kept when they are gone.
TEST(SharedTables, AreForgotten) {
  const auto use = [](std::uint64_t seed) {
    CacheOptions options = geometry(16);
    options.seed = seed;
    options.rope = test::rope_of(16);
    options.rope->inv_freq[0] = static_cast<float>(seed);
    const KvCache cache(options);
  };
  for (std::uint64_t seed = 1; seed < 10; ++seed) use(seed);
  const long living = g_living;
  for (std::uint64_t seed = 10; seed < 500; ++seed) use(seed);
  EXPECT_LE(g_living, living);
}

TEST(ParallelFor, ThrowsOnWhatIsThrownInAnyThread) {
  for (const int threads : {1, 2}) {
    const test::ThreadCount count(threads);
    for (const std::int64_t bad : {0, 31, 63}) {
      std::atomic<int> done{0};
      EXPECT_THROW(parallel_for(64, 1,
                                [&](std::int64_t i) {
                                  if (i == bad) throw std::bad_alloc();
                                  ++done;
                                }),
                   std::bad_alloc);
      EXPECT_LT(done, 64);
      parallel_for(64, 1, [&](std::int64_t) { ++done; });
      EXPECT_GE(done, 64);
    }
  }
}

}  // namespace
}  // namespace tqai
