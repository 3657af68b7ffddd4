// Attention over sealed tiles: the float part, around the level's integer kernels `score` and
// `accumulate`.
#pragma once

#include <cmath>

#include "rope-inl.hpp"
#include "softmax-inl.hpp"

namespace tqai::kernels {
namespace {

// Query rows as int8 in one term, q ≈ step · a, or two, q ≈ step · (kTermRatio · a + b). After the
// rotation one term is off by about 0.7 % of the query's length, next to the 10 % that 4-bit keys
// are off: half a percent more error energy. Finer keys deserve the second term, which costs as
// much time as the first.
constexpr int kTermRatio = 254;
constexpr int kOneTermBits = 4;

inline int term_count(const SidePlan& keys) noexcept {
  for (int s = 0; s < keys.segment_count; ++s) {
    if (keys.segments[s].bits > kOneTermBits) return 2;
  }
  return 1;
}

struct QueryTerms {
  alignas(64) std::int8_t terms[2 * kMaxRows * kMaxDim];  // [rows, terms, count] a segment
  float steps[kMaxRows];
};

// queries: [rows, stride]; the segment's coordinates of the block.
inline void split_queries(const float* queries, std::int64_t stride, int rows, int term_count,
                          const SegmentPlan& segment, std::int8_t* terms, float* steps) noexcept {
  for (int r = 0; r < rows; ++r) {
    const float* q = queries + r * stride + segment.first;
    float largest = 0.0F;
    for (int c = 0; c < segment.count; ++c) {
      const float magnitude = q[c] < 0.0F ? -q[c] : q[c];
      largest = magnitude > largest ? magnitude : largest;
    }
    const float unit = largest / 127.0F;
    const float inverse = unit > 0.0F ? 127.0F / largest : 0.0F;
    std::int8_t* coarse = terms + static_cast<std::ptrdiff_t>(r * term_count) * segment.count;
    for (int c = 0; c < segment.count; ++c) {
      const float scaled = q[c] * inverse;
      const auto a = static_cast<std::int32_t>(scaled + (scaled < 0.0F ? -0.5F : 0.5F));
      coarse[c] = static_cast<std::int8_t>(a);
      if (term_count == 1) continue;
      const float rest = (scaled - static_cast<float>(a)) * static_cast<float>(kTermRatio);
      const auto b = static_cast<std::int32_t>(rest + (rest < 0.0F ? -0.5F : 0.5F));
      coarse[segment.count + c] = static_cast<std::int8_t>(b);
    }
    steps[r] = term_count == 1 ? unit : unit / static_cast<float>(kTermRatio);
  }
}

// Weights of one row, times the values' norms, as 8 bits. Returns their unit.
inline float quantise_weights(const float* __restrict p, const float* __restrict norms,
                              std::uint8_t* __restrict weights) noexcept {
  alignas(64) float products[kTileTokens];
  for (int t = 0; t < kTileTokens; ++t) products[t] = p[t] * norms[t];
  float lanes[kLanes];
  for (int i = 0; i < kLanes; ++i) lanes[i] = products[i];
  for (int t = kLanes; t < kTileTokens; t += kLanes) {
    for (int i = 0; i < kLanes; ++i) {
      lanes[i] = products[t + i] > lanes[i] ? products[t + i] : lanes[i];
    }
  }
  const float largest = max_lanes(lanes);
  if (!(largest > 1e-30F)) {  // too small to matter, and 255 / largest would overflow
    for (int t = 0; t < kTileTokens; ++t) weights[t] = 0;
    return 0.0F;
  }
  const float inverse = 255.0F / largest;
  for (int t = 0; t < kTileTokens; ++t) {
    weights[t] = static_cast<std::uint8_t>(static_cast<std::int32_t>(products[t] * inverse + 0.5F));
  }
  return largest / 255.0F;
}

struct TileScratch {
  QueryTerms queries;
  alignas(64) std::int32_t scores[2 * kMaxRows][kTileTokens];
  alignas(64) std::int32_t sums[kMaxRows * kMaxDim];
  alignas(64) std::uint8_t weights[kMaxRows][kTileTokens];
  alignas(64) float norms[kTileTokens];
  Block block;
};

inline void read_norms(const std::uint8_t* tile, const SidePlan& side, float* norms) noexcept {
  std::uint16_t halves[kTileTokens];
  std::memcpy(halves, tile + side.norms, sizeof halves);
  for (int t = 0; t < kTileTokens; ++t) norms[t] = half_lane(halves[t]);
}

// q·k for all rows and tokens of the tile into scratch.block.
template <auto kScore>
inline void score_tile(const AttendTiles& args, const TileSpan& span, int terms,
                       TileScratch& scratch, const float* const steps[]) noexcept {
  const SidePlan& side = args.plan->keys;
  const std::uint8_t* tile = span.tile;
  const int rows = args.softmax.rows;
  const SidePlan& values = args.plan->values;
  const Ahead ahead = {tile + values.codes, args.plan->bytes - values.codes};
  std::ptrdiff_t at = 0;
  for (int s = 0; s < side.segment_count; ++s) {
    const SegmentPlan& segment = side.segments[s];
    kScore(segment, tile + side.codes + segment.offset, scratch.queries.terms + at, terms * rows,
           scratch.scores[0], s == 0 ? ahead : Ahead{});
    at += static_cast<std::ptrdiff_t>(terms * rows) * segment.count;
    for (int r = 0; r < rows; ++r) {
      const std::int32_t* sums = scratch.scores[terms * r];
      if (terms == 2) {
        // |sums|, |fine| ≤ 127 · 128 · 512: their sum stays below 2^31.
        const std::int32_t* fine = scratch.scores[2 * r + 1];
        for (int t = 0; t < kTileTokens; ++t) {
          scratch.scores[2 * r][t] = kTermRatio * sums[t] + fine[t];
        }
      }
      const float step = steps[s][r] * segment.step;
      float* scores = scratch.block.scores[r];
      if (s == 0) {
        for (int t = 0; t < kTileTokens; ++t) scores[t] = static_cast<float>(sums[t]) * step;
      } else {
        for (int t = 0; t < kTileTokens; ++t) {
          scores[t] = scores[t] + static_cast<float>(sums[t]) * step;
        }
      }
    }
  }
  read_norms(tile, side, scratch.norms);
  for (int r = 0; r < rows; ++r) {
    float* scores = scratch.block.scores[r];
    const float centre = args.centre_scores[r];
    for (int t = 0; t < kTileTokens; ++t) scores[t] = scores[t] * scratch.norms[t] + centre;
  }
  if (args.rope.count > 0) add_rope(args.rope, span.first_token, rows, scratch.block.scores);
}

template <auto kAccumulate>
inline void accumulate_tile(const AttendTiles& args, const std::uint8_t* tile, Ahead ahead,
                            TileScratch& scratch) noexcept {
  const SidePlan& side = args.plan->values;
  const Softmax& softmax = args.softmax;
  float units[kMaxRows];
  bool any = false;
  read_norms(tile, side, scratch.norms);
  for (int r = 0; r < softmax.rows; ++r) {
    units[r] = quantise_weights(scratch.block.scores[r], scratch.norms, scratch.weights[r]);
    any = any || units[r] > 0.0F;
  }
  if (!any) return;
  for (int s = 0; s < side.segment_count; ++s) {
    const SegmentPlan& segment = side.segments[s];
    kAccumulate(segment, tile + side.codes + segment.offset, scratch.weights[0], softmax.rows,
                scratch.sums, s == 0 ? ahead : Ahead{});
    for (int r = 0; r < softmax.rows; ++r) {
      const float unit = units[r] * segment.step;
      const std::int32_t* sums = scratch.sums + static_cast<std::ptrdiff_t>(r) * segment.count;
      float* output = softmax.output + r * softmax.output_stride + segment.first;
      for (int c = 0; c < segment.count; ++c) {
        output[c] = output[c] + static_cast<float>(sums[c]) * unit;
      }
    }
  }
}

// Segments are at least 16 coordinates.
constexpr int kMaxSegments = kMaxDim / kCoordinateBlock;

template <auto kScore, auto kAccumulate>
void attend_tiles(const AttendTiles& args) noexcept {
  const SidePlan& keys = args.plan->keys;
  const int rows = args.softmax.rows;
  TileScratch scratch;
  float steps[kMaxSegments][kMaxRows];
  const float* step_rows[kMaxSegments];
  const int terms = term_count(keys);
  std::ptrdiff_t at = 0;
  for (int s = 0; s < keys.segment_count; ++s) {
    split_queries(args.queries, keys.padded, rows, terms, keys.segments[s],
                  scratch.queries.terms + at, steps[s]);
    step_rows[s] = steps[s];
    at += static_cast<std::ptrdiff_t>(terms * rows) * keys.segments[s].count;
  }
  std::int64_t start = 0;
  for (std::int64_t i = 0; i < args.tile_count; ++i) {
    const TileSpan& span = args.tiles[i];
    if (sees(args.softmax, start, span.tokens)) {
      score_tile<kScore>(args, span, terms, scratch, step_rows);
      for (int r = 0; r < rows; ++r) {
        weigh(args.softmax, r, start, span.tokens, scratch.block.scores[r]);
      }
      const Ahead ahead = i + 1 < args.tile_count
                              ? Ahead{args.tiles[i + 1].tile, args.plan->values.codes}
                              : Ahead{};
      accumulate_tile<kAccumulate>(args, span.tile, ahead, scratch);
    }
    start += span.tokens;
  }
}

}  // namespace
}  // namespace tqai::kernels
