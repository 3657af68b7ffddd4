// What a runtime does at each step, to one cache or to many: append, seal, attend, crop.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <string>
#include <tqai/cache.hpp>
#include <tqai/sequences.hpp>
#include <utility>
#include <vector>

#include "../ranges.hpp"
#include "../threads.hpp"
#include "attend.hpp"
#include "check.hpp"
#include "pieces.hpp"
#include "row.hpp"
#include "state.hpp"

namespace tqai {

using detail::CacheAccess;
using detail::CacheState;
using detail::Context;
using detail::Row;

namespace TQAI_LOCAL {

TQAI_INLINE void check_dtype(const char* name, DType given, DType needed) {
  if (given == needed) return;
  check_enumerator("a tensor's dtype", given, DType::bf16);
  throw ValueError(std::string(name) + " are " + name_of(given) + "; this cache holds " +
                   name_of(needed) + ": convert them, or make a cache of that dtype");
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

// Copies the tensor's tokens of one batch row behind those of a tail that has room for them and no
// other reader. They are not its tokens yet.
TQAI_INLINE void copy_in(const Context& context, const detail::ExactTokens& tail,
                         const ConstTensor& keys, const ConstTensor& values, std::int64_t batch_row,
                         const Resources& resources) {
  const std::int64_t heads = context.options.kv_heads;
  const auto copy = [&](const ConstTensor& from, std::byte* to, std::size_t bytes,
                        std::int64_t head, std::int64_t first, std::int64_t count) {
    const auto element = static_cast<std::int64_t>(size_of(from.dtype));
    const auto* source =
        static_cast<const std::byte*>(from.data) +
        (batch_row * from.strides[0] + head * from.strides[1] + first * from.strides[2]) * element;
    to += static_cast<std::size_t>(tail.header().tokens + first) * bytes;
    // The stride of a single token is nobody's, and may be any number.
    const std::int64_t apart = count > 1 ? from.strides[2] * element : 0;
    if (count == 1 || std::cmp_equal(apart, bytes)) {
      std::memcpy(to, source, static_cast<std::size_t>(count) * bytes);
      return;
    }
    for (std::int64_t t = 0; t < count; ++t) {
      std::memcpy(to + static_cast<std::size_t>(t) * bytes, source + t * apart, bytes);
    }
  };
  const auto of_a_token = static_cast<std::int64_t>(context.key_bytes() + context.value_bytes());
  const detail::Pieces pieces{heads, keys.shape[2], of_a_token};
  pieces.each(resources, [&](std::int64_t head, std::int64_t first, std::int64_t count) {
    copy(keys, exact_keys(context, tail, static_cast<int>(head)), context.key_bytes(), head, first,
         count);
    copy(values, exact_values(context, tail, static_cast<int>(head)), context.value_bytes(), head,
         first, count);
  });
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
  return {tail.joined(positions, context.sections()), positions.next()};
}

// Throws what `append` throws for arguments.
TQAI_INLINE void check_append(const CacheState& state, const ConstTensor& keys,
                              const ConstTensor& values,
                              const std::optional<PositionTensor>& positions,
                              const Resources& resources) {
  const Context& context = state.context;
  detail::check_shape("keys", keys.shape, detail::shape_of(state, -1, context.options.head_dim),
                      detail::kKeyAxes);
  const std::int64_t tokens = keys.shape[2];
  check_range("the keys' number of tokens", tokens, 0, detail::kMostTokens - state.tokens);
  detail::check_shape("values", values.shape,
                      detail::shape_of(state, tokens, context.options.value_head_dim),
                      detail::kValueAxes);
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
  detail::check_vectors(*context.kernels, "keys", keys, resources);
  detail::check_vectors(*context.kernels, "values", values, resources);
}

// Throws what `attend` throws for arguments.
TQAI_INLINE void check_attend(const CacheState& state, const ConstTensor& queries,
                              const Tensor& output, const AttendOptions& options) {
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
  if (options.scale && !(std::abs(*options.scale) <= detail::kLargestScale)) {
    throw ValueError("scale = " + detail::number_text(*options.scale) + "; allowed: up to ± " +
                     detail::number_text(detail::kLargestScale) + ", or nothing for 1/√head_dim");
  }
  if (options.soft_cap != 0.0F &&
      !(options.soft_cap >= detail::kLeastSoftCap && std::isfinite(options.soft_cap))) {
    throw ValueError("soft_cap = " + detail::number_text(options.soft_cap) +
                     "; allowed: 0 for none, or a finite number from " +
                     detail::number_text(detail::kLeastSoftCap) + " up");
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
}

// check(i), with the sequence's place in what it throws where there are several.
template <class Check>
void check_each(std::size_t count, const Check& check) {
  for (std::size_t i = 0; i < count; ++i) {
    try {
      check(i);
    } catch (const ValueError& error) {
      if (count == 1) throw;
      throw ValueError("sequence " + std::to_string(i) + " of " + std::to_string(count) + ": " +
                       error.what());
    }
  }
}

template <class Cache>
Cache& given_cache(Cache* cache) {
  if (cache == nullptr) throw ValueError("its cache is null; each needs one");
  return *cache;
}

// Throws where a cache that is to be changed comes twice.
TQAI_INLINE void check_once(std::vector<const KvCache*> caches) {
  std::sort(caches.begin(), caches.end());
  if (std::adjacent_find(caches.begin(), caches.end()) == caches.end()) return;
  throw ValueError(
      "a cache comes twice in the list; each can be changed once, and a fork is a copy");
}

// What sealing will do to the rows of several caches.
class Sealings {
 public:
  // Of the rows themselves only capacity changes.
  Sealings(std::span<CacheState* const> caches, const Resources& resources) {
    for (CacheState* cache : caches) {
      for (Row& row : cache->rows) add(cache->context, row, resources);
    }
    std::vector<Job> jobs;
    std::size_t memory_bytes = 0;
    bool searches = false;
    for (RowSealing& each : rows_) {
      if (each.tokens == 0) continue;
      memory_bytes = std::max(memory_bytes, detail::encoding_bytes(*each.context));
      const CacheOptions& options = each.context->options;
      searches = searches || options.key_codes == CodeKind::trellis ||
                 options.value_codes == CodeKind::trellis;
      for (std::int64_t block = 0; block < each.tokens / kTileTokens; ++block) {
        for (int head = 0; head < options.kv_heads; ++head) {
          jobs.push_back({&each, block, head, &detail::encode_keys});
          jobs.push_back({&each, block, head, &detail::encode_values});
        }
      }
    }
    if (jobs.empty()) return;
    // A microsecond or two each; a search for codes some hundred.
    const std::int64_t worth = searches ? 2 : 16;
    parallel_for(
        resources, std::ssize(jobs), worth, memory_bytes, [&](std::int64_t i, std::byte* memory) {
          const Job& job = jobs[static_cast<std::size_t>(i)];
          job.encode(*job.of->context, *job.of->row, job.of->sealing, job.block, job.head, memory);
        });
  }

  // Of the n-th row of all caches; null where nothing is sealed.
  detail::Sealing* of(std::size_t n) noexcept {
    return rows_[n].tokens > 0 ? &rows_[n].sealing : nullptr;
  }
  void commit() noexcept {
    for (RowSealing& each : rows_) {
      if (each.tokens > 0) detail::commit(*each.row, std::move(each.sealing));
    }
  }

 private:
  struct RowSealing {
    const Context* context;
    Row* row;
    std::int64_t tokens;
    detail::Sealing sealing;
  };
  struct Job {
    RowSealing* of;
    std::int64_t block;
    int head;
    decltype(&detail::encode_keys) encode;
  };

  void add(const Context& context, Row& row, const Resources& resources) {
    const std::int64_t tokens =
        detail::encodable(context, row, detail::sealable(context, row), resources);
    RowSealing& added = rows_.emplace_back(RowSealing{&context, &row, tokens, {}});
    if (tokens > 0) added.sealing = detail::prepare_sealing(context, row, tokens, resources);
  }

  std::vector<RowSealing> rows_;
};

}  // namespace TQAI_LOCAL

TQAI_INLINE void append(std::span<const SequenceTokens> sequences, const Resources& resources) {
  (void)usable_threads(resources);  // whether or not this call has work for them
  const UsualArithmetic usual;
  std::vector<const SequenceTokens*> given;  // those of any tokens
  std::vector<CacheState*> states;
  std::vector<const KvCache*> caches;
  check_each(sequences.size(), [&](std::size_t i) {
    const SequenceTokens& each = sequences[i];
    CacheState& state = CacheAccess::state(given_cache(each.cache));
    check_append(state, each.keys, each.values, each.positions, resources);
    caches.push_back(each.cache);
    if (each.keys.shape[2] == 0) return;
    given.push_back(&each);
    states.push_back(&state);
  });
  check_once(std::move(caches));
  Sealings sealings(states, resources);
  std::vector<Stand> stands;
  for (std::size_t i = 0; i < given.size(); ++i) {
    const Context& context = states[i]->context;
    const std::int64_t tokens = given[i]->keys.shape[2];
    for (std::size_t b = 0; b < states[i]->rows.size(); ++b) {
      Row& row = states[i]->rows[b];
      detail::Sealing* sealing = sealings.of(stands.size());
      stands.push_back(stand(context, row,
                             sealing != nullptr ? sealing->tail_positions : row.tail_positions,
                             given[i]->positions, static_cast<std::int64_t>(b), tokens));
      detail::ExactTokens& tail = sealing != nullptr ? sealing->tail : row.tail;
      detail::reserve_tail(context, tail, tokens);
      copy_in(context, tail, given[i]->keys, given[i]->values, static_cast<std::int64_t>(b),
              resources);
    }
  }
  // From here on nothing may throw.
  sealings.commit();
  std::size_t n = 0;
  for (std::size_t i = 0; i < given.size(); ++i) {
    for (std::size_t b = 0; b < states[i]->rows.size(); ++b, ++n) {
      Row& row = states[i]->rows[b];
      row.tail.header().tokens += given[i]->keys.shape[2];
      row.tail_positions = std::move(stands[n].tail);
      row.next_position = stands[n].next;
    }
    states[i]->tokens += given[i]->keys.shape[2];
  }
}

TQAI_INLINE std::int64_t seal(std::span<KvCache* const> caches, const Resources& resources) {
  (void)usable_threads(resources);
  const UsualArithmetic usual;
  std::vector<CacheState*> states;
  check_each(caches.size(),
             [&](std::size_t i) { states.push_back(&CacheAccess::state(given_cache(caches[i]))); });
  check_once({caches.begin(), caches.end()});
  Sealings(states, resources).commit();
  std::int64_t most = 0;
  for (const CacheState* state : states) {
    for (const Row& row : state->rows) most = std::max(most, sealable(state->context, row));
  }
  return most;
}

TQAI_INLINE void attend(std::span<const SequenceQueries> sequences, const Resources& resources) {
  std::vector<detail::AttendCall> calls;
  calls.reserve(sequences.size());
  check_each(sequences.size(), [&](std::size_t i) {
    const SequenceQueries& each = sequences[i];
    const CacheState& state = CacheAccess::state(given_cache(each.cache));
    check_attend(state, each.queries, each.output, each.options);
    calls.push_back(
        {&state.context, state.rows, state.tokens, &each.queries, &each.output, &each.options});
  });
  detail::attend(calls, resources);
}

TQAI_INLINE void crop(std::span<const SequenceLength> sequences) {
  std::vector<const KvCache*> caches;
  std::vector<std::vector<detail::Cropping>> cropped;
  cropped.reserve(sequences.size());
  check_each(sequences.size(), [&](std::size_t i) {
    const SequenceLength& each = sequences[i];
    caches.push_back(&given_cache(each.cache));
    cropped.push_back(detail::prepare_cropping(CacheAccess::state(*each.cache), each.tokens));
  });
  check_once(std::move(caches));
  for (std::size_t i = 0; i < cropped.size(); ++i) {
    detail::commit(CacheAccess::state(*sequences[i].cache), std::move(cropped[i]));
  }
}

namespace TQAI_LOCAL {

// The tokens of all sequences, from one tensor's dimension.
template <class Cache>
void check_packed(std::span<Cache* const> caches, std::span<const std::int64_t> counts,
                  const char* name, std::int64_t rows, std::int64_t tokens) {
  if (counts.size() != caches.size()) {
    throw ValueError(std::to_string(counts.size()) + " counts for " +
                     std::to_string(caches.size()) + " caches; one each is needed");
  }
  check_range("the number of tokens", tokens, 0, detail::kMostTokens);
  std::int64_t sum = 0;
  check_each(caches.size(), [&](std::size_t i) {
    if (given_cache(caches[i]).batch() != 1) {
      throw ValueError("its cache has " + std::to_string(caches[i]->batch()) +
                       " rows; tensors of all sequences' tokens need caches of one");
    }
    check_range("its count", counts[i], 0, tokens);
    sum += counts[i];
  });
  if (rows == 1 && sum == tokens) return;
  throw ValueError(std::string(name) + " have " + std::to_string(rows) + " rows of " +
                   std::to_string(tokens) + " tokens; needed: 1 row of " + std::to_string(sum) +
                   ", the sum of the counts");
}

// Entries first … first + count − 1 along an axis.
template <class T>
T part_of(T tensor, std::size_t axis, std::int64_t first, std::int64_t count, std::size_t element) {
  using Byte = std::conditional_t<std::is_const_v<std::remove_pointer_t<decltype(tensor.data)>>,
                                  const std::byte, std::byte>;
  // Without any, `first` may be a place that the stride does not reach.
  if (tensor.data != nullptr && count > 0) {
    tensor.data = reinterpret_cast<decltype(tensor.data)>(reinterpret_cast<Byte*>(tensor.data) +
                                                          first * tensor.strides[axis] *
                                                              static_cast<std::int64_t>(element));
  }
  tensor.shape[axis] = count;
  return tensor;
}

}  // namespace TQAI_LOCAL

TQAI_INLINE void append(std::span<KvCache* const> caches, std::span<const std::int64_t> counts,
                        const ConstTensor& keys, const ConstTensor& values,
                        const std::optional<PositionTensor>& positions,
                        const Resources& resources) {
  check_packed(caches, counts, "keys", keys.shape[0], keys.shape[2]);
  check_packed(caches, counts, "values", values.shape[0], values.shape[2]);
  if (positions) {
    check_packed(caches, counts, "positions", positions->shape[0], positions->shape[2]);
    detail::check_memory("positions", positions->data, sizeof(std::int64_t),
                         positions->shape.data(), positions->strides.data(),
                         positions->shape.size());
  }
  detail::check_layout("keys", keys);
  detail::check_layout("values", values);
  std::vector<SequenceTokens> sequences;
  std::int64_t first = 0;
  for (std::size_t i = 0; i < caches.size(); ++i) {
    SequenceTokens& each = sequences.emplace_back();
    each.cache = caches[i];
    each.keys = part_of(keys, 2, first, counts[i], size_of(keys.dtype));
    each.values = part_of(values, 2, first, counts[i], size_of(values.dtype));
    if (positions) {
      each.positions = part_of(*positions, 2, first, counts[i], sizeof(std::int64_t));
    }
    first += counts[i];
  }
  append(sequences, resources);
}

TQAI_INLINE void attend(std::span<const KvCache* const> caches,
                        std::span<const std::int64_t> counts, const ConstTensor& queries,
                        const Tensor& output, const AttendOptions& options,
                        const Resources& resources) {
  check_packed(caches, counts, "queries", queries.shape[0], queries.shape[2]);
  check_packed(caches, counts, "outputs", output.shape[0], output.shape[1]);
  if (options.mask) {
    throw ValueError(
        "a mask for the tokens of all sequences; the columns of each are its own tokens, so give "
        "one to each (SequenceQueries::options)");
  }
  detail::check_layout("queries", queries);
  detail::check_written("output", output);
  detail::check_apart("output", output, "the queries", queries);
  if (options.log_sum_exp) check_log_sum_exp(*options.log_sum_exp, queries, output);
  std::vector<SequenceQueries> sequences;
  std::int64_t first = 0;
  for (std::size_t i = 0; i < caches.size(); ++i) {
    SequenceQueries& each = sequences.emplace_back();
    each.cache = caches[i];
    each.queries = part_of(queries, 2, first, counts[i], size_of(queries.dtype));
    each.output = part_of(output, 1, first, counts[i], size_of(output.dtype));
    each.options = options;
    if (options.log_sum_exp) {
      each.options.log_sum_exp = part_of(*options.log_sum_exp, 1, first, counts[i], sizeof(float));
    }
    first += counts[i];
  }
  attend(sequences, resources);
}

TQAI_INLINE void KvCache::append(const ConstTensor& keys, const ConstTensor& values,
                                 const std::optional<PositionTensor>& positions,
                                 const Resources& resources) {
  const SequenceTokens tokens{this, keys, values, positions};
  tqai::append({&tokens, 1}, resources);
}

TQAI_INLINE std::int64_t KvCache::seal(const Resources& resources) {
  KvCache* const one = this;
  return tqai::seal({&one, 1}, resources);
}

TQAI_INLINE void KvCache::attend(const ConstTensor& queries, const Tensor& output,
                                 const AttendOptions& options, const Resources& resources) const {
  check_attend(*state_, queries, output, options);
  const detail::AttendCall call{&state_->context, state_->rows, state_->tokens,
                                &queries,         &output,      &options};
  detail::attend({&call, 1}, resources);
}

}  // namespace tqai
