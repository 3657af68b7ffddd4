// What a cache shows of its tiles, and memory that it sets aside for more of them.
#include <algorithm>
#include <string>
#include <tqai/cache.hpp>
#include <vector>

#include "../ranges.hpp"
#include "check.hpp"
#include "row.hpp"
#include "state.hpp"

namespace tqai {

using detail::Row;

namespace TQAI_LOCAL {

TQAI_INLINE void check_row_index(int row, int batch) {
  if (row >= 0 && row < batch) return;
  throw IndexError("row " + std::to_string(row) + " of a batch of " + std::to_string(batch));
}

}  // namespace TQAI_LOCAL

TQAI_INLINE const TileLayout& KvCache::tile_layout() const noexcept {
  return state_->context.codec->layout();
}

TQAI_INLINE std::vector<SealedBlock> KvCache::sealed_blocks(int row) const {
  check_row_index(row, batch());
  const Row& held = state_->rows[static_cast<std::size_t>(row)];
  std::vector<SealedBlock> blocks;
  blocks.reserve(held.sealed.size());
  std::int64_t place = held.first + held.sink_tokens();
  for (const detail::BlockView& view : held.sealed) {
    const kernels::TilePositions positions = detail::positions_of(view);
    SealedBlock& block = blocks.emplace_back();
    block.first_token = token_at(held, place);
    block.tokens = view.tokens;
    block.first_position = positions.first;
    if (positions.each != nullptr) {
      block.positions = {positions.each,
                         static_cast<std::size_t>(positions.sections) * kTileTokens};
    }
    block.centre_set = view.set;
    block.layout = &tile_layout();
    block.tiles = {view.block.header().tiles, state_->context.block_bytes()};
    place += view.tokens;
  }
  return blocks;
}

TQAI_INLINE CentreView KvCache::centre(int row, int set, int head) const {
  check_row_index(row, batch());
  const auto& sets = state_->rows[static_cast<std::size_t>(row)].centre_sets;
  if (set < 0 || set >= std::ssize(sets) || head < 0 || head >= options().kv_heads) {
    throw IndexError("centre set " + std::to_string(set) + ", head " + std::to_string(head) +
                     " of a row with " + std::to_string(sets.size()) + " sets and " +
                     std::to_string(options().kv_heads) + " kv heads");
  }
  const detail::Centres& centres = sets[static_cast<std::size_t>(set)];
  const detail::CentreShape& shape = centres.memory().header();
  const auto pairs = static_cast<std::size_t>(shape.pairs);
  CentreView view;
  view.kind = centres.kind(head);
  view.constant = {centres.constant(head), static_cast<std::size_t>(shape.head_dim)};
  view.real = {centres.means(head), pairs};
  view.imaginary = {centres.means(head) + pairs, pairs};
  return view;
}

TQAI_INLINE void KvCache::reserve(std::int64_t tokens) {
  check_range("tokens to be reserved", tokens, 0, detail::kMostTokens);
  const detail::Context& context = state_->context;
  std::vector<detail::SpareBlocks> all;
  all.reserve(state_->rows.size());
  for (const Row& row : state_->rows) {
    const std::int64_t sealed = row.first + row.sink_tokens() + row.sealed_tokens;
    const std::int64_t left = tokens - sealed - context.options.residual_window -
                              (row.centre_sets.empty() ? context.options.sink_tokens : 0);
    const std::int64_t needed = std::max<std::int64_t>(left, 0) / kTileTokens;
    // What is set aside already goes first; the last one of a list is the next.
    const auto& had = row.spare.blocks;
    auto& blocks = all.emplace_back().blocks;
    blocks.assign(had.rbegin(), had.rbegin() + std::min(std::ssize(had), needed));
    blocks.reserve(static_cast<std::size_t>(needed));
    while (std::ssize(blocks) < needed) {
      const detail::SealedTokens* before = !blocks.empty()       ? &blocks.back()
                                           : !row.sealed.empty() ? &row.sealed.back().block
                                                                 : nullptr;
      blocks.push_back(detail::make_block({}, context.block_bytes(), before));
    }
    std::reverse(blocks.begin(), blocks.end());
  }
  for (std::size_t b = 0; b < all.size(); ++b) state_->rows[b].spare = std::move(all[b]);
}

}  // namespace tqai
