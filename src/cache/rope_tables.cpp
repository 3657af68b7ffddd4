#include "rope_tables.hpp"

#include <algorithm>
#include <cmath>
#include <map>
#include <tqai/packing.hpp>
#include <tuple>

#include "kernels/kernels.hpp"

namespace tqai::detail {
namespace {

constexpr int kHalfTile = kTileTokens / 2;

// Appends e^(i position ω) of all pairs: real parts, then imaginary ones.
void append_phasors(const Rope& rope, double position, std::vector<float>& to) {
  for (const float frequency : rope.inv_freq) {
    to.push_back(static_cast<float>(std::cos(position * static_cast<double>(frequency))));
  }
  for (const float frequency : rope.inv_freq) {
    to.push_back(static_cast<float>(std::sin(position * static_cast<double>(frequency))));
  }
}

}  // namespace

RopeTables::RopeTables(const Rope& rope)
    : rope_(rope), interleaved_(rope.layout == Rope::Layout::interleaved) {
  for (const float frequency : rope.inv_freq) {
    for (int j = 0; j < kHalfTile; ++j) {
      half_.push_back(static_cast<float>(std::cos((j + 0.5) * static_cast<double>(frequency))));
    }
    for (int j = 0; j < kHalfTile; ++j) {
      half_.push_back(static_cast<float>(std::sin((j + 0.5) * static_cast<double>(frequency))));
    }
  }
  for (int power = 0; power < 2 * kernels::kRopePowers; ++power) {
    for (int j = 0; j < kHalfTile; ++j) {
      half_.push_back(static_cast<float>(std::pow((j + 0.5) / kHalfTile, power)));
    }
  }
  for (const float frequency : rope.inv_freq) {
    // Taylor's series in x = distance / 32: term n is ± (32 ω)^n / n!.
    float terms[2][8] = {};
    double term = 1.0;
    for (int power = 0; power < 2 * kernels::kRopePowers; ++power) {
      const double sign = power / 2 % 2 == 0 ? 1.0 : -1.0;
      // Beside the first, which is 1, these do not show; their products would be denormal numbers,
      // which take processors a hundred times as long.
      constexpr double kNegligible = 1e-20;
      terms[power % 2][power / 2] =
          std::abs(term) < kNegligible ? 0.0F : static_cast<float>(sign * term);
      term *= kHalfTile * static_cast<double>(frequency) / (power + 1);
    }
    terms_.insert(terms_.end(), &terms[0][0], &terms[0][0] + 16);
  }
  for (int offset = 0; offset < kTileTokens; ++offset) append_phasors(rope, offset, offsets_);
}

bool RopeTables::is_slow(int f) const noexcept {
  return std::abs(rope_.inv_freq[static_cast<std::size_t>(f)]) * kHalfTile <= 1.0F;
}

std::shared_ptr<const std::vector<float>> RopeTables::tiles(std::int64_t count) const {
  const std::size_t row = 2 * rope_.inv_freq.size();
  const std::scoped_lock lock(mutex_);
  const std::int64_t have = tiles_ ? static_cast<std::int64_t>(tiles_->size() / row) : 0;
  if (have < count) {
    auto grown = tiles_ ? std::make_shared<std::vector<float>>(*tiles_)
                        : std::make_shared<std::vector<float>>();
    const std::int64_t wanted = std::max<std::int64_t>({count, 2 * have, 64});
    grown->reserve(static_cast<std::size_t>(wanted) * row);
    for (std::int64_t tile = have; tile < wanted; ++tile) {
      append_phasors(rope_, static_cast<double>(tile) * kTileTokens + 31.5, *grown);
    }
    tiles_ = std::move(grown);
  }
  return tiles_;
}

std::shared_ptr<const RopeTables> shared_rope_tables(const Rope& rope) {
  using Key = std::tuple<std::vector<float>, Rope::Layout, int>;
  static std::mutex mutex;
  static std::map<Key, std::weak_ptr<const RopeTables>> table;
  const std::scoped_lock lock(mutex);
  std::weak_ptr<const RopeTables>& entry = table[Key{rope.inv_freq, rope.layout, rope.rotary_dim}];
  std::shared_ptr<const RopeTables> tables = entry.lock();
  if (!tables) {
    tables = std::make_shared<const RopeTables>(rope);
    entry = tables;
  }
  return tables;
}

}  // namespace tqai::detail
