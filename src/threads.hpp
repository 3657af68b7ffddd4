// What a call needs of the process and the thread that it runs in.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstddef>
#include <cstdint>
#include <exception>
#include <functional>
#include <memory>
#include <tqai/resources.hpp>

#ifdef _OPENMP
#include <omp.h>
#endif

namespace tqai {

/// How many OpenMP threads a parallel region may have, `wanted` of them where that is not 0: 1
/// without OpenMP, and in a forked child of a process that had several threads. If they were
/// OpenMP's, the application's or ours, the child would wait for ever for what the fork did not
/// copy. Thread-safe.
int usable_threads(int wanted = 0) noexcept;

/// The same for a call with these resources. Throws ValueError where they are not allowed.
int usable_threads(const Resources& resources);

/// The processor computes as it does for any program that has told it nothing, as long as this
/// lives: to the nearest, with subnormal numbers, without traps. Applications may have told it
/// otherwise (audio, torch.set_flush_denormal, fesetround, feenableexcept): then vectors of small
/// norms would come out otherwise than elsewhere, all of them would, or the process would end by
/// SIGFPE at a NaN query. For the calling thread; it puts back what was.
class UsualArithmetic {
 public:
  UsualArithmetic() noexcept;
  ~UsualArithmetic();
  UsualArithmetic(const UsualArithmetic&) = delete;
  UsualArithmetic& operator=(const UsualArithmetic&) = delete;

 private:
  unsigned long long saved_ = 0;
};

/// What was thrown first in a parallel region, which nothing may leave by being thrown.
class FirstError {
 public:
  /// Calls `work`, or does nothing once something was thrown.
  template <class Work>
  void guard(const Work& work) noexcept {
    if (thrown_.load(std::memory_order_relaxed)) return;
    try {
      work();
    } catch (...) {
      if (!thrown_.exchange(true)) error_ = std::current_exception();
    }
  }
  /// After the region: throws it on.
  void rethrow() const {
    if (error_) std::rethrow_exception(error_);
  }

 private:
  std::atomic<bool> thrown_{false};
  std::exception_ptr error_;
};

namespace detail {

/// A call's working memory, 64-byte aligned, whose contents are undefined: of its workspace, or its
/// own.
class WorkingMemory {
 public:
  /// Throws std::bad_alloc, or ValueError where the workspace is in use.
  WorkingMemory(const Resources& resources, std::size_t bytes);
  ~WorkingMemory();
  WorkingMemory(const WorkingMemory&) = delete;
  WorkingMemory& operator=(const WorkingMemory&) = delete;

  std::byte* data() const noexcept { return data_; }

 private:
  Workspace own_;
  Workspace* used_ = nullptr;
  std::byte* data_ = nullptr;
};

}  // namespace detail

/// Working memory of several threads, 64-byte aligned, whose contents are undefined.
class ThreadMemory {
 public:
  /// Throws as detail::WorkingMemory.
  ThreadMemory(int threads, std::size_t bytes, const Resources& resources = {})
      : of_one_((bytes + 63) / 64 * 64),
        memory_(resources, of_one_ * static_cast<std::size_t>(threads)) {}
  /// That of one, `bytes`.
  std::byte* of(int thread) const noexcept {
    return memory_.data() + of_one_ * static_cast<std::size_t>(thread);
  }

 private:
  std::size_t of_one_;
  detail::WorkingMemory memory_;
};

/// work(i, slot) for each i in 0…count − 1, by an application's threads; a slot, of 0…slots − 1, is
/// of one thread at a time. `work` must not throw; what the executor throws comes out of here.
template <class Work>
void hand_out(const Resources& resources, int slots, std::int64_t count, const Work& work) {
  std::atomic<std::int64_t> next{0};
  std::atomic<int> taken{0};
  const auto serve = [&](int slot) noexcept {
    const UsualArithmetic usual;
    for (std::int64_t i = next++; i < count; i = next++) work(i, slot);
  };
  const auto serve_next = [&](std::int64_t /*index*/) {
    const int slot = taken++;
    if (slot < slots) serve(slot);
  };
  resources.parallel_for(std::min<std::int64_t>(slots, count), std::cref(serve_next));
  serve(0);  // what was left undone
}

/// work(i, memory) for each i in 0…count − 1, by several threads where there are `worth` of them or
/// more; memory: the thread's, `bytes` of it. What `work` throws comes out of here, when no thread
/// is at work any more; some i may be left out then. The order does not matter, nor does the number
/// of threads. Throws std::bad_alloc before any work.
template <class Work>
void parallel_for(const Resources& resources, std::int64_t count, std::int64_t worth,
                  std::size_t bytes, const Work& work) {
  const int usable = usable_threads(resources);
  const int threads = count >= worth ? usable : 1;
  const ThreadMemory memory(threads, bytes, resources);
  if (threads > 1 && resources.parallel_for) {
    FirstError error;
    hand_out(resources, threads, count, [&](std::int64_t i, int slot) noexcept {
      error.guard([&] { work(i, memory.of(slot)); });
    });
    error.rethrow();
    return;
  }
#ifdef _OPENMP
  if (threads > 1) {
    FirstError error;
#pragma omp parallel num_threads(threads)
    {
      const UsualArithmetic usual;
      std::byte* const own = memory.of(omp_get_thread_num());
#pragma omp for schedule(static)
      for (std::int64_t i = 0; i < count; ++i) error.guard([&] { work(i, own); });
    }
    error.rethrow();
    return;
  }
#endif
  for (std::int64_t i = 0; i < count; ++i) work(i, memory.of(0));
}

/// The same with OpenMP's threads.
template <class Work>
void parallel_for(std::int64_t count, std::int64_t worth, std::size_t bytes, const Work& work) {
  parallel_for(Resources{}, count, worth, bytes, work);
}

/// The same without memory: work(i).
template <class Work>
void parallel_for(std::int64_t count, std::int64_t worth, const Work& work) {
  parallel_for(count, worth, 0, [&](std::int64_t i, std::byte* /*memory*/) { work(i); });
}

}  // namespace tqai
