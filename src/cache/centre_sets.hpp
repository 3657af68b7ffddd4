// Which centres the tiles of a row refer to, and when a row gets new ones.
#pragma once

#include <cstdint>
#include <vector>

#include "centres.hpp"
#include "memory.hpp"

namespace tqai::detail {

/// Sets of centres that a row has at most, whatever its length.
inline constexpr std::size_t kMostCentreSets = 32;

struct CentreChoice {
  CountedVector<Centres> sets;        // the row's old ones first
  std::vector<std::int32_t> of_tile;  // [tiles], index into `sets`
};

/// Chooses for tiles with these moments, [kv_heads][tiles], at least one. held: the row's sets;
/// row_tiles: tiles that the row has had, these ones included.
CentreChoice choose_centre_sets(const Context& context, const CountedVector<Centres>& held,
                                const std::vector<std::vector<Moments>>& moments,
                                std::int64_t row_tiles);

}  // namespace tqai::detail
