// What a call needs of the process and the thread that it runs in.
#pragma once

#include <atomic>
#include <cstdint>
#include <exception>

namespace tqai {

/// How many OpenMP threads a parallel region may have: 1 without OpenMP, and in a forked child of a
/// process that has used them, where a second thread would wait for ever for those that the fork
/// did not copy. Call it right before a region. Thread-safe.
int usable_threads() noexcept;

/// Subnormal numbers count, and results are subnormal where they are that small, as long as this
/// lives: applications (audio, torch.set_flush_denormal) may have told the processor otherwise, and
/// vectors of small norms would come out otherwise than elsewhere. For the calling thread; it puts
/// back what was.
class SubnormalNumbers {
 public:
  SubnormalNumbers() noexcept;
  ~SubnormalNumbers();
  SubnormalNumbers(const SubnormalNumbers&) = delete;
  SubnormalNumbers& operator=(const SubnormalNumbers&) = delete;

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

/// work(i) for each i in 0…count − 1, by several threads where there are `worth` of them or more.
/// What `work` throws comes out of here, when no thread is at work any more; some i may be left out
/// then. The order does not matter, nor does the number of threads.
template <class Work>
void parallel_for(std::int64_t count, [[maybe_unused]] std::int64_t worth, const Work& work) {
#ifdef _OPENMP
  if (count >= worth && usable_threads() > 1) {
    FirstError error;
#pragma omp parallel
    {
      const SubnormalNumbers counted;
#pragma omp for schedule(static)
      for (std::int64_t i = 0; i < count; ++i) error.guard([&] { work(i); });
    }
    error.rethrow();
    return;
  }
#endif
  for (std::int64_t i = 0; i < count; ++i) work(i);
}

}  // namespace tqai
