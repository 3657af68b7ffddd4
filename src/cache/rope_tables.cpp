#include "rope_tables.hpp"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <iterator>
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

// Appends (even, odd) coefficients c of cos(angle x) ≈ Σ c x^(2n) and sin(angle x) ≈ Σ c x^(2n+1)
// for |x| ≤ 1: the Chebyshev series of each up to there, in powers. Of angles up to 1 the next of
// their terms, 2 J_8(1) = 2e-7 of the cosine, is what they are off by.
void append_terms(double angle, std::vector<float>& to) {
  constexpr int kCount = 2 * kernels::kRopePowers;
  constexpr int kNodes = 32;
  constexpr double kPi = 3.14159265358979323846;
  double powers[kCount] = {};
  double last[kCount] = {};  // T_(n−1) and T_n in powers of x
  double chebyshev[kCount] = {1.0};
  for (int n = 0; n < kCount; ++n) {
    double coefficient = 0.0;
    for (int node = 0; node < kNodes; ++node) {
      const double place = kPi * (node + 0.5) / kNodes;
      const double x = angle * std::cos(place);
      coefficient += (n % 2 == 0 ? std::cos(x) : std::sin(x)) * std::cos(n * place);
    }
    coefficient *= (n == 0 ? 1.0 : 2.0) / kNodes;
    for (int power = n % 2; power <= n; power += 2) powers[power] += coefficient * chebyshev[power];
    // T_(n+1) = 2 x T_n − T_(n−1), and T_1 = x.
    double next[kCount] = {};
    for (int power = 0; power < kCount; ++power) {
      if (power > 0) next[power] = (n == 0 ? 1.0 : 2.0) * chebyshev[power - 1];
      next[power] -= last[power];
    }
    std::copy(chebyshev, chebyshev + kCount, last);
    std::copy(next, next + kCount, chebyshev);
  }
  for (const double power : powers) {
    // Beside the first, which is 1, these do not show; their products would be denormal numbers,
    // which take processors a hundred times as long.
    constexpr double kNegligible = 1e-20;
    to.push_back(std::abs(power) < kNegligible ? 0.0F : static_cast<float>(power));
  }
}

}  // namespace

RopeTables::RopeTables(const Rope& rope)
    : rope_(rope),
      interleaved_(rope.layout == Rope::Layout::interleaved),
      sections_(rope.sections),
      phasors_(std::make_shared<const PositionPhasors>()) {
  sections_.resize(rope.inv_freq.size(), 0);
  std::vector<float> half;
  for (const float frequency : rope.inv_freq) {
    for (int j = 0; j < kHalfTile; ++j) {
      half.push_back(static_cast<float>(std::cos((j + 0.5) * static_cast<double>(frequency))));
    }
    for (int j = 0; j < kHalfTile; ++j) {
      half.push_back(static_cast<float>(std::sin((j + 0.5) * static_cast<double>(frequency))));
    }
  }
  for (int power = 0; power < 2 * kernels::kRopePowers; ++power) {
    for (int j = 0; j < kHalfTile; ++j) {
      half.push_back(static_cast<float>(std::pow((j + 0.5) / kHalfTile, power)));
    }
  }
  half_.resize(half.size() / std::size(Line{}.floats));
  std::memcpy(half_.data(), half.data(), half.size() * sizeof(float));
  for (const float frequency : rope.inv_freq) {
    append_terms(kHalfTile * static_cast<double>(frequency), terms_);
  }
  for (int offset = 0; offset < kTileTokens; ++offset) append_phasors(rope, offset, offsets_);
}

bool RopeTables::is_slow(int f) const noexcept {
  return std::abs(rope_.inv_freq[static_cast<std::size_t>(f)]) * kHalfTile <= 1.0F;
}

void RopeTables::cover(std::int64_t first, std::int64_t last) const {
  constexpr std::int64_t kNear = kernels::kNearPositions;
  constexpr std::int64_t kMostTiles = kNear / kTileTokens;
  const bool far = first < 0 || last >= kNear;
  const std::int64_t count = far ? kMostTiles : last / kTileTokens + 1;
  const std::size_t row = 2 * rope_.inv_freq.size();
  const std::scoped_lock lock(mutex_);
  const auto have = static_cast<std::int64_t>(phasors_->tiles.size() / row);
  if (have >= count && (!far || !phasors_->far.empty())) return;
  auto grown = std::make_shared<PositionPhasors>(*phasors_);
  if (have < count) {
    const std::int64_t wanted = std::min(std::max<std::int64_t>({count, 2 * have, 64}), kMostTiles);
    grown->tiles.reserve(static_cast<std::size_t>(wanted) * row);
    for (std::int64_t tile = have; tile < wanted; ++tile) {
      append_phasors(rope_, static_cast<double>(tile) * kTileTokens + 31.5, grown->tiles);
    }
  }
  if (far && grown->far.empty()) {
    for (std::int64_t step = -kernels::kFarSteps; step < kernels::kFarSteps; ++step) {
      append_phasors(rope_, static_cast<double>(step * kNear), grown->far);
    }
  }
  phasors_ = std::move(grown);
}

std::shared_ptr<const PositionPhasors> RopeTables::phasors() const {
  const std::scoped_lock lock(mutex_);
  return phasors_;
}

std::shared_ptr<const RopeTables> shared_rope_tables(const Rope& rope) {
  using Key = std::tuple<std::vector<float>, Rope::Layout, int, std::vector<std::uint8_t>>;
  static std::mutex mutex;
  static std::map<Key, std::weak_ptr<const RopeTables>> table;
  const std::scoped_lock lock(mutex);
  std::weak_ptr<const RopeTables>& entry =
      table[Key{rope.inv_freq, rope.layout, rope.rotary_dim, rope.sections}];
  std::shared_ptr<const RopeTables> tables = entry.lock();
  if (!tables) {
    tables = std::make_shared<const RopeTables>(rope);
    entry = tables;
  }
  return tables;
}

}  // namespace tqai::detail
