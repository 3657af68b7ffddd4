#include "row.hpp"

#include <algorithm>
#include <cstring>

namespace tqai::detail {
namespace {

ExactTokens make_exact(const Context& context, std::int64_t capacity) {
  return {ExactShape{capacity, 0}, static_cast<std::size_t>(capacity) * context.token_bytes()};
}

// Appends tokens [from, from + count) of `source` to `target`, which nobody shares.
void move_tokens(const Context& context, const ExactTokens& source, std::int64_t from,
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
ExactTokens copy_tokens(const Context& context, const ExactTokens& source, std::int64_t from,
                        std::int64_t count, std::int64_t capacity) {
  if (capacity == 0) return {};
  ExactTokens copy = make_exact(context, capacity);
  move_tokens(context, source, from, count, copy);
  return copy;
}

// The centres of tokens [from, from + count) of `tokens`, which begin at token `first_token`.
Centres make_centres(const Context& context, const ExactTokens& tokens, std::int64_t from,
                     std::int64_t count, std::int64_t first_token) {
  const CacheOptions& options = context.options;
  Centres centres(CentreShape{options.kv_heads, options.head_dim,
                              context.rope ? context.rope->pair_count() : 0});
  for (int head = 0; head < options.kv_heads; ++head) {
    const HeadKeys keys{
        exact_keys(context, tokens, head) + static_cast<std::size_t>(from) * context.key_bytes(),
        first_token, count};
    choose_centre(context, keys, head, centres);
  }
  return centres;
}

}  // namespace

std::byte* exact_keys(const Context& context, const ExactTokens& tokens, int head) noexcept {
  auto* payload = const_cast<std::byte*>(tokens.payload());
  return payload + static_cast<std::size_t>(head) *
                       static_cast<std::size_t>(tokens.header().capacity) * context.key_bytes();
}

std::byte* exact_values(const Context& context, const ExactTokens& tokens, int head) noexcept {
  return exact_keys(context, tokens, context.options.kv_heads) +
         static_cast<std::size_t>(head) * static_cast<std::size_t>(tokens.header().capacity) *
             context.value_bytes();
}

void reserve_tail(const Context& context, Row& row, std::int64_t more) {
  const std::int64_t tokens = row.tail_tokens();
  const std::int64_t needed = tokens + more;
  const std::int64_t capacity = row.tail ? row.tail.header().capacity : 0;
  if (needed <= capacity && row.tail.sole()) return;
  constexpr std::int64_t kFewestTokens = 16;
  // Doubling up to what a sealed row keeps; more only as asked, since it is given back by sealing.
  const std::int64_t kept = context.options.residual_window + kTileTokens;
  const std::int64_t grown = std::min(std::max<std::int64_t>(2 * capacity, kFewestTokens), kept);
  row.tail = copy_tokens(context, row.tail, 0, tokens, std::max({needed, grown, capacity}));
}

std::int64_t sealable(const Context& context, const Row& row) noexcept {
  std::int64_t tail = row.tail_tokens();
  if (!row.centres) tail -= context.options.sink_tokens - row.sink_tokens();
  const std::int64_t beyond = tail - context.options.residual_window;
  return beyond < kTileTokens ? 0 : beyond / kTileTokens * kTileTokens;
}

Sealing prepare_sealing(const Context& context, Row& row, std::int64_t tokens) {
  Sealing sealing;
  if (!row.centres) {
    sealing.new_sinks = context.options.sink_tokens - row.sink_tokens();
    if (sealing.new_sinks > 0) {
      sealing.sinks =
          copy_tokens(context, row.sinks, 0, row.sink_tokens(), context.options.sink_tokens);
      move_tokens(context, row.tail, 0, sealing.new_sinks, sealing.sinks);
    }
  }
  if (!sealing.sinks) sealing.sinks = row.sinks;
  const std::int64_t first = row.first + row.sink_tokens() + row.sealed_tokens + sealing.new_sinks;
  sealing.centres =
      row.centres ? row.centres : make_centres(context, row.tail, sealing.new_sinks, tokens, first);
  for (std::int64_t done = 0; done < tokens; done += kTileTokens) {
    sealing.blocks.emplace_back(SealedShape{first + done}, context.block_bytes());
  }
  const std::int64_t out = sealing.new_sinks + tokens;
  sealing.tail = copy_tokens(context, row.tail, out, row.tail_tokens() - out,
                             context.options.residual_window + kTileTokens);
  // Exact growth: a list that doubles would hold bytes that hold nothing.
  row.sealed.reserve(std::max(row.sealed.capacity(), row.sealed.size() + sealing.blocks.size() +
                                                         (tokens == kTileTokens ? 16 : 0)));
  return sealing;
}

void encode_tile(const Context& context, const Row& row, Sealing& sealing, std::int64_t index,
                 int head) noexcept {
  const CacheOptions& options = context.options;
  const Codec& codec = *context.codec;
  const auto from = static_cast<std::size_t>(sealing.new_sinks + index * kTileTokens);
  auto* tile =
      reinterpret_cast<std::uint8_t*>(sealing.blocks[static_cast<std::size_t>(index)].payload()) +
      static_cast<std::size_t>(head) * codec.layout().bytes();
  alignas(64) float rows[kTileTokens * kernels::kMaxDim];

  convert_to_float(exact_keys(context, row.tail, head) + from * context.key_bytes(), options.dtype,
                   static_cast<std::size_t>(kTileTokens * options.head_dim), rows);
  const std::int64_t first = sealing.blocks[static_cast<std::size_t>(index)].header().first_token;
  add_centre(context, sealing.centres, head, first, -1.0F, rows);
  context.kernels->encode(codec.plan().keys, true, rows, tile);

  convert_to_float(exact_values(context, row.tail, head) + from * context.value_bytes(),
                   options.dtype, static_cast<std::size_t>(kTileTokens * options.value_head_dim),
                   rows);
  context.kernels->encode(codec.plan().values, false, rows, tile);
}

void commit(Row& row, Sealing&& sealing) noexcept {
  row.sinks = std::move(sealing.sinks);
  row.centres = std::move(sealing.centres);
  row.tail = std::move(sealing.tail);
  for (SealedTokens& block : sealing.blocks) {
    row.sealed.push_back({std::move(block), kTileTokens});
    row.sealed_tokens += kTileTokens;
  }
}

void truncate(const Context& context, Row& row, std::int64_t held) {
  if (held >= row.held()) return;
  const std::int64_t before_tail = row.sink_tokens() + row.sealed_tokens;
  if (held >= before_tail) {
    reserve_tail(context, row, 0);
    row.tail.header().tokens = held - before_tail;
    return;
  }
  if (held <= row.sink_tokens()) {
    // Nothing is sealed any more: the row starts anew, with its sinks as ordinary first tokens.
    ExactTokens tail = copy_tokens(context, row.sinks, 0, held, held);
    row.sinks = {};
    row.sealed = {};
    row.sealed_tokens = 0;
    row.tail = std::move(tail);
    row.centres = {};
    return;
  }
  row.tail = {};
  std::int64_t over = before_tail - held;
  while (over > 0) {
    BlockView& last = row.sealed.back();
    const auto cut = static_cast<std::int32_t>(std::min<std::int64_t>(over, last.tokens));
    last.tokens -= cut;
    if (last.tokens == 0) row.sealed.pop_back();
    row.sealed_tokens -= cut;
    over -= cut;
  }
}

void drop_front(const Context& context, Row& row, std::int64_t count) {
  count = std::min(count, row.held());
  // Copies first: from here on nothing may throw.
  const std::int64_t sinks = row.sink_tokens();
  const std::int64_t from_sinks = std::min(count, sinks);
  ExactTokens kept_sinks = from_sinks < sinks ? copy_tokens(context, row.sinks, from_sinks,
                                                            sinks - from_sinks, sinks - from_sinks)
                                              : ExactTokens{};
  const std::int64_t from_tail =
      std::max<std::int64_t>(count - sinks - row.sealed_tokens, 0) / kTileTokens * kTileTokens;
  ExactTokens kept_tail;
  if (from_tail > 0) {
    // A prefill's capacity is given back, as by sealing.
    const std::int64_t kept = row.tail_tokens() - from_tail;
    const std::int64_t usual = context.options.residual_window + kTileTokens;
    kept_tail = copy_tokens(context, row.tail, from_tail, kept,
                            std::max(kept, std::min(row.tail.header().capacity, usual)));
  }
  if (from_sinks > 0) row.sinks = std::move(kept_sinks);
  row.first += from_sinks;
  std::int64_t rest = count - from_sinks;
  std::size_t blocks = 0;
  while (blocks < row.sealed.size() && rest >= row.sealed[blocks].tokens) {
    rest -= row.sealed[blocks].tokens;
    row.first += row.sealed[blocks].tokens;
    row.sealed_tokens -= row.sealed[blocks].tokens;
    ++blocks;
  }
  row.sealed.erase(row.sealed.begin(), row.sealed.begin() + static_cast<std::ptrdiff_t>(blocks));
  if (from_tail > 0) {
    row.first += from_tail;
    row.tail = std::move(kept_tail);
  }
}

void drop_padding(const Context& context, Row& row, std::int64_t count) {
  if (count == 0) return;
  row.tail =
      copy_tokens(context, row.tail, count, row.tail_tokens() - count, row.tail.header().capacity);
  row.first += count;
}

}  // namespace tqai::detail
