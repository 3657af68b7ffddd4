// What a KvCache holds, for the functions that work on it.
#pragma once

#include <array>
#include <cstdint>
#include <tqai/cache.hpp>
#include <vector>

#include "context.hpp"
#include "memory.hpp"
#include "row.hpp"

namespace tqai {

struct KvCache::State {
  detail::Context context;
  std::int64_t tokens = 0;
  detail::CountedVector<detail::Row> rows;
};

namespace detail {

/// For functions that are not members.
struct CacheAccess {
  using State = KvCache::State;
  static State& state(KvCache& cache) noexcept { return *cache.state_; }
  static const State& state(const KvCache& cache) noexcept { return *cache.state_; }
};
using CacheState = CacheAccess::State;

/// KvCache::crop in two steps, of which the second cannot fail.
std::vector<Cropping> prepare_cropping(const CacheState& state, std::int64_t tokens);
void commit(CacheState& state, std::vector<Cropping>&& rows) noexcept;

/// Of keys or values.
inline std::array<std::int64_t, 4> shape_of(const CacheState& state, std::int64_t tokens, int dim) {
  return {std::ssize(state.rows), state.context.options.kv_heads, tokens, dim};
}
inline constexpr const char* kKeyAxes = "batch, kv_heads, tokens, head_dim";
inline constexpr const char* kValueAxes = "batch, kv_heads, tokens, value_head_dim";

}  // namespace detail
}  // namespace tqai
