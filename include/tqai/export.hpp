// How the library's functions are compiled and seen.
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

// With TQAI_HEADER_ONLY (docs/cpp.md) the library's functions are inline, and what is otherwise a
// source file's own has a namespace with a name, so that all files of a program mean the same.
#ifdef TQAI_HEADER_ONLY
#ifdef TQAI_SHARED
#error "TQAI_HEADER_ONLY and TQAI_SHARED: a library of headers alone is not shared"
#endif
#define TQAI_INLINE inline
#define TQAI_LOCAL local
#else
#define TQAI_INLINE
#define TQAI_LOCAL
#endif
