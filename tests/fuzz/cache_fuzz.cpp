// Bytes as a cache, and what an application may do with it then.
//
// An input is a cache's bytes, up to kMostChoices bytes that choose operations, and how many those
// are.
#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <span>
#include <tqai/cache.hpp>

#include "any_operations.hpp"
#include "small_caches.hpp"

namespace {

constexpr std::size_t kMostChoices = 25;

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  std::span<const std::uint8_t> input(data, size);
  if (input.empty()) return 0;
  const std::size_t count =
      std::min<std::size_t>(input.back() % (kMostChoices + 1), input.size() - 1);
  input = input.first(input.size() - 1);
  const auto bytes = std::as_bytes(input.first(input.size() - count));
  if (tqai::fuzz::takes_long(bytes)) return 0;
  try {
    tqai::KvCache cache = tqai::KvCache::deserialize(bytes);
    constexpr int kMostRows = 16;
    if (cache.batch() > kMostRows) return 0;
    tqai::test::AnyOperations(input.last(count)).apply_to(cache);
  } catch (const tqai::ValueError&) {
  }
  return 0;
}
