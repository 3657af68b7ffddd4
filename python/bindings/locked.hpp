// A cache that Python's threads may share.
#pragma once

#include <pybind11/pybind11.h>

#include <mutex>
#include <shared_mutex>
#include <tqai/cache.hpp>
#include <utility>

namespace tqai::python {

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

 private:
  KvCache cache_;
  mutable std::shared_mutex mutex_;
  /// Taken before `mutex_`: readers that follow each other without a gap must not keep a writer
  /// out.
  mutable std::mutex turn_;
};

}  // namespace tqai::python
