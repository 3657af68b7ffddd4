#include <algorithm>
#include <cmath>
#include <limits>
#include <set>
#include <string>
#include <tqai/cache.hpp>
#include <tqai/key_basis.hpp>
#include <vector>

#include "../ranges.hpp"
#include "../threads.hpp"
#include "attend.hpp"
#include "check.hpp"
#include "gather.hpp"
#include "row.hpp"
#include "serialize.hpp"

namespace tqai {

using detail::Context;
using detail::Row;

struct KvCache::State {
  Context context;
  std::int64_t tokens = 0;
  detail::CountedVector<Row> rows;
};

namespace TQAI_LOCAL {

TQAI_INLINE std::array<std::int64_t, 4> shape_of(const Context& context, std::size_t batch,
                                                 std::int64_t tokens, int dim) {
  return {static_cast<std::int64_t>(batch), context.options.kv_heads, tokens, dim};
}

constexpr const char* kKeyAxes = "batch, kv_heads, tokens, head_dim";
constexpr const char* kValueAxes = "batch, kv_heads, tokens, value_head_dim";

TQAI_INLINE void check_dtype(const char* name, DType given, DType needed) {
  if (given == needed) return;
  throw ValueError(std::string(name) + " are " + name_of(given) + "; this cache holds " +
                   name_of(needed) + ": convert them, or make a cache of that dtype");
}

TQAI_INLINE void check_row(std::int64_t row, int batch) {
  if (row >= 0 && row < batch) return;
  throw IndexError("row " + std::to_string(row) + " of a batch of " + std::to_string(batch));
}

TQAI_INLINE void check_mask(const Mask& mask, const ConstTensor& queries, std::int64_t columns) {
  const std::array<std::int64_t, 4> full = {queries.shape[0], queries.shape[1], queries.shape[2],
                                            columns};
  bool fits = mask.shape[3] == columns;
  for (std::size_t i = 0; i < 3; ++i) {
    fits = fits && (mask.shape[i] == full[i] || mask.shape[i] == 1);
  }
  if (!fits) {
    throw ValueError("the mask has shape " + detail::shape_text(mask.shape) +
                     "; needed: " + detail::shape_text(full) +
                     " = [batch, query_heads, queries, tokens − first_token], the first three may "
                     "be 1");
  }
  check_enumerator("the mask's kind", mask.kind, Mask::Kind::bf16);
  const std::size_t element = mask.kind == Mask::Kind::boolean ? 1
                              : mask.kind == Mask::Kind::f32   ? 4
                                                               : 2;
  detail::check_memory("the mask", mask.data, element, mask.shape.data(), mask.strides.data(),
                       mask.shape.size());
}

TQAI_INLINE void check_log_sum_exp(const Tensor& logs, const ConstTensor& queries,
                                   const Tensor& output) {
  if (logs.dtype != DType::f32) {
    throw ValueError(std::string("log_sum_exp is ") + name_of(logs.dtype) +
                     "; needed: float32, since weights are its exponential");
  }
  detail::check_shape("log_sum_exp", logs.shape,
                      {queries.shape[0], queries.shape[2], queries.shape[1], 1},
                      "batch, queries, query_heads, 1");
  detail::check_written("log_sum_exp", logs);
  detail::check_apart("log_sum_exp", logs, "the queries", queries);
  detail::check_apart("log_sum_exp", logs, "output",
                      {output.data, output.dtype, output.shape, output.strides});
}

// Copies the tensor's tokens of one batch row behind the row's exact ones.
TQAI_INLINE void copy_in(const Context& context, Row& row, const ConstTensor& keys,
                         const ConstTensor& values, std::int64_t batch_row) noexcept {
  const std::int64_t tokens = keys.shape[2];
  const auto copy = [&](const ConstTensor& from, std::byte* to, int head, std::size_t bytes) {
    const auto element = static_cast<std::int64_t>(size_of(from.dtype));
    const auto* source = static_cast<const std::byte*>(from.data) +
                         (batch_row * from.strides[0] + head * from.strides[1]) * element;
    to += static_cast<std::size_t>(row.tail_tokens()) * bytes;
    for (std::int64_t t = 0; t < tokens; ++t) {
      std::copy_n(source + t * from.strides[2] * element, bytes,
                  to + static_cast<std::size_t>(t) * bytes);
    }
  };
  for (int head = 0; head < context.options.kv_heads; ++head) {
    copy(keys, exact_keys(context, row.tail, head), head, context.key_bytes());
    copy(values, exact_values(context, row.tail, head), head, context.value_bytes());
  }
  row.tail.header().tokens += tokens;
}

// Where a row's tail stands, and what comes next, once tokens are added to it.
struct Stand {
  detail::Positions tail;
  std::int64_t next = 0;
};

// tail: where its tokens stand when these are added.
TQAI_INLINE Stand stand(const Context& context, const Row& row, const detail::Positions& tail,
                        const std::optional<PositionTensor>& given, std::int64_t batch_row,
                        std::int64_t tokens) {
  detail::Positions positions;
  if (given && context.uses_positions()) {
    positions = detail::read_positions(*given, batch_row, context.sections());
  } else {
    positions = detail::Positions::consecutive(row.next_position, tokens);
    detail::check_position(row.next_position + tokens - 1);
  }
  return {tail.joined(positions), positions.next()};
}

TQAI_INLINE std::int64_t most_sealable(const Context& context,
                                       const detail::CountedVector<Row>& rows) noexcept {
  std::int64_t most = 0;
  for (const Row& row : rows) most = std::max(most, detail::sealable(context, row));
  return most;
}

// What sealing will do to each row, without blocks where that is nothing; empty where it is nothing
// for all of them. Of the rows themselves only capacity changes.
TQAI_INLINE std::vector<detail::Sealing> prepare_sealings(const Context& context,
                                                          detail::CountedVector<Row>& rows,
                                                          const Resources& resources) {
  if (most_sealable(context, rows) == 0) return {};
  struct Job {
    std::size_t row;
    std::int64_t block;
    int head;
  };
  std::vector<detail::Sealing> sealings(rows.size());
  std::vector<Job> jobs;
  for (std::size_t b = 0; b < rows.size(); ++b) {
    const std::int64_t tokens =
        detail::encodable(context, rows[b], detail::sealable(context, rows[b]));
    if (tokens == 0) continue;
    sealings[b] = detail::prepare_sealing(context, rows[b], tokens, resources);
    for (std::int64_t block = 0; block < tokens / kTileTokens; ++block) {
      for (int head = 0; head < context.options.kv_heads; ++head) {
        jobs.push_back({b, block, head});
      }
    }
  }
  parallel_for(resources, std::ssize(jobs), 8, detail::encoding_bytes(context),
               [&](std::int64_t i, std::byte* memory) {
                 const Job& job = jobs[static_cast<std::size_t>(i)];
                 detail::encode_tile(context, rows[job.row], sealings[job.row], job.block, job.head,
                                     memory);
               });
  return sealings;
}

TQAI_INLINE void commit_all(detail::CountedVector<Row>& rows,
                            std::vector<detail::Sealing>&& sealings) noexcept {
  for (std::size_t b = 0; b < sealings.size(); ++b) {
    if (!sealings[b].blocks.empty()) detail::commit(rows[b], std::move(sealings[b]));
  }
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

TQAI_INLINE std::int64_t KvCache::first_token() const noexcept {
  std::int64_t first = state_->tokens;
  for (const Row& row : state_->rows) first = std::min(first, token_at(row, row.first));
  return first;
}

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

TQAI_INLINE void KvCache::append(const ConstTensor& keys, const ConstTensor& values,
                                 const std::optional<PositionTensor>& positions,
                                 const Resources& resources) {
  (void)usable_threads(resources);  // whether or not this call has work for them
  const UsualArithmetic usual;
  State& state = *state_;
  const Context& context = state.context;
  detail::check_shape("keys", keys.shape,
                      shape_of(context, state.rows.size(), -1, context.options.head_dim), kKeyAxes);
  const std::int64_t tokens = keys.shape[2];
  check_range("the keys' number of tokens", tokens, 0, detail::kMostTokens - state.tokens);
  detail::check_shape("values", values.shape,
                      shape_of(context, state.rows.size(), tokens, context.options.value_head_dim),
                      kValueAxes);
  check_dtype("keys", keys.dtype, context.options.dtype);
  check_dtype("values", values.dtype, context.options.dtype);
  detail::check_layout("keys", keys);
  detail::check_layout("values", values);
  if (positions) {
    // Without an embedding there are none to go by; they are of no use then.
    const std::int64_t sections =
        context.rope ? context.sections()
                     : std::clamp<std::int64_t>(positions->shape[1], 1, Rope::kMaxSections);
    detail::check_positions(*positions, static_cast<std::int64_t>(state.rows.size()), tokens,
                            static_cast<int>(sections));
  }
  if (tokens == 0) return;
  detail::check_vectors(*context.kernels, "keys", keys);
  detail::check_vectors(*context.kernels, "values", values);
  std::vector<detail::Sealing> sealings = prepare_sealings(context, state.rows, resources);
  std::vector<Stand> stands;
  stands.reserve(state.rows.size());
  for (std::size_t b = 0; b < state.rows.size(); ++b) {
    Row& row = state.rows[b];
    detail::Sealing* sealing =
        sealings.empty() || sealings[b].blocks.empty() ? nullptr : &sealings[b];
    stands.push_back(stand(context, row,
                           sealing != nullptr ? sealing->tail_positions : row.tail_positions,
                           positions, static_cast<std::int64_t>(b), tokens));
    detail::reserve_tail(context, sealing != nullptr ? sealing->tail : row.tail, tokens);
  }
  // From here on nothing may throw.
  commit_all(state.rows, std::move(sealings));
  for (std::size_t b = 0; b < state.rows.size(); ++b) {
    copy_in(context, state.rows[b], keys, values, static_cast<std::int64_t>(b));
    state.rows[b].tail_positions = std::move(stands[b].tail);
    state.rows[b].next_position = stands[b].next;
  }
  state.tokens += tokens;
}

TQAI_INLINE std::int64_t KvCache::seal(const Resources& resources) {
  (void)usable_threads(resources);
  const UsualArithmetic usual;
  commit_all(state_->rows, prepare_sealings(state_->context, state_->rows, resources));
  return most_sealable(state_->context, state_->rows);
}

TQAI_INLINE void KvCache::attend(const ConstTensor& queries, const Tensor& output,
                                 const AttendOptions& options, const Resources& resources) const {
  const State& state = *state_;
  const CacheOptions& geometry = state.context.options;
  const auto batch = static_cast<std::int64_t>(state.rows.size());
  detail::check_shape("queries", queries.shape, {batch, -1, -1, geometry.head_dim},
                      "batch, query_heads, queries, head_dim");
  if (queries.shape[1] % geometry.kv_heads != 0) {
    throw ValueError("queries have " + std::to_string(queries.shape[1]) +
                     " heads; a multiple of the cache's " + std::to_string(geometry.kv_heads) +
                     " kv heads is needed");
  }
  if (queries.shape[2] > state.tokens) {
    throw ValueError(std::to_string(queries.shape[2]) + " queries on a cache of " +
                     std::to_string(state.tokens) +
                     " tokens; they are its last tokens, so append theirs first");
  }
  detail::check_shape("output", output.shape,
                      {batch, queries.shape[2], queries.shape[1], geometry.value_head_dim},
                      "batch, queries, query_heads, value_head_dim");
  detail::check_layout("queries", queries);
  detail::check_written("output", output);
  detail::check_apart("output", output, "the queries", queries);
  if (options.scale && !std::isfinite(*options.scale)) {
    throw ValueError("scale = " + std::to_string(*options.scale) +
                     "; allowed: finite numbers, or nothing for 1/√head_dim");
  }
  if (options.soft_cap != 0.0F && !(options.soft_cap > 0.0F && std::isnormal(options.soft_cap))) {
    throw ValueError("soft_cap = " + detail::number_text(options.soft_cap) +
                     "; allowed: 0 for none, or a finite number from " +
                     detail::number_text(std::numeric_limits<float>::min()) + " up");
  }
  if (options.first_token < 0 || options.first_token > state.tokens || options.window < 0) {
    throw ValueError("first_token = " + std::to_string(options.first_token) +
                     ", window = " + std::to_string(options.window) + "; allowed: 0…" +
                     std::to_string(state.tokens) + ", and 0 for none or more");
  }
  if (options.mask) check_mask(*options.mask, queries, state.tokens - options.first_token);
  if (options.sink_scores != nullptr) {
    const std::int64_t next = 1;
    detail::check_memory("sink_scores", options.sink_scores, sizeof(float), &queries.shape[1],
                         &next, 1);
  }
  if (options.log_sum_exp) check_log_sum_exp(*options.log_sum_exp, queries, output);
  const detail::AttendCall call{&state.context, state.rows, state.tokens,
                                &queries,       &output,    &options};
  detail::attend({&call, 1}, resources);
}

TQAI_INLINE void KvCache::gather(std::int64_t first, const Tensor& keys,
                                 const Tensor& values) const {
  const UsualArithmetic usual;
  const State& state = *state_;
  const CacheOptions& geometry = state.context.options;
  detail::check_shape("keys", keys.shape,
                      shape_of(state.context, state.rows.size(), -1, geometry.head_dim), kKeyAxes);
  detail::check_shape(
      "values", values.shape,
      shape_of(state.context, state.rows.size(), keys.shape[2], geometry.value_head_dim),
      kValueAxes);
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

TQAI_INLINE void KvCache::crop(std::int64_t tokens) {
  State& state = *state_;
  if (tokens < 0 || tokens > state.tokens) {
    throw ValueError("crop to " + std::to_string(tokens) + " tokens; allowed: 0…" +
                     std::to_string(state.tokens) + ", what the cache has");
  }
  // With tokens of a sliding window already freed, less than they span cannot be restored.
  const std::int64_t first = first_token();
  if (tokens != 0 && tokens < first) {
    throw ValueError("crop to " + std::to_string(tokens) + " tokens; tokens before " +
                     std::to_string(first) + " were discarded, so allowed: 0 or " +
                     std::to_string(first) + "…" + std::to_string(state.tokens));
  }
  detail::CountedVector<Row> rows = state.rows;
  for (Row& row : rows) {
    if (tokens == 0) {
      row = Row{};
      continue;
    }
    const std::int64_t place = place_of(row, tokens);
    detail::truncate(state.context, row, std::max<std::int64_t>(place - row.first, 0));
    row.first = std::min(row.first, place);
    std::erase_if(row.gaps, [=](const TokenSpan& gap) { return gap.first >= tokens; });
    if (!row.gaps.empty()) {
      TokenSpan& last = row.gaps.back();
      last.count = std::min(last.count, tokens - last.first);
    }
    if (row.held() == 0) row.next_position = std::min(tokens, kMaxPosition + 1);
  }
  state.rows = std::move(rows);
  state.tokens = tokens;
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
