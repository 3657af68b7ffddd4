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
// O = Σ Im h · sin, h = factor · e^(i middle ω).
struct TilePhasors {
  float real[kMaxDim / 2];
  float imaginary[kMaxDim / 2];
};

inline void find_phasors(const RopeBias& bias, std::int64_t first_token,
                         TilePhasors& phasors) noexcept {
  const std::int64_t row = 2 * static_cast<std::int64_t>(bias.pair_count);
  const float* tile = bias.tiles + first_token / kTileTokens * row;
  const float* offset = bias.offsets + first_token % kTileTokens * row;
  for (int k = 0; k < bias.count; ++k) {
    const int f = bias.pairs[k];
    const float a = tile[f];
    const float b = tile[bias.pair_count + f];
    const float c = offset[f];
    const float d = offset[bias.pair_count + f];
    phasors.real[k] = a * c - b * d;
    phasors.imaginary[k] = a * d + b * c;
  }
}

// The bias of kRows rows; their factors are [kRows, 2, count].
template <int kRows>
inline void add_rope_rows(const RopeBias& bias, const TilePhasors& phasors, const float* factors,
                          float (*scores)[kTileTokens]) noexcept {
  float real[kRows][kMaxDim / 2];
  float imaginary[kRows][kMaxDim / 2];
  for (int r = 0; r < kRows; ++r) {
    const float* g = factors + static_cast<std::ptrdiff_t>(2 * r) * bias.count;
    const float* h = g + bias.count;
    for (int k = 0; k < bias.count; ++k) {
      real[r][k] = g[k] * phasors.real[k] - h[k] * phasors.imaginary[k];
      imaginary[r][k] = g[k] * phasors.imaginary[k] + h[k] * phasors.real[k];
    }
  }
  // Up to 16 sums at a time.
  constexpr int kVecs = kRows == 1 ? (kVectorLanes == 16 ? 2 : 4) : (kVectorLanes == 16 ? 2 : 1);
  for (int start = 0; start < kHalfTile; start += kVecs * kVectorLanes) {
    FloatVec even[kRows][kVecs] = {};
    FloatVec odd[kRows][kVecs] = {};
    for (int k = 0; k < bias.count; ++k) {
      const float* table =
          bias.half + static_cast<std::ptrdiff_t>(bias.pairs[k]) * kTileTokens + start;
      for (int v = 0; v < kVecs; ++v) {
        const FloatVec cosines = load_floats(table + v * kVectorLanes);
        const FloatVec sines = load_floats(table + kHalfTile + v * kVectorLanes);
        for (int r = 0; r < kRows; ++r) {
          even[r][v] = even[r][v] + real[r][k] * cosines;
          odd[r][v] = odd[r][v] + imaginary[r][k] * sines;
        }
      }
    }
    for (int r = 0; r < kRows; ++r) {
      for (int v = 0; v < kVecs; ++v) {
        float cosine_part[kVectorLanes];
        float sine_part[kVectorLanes];
        store_floats(cosine_part, even[r][v]);
        store_floats(sine_part, odd[r][v]);
        float* after = scores[r] + kHalfTile + start + v * kVectorLanes;
        float* before = scores[r] + kHalfTile - 1 - start - v * kVectorLanes;
        for (int i = 0; i < kVectorLanes; ++i) {
          after[i] = after[i] + (cosine_part[i] - sine_part[i]);
        }
        for (int i = 0; i < kVectorLanes; ++i) {
          before[-i] = before[-i] + (cosine_part[i] + sine_part[i]);
        }
      }
    }
  }
}

// Adds the bias of a tile to the rows' scores.
void add_rope(const RopeBias& bias, std::int64_t first_token, int rows,
              float (*scores)[kTileTokens]) noexcept {
  TilePhasors phasors;
  find_phasors(bias, first_token, phasors);
  const std::ptrdiff_t row = 2 * static_cast<std::ptrdiff_t>(bias.count);
  int r = 0;
  for (; r + 4 <= rows; r += 4) {
    add_rope_rows<4>(bias, phasors, bias.factors + r * row, scores + r);
  }
  for (; r + 2 <= rows; r += 2) {
    add_rope_rows<2>(bias, phasors, bias.factors + r * row, scores + r);
  }
  if (r < rows) add_rope_rows<1>(bias, phasors, bias.factors + r * row, scores + r);
}

}  // namespace
}  // namespace tqai::kernels
