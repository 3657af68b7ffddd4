#include "slabs.hpp"

#include <algorithm>
#include <cstdint>
#include <map>
#include <mutex>
#include <new>
#include <tqai/export.hpp>
#include <vector>

// Under AddressSanitizer each block is on its own, so that reading one that was freed is found.
#if defined(__SANITIZE_ADDRESS__)
#define TQAI_ASAN 1
#elif defined(__has_feature)
#if __has_feature(address_sanitizer)
#define TQAI_ASAN 1
#endif
#endif

#if __has_include(<sys/mman.h>)
#include <sys/mman.h>
#define TQAI_MMAP 1
#endif

namespace tqai::detail {
namespace TQAI_LOCAL {

constexpr std::size_t kHugePage = std::size_t{1} << 21;
constexpr std::size_t kLine = 64;
// Of a slab. What is not touched takes no memory.
constexpr std::size_t kLargestSlab = 8 * kHugePage;

constexpr std::size_t round_up(std::size_t value, std::size_t unit) {
  return (value + unit - 1) / unit * unit;
}

// Bytes of a slab of blocks of this size: the fewest huge pages of which less than 1 % is left
// over, else those of which least is.
TQAI_INLINE std::size_t slab_bytes(std::size_t block) {
  if (block >= kLargestSlab) return round_up(block, kHugePage);
  std::size_t best = 0;
  double least = 1.0;
  for (std::size_t bytes = round_up(block, kHugePage); bytes <= kLargestSlab; bytes += kHugePage) {
    const double over = static_cast<double>(bytes % block) / static_cast<double>(bytes);
    if (over < least) {
      best = bytes;
      least = over;
    }
    if (least < 0.01) break;
  }
  return best;
}

#ifdef TQAI_MMAP
TQAI_INLINE void* map_pages(std::size_t bytes) {
  void* memory = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (memory == MAP_FAILED) throw std::bad_alloc();
  return memory;
}

// Aligned to a huge page: more is mapped than needed, and what is outside given back.
TQAI_INLINE void* map_slab(std::size_t bytes) {
  auto* mapped = static_cast<std::byte*>(map_pages(bytes + kHugePage));
  const std::size_t before =
      (kHugePage - reinterpret_cast<std::uintptr_t>(mapped) % kHugePage) % kHugePage;
  std::byte* slab = mapped + before;
  if (before > 0) munmap(mapped, before);
  if (before < kHugePage) munmap(slab + bytes, kHugePage - before);
#ifdef MADV_HUGEPAGE
  madvise(slab, bytes, MADV_HUGEPAGE);  // a hint: without huge pages all works, slower
#endif
  return slab;
}

TQAI_INLINE void unmap_slab(void* slab, std::size_t bytes) noexcept { munmap(slab, bytes); }
#else
TQAI_INLINE void* map_slab(std::size_t bytes) {
  return ::operator new(bytes, std::align_val_t{kLine});
}

TQAI_INLINE void unmap_slab(void* slab, std::size_t /*bytes*/) noexcept {
  ::operator delete(slab, std::align_val_t{kLine});
}
#endif

// Blocks of one size; the lock is the caller's.
class Pool {
 public:
  explicit Pool(std::size_t block) : block_(block), bytes_(slab_bytes(block)) {}

  void* allocate() {
    auto found = std::find_if(slabs_.begin(), slabs_.end(),
                              [](const auto& each) { return !each.second.free.empty(); });
    if (found == slabs_.end()) found = add_slab();
    Slab& slab = found->second;
    const std::uint32_t index = slab.free.back();
    slab.free.pop_back();
    return found->first + index * block_;
  }

  void deallocate(void* memory) noexcept {
    auto* block = static_cast<std::byte*>(memory);
    const auto found = std::prev(slabs_.upper_bound(block));
    Slab& slab = found->second;
    slab.free.push_back(static_cast<std::uint32_t>(static_cast<std::size_t>(block - found->first) /
                                                   block_));  // has room: see add_slab
    if (slab.free.size() < bytes_ / block_) return;
    unmap_slab(found->first, bytes_);
    slabs_.erase(found);
  }

 private:
  struct Slab {
    std::vector<std::uint32_t> free;  // the last one goes first
  };

  std::map<std::byte*, Slab>::iterator add_slab() {
    Slab slab;
    for (std::size_t i = bytes_ / block_; i-- > 0;) {
      slab.free.push_back(static_cast<std::uint32_t>(i));
    }
    auto* memory = static_cast<std::byte*>(map_slab(bytes_));
    try {
      return slabs_.emplace(memory, std::move(slab)).first;
    } catch (...) {
      unmap_slab(memory, bytes_);
      throw;
    }
  }

  std::size_t block_;
  std::size_t bytes_;
  std::map<std::byte*, Slab> slabs_;  // by their first byte
};

struct Pools {
  std::mutex mutex;
  std::map<std::size_t, Pool> by_block;
};

// Never destroyed: caches may outlive the destructors of statics.
[[maybe_unused]] TQAI_INLINE Pools& pools() {
  static auto* pools = new Pools;
  return *pools;
}

}  // namespace TQAI_LOCAL

#ifdef TQAI_ASAN
TQAI_INLINE void* allocate_block(std::size_t bytes) {
  return ::operator new(bytes, std::align_val_t{kLine});
}

TQAI_INLINE void deallocate_block(void* block, std::size_t /*bytes*/) noexcept {
  ::operator delete(block, std::align_val_t{kLine});
}
#else
TQAI_INLINE void* allocate_block(std::size_t bytes) {
  const std::size_t block = round_up(bytes, kLine);
  Pools& all = pools();
  const std::scoped_lock lock(all.mutex);
  return all.by_block.try_emplace(block, block).first->second.allocate();
}

TQAI_INLINE void deallocate_block(void* block, std::size_t bytes) noexcept {
  Pools& all = pools();
  const std::scoped_lock lock(all.mutex);
  all.by_block.find(round_up(bytes, kLine))->second.deallocate(block);
}
#endif

}  // namespace tqai::detail
