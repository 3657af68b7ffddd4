#include "memory.hpp"

#include <string>
#include <tqai/cache.hpp>

#include "slabs.hpp"

namespace tqai {
namespace TQAI_LOCAL {

TQAI_INLINE std::atomic<std::size_t> g_allocated{0};
TQAI_INLINE std::atomic<std::size_t> g_limit{0};  // 0: none
constexpr std::align_val_t kAlignment{64};
constexpr std::size_t kLarge = std::size_t{1} << 22;  // of allocations, that of a few huge pages

// Counts bytes that are about to be allocated, and takes them back unless they are.
class Counted {
 public:
  explicit Counted(std::size_t bytes) : bytes_(bytes) {
    const std::size_t before = g_allocated.fetch_add(bytes, std::memory_order_relaxed);
    const std::size_t limit = g_limit.load(std::memory_order_relaxed);
    if (limit == 0 || (bytes <= limit && before <= limit - bytes)) return;
    g_allocated.fetch_sub(bytes, std::memory_order_relaxed);
    throw MemoryLimitError("caches hold " + std::to_string(before) + " bytes and need " +
                           std::to_string(bytes) + " more; limit_memory allows " +
                           std::to_string(limit) + ": drop or crop caches, or raise the limit");
  }
  ~Counted() {
    if (!kept_) g_allocated.fetch_sub(bytes_, std::memory_order_relaxed);
  }
  Counted(const Counted&) = delete;
  Counted& operator=(const Counted&) = delete;
  void keep() noexcept { kept_ = true; }

 private:
  std::size_t bytes_;
  bool kept_ = false;
};

}  // namespace TQAI_LOCAL

TQAI_INLINE std::size_t allocated_bytes() noexcept {
  return g_allocated.load(std::memory_order_relaxed);
}

TQAI_INLINE void limit_memory(std::size_t bytes) noexcept {
  g_limit.store(bytes, std::memory_order_relaxed);
}

TQAI_INLINE std::size_t memory_limit() noexcept { return g_limit.load(std::memory_order_relaxed); }

namespace detail {

TQAI_INLINE void* allocate(std::size_t bytes) {
  Counted counted(bytes);
  void* memory = bytes < kLarge ? ::operator new(bytes, kAlignment) : allocate_large(bytes);
  counted.keep();
  return memory;
}

TQAI_INLINE void deallocate(void* memory, std::size_t bytes) noexcept {
  if (bytes < kLarge) {
    ::operator delete(memory, kAlignment);
  } else {
    deallocate_large(memory, bytes);
  }
  g_allocated.fetch_sub(bytes, std::memory_order_relaxed);
}

TQAI_INLINE void* allocate_sealed(std::size_t bytes, const void* near) {
  Counted counted(bytes);
  void* memory = allocate_block(bytes, near);
  counted.keep();
  return memory;
}

TQAI_INLINE void deallocate_sealed(void* memory, std::size_t bytes) noexcept {
  deallocate_block(memory, bytes);
  g_allocated.fetch_sub(bytes, std::memory_order_relaxed);
}

}  // namespace detail
}  // namespace tqai
