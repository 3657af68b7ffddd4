// Where a row's tokens stand: what their keys were turned by.
#pragma once

#include <cstdint>
#include <tqai/cache.hpp>

#include "../kernels/kernels.hpp"
#include "memory.hpp"

namespace tqai::detail {

/// Positions of tokens that follow one another in a row: the first one's, where each next one is
/// one further in all sections of the embedding, else every token's.
class Positions {
 public:
  Positions() = default;
  static Positions consecutive(std::int64_t first, std::int64_t count) noexcept;
  /// each: [count, sections], within ± KvCache::kMaxPosition.
  static Positions each(CountedVector<std::int32_t> each, int sections) noexcept;

  std::int64_t count() const noexcept { return count_; }
  bool is_consecutive() const noexcept { return each_.empty(); }
  /// Of the first token, where they are consecutive.
  std::int64_t first() const noexcept { return first_; }
  /// [count, sections()], empty where they are consecutive.
  const CountedVector<std::int32_t>& each() const noexcept { return each_; }
  int sections() const noexcept { return sections_; }
  /// One further than the last token in the section where that is furthest; needs a token.
  std::int64_t next() const noexcept;

  /// Of tokens [from, from + count).
  Positions part(std::int64_t from, std::int64_t count) const;
  /// Of these tokens and then `more`. sections: those of the embedding, in which both are where
  /// they are not consecutive.
  Positions joined(const Positions& more, int sections) const;

  std::size_t bytes() const noexcept { return each_.capacity() * sizeof(std::int32_t); }

 private:
  void write_to(std::int32_t* to, int sections) const noexcept;

  std::int64_t first_ = 0;
  std::int64_t count_ = 0;
  CountedVector<std::int32_t> each_;
  int sections_ = 1;
};

/// Those of batch row `row` in a tensor that check.cpp has seen, for an embedding of so many
/// sections.
Positions read_positions(const PositionTensor& positions, std::int64_t row, int sections);

/// Positions of a tile's tokens that are not consecutive. Payload: [sections, 64] int32, one
/// section where all of the embedding's stand alike. Immutable.
struct PlacesShape {
  int sections = 1;
};
using Places = Shared<PlacesShape>;

/// Of 64 tokens; empty where they are consecutive.
Places places_of(const Positions& positions);

class RopeTables;

/// Makes the phasors of these positions.
void cover(const RopeTables& tables, const kernels::TilePositions& positions) noexcept;

/// As the kernels take them. `first` counts where `places` is empty.
kernels::TilePositions tile_positions(std::int64_t first, const Places& places) noexcept;

}  // namespace tqai::detail
