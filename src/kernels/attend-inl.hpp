// Attention over sealed tiles: the float part, around the level's integer one, `Integer`: its
// `prepare`, `score` and `accumulate` (integer-inl.hpp), `read_halves` and `round_weights`.
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

// Largest queries of a row, and products of a weight of at most 1 and a value's norm, that are too
// small to matter; the inverse of what is larger is finite.
constexpr float kNegligible = 1e-30F;

constexpr int kOneTermBits = 4;

inline int term_count(const SidePlan& keys) noexcept {
  for (int s = 0; s < keys.segment_count; ++s) {
    if (keys.segments[s].bits > kOneTermBits) return 2;
  }
  return 1;
}

// coarse = q · inverse to the nearest integer. A function, as only for parameters compilers heed
// __restrict.
inline void round_queries(const float* __restrict q, float inverse, int count,
                          std::int8_t* __restrict coarse) noexcept {
  for (int c = 0; c < count; ++c) coarse[c] = static_cast<std::int8_t>(round_lane(q[c] * inverse));
}

// What that leaves, in steps kTermRatio times finer.
inline void round_rests(const float* __restrict q, float inverse, int count,
                        const std::int8_t* __restrict coarse,
                        std::int8_t* __restrict fine) noexcept {
  for (int c = 0; c < count; ++c) {
    const float rest = q[c] * inverse - static_cast<float>(coarse[c]);
    fine[c] = static_cast<std::int8_t>(round_lane(rest * static_cast<float>(kTermRatio)));
  }
}

// queries: [rows, stride]; the segment's coordinates of the block.
inline void split_queries(const float* queries, std::int64_t stride, int rows, int term_count,
                          const SegmentPlan& segment, std::int8_t* terms, float* steps) noexcept {
  for (int r = 0; r < rows; ++r) {
    const float* q = queries + r * stride + segment.first;
    const float largest = largest_magnitude(q, segment.count);
    const float unit = largest / 127.0F;
    const float inverse = largest > kNegligible ? 127.0F / largest : 0.0F;
    std::int8_t* coarse = terms + static_cast<std::ptrdiff_t>(r * term_count) * segment.count;
    round_queries(q, inverse, segment.count, coarse);
    if (term_count == 2) {
      round_rests(q, inverse, segment.count, coarse, coarse + segment.count);
    }
    steps[r] = term_count == 1 ? unit : unit / static_cast<float>(kTermRatio);
  }
}

// weights = inverse · products, to the nearest integer. products: 64 numbers, inverse times which
// is 0…255.
inline void round_weights(const float* __restrict products, float inverse,
                          std::uint8_t* __restrict weights) noexcept {
  for (int t = 0; t < kTileTokens; ++t) {
    weights[t] =
        static_cast<std::uint8_t>(static_cast<std::int32_t>(fused(products[t], inverse, 0.5F)));
  }
}

// Fetches what is ahead a few lines at a time: dozens at once stall the loads that are needed now.
struct Fetch {
  const std::uint8_t* next;
  const std::uint8_t* end;
  std::ptrdiff_t bytes;  // a step

  template <typename Ops>
  void step() noexcept {
    const std::uint8_t* until = end - next < bytes ? end : next + bytes;
    for (; next < until; next += kLineBytes) Ops::prefetch(next);
  }
};

inline Fetch fetch_of(Ahead ahead, int steps) noexcept {
  const int lines = static_cast<int>(ahead.bytes / kLineBytes);
  return {ahead.data, ahead.data + ahead.bytes,
          std::ptrdiff_t{kLineBytes} * ((lines + steps - 1) / steps)};
}

// Segments are at least 16 coordinates.
constexpr int kMaxSegments = kMaxDim / kCoordinateBlock;

// The integer queries of all rows.
template <typename Integer>
struct PreparedQueries {
  struct Segment {
    const std::uint8_t* words;
    std::int32_t bias[2 * kMaxRows];
    float steps[kMaxRows];
  };

  int terms;
  Segment segments[kMaxSegments];
  alignas(64) std::uint8_t words[2 * kMaxRows * kMaxDim * Integer::kQueryBytes];

  PreparedQueries(const SidePlan& keys, const float* queries, int rows) noexcept
      : terms(term_count(keys)) {
    alignas(64) std::int8_t split[2 * kMaxRows * kMaxDim];  // [rows, terms, count]
    std::uint8_t* next = words;
    for (int s = 0; s < keys.segment_count; ++s) {
      const SegmentPlan& segment = keys.segments[s];
      split_queries(queries, keys.padded, rows, terms, segment, split, segments[s].steps);
      segments[s].words = next;
      Integer::prepare(segment, split, terms * rows, next, segments[s].bias);
      next += static_cast<std::ptrdiff_t>(terms * rows) * segment.count * Integer::kQueryBytes;
    }
  }
};

struct TileScratch {
  alignas(64) std::int32_t scores[2 * kMaxRows][kTileTokens];
  alignas(64) std::uint8_t weights[kMaxRows][kTileTokens];
  alignas(64) float key_norms[kTileTokens];
  alignas(64) float value_norms[kTileTokens];
  alignas(64) FloatVec parts[kMaxRows] = {};  // whose lanes hold a row's largest product
  Block block;
};

// One segment's part of a row's q·k, added to `vecs`.
inline void add_products(const std::int32_t* sums, float step, const float* norms,
                         RowVecs& vecs) noexcept {
  for (int v = 0; v < kRowVecs; ++v) {
    const FloatVec products =
        load_converted(sums + v * kVectorLanes) * broadcast_float<FloatVec>(step);
    vecs[v] = fused(products, load_floats(norms + v * kVectorLanes), vecs[v]);
  }
}

// q·k for all rows and tokens of the tile into scratch.block.
template <typename Integer>
inline void score_tile(const AttendTiles& args, const TileSpan& span, Ahead ahead,
                       const PreparedQueries<Integer>& queries, TileScratch& scratch) noexcept {
  const SidePlan& side = args.plan->keys;
  const std::uint8_t* tile = span.tile;
  const int rows = args.softmax.rows;
  const int terms = queries.terms;
  Integer::read_halves(tile + side.norms, scratch.key_norms);
  for (int s = 0; s < side.segment_count; ++s) {
    const SegmentPlan& segment = side.segments[s];
    const auto& prepared = queries.segments[s];
    Integer::score(segment, tile + side.codes + segment.offset, prepared.words, prepared.bias,
                   terms * rows, scratch.scores[0], s == 0 ? ahead : Ahead{});
    for (int r = 0; r < rows; ++r) {
      std::int32_t* sums = scratch.scores[terms * r];
      if (terms == 2) {
        // |sums|, |fine| ≤ 127 · 128 · 512: their sum stays below 2^31.
        const std::int32_t* fine = scratch.scores[2 * r + 1];
        for (int t = 0; t < kTileTokens; ++t) sums[t] = kTermRatio * sums[t] + fine[t];
      }
      RowVecs vecs;
      if (s == 0) {
        fill_row(args.centre_scores[r], vecs);
      } else {
        load_row(scratch.block.scores[r], vecs);
      }
      add_products(sums, prepared.steps[r] * segment.step, scratch.key_norms, vecs);
      store_row(scratch.block.scores[r], vecs);
    }
  }
  if (args.rope.count > 0) add_rope(args.rope, span.first_token, rows, scratch.block.scores);
}

// What brings each row's products to 0…255, and the unit of that.
inline void scale_weights(const float* __restrict largest, int rows, float* __restrict inverses,
                          float* __restrict units) noexcept {
  for (int r = 0; r < rows; ++r) {
    const float divisor = largest[r] > kNegligible ? largest[r] : kNegligible;
    inverses[r] = 255.0F / divisor;
    units[r] = divisor * (1.0F / 255.0F);
  }
}

// Weights of all rows, times the values' norms, as 8 bits; units: theirs. Whether any matters.
// scratch.parts and .block: the products.
template <typename Integer>
inline bool quantise_weights(int rows, TileScratch& scratch, float (&units)[kMaxRows]) noexcept {
  float largest[kMaxRows];
  largest_lanes(scratch.parts, rows, largest);
  float inverses[kMaxRows];
  scale_weights(largest, rows, inverses, units);
  for (int r = 0; r < rows; ++r) {
    Integer::round_weights(scratch.block.scores[r], inverses[r], scratch.weights[r]);
  }
  return std::any_of(largest, largest + rows, [](float x) { return x > kNegligible; });
}

template <typename Integer>
inline void accumulate_tile(const AttendTiles& args, const std::uint8_t* tile, Ahead ahead,
                            TileScratch& scratch) noexcept {
  const SidePlan& side = args.plan->values;
  const Softmax& softmax = args.softmax;
  float units[kMaxRows];
  if (!quantise_weights<Integer>(softmax.rows, scratch, units)) return;
  for (int s = 0; s < side.segment_count; ++s) {
    const SegmentPlan& segment = side.segments[s];
    float steps[kMaxRows];
    for (int r = 0; r < softmax.rows; ++r) steps[r] = units[r] * segment.step;
    Integer::accumulate(segment, tile + side.codes + segment.offset, scratch.weights[0], steps,
                        softmax.rows, softmax.output + segment.first, softmax.output_stride,
                        s == 0 ? ahead : Ahead{});
  }
}

// Kernels::score.
template <typename Integer>
void score(const SegmentPlan& segment, const std::uint8_t* codes, const std::int8_t* queries,
           int rows, std::int32_t* scores, Ahead ahead) noexcept {
  alignas(64) std::uint8_t words[kMaxRows * kMaxDim * Integer::kQueryBytes];
  std::int32_t bias[kMaxRows];
  for (int first = 0; first < rows; first += kMaxRows) {
    const int block = std::min(kMaxRows, rows - first);
    Integer::prepare(segment, queries + static_cast<std::ptrdiff_t>(first) * segment.count, block,
                     words, bias);
    Integer::score(segment, codes, words, bias, block,
                   scores + static_cast<std::ptrdiff_t>(first) * kTileTokens, ahead);
  }
}

template <typename Integer>
void attend_tiles(const AttendTiles& args) noexcept {
  const PreparedQueries<Integer> queries(args.plan->keys, args.queries, args.softmax.rows);
  const Sight sight(args.softmax);
  TileScratch scratch;
  std::int64_t start = 0;
  for (std::int64_t i = 0; i < args.tile_count; ++i) {
    const TileSpan& span = args.tiles[i];
    if (sight.any(start, span.tokens)) {
      const bool whole = sight.whole(start, span.tokens);
      // A whole tile ahead, as half of one is too late for what comes from memory; and evenly over
      // the time that this one takes, where one block holds its rows: processors keep track of 10
      // to 16 lines, and then wait.
      Ahead with_keys;
      Ahead with_rows;
      Ahead with_values;
      if (i + 1 < args.tile_count) {
        const std::uint8_t* next = args.tiles[i + 1].tile;
        const std::size_t lines = args.plan->bytes / kLineBytes;
        const std::size_t rows = lines * static_cast<std::size_t>(args.softmax.rows - 1) /
                                 static_cast<std::size_t>(2 * args.softmax.rows);
        const std::size_t keys = (lines - rows) / 2;
        with_keys = {next, keys * kLineBytes};
        with_rows = {next + keys * kLineBytes, rows * kLineBytes};
        with_values = {next + (keys + rows) * kLineBytes, (lines - keys - rows) * kLineBytes};
      }
      score_tile(args, span, with_keys, queries, scratch);
      Fetch fetch = fetch_of(with_rows, args.softmax.rows);
      Integer::read_halves(span.tile + args.plan->values.norms, scratch.value_norms);
      for (int r = 0; r < args.softmax.rows; ++r) {
        RowVecs vecs;
        load_row(scratch.block.scores[r], vecs);
        if (!whole) limit(args.softmax, r, start, span.tokens, vecs);
        weigh(args.softmax, r, vecs);
        for (int v = 0; v < kRowVecs; ++v) {
          vecs[v] = vecs[v] * load_floats(scratch.value_norms + v * kVectorLanes);
        }
        store_row(scratch.block.scores[r], vecs);
        scratch.parts[r] = largest_parts(vecs);
        Integer::fetch(fetch);
      }
      accumulate_tile<Integer>(args, span.tile, with_values, scratch);
    }
    start += span.tokens;
  }
}

}  // namespace
}  // namespace tqai::kernels
