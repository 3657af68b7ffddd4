#include "positions.hpp"

#include <algorithm>

#include "rope_tables.hpp"

namespace tqai::detail {

TQAI_INLINE Positions Positions::consecutive(std::int64_t first, std::int64_t count) noexcept {
  Positions positions;
  positions.first_ = first;
  positions.count_ = count;
  return positions;
}

TQAI_INLINE Positions Positions::each(CountedVector<std::int32_t> each, int sections) noexcept {
  Positions positions;
  positions.count_ = static_cast<std::int64_t>(each.size()) / sections;
  positions.sections_ = sections;
  positions.first_ = each.empty() ? 0 : each.front();
  const auto stands = [&](std::size_t i) {
    return each[i] == positions.first_ + static_cast<std::int64_t>(i) / sections;
  };
  for (std::size_t i = 0; i < each.size(); ++i) {
    if (stands(i)) continue;
    positions.each_ = std::move(each);
    break;
  }
  return positions;
}

TQAI_INLINE std::int64_t Positions::next() const noexcept {
  if (is_consecutive()) return first_ + count_;
  return std::int64_t{*std::max_element(each_.end() - sections_, each_.end())} + 1;
}

TQAI_INLINE void Positions::write_to(std::int32_t* to, int sections) const noexcept {
  if (!is_consecutive()) {
    std::copy(each_.begin(), each_.end(), to);
    return;
  }
  for (std::int64_t i = 0; i < count_; ++i) {
    std::fill_n(to + i * sections, sections, static_cast<std::int32_t>(first_ + i));
  }
}

TQAI_INLINE Positions Positions::part(std::int64_t from, std::int64_t count) const {
  if (is_consecutive()) return consecutive(first_ + from, count);
  const auto begin = each_.begin() + from * sections_;
  return each(CountedVector<std::int32_t>(begin, begin + count * sections_), sections_);
}

TQAI_INLINE Positions Positions::joined(const Positions& more, int sections) const {
  if (count_ == 0) return more;
  if (more.count_ == 0) return *this;
  if (is_consecutive() && more.is_consecutive() && first_ + count_ == more.first_) {
    return consecutive(first_, count_ + more.count_);
  }
  CountedVector<std::int32_t> all(static_cast<std::size_t>((count_ + more.count_) * sections));
  write_to(all.data(), sections);
  more.write_to(all.data() + count_ * sections, sections);
  return each(std::move(all), sections);
}

TQAI_INLINE Positions read_positions(const PositionTensor& positions, std::int64_t row,
                                     int sections) {
  const auto [batch, given, count] = positions.shape;
  const std::int64_t* from = positions.data + (batch == 1 ? 0 : row) * positions.strides[0];
  CountedVector<std::int32_t> each(static_cast<std::size_t>(count * sections));
  for (std::int64_t t = 0; t < count; ++t) {
    for (int s = 0; s < sections; ++s) {
      each[static_cast<std::size_t>(t * sections + s)] = static_cast<std::int32_t>(
          from[(given == 1 ? 0 : s) * positions.strides[1] + t * positions.strides[2]]);
    }
  }
  return Positions::each(std::move(each), sections);
}

TQAI_INLINE Places places_of(const Positions& positions) {
  if (positions.is_consecutive()) return {};
  const int sections = positions.sections();
  const auto& each = positions.each();
  bool alike = true;
  for (std::size_t i = 0; i < each.size(); ++i) {
    alike = alike && each[i] == each[i - i % static_cast<std::size_t>(sections)];
  }
  const int kept = alike ? 1 : sections;
  Places places(PlacesShape{kept},
                static_cast<std::size_t>(kept) * kTileTokens * sizeof(std::int32_t));
  auto* to = reinterpret_cast<std::int32_t*>(places.payload());
  for (int s = 0; s < kept; ++s) {
    for (int t = 0; t < kTileTokens; ++t) {
      to[s * kTileTokens + t] = each[static_cast<std::size_t>(t * sections + s)];
    }
  }
  return places;
}

TQAI_INLINE kernels::TilePositions tile_positions(std::int64_t first,
                                                  const Places& places) noexcept {
  if (!places) return {first, nullptr, 1};
  return {first, reinterpret_cast<const std::int32_t*>(places.payload()), places.header().sections};
}

TQAI_INLINE void cover(const RopeTables& tables, const kernels::TilePositions& positions) noexcept {
  if (positions.each == nullptr) {
    tables.cover(positions.first, positions.first);
    return;
  }
  for (int i = 0; i < positions.sections * kTileTokens; ++i) {
    tables.cover(positions.each[i], positions.each[i]);
  }
}

}  // namespace tqai::detail
