// What a thread's stack must have: musl's threads have 128 KB.
#include <tqai/cache.hpp>

#include "cache_helpers.hpp"
#include "every_level.hpp"
#include "openmp.hpp"

#if defined(__unix__) || defined(__APPLE__)

#include <pthread.h>

#if defined(__SANITIZE_ADDRESS__) || defined(__SANITIZE_THREAD__)
#define TQAI_TEST_LARGE_FRAMES 1  // sanitizers put more on it
#elif defined(__has_feature)
#if __has_feature(address_sanitizer) || __has_feature(thread_sanitizer)
#define TQAI_TEST_LARGE_FRAMES 1
#endif
#endif

namespace tqai {
namespace {

using test::Array;
using test::geometry;
using test::Tokens;

constexpr std::size_t kStackBytes = std::size_t{128} << 10;
constexpr int kDim = 512;

struct Job {
  Level level;
  DType dtype;
  const Tokens* tokens;
  std::vector<float> output;
};

// Sealing with centres of positions that are not consecutive, attention to all kinds of tokens, and
// reading them back: what takes most.
void use_cache(Job& job) {
  const test::ThreadCount single(1);
  CacheOptions options = geometry(kDim, 4, 4, 1);
  options.level = job.level;
  options.rope = test::rope_of(kDim);
  options.centering = Centering::rope;
  options.dtype = job.dtype;
  KvCache cache(options);
  const std::int64_t count = job.tokens->keys.shape[2];
  std::vector<std::int64_t> positions;
  for (std::int64_t t = 0; t < count; ++t) positions.push_back(3 * t);
  std::vector<std::uint16_t> keys(job.tokens->keys.data.size());
  std::vector<std::uint16_t> values(keys.size());
  ConstTensor key = job.tokens->keys;
  ConstTensor value = job.tokens->values;
  if (job.dtype != DType::f32) {
    convert_from_float(job.tokens->keys.data.data(), keys.size(), job.dtype, keys.data());
    convert_from_float(job.tokens->values.data.data(), keys.size(), job.dtype, values.data());
    key.data = keys.data();
    value.data = values.data();
    key.dtype = value.dtype = job.dtype;
  }
  cache.append(key, value, PositionTensor{positions.data(), {1, 1, count}, {0, 0, 1}});
  cache.seal();
  const Array queries({1, 8, 1, kDim}, 1.0F);
  Array output({1, 1, 8, kDim});
  cache.attend(queries, output);
  job.output = output.data;
  (void)test::gather(cache, 0, count);
}

void* run(void* job) {
  use_cache(*static_cast<Job*>(job));
  return nullptr;
}

class Stack : public test::EveryLevel {};

TEST_P(Stack, OfAThreadOf128KilobytesIsEnough) {
#ifdef TQAI_TEST_LARGE_FRAMES
  GTEST_SKIP() << "sanitizers put more on the stack";
#endif
  auto engine = test::random_engine(5);
  const Tokens tokens(1, 1, 300, kDim, engine);
  for (const DType dtype : {DType::f32, DType::bf16}) {
    Job here{GetParam(), dtype, &tokens, {}};
    use_cache(here);
    Job there{GetParam(), dtype, &tokens, {}};
    pthread_attr_t attributes;
    ASSERT_EQ(pthread_attr_init(&attributes), 0);
    ASSERT_EQ(pthread_attr_setstacksize(&attributes, kStackBytes), 0);
    pthread_t thread;
    ASSERT_EQ(pthread_create(&thread, &attributes, run, &there), 0);
    ASSERT_EQ(pthread_join(thread, nullptr), 0);
    pthread_attr_destroy(&attributes);
    EXPECT_EQ(there.output, here.output);
  }
}

TQAI_AT_EVERY_LEVEL(Stack);

}  // namespace
}  // namespace tqai

#endif
