// What writing a cache's bytes and reading them must agree about. docs/format.md has the bytes.
#pragma once

#include <algorithm>
#include <array>
#include <bit>
#include <cstdint>
#include <span>
#include <tqai/cache.hpp>
#include <tqai/codebook.hpp>
#include <tqai/error.hpp>

#include "../crc32.hpp"

namespace tqai::detail {

inline constexpr std::uint32_t kMagic = 0x4941'5154;  // "TQAI"
// Versions. 1 had no positions and one centre set a row: its tokens stand at their index. 2 had
// each block's tiles beside its header, and no codebooks. 4 says what rows have left out, and is
// written where one has; 5 says what basis keys are in, and is written where they are in one; 6 has
// both, and says what codes of values stand for, where they are a trellis's; 7 also of keys, where
// those are.
inline constexpr std::uint32_t kFirstVersion = 1;
inline constexpr std::uint32_t kTilesLast = 3;
inline constexpr std::uint32_t kWithGaps = 4;
inline constexpr std::uint32_t kWithBasis = 5;
inline constexpr std::uint32_t kWithTrellis = 6;
inline constexpr std::uint32_t kWithKeyTrellis = 7;
inline constexpr std::uint32_t kVersion = 7;
inline constexpr std::uint32_t kNothing = 0xFFFF'FFFF;  // in place of an index: an empty part

inline void check_byte_order() {
  if constexpr (std::endian::native != std::endian::little) {
    throw UnsupportedError("caches are written and read on little-endian processors only");
  }
}

/// What tells two codebooks apart, for one side's codes.
struct CodebookMark {
  std::uint32_t levels = 0;  // their checksum
  float step = 0.0F;
};

inline CodebookMark mark_of(int dim, int bits) {
  const Codebook& book = codebook(dim, bits, Grid::int8);
  return {crc32(std::as_bytes(book.levels())), book.step()};
}

inline CodebookMark mark_of(int dim, const Trellis& tables) {
  std::array<std::int8_t, 256> levels;
  for (unsigned window = 0; window < levels.size(); ++window) {
    levels[window] = static_cast<std::int8_t>(tables.level(window));
  }
  return {crc32(std::as_bytes(std::span(levels))), tables.step(dim)};
}

inline CodebookMark mark_of(int dim, const KeyTrellis& tables) {
  std::array<std::int8_t, KeyTrellis::kWindows + 1> levels;
  std::copy(tables.levels.begin(), tables.levels.end(), levels.begin());
  levels.back() = static_cast<std::int8_t>(tables.start);
  return {crc32(std::as_bytes(std::span(levels))), tables.step(dim)};
}

inline std::array<CodebookMark, 2> marks_of(const CacheOptions& options) {
  return {options.key_codes == CodeKind::trellis
              ? mark_of(options.head_dim, key_trellis(options.bits_k))
              : mark_of(options.head_dim, options.bits_k),
          options.value_codes == CodeKind::trellis
              ? mark_of(options.value_head_dim, trellis(options.bits_v))
              : mark_of(options.value_head_dim, options.bits_v)};
}

}  // namespace tqai::detail
