// What a thread's stack must have: musl's threads have 128 KB.
#include <filesystem>
#include <random>
#include <tqai/cache.hpp>
#include <tqai/codebook.hpp>
#include <tqai/files.hpp>
#include <tqai/quantizer.hpp>

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
constexpr int kDim = 576;

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

struct Work {
  void (*use)(Job&);
  Job* job;
};

void* run(void* work) {
  const auto [use, job] = *static_cast<Work*>(work);
  use(*job);
  return nullptr;
}

void run_in_a_small_thread(Work work) {
  pthread_attr_t attributes;
  ASSERT_EQ(pthread_attr_init(&attributes), 0);
  ASSERT_EQ(pthread_attr_setstacksize(&attributes, kStackBytes), 0);
  pthread_t thread;
  ASSERT_EQ(pthread_create(&thread, &attributes, run, &work), 0);
  ASSERT_EQ(pthread_join(thread, nullptr), 0);
  pthread_attr_destroy(&attributes);
}

// All that takes memory of its own beside a cache: what is made once, bytes, files, single vectors.
void use_the_rest(Job& job) {
  const test::ThreadCount single(1);
  for (const int bits : {4, 8}) {
    for (const Grid grid : {Grid::exact, Grid::int8}) (void)Codebook(kDim, bits, grid);
  }
  CacheOptions options = geometry(kDim, 3, 8, 1);
  options.level = job.level;
  options.rotation = RotationKind::haar;
  KvCache cache(options);
  job.tokens->append_to(cache, 0, 300);
  cache.seal();
  cache.discard_before(100);
  cache.crop(250);
  const KvCache* layers[] = {&cache};
  const auto path = std::filesystem::temp_directory_path() /
                    ("tqai_stack_" + std::to_string(std::random_device()()));
  save_caches(path, layers);
  for (const bool mapped : {false, true}) {
    LoadOptions how;
    how.mapped = mapped;
    how.level = job.level;
    const std::vector<std::byte> bytes = load_caches(path, how).front().serialize();
    EXPECT_EQ(KvCache::deserialize(bytes).serialize(), cache.serialize());
  }
  std::filesystem::remove(path);
  QuantizerOptions plain;
  plain.head_dim = kDim;
  ProdQuantizerOptions unbiased;
  unbiased.head_dim = kDim;
  const Quantizer quantizer(plain);
  const ProdQuantizer prod(unbiased);
  for (const VectorQuantizer* each : {static_cast<const VectorQuantizer*>(&quantizer),
                                      static_cast<const VectorQuantizer*>(&prod)}) {
    std::vector<std::uint8_t> codes(3 * each->code_bytes());
    std::vector<std::uint16_t> norms(3 * static_cast<std::size_t>(each->norm_count()));
    std::vector<float> back(3 * kDim);
    each->encode(job.tokens->keys.data.data(), 3, codes.data(), norms.data());
    each->decode(codes.data(), norms.data(), 3, back.data());
    job.output.insert(job.output.end(), back.begin(), back.end());
    each->inner_products(back.data(), 3, codes.data(), norms.data(), 3, back.data());
    job.output.insert(job.output.end(), back.begin(), back.begin() + 9);
  }
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
    run_in_a_small_thread({use_cache, &there});
    EXPECT_EQ(there.output, here.output);
  }
  Job here{GetParam(), DType::f32, &tokens, {}};
  use_the_rest(here);
  Job there{GetParam(), DType::f32, &tokens, {}};
  run_in_a_small_thread({use_the_rest, &there});
  EXPECT_EQ(there.output, here.output);
}

TQAI_AT_EVERY_LEVEL(Stack);

}  // namespace
}  // namespace tqai

#endif
