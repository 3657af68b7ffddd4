#include "threads.hpp"

#include <atomic>
#include <tqai/export.hpp>

#ifdef _OPENMP
#include <omp.h>
#endif
#if defined(__unix__) || defined(__APPLE__)
#include <pthread.h>
#include <sys/stat.h>
#endif
#if defined(__SSE__) || defined(_M_X64)
#include <xmmintrin.h>
#endif

namespace tqai {

#if defined(_OPENMP) && (defined(__unix__) || defined(__APPLE__))

namespace TQAI_LOCAL {

// What forks of this process leave of its threads.
struct Forks {
  std::atomic<bool> had_threads{false};  // of the parent, as it forks
  std::atomic<bool> lost_threads{false};

  // Watches from now on: a parallel region of the application's is enough to lose threads.
  Forks() noexcept;
};

TQAI_INLINE Forks& forks() noexcept {
  // Never destroyed: a static destructor may fork.
  static Forks& all = *new Forks;
  return all;
}

TQAI_INLINE bool has_threads() noexcept {
#ifdef __linux__
  // "." and "..", and a folder for each thread.
  struct stat tasks{};
  return stat("/proc/self/task", &tasks) != 0 || tasks.st_nlink != 3;
#else
  return true;
#endif
}

TQAI_INLINE Forks::Forks() noexcept {
  const int failed = pthread_atfork([] { forks().had_threads = has_threads(); }, nullptr,
                                    [] {
                                      // Once lost they are lost to the child's children too.
                                      if (forks().had_threads) forks().lost_threads = true;
                                    });
  if (failed != 0) lost_threads = true;
}

// When the program starts, or loads the library.
[[maybe_unused]] inline const bool kForksAreWatched = (forks(), true);

}  // namespace TQAI_LOCAL

TQAI_INLINE int usable_threads(int wanted) noexcept {
  const int threads = wanted > 0 ? wanted : omp_get_max_threads();
  return threads > 1 && forks().lost_threads ? 1 : threads;
}

#else

TQAI_INLINE int usable_threads([[maybe_unused]] int wanted) noexcept {
#ifdef _OPENMP
  return wanted > 0 ? wanted : omp_get_max_threads();
#else
  return 1;
#endif
}

#endif

#if defined(__SSE__) || defined(_M_X64)

TQAI_INLINE UsualArithmetic::UsualArithmetic() noexcept : saved_(_mm_getcsr()) {
  // Rounding, flush to zero, traps, denormals are zero; the others say what has happened.
  constexpr unsigned kControl = 0xFFC0U;
  constexpr unsigned kUsual = 0x1F80U;
  const auto saved = static_cast<unsigned>(saved_);
  if ((saved & kControl) != kUsual) _mm_setcsr((saved & ~kControl) | kUsual);
}

TQAI_INLINE UsualArithmetic::~UsualArithmetic() {
  const auto saved = static_cast<unsigned>(saved_);
  if (_mm_getcsr() != saved) _mm_setcsr(saved);
}

#elif defined(__aarch64__) && defined(__GNUC__)

TQAI_INLINE UsualArithmetic::UsualArithmetic() noexcept {
  // FIZ, AH, traps, FZ16, rounding, FZ, DN; all are 0 unless somebody has set them.
  constexpr unsigned long long kControl = 0x3C8'9F03ULL;
  asm volatile("mrs %0, fpcr" : "=r"(saved_));
  if ((saved_ & kControl) != 0) asm volatile("msr fpcr, %0" : : "r"(saved_ & ~kControl));
}

TQAI_INLINE UsualArithmetic::~UsualArithmetic() {
  unsigned long long now = 0;
  asm volatile("mrs %0, fpcr" : "=r"(now));
  if (now != saved_) asm volatile("msr fpcr, %0" : : "r"(saved_));
}

#else

TQAI_INLINE UsualArithmetic::UsualArithmetic() noexcept = default;
TQAI_INLINE UsualArithmetic::~UsualArithmetic() = default;

#endif

}  // namespace tqai
