// Memory that runs out inside the C functions, at each allocation of each: what they return, what
// they leave, and that nothing is lost.
#include <tqai/c_api.h>

#include <algorithm>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <iterator>
#include <random>
#include <string>
#include <vector>

#include "failing_allocations.hpp"
#include "openmp.hpp"

namespace tqai {
namespace {

namespace fs = std::filesystem;
using test::fail_each;
using test::g_before_failure;
using test::g_living;

constexpr std::int64_t kHeads = 2;
constexpr std::int64_t kDim = 16;
constexpr std::int64_t kMost = 400;
using Cache = tqai_cache*;

tqai_tensor tensor(const std::vector<float>& data, std::int64_t batch, std::int64_t first,
                   std::int64_t tokens) {
  return {data.data() + first * kDim,
          TQAI_F32,
          {batch, kHeads, tokens, kDim},
          {0, kMost * kDim, kDim, 1}};
}

// A call that memory ran out in returns TQAI_NO_MEMORY and says so; any other, TQAI_OK.
void expect_status(tqai_status status, bool failed) {
  EXPECT_EQ(status, failed ? TQAI_NO_MEMORY : TQAI_OK) << tqai_last_error();
  if (failed) {
    EXPECT_STREQ(tqai_last_error(), "no memory left");
  }
}

class CApiAllocations : public testing::TestWithParam<bool> {
 protected:
  CApiAllocations() : data_(static_cast<std::size_t>(kHeads * kMost * kDim)) {
    std::uint32_t state = 1;
    for (float& x : data_) {
      state = state * 1664525U + 1013904223U;
      x = static_cast<float>(state >> 8) / 8388608.0F - 1.0F;
    }
    for (int i = 0; i < kDim / 2; ++i) frequencies_.push_back(1.0F / static_cast<float>(1 + i * i));
    for (std::int64_t i = 0; i < kMost; ++i) positions_.push_back(3 * i);
    tqai_cache_options_init(&options_, sizeof(options_));
    options_.batch = 2;
    options_.kv_heads = kHeads;
    options_.head_dim = kDim;
    options_.residual_window = 16;
    if (GetParam()) {
      options_.rotary_dim = kDim;
      options_.inv_freq = frequencies_.data();
      options_.centering = TQAI_CENTERING_ROPE;
    }
    folder_ = fs::temp_directory_path() /
              ("tqai_c_allocations_" + std::to_string(std::random_device()()));
    fs::create_directory(folder_);
    path_ = (folder_ / "caches.safetensors").string();
  }
  ~CApiAllocations() override { fs::remove_all(folder_); }

  Cache made() const {
    Cache cache = nullptr;
    EXPECT_EQ(tqai_cache_create(&options_, &cache), TQAI_OK);
    return cache;
  }
  tqai_status append(Cache cache, std::int64_t first, std::int64_t tokens) const {
    const tqai_tensor both = tensor(data_, 2, first, tokens);
    const tqai_positions at = {positions_.data() + first, {1, 1, tokens}, {0, 0, 1}};
    return tqai_cache_append(cache, &both, &both, GetParam() ? &at : nullptr);
  }
  // Two tiles in each row, and 30 tokens that are exact.
  Cache filled() const {
    Cache cache = made();
    EXPECT_EQ(append(cache, 0, 160), TQAI_OK);
    EXPECT_EQ(tqai_cache_seal(cache, nullptr), TQAI_OK);
    EXPECT_EQ(append(cache, 160, 30), TQAI_OK);
    return cache;
  }
  static std::vector<std::byte> bytes_of(const tqai_cache* cache) {
    std::size_t size = 0;
    EXPECT_EQ(tqai_cache_serialized_bytes(cache, &size), TQAI_OK);
    std::vector<std::byte> bytes(size);
    EXPECT_EQ(tqai_cache_serialize(cache, bytes.data(), size), TQAI_OK);
    return bytes;
  }

  // `call` on a cache that `make` gives is all or nothing.
  template <typename Make, typename Call>
  void expect_all_or_nothing(const char* name, const Make& make, const Call& call) {
    SCOPED_TRACE(name);
    Cache untroubled = make();
    const std::vector<std::byte> before = bytes_of(untroubled);
    EXPECT_EQ(call(untroubled), TQAI_OK) << tqai_last_error();
    const std::vector<std::byte> after = bytes_of(untroubled);
    tqai_cache_destroy(untroubled);
    const long living = g_living;
    Cache cache = nullptr;
    const auto end = [&cache] {
      tqai_cache_destroy(cache);
      cache = nullptr;
    };
    tqai_status status = TQAI_OK;
    EXPECT_GT(fail_each_status([&] { end(), cache = make(); }, [&] { return status = call(cache); },
                               [&] { EXPECT_TRUE(bytes_of(cache) == before); }),
              0);
    EXPECT_TRUE(bytes_of(cache) == after);
    end();
    EXPECT_EQ(g_living, living) << "something was lost";
  }

  // As fail_each, for what returns a status.
  template <typename Prepare, typename Call, typename Check>
  static int fail_each_status(const Prepare& prepare, const Call& call, const Check& check) {
    return fail_each(
        prepare,
        [&] {
          const tqai_status status = call();
          const bool failed = g_before_failure < 0;
          g_before_failure = -1;
          expect_status(status, failed);
          if (failed) throw std::bad_alloc();
          g_before_failure = 0;  // as if it were still to come
        },
        check);
  }

  // A `make` that fails gives NULL and loses nothing.
  template <typename Handle, typename Make>
  void expect_made_or_null(const char* name, const Make& make, void (*destroy)(Handle*)) {
    SCOPED_TRACE(name);
    Handle* handle = nullptr;
    EXPECT_EQ(make(&handle), TQAI_OK) << tqai_last_error();  // what is made once for all stays
    destroy(handle);
    const long living = g_living;
    Handle* const garbage = reinterpret_cast<Handle*>(&handle);
    EXPECT_GT(fail_each_status([&] { handle = garbage; }, [&] { return make(&handle); },
                               [&] {
                                 EXPECT_EQ(handle, nullptr);
                                 EXPECT_EQ(g_living, living);
                               }),
              0);
    EXPECT_NE(handle, nullptr);
    destroy(handle);
    EXPECT_EQ(g_living, living) << "something was lost";
  }

  std::vector<char> file_bytes() const {
    std::ifstream file(path_, std::ios::binary);
    return {std::istreambuf_iterator<char>(file), {}};
  }

  const test::ThreadCount single_{1};
  std::vector<float> data_;
  std::vector<float> frequencies_;
  std::vector<std::int64_t> positions_;
  tqai_cache_options options_{};
  fs::path folder_;
  std::string path_;
};

TEST_P(CApiAllocations, WhatChangesACache) {
  const auto made = [this] { return this->made(); };
  const auto filled = [this] { return this->filled(); };
  const auto unsealed = [this] {
    Cache cache = this->made();
    EXPECT_EQ(append(cache, 0, 160), TQAI_OK);
    return cache;
  };
  expect_all_or_nothing("append", made, [&](Cache c) { return append(c, 0, 200); });
  expect_all_or_nothing("append that seals", unsealed, [&](Cache c) { return append(c, 160, 90); });
  expect_all_or_nothing("seal", unsealed, [](Cache c) { return tqai_cache_seal(c, nullptr); });
  for (const std::int64_t tokens : {170, 100, 3, 0}) {
    expect_all_or_nothing("crop", filled, [=](Cache c) { return tqai_cache_crop(c, tokens); });
  }
  const std::int64_t rows[] = {1, 0, 0};
  expect_all_or_nothing("select", filled, [&](Cache c) { return tqai_cache_select(c, rows, 3); });
  const std::int64_t counts[] = {7, 30};
  expect_all_or_nothing("set_padding", unsealed,
                        [&](Cache c) { return tqai_cache_set_padding(c, counts, 2); });
  expect_all_or_nothing("discard_before", filled,
                        [](Cache c) { return tqai_cache_discard_before(c, 100); });
}

TEST_P(CApiAllocations, WhatMakesHandles) {
  Cache cache = filled();
  expect_made_or_null<tqai_cache>(
      "create", [&](Cache* to) { return tqai_cache_create(&options_, to); }, tqai_cache_destroy);
  expect_made_or_null<tqai_cache>(
      "copy", [&](Cache* to) { return tqai_cache_copy(cache, to); }, tqai_cache_destroy);
  const std::vector<std::byte> bytes = bytes_of(cache);
  expect_made_or_null<tqai_cache>(
      "deserialize",
      [&](Cache* to) { return tqai_cache_deserialize(bytes.data(), bytes.size(), "scalar", to); },
      tqai_cache_destroy);
  ASSERT_EQ(tqai_save(path_.c_str(), &cache, 1, "{}"), TQAI_OK);
  expect_made_or_null<tqai_file>(
      "open", [&](tqai_file** to) { return tqai_file_open(path_.c_str(), to); }, tqai_file_destroy);
  tqai_file* file = nullptr;
  ASSERT_EQ(tqai_file_open(path_.c_str(), &file), TQAI_OK);
  tqai_load_options how;
  tqai_load_options_init(&how, sizeof(how));
  for (const int mapped : {0, 1}) {
    how.mapped = mapped;
    expect_made_or_null<tqai_cache>(
        "load", [&](Cache* to) { return tqai_file_load(file, 0, &how, to); }, tqai_cache_destroy);
  }
  std::int32_t holds = -1;
  EXPECT_GT(fail_each_status([&] { holds = -1; },
                             [&] { return tqai_file_holds(file, 123456789, &holds); },
                             [&] { EXPECT_EQ(holds, -1); }),
            0);
  EXPECT_EQ(holds, 0);
  tqai_file_destroy(file);
  tqai_cache_destroy(cache);
  for (const int unbiased : {0, 1}) {
    tqai_quantizer_options quantizer;
    tqai_quantizer_options_init(&quantizer, sizeof(quantizer));
    quantizer.head_dim = 24;
    quantizer.unbiased = unbiased;
    expect_made_or_null<tqai_quantizer>(
        "quantizer", [&](tqai_quantizer** to) { return tqai_quantizer_create(&quantizer, to); },
        tqai_quantizer_destroy);
  }
}

TEST_P(CApiAllocations, KeyBases) {
  tqai_key_moments* moments = nullptr;
  expect_made_or_null<tqai_key_moments>(
      "moments", [&](tqai_key_moments** to) { return tqai_key_moments_create(&options_, to); },
      tqai_key_moments_destroy);
  ASSERT_EQ(tqai_key_moments_create(&options_, &moments), TQAI_OK);
  constexpr std::size_t kTokens = 40;
  for (int head = 0; head < kHeads; ++head) {
    // A failed call has added nothing: the basis of both is the same, below.
    EXPECT_GE(fail_each_status([] {},
                               [&] {
                                 return tqai_key_moments_add_keys(moments, head, data_.data(),
                                                                  kTokens, nullptr, 0);
                               },
                               [] {}),
              0);
    EXPECT_GE(fail_each_status([] {},
                               [&] {
                                 return tqai_key_moments_add_queries(
                                     moments, head, data_.data() + 100, kTokens, nullptr, 0);
                               },
                               [] {}),
              0);
  }
  tqai_key_moments* untroubled = nullptr;
  ASSERT_EQ(tqai_key_moments_create(&options_, &untroubled), TQAI_OK);
  for (int head = 0; head < kHeads; ++head) {
    ASSERT_EQ(tqai_key_moments_add_keys(untroubled, head, data_.data(), kTokens, nullptr, 0),
              TQAI_OK);
    ASSERT_EQ(
        tqai_key_moments_add_queries(untroubled, head, data_.data() + 100, kTokens, nullptr, 0),
        TQAI_OK);
  }
  std::uint64_t ids[2] = {0, 1};
  tqai_key_basis* basis = nullptr;
  for (int i = 0; i < 2; ++i) {
    tqai_key_basis_destroy(basis);
    ASSERT_EQ(tqai_key_basis_learn(i == 0 ? moments : untroubled, 4, 64, &basis), TQAI_OK);
    ASSERT_EQ(tqai_key_basis_id(basis, &ids[i]), TQAI_OK);
  }
  EXPECT_EQ(ids[0], ids[1]);
  expect_made_or_null<tqai_key_basis>(
      "learn", [&](tqai_key_basis** to) { return tqai_key_basis_learn(moments, 4, 64, to); },
      tqai_key_basis_destroy);
  std::size_t size = 0;
  ASSERT_EQ(tqai_key_basis_serialized_bytes(basis, &size), TQAI_OK);
  std::vector<std::byte> bytes(size);
  EXPECT_GT(fail_each_status(
                [] {}, [&] { return tqai_key_basis_serialize(basis, bytes.data(), size); }, [] {}),
            0);
  expect_made_or_null<tqai_key_basis>(
      "basis",
      [&](tqai_key_basis** to) { return tqai_key_basis_deserialize(bytes.data(), size, to); },
      tqai_key_basis_destroy);

  options_.key_basis = basis;
  Cache cache = filled();
  expect_all_or_nothing(
      "append", [&] { return filled(); }, [&](Cache to) { return append(to, 0, 70); });
  const auto unsealed = [&] {
    Cache whole = made();
    EXPECT_EQ(append(whole, 0, 160), TQAI_OK);
    return whole;
  };
  expect_all_or_nothing("seal", unsealed, [](Cache to) { return tqai_cache_seal(to, nullptr); });
  const std::vector<std::byte> held = bytes_of(cache);
  expect_made_or_null<tqai_cache>(
      "deserialize_with",
      [&](Cache* to) {
        return tqai_cache_deserialize_with(held.data(), held.size(), nullptr, &basis, 1, to);
      },
      tqai_cache_destroy);
  tqai_cache_destroy(cache);
  tqai_key_basis_destroy(basis);
  tqai_key_moments_destroy(moments);
  tqai_key_moments_destroy(untroubled);
}

// What is kept for the process is made whole, or again at the next call.
TEST_P(CApiAllocations, Codebooks) {
  const std::int32_t dim = GetParam() ? 29 : 31;  // that nothing else uses
  const tqai_codebook* codebook = nullptr;
  EXPECT_GT(
      fail_each_status([] {}, [&] { return tqai_codebook_get(dim, 3, TQAI_GRID_INT8, &codebook); },
                       [&] { EXPECT_EQ(codebook, nullptr); }),
      0);
  const float* centroids = nullptr;
  std::size_t count = 0;
  ASSERT_EQ(tqai_codebook_centroids(codebook, &centroids, &count), TQAI_OK);
  EXPECT_EQ(count, 8U);
  EXPECT_TRUE(std::is_sorted(centroids, centroids + count));
}

// The file is there as it was, or as it is to be, and nothing beside it; no descriptor stays open.
TEST_P(CApiAllocations, Save) {
  Cache caches[] = {filled(), made()};
  ASSERT_EQ(tqai_save(path_.c_str(), caches, 1, R"({"old": 1})"), TQAI_OK);
  const std::vector<char> before = file_bytes();
  ASSERT_EQ(tqai_save(path_.c_str(), caches, 2, R"({"new": 1})"), TQAI_OK);
  const std::vector<char> after = file_bytes();
  const auto open_files = [] {
    return fs::exists("/proc/self/fd") ? std::distance(fs::directory_iterator("/proc/self/fd"), {})
                                       : std::ptrdiff_t{0};
  };
  const std::ptrdiff_t opened = open_files();
  const long living = g_living;
  EXPECT_GT(fail_each_status(
                [&] { ASSERT_EQ(tqai_save(path_.c_str(), caches, 1, R"({"old": 1})"), TQAI_OK); },
                [&] { return tqai_save(path_.c_str(), caches, 2, R"({"new": 1})"); },
                [&] {
                  EXPECT_TRUE(file_bytes() == before);
                  EXPECT_EQ(std::distance(fs::directory_iterator(folder_), {}), 1);
                  EXPECT_EQ(open_files(), opened);
                  EXPECT_EQ(g_living, living);
                }),
            0);
  EXPECT_TRUE(file_bytes() == after);
  EXPECT_EQ(g_living, living);
  for (Cache cache : caches) tqai_cache_destroy(cache);
}

TEST_P(CApiAllocations, WhatReads) {
  Cache cache = filled();
  const std::vector<float> nothing(static_cast<std::size_t>(2 * kHeads * kMost * kDim), 7.0F);
  std::vector<float> keys = nothing;
  std::vector<float> values = nothing;
  const auto output = [](std::vector<float>& data, std::int64_t second, std::int64_t third) {
    return tqai_output{data.data(),
                       TQAI_F32,
                       {2, second, third, kDim},
                       {second * third * kDim, third * kDim, kDim, 1}};
  };
  const tqai_output to_keys = output(keys, kHeads, 190);
  const tqai_output to_values = output(values, kHeads, 190);
  const long living = g_living;
  const auto is_untouched = [&] {
    EXPECT_EQ(keys, nothing);
    EXPECT_EQ(values, nothing);
    EXPECT_EQ(g_living, living);
  };
  EXPECT_GT(
      fail_each_status([] {}, [&] { return tqai_cache_gather(cache, 0, &to_keys, &to_values); },
                       is_untouched),
      0);
  EXPECT_NE(keys, nothing);
  keys = nothing;
  values = nothing;
  const tqai_tensor queries = tensor(data_, 2, 0, 3);
  const tqai_output attended = output(values, 3, kHeads);
  EXPECT_GT(fail_each_status([] {},
                             [&] { return tqai_cache_attend(cache, &queries, &attended, nullptr); },
                             is_untouched),
            0);
  EXPECT_NE(values, nothing);

  const std::vector<std::byte> expected = bytes_of(cache);
  std::vector<std::byte> bytes(expected.size());
  EXPECT_GT(fail_each_status(
                [] {}, [&] { return tqai_cache_serialize(cache, bytes.data(), bytes.size()); },
                [&] { EXPECT_EQ(g_living, living + 2); }),  // these two lists of bytes
            0);
  EXPECT_TRUE(bytes == expected);
  tqai_memory memory;
  EXPECT_GT(fail_each_status([&] { tqai_memory_init(&memory, sizeof(memory)); },
                             [&] { return tqai_cache_get_memory(cache, &memory); },
                             [&] { EXPECT_EQ(memory.total_bytes, 0U); }),
            0);
  EXPECT_GT(memory.total_bytes, 0U);
  tqai_cache_destroy(cache);
}

// The message of an error takes memory too: then there is none left, and no other error is named.
TEST_P(CApiAllocations, Refusals) {
  Cache cache = filled();
  const std::vector<std::byte> before = bytes_of(cache);
  const long living = g_living;
  int without_memory = 0;
  for (int n = 0;; ++n) {
    g_before_failure = n;
    const tqai_status status = tqai_cache_crop(cache, 10'000'000);
    const bool failed = g_before_failure < 0;
    g_before_failure = -1;
    EXPECT_EQ(status, failed ? TQAI_NO_MEMORY : TQAI_VALUE_ERROR);
    if (!failed) break;
    ++without_memory;
    EXPECT_EQ(g_living, living);
  }
  EXPECT_GT(without_memory, 0);
  EXPECT_TRUE(bytes_of(cache) == before);
  tqai_cache_destroy(cache);
}

INSTANTIATE_TEST_SUITE_P(, CApiAllocations, testing::Bool(),
                         [](const auto& setting) { return setting.param ? "Rope" : "Plain"; });

}  // namespace
}  // namespace tqai
