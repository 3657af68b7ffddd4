#include "moments.hpp"

#include <algorithm>
#include <numeric>

#include "context.hpp"

namespace tqai::detail {
namespace TQAI_LOCAL {

// Σ k · e^(−i p ω_f) over 64 consecutive positions p: turned back to the middle together, and then
// from there.
TQAI_INLINE void turn_back(const Context& context, const PositionPhasors& phasors,
                           const float* rows, std::int64_t first, Moments& moments) noexcept {
  const RopeTables& tables = *context.rope;
  const int pairs = tables.pair_count();
  float turned[kernels::kMaxDim];
  context.kernels->turn_back(tables.turns(), rows, context.options.head_dim, turned);
  for (int f = 0; f < pairs; ++f) {
    const Complex middle = middle_phasor(tables, phasors, first, f);
    const auto a = static_cast<double>(turned[f]);
    const auto b = static_cast<double>(turned[pairs + f]);
    const auto turn_real = static_cast<double>(middle.real);
    const auto turn_imaginary = static_cast<double>(middle.imaginary);
    moments.real[static_cast<std::size_t>(f)] = a * turn_real + b * turn_imaginary;
    moments.imaginary[static_cast<std::size_t>(f)] = b * turn_real - a * turn_imaginary;
  }
}

// The same over positions of any kind.
TQAI_INLINE void turn_back_each(const RopeTables& tables, const PositionPhasors& phasors,
                                const float* rows, std::size_t dim,
                                const kernels::TilePositions& positions, int f, double& real,
                                double& imaginary) noexcept {
  const Complex start = distance_phasor(tables, f, 0);
  double a = 0.0;
  double b = 0.0;
  for (int t = 0; t < kTileTokens; ++t) {
    const Complex phasor =
        multiply(middle_phasor(tables, phasors, position_of(positions, tables, f, t), f), start);
    const float* row = rows + static_cast<std::size_t>(t) * dim;
    const auto x = static_cast<double>(row[tables.first_of(f)]);
    const auto y = static_cast<double>(row[tables.second_of(f)]);
    a += x * static_cast<double>(phasor.real) + y * static_cast<double>(phasor.imaginary);
    b += y * static_cast<double>(phasor.real) - x * static_cast<double>(phasor.imaginary);
  }
  real = a;
  imaginary = b;
}

}  // namespace TQAI_LOCAL

TQAI_INLINE Complex middle_phasor(const RopeTables& tables, const PositionPhasors& phasors,
                                  std::int64_t position, int f) noexcept {
  const auto pairs = static_cast<std::ptrdiff_t>(tables.pair_count());
  const std::int64_t near = position & (kernels::kNearPositions - 1);
  const float* tile = phasors.tiles + near / kTileTokens * 2 * pairs;
  const float* offset = tables.offsets() + near % kTileTokens * 2 * pairs;
  const Complex phasor = multiply({tile[f], tile[pairs + f]}, {offset[f], offset[pairs + f]});
  if (near == position) return phasor;
  const float* far = phasors.far + (position - near) / kernels::kNearPositions * 2 * pairs;
  return multiply(phasor, {far[f], far[pairs + f]});
}

TQAI_INLINE Complex distance_phasor(const RopeTables& tables, int f, int t) noexcept {
  const float* cosines = tables.half() + static_cast<std::ptrdiff_t>(f) * kTileTokens;
  const float* sines = cosines + kTileTokens / 2;
  return t >= 32 ? Complex{cosines[t - 32], sines[t - 32]}
                 : Complex{cosines[31 - t], -sines[31 - t]};
}

TQAI_INLINE Moments::Moments(const Context& context)
    : mean(static_cast<std::size_t>(context.options.head_dim)),
      real(context.rope ? static_cast<std::size_t>(context.rope->pair_count()) : 0),
      imaginary(real.size()) {}

TQAI_INLINE void find_moments(const Context& context, const PositionPhasors& phasors,
                              const std::byte* keys, const kernels::TilePositions& positions,
                              float* rows, Moments& moments) noexcept {
  const std::size_t dim = moments.mean.size();
  double energy[kernels::kMaxDim] = {};
  context.kernels->widen(keys, context.options.dtype, static_cast<std::int64_t>(dim * kTileTokens),
                         rows);
  std::fill(moments.mean.begin(), moments.mean.end(), 0.0);
  context.kernels->add_up(rows, context.options.head_dim, moments.mean.data(), energy);
  if (!moments.real.empty() && positions.each == nullptr) {
    turn_back(context, phasors, rows, positions.first, moments);
  } else {
    for (std::size_t f = 0; f < moments.real.size(); ++f) {
      turn_back_each(*context.rope, phasors, rows, dim, positions, static_cast<int>(f),
                     moments.real[f], moments.imaginary[f]);
    }
  }
  moments.tokens = kTileTokens;
  for (auto* values : {&moments.mean, &moments.real, &moments.imaginary}) {
    for (double& value : *values) value /= moments.tokens;
  }
  moments.energy = std::accumulate(energy, energy + dim, 0.0) / moments.tokens;
}

TQAI_INLINE Moments pooled(const std::vector<const Moments*>& parts) {
  Moments all = *parts.front();
  for (std::size_t i = 1; i < parts.size(); ++i) {
    const Moments& more = *parts[i];
    const auto add = [](std::vector<double>& to, const std::vector<double>& from) {
      for (std::size_t c = 0; c < to.size(); ++c) to[c] += from[c];
    };
    add(all.mean, more.mean);
    add(all.real, more.real);
    add(all.imaginary, more.imaginary);
    all.energy += more.energy;
    all.tokens += more.tokens;
  }
  // Tiles have as many tokens each.
  const auto count = static_cast<double>(parts.size());
  for (auto* values : {&all.mean, &all.real, &all.imaginary}) {
    for (double& value : *values) value /= count;
  }
  all.energy /= count;
  return all;
}

}  // namespace tqai::detail
