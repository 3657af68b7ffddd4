// What a call needs of the process and the thread that it runs in.
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <exception>
#include <memory>

#ifdef _OPENMP
#include <omp.h>
#endif

namespace tqai {

/// How many OpenMP threads a parallel region may have: 1 without OpenMP, and in a forked child of a
/// process that had several threads. If they were OpenMP's, the application's or ours, the child
/// would wait for ever for what the fork did not copy. Thread-safe.
int usable_threads() noexcept;

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

/// Working memory of several threads, 64-byte aligned, whose contents are undefined.
class ThreadMemory {
 public:
  /// Throws std::bad_alloc.
  ThreadMemory(int threads, std::size_t bytes)
      : lines_((bytes + sizeof(Line) - 1) / sizeof(Line)),
        memory_(new Line[lines_ * static_cast<std::size_t>(threads)]) {}
  /// That of one, `bytes`.
  std::byte* of(int thread) const noexcept {
    return memory_[lines_ * static_cast<std::size_t>(thread)].bytes;
  }

 private:
  struct alignas(64) Line {
    std::byte bytes[64];
  };
  std::size_t lines_;  // of a thread
  std::unique_ptr<Line[]> memory_;
};

/// work(i, memory) for each i in 0…count − 1, by several threads where there are `worth` of them or
/// more; memory: the thread's, `bytes` of it. What `work` throws comes out of here, when no thread
/// is at work any more; some i may be left out then. The order does not matter, nor does the number
/// of threads. Throws std::bad_alloc before any work.
template <class Work>
void parallel_for(std::int64_t count, std::int64_t worth, std::size_t bytes, const Work& work) {
  const int threads = count >= worth ? usable_threads() : 1;
  const ThreadMemory memory(threads, bytes);
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

/// The same without memory: work(i).
template <class Work>
void parallel_for(std::int64_t count, std::int64_t worth, const Work& work) {
  parallel_for(count, worth, 0, [&](std::int64_t i, std::byte* /*memory*/) { work(i); });
}

}  // namespace tqai
