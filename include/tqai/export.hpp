// How the library's functions are compiled and seen.
#pragma once

// Keys that are NaN must be told from numbers, and sums keep their order.
#if defined(__FAST_MATH__) || (defined(__FINITE_MATH_ONLY__) && __FINITE_MATH_ONLY__ > 0) || \
    (defined(_M_FP_FAST) && !defined(__clang__))
#error "tqai does not compile with -ffast-math, -ffinite-math-only or /fp:fast: leave these out"
#endif

// Kernels of all levels add in one order. Clang does not say what it may change.
#if defined(TQAI_BUILDING) || defined(TQAI_HEADER_ONLY) || defined(TQAI_IMPLEMENTATION)
#if defined(__ASSOCIATIVE_MATH__) || defined(__RECIPROCAL_MATH__)
#error "tqai does not compile with -funsafe-math-optimizations or parts of it: leave these out"
#endif
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

// The library compiled from its headers (docs/cpp.md): with TQAI_HEADER_ONLY by each file of a
// program, as inline functions; with TQAI_IMPLEMENTATION by the one file that defines it. What is
// otherwise a source file's own then has a namespace with a name, so that all files mean the same.
#if defined(TQAI_HEADER_ONLY) || defined(TQAI_IMPLEMENTATION)
#ifdef TQAI_SHARED
#error "TQAI_SHARED: a library that is compiled from its headers is not shared"
#endif
#define TQAI_LOCAL local
#else
#define TQAI_LOCAL
#endif
#ifdef TQAI_HEADER_ONLY
#define TQAI_INLINE inline
#else
#define TQAI_INLINE
#endif
