// Attention of a batch of query rows over the rows of a cache: splits the work, merges the parts.
#pragma once

#include <span>
#include <tqai/cache.hpp>

#include "row.hpp"

namespace tqai::detail {

/// Arguments as KvCache::attend, already checked. `tokens`: the cache's logical length.
void attend(const Context& context, std::span<const Row> rows, std::int64_t tokens,
            const ConstTensor& queries, const Tensor& output, const AttendOptions& options);

/// Arguments as KvCache::gather, already checked.
void gather(const Context& context, std::span<const Row> rows, std::int64_t first,
            const Tensor& keys, const Tensor& values);

}  // namespace tqai::detail
