// Visibility of the compiled library's symbols.
#pragma once

// Keys that are NaN must be told from numbers, and sums keep their order.
#if defined(__FAST_MATH__) || (defined(__FINITE_MATH_ONLY__) && __FINITE_MATH_ONLY__ > 0) || \
    (defined(_M_FP_FAST) && !defined(__clang__))
#error "tqai does not compile with -ffast-math, -ffinite-math-only or /fp:fast: leave these out"
#endif

#if defined(TQAI_SHARED) && defined(_WIN32)
#ifdef TQAI_BUILDING
#define TQAI_API __declspec(dllexport)
#else
#define TQAI_API __declspec(dllimport)
#endif
#elif defined(TQAI_SHARED) && defined(__GNUC__)
#define TQAI_API __attribute__((visibility("default")))
#else
#define TQAI_API
#endif
