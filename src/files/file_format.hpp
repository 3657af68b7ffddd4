// What readers and writers of files agree on (docs/format.md).
#pragma once

#include <cstddef>
#include <cstdint>
#include <string_view>

namespace tqai::detail {

inline constexpr std::string_view kFileFormat = "tqai-cache";
inline constexpr int kFileVersion = 3;          // of what is written; 1 and 2 are read as well
inline constexpr std::size_t kLengthBytes = 8;  // before the header
inline constexpr std::uint64_t kMostHeaderBytes = 100'000'000;  // safetensors' own limit

/// Bytes of an element; 0 for a dtype that safetensors does not have.
constexpr std::size_t element_bytes(std::string_view dtype) noexcept {
  struct Known {
    std::string_view name;
    std::size_t bytes;
  };
  constexpr Known kKnown[] = {{"BOOL", 1}, {"U8", 1},  {"I8", 1},  {"F8_E4M3", 1}, {"F8_E5M2", 1},
                              {"U16", 2},  {"I16", 2}, {"F16", 2}, {"BF16", 2},    {"U32", 4},
                              {"I32", 4},  {"F32", 4}, {"U64", 8}, {"I64", 8},     {"F64", 8}};
  for (const auto& [name, bytes] : kKnown) {
    if (name == dtype) return bytes;
  }
  return 0;
}

}  // namespace tqai::detail
