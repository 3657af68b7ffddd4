// The library in an application's process: whatever that has told its processor, and forked or not.
#include <atomic>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <optional>
#include <tqai/cache.hpp>
#include <tqai/codebook.hpp>
#include <tqai/half.hpp>
#include <tqai/key_basis.hpp>
#include <tqai/quantizer.hpp>
#include <tqai/trellis.hpp>
#include <tuple>

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
#include "threads.hpp"

namespace tqai {
namespace {

using test::Array;
using test::attend;
using test::gather;
using test::geometry;
using test::Tokens;

#if defined(__SSE__)

struct Setting {
  const char* name;
  unsigned control;  // what MXCSR has instead of the usual
};

constexpr unsigned kUsual = 0x1F80;
constexpr Setting kSettings[] = {
    {"flush to zero, denormals are zero", kUsual | 0x8040},
    {"rounding up", kUsual | 0x4000},
    {"rounding to zero", kUsual | 0x6000},
    // feenableexcept(FE_INVALID | FE_DIVBYZERO | FE_OVERFLOW)
    {"traps", kUsual & ~0x0680U},
};

// Holds MXCSR while it lives.
class Control {
 public:
  explicit Control(unsigned control) { _mm_setcsr(control); }
  ~Control() { _mm_setcsr(before_); }
  Control(const Control&) = delete;
  Control& operator=(const Control&) = delete;

 private:
  const unsigned before_ = _mm_getcsr();
};

unsigned control_now() { return _mm_getcsr() & 0xFFC0U; }

class Arithmetic : public test::EveryLevel {
 protected:
  // Norms of about 2e-5 are subnormal in FP16, squares of their coordinates are in fp32; then
  // vectors of ordinary norms, of which sums are rounded.
  Arithmetic() : tokens_(1, 2, 300, 64, engine_) {
    for (std::vector<float>* data : {&tokens_.keys.data, &tokens_.values.data}) {
      for (std::size_t i = 0; i < data->size(); ++i) {
        if (i / 64 % 300 < 200) (*data)[i] *= 3e-6F;
      }
    }
    for (std::size_t i = 0; i < 64; ++i) tokens_.values.data[i * 64] *= 1e-36F;
    std::fill_n(tokens_.keys.at(0, 0, 30), 64, 0.0F);
    queries_.at(0, 1, 0)[3] = std::numeric_limits<float>::quiet_NaN();
  }

  struct Results {
    std::vector<std::byte> bytes;
    std::vector<float> output;
    std::vector<float> values;
  };
  Results results() const {
    CacheOptions options = geometry(64);
    options.level = GetParam();
    options.sink_tokens = 0;
    options.centering = Centering::none;
    KvCache cache(options);
    tokens_.append_to(cache, 0, 300);
    cache.seal();
    KvCache back = KvCache::deserialize(cache.serialize(), GetParam());
    AttendOptions how;
    how.soft_cap = 30.0F;
    Results all{back.serialize(), attend(cache, queries_).data, gather(cache, 0, 300).values.data};
    const auto capped = attend(back, queries_, how).data;
    all.output.insert(all.output.end(), capped.begin(), capped.end());
    return all;
  }
  static bool same_bits(const std::vector<float>& a, const std::vector<float>& b) {
    return a.size() == b.size() && std::memcmp(a.data(), b.data(), a.size() * sizeof(float)) == 0;
  }

  std::mt19937_64 engine_ = test::random_engine(9);
  Tokens tokens_;
  Array queries_{{1, 4, 1, 64}, engine_};
};

TEST_P(Arithmetic, IsTheUsualWhateverTheApplicationHasChosen) {
  const Results expected = results();
  for (const Setting& setting : kSettings) {
    SCOPED_TRACE(setting.name);
    for (const int threads : {1, 2}) {
      const test::ThreadCount count(threads);
      std::optional<Results> now;
      unsigned after = 0;
      {
        const Control control(setting.control);
        now = results();
        after = control_now();
      }
      EXPECT_TRUE(now->bytes == expected.bytes) << threads << " threads";
      EXPECT_TRUE(same_bits(now->output, expected.output)) << threads << " threads";
      EXPECT_TRUE(same_bits(now->values, expected.values)) << threads << " threads";
      EXPECT_EQ(after, setting.control) << "it is the application's";
    }
  }
}

TQAI_AT_EVERY_LEVEL(Arithmetic);

// What is made once and kept for all, and what works on single vectors.
TEST(ArithmeticOfVectors, IsTheUsualToo) {
  std::mt19937_64 engine = test::random_engine(3);
  Array vectors({1, 1, 20, 48}, engine);
  for (std::size_t i = 0; i < vectors.data.size(); i += 2) vectors.data[i] *= 1e-38F;
  std::fill_n(vectors.at(0, 0, 7), 48, 0.0F);
  const auto results = [&vectors] {
    std::vector<float> all;
    const auto add = [&all](std::span<const float> numbers) {
      all.insert(all.end(), numbers.begin(), numbers.end());
    };
    for (const int bits : {3, 8}) {
      for (const Grid grid : {Grid::exact, Grid::int8}) {
        add(Codebook(48, bits, grid).centroids());  // not codebook(), which remembers
      }
    }
    add(Rotation(48, RotationKind::haar, 5).matrix());
    Array back({1, 1, 20, 48});
    Array products({1, 1, 20, 20});
    Rotation(48, RotationKind::haar, 7).apply(vectors.data.data(), back.data.data(), 20);
    add(back.data);
    QuantizerOptions options;
    options.head_dim = 48;
    options.bits = 4;
    ProdQuantizerOptions unbiased;
    unbiased.head_dim = 48;
    unbiased.bits = 3;
    const Quantizer plain(options);
    const ProdQuantizer prod(unbiased);
    for (const VectorQuantizer* quantizer : {static_cast<const VectorQuantizer*>(&plain),
                                             static_cast<const VectorQuantizer*>(&prod)}) {
      std::vector<std::uint8_t> codes(20 * quantizer->code_bytes());
      std::vector<std::uint16_t> norms(20 * static_cast<std::size_t>(quantizer->norm_count()));
      quantizer->encode(vectors.data.data(), 20, codes.data(), norms.data());
      quantizer->decode(codes.data(), norms.data(), 20, back.data.data());
      quantizer->inner_products(vectors.data.data(), 20, codes.data(), norms.data(), 20,
                                products.data.data());
      for (const std::uint8_t code : codes) all.push_back(static_cast<float>(code));
      for (const std::uint16_t norm : norms) all.push_back(static_cast<float>(norm));
      add(back.data);
      add(products.data);
    }
    return all;
  };
  const std::vector<float> expected = results();
  for (const Setting& setting : kSettings) {
    std::vector<float> now;
    unsigned after = 0;
    {
      const Control control(setting.control);
      now = results();
      after = control_now();
    }
    ASSERT_EQ(now.size(), expected.size());
    EXPECT_EQ(std::memcmp(now.data(), expected.data(), now.size() * sizeof(float)), 0)
        << setting.name;
    EXPECT_EQ(after, setting.control) << setting.name;
  }
}

TEST(ArithmeticOfNumbers, IsTheUsualToo) {
  std::mt19937_64 engine = test::random_engine(18);
  std::vector<float> floats = test::random_normal(64, engine);
  for (std::size_t i = 0; i < 32; ++i) floats[i] *= 1e-6F;  // subnormal as FP16
  floats[0] = std::numeric_limits<float>::signaling_NaN();
  const auto results = [&] {
    std::vector<std::uint16_t> halves(floats.size());
    convert_from_float(floats.data(), floats.size(), DType::f16, halves.data());
    std::vector<float> back(floats.size());
    convert_to_float(halves.data(), DType::f16, halves.size(), back.data());
    back[0] = 0.0F;  // NaN equals nothing
    return std::tuple(halves, back, trellis(3).step(96), key_trellis(3).step(96));
  };
  const auto expected = results();
  for (const Setting& setting : kSettings) {
    std::optional<decltype(results())> now;
    {
      const Control control(setting.control);
      now = results();
    }
    EXPECT_TRUE(*now == expected) << setting.name;
  }
}

TEST(ArithmeticOfKeyBases, IsTheUsualToo) {
  constexpr int kDim = 32;
  constexpr std::int64_t kTokens = 100;
  std::mt19937_64 engine = test::random_engine(17);
  const Rope rope = test::rope_of(kDim);
  const std::vector<float> keys = test::random_normal(kTokens * kDim, engine);
  const std::vector<float> queries = test::random_normal(kTokens * kDim, engine);
  const std::vector<float> nan(kDim, std::numeric_limits<float>::quiet_NaN());
  std::vector<std::int64_t> positions;
  for (std::int64_t t = 0; t < kTokens; ++t) positions.push_back(7 * t);
  std::vector<double> prior(kDim * kDim);
  std::vector<double> bad(kDim * kDim);
  for (std::size_t i = 0; i < kDim; ++i) prior[i * kDim + i] = 1.0 / static_cast<double>(3 + i);
  bad[0] = std::numeric_limits<double>::quiet_NaN();
  struct Results {
    std::uint64_t id = 0;
    std::vector<double> moments;
    float ratio = 0.0F;  // of the basis that is read from bytes
    bool refused = false;
    bool operator==(const Results&) const = default;
  };
  const auto results = [&](const std::vector<std::byte>& bytes) {
    KeyMoments moments(1, kDim, rope);
    moments.add_keys(0, keys, positions);
    moments.add_queries(0, queries, positions);
    moments.add_prior(0, prior, prior, 30.0);
    const auto refuses = [](const auto& call) {
      try {
        call();
      } catch (const ValueError&) {
        return true;
      }
      return false;
    };
    Results all;
    all.id = KeyBasis::learn(moments, 4).id();
    all.moments = moments.keys_until(0, 5000);
    all.ratio = KeyBasis::deserialize(bytes).largest_ratio();
    all.refused = refuses([&] { moments.add_keys(0, nan); }) &&
                  refuses([&] { moments.add_queries(0, nan); }) &&
                  refuses([&] { moments.add_prior(0, bad, prior, 1.0); });
    return all;
  };
  KeyMoments plain(1, kDim);
  plain.add_keys(0, keys);
  plain.add_queries(0, queries);
  const std::vector<std::byte> bytes = KeyBasis::learn(plain, 4).serialize();
  const Results expected = results(bytes);
  EXPECT_TRUE(expected.refused);
  for (const Setting& setting : kSettings) {
    std::optional<Results> now;
    unsigned after = 0;
    {
      const Control control(setting.control);
      now = results(bytes);
      after = control_now();
    }
    EXPECT_TRUE(*now == expected) << setting.name;
    EXPECT_EQ(after, setting.control) << setting.name;
  }
}

#endif

#if defined(_OPENMP) && (defined(__unix__) || defined(__APPLE__))

// Whether a process forked now ends well within a minute by `work`, a bool.
template <typename Work>
testing::AssertionResult child_succeeds(const Work& work) {
  const pid_t child = fork();
  if (child < 0) return testing::AssertionFailure() << "no fork";
  if (child == 0) {
    alarm(60);
    _exit(work() ? 0 : 1);
  }
  int status = 0;
  if (waitpid(child, &status, 0) != child) return testing::AssertionFailure() << "no child";
  if (WIFSIGNALED(status)) return testing::AssertionFailure() << "signal " << WTERMSIG(status);
  return WEXITSTATUS(status) == 0 ? testing::AssertionSuccess() : testing::AssertionFailure();
}

// Exits with 7 where all is well.
[[noreturn]] void use_threads_and_fork() {
  const test::ThreadCount two(2);
  std::atomic<int> threads = 0;
#pragma omp parallel
  ++threads;
  const auto use = [] {
    std::mt19937_64 engine = test::random_engine(11);
    const Tokens tokens(1, 8, 1024, 128, engine);
    KvCache cache(geometry(128, 4, 4, 8));
    tokens.append_to(cache, 0, 1024);
    cache.seal();
    return attend(cache, Array({1, 32, 1, 128}, engine)).data;
  };
  const bool well = child_succeeds([&] {
    const std::vector<float> in_child = use();
    return static_cast<bool>(child_succeeds([&] { return use() == in_child; }));
  });
  std::_Exit(well && threads == 2 ? 7 : 1);
}

// The application's own threads are enough. In a process of its own, whose library has not been
// used yet.
TEST(ForkDeathTest, AChildOfAProcessWithThreadsOfItsOwnDoesNotWaitForThem) {
  testing::FLAGS_gtest_death_test_style = "threadsafe";
  EXPECT_EXIT(use_threads_and_fork(), testing::ExitedWithCode(7), "");
}

#ifdef __linux__
// A server that forks its workers before anything else runs.
TEST(ForkDeathTest, AChildOfAProcessWithoutThreadsHasThreads) {
  testing::FLAGS_gtest_death_test_style = "threadsafe";
  EXPECT_EXIT(
      {
        const test::ThreadCount three(3);
        const bool well = child_succeeds([] { return usable_threads() == 3; });
        std::_Exit(well && usable_threads() == 3 ? 7 : 1);
      },
      testing::ExitedWithCode(7), "");
}
#endif

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

  EXPECT_TRUE(child_succeeds([&] {
    KvCache again(geometry(128, 4, 4, 8));
    tokens.append_to(again, 0, 4096);
    again.seal();
    return attend(cache, queries).data == expected && attend(again, queries).data == expected;
  }));
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
