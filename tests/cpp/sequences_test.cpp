// Calls on many caches: to the bit what each gets alone, and all or nothing.
#include <algorithm>
#include <cstdlib>
#include <limits>
#include <memory>
#include <thread>
#include <tqai/cache.hpp>
#include <tqai/sequences.hpp>

#include "cache_helpers.hpp"
#include "failing_allocations.hpp"
#include "openmp.hpp"

namespace tqai {
namespace {

using test::Array;
using test::contains;
using test::geometry;
using test::message_of;
using test::Tokens;

constexpr int kDim = 16;
constexpr std::int64_t kHeads = 2;
constexpr std::int64_t kQueryHeads = 4;

// A runtime's requests: the cache that is served with the others, and one that is served alone.
struct Sequence {
  KvCache together;
  KvCache alone;
};

// Requests that join, leave, fork and are cropped, all served together.
class Schedule {
 public:
  Schedule(const CacheOptions& options, std::uint64_t seed)
      : options_(options), engine_(test::random_engine(seed)), numbers_({1, 1, 1, 40000}, engine_) {
    // OpenMP's threads spin while they wait for one another, which on a busy machine takes longer
    // than all else here: few have them. An application's wait for nothing.
    const int kind = between(0, 99);
    resources_.threads = kind < 2 ? between(2, 3) : 1;
    if (kind >= 2 && kind < 10) {
      resources_.threads = between(2, 3);
      resources_.parallel_for = [](std::int64_t count, const Resources::Work& work) {
        std::vector<std::thread> threads;
        for (std::int64_t i = 1; i < count; ++i) threads.emplace_back([&work, i] { work(i); });
        work(0);
        for (std::thread& thread : threads) thread.join();
      };
    } else if (kind >= 10 && kind < 35) {
      resources_.threads = 2;
      resources_.parallel_for = [](std::int64_t count, const Resources::Work& work) {
        for (std::int64_t i = count; i-- > 0;) work(i);
      };
    }
    if (between(0, 1) == 0) resources_.workspace = &workspace_;
  }

  void run(int steps) {
    for (int step = 0; step < steps && !testing::Test::HasFailure(); ++step) {
      if (sequences_.empty() || (sequences_.size() < 4 && between(0, 2) == 0)) {
        sequences_.push_back({KvCache(options_), KvCache(options_)});
      }
      switch (between(0, 5)) {
        case 0: fork(); break;
        case 1: crop(); break;
        case 2: leave(); break;
        case 3: seal(); break;
        default: break;
      }
      if (!sequences_.empty()) serve();
    }
    for (const Sequence& each : sequences_) {
      ASSERT_TRUE(each.together.serialize() == each.alone.serialize());
    }
  }
  std::int64_t packed() const {
    std::int64_t tokens = 0;
    for (const Sequence& each : sequences_) tokens += each.together.packed_tokens(0);
    return tokens;
  }

 private:
  int between(int low, int high) { return std::uniform_int_distribution<int>(low, high)(engine_); }
  Sequence& any() {
    return sequences_[static_cast<std::size_t>(
        between(0, static_cast<int>(sequences_.size()) - 1))];
  }

  void fork() {
    if (sequences_.size() > 4) return;
    const Sequence copy = any();
    sequences_.push_back(copy);
  }
  void leave() {
    std::swap(any(), sequences_.back());
    sequences_.pop_back();
  }
  void seal() {
    std::vector<KvCache*> caches;
    for (Sequence& each : sequences_) {
      caches.push_back(&each.together);
      each.alone.seal(one_thread_);
    }
    (void)tqai::seal(caches, resources_);
  }
  // Mostly the last few tokens, as after a draft; sometimes into what is sealed.
  void crop() {
    std::vector<SequenceLength> lengths;
    for (Sequence& each : sequences_) {
      const auto tokens = static_cast<int>(each.alone.tokens());
      const int least = between(0, 3) == 0 ? 0 : std::max(tokens - 5, 0);
      lengths.push_back({&each.together, between(least, tokens)});
      each.alone.crop(lengths.back().tokens);
    }
    tqai::crop(lengths);
  }

  ConstTensor random(std::int64_t heads, std::int64_t tokens) {
    const auto room = static_cast<int>(numbers_.shape[3] - heads * tokens * kDim);
    return {numbers_.data.data() + between(0, room),
            DType::f32,
            {1, heads, tokens, kDim},
            {heads * tokens * kDim, tokens * kDim, kDim, 1}};
  }

  // All of them get tokens, some none, and are asked queries.
  void serve() {
    std::vector<std::int64_t> counts;
    std::vector<KvCache*> caches;
    std::int64_t sum = 0;
    for (Sequence& each : sequences_) {
      const int kind = between(0, 5);
      counts.push_back(kind == 0 ? 0 : kind < 5 ? between(1, 4) : between(20, 160));
      caches.push_back(&each.together);
      sum += counts.back();
    }
    const ConstTensor keys = random(kHeads, sum);
    const ConstTensor values = random(kHeads, sum);
    const ConstTensor queries = random(kQueryHeads, sum);
    Array output({1, sum, kQueryHeads, kDim});
    Array logs({1, sum, kQueryHeads, 1});
    AttendOptions options;
    options.log_sum_exp = logs;
    if (between(0, 3) == 0) options.window = between(1, 100);
    const auto of = [](ConstTensor tensor, std::int64_t first, std::int64_t count) {
      tensor.data = static_cast<const float*>(tensor.data) + first * tensor.strides[2];
      tensor.shape[2] = count;
      return tensor;
    };
    if (between(0, 1) == 0) {
      tqai::append(caches, counts, keys, values, {}, resources_);
      const std::vector<const KvCache*> read(caches.begin(), caches.end());
      tqai::attend(read, counts, queries, output, options, resources_);
    } else {
      std::vector<SequenceTokens> tokens;
      std::vector<SequenceQueries> asked;
      for (std::size_t i = 0, first = 0; i < caches.size(); first += size_at(counts, i++)) {
        const auto at = static_cast<std::int64_t>(first);
        tokens.push_back({caches[i], of(keys, at, counts[i]), of(values, at, counts[i]), {}});
        asked.push_back(
            {caches[i], of(queries, at, counts[i]), part(output, at, counts[i]), options});
        asked.back().options.log_sum_exp = part(logs, at, counts[i]);
      }
      tqai::append(tokens, resources_);
      tqai::attend(asked, resources_);
    }
    std::int64_t first = 0;
    for (std::size_t i = 0; i < sequences_.size(); ++i) {
      KvCache& alone = sequences_[i].alone;
      alone.append(of(keys, first, counts[i]), of(values, first, counts[i]), {}, one_thread_);
      Array expected({1, counts[i], kQueryHeads, kDim});
      Array expected_logs({1, counts[i], kQueryHeads, 1});
      AttendOptions same = options;
      same.log_sum_exp = expected_logs;
      alone.attend(of(queries, first, counts[i]), expected, same, one_thread_);
      ASSERT_TRUE(std::equal(expected.data.begin(), expected.data.end(), output.at(0, first, 0)));
      ASSERT_TRUE(
          std::equal(expected_logs.data.begin(), expected_logs.data.end(), logs.at(0, first, 0)));
      first += counts[i];
    }
  }
  static std::size_t size_at(const std::vector<std::int64_t>& counts, std::size_t i) {
    return static_cast<std::size_t>(counts[i]);
  }
  static Tensor part(Array& all, std::int64_t first, std::int64_t count) {
    Tensor tensor = all;
    tensor.data = all.data.data() + first * tensor.strides[1];
    tensor.shape[1] = count;
    return tensor;
  }

  CacheOptions options_;
  std::mt19937_64 engine_;
  Array numbers_;
  Workspace workspace_;
  Resources resources_;
  const Resources one_thread_{1, nullptr, nullptr};
  std::vector<Sequence> sequences_;
};

CacheOptions options_of(std::uint64_t seed) {
  CacheOptions options = geometry(kDim, seed % 4 == 0 ? 8 : 4, seed % 3 == 0 ? 4 : 2);
  if (seed % 2 == 0) {
    options.rope = test::rope_of(kDim);
    options.centering = Centering::rope;
  }
  if (seed % 25 == 0) options.value_codes = CodeKind::trellis;
  return options;
}

TEST(Sequences, AThousandSchedulesGiveWhatEachGetsAlone) {
  // Codecs live as long as a cache that has them.
  std::vector<KvCache> kept;
  for (std::uint64_t seed = 0; seed < 300; ++seed) kept.emplace_back(options_of(seed));
  // Once more at each level, fewer of them.
  const std::uint64_t count = std::getenv("TQAI_LEVEL") == nullptr ? 1000 : 100;
  std::int64_t packed = 0;
  for (std::uint64_t seed = 0; seed < count; ++seed) {
    Schedule schedule(options_of(seed), 1000 + seed);
    schedule.run(8);
    ASSERT_FALSE(HasFailure()) << "seed " << seed;
    packed += schedule.packed();
  }
  EXPECT_GT(packed, static_cast<std::int64_t>(count) * 50);
}

// Long ones among short ones, of several layers' geometries: enough work for threads, several
// parts.
TEST(Sequences, OfOtherGeometriesAndManyPartsShareOneCall) {
  auto engine = test::random_engine(320);
  std::vector<KvCache> caches;
  std::vector<Array> queries;
  std::vector<Array> outputs;
  std::vector<Array> expected;
  for (const auto& [dim, heads, tokens] : {std::tuple{64, 2, 9000}, std::tuple{16, 1, 10},
                                           std::tuple{40, 3, 5000}, std::tuple{128, 1, 300}}) {
    KvCache& cache = caches.emplace_back(geometry(dim, 4, 2, heads));
    const Tokens all(1, heads, tokens, dim, engine);
    all.append_to(cache, 0, tokens);
    cache.seal();
    for (const std::int64_t count : {1, 7}) {
      queries.emplace_back(std::array<std::int64_t, 4>{1, 4 * heads, count, dim}, engine);
      outputs.emplace_back(std::array<std::int64_t, 4>{1, count, 4 * heads, dim});
      expected.push_back(test::attend(cache, queries.back()));
    }
  }
  for (const int threads : {1, 2, 5}) {
    std::vector<SequenceQueries> asked;
    for (std::size_t i = 0; i < queries.size(); ++i) {
      std::fill(outputs[i].data.begin(), outputs[i].data.end(), 7.0F);
      asked.push_back({&caches[i / 2], queries[i], outputs[i], {}});
    }
    Resources resources;
    resources.threads = threads;
    tqai::attend(asked, resources);
    for (std::size_t i = 0; i < queries.size(); ++i) {
      EXPECT_EQ(outputs[i].data, expected[i].data) << i << ", " << threads << " threads";
    }
  }
}

// Ten thousand columns of a mask for each of many rows: more working memory than is held at a time.
TEST(Sequences, WhoseWorkingMemoryIsMoreThanOneWave) {
  auto engine = test::random_engine(321);
  constexpr std::int64_t kTokens = 10000;
  KvCache cache(geometry(kDim, 4, 4, 20));
  const Tokens all(1, 20, kTokens, kDim, engine);
  all.append_to(cache, 0, kTokens);
  cache.seal();
  std::vector<std::uint8_t> seen(8 * kTokens);
  for (std::size_t i = 0; i < seen.size(); ++i) seen[i] = i % 7 == 0 ? 0 : 1;
  AttendOptions masked;
  masked.mask = Mask{seen.data(), Mask::Kind::boolean, {1, 1, 8, kTokens}, {0, 0, kTokens, 1}};
  const Array queries({1, 20, 8, kDim}, engine);
  const Array expected = test::attend(cache, queries, masked);
  std::vector<Array> outputs(7, Array(expected.shape, 7.0F));
  std::vector<SequenceQueries> asked;
  for (Array& output : outputs) asked.push_back({&cache, queries, output, masked});
  tqai::attend(asked);
  for (const Array& output : outputs) EXPECT_EQ(output.data, expected.data);
}

class SequencesAtFaults : public testing::Test {
 protected:
  SequencesAtFaults() {
    for (int i = 0; i < 3; ++i) {
      caches_.push_back(std::make_unique<KvCache>(geometry(kDim)));
      tokens_.append_to(*caches_.back(), 0, 150 + i);
    }
  }
  std::vector<std::vector<std::byte>> bytes() const {
    std::vector<std::vector<std::byte>> all;
    for (const auto& cache : caches_) all.push_back(cache->serialize());
    return all;
  }
  std::vector<SequenceTokens> more(std::int64_t count) const {
    std::vector<SequenceTokens> all;
    for (const auto& cache : caches_) {
      all.push_back({cache.get(),
                     Tokens::slice(tokens_.keys, 0, count),
                     Tokens::slice(tokens_.values, 0, count),
                     {}});
    }
    return all;
  }
  std::vector<KvCache*> pointers() const {
    std::vector<KvCache*> all;
    for (const auto& cache : caches_) all.push_back(cache.get());
    return all;
  }

  const test::ThreadCount count_{2};
  std::mt19937_64 engine_ = test::random_engine(322);
  Tokens tokens_{1, 2, 200, kDim, engine_};
  std::vector<std::unique_ptr<KvCache>> caches_;
};

TEST_F(SequencesAtFaults, OneWrongArgumentChangesNoCacheAndIsNamed) {
  const auto before = bytes();
  auto wrong = more(3);
  wrong[1].values.shape[2] = 2;
  std::string message = message_of([&] { tqai::append(wrong); });
  EXPECT_TRUE(contains(message, "sequence 1 of 3: values")) << message;
  wrong = more(3);
  wrong[2].cache = nullptr;
  EXPECT_TRUE(contains(message_of([&] { tqai::append(wrong); }), "sequence 2 of 3: its cache"));
  wrong[2].cache = wrong[0].cache;
  EXPECT_TRUE(contains(message_of([&] { tqai::append(wrong); }), "comes twice"));
  auto twice = pointers();
  twice[1] = twice[0];
  EXPECT_TRUE(contains(message_of([&] { (void)tqai::seal(twice); }), "comes twice"));
  const std::vector<SequenceLength> lengths = {{twice[0], 5}, {twice[2], 153}};
  EXPECT_TRUE(contains(message_of([&] { tqai::crop(lengths); }), "sequence 1 of 2: crop to 153"));
  const std::vector<SequenceLength> repeated = {{twice[0], 5}, {twice[0], 6}};
  EXPECT_TRUE(contains(message_of([&] { tqai::crop(repeated); }), "comes twice"));
  EXPECT_EQ(bytes(), before);
}

TEST_F(SequencesAtFaults, TensorsOfAllSequencesAreChecked) {
  const auto before = bytes();
  const auto caches = pointers();
  const auto refused = [&](const std::vector<std::int64_t>& counts, std::int64_t tokens) {
    return message_of([&] {
      tqai::append(caches, counts, Tokens::slice(tokens_.keys, 0, tokens),
                   Tokens::slice(tokens_.values, 0, tokens));
    });
  };
  EXPECT_TRUE(contains(refused({1, 2}, 3), "2 counts for 3 caches"));
  EXPECT_TRUE(contains(refused({1, 2, 3}, 7), "needed: 1 row of 6"));
  EXPECT_TRUE(contains(refused({9, -2, 0}, 7), "sequence 0 of 3: its count = 9"));
  EXPECT_TRUE(contains(refused({3, -2, 6}, 7), "sequence 1 of 3: its count = -2"));
  constexpr auto kLeast = std::numeric_limits<std::int64_t>::min();
  const auto refused_with = [&](std::size_t axis, std::int64_t size, std::int64_t position_stride) {
    ConstTensor keys = Tokens::slice(tokens_.keys, 0, 3);
    ConstTensor values = Tokens::slice(tokens_.values, 0, 3);
    keys.shape[axis] = values.shape[axis] = size;
    const std::int64_t positions[3] = {0, 1, 2};
    return message_of([&] {
      tqai::append(caches, std::vector<std::int64_t>{1, 1, 1}, keys, values,
                   PositionTensor{positions, {1, 1, 3}, {0, 0, position_stride}});
    });
  };
  EXPECT_TRUE(contains(refused_with(1, kLeast, 1), "keys has a dimension of -9223372036854775808"));
  EXPECT_TRUE(contains(refused_with(2, kLeast, 1), "the number of tokens = -9223372036854775808"));
  EXPECT_TRUE(contains(refused_with(2, -(kLeast + 1), 1), "the number of tokens"));
  EXPECT_TRUE(contains(refused_with(2, 3, kLeast), "positions has 3 elements with stride"));
  EXPECT_EQ(bytes(), before);
  const Array queries({1, 2, 3, kDim}, 1.0F);
  Array output({1, 3, 2, kDim}, 7.0F);
  const std::vector<const KvCache*> read(caches.begin(), caches.end());
  const std::vector<std::int64_t> one_each = {1, 1, 1};
  AttendOptions masked;
  const std::uint8_t seen = 1;
  masked.mask = Mask{&seen, Mask::Kind::boolean, {1, 1, 1, 150}, {0, 0, 0, 0}};
  EXPECT_TRUE(contains(message_of([&] { tqai::attend(read, one_each, queries, output, masked); }),
                       "a mask"));
  EXPECT_TRUE(contains(message_of([&] {
                         Tensor overlapping = output;
                         overlapping.strides[1] = 0;
                         tqai::attend(read, one_each, queries, overlapping);
                       }),
                       "at one address"));
  EXPECT_EQ(output.data, Array(output.shape, 7.0F).data);
  const KvCache two_rows(geometry(kDim), 2);
  const KvCache* two = &two_rows;
  EXPECT_TRUE(contains(
      message_of([&] { tqai::attend({&two, 1}, std::vector<std::int64_t>{3}, queries, output); }),
      "2 rows"));
}

TEST_F(SequencesAtFaults, MemoryThatRunsOutChangesNoCache) {
  const auto copies = [&] {
    std::vector<std::unique_ptr<KvCache>> all;
    for (const auto& cache : caches_) all.push_back(std::make_unique<KvCache>(*cache));
    return all;
  };
  const auto kept = copies();
  const auto restore = [&] {
    for (std::size_t i = 0; i < kept.size(); ++i) *caches_[i] = *kept[i];
  };
  const auto before = bytes();
  const auto unchanged = [&] { EXPECT_EQ(bytes(), before); };
  const auto tokens = more(30);
  EXPECT_GT(test::fail_each(restore, [&] { tqai::append(tokens); }, unchanged), 0);
  EXPECT_EQ(caches_[2]->tokens(), 182);
  restore();
  const auto caches = pointers();
  EXPECT_GT(test::fail_each(restore, [&] { (void)tqai::seal(caches); }, unchanged), 0);
  EXPECT_EQ(caches_[2]->packed_tokens(0), 128);
  restore();
  const std::vector<SequenceLength> lengths = {{caches[0], 149}, {caches[1], 2}, {caches[2], 100}};
  EXPECT_GT(test::fail_each(restore, [&] { tqai::crop(lengths); }, unchanged), 0);
  EXPECT_EQ(caches_[1]->tokens(), 2);
  restore();
  const Array queries({1, 2, 3, kDim}, 1.0F);
  Array output({1, 3, 2, kDim}, 7.0F);
  const std::vector<const KvCache*> read(caches.begin(), caches.end());
  const std::vector<std::int64_t> one_each = {1, 1, 1};
  EXPECT_GT(test::fail_each([] {}, [&] { tqai::attend(read, one_each, queries, output); },
                            [&] { EXPECT_EQ(output.data, Array(output.shape, 7.0F).data); }),
            0);
}

// UBSan: they are not multiplied.
TEST(Sequences, StridesOfSingleElementsAreNeverUsed) {
  constexpr std::int64_t kLargest = std::numeric_limits<std::int64_t>::max();
  auto engine = test::random_engine(323);
  const Array numbers({1, 1, 1, 8}, engine);
  const auto odd = [](auto tensor) {
    tensor.strides = {kLargest, kLargest, kLargest, 1};
    return tensor;
  };
  const auto all = [&](const auto& strides) {
    KvCache one(geometry(8, 4, 4, 1));
    KvCache none(geometry(8, 4, 4, 1));
    const ConstTensor tokens = strides(ConstTensor(numbers));
    one.append(tokens, tokens);
    KvCache* const written[] = {&one, &none};
    const KvCache* const read[] = {&one, &none};
    const std::int64_t counts[] = {1, 0};
    tqai::append(written, counts, tokens, tokens);
    Array output({1, 1, 1, 8});
    tqai::attend(read, counts, tokens, strides(Tensor(output)));
    EXPECT_EQ(one.tokens(), 2);
    EXPECT_EQ(none.tokens(), 0);
    return std::pair(one.serialize(), output.data);
  };
  EXPECT_EQ(all(odd), all([](auto tensor) { return tensor; }));
}

TEST(Sequences, NoneIsNothing) {
  tqai::append(std::span<const SequenceTokens>{});
  tqai::attend(std::span<const SequenceQueries>{});
  tqai::crop({});
  EXPECT_EQ(tqai::seal({}), 0);
}

}  // namespace
}  // namespace tqai
