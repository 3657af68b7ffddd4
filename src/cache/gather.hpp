// Reading a cache's tokens back.
#pragma once

#include <cstdint>
#include <span>
#include <tqai/cache.hpp>

#include "row.hpp"

namespace tqai::detail {

/// Arguments as KvCache::gather, already checked.
void gather(const Context& context, std::span<const Row> rows, std::int64_t first,
            const Tensor& keys, const Tensor& values);

}  // namespace tqai::detail
