// What a KvCache holds: sealing, copies, crops, rows, padding, bytes.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <functional>
#include <tqai/cache.hpp>
#include <tqai/codebook.hpp>

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

class Cache : public testing::Test {
 protected:
  std::mt19937_64 engine_ = test::random_engine(20);
};

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

// Two rows of 330 tokens, from the second of which some are left out as they come: at its start, in
// between and at the end.
struct LeftOut {
  static constexpr std::int64_t kPieces[] = {90, 150, 90};
  std::vector<bool> out = std::vector<bool>(330, false);
  std::vector<std::int64_t> kept;

  LeftOut() {
    for (std::size_t t = 0; t < out.size(); ++t) {
      out[t] = t < 3 || (t >= 20 && t < 33) || (t >= 80 && t < 170) || t == 200 || t >= 322;
      if (!out[t]) kept.push_back(static_cast<std::int64_t>(t));
    }
  }
  void append(KvCache& cache, const Tokens& all) const {
    std::int64_t first = 0;
    for (const std::int64_t count : kPieces) {
      all.append_to(cache, first, count);
      std::vector<std::uint8_t> hidden(static_cast<std::size_t>(2 * count), 0);
      for (std::int64_t t = 0; t < count; ++t) {
        hidden[static_cast<std::size_t>(count + t)] = out[static_cast<std::size_t>(first + t)];
      }
      cache.leave_out(hidden);
      cache.leave_out(hidden);  // once more makes no difference
      cache.seal();
      first += count;
    }
  }
  // What is kept of the second row, in a cache of its own.
  KvCache alone(const Tokens& all) const {
    std::mt19937_64 engine;
    Tokens some(1, 2, std::ssize(kept), 64, engine);
    for (int h = 0; h < 2; ++h) {
      for (std::int64_t i = 0; i < std::ssize(kept); ++i) {
        const std::int64_t from = kept[static_cast<std::size_t>(i)];
        std::copy_n(all.keys.at(1, h, from), 64, some.keys.at(0, h, i));
        std::copy_n(all.values.at(1, h, from), 64, some.values.at(0, h, i));
      }
    }
    KvCache cache(geometry(64));
    std::int64_t at = 0;
    std::int64_t end = 0;
    for (const std::int64_t count : kPieces) {
      end += count;
      const auto first = at;
      while (at < std::ssize(kept) && kept[static_cast<std::size_t>(at)] < end) ++at;
      some.append_to(cache, first, at - first);
      cache.seal();
    }
    return cache;
  }
};

TEST_F(Cache, WhatIsLeftOutTakesNeitherWindowNorBytes) {
  const Tokens all(2, 2, 330, 64, engine_);
  const LeftOut left_out;
  KvCache cache(geometry(64), 2);
  left_out.append(cache, all);
  const KvCache alone = left_out.alone(all);
  EXPECT_EQ(cache.tokens(), 330);
  EXPECT_EQ(cache.packed_tokens(1), alone.packed_tokens(0));
  EXPECT_EQ(cache.memory().tokens, 330 + alone.tokens());
  EXPECT_TRUE(cache.left_out(0).empty());
  EXPECT_EQ(cache.left_out(1).size(), 4U);
  EXPECT_EQ(cache.left_out(1)[1].first, 80);
  EXPECT_EQ(cache.left_out(1)[1].count, 90);
  const KvCache read = KvCache::deserialize(cache.serialize());
  for (const KvCache* each : {static_cast<const KvCache*>(&cache), &read}) {
    const Gathered got = gather(*each, 0, 330);
    const Gathered expected = gather(alone, 0, alone.tokens());
    for (int h = 0; h < 2; ++h) {
      std::size_t at = 0;
      for (std::size_t t = 0; t < left_out.out.size(); ++t) {
        if (left_out.out[t]) {
          EXPECT_EQ(test::norm(rows_of_head(got.values, 1, h)[t]), 0.0) << t;
        } else {
          EXPECT_EQ(rows_of_head(got.keys, 1, h)[t], rows_of_head(expected.keys, 0, h)[at]) << t;
          EXPECT_EQ(rows_of_head(got.values, 1, h)[t], rows_of_head(expected.values, 0, h)[at++]);
        }
      }
    }
    // A part of it.
    EXPECT_EQ(rows_of_head(gather(*each, 75, 30).keys, 1, 0)[4], rows_of_head(got.keys, 1, 0)[79]);
  }
}

TEST_F(Cache, MasksAndWindowsGoByTokensWhereSomeAreLeftOut) {
  const Tokens all(2, 2, 330, 64, engine_);
  const LeftOut left_out;
  KvCache cache(geometry(64), 2);
  left_out.append(cache, all);
  const KvCache alone = left_out.alone(all);
  const Array queries({2, 4, 1, 64}, engine_);
  Array second({1, 4, 1, 64});
  std::copy_n(queries.at(1, 0, 0), 4 * 64, second.data.begin());
  std::vector<std::uint8_t> mask(330);
  std::vector<std::uint8_t> of_kept;
  for (std::size_t t = 0; t < mask.size(); ++t) mask[t] = t % 3 != 0;
  for (const std::int64_t t : left_out.kept) of_kept.push_back(mask[static_cast<std::size_t>(t)]);
  const auto count = static_cast<std::int64_t>(of_kept.size());
  AttendOptions options;
  AttendOptions alike;
  const auto compare = [&] {
    const Array output = attend(cache, queries, options);
    const Array expected = attend(alone, second, alike);
    for (std::size_t i = 0; i < expected.data.size(); ++i) {
      ASSERT_EQ(output.at(1, 0, 0)[i], expected.data[i]);
    }
  };
  compare();
  options.mask = Mask{mask.data(), Mask::Kind::boolean, {1, 1, 1, 330}, {0, 0, 0, 1}};
  alike.mask = Mask{of_kept.data(), Mask::Kind::boolean, {1, 1, 1, count}, {0, 0, 0, 1}};
  compare();
  options = alike = {};
  options.window = 200;  // tokens 130 and later, of which those from 170 on are held
  ASSERT_EQ(left_out.kept[64], 170);
  alike.window = static_cast<int>(count - 64);
  compare();
  options = alike = {};
  options.first_token = 100;
  alike.first_token = 64;
  compare();
}

TEST_F(Cache, CropsAndDiscardsGoByTokensWhereSomeAreLeftOut) {
  const Tokens all(2, 2, 330, 64, engine_);
  const LeftOut left_out;
  for (const std::int64_t tokens : {325, 200, 120, 80, 40, 25, 2}) {
    KvCache cache(geometry(64), 2);
    left_out.append(cache, all);
    KvCache alone = left_out.alone(all);
    const auto kept = std::lower_bound(left_out.kept.begin(), left_out.kept.end(), tokens);
    cache.crop(tokens);
    alone.crop(kept - left_out.kept.begin());
    EXPECT_EQ(cache.tokens(), tokens);
    EXPECT_EQ(cache.packed_tokens(1), alone.packed_tokens(0));
    EXPECT_EQ(cache.memory().tokens, tokens + alone.tokens()) << tokens;
    const std::vector<std::byte> bytes = cache.serialize();
    EXPECT_EQ(KvCache::deserialize(bytes).serialize(), bytes);
    const Tokens more(2, 2, 10, 64, engine_);
    more.append_to(cache, 0, 10);
    const Gathered got = gather(cache, tokens, 10);
    EXPECT_EQ(rows_of_head(got.keys, 1, 1)[9], rows_of_head(more.keys, 1, 1)[9]) << tokens;
  }
  CacheOptions options = geometry(64);
  options.sink_tokens = 0;
  KvCache cache(options, 1);
  const Tokens one(1, 2, 400, 64, engine_);
  one.append_to(cache, 0, 100);
  std::vector<std::uint8_t> hidden(100, 0);
  std::fill(hidden.begin() + 50, hidden.end(), std::uint8_t{1});
  cache.leave_out(hidden);
  one.append_to(cache, 100, 300);
  cache.seal();
  cache.discard_before(113);  // the first 50 tokens and 13 more: no whole tile
  EXPECT_EQ(cache.first_token(), 0);
  cache.discard_before(114);
  EXPECT_EQ(cache.first_token(), 114);
  EXPECT_EQ(cache.memory().tokens, 350 - 64);
}

TEST_F(Cache, WhatIsLeftOutInTurnsIsAsAtOnce) {
  const Tokens all(1, 2, 100, 64, engine_);
  KvCache once(geometry(64));
  all.append_to(once, 0, 100);
  KvCache in_turns(once);
  std::vector<std::uint8_t> first(100);  // of each, others before, behind and between the former
  std::vector<std::uint8_t> second(100);
  for (const std::size_t token : {2U, 40U, 41U, 60U, 70U, 99U}) first[token] = 1;
  for (const std::size_t token : {0U, 1U, 3U, 30U, 42U, 59U, 61U, 65U, 98U}) second[token] = 1;
  std::vector<std::uint8_t> both(100);
  std::transform(first.begin(), first.end(), second.begin(), both.begin(), std::bit_or());
  once.leave_out(both);
  in_turns.leave_out(first);
  in_turns.leave_out(both);  // what is left out is let be
  EXPECT_EQ(in_turns.left_out(0).size(), once.left_out(0).size() + 1);  // token 2, and padding
  const auto check = [&](std::int64_t tokens) {
    for (KvCache* cache : {&once, &in_turns}) {
      cache->crop(tokens);
      cache->seal();
    }
    EXPECT_EQ(gather(in_turns, 0, tokens).keys.data, gather(once, 0, tokens).keys.data);
    EXPECT_EQ(in_turns.memory().tokens, once.memory().tokens);
    const KvCache back = KvCache::deserialize(in_turns.serialize());
    const Array queries({1, 4, 2, 64}, engine_);
    EXPECT_EQ(attend(back, queries).data, attend(once, queries).data);
  };
  check(100);
  check(64);
  check(41);
}

TEST_F(Cache, WhatIsSealedCannotBeLeftOut) {
  KvCache cache(geometry(64));
  const Tokens all(1, 2, 200, 64, engine_);
  all.append_to(cache, 0, 200);
  cache.seal();
  EXPECT_TRUE(contains(message_of([&] { cache.leave_out(std::vector<std::uint8_t>(190, 1)); }),
                       "token 10 is sealed already"));
  EXPECT_EQ(cache.memory().tokens, 200);
  EXPECT_TRUE(contains(message_of([&] { cache.leave_out(std::vector<std::uint8_t>(201, 0)); }),
                       "201 marks of hidden tokens for a batch of 1 with 200 tokens"));
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

// What a device's own reader of tiles relies on.
TEST_F(Cache, RotationsTakeKeysAndValuesToTheCodebooksGrid) {
  for (const int dim : {64, 80}) {
    CacheOptions options = geometry(dim, 4, 3, 1);
    options.sink_tokens = 0;
    options.centering = Centering::none;
    options.seed = 99;
    KvCache cache(options);
    const Tokens all(1, 1, 200, dim, engine_);
    all.append_to(cache, 0, 200);
    cache.seal();
    ASSERT_GE(cache.packed_tokens(0), 64);
    EXPECT_EQ(cache.key_rotation().seed(), 99U);
    EXPECT_NE(cache.value_rotation().seed(), 99U);
    const Gathered held = gather(cache, 0, 64);
    const auto count_off_grid = [&](const Array& array, const Rotation& rotation, int bits) {
      const Codebook& book = codebook(dim, bits, Grid::int8);
      std::vector<float> turned(static_cast<std::size_t>(dim));
      int off = 0;
      for (std::int64_t t = 0; t < 64; ++t) {
        rotation.apply(array.at(0, 0, t), turned.data(), 1);
        // Equal norms of vectors of levels: some multiple of each is all whole levels.
        double most = 0.0;
        for (const float x : turned) most = std::max(most, std::abs(static_cast<double>(x)));
        int best = dim;
        for (const std::int8_t level : book.levels()) {
          if (level <= 0) continue;
          int wrong = 0;
          for (const float x : turned) {
            const double scaled = static_cast<double>(x) / most * level;
            wrong += std::none_of(
                book.levels().begin(), book.levels().end(),
                [&](std::int8_t allowed) { return std::abs(scaled - allowed) < 1e-3; });
          }
          best = std::min(best, wrong);
        }
        off += best;
      }
      return off;
    };
    EXPECT_EQ(count_off_grid(held.keys, cache.key_rotation(), 4), 0);
    EXPECT_EQ(count_off_grid(held.values, cache.value_rotation(), 3), 0);
    EXPECT_GT(count_off_grid(held.values, cache.key_rotation(), 3), 1000);
  }
}

TEST_F(Cache, VectorsTooLongForTheirNormsStayExact) {
  CacheOptions options = geometry(64);
  options.residual_window = 16;
  KvCache cache(options, 2);
  Tokens all(2, 2, 600, 64, engine_);
  const auto set = [&](Array& array, std::int64_t b, int h, std::int64_t t, float value) {
    array.data[static_cast<std::size_t>(((b * 2 + h) * 600 + t) * 64 + 7)] = value;
  };
  set(all.values, 0, 0, 0, 1e20F);   // a sink: no consequences
  set(all.values, 1, 1, 100, 2e4F);  // what follows in this row stays exact
  all.append_to(cache, 0, 300);
  EXPECT_EQ(cache.seal(), 192);
  EXPECT_EQ(cache.packed_tokens(0), 256);
  EXPECT_EQ(cache.packed_tokens(1), 64);
  const Gathered held = gather(cache, 0, 300);
  EXPECT_EQ(held.values.data[((2 + 1) * 300 + 100) * 64 + 7], 2e4F);
  const Array queries({2, 4, 2, 64}, engine_);
  EXPECT_LT(worst_error(cache, queries, attend(cache, queries)), test::kPackedError);
  all.append_to(cache, 300, 300);
  EXPECT_GT(cache.seal(), 400);
  EXPECT_EQ(cache.packed_tokens(1), 64);
  KvCache other = KvCache::deserialize(cache.serialize());
  EXPECT_EQ(other.seal(), cache.seal());
  cache.crop(100);
  all.append_to(cache, 400, 200);
  EXPECT_EQ(cache.seal(), 0);
  EXPECT_EQ(cache.packed_tokens(1), 256);
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

}  // namespace
}  // namespace tqai
