#include "row.hpp"

#include <algorithm>
#include <atomic>
#include <cstring>
#include <limits>
#include <new>
#include <tqai/cache.hpp>
#include <utility>

#include "../threads.hpp"

namespace tqai::detail {
namespace TQAI_LOCAL {

TQAI_INLINE ExactTokens make_exact(const Context& context, std::int64_t capacity) {
  const auto tokens = static_cast<std::size_t>(capacity);
  if (tokens > std::numeric_limits<std::size_t>::max() / 2 / context.token_bytes()) {
    throw std::bad_alloc();
  }
  return {ExactShape{capacity, 0}, tokens * context.token_bytes()};
}

// Appends tokens [from, from + count) of `source` to `target`, which nobody shares.
TQAI_INLINE void move_tokens(const Context& context, const ExactTokens& source, std::int64_t from,
                             std::int64_t count, ExactTokens& target) noexcept {
  if (count == 0) return;
  const auto copy = [&](std::byte* to, const std::byte* origin, std::size_t bytes) {
    std::memcpy(to + static_cast<std::size_t>(target.header().tokens) * bytes,
                origin + static_cast<std::size_t>(from) * bytes,
                static_cast<std::size_t>(count) * bytes);
  };
  for (int head = 0; head < context.options.kv_heads; ++head) {
    copy(exact_keys(context, target, head), exact_keys(context, source, head), context.key_bytes());
    copy(exact_values(context, target, head), exact_values(context, source, head),
         context.value_bytes());
  }
  target.header().tokens += count;
}

// A copy of tokens [from, from + count) with the given capacity; empty for capacity 0.
TQAI_INLINE ExactTokens copy_tokens(const Context& context, const ExactTokens& source,
                                    std::int64_t from, std::int64_t count, std::int64_t capacity) {
  if (capacity == 0) return {};
  ExactTokens copy = make_exact(context, capacity);
  move_tokens(context, source, from, count, copy);
  return copy;
}

// Moments of the tiles from token `from` of the tail on, [kv_heads][blocks].
TQAI_INLINE std::vector<std::vector<Moments>> moments_of(const Context& context, const Row& row,
                                                         std::int64_t from,
                                                         const CountedVector<BlockView>& blocks,
                                                         const Resources& resources) {
  const auto heads = static_cast<std::size_t>(context.options.kv_heads);
  std::vector<std::vector<Moments>> moments(heads,
                                            std::vector<Moments>(blocks.size(), Moments(context)));
  const PositionPhasors phasors = context.rope ? context.rope->phasors() : PositionPhasors{};
  const auto count = static_cast<std::int64_t>(heads * blocks.size());
  const std::size_t bytes =
      std::size_t{kTileTokens} * static_cast<std::size_t>(context.options.head_dim) * sizeof(float);
  parallel_for(resources, count, 16, bytes, [&](std::int64_t i, std::byte* memory) {
    const auto block = static_cast<std::size_t>(i) / heads;
    const auto head = static_cast<std::size_t>(i) % heads;
    const auto token = static_cast<std::size_t>(from) + block * kTileTokens;
    find_moments(
        context, phasors,
        exact_keys(context, row.tail, static_cast<int>(head)) + token * context.key_bytes(),
        positions_of(blocks[block]), reinterpret_cast<float*>(memory), moments[head][block]);
  });
  return moments;
}

// Gives the sealing's blocks their centres.
TQAI_INLINE void choose_centres(const Context& context, const Row& row, Sealing& sealing,
                                const Resources& resources) {
  if (context.options.centering == Centering::none) {
    sealing.centre_sets = row.centre_sets;
    if (sealing.centre_sets.empty()) {
      sealing.centre_sets.emplace_back(CentreShape{context.options.kv_heads,
                                                   context.options.head_dim,
                                                   context.rope ? context.rope->pair_count() : 0});
    }
    return;
  }
  const std::int64_t first_block = sealing.blocks.front().block.header().first_token;
  CentreChoice choice =
      choose_centre_sets(context, row.centre_sets,
                         moments_of(context, row, sealing.new_sinks, sealing.blocks, resources),
                         first_block / kTileTokens + std::ssize(sealing.blocks));
  sealing.centre_sets = std::move(choice.sets);
  for (std::size_t i = 0; i < sealing.blocks.size(); ++i) {
    sealing.blocks[i].set = choice.of_tile[i];
  }
}

// Drops centre sets that no block refers to; one is kept for what will be sealed.
TQAI_INLINE void compact_sets(Row& row) noexcept {
  std::int32_t places[kMostCentreSets];
  std::fill_n(places, kMostCentreSets, -1);
  for (const BlockView& view : row.sealed) places[view.set] = 0;
  if (row.sealed.empty() && !row.centre_sets.empty()) places[row.centre_sets.size() - 1] = 0;
  std::int32_t kept = 0;
  for (std::size_t set = 0; set < row.centre_sets.size(); ++set) {
    if (places[set] < 0) continue;
    places[set] = kept;
    if (static_cast<std::size_t>(kept) != set) {
      row.centre_sets[static_cast<std::size_t>(kept)] = std::move(row.centre_sets[set]);
    }
    ++kept;
  }
  row.centre_sets.erase(row.centre_sets.begin() + kept, row.centre_sets.end());
  for (BlockView& view : row.sealed) view.set = places[view.set];
}

}  // namespace TQAI_LOCAL

TQAI_INLINE std::int64_t position_after(const Row& row) noexcept {
  if (row.tail_positions.count() > 0) return row.tail_positions.next();
  if (row.sealed.empty()) return row.sink_positions.next();
  const BlockView& last = row.sealed.back();
  const kernels::TilePositions positions = positions_of(last);
  if (positions.each == nullptr) return positions.first + last.tokens;
  std::int32_t most = positions.each[last.tokens - 1];
  for (int s = 1; s < positions.sections; ++s) {
    most = std::max(most, positions.each[s * kTileTokens + last.tokens - 1]);
  }
  return std::int64_t{most} + 1;
}

TQAI_INLINE std::byte* exact_keys(const Context& context, const ExactTokens& tokens,
                                  int head) noexcept {
  auto* payload = const_cast<std::byte*>(tokens.payload());
  return payload + static_cast<std::size_t>(head) *
                       static_cast<std::size_t>(tokens.header().capacity) * context.key_bytes();
}

TQAI_INLINE std::byte* exact_values(const Context& context, const ExactTokens& tokens,
                                    int head) noexcept {
  return exact_keys(context, tokens, context.options.kv_heads) +
         static_cast<std::size_t>(head) * static_cast<std::size_t>(tokens.header().capacity) *
             context.value_bytes();
}

TQAI_INLINE void reserve_tail(const Context& context, ExactTokens& tail, std::int64_t more) {
  const std::int64_t tokens = tail ? tail.header().tokens : 0;
  const std::int64_t needed = tokens + more;
  const std::int64_t capacity = tail ? tail.header().capacity : 0;
  if (needed <= capacity && tail.sole()) return;
  constexpr std::int64_t kFewestTokens = 16;
  // Doubling up to what a sealed row keeps; more only as asked, since it is given back by sealing,
  // but for a tail that cannot be sealed.
  const std::int64_t kept = context.options.residual_window + kTileTokens;
  const std::int64_t grown =
      tokens > kept ? needed + needed / 8
                    : std::min(std::max<std::int64_t>(2 * capacity, kFewestTokens), kept);
  tail = copy_tokens(context, tail, 0, tokens, std::max({needed, grown, capacity}));
}

TQAI_INLINE std::int64_t sealable(const Context& context, const Row& row) noexcept {
  std::int64_t tail = row.tail_tokens();
  if (row.centre_sets.empty()) tail -= context.options.sink_tokens - row.sink_tokens();
  const std::int64_t beyond = tail - context.options.residual_window;
  return beyond < kTileTokens ? 0 : beyond / kTileTokens * kTileTokens;
}

TQAI_INLINE std::int64_t encodable(const Context& context, const Row& row, std::int64_t tokens,
                                   const Resources& resources) {
  if (tokens == 0) return 0;
  const CacheOptions& options = context.options;
  std::int64_t from = 0;
  if (row.centre_sets.empty()) from = options.sink_tokens - row.sink_tokens();
  const auto fits = [&](const std::byte* rows, int dim, float longest, std::int64_t token) {
    const auto bytes = static_cast<std::size_t>(dim) * size_of(options.dtype);
    return context.kernels->acceptable(rows + static_cast<std::size_t>(token) * bytes,
                                       options.dtype, kTileTokens, dim, dim, longest);
  };
  const std::int64_t heads = options.kv_heads;
  const std::int64_t blocks = tokens / kTileTokens;
  std::atomic<std::int64_t> first_block{blocks};  // with such a vector
  parallel_for(resources, blocks * heads, 16, 0, [&](std::int64_t i, std::byte* /*memory*/) {
    const std::int64_t block = i / heads;
    const auto head = static_cast<int>(i % heads);
    std::int64_t first = first_block.load(std::memory_order_relaxed);
    if (block >= first) return;
    const std::int64_t token = from + block * kTileTokens;
    if (fits(exact_keys(context, row.tail, head), options.head_dim, context.longest_key(), token) &&
        fits(exact_values(context, row.tail, head), options.value_head_dim, context.longest_value(),
             token)) {
      return;
    }
    while (block < first && !first_block.compare_exchange_weak(first, block)) {
    }
  });
  return first_block * kTileTokens;
}

TQAI_INLINE Sealing prepare_sealing(const Context& context, Row& row, std::int64_t tokens,
                                    const Resources& resources) {
  Sealing sealing;
  if (row.centre_sets.empty()) {
    sealing.new_sinks = context.options.sink_tokens - row.sink_tokens();
    if (sealing.new_sinks > 0) {
      sealing.sinks =
          copy_tokens(context, row.sinks, 0, row.sink_tokens(), context.options.sink_tokens);
      move_tokens(context, row.tail, 0, sealing.new_sinks, sealing.sinks);
      sealing.sink_positions = row.sink_positions.joined(
          row.tail_positions.part(0, sealing.new_sinks), context.sections());
    }
  }
  if (!sealing.sinks) {
    sealing.sinks = row.sinks;
    sealing.sink_positions = row.sink_positions;
  }
  const std::int64_t first = row.first + row.sink_tokens() + row.sealed_tokens + sealing.new_sinks;
  sealing.blocks.reserve(static_cast<std::size_t>(tokens / kTileTokens));
  for (std::int64_t done = 0; done < tokens; done += kTileTokens) {
    const Positions positions = row.tail_positions.part(sealing.new_sinks + done, kTileTokens);
    SealedShape shape{first + done, positions.first(), places_of(positions), nullptr, {}};
    if (context.rope) cover(*context.rope, tile_positions(shape.first_position, shape.places));
    // One that is set aside stays so until the sealing is done.
    const auto& spare = row.spare.blocks;
    if (sealing.blocks.size() < spare.size()) {
      SealedTokens block = spare[spare.size() - 1 - sealing.blocks.size()];
      shape.tiles = block.payload();
      block.header() = std::move(shape);
      sealing.blocks.push_back({std::move(block)});
      continue;
    }
    const auto& before = sealing.blocks.empty() ? row.sealed : sealing.blocks;
    sealing.blocks.push_back({make_block(std::move(shape), context.block_bytes(),
                                         before.empty() ? nullptr : &before.back().block)});
  }
  choose_centres(context, row, sealing, resources);
  const std::int64_t out = sealing.new_sinks + tokens;
  const std::int64_t left = row.tail_tokens() - out;  // more than usual where not all is encodable
  sealing.tail =
      copy_tokens(context, row.tail, out, left,
                  std::max<std::int64_t>(left, context.options.residual_window + kTileTokens));
  sealing.tail_positions = row.tail_positions.part(out, left);
  // Exact growth: a list that doubles would hold bytes that hold nothing.
  row.sealed.reserve(std::max(row.sealed.capacity(), row.sealed.size() + sealing.blocks.size() +
                                                         (tokens == kTileTokens ? 16 : 0)));
  return sealing;
}

TQAI_INLINE std::size_t encoding_bytes(const Context& context) noexcept {
  const int dim = std::max(context.options.head_dim, context.options.value_head_dim);
  return context.coding_bytes() + static_cast<std::size_t>(kTileTokens * dim) * sizeof(float);
}

namespace TQAI_LOCAL {

struct TileToEncode {
  std::size_t from;  // the first token, of the tail
  const BlockView& view;
  std::uint8_t* tile;
  float* rows;  // in working memory
};

TQAI_INLINE TileToEncode tile_to_encode(const Context& context, Sealing& sealing,
                                        std::int64_t index, int head, std::byte* memory) noexcept {
  BlockView& view = sealing.blocks[static_cast<std::size_t>(index)];
  return {static_cast<std::size_t>(sealing.new_sinks + index * kTileTokens), view,
          reinterpret_cast<std::uint8_t*>(view.block.payload()) +
              static_cast<std::size_t>(head) * context.codec->layout().bytes(),
          reinterpret_cast<float*>(memory + context.coding_bytes())};
}

}  // namespace TQAI_LOCAL

TQAI_INLINE void encode_keys(const Context& context, const Row& row, Sealing& sealing,
                             std::int64_t index, int head, std::byte* memory) noexcept {
  const CacheOptions& options = context.options;
  const TileToEncode to = tile_to_encode(context, sealing, index, head, memory);
  context.kernels->widen(exact_keys(context, row.tail, head) + to.from * context.key_bytes(),
                         options.dtype, std::int64_t{kTileTokens} * options.head_dim, to.rows);
  add_centre(context, sealing.centre_sets[static_cast<std::size_t>(to.view.set)], head,
             positions_of(to.view), -1.0F, to.rows);
  const kernels::SidePlan& side = context.codec->plan().keys;
  if (options.key_basis) {
    context.kernels->encode_in_basis(side, context.key_transform(head), to.rows, to.tile, memory);
  } else {
    context.kernels->encode(side, true, to.rows, to.tile, memory);
  }
}

TQAI_INLINE void encode_values(const Context& context, const Row& row, Sealing& sealing,
                               std::int64_t index, int head, std::byte* memory) noexcept {
  const CacheOptions& options = context.options;
  const TileToEncode to = tile_to_encode(context, sealing, index, head, memory);
  context.kernels->widen(exact_values(context, row.tail, head) + to.from * context.value_bytes(),
                         options.dtype, std::int64_t{kTileTokens} * options.value_head_dim,
                         to.rows);
  context.kernels->encode(context.codec->plan().values, false, to.rows, to.tile, memory);
}

TQAI_INLINE void commit(Row& row, Sealing&& sealing) noexcept {
  row.sinks = std::move(sealing.sinks);
  row.sink_positions = std::move(sealing.sink_positions);
  row.centre_sets = std::move(sealing.centre_sets);
  row.tail = std::move(sealing.tail);
  row.tail_positions = std::move(sealing.tail_positions);
  for (BlockView& view : sealing.blocks) {
    row.sealed.push_back(std::move(view));
    row.sealed_tokens += kTileTokens;
    if (!row.spare.blocks.empty()) row.spare.blocks.pop_back();
  }
}

namespace TQAI_LOCAL {

// Keeps the first `held` tokens of a row, which ends before its tail then.
TQAI_INLINE void truncate(const Context& context, Row& row, std::int64_t held) {
  const std::int64_t before_tail = row.sink_tokens() + row.sealed_tokens;
  if (held <= row.sink_tokens()) {
    // Nothing is sealed any more: the row starts anew, with its sinks as ordinary first tokens.
    ExactTokens tail = copy_tokens(context, row.sinks, 0, held, held);
    Positions positions = row.sink_positions.part(0, held);
    row.sinks = {};
    row.sink_positions = {};
    row.sealed = {};
    row.sealed_tokens = 0;
    row.tail = std::move(tail);
    row.tail_positions = std::move(positions);
    row.centre_sets = {};
    if (held > 0) row.next_position = position_after(row);
    return;
  }
  row.tail = {};
  row.tail_positions = {};
  std::int64_t over = before_tail - held;
  while (over > 0) {
    BlockView& last = row.sealed.back();
    const auto cut = static_cast<std::int32_t>(std::min<std::int64_t>(over, last.tokens));
    last.tokens -= cut;
    if (last.tokens == 0) row.sealed.pop_back();
    row.sealed_tokens -= cut;
    over -= cut;
  }
  compact_sets(row);
  row.next_position = position_after(row);
}

TQAI_INLINE void crop_gaps(Row& row, std::int64_t tokens) noexcept {
  std::erase_if(row.gaps, [=](const TokenSpan& gap) { return gap.first >= tokens; });
  if (row.gaps.empty()) return;
  TokenSpan& last = row.gaps.back();
  last.count = std::min(last.count, tokens - last.first);
}

}  // namespace TQAI_LOCAL

TQAI_INLINE Cropping prepare_cropping(const Context& context, const Row& row, std::int64_t tokens) {
  Cropping cropping;
  cropping.tokens = tokens;
  if (tokens == 0) return cropping;
  cropping.place = place_of(row, tokens);
  const std::int64_t held = std::clamp<std::int64_t>(cropping.place - row.first, 0, row.held());
  const std::int64_t before_tail = row.sink_tokens() + row.sealed_tokens;
  cropping.in_tail = held >= before_tail;
  if (cropping.in_tail) {
    cropping.tail_tokens = held - before_tail;
    cropping.tail_positions = row.tail_positions.part(0, cropping.tail_tokens);
    if (cropping.tail_tokens < row.tail_tokens() && !row.tail.sole()) {
      cropping.tail =
          copy_tokens(context, row.tail, 0, cropping.tail_tokens, row.tail.header().capacity);
    }
    return cropping;
  }
  cropping.row = row;
  truncate(context, cropping.row, held);
  return cropping;
}

TQAI_INLINE void commit(Row& row, Cropping&& cropping) noexcept {
  if (!cropping.in_tail) {
    cropping.row.spare = std::move(row.spare);
    row = std::move(cropping.row);
  } else if (cropping.tail_tokens < row.tail_tokens()) {
    if (cropping.tail) row.tail = std::move(cropping.tail);
    row.tail.header().tokens = cropping.tail_tokens;
    row.tail_positions = std::move(cropping.tail_positions);
    if (row.held() > 0) row.next_position = position_after(row);
  }
  if (cropping.tokens == 0) return;
  row.first = std::min(row.first, cropping.place);
  crop_gaps(row, cropping.tokens);
  if (row.held() == 0) row.next_position = std::min(cropping.tokens, KvCache::kMaxPosition + 1);
}

TQAI_INLINE bool drops_any(const Row& row, std::int64_t count) noexcept {
  if (count <= 0 || row.sink_tokens() > 0) return count > 0;
  return count >= (row.sealed.empty() ? kTileTokens : row.sealed.front().tokens);
}

TQAI_INLINE Dropping prepare_dropping(const Context& context, const Row& row, std::int64_t count) {
  Dropping dropping;
  dropping.count = std::min(count, row.held());
  const std::int64_t sinks = row.sink_tokens();
  dropping.from_sinks = std::min(dropping.count, sinks);
  if (dropping.from_sinks > 0) {
    const std::int64_t kept = sinks - dropping.from_sinks;
    dropping.sinks = copy_tokens(context, row.sinks, dropping.from_sinks, kept, kept);
    dropping.sink_positions = row.sink_positions.part(dropping.from_sinks, kept);
  }
  dropping.from_tail = std::max<std::int64_t>(dropping.count - sinks - row.sealed_tokens, 0) /
                       kTileTokens * kTileTokens;
  if (dropping.from_tail > 0) {
    // A prefill's capacity is given back, as by sealing.
    const std::int64_t kept = row.tail_tokens() - dropping.from_tail;
    const std::int64_t usual = context.options.residual_window + kTileTokens;
    dropping.tail = copy_tokens(context, row.tail, dropping.from_tail, kept,
                                std::max(kept, std::min(row.tail.header().capacity, usual)));
    dropping.tail_positions = row.tail_positions.part(dropping.from_tail, kept);
  }
  return dropping;
}

TQAI_INLINE void commit(Row& row, Dropping&& dropping) noexcept {
  if (dropping.from_sinks > 0) {
    row.sinks = std::move(dropping.sinks);
    row.sink_positions = std::move(dropping.sink_positions);
    row.first += dropping.from_sinks;
  }
  std::int64_t rest = dropping.count - dropping.from_sinks;
  std::size_t blocks = 0;
  while (blocks < row.sealed.size() && rest >= row.sealed[blocks].tokens) {
    rest -= row.sealed[blocks].tokens;
    row.first += row.sealed[blocks].tokens;
    row.sealed_tokens -= row.sealed[blocks].tokens;
    ++blocks;
  }
  row.sealed.erase(row.sealed.begin(), row.sealed.begin() + static_cast<std::ptrdiff_t>(blocks));
  if (blocks > 0) compact_sets(row);
  if (dropping.from_tail > 0) {
    row.first += dropping.from_tail;
    row.tail = std::move(dropping.tail);
    row.tail_positions = std::move(dropping.tail_positions);
  }
}

// Both are in order, and have no token in common; of the two, spans that touch are one.
TQAI_INLINE CountedVector<TokenSpan> joined(const CountedVector<TokenSpan>& spans,
                                            const CountedVector<TokenSpan>& more) {
  CountedVector<TokenSpan> all(spans.size() + more.size());
  std::merge(spans.begin(), spans.end(), more.begin(), more.end(), all.begin(),
             [](const TokenSpan& a, const TokenSpan& b) { return a.first < b.first; });
  std::size_t last = 0;
  for (std::size_t i = 1; i < all.size(); ++i) {
    if (all[last].first + all[last].count == all[i].first) {
      all[last].count += all[i].count;
    } else {
      all[++last] = all[i];
    }
  }
  if (!all.empty()) all.resize(last + 1);
  return all;
}

TQAI_INLINE void leave_out(const Context& context, Row& row, std::int64_t end,
                           std::span<const std::uint8_t> hidden) {
  const std::int64_t begin = end - std::ssize(hidden);
  const std::int64_t tail_start = row.first + row.sink_tokens() + row.sealed_tokens;
  std::vector<bool> out(static_cast<std::size_t>(row.tail_tokens()), false);
  CountedVector<TokenSpan> added;
  std::int64_t leading = 0;
  for (std::int64_t token = begin; token < end; ++token) {
    if (hidden[static_cast<std::size_t>(token - begin)] == 0) continue;
    const std::int64_t place = place_of(row, token);
    if (place < row.first || token_at(row, place) != token) continue;  // not held as it is
    if (place < tail_start) {
      throw ValueError("token " + std::to_string(token) +
                       " is sealed already; tokens must be left out before");
    }
    out[static_cast<std::size_t>(place - tail_start)] = true;
    if (place == row.first + leading) {  // padding at the start
      ++leading;
    } else if (!added.empty() && added.back().first + added.back().count == token) {
      ++added.back().count;
    } else {
      added.push_back({token, 1});
    }
  }
  if (std::find(out.begin(), out.end(), true) == out.end()) return;
  const auto is_out = [&out](std::int64_t i) { return bool{out[static_cast<std::size_t>(i)]}; };
  // A prefill's capacity is given back, as by sealing.
  const std::int64_t left = std::count(out.begin(), out.end(), false);
  const std::int64_t usual = context.options.residual_window + kTileTokens;
  ExactTokens tail =
      make_exact(context, std::min(row.tail.header().capacity, std::max(left, usual)));
  Positions positions;
  for (std::int64_t from = 0; from < row.tail_tokens();) {
    std::int64_t to = from + 1;
    while (to < row.tail_tokens() && is_out(to) == is_out(from)) ++to;
    if (!is_out(from)) {
      move_tokens(context, row.tail, from, to - from, tail);
      positions = positions.joined(row.tail_positions.part(from, to - from), context.sections());
    }
    from = to;
  }
  if (!context.uses_positions()) {  // none are kept, and the next token follows
    positions = Positions::consecutive(row.tail_positions.first() + leading, left);
    row.next_position = positions.next();
  }
  CountedVector<TokenSpan> gaps = joined(row.gaps, added);
  row.tail = std::move(tail);
  row.tail_positions = std::move(positions);
  row.gaps = std::move(gaps);
  row.first += leading;
}

TQAI_INLINE void drop_padding(const Context& context, Row& row, std::int64_t count) {
  if (count == 0) return;
  Positions positions = row.tail_positions.part(count, row.tail_tokens() - count);
  row.tail =
      copy_tokens(context, row.tail, count, row.tail_tokens() - count, row.tail.header().capacity);
  row.tail_positions = std::move(positions);
  row.first += count;
}

}  // namespace tqai::detail
