// Attention of queries over the rows of caches.
#pragma once

#include <span>
#include <tqai/cache.hpp>

#include "attend_units.hpp"

namespace tqai::detail {

/// All of the calls, in one parallel region; each gives what it gives alone.
void attend(std::span<const AttendCall> calls, const Resources& resources);

}  // namespace tqai::detail
