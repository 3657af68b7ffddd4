// Attention over sealed tiles: the float part, around the level's integer one, `Integer`: its
// `prepare`, `decode_keys`, `decode_values`, `score`, `accumulate`, `read_halves`, `round_weights`,
// `fetch`, `kQueryBytes` (integer-inl.hpp).
#ifndef TQAI_ATTEND_INL
#define TQAI_ATTEND_INL

#include "conversions-inl.hpp"
#include "decoded-inl.hpp"
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

// Two terms' sums of a row as one, in the place of the coarse one's. wide: in steps twice as large.
inline void join_terms(std::int32_t* sums, const std::int32_t* fine, bool wide) noexcept {
  if (wide) {
    for (int t = 0; t < kTileTokens; ++t) sums[t] = kTermRatio / 2 * sums[t] + (fine[t] >> 1);
  } else {
    for (int t = 0; t < kTileTokens; ++t) sums[t] = kTermRatio * sums[t] + fine[t];
  }
}

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
TQAI_ALWAYS_INLINE void weigh_row(const Softmax& softmax, int row, const Tile& tile,
                                  RowVecs (&rows)[1], TileScratch& scratch) noexcept {
  RowVecs& vecs = rows[0];
  if (!tile.whole) limit(softmax, row, tile.start, tile.span.tokens, vecs);
  scratch.matter |= weigh_roughly(softmax, row, rows);
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
      if (terms == 2) join_terms(sums, scratch.scores[2 * r + 1], wide);
      RowVecs one[1];
      RowVecs& vecs = one[0];
      if (s == 0) {
        fill_row(head.centre_scores[r], vecs);
      } else {
        load_row(scratch.block.scores[r], vecs);
      }
      add_products(sums, unit * queries[s].steps[r] * segment.step, scratch.key_norms, vecs);
      if (last) {
        weigh_row(softmax, r, tile, one, scratch);
        Integer::fetch(fetch);
      } else {
        store_row(scratch.block.scores[r], vecs);
      }
    }
  }
  if (head.rope.count == 0) return;
  add_rope(head.rope, tile.span.positions, rows, scratch.block.scores);
  for (int r = 0; r < rows; ++r) {
    RowVecs one[1];
    RowVecs& vecs = one[0];
    load_row(scratch.block.scores[r], vecs);
    weigh_row(softmax, r, tile, one, scratch);
    Integer::fetch(fetch);
  }
}

// The same of several sets of a head's rows. What one of them waits for, when a step ends, the
// others compute meanwhile. One set alone takes up to a tenth longer this way than by the loops
// above.

// Of one set of a head's rows, and of all that go through a tile together.
struct RowsScratch {
  alignas(64) std::int32_t scores[2 * kMaxRows][kTileTokens];
  alignas(64) std::uint8_t weights[kMaxRows][kTileTokens];
  Block block;  // scores, then products of weights and the values' norms
  alignas(64) float largest[kMaxRows][kVectorLanes];  // of a row's products, in parts
  float inverses[kMaxRows];                           // what brings a row's products to 0…255
  float units[kMaxRows];  // what one of a row's 8-bit weights stands for
  bool whole;             // Sight::whole
  bool matter;            // whether any row's weights are more than negligible
};

struct SetsScratch {
  alignas(64) float key_norms[kTileTokens];
  alignas(64) float value_norms[kTileTokens];
  RowsScratch rows[kMaxTogether];
  alignas(64) std::uint8_t decoded[kDecodedBytes];  // of a segment's keys, then of values
};

// What 8-bit weights stand for. Not while rows are weighed: the next one would wait for what waits
// for the largest of this one.
inline void find_units(int rows, RowsScratch& scratch) noexcept {
  float divisors[kMaxRows];
  std::fill_n(divisors, kMaxRows, kNegligibleProduct);
  for (int r = 0; r < rows; ++r) divisors[r] = largest_of(load_floats(scratch.largest[r]));
  for (int r = 0; r < kMaxRows; ++r) {  // of all at once
    const float divisor = divisors[r] > kNegligibleProduct ? divisors[r] : kNegligibleProduct;
    scratch.units[r] = divisor * (1.0F / 255.0F);
    scratch.inverses[r] = 255.0F / divisor;
  }
}

// Products as weights of 8 bits.
template <typename Integer>
inline void round_set(const Softmax& softmax, RowsScratch& scratch) noexcept {
  if (!scratch.matter) return;
  find_units(softmax.rows, scratch);
  for (int r = 0; r < softmax.rows; ++r) {
    Integer::round_weights(scratch.block.scores[r], scratch.inverses[r], scratch.weights[r]);
  }
}

// Weights times the values, of `count` HeadRows of one head.
template <typename Integer>
inline void accumulate_sets(const SidePlan& values, const HeadRows* const* heads, int count,
                            const std::uint8_t* tile, Ahead ahead, SetsScratch& scratch) noexcept {
  int all_rows = 0;
  for (int h = 0; h < count; ++h) {
    if (scratch.rows[h].matter) all_rows += heads[h]->softmax.rows;
  }
  for (int s = 0; s < values.segment_count; ++s) {
    const SegmentPlan& segment = values.segments[s];
    const std::uint8_t* codes = tile + values.codes + segment.offset;
    const std::uint8_t* decoded = Integer::decode_values(segment, codes, all_rows, scratch.decoded);
    for (int h = 0; h < count; ++h) {
      const RowsScratch& own = scratch.rows[h];
      if (!own.matter) continue;
      const Softmax& softmax = heads[h]->softmax;
      float steps[kMaxRows];
      for (int r = 0; r < softmax.rows; ++r) steps[r] = own.units[r] * segment.step;
      float* output = softmax.output + segment.first;
      if (decoded != nullptr) {
        Integer::accumulate_decoded(segment, decoded, own.weights[0], steps, softmax.rows, output,
                                    softmax.output_stride, ahead);
      } else {
        Integer::accumulate(segment, codes, own.weights[0], steps, softmax.rows, output,
                            softmax.output_stride, ahead);
      }
      ahead = {};
    }
  }
}

// One head's tile.
struct SharedTile {
  const std::uint8_t* data;
  const TileSpan& span;
  std::int64_t start;  // its first token among those given
};

// `limit` of rows `row` and on. Out of the way: inside, it has compilers keep rows in memory.
template <int kRows>
TQAI_NEVER_INLINE void limit_in_memory(const Softmax& softmax, int row, const SharedTile& tile,
                                       float (*scores)[kTileTokens]) noexcept {
  for (int r = 0; r < kRows; ++r) {
    RowVecs vecs;
    load_row(scores[r], vecs);
    limit(softmax, row + r, tile.start, tile.span.tokens, vecs);
    store_row(scores[r], vecs);
  }
}
template <int kRows>
TQAI_ALWAYS_INLINE void limit_rows(const Softmax& softmax, int row, const SharedTile& tile,
                                   RowVecs (&rows)[kRows]) noexcept {
  alignas(64) float scores[kRows][kTileTokens];
  unrolled<kRows>([&](int r) { store_row(scores[r], rows[r]); });
  limit_in_memory<kRows>(softmax, row, tile, scores);
  unrolled<kRows>([&](int r) { load_row(scores[r], rows[r]); });
}

// Turns scores of rows `row` and on into products of 2^(score − max) and the values' norms, in
// scratch.block, and finds the largest.
template <int kRows>
TQAI_ALWAYS_INLINE void weigh_rows(const Softmax& softmax, int row, const SharedTile& tile,
                                   const float* value_norms, RowVecs (&rows)[kRows],
                                   RowsScratch& scratch) noexcept {
  if (!scratch.whole) limit_rows(softmax, row, tile, rows);
  scratch.matter |= weigh_roughly(softmax, row, rows);
  unrolled<kRows>([&](int r) {
    for (int v = 0; v < kRowVecs; ++v) {
      rows[r][v] = rows[r][v] * load_floats(value_norms + v * kVectorLanes);
    }
    store_row(scratch.block.scores[row + r], rows[r]);
    store_floats(scratch.largest[row + r], largest_parts(rows[r]));
  });
}

// What a segment adds to a head's scores.
struct ScorePart {
  const HeadRows& head;
  const QuerySegment& queries;
  float step;  // of sums and a query's step of 1
  int terms;
  bool wide;   // whether two terms' sums are taken in steps twice as large
  bool first;  // the first segment
};

// Those of rows `row` and on, with what was there before. No loop has two ways: compilers would
// leave it a loop, and the rows in memory.
template <int kRows>
TQAI_ALWAYS_INLINE void add_part(const ScorePart& part, int row, const float* key_norms,
                                 RowsScratch& scratch, RowVecs (&rows)[kRows]) noexcept {
  if (part.terms == 2) {
    for (int r = row; r < row + kRows; ++r) {
      join_terms(scratch.scores[2 * r], scratch.scores[2 * r + 1], part.wide);
    }
  }
  if (part.first) {
    unrolled<kRows>([&](int r) { fill_row(part.head.centre_scores[row + r], rows[r]); });
  } else {
    unrolled<kRows>([&](int r) { load_row(scratch.block.scores[row + r], rows[r]); });
  }
  unrolled<kRows>([&](int r) {
    add_products(scratch.scores[part.terms * (row + r)], part.queries.steps[row + r] * part.step,
                 key_norms, rows[r]);
  });
}

// Scores of rows `row` and on become products, where this was the last part of them. The next tile
// is fetched a row's share at a time: twice as much at once makes what is needed now wait.
template <typename Integer, int kRows>
TQAI_ALWAYS_INLINE void weigh_part(const ScorePart& part, bool last, int row,
                                   const SharedTile& tile, SetsScratch& scratch, RowsScratch& own,
                                   Fetch& fetch) noexcept {
  RowVecs rows[kRows];
  add_part(part, row, scratch.key_norms, own, rows);
  if (!last) {
    unrolled<kRows>([&](int r) { store_row(own.block.scores[row + r], rows[r]); });
    return;
  }
  for (int r = 1; r < kRows; ++r) Integer::fetch(fetch);
  weigh_rows(part.head.softmax, row, tile, scratch.value_norms, rows, own);
  Integer::fetch(fetch);
}

// The same of scores that are whole.
template <typename Integer, int kRows>
TQAI_ALWAYS_INLINE void weigh_scores(const Softmax& softmax, int row, const SharedTile& tile,
                                     SetsScratch& scratch, RowsScratch& own,
                                     Fetch& fetch) noexcept {
  RowVecs rows[kRows];
  unrolled<kRows>([&](int r) { load_row(own.block.scores[row + r], rows[r]); });
  for (int r = 1; r < kRows; ++r) Integer::fetch(fetch);
  weigh_rows(softmax, row, tile, scratch.value_norms, rows, own);
  Integer::fetch(fetch);
}

// The products of all rows of `count` HeadRows of one head. Step by step: what one of them waits
// for, when a step ends, the others compute meanwhile.
template <typename Integer>
inline void weigh_sets(const TilePlan& plan, const HeadRows* const* heads, int count,
                       const SharedTile& tile, const NextTile& next,
                       SetsScratch& scratch) noexcept {
  const SidePlan& keys = plan.keys;
  const int terms = term_count(keys);
  // |sums|, |fine| ≤ 127 · 128 · padded: of up to 512 coordinates their sum stays below 2^31, and
  // of more it is taken in steps twice as large.
  const bool wide = terms == 2 && keys.padded > 512;
  int all_rows = 0;
  const std::uint8_t* words[kMaxTogether];
  for (int h = 0; h < count; ++h) {
    all_rows += heads[h]->softmax.rows;
    words[h] = query_words(heads[h]->queries, keys);
    scratch.rows[h].matter = false;
  }
  Fetch fetch = fetch_of(next.with_rows, all_rows);
  for (int s = 0; s < keys.segment_count; ++s) {
    const SegmentPlan& segment = keys.segments[s];
    const std::uint8_t* codes = tile.data + keys.codes + segment.offset;
    const std::uint8_t* decoded =
        Integer::decode_keys(segment, codes, terms * all_rows, scratch.decoded);
    for (int h = 0; h < count; ++h) {
      const int rows = heads[h]->softmax.rows;
      const RowConstants* constants = query_segments(heads[h]->queries)[s].constants;
      std::int32_t* scores = scratch.rows[h].scores[0];
      const Ahead ahead = s + h == 0 ? next.with_keys : Ahead{};
      if (decoded != nullptr) {
        Integer::score_decoded(segment, decoded, words[h], constants, terms * rows, scores, ahead);
      } else {
        Integer::score(segment, codes, words[h], constants, terms * rows, scores, ahead);
      }
      words[h] += word_bytes<Integer>(segment, rows, terms);
    }
    if (s == 0) {  // norms lie last in a tile, and are the last to be fetched
      Integer::read_halves(tile.data + keys.norms, scratch.key_norms);
      Integer::read_halves(tile.data + plan.values.norms, scratch.value_norms);
    }
    for (int h = 0; h < count; ++h) {
      const HeadRows& head = *heads[h];
      const bool last = s + 1 == keys.segment_count && head.rope.count == 0;
      const QuerySegment& queries = query_segments(head.queries)[s];
      const ScorePart part{head, queries, (wide ? 2.0F : 1.0F) * segment.step, terms, wide, s == 0};
      RowsScratch& own = scratch.rows[h];
      int r = 0;
      for (; r + kRowsTogether <= head.softmax.rows; r += kRowsTogether) {
        weigh_part<Integer, kRowsTogether>(part, last, r, tile, scratch, own, fetch);
      }
      for (; r < head.softmax.rows; ++r) {
        weigh_part<Integer, 1>(part, last, r, tile, scratch, own, fetch);
      }
    }
  }
  for (int h = 0; h < count; ++h) {
    const HeadRows& head = *heads[h];
    if (head.rope.count == 0) continue;
    RowsScratch& own = scratch.rows[h];
    add_rope(head.rope, tile.span.positions, head.softmax.rows, own.block.scores);
    int r = 0;
    for (; r + kRowsTogether <= head.softmax.rows; r += kRowsTogether) {
      weigh_scores<Integer, kRowsTogether>(head.softmax, r, tile, scratch, own, fetch);
    }
    for (; r < head.softmax.rows; ++r) {
      weigh_scores<Integer, 1>(head.softmax, r, tile, scratch, own, fetch);
    }
  }
}

// Heads of which some have several sets.
template <typename Integer>
TQAI_NEVER_INLINE void attend_sets(const AttendTiles& args) noexcept {
  Sight sights[kMaxHeads];
  for (int h = 0; h < args.head_count; ++h) sights[h] = Sight(args.heads[h].softmax);
  SetsScratch scratch;
  const std::size_t bytes = args.plan->bytes;
  const FetchShares shares(bytes, args.heads[0].softmax.rows);
  std::int64_t start = 0;
  for (std::int64_t i = 0; i < args.span_count; ++i) {
    const TileSpan& span = args.spans[i];
    for (int h = 0; h < args.head_count;) {
      const int head = args.heads[h].head;
      const HeadRows* together[kMaxTogether];
      int count = 0;
      for (; h < args.head_count && args.heads[h].head == head && count < kMaxTogether; ++h) {
        if (!sights[h].any(start, span.tokens)) continue;
        scratch.rows[count].whole = sights[h].whole(start, span.tokens);
        together[count++] = args.heads + h;
      }
      if (count == 0) continue;
      // The next head's of this span, or the first one's of the next.
      const bool last = h == args.head_count;
      const TileSpan* next_span = !last ? &span : i + 1 < args.span_count ? &span + 1 : nullptr;
      const int next_head = args.heads[last ? 0 : h].head;
      const bool fetch = next_span != nullptr && (last || next_head != head);
      const std::uint8_t* next =
          fetch ? next_span->tiles + static_cast<std::size_t>(next_head) * bytes : nullptr;
      const SharedTile tile{span.tiles + static_cast<std::size_t>(head) * bytes, span, start};
      const NextTile ahead(next, shares);
      weigh_sets<Integer>(*args.plan, together, count, tile, ahead, scratch);
      for (int r = 0; r < count; ++r) round_set<Integer>(together[r]->softmax, scratch.rows[r]);
      accumulate_sets<Integer>(args.plan->values, together, count, tile.data, ahead.with_values,
                               scratch);
    }
    start += span.tokens;
  }
}

template <typename Integer>
void attend_tiles(const AttendTiles& args) noexcept {
  for (int h = 1; h < args.head_count; ++h) {
    if (args.heads[h].head == args.heads[h - 1].head) return attend_sets<Integer>(args);
  }
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
