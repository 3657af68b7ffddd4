// The part of the scores that RoPE-centred keys leave out, for the 64 consecutive positions of a
// tile at once.
#pragma once

#include "kernels.hpp"
#include "numeric-inl.hpp"

namespace tqai::kernels {
namespace {

constexpr int kHalfTile = kTileTokens / 2;

// Around the middle of a tile, at 31.5 ± (j + 1/2), the cosines are even and the sines odd in the
// distance, so that 32 products serve 64 positions: scores += E[j] ∓ O[j] with E = Σ Re h · cos,
// O = Σ Im h · sin, h = factor · e^(i middle ω). Slow frequencies are one polynomial together.
struct TilePhasors {
  float real[kMaxDim / 2];
  float imaginary[kMaxDim / 2];
};

// Of all pairs, kept or not: contiguous loops cost less than picking.
inline void find_phasors(const RopeBias& bias, std::int64_t first_token,
                         TilePhasors& phasors) noexcept {
  const int pairs = bias.pair_count;
  const float* __restrict a = bias.tiles + first_token / kTileTokens * 2 * pairs;
  const float* __restrict b = a + pairs;
  const float* __restrict c = bias.offsets + first_token % kTileTokens * 2 * pairs;
  const float* __restrict d = c + pairs;
  for (int f = 0; f < pairs; ++f) {
    phasors.real[f] = fused(a[f], c[f], -(b[f] * d[f]));
    phasors.imaginary[f] = fused(a[f], d[f], b[f] * c[f]);
  }
}

// The bias of kRows rows; their factors are [kRows, 2, pair_count].
template <int kRows>
inline void add_rope_rows(const RopeBias& bias, const TilePhasors& phasors, const float* factors,
                          float (*scores)[kTileTokens]) noexcept {
  const int pairs = bias.pair_count;
  float real[kRows][kMaxDim / 2 + 8];  // and the powers'
  float imaginary[kRows][kMaxDim / 2 + 8];
  for (int r = 0; r < kRows; ++r) {
    const float* g = factors + static_cast<std::ptrdiff_t>(2 * r) * pairs;
    const float* h = g + pairs;
    for (int f = 0; f < pairs; ++f) {
      real[r][f] = fused(g[f], phasors.real[f], -(h[f] * phasors.imaginary[f]));
      imaginary[r][f] = fused(g[f], phasors.imaginary[f], h[f] * phasors.real[f]);
    }
  }
  if (bias.slow_count > 0) {
    EightPart even[kRows][kEightParts] = {};
    EightPart odd[kRows][kEightParts] = {};
    for (int k = 0; k < bias.slow_count; ++k) {
      const int f = bias.slow_pairs[k];
      const float* terms = bias.terms + static_cast<std::ptrdiff_t>(f) * 16;
      for (int p = 0; p < kEightParts; ++p) {
        const auto cosine = load_floats<EightPart>(terms + p * kEightLanes);
        const auto sine = load_floats<EightPart>(terms + 8 + p * kEightLanes);
        for (int r = 0; r < kRows; ++r) {
          even[r][p] = fused(broadcast_float<EightPart>(real[r][f]), cosine, even[r][p]);
          odd[r][p] = fused(broadcast_float<EightPart>(imaginary[r][f]), sine, odd[r][p]);
        }
      }
    }
    for (int r = 0; r < kRows; ++r) {
      for (int p = 0; p < kEightParts; ++p) {
        store_floats(real[r] + pairs + p * kEightLanes, even[r][p]);
        store_floats(imaginary[r] + pairs + p * kEightLanes, odd[r][p]);
      }
    }
  }
  alignas(64) float even_part[kRows][kHalfTile];
  alignas(64) float odd_part[kRows][kHalfTile];
  // Up to 16 sums at a time.
  constexpr int kVecs = kRows == 1 ? (kVectorLanes == 16 ? 2 : 4) : (kVectorLanes == 16 ? 2 : 1);
  for (int start = 0; start < kHalfTile; start += kVecs * kVectorLanes) {
    FloatVec even[kRows][kVecs] = {};
    FloatVec odd[kRows][kVecs] = {};
    for (int k = 0; k < bias.count; ++k) {
      const int f = bias.pairs[k];
      const float* table = bias.half + static_cast<std::ptrdiff_t>(f) * kTileTokens + start;
      for (int v = 0; v < kVecs; ++v) {
        const FloatVec cosines = load_floats(table + v * kVectorLanes);
        const FloatVec sines = load_floats(table + kHalfTile + v * kVectorLanes);
        for (int r = 0; r < kRows; ++r) {
          even[r][v] = fused(broadcast_float<FloatVec>(real[r][f]), cosines, even[r][v]);
          odd[r][v] = fused(broadcast_float<FloatVec>(imaginary[r][f]), sines, odd[r][v]);
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
    float* after = scores[r] + kHalfTile;
    float* before = scores[r] + kHalfTile - 1;
    for (int i = 0; i < kHalfTile; ++i) {
      after[i] = after[i] + (even_part[r][i] - odd_part[r][i]);
    }
    for (int i = 0; i < kHalfTile; ++i) {
      before[-i] = before[-i] + (even_part[r][i] + odd_part[r][i]);
    }
  }
}

// Adds the bias of a tile to the rows' scores.
void add_rope(const RopeBias& bias, std::int64_t first_token, int rows,
              float (*scores)[kTileTokens]) noexcept {
  TilePhasors phasors;
  find_phasors(bias, first_token, phasors);
  const std::ptrdiff_t row = 2 * static_cast<std::ptrdiff_t>(bias.pair_count);
  int r = 0;
  for (; r + 4 <= rows; r += 4) {
    add_rope_rows<4>(bias, phasors, bias.factors + r * row, scores + r);
  }
  switch (rows - r) {
    case 3: add_rope_rows<3>(bias, phasors, bias.factors + r * row, scores + r); break;
    case 2: add_rope_rows<2>(bias, phasors, bias.factors + r * row, scores + r); break;
    case 1: add_rope_rows<1>(bias, phasors, bias.factors + r * row, scores + r); break;
    default: break;
  }
}

}  // namespace
}  // namespace tqai::kernels
