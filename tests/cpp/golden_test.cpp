// Bytes written once and for all (tests/golden): what they mean must never change, on any
// processor.
#include <cstdint>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <iterator>
#include <tqai/cache.hpp>

#include "cache_helpers.hpp"

namespace tqai {
namespace {

using test::gather;
using test::Gathered;

std::vector<std::byte> golden(const std::string& name) {
  std::ifstream file(std::filesystem::path(TQAI_GOLDEN) / name, std::ios::binary);
  EXPECT_TRUE(file.is_open()) << name;
  std::vector<char> bytes{std::istreambuf_iterator<char>(file), {}};
  const auto all = std::as_bytes(std::span(bytes));
  return {all.begin(), all.end()};
}

template <typename T>
std::vector<T> golden_numbers(const std::string& name) {
  const std::vector<std::byte> bytes = golden(name);
  std::vector<T> numbers(bytes.size() / sizeof(T));
  std::memcpy(numbers.data(), bytes.data(), numbers.size() * sizeof(T));
  return numbers;
}

// `tokens`: keys [batch, kv_heads, tokens, head_dim], then values, as FP16.
void expect_tokens(const KvCache& cache, const std::vector<std::uint16_t>& tokens) {
  const Gathered all = gather(cache, 0, cache.tokens());
  ASSERT_EQ(tokens.size(), all.keys.data.size() + all.values.data.size());
  std::size_t i = 0;
  for (const auto* array : {&all.keys, &all.values}) {
    for (const float value : array->data) {
      ASSERT_NEAR(value, from_half(tokens[i]), 2e-3F * (1.0F + std::abs(value))) << i;
      ++i;
    }
  }
}

class GoldenCache : public testing::TestWithParam<int> {};

TEST_P(GoldenCache, MeansWhatItMeant) {
  const int version = GetParam();
  // The third is the second, written anew.
  const std::string same = version == 1 ? "cache_1" : "cache_2";
  const auto tokens = golden_numbers<std::uint16_t>(same + ".tokens");
  const KvCache cache = KvCache::deserialize(golden("cache_" + std::to_string(version) + ".bin"));
  ASSERT_GT(cache.packed_tokens(0), 0);
  expect_tokens(cache, tokens);
  expect_tokens(KvCache::deserialize(cache.serialize()), tokens);
}

INSTANTIATE_TEST_SUITE_P(Versions, GoldenCache, testing::Values(1, 2, 3));

TEST(Golden, TheNewestCacheIsWrittenAlike) {
  const auto bytes = golden("cache_3.bin");
  EXPECT_EQ(KvCache::deserialize(bytes).serialize(), bytes);
}

}  // namespace
}  // namespace tqai
