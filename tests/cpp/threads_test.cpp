// Results do not depend on the number of threads, and caches may be used side by side.
#include <atomic>
#include <thread>
#include <tqai/cache.hpp>
#include <tqai/cpu.hpp>

#include "cache_helpers.hpp"
#include "openmp.hpp"

namespace tqai {
namespace {

using test::Array;
using test::attend;
using test::gather;
using test::geometry;
using test::Tokens;

class Threads : public testing::Test {
 protected:
  static constexpr std::int64_t kTokens = 6000;  // enough work for several threads, in parts

  Threads() {
    options_.rope = Rope{{}, Rope::Layout::half_split, 64};
    for (int f = 0; f < 32; ++f) {
      options_.rope->inv_freq.push_back(std::pow(1000.0F, -static_cast<float>(f) / 32.0F));
    }
  }

  KvCache filled() const {
    KvCache cache(options_);
    tokens_.append_to(cache, 0, kTokens);
    cache.seal();
    return cache;
  }

  CacheOptions options_ = geometry(64, 4, 4, 2);
  std::mt19937_64 engine_ = test::random_engine(42);
  Tokens tokens_{1, 2, kTokens, 64, engine_};
  Array one_query_{{1, 8, 1, 64}, engine_};
  Array many_queries_{{1, 8, 33, 64}, engine_};
};

#ifdef _OPENMP
TEST_F(Threads, AreSaid) {
  const test::ThreadCount count(3);
#ifdef _OPENMP
  EXPECT_EQ(openmp_threads(), 3);
#else
  EXPECT_EQ(openmp_threads(), 0);
#endif
}

TEST_F(Threads, DoNotChangeResults) {
  const test::ThreadCount single(1);
  const KvCache expected = filled();
  const std::vector<std::byte> bytes = expected.serialize();
  const std::vector<float> one = attend(expected, one_query_).data;
  const std::vector<float> many = attend(expected, many_queries_).data;
  const std::vector<float> keys = gather(expected, 0, kTokens).keys.data;
  for (const int threads : {2, 3, 5}) {
    const test::ThreadCount count(threads);
    const KvCache cache = filled();
    EXPECT_EQ(cache.serialize(), bytes) << threads << " threads";
    EXPECT_EQ(attend(cache, one_query_).data, one) << threads << " threads";
    EXPECT_EQ(attend(cache, many_queries_).data, many) << threads << " threads";
    EXPECT_EQ(gather(cache, 0, kTokens).keys.data, keys) << threads << " threads";
  }
}
#endif

// Each thread has a copy that shares the tiles, changes it and drops it, while all read one cache.
TEST_F(Threads, UseCopiesAndReadOneCacheSideBySide) {
  const std::size_t before = allocated_bytes();
  {
    const KvCache shared = filled();
    const std::vector<float> expected = attend(shared, one_query_).data;
    KvCache changed = shared;
    changed.crop(4100);
    tokens_.append_to(changed, 0, 200);
    const std::vector<float> expected_of_changed = attend(changed, one_query_).data;
    std::atomic<int> differences = 0;
    std::vector<std::thread> threads;
    for (int thread = 0; thread < 4; ++thread) {
      threads.emplace_back([&] {
        for (int turn = 0; turn < 4; ++turn) {
          KvCache own = shared;
          own.crop(4100);
          tokens_.append_to(own, 0, 200);
          differences += attend(own, one_query_).data != expected_of_changed ? 1 : 0;
          differences += attend(shared, one_query_).data != expected ? 1 : 0;
          differences += KvCache::deserialize(own.serialize()).tokens() != 4300 ? 1 : 0;
          // Tables and codebooks of a geometry that no cache has used yet.
          CacheOptions other = options_;
          other.seed = static_cast<std::uint64_t>(turn);
          KvCache fresh(other);
          tokens_.append_to(fresh, 0, 300);
          fresh.seal();
        }
      });
    }
    for (std::thread& thread : threads) thread.join();
    EXPECT_EQ(differences, 0);
  }
  EXPECT_EQ(allocated_bytes(), before);
}

}  // namespace
}  // namespace tqai
