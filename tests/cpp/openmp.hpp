// The number of threads that the library uses, for tests; without OpenMP it is always one.
#pragma once

#ifdef _OPENMP
#include <omp.h>
#endif

namespace tqai::test {

/// Until its end the library uses `count` threads.
class ThreadCount {
 public:
#ifdef _OPENMP
  explicit ThreadCount(int count) : before_(omp_get_max_threads()) { omp_set_num_threads(count); }
  ~ThreadCount() { omp_set_num_threads(before_); }
#else
  explicit ThreadCount(int /*count*/) {}
  ~ThreadCount() {}
#endif
  ThreadCount(const ThreadCount&) = delete;
  ThreadCount& operator=(const ThreadCount&) = delete;

 private:
  [[maybe_unused]] int before_ = 1;
};

}  // namespace tqai::test
