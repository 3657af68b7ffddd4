#include "rope_tables.hpp"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <iterator>
#include <map>
#include <tqai/packing.hpp>
#include <tuple>

#include "../kernels/kernels.hpp"

namespace tqai::detail {
namespace TQAI_LOCAL {

constexpr int kHalfTile = kTileTokens / 2;
constexpr std::int64_t kNear = kernels::kNearPositions;
constexpr std::int64_t kNearTiles = kNear / kTileTokens;

// Appends (even, odd) coefficients c of cos(angle x) ≈ Σ c x^(2n) and sin(angle x) ≈ Σ c x^(2n+1)
// for |x| ≤ 1: the Chebyshev series of each up to there, in powers. Of angles up to 1 the next of
// their terms, 2 J_8(1) = 2e-7 of the cosine, is what they are off by.
TQAI_INLINE void append_terms(double angle, std::vector<float>& to) {
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

}  // namespace TQAI_LOCAL

TQAI_INLINE RopeTables::RopeTables(const Rope& rope)
    : rope_(rope),
      interleaved_(rope.layout == Rope::Layout::interleaved),
      sections_(rope.sections),
      tiles_(new float[static_cast<std::size_t>(kNearTiles) * 2 * rope.inv_freq.size()]),
      far_(new float[static_cast<std::size_t>(kernels::kFarSteps) * 4 * rope.inv_freq.size()]),
      phasors_{tiles_.get(), far_.get() + kernels::kFarSteps * 2 * pair_count()},
      has_tile_(static_cast<std::size_t>(kNearTiles)),
      has_far_(static_cast<std::size_t>(2 * kernels::kFarSteps)) {
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
  for (int j = 0; j < kHalfTile; ++j) {
    for (const int part : {j, kHalfTile + j}) {
      for (std::size_t f = 0; f < rope.inv_freq.size(); ++f) {
        distances_.push_back(half[f * kTileTokens + static_cast<std::size_t>(part)]);
      }
    }
  }
  for (const float frequency : rope.inv_freq) {
    append_terms(kHalfTile * static_cast<double>(frequency), terms_);
  }
  const std::size_t row = 2 * rope.inv_freq.size();
  offsets_.resize(kTileTokens * row);
  for (std::size_t offset = 0; offset < kTileTokens; ++offset) {
    write_phasors(static_cast<double>(offset), offsets_.data() + offset * row);
  }
}

// e^(i position ω) of all pairs: real parts, then imaginary ones.
TQAI_INLINE void RopeTables::write_phasors(double position, float* to) const noexcept {
  for (const float frequency : rope_.inv_freq) {
    *to++ = static_cast<float>(std::cos(position * static_cast<double>(frequency)));
  }
  for (const float frequency : rope_.inv_freq) {
    *to++ = static_cast<float>(std::sin(position * static_cast<double>(frequency)));
  }
}

TQAI_INLINE bool RopeTables::is_slow(int f) const noexcept {
  return std::abs(rope_.inv_freq[static_cast<std::size_t>(f)]) * kHalfTile <= 1.0F;
}

TQAI_INLINE void RopeTables::cover(std::int64_t first, std::int64_t last) const noexcept {
  const std::size_t row = 2 * rope_.inv_freq.size();
  const auto write_once = [&](std::vector<bool>& has, std::int64_t index, double position,
                              float* table) {
    const auto at = static_cast<std::size_t>(index);
    if (has[at]) return;
    write_phasors(position, table + at * row);
    has[at] = true;
  };
  const std::scoped_lock lock(mutex_);
  for (std::int64_t p = first & -std::int64_t{kTileTokens}; p <= last; p += kTileTokens) {
    const std::int64_t near = p & (kNear - 1);
    write_once(has_tile_, near / kTileTokens, static_cast<double>(near) + 31.5, tiles_.get());
    if (near == p) continue;
    write_once(has_far_, (p - near) / kNear + kernels::kFarSteps, static_cast<double>(p - near),
               far_.get());
  }
}

TQAI_INLINE std::shared_ptr<const RopeTables> shared_rope_tables(const Rope& rope) {
  using Key = std::tuple<std::vector<float>, Rope::Layout, int, std::vector<std::uint8_t>>;
  // Never destroyed: caches in static storage may outlive any order of destruction.
  static auto& mutex = *new std::mutex;
  static auto& table = *new std::map<Key, std::weak_ptr<const RopeTables>>;
  const std::scoped_lock lock(mutex);
  std::weak_ptr<const RopeTables>& entry =
      table[Key{rope.inv_freq, rope.layout, rope.rotary_dim, rope.sections}];
  std::shared_ptr<const RopeTables> tables = entry.lock();
  if (!tables) {
    tables = std::make_shared<const RopeTables>(rope);
    entry = tables;
    // Those that nobody uses any more would add up where settings come from files.
    std::erase_if(table, [](const auto& each) { return each.second.expired(); });
  }
  return tables;
}

}  // namespace tqai::detail
