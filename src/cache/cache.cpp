#include <algorithm>
#include <cmath>
#include <limits>
#include <set>
#include <string>
#include <tqai/cache.hpp>
#include <tqai/key_basis.hpp>
#include <utility>
#include <vector>

#include "../ranges.hpp"
#include "../threads.hpp"
#include "check.hpp"
#include "gather.hpp"
#include "row.hpp"
#include "serialize.hpp"
#include "state.hpp"

namespace tqai {

using detail::Context;
using detail::Row;

namespace TQAI_LOCAL {

TQAI_INLINE void check_row(std::int64_t row, int batch) {
  if (row >= 0 && row < batch) return;
  throw IndexError("row " + std::to_string(row) + " of a batch of " + std::to_string(batch));
}

TQAI_INLINE std::int64_t first_token_of(const detail::CacheState& state) noexcept {
  std::int64_t first = state.tokens;
  for (const Row& row : state.rows) first = std::min(first, token_at(row, row.first));
  return first;
}

// For copies that take the rows' place.
TQAI_INLINE void keep_spare(detail::CountedVector<Row>& rows,
                            detail::CountedVector<Row>& copies) noexcept {
  for (std::size_t b = 0; b < rows.size(); ++b) copies[b].spare = std::move(rows[b].spare);
}

}  // namespace TQAI_LOCAL

TQAI_INLINE KvCache::KvCache(const CacheOptions& options, int batch)
    : state_(std::make_unique<State>()) {
  if (batch < 1) {
    throw ValueError("batch = " + std::to_string(batch) + "; allowed: 1 or more");
  }
  const UsualArithmetic usual;
  Context& context = state_->context;
  context.options = detail::checked(options);
  context.options.key_basis = detail::shared_basis(std::move(context.options.key_basis));
  if (context.options.rope) context.rope = detail::shared_rope_tables(*context.options.rope);
  context.kernels = &kernels::kernels(*context.options.level);
  context.codec = detail::shared_codec(context.options);
  state_->rows.resize(static_cast<std::size_t>(batch));
}

TQAI_INLINE KvCache::KvCache(const KvCache& other)
    : state_(std::make_unique<State>(*other.state_)) {}
TQAI_INLINE KvCache::KvCache(KvCache&& other) noexcept = default;
TQAI_INLINE KvCache& KvCache::operator=(const KvCache& other) {
  *this = KvCache(other);
  return *this;
}
TQAI_INLINE KvCache& KvCache::operator=(KvCache&& other) noexcept = default;
TQAI_INLINE KvCache::~KvCache() = default;

TQAI_INLINE const CacheOptions& KvCache::options() const noexcept {
  return state_->context.options;
}
TQAI_INLINE int KvCache::batch() const noexcept { return static_cast<int>(state_->rows.size()); }
TQAI_INLINE std::int64_t KvCache::tokens() const noexcept { return state_->tokens; }

TQAI_INLINE std::int64_t KvCache::first_token() const noexcept { return first_token_of(*state_); }

TQAI_INLINE std::int64_t KvCache::packed_tokens(int row) const {
  check_row(row, batch());
  return state_->rows[static_cast<std::size_t>(row)].sealed_tokens;
}

TQAI_INLINE std::optional<Centering> KvCache::centering(int row, int head) const {
  if (row < 0 || row >= batch() || head < 0 || head >= options().kv_heads) {
    throw IndexError("row " + std::to_string(row) + ", head " + std::to_string(head) +
                     " of a batch of " + std::to_string(batch()) + " with " +
                     std::to_string(options().kv_heads) + " kv heads");
  }
  const Row& held = state_->rows[static_cast<std::size_t>(row)];
  if (held.centre_sets.empty()) return std::nullopt;
  const std::int32_t set = held.sealed.empty() ? 0 : held.sealed.back().set;
  return held.centre_sets[static_cast<std::size_t>(set)].kind(head);
}

TQAI_INLINE int KvCache::centre_sets(int row) const {
  check_row(row, batch());
  return static_cast<int>(state_->rows[static_cast<std::size_t>(row)].centre_sets.size());
}

TQAI_INLINE void KvCache::gather(std::int64_t first, const Tensor& keys,
                                 const Tensor& values) const {
  const UsualArithmetic usual;
  const State& state = *state_;
  const CacheOptions& geometry = state.context.options;
  detail::check_shape("keys", keys.shape, detail::shape_of(state, -1, geometry.head_dim),
                      detail::kKeyAxes);
  detail::check_shape("values", values.shape,
                      detail::shape_of(state, keys.shape[2], geometry.value_head_dim),
                      detail::kValueAxes);
  detail::check_written("keys", keys);
  detail::check_written("values", values);
  detail::check_apart("keys", keys, "values",
                      {values.data, values.dtype, values.shape, values.strides});
  if (first < 0 || first > state.tokens - keys.shape[2]) {
    throw IndexError(std::to_string(keys.shape[2]) + " tokens from token " + std::to_string(first) +
                     " on, of a cache of " + std::to_string(state.tokens));
  }
  detail::gather(state.context, state.rows, first, keys, values);
}

namespace detail {

TQAI_INLINE std::vector<Cropping> prepare_cropping(const CacheState& state, std::int64_t tokens) {
  if (tokens < 0 || tokens > state.tokens) {
    throw ValueError("crop to " + std::to_string(tokens) + " tokens; allowed: 0…" +
                     std::to_string(state.tokens) + ", what the cache has");
  }
  // With tokens of a sliding window already freed, less than they span cannot be restored.
  const std::int64_t first = first_token_of(state);
  if (tokens != 0 && tokens < first) {
    throw ValueError("crop to " + std::to_string(tokens) + " tokens; tokens before " +
                     std::to_string(first) + " were discarded, so allowed: 0 or " +
                     std::to_string(first) + "…" + std::to_string(state.tokens));
  }
  std::vector<Cropping> rows;
  rows.reserve(state.rows.size());
  for (const Row& row : state.rows) rows.push_back(prepare_cropping(state.context, row, tokens));
  return rows;
}

TQAI_INLINE void commit(CacheState& state, std::vector<Cropping>&& rows) noexcept {
  for (std::size_t b = 0; b < rows.size(); ++b) {
    state.tokens = rows[b].tokens;
    commit(state.rows[b], std::move(rows[b]));
  }
}

}  // namespace detail

TQAI_INLINE void KvCache::crop(std::int64_t tokens) {
  auto rows = detail::prepare_cropping(*state_, tokens);
  detail::commit(*state_, std::move(rows));
}

TQAI_INLINE void KvCache::select(std::span<const std::int64_t> rows) {
  State& state = *state_;
  if (rows.empty()) throw ValueError("no rows were chosen; a batch needs 1 or more");
  for (const std::int64_t row : rows) check_row(row, batch());
  detail::CountedVector<Row> chosen;
  chosen.reserve(rows.size());
  for (const std::int64_t row : rows) chosen.push_back(state.rows[static_cast<std::size_t>(row)]);
  state.rows = std::move(chosen);
}

TQAI_INLINE void KvCache::set_padding(std::span<const std::int64_t> counts) {
  State& state = *state_;
  if (counts.size() != state.rows.size()) {
    throw ValueError(std::to_string(counts.size()) + " padding counts for a batch of " +
                     std::to_string(state.rows.size()) + "; one a row is needed");
  }
  for (std::size_t b = 0; b < counts.size(); ++b) {
    const Row& row = state.rows[b];
    if (place_of(row, counts[b]) < row.first || counts[b] > state.tokens) {
      throw ValueError("row " + std::to_string(b) + " with " + std::to_string(counts[b]) +
                       " tokens of padding; allowed: " + std::to_string(row.first) + "…" +
                       std::to_string(state.tokens));
    }
    if (place_of(row, counts[b]) > row.first && !row.centre_sets.empty()) {
      throw ValueError("row " + std::to_string(b) +
                       " has sealed tokens already; padding must be said before");
    }
  }
  detail::CountedVector<Row> rows = state.rows;
  for (std::size_t b = 0; b < counts.size(); ++b) {
    detail::drop_padding(state.context, rows[b], place_of(rows[b], counts[b]) - rows[b].first);
  }
  keep_spare(state.rows, rows);
  state.rows = std::move(rows);
}

TQAI_INLINE void KvCache::leave_out(std::span<const std::uint8_t> hidden) {
  State& state = *state_;
  const std::size_t count = hidden.size() / state.rows.size();
  if (count * state.rows.size() != hidden.size() || std::cmp_greater(count, state.tokens)) {
    throw ValueError(std::to_string(hidden.size()) + " marks of hidden tokens for a batch of " +
                     std::to_string(state.rows.size()) + " with " + std::to_string(state.tokens) +
                     " tokens; needed: [batch, n] of the last n tokens");
  }
  detail::CountedVector<Row> rows = state.rows;
  for (std::size_t b = 0; b < rows.size(); ++b) {
    const auto of_row = hidden.subspan(b * count, count);
    if (std::all_of(of_row.begin(), of_row.end(), [](std::uint8_t mark) { return mark == 0; })) {
      continue;
    }
    detail::leave_out(state.context, rows[b], state.tokens, of_row);
  }
  keep_spare(state.rows, rows);
  state.rows = std::move(rows);
}

TQAI_INLINE std::vector<TokenSpan> KvCache::left_out(int row) const {
  check_row(row, batch());
  const auto& gaps = state_->rows[static_cast<std::size_t>(row)].gaps;
  return {gaps.begin(), gaps.end()};
}

TQAI_INLINE void KvCache::discard_before(std::int64_t token) {
  State& state = *state_;
  if (token < 0 || token > state.tokens) {
    throw ValueError("discard before token " + std::to_string(token) + "; allowed: 0…" +
                     std::to_string(state.tokens));
  }
  if (std::none_of(state.rows.begin(), state.rows.end(), [token](const Row& row) {
        return detail::drops_any(row, place_of(row, token) - row.first);
      })) {
    return;
  }
  std::vector<detail::Dropping> droppings;
  droppings.reserve(state.rows.size());
  for (const Row& row : state.rows) {
    droppings.push_back(detail::prepare_dropping(
        state.context, row, std::max<std::int64_t>(place_of(row, token) - row.first, 0)));
  }
  // From here on nothing may throw.
  for (std::size_t b = 0; b < droppings.size(); ++b) {
    detail::commit(state.rows[b], std::move(droppings[b]));
  }
}

TQAI_INLINE MemoryReport KvCache::memory() const {
  const State& state = *state_;
  MemoryReport report;
  report.overhead_bytes = state.rows.capacity() * sizeof(Row);
  std::set<const void*> seen;
  const auto add = [&](const auto& shared, std::size_t& part) {
    if (!shared || !seen.insert(shared.id()).second) return;
    part += shared.payload_bytes();
    report.overhead_bytes += shared.kPrefix;
  };
  for (const Row& row : state.rows) {
    report.tokens += row.held();
    report.packed_tokens += row.sealed_tokens;
    report.overhead_bytes += row.sealed.capacity() * sizeof(detail::BlockView);
    add(row.sinks, report.exact_bytes);
    add(row.tail, report.exact_bytes);
    report.overhead_bytes += row.centre_sets.capacity() * sizeof(detail::Centres) +
                             row.sink_positions.bytes() + row.tail_positions.bytes() +
                             row.gaps.capacity() * sizeof(TokenSpan);
    for (const detail::Centres& centres : row.centre_sets) {
      add(centres.memory(), report.overhead_bytes);
    }
    report.overhead_bytes += row.spare.blocks.capacity() * sizeof(detail::SealedTokens);
    for (const detail::SealedTokens& block : row.spare.blocks) {
      add(block, report.overhead_bytes);
      add(block.header().places, report.overhead_bytes);  // of a sealing that has failed
    }
    for (const detail::BlockView& view : row.sealed) {
      if (view.block.header().owner && !seen.contains(view.block.id())) {
        report.mapped_bytes += state.context.block_bytes();
      }
      add(view.block, report.packed_bytes);
      add(view.block.header().places, report.overhead_bytes);
    }
  }
  if (options().key_basis) report.basis_bytes = options().key_basis->bytes();
  report.uncompressed_bytes = static_cast<std::size_t>(report.tokens) * state.context.token_bytes();
  return report;
}

TQAI_INLINE const Rotation& KvCache::key_rotation() const {
  if (options().key_basis) {
    throw ValueError("this cache's keys are not rotated: they are in its options' key_basis");
  }
  return state_->context.codec->key_rotation();
}
TQAI_INLINE const Rotation& KvCache::value_rotation() const noexcept {
  return state_->context.codec->value_rotation();
}

TQAI_INLINE std::size_t KvCache::serialized_bytes(BasisAs basis) const {
  std::size_t bytes = 0;
  serialize([&bytes](std::span<const std::byte> more) { bytes += more.size(); }, basis);
  return bytes;
}

TQAI_INLINE void KvCache::serialize(const std::function<void(std::span<const std::byte>)>& write,
                                    BasisAs basis) const {
  detail::write_cache(state_->context, state_->tokens, state_->rows, basis, write);
}

TQAI_INLINE std::vector<std::byte> KvCache::serialize(BasisAs basis) const {
  std::vector<std::byte> bytes;
  bytes.reserve(serialized_bytes(basis));
  serialize(
      [&bytes](std::span<const std::byte> more) {
        bytes.insert(bytes.end(), more.begin(), more.end());
      },
      basis);
  return bytes;
}

TQAI_INLINE KvCache
KvCache::deserialize(std::span<const std::byte> bytes, std::optional<Level> level,
                     std::span<const std::shared_ptr<const KeyBasis>> key_bases) {
  detail::Reader reader(bytes);
  return read(reader, level, key_bases);
}

TQAI_INLINE KvCache KvCache::read(detail::Reader& reader, std::optional<Level> level,
                                  std::span<const std::shared_ptr<const KeyBasis>> key_bases) {
  const UsualArithmetic usual;
  detail::Header header = detail::read_header(reader, key_bases);
  header.options.level = level;
  KvCache cache(header.options);
  detail::Contents contents = detail::read_contents(cache.state_->context, header.version, reader);
  cache.state_->tokens = contents.tokens;
  cache.state_->rows = std::move(contents.rows);
  return cache;
}

}  // namespace tqai
