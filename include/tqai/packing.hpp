// How codes lie in memory: tiles of 64 tokens, lines of 64 bytes.
#pragma once

#include <cstddef>
#include <cstdint>
#include <tqai/export.hpp>
#include <vector>

namespace tqai {

/// Tokens that are sealed together.
inline constexpr int kTileTokens = 64;
/// A line: one AVX-512 register, one cache line. Its unit is the lane of 4 bytes.
inline constexpr int kLineBytes = 64;
/// Coordinates are stored in multiples of this; a head_dim between is padded with ignored codes.
inline constexpr int kCoordinateBlock = 16;
/// Codes that share `bits` bytes, one byte in each of `bits` consecutive lines.
inline constexpr int kGroupCodes = 8;

/// Smallest multiple of kCoordinateBlock that holds `coordinates`.
constexpr int padded_dim(int coordinates) noexcept {
  return (coordinates + kCoordinateBlock - 1) / kCoordinateBlock * kCoordinateBlock;
}

/// Bytes of one tile's codes of `coordinates` (a multiple of kCoordinateBlock) at `bits` each.
constexpr std::size_t packed_bytes(int coordinates, int bits) noexcept {
  return static_cast<std::size_t>(coordinates) * static_cast<std::size_t>(bits) * (kTileTokens / 8);
}

// A group is 8 lines of codes, packed into `bits` lines. With byte i the same position of each
// line:
//   1 bit    line 0: bit n = code n
//   2 bits   line l: bits 2m, 2m+1 = code 4l+m
//   3 bits   line l: bits 0–2 = code 2l, bits 3–5 = code 2l+1; bits 6–7 of lines 0 and 1 are the
//            lower bits of codes 6 and 7, bits 6 and 7 of line 2 their upper bits
//   4 bits   line l: low nibble = code 2l, high nibble = code 2l+1
//   5,6,7    the low 4 bits as above, then 1 bit, 2 bits, or 2 bits and 1 bit as above
//   8 bits   line n = code n
// Keys: a group is 8 coordinates × 64 tokens. Line 4q+s holds coordinates 4q…4q+3 of tokens
// 16s…16s+15; byte 4t+c is coordinate 4q+c of token 16s+t. So a lane is a token, and scores need no
// horizontal sum. Values: a group is 16 coordinates × 32 tokens, both token halves of a block of
// coordinates in turn. Line i holds tokens 4i…4i+3; byte 4c+t is coordinate c of token 4i+t. So a
// lane is a coordinate.
// Values in trellis codes (tqai/trellis.hpp) are packed as others, but for 3 bits: code n is bits
// 3n…3n+2 of the three lines' bytes as one little-endian number. So the bytes at one position, line
// after line, are the stream that windows are taken from.

/// Packs a tile's key codes. `codes`: [coordinates, 64], each < 2^bits; `packed`:
/// packed_bytes(coordinates, bits). `coordinates` is a multiple of kCoordinateBlock, bits 1…8.
TQAI_API void pack_keys(const std::uint8_t* codes, int coordinates, int bits,
                        std::uint8_t* packed) noexcept;
/// The inverse of pack_keys.
TQAI_API void unpack_keys(const std::uint8_t* packed, int coordinates, int bits,
                          std::uint8_t* codes) noexcept;
/// Packs a tile's value codes; shapes as in pack_keys.
TQAI_API void pack_values(const std::uint8_t* codes, int coordinates, int bits,
                          std::uint8_t* packed) noexcept;
/// The inverse of pack_values.
TQAI_API void unpack_values(const std::uint8_t* packed, int coordinates, int bits,
                            std::uint8_t* codes) noexcept;

/// A run of rotated coordinates that are stored with the same bits.
struct Segment {
  int first;  ///< a multiple of kCoordinateBlock
  int count;  ///< a multiple of kCoordinateBlock
  int bits;   ///< 1…8
};

/// Where the parts of one head's tile lie: key codes, value codes, key norms, value norms, each
/// 64-byte aligned. Segments follow one another in order of coordinates.
class TQAI_API TileLayout {
 public:
  /// Uniform bits: one segment a side.
  TileLayout(int key_dim, int value_dim, int bits_k, int bits_v);

  /// Runs of coordinates of a key.
  const std::vector<Segment>& key_segments() const noexcept { return key_segments_; }
  /// Runs of coordinates of a value.
  const std::vector<Segment>& value_segments() const noexcept { return value_segments_; }
  /// Offset of the key codes from the tile's first byte; the next three as well.
  std::size_t key_codes() const noexcept { return 0; }
  /// Offset.
  std::size_t value_codes() const noexcept { return value_codes_; }
  /// Offset; [64] FP16.
  std::size_t key_norms() const noexcept { return key_norms_; }
  /// Offset; [64] FP16.
  std::size_t value_norms() const noexcept { return key_norms_ + kTileTokens * 2; }
  /// Bytes of one head's tile.
  std::size_t bytes() const noexcept { return key_norms_ + kTileTokens * 4; }

 private:
  std::vector<Segment> key_segments_;
  std::vector<Segment> value_segments_;
  std::size_t value_codes_ = 0;
  std::size_t key_norms_ = 0;
};

}  // namespace tqai

#if defined(TQAI_HEADER_ONLY) || defined(TQAI_IMPLEMENTATION)
#include <tqai/header_only.hpp>
#endif
