// Codes without a search: coordinates fall into equal bins, each with one boundary at most, so that
// a look-up and one comparison give the exact code.
#pragma once

#include <array>
#include <cstdint>
#include <span>

namespace tqai::kernels {

/// Added to a float below 2^22 in size, it leaves the nearest integer in the sum's lower bits.
inline constexpr float kRoundingShift = 0x1.8p23F;

/// The bin of y is b = nearest(clamp(y, ±limit) · scale), at index b mod size; its code is
/// codes[b] + (y ≥ boundaries[b]). Rounding is monotone, so that holds for each y if each boundary
/// falls into its own bin. Boundaries lie clear of the bins' edges: a level may fuse or not.
struct CodeBins {
  static constexpr int kMaxSize = 256;
  /// Of up to 15 boundaries, 4 bits (kNarrowBits): two AVX-512 registers.
  static constexpr int kNarrowSize = 32;

  /// ascending: boundaries, symmetric about 0; throws std::logic_error where no
  /// scale parts them, which does not happen on the int8 grid (tested for dimensions 8…576).
  explicit CodeBins(std::span<const float> ascending);

  int size;  // a power of two
  float scale;
  float limit;
  std::array<float, kMaxSize> boundaries;  // infinite where a bin has none
  std::array<std::uint8_t, kMaxSize> codes;
};

}  // namespace tqai::kernels
