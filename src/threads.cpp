#include "threads.hpp"

#include <atomic>
#include <tqai/export.hpp>

#ifdef _OPENMP
#include <omp.h>
#endif
#if defined(__unix__) || defined(__APPLE__)
#include <unistd.h>
#endif
#if defined(__SSE__) || defined(_M_X64)
#include <xmmintrin.h>
#endif

namespace tqai {

TQAI_INLINE int usable_threads() noexcept {
#ifdef _OPENMP
  const int threads = omp_get_max_threads();
#if defined(__unix__) || defined(__APPLE__)
  if (threads == 1) return 1;
  // The process that has made threads; a child inherits the number, and not the threads.
  static std::atomic<long> owner{0};
  const long here = getpid();
  long expected = 0;
  if (!owner.compare_exchange_strong(expected, here) && expected != here) return 1;
#endif
  return threads;
#else
  return 1;
#endif
}

#if defined(__SSE__) || defined(_M_X64)

TQAI_INLINE SubnormalNumbers::SubnormalNumbers() noexcept : saved_(_mm_getcsr()) {
  constexpr unsigned kFlushToZero = 1U << 15;
  constexpr unsigned kDenormalsAreZero = 1U << 6;
  const auto saved = static_cast<unsigned>(saved_);
  if ((saved & (kFlushToZero | kDenormalsAreZero)) != 0) {
    _mm_setcsr(saved & ~(kFlushToZero | kDenormalsAreZero));
  }
}

TQAI_INLINE SubnormalNumbers::~SubnormalNumbers() {
  const auto saved = static_cast<unsigned>(saved_);
  if (_mm_getcsr() != saved) _mm_setcsr(saved);
}

#elif defined(__aarch64__) && defined(__GNUC__)

TQAI_INLINE SubnormalNumbers::SubnormalNumbers() noexcept {
  constexpr unsigned long long kFlushToZero = 1ULL << 24;
  asm volatile("mrs %0, fpcr" : "=r"(saved_));
  if ((saved_ & kFlushToZero) != 0) asm volatile("msr fpcr, %0" : : "r"(saved_ & ~kFlushToZero));
}

TQAI_INLINE SubnormalNumbers::~SubnormalNumbers() {
  unsigned long long now = 0;
  asm volatile("mrs %0, fpcr" : "=r"(now));
  if (now != saved_) asm volatile("msr fpcr, %0" : : "r"(saved_));
}

#else

TQAI_INLINE SubnormalNumbers::SubnormalNumbers() noexcept = default;
TQAI_INLINE SubnormalNumbers::~SubnormalNumbers() = default;

#endif

}  // namespace tqai
