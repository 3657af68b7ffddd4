// Calls on many caches at a time: sequences of different lengths, that come and go.
#pragma once

#include <cstdint>
#include <optional>
#include <span>
#include <tqai/cache.hpp>
#include <tqai/export.hpp>
#include <tqai/resources.hpp>

namespace tqai {

// A sequence is a KvCache of its own: one of a runtime's requests, in one layer. It joins by being
// made, and leaves by being destroyed; a fork (a beam, another answer, a prompt that many begin
// with) is a copy, which shares all tiles until it ends, and its exact tokens until one is changed.
// So a batch of any lengths is a list of caches, and these functions do for the list what KvCache's
// members do for one, with the same results to the bit, in one parallel region. Geometries may
// differ: also the layers of a model are a list.
//
// All or nothing: what throws leaves every cache of the list as it was. A ValueError about one of
// several names it by its place. Each cache is used as by the member of the same name, so a list
// that changes caches needs them for itself, and has each of them once.

/// Tokens that a sequence is given: the arguments of KvCache::append.
struct SequenceTokens {
  KvCache* cache = nullptr;                 ///< not null
  ConstTensor keys;                         ///< [batch, kv_heads, n, head_dim], any n
  ConstTensor values;                       ///< [batch, kv_heads, n, value_head_dim]
  std::optional<PositionTensor> positions;  ///< of the keys
};

/// Queries that a sequence is asked: the arguments of KvCache::attend.
struct SequenceQueries {
  const KvCache* cache = nullptr;  ///< not null; may come several times
  ConstTensor queries;             ///< [batch, query_heads, n, head_dim], any n
  Tensor output;          ///< [batch, n, query_heads, value_head_dim], apart from all others
  AttendOptions options;  ///< of this sequence
};

/// What a sequence is cut to: the argument of KvCache::crop.
struct SequenceLength {
  KvCache* cache = nullptr;  ///< not null
  std::int64_t tokens = 0;   ///< to be kept
};

/// KvCache::append for each. What had left a window is sealed first, tiles of all sequences side by
/// side.
TQAI_API void append(std::span<const SequenceTokens> sequences, const Resources& resources = {});

/// KvCache::seal for each. Returns the most that one of them returns.
TQAI_API std::int64_t seal(std::span<KvCache* const> caches, const Resources& resources = {});

/// KvCache::attend for each. Work is shared out by what there is to read, so that a long sequence
/// among short ones does not keep threads waiting; forks read their tiles one after another, from
/// the processor's cache.
TQAI_API void attend(std::span<const SequenceQueries> sequences, const Resources& resources = {});

/// KvCache::crop for each, as after speculative decoding, where each sequence accepted a number of
/// its own.
TQAI_API void crop(std::span<const SequenceLength> sequences);

// The same for tensors in which the tokens of all sequences follow one another, as runtimes batch
// them: sequence i has the next counts[i] of them, 0 or more. Caches of one row; of one geometry.

/// keys: [1, kv_heads, Σ counts, head_dim], values: [1, kv_heads, Σ counts, value_head_dim];
/// positions: [1, sections, Σ counts]. A sequence of no tokens stays as it is.
TQAI_API void append(std::span<KvCache* const> caches, std::span<const std::int64_t> counts,
                     const ConstTensor& keys, const ConstTensor& values,
                     const std::optional<PositionTensor>& positions = {},
                     const Resources& resources = {});

/// queries: [1, query_heads, Σ counts, head_dim]; output: [1, Σ counts, query_heads,
/// value_head_dim]; options for all of them, without a mask, log_sum_exp [1, Σ counts, query_heads,
/// 1].
TQAI_API void attend(std::span<const KvCache* const> caches, std::span<const std::int64_t> counts,
                     const ConstTensor& queries, const Tensor& output,
                     const AttendOptions& options = {}, const Resources& resources = {});

}  // namespace tqai

#if defined(TQAI_HEADER_ONLY) || defined(TQAI_IMPLEMENTATION)
#define TQAI_SEQUENCES_READ
#include <tqai/header_only.hpp>
#endif
