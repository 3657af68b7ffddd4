// Rotations, codebooks and layout of one geometry, shared by all caches that have it.
#pragma once

#include <array>
#include <cstdint>
#include <memory>
#include <optional>
#include <tqai/cache.hpp>
#include <tqai/codebook.hpp>
#include <tqai/packing.hpp>
#include <tqai/rotation.hpp>
#include <vector>

#include "../kernels/code_bins.hpp"
#include "../kernels/kernels.hpp"

namespace tqai::detail {

/// A codebook's levels, repeated, and what they share: kernels::SegmentPlan's.
struct LevelTable {
  std::array<std::int8_t, 256> levels;
  std::array<std::int8_t, 16> quotients;
  int divisor;
  bool has_quotients;
};

class Codec {
 public:
  explicit Codec(const CacheOptions& options);
  Codec(const Codec&) = delete;
  Codec& operator=(const Codec&) = delete;

  const TileLayout& layout() const noexcept { return layout_; }
  const kernels::TilePlan& plan() const noexcept { return plan_; }
  const Rotation& key_rotation() const noexcept { return key_rotation_; }
  const Rotation& value_rotation() const noexcept { return value_rotation_; }
  /// Length up to which FP16 holds the norm that a tile stores of any key less its centre, and of
  /// any value.
  float longest_key() const noexcept { return longest_key_; }
  float longest_value() const noexcept { return longest_value_; }
  /// Least length, but for 0, of what codes of a key stand for.
  float shortest_codes() const noexcept { return shortest_codes_; }

 private:
  Rotation key_rotation_;
  Rotation value_rotation_;
  TileLayout layout_;
  std::vector<LevelTable> key_levels_;
  std::vector<LevelTable> value_levels_;
  std::vector<std::optional<kernels::CodeBins>> key_bins_;
  std::vector<std::optional<kernels::CodeBins>> value_bins_;
  std::optional<kernels::TrellisPlan> value_trellis_;
  std::vector<kernels::SegmentPlan> key_trials_;  // of trellis codes
  std::vector<kernels::SegmentPlan> key_segments_;
  std::vector<kernels::SegmentPlan> value_segments_;
  kernels::TilePlan plan_{};
  float longest_key_;
  float longest_value_;
  float shortest_codes_;
};

/// The codec of these options; one for all caches that need the same. Thread-safe.
std::shared_ptr<const Codec> shared_codec(const CacheOptions& options);

/// A basis with the same matrices that a cache of this process has, or had it not, this one: bytes
/// of many caches each bring theirs. Null stays null. Thread-safe.
std::shared_ptr<const KeyBasis> shared_basis(std::shared_ptr<const KeyBasis> basis);

}  // namespace tqai::detail
