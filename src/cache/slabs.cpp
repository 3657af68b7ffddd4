#include "slabs.hpp"

#include <algorithm>
#include <array>
#include <cstdint>
#include <limits>
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
#include <unistd.h>
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

// Gives back the pages that lie within these bytes, which read as zeros when they are used again.
TQAI_INLINE void release_pages(std::byte* first, std::byte* end) noexcept {
  static const auto page = static_cast<std::uintptr_t>(sysconf(_SC_PAGESIZE));
  const std::uintptr_t from = round_up(reinterpret_cast<std::uintptr_t>(first), page);
  const std::uintptr_t to = reinterpret_cast<std::uintptr_t>(end) / page * page;
  if (from < to)
    madvise(first + (from - reinterpret_cast<std::uintptr_t>(first)), to - from, MADV_DONTNEED);
}
#else
TQAI_INLINE void* map_slab(std::size_t bytes) {
  return ::operator new(bytes, std::align_val_t{kLine});
}

TQAI_INLINE void unmap_slab(void* slab, std::size_t /*bytes*/) noexcept {
  ::operator delete(slab, std::align_val_t{kLine});
}

TQAI_INLINE void release_pages(std::byte* /*first*/, std::byte* /*end*/) noexcept {}
#endif

#ifdef MADV_NOHUGEPAGE
TQAI_INLINE void keep_off_huge_pages(std::byte* slab, std::size_t bytes) noexcept {
  madvise(slab, bytes, MADV_NOHUGEPAGE);
}
#else
TQAI_INLINE void keep_off_huge_pages(std::byte* /*slab*/, std::size_t /*bytes*/) noexcept {}
#endif

struct Slab {
  // Dropped: free, and its pages may still be there.
  enum class Block : std::uint8_t { untouched, used, dropped };
  std::byte* memory = nullptr;
  std::vector<Block> blocks;
  std::vector<std::uint32_t> used_of_run;
  std::size_t used = 0;
  std::size_t dropped = 0;
  std::size_t runs_used = 0;  // with any block used
  bool released = false;      // pages, at least once
  // Neighbours among slabs with free blocks, and among those with free runs.
  std::array<Slab*, 2> before{};
  std::array<Slab*, 2> after{};
};

// Blocks of one size; the lock is the caller's.
//
// Rows add blocks in turn, so that without care the pages of two conversations would be the same
// ones, and stay when one of them ends. Hence runs: a row's next block is the one after its last,
// and a row with no room there takes a run that nobody has, for as long as what this leaves unused
// is no more than a part of what is used; then any free block.
class Pool {
 public:
  explicit Pool(std::size_t block)
      : block_(block),
        bytes_(slab_bytes(block)),
        blocks_(bytes_ / block),
        run_(std::max<std::size_t>(kRunBytes / block, 1)),
        runs_((blocks_ + run_ - 1) / run_) {}

  void* allocate(const void* near) {
    if (near != nullptr) {
      const auto* last = static_cast<const std::byte*>(near);
      const auto found = slabs_.upper_bound(const_cast<std::byte*>(last));
      if (found != slabs_.begin()) {
        Slab& slab = std::prev(found)->second;
        const std::size_t next = static_cast<std::size_t>(last - slab.memory) / block_ + 1;
        if (next < blocks_ && next % run_ != 0 && slab.blocks[next] != Slab::Block::used) {
          return take(slab, next);
        }
      }
    }
    if (first_[kRuns] == nullptr && !has_slack()) add_slab();
    if (Slab* slab = first_[kRuns]) {
      std::size_t run = 0;
      while (slab->used_of_run[run] > 0) ++run;
      return take(*slab, run * run_);
    }
    Slab& slab = *first_[kBlocks];
    std::size_t run = 0;
    while (slab.used_of_run[run] == std::min(run_, blocks_ - run * run_)) ++run;
    std::size_t index = run * run_;
    while (slab.blocks[index] == Slab::Block::used) ++index;
    return take(slab, index);
  }

  void deallocate(void* memory) noexcept {
    auto* block = static_cast<std::byte*>(memory);
    const auto found = std::prev(slabs_.upper_bound(block));
    Slab& slab = found->second;
    const std::size_t index = static_cast<std::size_t>(block - slab.memory) / block_;
    --used_;
    if (slab.used-- == blocks_) add(kBlocks, slab);
    if (--slab.used_of_run[index / run_] == 0 && slab.runs_used-- == runs_) add(kRuns, slab);
    if (slab.used == 0) {
      remove(kBlocks, slab);
      remove(kRuns, slab);
      unmap_slab(slab.memory, bytes_);
      slabs_.erase(found);
      return;
    }
    slab.blocks[index] = Slab::Block::dropped;
    if (++slab.dropped * block_ > bytes_ / kMostDropped) release(slab);
  }

 private:
  // Blocks of so many bytes lie together at least, if there are as many of a row.
  static constexpr std::size_t kRunBytes = std::size_t{1} << 17;
  // Of used blocks, the part that may be free in runs that are begun.
  static constexpr std::size_t kMostSlack = 4;
  // A slab holds pages of blocks that nobody has any more up to this part of it.
  static constexpr std::size_t kMostDropped = 16;
  // Lists of slabs with free blocks, and with free runs.
  static constexpr std::size_t kBlocks = 0;
  static constexpr std::size_t kRuns = 1;

  bool has_slack() const noexcept {
    const std::size_t free = slabs_.size() * blocks_ - used_;
    return free > 0 && free >= used_ / kMostSlack;
  }

  void* take(Slab& slab, std::size_t index) noexcept {
    if (slab.blocks[index] == Slab::Block::dropped) --slab.dropped;
    slab.blocks[index] = Slab::Block::used;
    ++used_;
    if (++slab.used == blocks_) remove(kBlocks, slab);
    if (slab.used_of_run[index / run_]++ == 0 && ++slab.runs_used == runs_) remove(kRuns, slab);
    return slab.memory + index * block_;
  }

  void add(std::size_t list, Slab& slab) noexcept {
    slab.before[list] = nullptr;
    slab.after[list] = first_[list];
    if (first_[list] != nullptr) first_[list]->before[list] = &slab;
    first_[list] = &slab;
  }

  void remove(std::size_t list, Slab& slab) noexcept {
    (slab.before[list] != nullptr ? slab.before[list]->after[list] : first_[list]) =
        slab.after[list];
    if (slab.after[list] != nullptr) slab.after[list]->before[list] = slab.before[list];
  }

  void add_slab() {
    Slab made;
    made.blocks.assign(blocks_, Slab::Block::untouched);
    made.used_of_run.assign(runs_, 0);
    made.memory = static_cast<std::byte*>(map_slab(bytes_));
    std::byte* const memory = made.memory;
    try {
      Slab& slab = slabs_.emplace(memory, std::move(made)).first->second;
      add(kBlocks, slab);
      add(kRuns, slab);
    } catch (...) {
      unmap_slab(memory, bytes_);
      throw;
    }
  }

  // Gives back the pages of blocks that are free. Huge ones among them are parted, and the system
  // must not join them again with what was given back.
  void release(Slab& slab) noexcept {
    if (!slab.released) keep_off_huge_pages(slab.memory, bytes_);
    slab.released = true;
    slab.dropped = 0;
    for (std::size_t first = 0; first < blocks_;) {
      std::size_t end = first;
      bool dropped = false;
      for (; end < blocks_ && slab.blocks[end] != Slab::Block::used; ++end) {
        dropped |= slab.blocks[end] == Slab::Block::dropped;
        slab.blocks[end] = Slab::Block::untouched;
      }
      if (dropped) release_pages(slab.memory + first * block_, slab.memory + end * block_);
      first = end + 1;
    }
  }

  std::size_t block_;
  std::size_t bytes_;   // of a slab
  std::size_t blocks_;  // of a slab
  std::size_t run_;     // blocks
  std::size_t runs_;    // of a slab, the last one perhaps shorter
  std::size_t used_ = 0;
  std::map<std::byte*, Slab> slabs_;  // by their first byte
  std::array<Slab*, 2> first_{};
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
TQAI_INLINE void* allocate_block(std::size_t bytes, const void* /*near*/) {
  return ::operator new(bytes, std::align_val_t{kLine});
}

TQAI_INLINE void deallocate_block(void* block, std::size_t /*bytes*/) noexcept {
  ::operator delete(block, std::align_val_t{kLine});
}

TQAI_INLINE void* allocate_large(std::size_t bytes) { return allocate_block(bytes, nullptr); }

TQAI_INLINE void deallocate_large(void* memory, std::size_t bytes) noexcept {
  deallocate_block(memory, bytes);
}
#else
TQAI_INLINE void* allocate_large(std::size_t bytes) {
  if (bytes > std::numeric_limits<std::size_t>::max() - 2 * kHugePage) throw std::bad_alloc();
  return map_slab(round_up(bytes, kHugePage));
}

TQAI_INLINE void deallocate_large(void* memory, std::size_t bytes) noexcept {
  unmap_slab(memory, round_up(bytes, kHugePage));
}

TQAI_INLINE void* allocate_block(std::size_t bytes, const void* near) {
  const std::size_t block = round_up(bytes, kLine);
  Pools& all = pools();
  const std::scoped_lock lock(all.mutex);
  return all.by_block.try_emplace(block, block).first->second.allocate(near);
}

TQAI_INLINE void deallocate_block(void* block, std::size_t bytes) noexcept {
  Pools& all = pools();
  const std::scoped_lock lock(all.mutex);
  all.by_block.find(round_up(bytes, kLine))->second.deallocate(block);
}
#endif

}  // namespace tqai::detail
