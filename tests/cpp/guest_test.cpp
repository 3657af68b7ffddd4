// The library in an application's process: whatever that has told its processor, and forked or not.
#include <cstdlib>
#include <optional>
#include <tqai/cache.hpp>

#if defined(__unix__) || defined(__APPLE__)
#include <sys/wait.h>
#include <unistd.h>
#endif
#if defined(__SSE__)
#include <xmmintrin.h>
#endif

#include "cache_helpers.hpp"
#include "every_level.hpp"
#include "openmp.hpp"

namespace tqai {
namespace {

using test::Array;
using test::attend;
using test::gather;
using test::geometry;
using test::Tokens;

#if defined(__SSE__)

constexpr unsigned kFlushToZeroAndDenormalsAreZero = 0x8040U;

class Subnormals : public test::EveryLevel {
 protected:
  // Norms of about 2e-5 are subnormal in FP16, squares of their coordinates are in fp32.
  Subnormals() : small_(1, 2, 200, 64, engine_) {
    for (std::vector<float>* data : {&small_.keys.data, &small_.values.data}) {
      for (float& x : *data) x *= 3e-6F;
    }
    for (std::size_t i = 0; i < 64; ++i) small_.values.data[i * 64] *= 1e-36F;
  }
  void TearDown() override { _mm_setcsr(before_); }

  struct Results {
    std::vector<std::byte> bytes;
    std::vector<float> output;
    std::vector<float> values;
    bool operator==(const Results&) const = default;
  };
  Results results() const {
    CacheOptions options = geometry(64);
    options.level = GetParam();
    options.sink_tokens = 0;
    options.centering = Centering::none;
    KvCache cache(options);
    small_.append_to(cache, 0, 200);
    cache.seal();
    return {cache.serialize(), attend(cache, queries_).data, gather(cache, 0, 200).values.data};
  }

  const unsigned before_ = _mm_getcsr();
  std::mt19937_64 engine_ = test::random_engine(9);
  Tokens small_;
  Array queries_{{1, 4, 1, 64}, engine_};
};

TEST_P(Subnormals, CountWhateverTheApplicationHasTurnedOff) {
  const Results expected = results();
  _mm_setcsr(before_ | kFlushToZeroAndDenormalsAreZero);
  for (const int threads : {1, 2}) {
    const test::ThreadCount count(threads);
    EXPECT_TRUE(results() == expected) << threads << " threads";
    EXPECT_EQ(_mm_getcsr() & kFlushToZeroAndDenormalsAreZero, kFlushToZeroAndDenormalsAreZero);
  }
}

TQAI_AT_EVERY_LEVEL(Subnormals);

#endif

#if defined(_OPENMP) && (defined(__unix__) || defined(__APPLE__))

// A second thread in the child would wait for the parent's, which a fork does not copy.
TEST(Fork, AChildOfAProcessThatUsedThreadsComputesTheSame) {
  const test::ThreadCount two(2);
  std::mt19937_64 engine = test::random_engine(11);
  const Tokens tokens(1, 8, 4096, 128, engine);
  const Array queries({1, 32, 1, 128}, engine);
  KvCache cache(geometry(128, 4, 4, 8));
  tokens.append_to(cache, 0, 4096);
  cache.seal();
  const std::vector<float> expected = attend(cache, queries).data;

  const pid_t child = fork();
  ASSERT_GE(child, 0);
  if (child == 0) {
    alarm(60);
    KvCache again(geometry(128, 4, 4, 8));
    tokens.append_to(again, 0, 4096);
    again.seal();
    const bool same =
        attend(cache, queries).data == expected && attend(again, queries).data == expected;
    _exit(same ? 0 : 1);
  }
  int status = 0;
  ASSERT_EQ(waitpid(child, &status, 0), child);
  EXPECT_FALSE(WIFSIGNALED(status)) << "signal " << WTERMSIG(status);
  EXPECT_EQ(WEXITSTATUS(status), 0);
}

#endif

// A cache in static storage, used where all that was made after its holder is destroyed.
class Late {
 public:
  void hold() {
    options_ = geometry(64);
    options_.rope = test::rope_of(64);
    cache_.emplace(options_);
    tokens_.append_to(*cache_, 0, 100);
  }
  ~Late() {
    // What a destroyed map leaves is written over.
    const std::vector<std::vector<std::byte>> rubbish(1000,
                                                      std::vector<std::byte>(90, std::byte{0xFF}));
    tokens_.append_to(*cache_, 100, 100);
    cache_->seal();
    CacheOptions others = options_;
    others.seed = 5;
    others.rope->inv_freq.front() = 0.5F;
    KvCache other(others);
    tokens_.append_to(other, 0, 200);
    other.seal();
    const bool right = attend(other, queries_).data != attend(*cache_, queries_).data &&
                       other.memory().packed_tokens > 0 && rubbish.size() == 1000;
    std::_Exit(right ? 7 : 1);
  }

 private:
  std::mt19937_64 engine_ = test::random_engine(13);
  Tokens tokens_{1, 2, 200, 64, engine_};
  Array queries_{{1, 4, 1, 64}, engine_};
  CacheOptions options_;
  std::optional<KvCache> cache_;
};

TEST(StaticDestructorDeathTest, MayUseACache) {
  testing::FLAGS_gtest_death_test_style = "threadsafe";  // a process of its own, with no maps yet
  EXPECT_EXIT(
      {
        static Late late;
        late.hold();
        std::exit(0);
      },
      testing::ExitedWithCode(7), "");
}

}  // namespace
}  // namespace tqai
