// Attention of a batch of query rows over the rows of a cache.
#pragma once

#include <span>
#include <tqai/cache.hpp>

#include "row.hpp"

namespace tqai::detail {

/// Arguments as KvCache::attend, already checked. `tokens`: the cache's logical length.
void attend(const Context& context, std::span<const Row> rows, std::int64_t tokens,
            const ConstTensor& queries, const Tensor& output, const AttendOptions& options);

}  // namespace tqai::detail
