// Which caches targets look at.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <span>

namespace tqai::fuzz {

/// Caches whose making or every token takes long are as the small ones, and leave less time for
/// those. bytes: of a cache, as docs/format.md has them.
inline bool takes_long(std::span<const std::byte> bytes) {
  constexpr std::size_t kOptions = 8;
  std::int32_t options[3] = {};  // kv_heads, head_dim, value_head_dim
  if (bytes.size() < kOptions + sizeof(options)) return false;
  std::memcpy(options, bytes.data() + kOptions, sizeof(options));
  constexpr std::int32_t kMostHeads = 8;
  constexpr std::int32_t kMostDim = 64;
  return options[0] > kMostHeads || options[1] > kMostDim || options[2] > kMostDim;
}

}  // namespace tqai::fuzz
