// Sines and cosines of a rotary embedding's frequencies, shared by all caches that have the same.
#pragma once

#include <cstdint>
#include <memory>
#include <mutex>
#include <tqai/centering.hpp>
#include <vector>

namespace tqai::detail {

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
  /// [≥ count, 2, pairs]: e^(i (64 tile + 31.5) ω). Grows as asked; what was handed out stays.
  std::shared_ptr<const std::vector<float>> tiles(std::int64_t count) const;

  /// The two coordinates of pair `f`.
  int first_of(int f) const noexcept { return interleaved_ ? 2 * f : f; }
  int second_of(int f) const noexcept { return interleaved_ ? 2 * f + 1 : f + pair_count(); }

 private:
  Rope rope_;
  bool interleaved_;
  struct alignas(64) Line {  // read by whole registers
    float floats[16];
  };
  std::vector<Line> half_;
  std::vector<float> terms_;
  std::vector<float> offsets_;
  mutable std::mutex mutex_;
  mutable std::shared_ptr<const std::vector<float>> tiles_;
};

/// The tables of this embedding; one for all caches. Thread-safe.
std::shared_ptr<const RopeTables> shared_rope_tables(const Rope& rope);

}  // namespace tqai::detail
