// Threads by number, an application's own, and memory that stays: the same results, and all or
// nothing.
#include <atomic>
#include <functional>
#include <set>
#include <stdexcept>
#include <thread>
#include <tqai/cache.hpp>
#include <tqai/cpu.hpp>
#include <tqai/resources.hpp>

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
using Work = Resources::Work;

// As many threads as there is work, each for one piece.
void on_threads(std::int64_t count, const Work& work) {
  std::vector<std::thread> threads;
  for (std::int64_t i = 0; i < count; ++i) threads.emplace_back([&work, i] { work(i); });
  for (std::thread& thread : threads) thread.join();
}

void backwards(std::int64_t count, const Work& work) {
  for (std::int64_t i = count; i-- > 0;) work(i);
}

class ResourcesTest : public testing::Test {
 protected:
  static constexpr std::int64_t kTokens = 6000;  // enough work for several threads

  KvCache filled(const Resources& resources = {}) const {
    KvCache cache(options_);
    cache.append(tokens_.keys, tokens_.values, {}, resources);
    cache.seal(resources);
    return cache;
  }
  std::vector<float> outputs(const KvCache& cache, const Resources& resources = {}) const {
    std::vector<float> all;
    for (const Array* queries : {&one_query_, &many_queries_}) {
      Array output({1, queries->shape[2], queries->shape[1], 64});
      cache.attend(*queries, output, {}, resources);
      all.insert(all.end(), output.data.begin(), output.data.end());
    }
    return all;
  }

  CacheOptions options_ = geometry(64, 4, 2, 2);
  std::mt19937_64 engine_ = test::random_engine(310);
  Tokens tokens_{1, 2, kTokens, 64, engine_};
  Array one_query_{{1, 8, 1, 64}, engine_};
  Array many_queries_{{1, 8, 33, 64}, engine_};
  const KvCache expected_ = filled();
  const std::vector<std::byte> bytes_ = expected_.serialize();
  const std::vector<float> outputs_ = outputs(expected_);
};

TEST_F(ResourcesTest, AnyNumberOfThreadsGivesTheSame) {
  const test::ThreadCount openmp(1);
  for (const int threads : {1, 2, 3, 5}) {
    Resources resources;
    resources.threads = threads;
    const KvCache cache = filled(resources);
    EXPECT_EQ(cache.serialize(), bytes_) << threads << " threads";
    EXPECT_EQ(outputs(cache, resources), outputs_) << threads << " threads";
  }
}

TEST_F(ResourcesTest, AnApplicationsThreadsGiveTheSame) {
  const auto half_of_it = [](std::int64_t count, const Work& work) {
    for (std::int64_t i = 0; i < count / 2; ++i) work(i);
  };
  const auto none_of_it = [](std::int64_t, const Work&) {};
  for (const Resources::Executor& executor :
       {Resources::Executor(on_threads), Resources::Executor(backwards),
        Resources::Executor(half_of_it), Resources::Executor(none_of_it)}) {
    Resources resources;
    resources.threads = 3;
    resources.parallel_for = executor;
    const KvCache cache = filled(resources);
    EXPECT_EQ(cache.serialize(), bytes_);
    EXPECT_EQ(outputs(cache, resources), outputs_);
  }
}

TEST_F(ResourcesTest, AnExecutorIsHandedNoMoreThanItsThreadsAndOnlyWhatIsWorthIt) {
  std::set<std::int64_t> counts;
  Resources resources;
  resources.threads = 3;
  resources.parallel_for = [&counts](std::int64_t count, const Work& work) {
    counts.insert(count);
    on_threads(count, work);
  };
  (void)outputs(expected_, resources);
  EXPECT_EQ(*counts.rbegin(), 3);
  counts.clear();
  KvCache small(options_);
  small.append(Tokens::slice(tokens_.keys, 0, 10), Tokens::slice(tokens_.values, 0, 10), {},
               resources);
  Array output({1, 1, 8, 64});
  small.attend(one_query_, output, {}, resources);
  EXPECT_TRUE(counts.empty());
}

TEST_F(ResourcesTest, WhatAnExecutorThrowsComesOutAndChangesNothing) {
  KvCache cache(options_);
  cache.append(tokens_.keys, tokens_.values);
  const std::vector<std::byte> before = cache.serialize();
  // At each of its calls, before any work and after all of it.
  for (const bool late : {false, true}) {
    for (int fatal = 0; fatal < 3; ++fatal) {
      int calls = 0;
      Resources resources;
      resources.threads = 2;
      resources.parallel_for = [&](std::int64_t count, const Work& work) {
        const bool fails = calls++ == fatal;
        if (!fails || late) on_threads(count, work);
        if (fails) throw std::runtime_error("no thread to be had");
      };
      if (fatal < 2) {  // moments, and codes
        EXPECT_THROW(cache.seal(resources), std::runtime_error);
        EXPECT_EQ(cache.serialize(), before);
      }
      calls = 0;
      EXPECT_THROW((void)outputs(expected_, resources), std::runtime_error);
    }
  }
  cache.seal();
  EXPECT_EQ(cache.serialize(), bytes_);
}

TEST_F(ResourcesTest, MemoryThatRunsOutUnderAnExecutorChangesNothing) {
  Resources resources;
  resources.threads = 2;
  resources.parallel_for = backwards;
  const auto unsealed = [&] {
    KvCache cache(options_);
    cache.append(Tokens::slice(tokens_.keys, 0, 1400), Tokens::slice(tokens_.values, 0, 1400));
    return cache;
  };
  KvCache cache = unsealed();
  const std::vector<std::byte> before = cache.serialize();
  EXPECT_GT(test::fail_each([] {}, [&] { cache.seal(resources); },
                            [&] { EXPECT_EQ(cache.serialize(), before); }),
            0);
  KvCache expected = unsealed();
  expected.seal();
  EXPECT_EQ(cache.serialize(), expected.serialize());
}

TEST_F(ResourcesTest, AreChecked) {
  KvCache cache(options_);
  cache.append(tokens_.keys, tokens_.values);
  const std::vector<std::byte> before = cache.serialize();
  Array output({1, 1, 8, 64});
  const auto refused = [&](const Resources& resources) {
    const std::string message = message_of([&] { cache.seal(resources); });
    EXPECT_EQ(message,
              message_of([&] { cache.append(tokens_.keys, tokens_.values, {}, resources); }));
    EXPECT_EQ(message, message_of([&] { cache.attend(one_query_, output, {}, resources); }));
    EXPECT_EQ(cache.serialize(), before);
    return message;
  };
  Resources resources;
  for (const int threads : {-1, Resources::kMostThreads + 1}) {
    resources.threads = threads;
    EXPECT_TRUE(contains(refused(resources), "allowed: 1…1024"));
  }
  resources.threads = 0;
  resources.parallel_for = on_threads;
  EXPECT_TRUE(contains(refused(resources), "with an executor; say how many"));
}

TEST_F(ResourcesTest, AWorkspaceIsKeptFromCallToCall) {
  Workspace workspace;
  EXPECT_EQ(workspace.bytes(), 0U);
  Resources resources;
  resources.workspace = &workspace;
  for (const int threads : {1, 2}) {
    resources.threads = threads;
    const KvCache cache = filled(resources);
    EXPECT_EQ(cache.serialize(), bytes_);
    EXPECT_EQ(outputs(cache, resources), outputs_);
    const std::size_t held = workspace.bytes();
    EXPECT_GT(held, 0U);
    EXPECT_EQ(outputs(cache, resources), outputs_);
    EXPECT_EQ(workspace.bytes(), held);
  }
  Workspace other = std::move(workspace);
  EXPECT_EQ(workspace.bytes(), 0U);  // NOLINT: it says so of itself
  EXPECT_GT(other.bytes(), 0U);
  other.release();
  EXPECT_EQ(other.bytes(), 0U);
  other.reserve(1000);
  EXPECT_GE(other.bytes(), 1000U);
  resources.workspace = &other;
  EXPECT_EQ(outputs(expected_, resources), outputs_);
}

TEST_F(ResourcesTest, AWorkspaceIsRefusedToASecondCallAtTheSameTime) {
  Workspace workspace;
  Resources second;
  second.workspace = &workspace;
  Resources first = second;
  first.threads = 2;
  std::string message;
  first.parallel_for = [&](std::int64_t count, const Work& work) {
    message = message_of([&] { (void)outputs(expected_, second); });
    backwards(count, work);
  };
  EXPECT_EQ(outputs(expected_, first), outputs_);
  EXPECT_TRUE(contains(message, "in use by another call")) << message;
  EXPECT_EQ(outputs(expected_, second), outputs_);
}

TEST_F(ResourcesTest, AWorkspaceOutlivesAFailedAllocation) {
  Workspace workspace;
  Resources resources;
  resources.workspace = &workspace;
  std::vector<float> result;
  EXPECT_GT(test::fail_each([] {}, [&] { result = outputs(expected_, resources); }, [] {}), 0);
  EXPECT_EQ(result, outputs_);
}

// Whatever of a call's allocations is the first to be too much.
TEST_F(ResourcesTest, WhatIsMoreThanTheMemoryLimitIsRefusedWithNothingChanged) {
  KvCache cache(options_);
  cache.append(Tokens::slice(tokens_.keys, 0, 400), Tokens::slice(tokens_.values, 0, 400));
  const std::vector<std::byte> before = cache.serialize();
  const std::size_t held = allocated_bytes();
  int refused = 0;
  for (std::size_t more = 1; refused < 10000; more += 2000) {
    limit_memory(held + more);
    EXPECT_EQ(memory_limit(), held + more);
    try {
      cache.seal();
      break;
    } catch (const MemoryLimitError& error) {
      ++refused;
      EXPECT_TRUE(contains(error.what(), std::to_string(held + more))) << error.what();
    }
    ASSERT_EQ(allocated_bytes(), held);
    ASSERT_EQ(cache.serialize(), before);
  }
  limit_memory(1);  // less than is held: what is there stays, and may shrink
  EXPECT_GT(refused, 10);
  EXPECT_GT(cache.packed_tokens(0), 0);
  EXPECT_THROW(
      cache.append(Tokens::slice(tokens_.keys, 0, 400), Tokens::slice(tokens_.values, 0, 400)),
      MemoryLimitError);
  limit_memory(0);
  cache.append(Tokens::slice(tokens_.keys, 0, 400), Tokens::slice(tokens_.values, 0, 400));
  EXPECT_EQ(cache.tokens(), 800);
}

}  // namespace
}  // namespace tqai
