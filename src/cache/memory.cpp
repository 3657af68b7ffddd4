#include "memory.hpp"

#include <tqai/cache.hpp>

#include "slabs.hpp"

namespace tqai {
namespace TQAI_LOCAL {

TQAI_INLINE std::atomic<std::size_t> g_allocated{0};
constexpr std::align_val_t kAlignment{64};

}  // namespace TQAI_LOCAL

TQAI_INLINE std::size_t allocated_bytes() noexcept {
  return g_allocated.load(std::memory_order_relaxed);
}

namespace detail {

TQAI_INLINE void* allocate(std::size_t bytes) {
  void* memory = ::operator new(bytes, kAlignment);
  g_allocated.fetch_add(bytes, std::memory_order_relaxed);
  return memory;
}

TQAI_INLINE void deallocate(void* memory, std::size_t bytes) noexcept {
  ::operator delete(memory, kAlignment);
  g_allocated.fetch_sub(bytes, std::memory_order_relaxed);
}

TQAI_INLINE void* allocate_sealed(std::size_t bytes) {
  void* memory = allocate_block(bytes);
  g_allocated.fetch_add(bytes, std::memory_order_relaxed);
  return memory;
}

TQAI_INLINE void deallocate_sealed(void* memory, std::size_t bytes) noexcept {
  deallocate_block(memory, bytes);
  g_allocated.fetch_sub(bytes, std::memory_order_relaxed);
}

}  // namespace detail
}  // namespace tqai
