// Trellis codes: a code's level depends on its own bits and on those before it.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <tqai/export.hpp>

namespace tqai {

/// What a coordinate's code stands for: a centroid of a Codebook, or a level that the codes before
/// it have a part in (`Trellis`), which at the same bits has a third less squared error.
enum class CodeKind : std::uint8_t { scalar, trellis };

/// Trellis codes have 1 to so many bits.
inline constexpr int kMaxTrellisBits = 4;
/// Those of keys have so many at least.
inline constexpr int kMinKeyTrellisBits = 2;

/// The levels of trellis codes of b bits (trellis-coded quantisation: Marcellin and Fischer 1990;
/// bit-shift trellises: QTIP, arXiv:2406.11235).
///
/// Codes follow one another in a stream of bits, the lowest of each first. A code's window is the 8
/// bits of the stream that end with its highest: its own are the upper ones. Before the first code
/// stands the last one (tail-biting), so that no bit is added. Its level is recent[window >> 4] +
/// older[window & 15], a whole number within ±63 (kMaxNarrowLevel). Both tables are universal: they
/// are those of least error for independent normal numbers, which rotated coordinates nearly are.
struct Trellis {
  int bits;                            ///< of a code
  double unit;                         ///< of a level, in standard deviations of a coordinate
  std::array<std::int8_t, 16> older;   ///< by the window's lower half
  std::array<std::int8_t, 16> recent;  ///< by its upper half

  /// A window's level.
  constexpr int level(unsigned window) const noexcept {
    return recent[window >> 4 & 15U] + older[window & 15U];
  }
  /// What a level stands for in vectors of length 1.
  TQAI_API float step(int head_dim) const noexcept;
};

/// The trellis of `bits`, 1…kMaxTrellisBits; else ValueError.
TQAI_API const Trellis& trellis(int bits);

/// The levels of trellis codes of keys, which are found in a closed loop (tqai/key_basis.hpp),
/// coordinate after coordinate: each path that is still open needs a loop of its own, so that there
/// are fewer than in a `Trellis`.
///
/// A code's window is its own bits and, below them, the upper ones of those before it, 6 in all.
/// The first code comes after `start`. In a tile the codes of a token follow one another in the
/// order of coordinates 0, 4, 8 …, then 1, 5, 9 … of what is stored (key_coordinate): in each byte
/// of its lines, which a reader goes through side by side.
struct KeyTrellis {
  static constexpr int kWindowBits = 6;              ///< of a window
  static constexpr int kWindows = 1 << kWindowBits;  ///< and so levels

  int bits;                                  ///< of a code
  double unit;                               ///< of a level, in standard deviations
  unsigned start;                            ///< what stands below the first code's bits
  std::array<std::int8_t, kWindows> levels;  ///< by window, within ±63 (kMaxNarrowLevel)

  /// The window of a code after another's.
  constexpr unsigned next(unsigned window, unsigned code) const noexcept {
    return window >> bits | code << (kWindowBits - bits);
  }
  /// What next() takes for the window before the first.
  constexpr unsigned before_first() const noexcept { return start << bits; }
  /// What a level stands for in vectors of length 1.
  TQAI_API float step(int head_dim) const noexcept;
};

/// The trellis of keys of `bits`, kMinKeyTrellisBits…kMaxTrellisBits; else ValueError.
TQAI_API const KeyTrellis& key_trellis(int bits);

/// Where the i-th code of a key's path is stored, among `padded` coordinates.
constexpr int key_coordinate(int i, int padded) noexcept {
  const int quads = padded / 4;
  return 4 * (i % quads) + i / quads;
}

}  // namespace tqai

#if defined(TQAI_HEADER_ONLY) || defined(TQAI_IMPLEMENTATION)
#include <tqai/header_only.hpp>
#endif
