// Attention over sealed tiles: the float part, around the level's integer one, `Integer`: its
// `prepare`, `score`, `accumulate`, `read_halves`, `round_weights`, `fetch`, `kQueryBytes`
// (integer-inl.hpp).
#ifndef TQAI_ATTEND_INL
#define TQAI_ATTEND_INL

#include "conversions-inl.hpp"
#include "fetch-inl.hpp"
#include "queries-inl.hpp"
#include "rope-inl.hpp"
#include "softmax-inl.hpp"

namespace tqai::kernels::TQAI_LEVEL_NAMESPACE {
namespace TQAI_LOCAL {

// Products of a weight of at most 1 and a value's norm that are too small to matter.
constexpr float kNegligibleProduct = 1e-22F;
static_assert(kLeastPower * kMaxHalf * 255.0F < 0.5F * kNegligibleProduct,
              "what is not seen must round to a weight of 0");

struct TileScratch {
  alignas(64) std::int32_t scores[2 * kMaxRows][kTileTokens];
  alignas(64) std::uint8_t weights[kMaxRows][kTileTokens];
  alignas(64) float key_norms[kTileTokens];
  alignas(64) float value_norms[kTileTokens];
  Block block;               // scores, then products of weights and the values' norms
  float inverses[kMaxRows];  // what brings a row's products to 0…255
  float units[kMaxRows];     // what one of a row's 8-bit weights stands for
  bool matter;               // whether any row's weights are more than negligible
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

// Products as weights of 8 bits, times the values. All rows' at once: the first ones' scales are
// known by then.
template <typename Integer>
inline void accumulate_tile(const SidePlan& values, const Softmax& softmax,
                            const std::uint8_t* tile, Ahead ahead, TileScratch& scratch) noexcept {
  if (!scratch.matter) return;
  for (int r = 0; r < softmax.rows; ++r) {
    Integer::round_weights(scratch.block.scores[r], scratch.inverses[r], scratch.weights[r]);
  }
  for (int s = 0; s < values.segment_count; ++s) {
    const SegmentPlan& segment = values.segments[s];
    float steps[kMaxRows];
    for (int r = 0; r < softmax.rows; ++r) steps[r] = scratch.units[r] * segment.step;
    Integer::accumulate(segment, tile + values.codes + segment.offset, scratch.weights[0], steps,
                        softmax.rows, softmax.output + segment.first, softmax.output_stride,
                        s == 0 ? ahead : Ahead{});
  }
}

// One head's tile, as its rows see it.
struct Tile {
  const std::uint8_t* data;
  const TileSpan& span;
  std::int64_t start;  // its first token among those given
  bool whole;          // Sight::whole
};

// Turns a row's scores into products of 2^(score − max) and the values' norms, in scratch.block,
// and finds their scale.
TQAI_HOT void weigh_row(const Softmax& softmax, int row, const Tile& tile, RowVecs& vecs,
                        TileScratch& scratch) noexcept {
  if (!tile.whole) limit(softmax, row, tile.start, tile.span.tokens, vecs);
  scratch.matter |= weigh_roughly(softmax, row, vecs);
  for (int v = 0; v < kRowVecs; ++v) {
    vecs[v] = vecs[v] * load_floats(scratch.value_norms + v * kVectorLanes);
  }
  store_row(scratch.block.scores[row], vecs);
  const float largest = largest_of(largest_parts(vecs));
  const float divisor = largest > kNegligibleProduct ? largest : kNegligibleProduct;
  scratch.units[row] = divisor * (1.0F / 255.0F);
  scratch.inverses[row] = 255.0F / divisor;
}

// The products of all of a head's rows.
template <typename Integer>
inline void weigh_tile(const TilePlan& plan, const HeadRows& head, const Tile& tile,
                       const NextTile& next, TileScratch& scratch) noexcept {
  const SidePlan& keys = plan.keys;
  const Softmax& softmax = head.softmax;
  const int rows = softmax.rows;
  const int terms = term_count(keys);
  // |sums|, |fine| ≤ 127 · 128 · padded: of up to 512 coordinates their sum stays below 2^31, and
  // of more it is taken in steps twice as large.
  const bool wide = keys.padded > 512;
  const float unit = terms == 2 && wide ? 2.0F : 1.0F;
  const QuerySegment* queries = query_segments(head.queries);
  const std::uint8_t* words = query_words(head.queries, keys);
  Fetch fetch = fetch_of(next.with_rows, rows);
  scratch.matter = false;
  for (int s = 0; s < keys.segment_count; ++s) {
    const SegmentPlan& segment = keys.segments[s];
    Integer::score(segment, tile.data + keys.codes + segment.offset, words, queries[s].constants,
                   terms * rows, scratch.scores[0], s == 0 ? next.with_keys : Ahead{});
    if (s == 0) {  // norms lie last in a tile, and are the last to be fetched
      Integer::read_halves(tile.data + keys.norms, scratch.key_norms);
      Integer::read_halves(tile.data + plan.values.norms, scratch.value_norms);
    }
    words += word_bytes<Integer>(segment, rows, terms);
    const bool last = s + 1 == keys.segment_count && head.rope.count == 0;
    for (int r = 0; r < rows; ++r) {
      std::int32_t* sums = scratch.scores[terms * r];
      if (terms == 2) {
        const std::int32_t* fine = scratch.scores[2 * r + 1];
        if (wide) {
          for (int t = 0; t < kTileTokens; ++t) sums[t] = kTermRatio / 2 * sums[t] + (fine[t] >> 1);
        } else {
          for (int t = 0; t < kTileTokens; ++t) sums[t] = kTermRatio * sums[t] + fine[t];
        }
      }
      RowVecs vecs;
      if (s == 0) {
        fill_row(head.centre_scores[r], vecs);
      } else {
        load_row(scratch.block.scores[r], vecs);
      }
      add_products(sums, unit * queries[s].steps[r] * segment.step, scratch.key_norms, vecs);
      if (last) {
        weigh_row(softmax, r, tile, vecs, scratch);
        Integer::fetch(fetch);
      } else {
        store_row(scratch.block.scores[r], vecs);
      }
    }
  }
  if (head.rope.count == 0) return;
  add_rope(head.rope, tile.span.positions, rows, scratch.block.scores);
  for (int r = 0; r < rows; ++r) {
    RowVecs vecs;
    load_row(scratch.block.scores[r], vecs);
    weigh_row(softmax, r, tile, vecs, scratch);
    Integer::fetch(fetch);
  }
}

template <typename Integer>
void attend_tiles(const AttendTiles& args) noexcept {
  Sight sights[kMaxHeads];
  for (int h = 0; h < args.head_count; ++h) sights[h] = Sight(args.heads[h].softmax);
  TileScratch scratch;
  const std::size_t bytes = args.plan->bytes;
  const FetchShares shares(bytes, args.heads[0].softmax.rows);
  std::int64_t start = 0;
  for (std::int64_t i = 0; i < args.span_count; ++i) {
    const TileSpan& span = args.spans[i];
    for (int h = 0; h < args.head_count; ++h) {
      if (!sights[h].any(start, span.tokens)) continue;
      const HeadRows& head = args.heads[h];
      // The next head's of this span, or the first one's of the next.
      const bool last = h + 1 == args.head_count;
      const TileSpan* next_span = !last ? &span : i + 1 < args.span_count ? &span + 1 : nullptr;
      const int next_head = args.heads[last ? 0 : h + 1].head;
      const bool fetch = next_span != nullptr && (last || next_head != head.head);
      const std::uint8_t* next =
          fetch ? next_span->tiles + static_cast<std::size_t>(next_head) * bytes : nullptr;
      const Tile tile{span.tiles + static_cast<std::size_t>(head.head) * bytes, span, start,
                      sights[h].whole(start, span.tokens)};
      const NextTile ahead(next, shares);
      weigh_tile<Integer>(*args.plan, head, tile, ahead, scratch);
      accumulate_tile<Integer>(args.plan->values, head.softmax, tile.data, ahead.with_values,
                               scratch);
    }
    start += span.tokens;
  }
}

}  // namespace TQAI_LOCAL
}  // namespace tqai::kernels::TQAI_LEVEL_NAMESPACE

#endif  // TQAI_ATTEND_INL
