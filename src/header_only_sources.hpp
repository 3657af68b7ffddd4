// All source files as one, for <tqai/header_only.hpp>: compiled by whatever flags an application
// has, with the same results as the library.
#pragma once

#include "hide_macros.hpp"

// What the sources include is read before the regions below begin.
#include <algorithm>
#include <array>
#include <atomic>
#include <bit>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <exception>
#include <functional>
#include <iterator>
#include <limits>
#include <map>
#include <memory>
#include <mutex>
#include <new>
#include <numbers>
#include <numeric>
#include <optional>
#include <set>
#include <span>
#include <stdexcept>
#include <string>
#include <string_view>
#include <tuple>
#include <utility>
#include <vector>
#if defined(__x86_64__) || defined(_M_X64)
#include <immintrin.h>
#ifdef __GNUC__
#include <cpuid.h>
#endif
#elif defined(__aarch64__) || defined(_M_ARM64)
#include <arm_neon.h>
#endif
#ifdef _OPENMP
#include <omp.h>
#endif

#include <tqai/cache.hpp>
#include <tqai/codebook.hpp>
#include <tqai/cpu.hpp>
#include <tqai/error.hpp>
#include <tqai/half.hpp>
#include <tqai/key_basis.hpp>
#include <tqai/packing.hpp>
#include <tqai/quantizer.hpp>
#include <tqai/rotation.hpp>
#include <tqai/sequences.hpp>
#include <tqai/trellis.hpp>

// Names in TQAI_LOCAL are seen outside of it, as those of a namespace without a name are.
namespace tqai {
inline namespace local {}
namespace detail {
inline namespace local {}
}  // namespace detail
namespace kernels {
inline namespace local {}
namespace scalar_level {
inline namespace local {}
}  // namespace scalar_level
namespace avx2_level {
inline namespace local {}
}  // namespace avx2_level
namespace avx512_level {
inline namespace local {}
}  // namespace avx512_level
namespace avx512_vnni_level {
inline namespace local {}
}  // namespace avx512_vnni_level
namespace avx_vnni_level {
inline namespace local {}
}  // namespace avx_vnni_level
namespace neon_level {
inline namespace local {}
}  // namespace neon_level
}  // namespace kernels
}  // namespace tqai

// What src/CMakeLists.txt says by flags, and why.
#if defined(__clang__)
#pragma clang diagnostic push
#pragma clang diagnostic ignored "-Winline-namespace-reopened-noninline"
#pragma STDC FP_CONTRACT OFF
#elif defined(__GNUC__)
#pragma GCC push_options
#pragma GCC optimize("fp-contract=off", "no-trapping-math", "no-math-errno")
#ifdef __OPTIMIZE__
#pragma GCC optimize("O3")
#endif
#elif defined(_MSC_VER)
#pragma float_control(push)
#pragma fp_contract(off)
#endif

#include "cache/attend.cpp"
#include "cache/attend_units.cpp"
#include "cache/bytes.cpp"
#include "cache/cache.cpp"
#include "cache/centre_sets.cpp"
#include "cache/centres.cpp"
#include "cache/check.cpp"
#include "cache/codec.cpp"
#include "cache/deserialize.cpp"
#include "cache/gather.cpp"
#include "cache/memory.cpp"
#include "cache/moments.cpp"
#include "cache/positions.cpp"
#include "cache/rope_tables.cpp"
#include "cache/row.cpp"
#include "cache/serialize.cpp"
#include "cache/slabs.cpp"
#include "cache/steps.cpp"
#include "cache/views.cpp"
#include "codebook.cpp"
#include "cpu.cpp"
#include "crc32.cpp"
#include "decompositions.cpp"
#include "haar.cpp"
#include "half.cpp"
#include "kernels/avx2.cpp"
#include "kernels/avx512.cpp"
#include "kernels/avx512_vnni.cpp"
#include "kernels/avx_vnni.cpp"
#include "kernels/code_bins.cpp"
#include "kernels/dispatch.cpp"
#include "kernels/neon.cpp"
#include "kernels/scalar.cpp"
#include "key_basis.cpp"
#include "key_moments.cpp"
#include "packing.cpp"
#include "quantizer.cpp"
#include "resources.cpp"
#include "rotation.cpp"
#include "threads.cpp"
#include "trellis.cpp"

#if defined(__clang__)
#pragma STDC FP_CONTRACT DEFAULT
#pragma clang diagnostic pop
#elif defined(__GNUC__)
#pragma GCC pop_options
#elif defined(_MSC_VER)
#pragma float_control(pop)
#endif

#include "restore_macros.hpp"
