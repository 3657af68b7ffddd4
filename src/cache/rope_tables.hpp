// Sines and cosines of a rotary embedding's frequencies, shared by all caches that have the same.
#pragma once

#include <cstdint>
#include <memory>
#include <mutex>
#include <tqai/centering.hpp>
#include <vector>

#include "../kernels/kernels.hpp"

namespace tqai::detail {

/// Phasors of positions. Position p is kNearPositions · step + 64 · tile + offset, with a tile and
/// an offset from 0 up and a step of either sign, so that far positions take no more memory than
/// the near ones and a constant. Only what positions that were covered need has been written.
struct PositionPhasors {
  const float* tiles = nullptr;  // [kNearPositions / 64, 2, pairs]: e^(i (64 tile + 31.5) ω)
  const float* far = nullptr;  // [2 · kFarSteps, 2, pairs], at step 0: e^(i kNearPositions step ω)
};

/// Constant tables over the pairs of a Rope, in fp32 from double angles. What a head needs at any
/// position is a product of one entry of each. Thread-safe.
class RopeTables {
 public:
  /// `rope` as checked by check.cpp.
  explicit RopeTables(const Rope& rope);

  const Rope& rope() const noexcept { return rope_; }
  int pair_count() const noexcept { return static_cast<int>(rope_.inv_freq.size()); }
  /// [pairs + kRopePowers, 2, 32]: cos, then sin of (j + 1/2) ω: the distances from the middle of a
  /// tile; then the even powers of (j + 1/2) / 32 from 0 up, each beside the odd one above it.
  const float* half() const noexcept { return reinterpret_cast<const float*>(half_.data()); }
  /// Whether a frequency turns by 1 at most between the middle of a tile and its ends.
  bool is_slow(int f) const noexcept;
  /// [pairs, kRopePowers, 2]: cos and sin of a slow frequency as coefficients of those powers.
  const float* terms() const noexcept { return terms_.data(); }
  /// [64, 2, pairs]: real, then imaginary parts of e^(i offset ω).
  const float* offsets() const noexcept { return offsets_.data(); }
  /// The same distances for kernels that take pairs side by side.
  kernels::TileTurns turns() const noexcept {
    return {pair_count(), interleaved_, distances_.data()};
  }
  /// [pairs], Rope::sections, filled in.
  const std::uint8_t* sections() const noexcept { return sections_.data(); }

  /// Makes the phasors of positions first…last, within ± KvCache::kMaxPosition. Takes time and
  /// memory by the tiles that are new, not by how far they are.
  void cover(std::int64_t first, std::int64_t last) const noexcept;
  /// Those of all positions that were ever covered, before this call or after it.
  const PositionPhasors& phasors() const noexcept { return phasors_; }

  /// The two coordinates of pair `f`.
  int first_of(int f) const noexcept { return interleaved_ ? 2 * f : f; }
  int second_of(int f) const noexcept { return interleaved_ ? 2 * f + 1 : f + pair_count(); }

 private:
  void write_phasors(double position, float* to) const noexcept;

  Rope rope_;
  bool interleaved_;
  struct alignas(64) Line {  // read by whole registers
    float floats[16];
  };
  std::vector<Line> half_;
  std::vector<float> distances_;
  std::vector<float> terms_;
  std::vector<float> offsets_;
  std::vector<std::uint8_t> sections_;
  // Not zeroed: memory that was not written to takes none of the machine's.
  std::unique_ptr<float[]> tiles_;
  std::unique_ptr<float[]> far_;
  PositionPhasors phasors_;
  mutable std::mutex mutex_;
  mutable std::vector<bool> has_tile_;
  mutable std::vector<bool> has_far_;
};

/// The tables of this embedding; one for all caches. Thread-safe.
std::shared_ptr<const RopeTables> shared_rope_tables(const Rope& rope);

}  // namespace tqai::detail
