// What is known of a tile's keys when it is decided what to leave out of them.
#pragma once

#include <vector>

#include "../kernels/kernels.hpp"
#include "rope_tables.hpp"

namespace tqai::detail {

struct Context;

struct Complex {
  float real;
  float imaginary;
};

inline Complex multiply(Complex a, Complex b) noexcept {
  return {a.real * b.real - a.imaginary * b.imaginary, a.real * b.imaginary + a.imaginary * b.real};
}

/// e^(i (position + 31.5) ω_f), for a position that `tables` has covered.
Complex middle_phasor(const RopeTables& tables, const PositionPhasors& phasors,
                      std::int64_t position, int f) noexcept;

/// e^(i (t − 31.5) ω_f) of a tile's token t.
Complex distance_phasor(const RopeTables& tables, int f, int t) noexcept;

/// The position of token t in the section of pair f, where they are not consecutive.
inline std::int64_t position_of(const kernels::TilePositions& positions, const RopeTables& tables,
                                int f, int t) noexcept {
  const int section = positions.sections == 1 ? 0 : tables.sections()[f];
  return positions.each[section * kTileTokens + t];
}

/// Means over tokens of a head's keys k, in double.
struct Moments {
  Moments() = default;
  /// Room for those of keys of this context.
  explicit Moments(const Context& context);

  std::vector<double> mean;  // [head_dim], of k
  std::vector<double> real;  // [pairs], of k · e^(−i p ω)
  std::vector<double> imaginary;
  double energy = 0.0;  // of |k|²
  double tokens = 0.0;
};

/// Those of a tile: keys contiguous [64, head_dim] in the context's dtype; positions that `phasors`
/// have. Thread-safe for different `moments`, which have room. rows: working memory, [64,
/// head_dim].
void find_moments(const Context& context, const PositionPhasors& phasors, const std::byte* keys,
                  const kernels::TilePositions& positions, float* rows, Moments& moments) noexcept;

/// Of the tokens of several; at least one.
Moments pooled(const std::vector<const Moments*>& parts);

}  // namespace tqai::detail
