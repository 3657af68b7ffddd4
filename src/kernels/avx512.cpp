// AVX-512 with VBMI and VNNI: a line is a register.
#include "kernels.hpp"

#ifdef TQAI_X86

#include <immintrin.h>

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstring>
#include <limits>
#include <tqai/codebook.hpp>
#include <utility>

#if defined(__clang__)
#pragma clang attribute push(                                                                     \
    __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx512vbmi,avx512vnni,avx2,fma"))), \
    apply_to = function)
#elif defined(__GNUC__)
// GCC 12 takes the undefined upper parts inside its own intrinsics for uninitialised variables.
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx512vbmi,avx512vnni,avx2,fma")
#endif

#define TQAI_LEVEL_NAMESPACE avx512_level
#define TQAI_VECTOR_LANES 16
#include "avx512-inl.hpp"

namespace tqai::kernels::TQAI_LEVEL_NAMESPACE {
namespace TQAI_LOCAL {

struct Avx512 : WholeLines {
  template <int kBits>
  struct Table {
    Vec low;
    Vec high;

    Table(const std::int8_t* levels, bool keys) noexcept {
      // Levels are repeated: vpermb looks at 6 bits of a code, so up to 4 bits need no mask.
      const Vec bias = _mm512_set1_epi8(keys ? static_cast<char>(-128) : 0);
      low = _mm512_xor_si512(_mm512_loadu_si512(levels), bias);
      high = _mm512_xor_si512(_mm512_loadu_si512(levels + 64), bias);
    }
    Vec look_up(Vec codes) const noexcept {
      if constexpr (kBits == 7) return _mm512_permutex2var_epi8(low, codes, high);
      return _mm512_permutexvar_epi8(codes, low);
    }
    // At 8 bits code = level + 128, without a table.
    KeyOperand key_operand(Vec codes) const noexcept {
      if constexpr (kBits == 8) return {codes};
      return {look_up(codes)};
    }
    ValueOperand value_operand(Vec codes) const noexcept {
      if constexpr (kBits == 8) {
        return {_mm512_xor_si512(codes, _mm512_set1_epi8(static_cast<char>(-128)))};
      }
      return {look_up(codes)};
    }
  };

  struct WindowTable {
    Vec levels;

    explicit WindowTable(const std::int8_t* of_windows) noexcept
        : levels(_mm512_xor_si512(_mm512_loadu_si512(of_windows),
                                  _mm512_set1_epi8(static_cast<char>(-128)))) {}
    KeyOperand key_operand(Vec windows) const noexcept {
      return {_mm512_permutexvar_epi8(windows, levels)};
    }
  };
};

constexpr Kernels kKernels = table_of<Integer<Avx512>, WholeLineLanes>(Level::avx512);
constexpr Parts kParts = parts_of<Integer<Avx512>>();

}  // namespace TQAI_LOCAL
}  // namespace tqai::kernels::TQAI_LEVEL_NAMESPACE

namespace tqai::kernels {

TQAI_INLINE constinit const Kernels kAvx512Kernels = avx512_level::kKernels;
TQAI_INLINE constinit const Parts kAvx512Parts = avx512_level::kParts;

}  // namespace tqai::kernels

#include "level_end.hpp"

#if defined(__clang__)
#pragma clang attribute pop
#elif defined(__GNUC__)
#pragma GCC pop_options
#pragma GCC diagnostic pop
#endif

#endif  // TQAI_X86
