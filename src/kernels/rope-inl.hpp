// The part of the scores that RoPE-centred keys leave out, for the 64 consecutive positions of a
// tile at once, for a few runs of consecutive ones run by run, and for others token by token.
#ifndef TQAI_ROPE_INL
#define TQAI_ROPE_INL

#include <cstring>

#include "complex-inl.hpp"
#include "floats-inl.hpp"
#include "kernels.hpp"

namespace tqai::kernels::TQAI_LEVEL_NAMESPACE {
namespace TQAI_LOCAL {

constexpr int kHalfTile = kTileTokens / 2;

// Around the middle of a tile, at 31.5 ± (j + 1/2), the cosines are even and the sines odd in the
// distance, so that 32 products serve 64 positions: scores += E[j] ∓ O[j] with E = Σ Re h · cos,
// O = Σ Im h · sin, h = factor · e^(i middle ω). Slow frequencies are one polynomial together.
struct TilePhasors {
  float real[kMaxDim / 2];
  float imaginary[kMaxDim / 2];
};

// e^(i (first + 31.5) ω) of all pairs, kept or not: contiguous loops cost less than picking.
inline void find_phasors(const RopeBias& bias, std::int64_t first, TilePhasors& phasors) noexcept {
  const int pairs = bias.pair_count;
  const std::int64_t near = first & (kNearPositions - 1);
  const float* __restrict a = bias.tiles + near / kTileTokens * 2 * pairs;
  const float* __restrict b = a + pairs;
  const float* __restrict c = bias.offsets + near % kTileTokens * 2 * pairs;
  const float* __restrict d = c + pairs;
  for (int f = 0; f < pairs; ++f) {
    phasors.real[f] = fused(a[f], c[f], -(b[f] * d[f]));
    phasors.imaginary[f] = fused(a[f], d[f], b[f] * c[f]);
  }
  if (near == first) return;
  const float* __restrict g = bias.far + (first - near) / kNearPositions * 2 * pairs;
  const float* __restrict h = g + pairs;
  for (int f = 0; f < pairs; ++f) {
    const float real = phasors.real[f];
    phasors.real[f] = fused(real, g[f], -(phasors.imaginary[f] * h[f]));
    phasors.imaginary[f] = fused(real, h[f], phasors.imaginary[f] * g[f]);
  }
}

// factor · e^(i middle ω) of all rows, [count, kFloats] as RopeBias::factors: the frequencies that
// are not slow, then the coefficients of the slow ones' polynomials. Returns how many there are.
template <int kFloats>
inline int turn_factors(const RopeBias& bias, const TilePhasors& phasors, float* turned) noexcept {
  using Rows = ComplexRows<kFloats>;
  using Vec = typename Rows::Vec;
  const int fast = bias.count - bias.slow_count;
  Vec coefficients[kRopePowers][Rows::kParts] = {};
  for (int k = 0; k < bias.count; ++k) {
    const int f = bias.pairs[k];
    const float* factors = bias.factors + std::ptrdiff_t{kFloats} * k;
    for (int p = 0; p < Rows::kParts; ++p) {
      const Vec product =
          Rows::times(Rows::load(factors, p), phasors.real[f], phasors.imaginary[f]);
      if (k < fast) {
        Rows::store(turned + std::ptrdiff_t{kFloats} * k, p, product);
        continue;
      }
      const float* terms = bias.terms + static_cast<std::ptrdiff_t>(f) * 2 * kRopePowers;
      for (int power = 0; power < kRopePowers; ++power) {
        coefficients[power][p] = Rows::fused_lanes(broadcast_pair<Vec>(terms + 2 * power), product,
                                                   coefficients[power][p]);
      }
    }
  }
  if (bias.slow_count == 0) return fast;
  for (int power = 0; power < kRopePowers; ++power) {
    for (int p = 0; p < Rows::kParts; ++p) {
      Rows::store(turned + std::ptrdiff_t{kFloats} * (fast + power), p, coefficients[power][p]);
    }
  }
  return fast + kRopePowers;
}

// The bias of rows first_row … first_row + kRows − 1.
template <int kRows, int kFloats>
inline void add_rope_rows(const RopeBias& bias, const float* turned, int count, int first_row,
                          float (*scores)[kTileTokens]) noexcept {
  const int fast = bias.slow_count == 0 ? count : count - kRopePowers;
  alignas(64) float even_part[kRows][kHalfTile];
  alignas(64) float odd_part[kRows][kHalfTile];
  // Up to 16 sums at a time.
  constexpr int kVecs = kRows == 1 ? (kVectorLanes == 16 ? 2 : 4) : (kVectorLanes == 16 ? 2 : 1);
  for (int start = 0; start < kHalfTile; start += kVecs * kVectorLanes) {
    FloatVec even[kRows][kVecs] = {};
    FloatVec odd[kRows][kVecs] = {};
    for (int k = 0; k < count; ++k) {
      const int f = k < fast ? bias.pairs[k] : bias.pair_count + k - fast;
      const float* table = bias.half + static_cast<std::ptrdiff_t>(f) * kTileTokens + start;
      const float* factors = turned + std::ptrdiff_t{kFloats} * k + std::ptrdiff_t{2} * first_row;
      for (int v = 0; v < kVecs; ++v) {
        const FloatVec cosines = load_floats(table + v * kVectorLanes);
        const FloatVec sines = load_floats(table + kHalfTile + v * kVectorLanes);
        for (int r = 0; r < kRows; ++r) {
          even[r][v] = fused(broadcast_float<FloatVec>(factors[2 * r]), cosines, even[r][v]);
          odd[r][v] = fused(broadcast_float<FloatVec>(factors[2 * r + 1]), sines, odd[r][v]);
        }
      }
    }
    // Small bodies, which compilers unroll: a sum that is indexed by a variable lives in memory.
    for (int r = 0; r < kRows; ++r) {
      for (int v = 0; v < kVecs; ++v) {
        store_floats(even_part[r] + start + v * kVectorLanes, even[r][v]);
        store_floats(odd_part[r] + start + v * kVectorLanes, odd[r][v]);
      }
    }
  }
  for (int r = 0; r < kRows; ++r) {
    float* after = scores[first_row + r] + kHalfTile;
    float* before = scores[first_row + r] + kHalfTile - 1;
    for (int i = 0; i < kHalfTile; ++i) {
      after[i] = after[i] + (even_part[r][i] - odd_part[r][i]);
    }
    for (int i = 0; i < kHalfTile; ++i) {
      before[-i] = before[-i] + (even_part[r][i] + odd_part[r][i]);
    }
  }
}

// e^(i (p + 31.5) ω) of all pairs, p being the token's position in the pair's section.
inline void find_token_phasors(const RopeBias& bias, const TilePositions& positions, int token,
                               TilePhasors& phasors) noexcept {
  find_phasors(bias, positions.each[token], phasors);
  for (int s = 1; s < positions.sections; ++s) {
    const std::int64_t position = positions.each[s * kTileTokens + token];
    TilePhasors other;
    find_phasors(bias, position, other);
    for (int f = 0; f < bias.pair_count; ++f) {
      const bool is_its = bias.sections[f] == s;
      phasors.real[f] = is_its ? other.real[f] : phasors.real[f];
      phasors.imaginary[f] = is_its ? other.imaginary[f] : phasors.imaginary[f];
    }
  }
}

// Calls body<kFloats>() for so many rows.
template <typename Body>
inline void with_lanes(int rows, Body&& body) noexcept {
  switch (factor_lanes(rows)) {
    case 2: return body.template operator()<2>();
    case 4: return body.template operator()<4>();
    case 8: return body.template operator()<8>();
    default: return body.template operator()<2 * kMaxRows>();
  }
}

// The bias of tokens at positions of any kind.
template <int kFloats>
TQAI_NEVER_INLINE void add_rope_by_token(const RopeBias& bias, const TilePositions& positions,
                                         int rows, float (*scores)[kTileTokens]) noexcept {
  using Rows = ComplexRows<kFloats>;
  using Vec = typename Rows::Vec;
  // The factors, turned from the middle of a tile to its start, and i times them.
  alignas(64) float turned[kMaxDim / 2][kFloats];
  alignas(64) float turned_times_i[kMaxDim / 2][kFloats];
  for (int k = 0; k < bias.count; ++k) {
    const float* half = bias.half + static_cast<std::ptrdiff_t>(bias.pairs[k]) * kTileTokens;
    const float* factors = bias.factors + std::ptrdiff_t{kFloats} * k;
    for (int p = 0; p < Rows::kParts; ++p) {
      const Vec numbers =
          Rows::times(Rows::load(factors, p), half[kHalfTile - 1], -half[2 * kHalfTile - 1]);
      Rows::store(turned[k], p, numbers);
      Rows::store(turned_times_i[k], p, Rows::times(numbers, 0.0F, 1.0F));
    }
  }
  for (int t = 0; t < kTileTokens; ++t) {
    TilePhasors phasors;
    find_token_phasors(bias, positions, t, phasors);
    Vec sums[Rows::kParts] = {};
    for (int k = 0; k < bias.count; ++k) {
      const int f = bias.pairs[k];
      const auto real = broadcast_float<Vec>(phasors.real[f]);
      const auto imaginary = broadcast_float<Vec>(phasors.imaginary[f]);
      for (int p = 0; p < Rows::kParts; ++p) {
        sums[p] = Rows::fused_lanes(Rows::load(turned[k], p), real, sums[p]);
        sums[p] = Rows::fused_lanes(Rows::load(turned_times_i[k], p), imaginary, sums[p]);
      }
    }
    alignas(64) float products[kFloats];
    for (int p = 0; p < Rows::kParts; ++p) Rows::store(products, p, sums[p]);
    for (int r = 0; r < rows; ++r) scores[r][t] = scores[r][t] + products[2 * r];
  }
}

// The bias of 64 consecutive positions from `first` on.
template <int kFloats>
TQAI_NEVER_INLINE void add_rope_in_order(const RopeBias& bias, std::int64_t first, int rows,
                                         float (*scores)[kTileTokens]) noexcept {
  TilePhasors phasors;
  find_phasors(bias, first, phasors);
  alignas(64) float turned[kFloats * (kMaxDim / 2 + kRopePowers)];
  const int count = turn_factors<kFloats>(bias, phasors, turned);
  int r = 0;
  if constexpr (kFloats >= 8) {
    for (; r + 4 <= rows; r += 4) add_rope_rows<4, kFloats>(bias, turned, count, r, scores);
  }
  switch (rows - r) {
    case 3: return add_rope_rows<3, kFloats>(bias, turned, count, r, scores);
    case 2: return add_rope_rows<2, kFloats>(bias, turned, count, r, scores);
    case 1: return add_rope_rows<1, kFloats>(bias, turned, count, r, scores);
    default: return;
  }
}

// Up to so many runs of consecutive positions in a tile take less time each on its own than token
// by token.
constexpr int kMostRuns = 16;

// The end of the run of consecutive positions that begins with token `from`.
inline int run_end(const std::int32_t* positions, int from) noexcept {
  int end = from + 1;
  while (end < kTileTokens && positions[end] == positions[end - 1] + 1) ++end;
  return end;
}

// The bias of runs of consecutive positions, as where several texts follow one another. Each one's
// is found for 64 positions.
TQAI_NEVER_INLINE void add_rope_by_runs(const RopeBias& bias, const std::int32_t* positions,
                                        int rows, float (*scores)[kTileTokens]) noexcept {
  alignas(64) float part[kMaxRows][kTileTokens];
  for (int from = 0; from < kTileTokens;) {
    const int end = run_end(positions, from);
    std::memset(part, 0, sizeof part);
    with_lanes(rows, [&]<int kFloats>() {
      add_rope_in_order<kFloats>(bias, positions[from], rows, part);
    });
    for (int r = 0; r < rows; ++r) {
      for (int t = from; t < end; ++t) scores[r][t] = scores[r][t] + part[r][t - from];
    }
    from = end;
  }
}

// Adds the bias of a tile to the rows' scores.
TQAI_INLINE void add_rope(const RopeBias& bias, const TilePositions& positions, int rows,
                          float (*scores)[kTileTokens]) noexcept {
  if (positions.each == nullptr) {
    return with_lanes(rows, [&]<int kFloats>() {
      add_rope_in_order<kFloats>(bias, positions.first, rows, scores);
    });
  }
  int runs = positions.sections == 1 ? 0 : kTileTokens;
  for (int t = 0; t < kTileTokens && runs <= kMostRuns; t = run_end(positions.each, t)) ++runs;
  if (runs <= kMostRuns) {
    add_rope_by_runs(bias, positions.each, rows, scores);
  } else {
    with_lanes(rows,
               [&]<int kFloats>() { add_rope_by_token<kFloats>(bias, positions, rows, scores); });
  }
}

}  // namespace TQAI_LOCAL
}  // namespace tqai::kernels::TQAI_LEVEL_NAMESPACE

#endif  // TQAI_ROPE_INL
