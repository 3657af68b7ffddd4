// A cache that Python's threads may share.
#pragma once

#include <pybind11/pybind11.h>

#include <algorithm>
#include <functional>
#include <mutex>
#include <shared_mutex>
#include <tqai/cache.hpp>
#include <tqai/error.hpp>
#include <utility>
#include <vector>

namespace tqai::python {

class LockedCaches;

/// A KvCache behind a lock. Nobody waits for the lock with the GIL, nor for the GIL with the lock,
/// so neither can hold up the other for ever.
class LockedCache {
 public:
  explicit LockedCache(KvCache cache) : cache_(std::move(cache)) {}

  /// work(const KvCache&), beside other readers and without the GIL.
  template <typename Work>
  auto read(const Work& work) const {
    const pybind11::gil_scoped_release release;
    std::unique_lock turn(turn_);
    const std::shared_lock lock(mutex_);
    turn.unlock();
    return work(cache_);
  }

  /// The same for work that takes less time than to hand over the GIL: keeps it where nobody else
  /// has the lock.
  template <typename Work>
  auto peek(const Work& work) const {
    {
      const std::unique_lock turn(turn_, std::try_to_lock);
      if (turn.owns_lock()) {
        const std::shared_lock lock(mutex_, std::try_to_lock);
        if (lock.owns_lock()) return work(cache_);
      }
    }
    return read(work);
  }

  /// work(KvCache&), alone and without the GIL.
  template <typename Work>
  auto change(const Work& work) {
    const pybind11::gil_scoped_release release;
    const std::unique_lock turn(turn_);
    const std::unique_lock lock(mutex_);
    return work(cache_);
  }

  /// What never changes, and so needs no lock.
  const CacheOptions& options() const noexcept { return cache_.options(); }
  const Rotation& key_rotation() const { return cache_.key_rotation(); }
  const Rotation& value_rotation() const noexcept { return cache_.value_rotation(); }
  const TileLayout& tile_layout() const noexcept { return cache_.tile_layout(); }

 private:
  friend class LockedCaches;
  KvCache cache_;
  mutable std::shared_mutex mutex_;
  /// Taken before `mutex_`: readers that follow each other without a gap must not keep a writer
  /// out.
  mutable std::mutex turn_;
};

/// Many of them. Locks are taken in the order of their addresses, so that lists that overlap wait
/// for one another, and not for ever.
class LockedCaches {
 public:
  /// Throws ValueError for None. The caller keeps them alive.
  explicit LockedCaches(const std::vector<LockedCache*>& caches) : given_(caches), each_(caches) {
    if (std::find(given_.begin(), given_.end(), nullptr) != given_.end()) {
      throw ValueError("one of the caches is None; each is a KvCache");
    }
    std::sort(each_.begin(), each_.end(), std::less<>{});
    each_.erase(std::unique(each_.begin(), each_.end()), each_.end());
  }

  /// work(std::vector<const KvCache*>), as LockedCache::read.
  template <typename Work>
  auto read(const Work& work) const {
    const pybind11::gil_scoped_release release;
    std::vector<std::shared_lock<std::shared_mutex>> locks;
    locks.reserve(each_.size());
    for (const LockedCache* each : each_) {
      const std::unique_lock turn(each->turn_);
      locks.emplace_back(each->mutex_);
    }
    std::vector<const KvCache*> caches;
    for (const LockedCache* each : given_) caches.push_back(&each->cache_);
    return work(caches);
  }

  /// work(std::vector<KvCache*>), as LockedCache::change.
  template <typename Work>
  auto change(const Work& work) {
    const pybind11::gil_scoped_release release;
    std::vector<std::unique_lock<std::mutex>> turns;
    std::vector<std::unique_lock<std::shared_mutex>> locks;
    turns.reserve(each_.size());
    locks.reserve(each_.size());
    for (LockedCache* each : each_) {
      turns.emplace_back(each->turn_);
      locks.emplace_back(each->mutex_);
    }
    std::vector<KvCache*> caches;
    for (LockedCache* each : given_) caches.push_back(&each->cache_);
    return work(caches);
  }

 private:
  std::vector<LockedCache*> given_;
  std::vector<LockedCache*> each_;  // once, in the order of their addresses
};

}  // namespace tqai::python
