// One batch row of a cache: what it holds, and how tokens move from exact to sealed.
#pragma once

#include <algorithm>
#include <cstdint>
#include <optional>
#include <span>
#include <tqai/cache.hpp>

#include "centre_sets.hpp"
#include "centres.hpp"
#include "context.hpp"
#include "memory.hpp"
#include "positions.hpp"

namespace tqai::detail {

/// Exact tokens: keys [kv_heads, capacity, head_dim], then values [kv_heads, capacity,
/// value_head_dim], in the cache's dtype.
struct ExactShape {
  std::int64_t capacity = 0;
  std::int64_t tokens = 0;
};
using ExactTokens = Shared<ExactShape>;

/// 64 sealed tokens of all kv heads: tiles [kv_heads, TileLayout::bytes()]. Immutable once sealed.
struct SealedShape {
  std::int64_t first_token = 0;
  std::int64_t first_position = 0;  // where `places` is empty
  Places places;
  const std::byte* tiles = nullptr;   // 64-byte aligned: the payload, or bytes of `owner`
  std::shared_ptr<const void> owner;  // of tiles that lie elsewhere, as in a file that is mapped
};
using SealedTokens = Shared<SealedShape, Slabs>;

/// A block with memory for its tiles; before: the one that it follows in its row, or null. Throws
/// std::bad_alloc.
inline SealedTokens make_block(SealedShape shape, std::size_t bytes, const SealedTokens* before) {
  SealedTokens block(std::move(shape), bytes, before != nullptr ? before->id() : nullptr);
  block.header().tiles = block.payload();
  return block;
}

/// A block of sealed tokens as a row sees it: its first `tokens` ones, whose keys are centred on
/// the row's centre set `set`.
struct BlockView {
  SealedTokens block;
  std::int32_t tokens = kTileTokens;
  std::int32_t set = 0;
};

/// Where a block's tokens stand.
inline kernels::TilePositions positions_of(const BlockView& view) noexcept {
  const SealedShape& shape = view.block.header();
  return tile_positions(shape.first_position, shape.places);
}

/// Where a head's tokens lie in ExactTokens.
std::byte* exact_keys(const Context& context, const ExactTokens& tokens, int head) noexcept;
std::byte* exact_values(const Context& context, const ExactTokens& tokens, int head) noexcept;

/// Blocks that are set aside for a row; the last one is the next. A copy has none.
struct SpareBlocks {
  SpareBlocks() = default;
  SpareBlocks(const SpareBlocks& /*other*/) noexcept {}
  SpareBlocks(SpareBlocks&& other) noexcept = default;
  SpareBlocks& operator=(const SpareBlocks& other) noexcept {
    if (this != &other) blocks.clear();
    return *this;
  }
  SpareBlocks& operator=(SpareBlocks&& other) noexcept = default;
  ~SpareBlocks() = default;

  CountedVector<SealedTokens> blocks;
};

/// Tokens held, in order: sinks, sealed, tail. Before the first sealing all are in the tail. Their
/// places follow each other from `first` on: a token's place is its index, less the tokens in gaps
/// before it. Copies share everything.
struct Row {
  std::int64_t first = 0;
  CountedVector<TokenSpan> gaps;   // left out, in order, none touches the next
  std::int64_t next_position = 0;  // of a token that comes without
  ExactTokens sinks;               // may be empty
  Positions sink_positions;
  CountedVector<BlockView> sealed;
  std::int64_t sealed_tokens = 0;
  ExactTokens tail;  // may be empty
  Positions tail_positions;
  CountedVector<Centres> centre_sets;  // empty before the first sealing
  SpareBlocks spare;

  std::int64_t sink_tokens() const noexcept { return sinks ? sinks.header().tokens : 0; }
  std::int64_t tail_tokens() const noexcept { return tail ? tail.header().tokens : 0; }
  std::int64_t held() const noexcept { return sink_tokens() + sealed_tokens + tail_tokens(); }
};

/// What follows the last of the row's tokens, of which there is at least one.
std::int64_t position_after(const Row& row) noexcept;

/// The place of token `token`; in a gap, that of the next token.
inline std::int64_t place_of(const Row& row, std::int64_t token) noexcept {
  std::int64_t before = 0;
  for (const TokenSpan& gap : row.gaps) {
    if (token <= gap.first) break;
    before += std::min(gap.count, token - gap.first);
  }
  return token - before;
}

/// The token at place `place`.
inline std::int64_t token_at(const Row& row, std::int64_t place) noexcept {
  for (const TokenSpan& gap : row.gaps) {
    if (place < gap.first) break;
    place += gap.count;
  }
  return place;
}

/// Makes room for `more` tokens in a tail, and nobody else a reader of it. Changes no content; may
/// throw.
void reserve_tail(const Context& context, ExactTokens& tail, std::int64_t more);

/// What sealing does to a row, made beforehand so that the change itself cannot fail.
struct Sealing {
  ExactTokens sinks;
  Positions sink_positions;
  CountedVector<BlockView> blocks;  // to be encoded
  ExactTokens tail;                 // allocated at the capacity that a sealed row keeps
  Positions tail_positions;
  CountedVector<Centres> centre_sets;
  std::int64_t new_sinks = 0;  // tokens that go from the tail to the sinks first
};

/// Tokens that may be sealed now, a multiple of 64.
std::int64_t sealable(const Context& context, const Row& row) noexcept;

/// How many of the first `tokens` tokens that may be sealed can be, a multiple of 64: those before
/// the first 64 with a vector that is too long for its norm. May throw.
std::int64_t encodable(const Context& context, const Row& row, std::int64_t tokens,
                       const Resources& resources);

/// Allocates all that sealing `tokens` > 0 tokens needs, chooses the blocks' centres, and fills
/// sinks and tail. The blocks' tiles are left to `encode_keys` and `encode_values`. May throw.
Sealing prepare_sealing(const Context& context, Row& row, std::int64_t tokens,
                        const Resources& resources);

/// Encodes one head's keys of block `index`. Thread-safe beside others, and beside `encode_values`.
void encode_keys(const Context& context, const Row& row, Sealing& sealing, std::int64_t index,
                 int head, std::byte* memory) noexcept;
/// The same of its values.
void encode_values(const Context& context, const Row& row, Sealing& sealing, std::int64_t index,
                   int head, std::byte* memory) noexcept;
/// Bytes of their working memory, 64-byte aligned.
std::size_t encoding_bytes(const Context& context) noexcept;

/// Makes the sealing the row's state.
void commit(Row& row, Sealing&& sealing) noexcept;

/// What is left of a row when tokens are taken from its end, made beforehand so that the change
/// itself cannot fail.
struct Cropping {
  std::int64_t tokens = 0;       // that the cache keeps
  std::int64_t place = 0;        // of the first one that goes
  std::int64_t tail_tokens = 0;  // kept, where only such go: everything else stays where it is
  bool in_tail = false;
  ExactTokens tail;  // a copy, where others share it
  Positions tail_positions;
  Row row;  // else
};

/// Keeps tokens before token `tokens`. May throw.
Cropping prepare_cropping(const Context& context, const Row& row, std::int64_t tokens);

/// Makes it the row's state.
void commit(Row& row, Cropping&& cropping) noexcept;

/// What is left of a row's exact tokens when tokens are dropped from its front, made beforehand so
/// that the change itself cannot fail.
struct Dropping {
  std::int64_t count = 0;       // to be dropped: 0 for nothing
  std::int64_t from_sinks = 0;  // of them; sinks are dropped one by one
  ExactTokens sinks;
  Positions sink_positions;
  std::int64_t from_tail = 0;  // a multiple of 64, as of sealed ones
  ExactTokens tail;
  Positions tail_positions;
};

/// Whether dropping up to `count` tokens from the front would drop any.
bool drops_any(const Row& row, std::int64_t count) noexcept;

/// Drops up to `count` tokens. May throw.
Dropping prepare_dropping(const Context& context, const Row& row, std::int64_t count);

/// Makes it the row's state; `row.first` follows.
void commit(Row& row, Dropping&& dropping) noexcept;

/// Leaves out those of the row's last tokens that `hidden` says, [count], the last of which is
/// token `end` − 1. Throws ValueError where one is sealed already; may throw before anything
/// changed.
void leave_out(const Context& context, Row& row, std::int64_t end,
               std::span<const std::uint8_t> hidden);

/// Drops exactly `count` tokens from the front of a row that has nothing sealed. May throw before
/// anything changed.
void drop_padding(const Context& context, Row& row, std::int64_t count);

}  // namespace tqai::detail
