// Memory that runs out at the n-th allocation. For one file of a program: it replaces the
// operators.
#pragma once

#include <gtest/gtest.h>

#include <atomic>
#include <cstddef>
#include <cstdlib>
#include <new>

#if defined(_MSC_VER)
#include <malloc.h>
#endif

namespace tqai::test {

inline std::atomic<long> g_before_failure{-1};  // allocations; negative: none fails
inline std::atomic<long> g_living{0};

inline void* allocate(std::size_t bytes, std::size_t alignment) {
  if (g_before_failure.load() >= 0 && g_before_failure.fetch_sub(1) == 0) throw std::bad_alloc();
  const std::size_t rounded = (bytes + alignment) / alignment * alignment;
#if defined(_MSC_VER)
  void* memory = _aligned_malloc(rounded, alignment);
#else
  void* memory = std::aligned_alloc(alignment, rounded);
#endif
  if (memory == nullptr) throw std::bad_alloc();
  g_living.fetch_add(1);
  return memory;
}

inline void deallocate(void* memory) noexcept {
  if (memory == nullptr) return;
  g_living.fetch_sub(1);
#if defined(_MSC_VER)
  _aligned_free(memory);
#else
  std::free(memory);
#endif
}

constexpr std::size_t alignment_of(std::align_val_t alignment) {
  return static_cast<std::size_t>(alignment);
}

}  // namespace tqai::test

// Arrays too: under AddressSanitizer their standard operators do not come here.
void* operator new(std::size_t bytes) {
  return tqai::test::allocate(bytes, alignof(std::max_align_t));
}
void* operator new[](std::size_t bytes) {
  return tqai::test::allocate(bytes, alignof(std::max_align_t));
}
void* operator new(std::size_t bytes, std::align_val_t alignment) {
  return tqai::test::allocate(bytes, tqai::test::alignment_of(alignment));
}
void* operator new[](std::size_t bytes, std::align_val_t alignment) {
  return tqai::test::allocate(bytes, tqai::test::alignment_of(alignment));
}
void operator delete(void* memory) noexcept { tqai::test::deallocate(memory); }
void operator delete[](void* memory) noexcept { tqai::test::deallocate(memory); }
void operator delete(void* memory, std::size_t /*bytes*/) noexcept {
  tqai::test::deallocate(memory);
}
void operator delete[](void* memory, std::size_t /*bytes*/) noexcept {
  tqai::test::deallocate(memory);
}
void operator delete(void* memory, std::align_val_t /*alignment*/) noexcept {
  tqai::test::deallocate(memory);
}
void operator delete[](void* memory, std::align_val_t /*alignment*/) noexcept {
  tqai::test::deallocate(memory);
}
void operator delete(void* memory, std::size_t /*bytes*/, std::align_val_t /*alignment*/) noexcept {
  tqai::test::deallocate(memory);
}
void operator delete[](void* memory, std::size_t /*bytes*/,
                       std::align_val_t /*alignment*/) noexcept {
  tqai::test::deallocate(memory);
}

namespace tqai::test {

/// Calls `call` with the n-th allocation failing, for n = 0, 1, … until it has no n-th; before
/// each, `prepare`, and where memory ran out, `check`. Returns how often it did.
template <typename Prepare, typename Call, typename Check>
int fail_each(const Prepare& prepare, const Call& call, const Check& check) {
  for (int n = 0; n < 20000; ++n) {
    prepare();
    bool failed = false;
    g_before_failure = n;
    try {
      call();
    } catch (const std::bad_alloc&) {
      failed = true;
    }
    const bool reached = g_before_failure.exchange(-1) < 0;
    EXPECT_EQ(failed, reached) << "allocation " << n << " failed unheard";
    if (!failed) return n;
    check();
    if (testing::Test::HasFailure()) {
      ADD_FAILURE() << "at allocation " << n;
      return n;
    }
  }
  ADD_FAILURE() << "no end of allocations";
  return 0;
}

}  // namespace tqai::test
