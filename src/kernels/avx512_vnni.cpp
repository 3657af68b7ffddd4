// AVX-512 with VNNI, without VBMI: a line is a register, levels are looked up 16 at a time.
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
#pragma clang attribute push(                                                          \
    __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx2,fma"))), \
    apply_to = function)
#elif defined(__GNUC__)
// GCC 12 takes the undefined upper parts inside its own intrinsics for uninitialised variables.
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx2,fma")
#endif

#define TQAI_LEVEL_NAMESPACE avx512_vnni_level
#define TQAI_VECTOR_LANES 16
#include "avx512-inl.hpp"

namespace tqai::kernels::TQAI_LEVEL_NAMESPACE {
namespace TQAI_LOCAL {

struct Avx512Vnni : WholeLines {
  // Tables first … first + count − 1, chosen by the code's bits from 4 up, whose highest is clear.
  template <int kFirst, int kCount>
  static Vec choose(const Vec* tables, Vec codes) noexcept {
    if constexpr (kCount == 1) {
      return _mm512_shuffle_epi8(tables[kFirst], codes);
    } else {
      constexpr int kBit = 4 + std::countr_zero(static_cast<unsigned>(kCount)) - 1;
      const __mmask64 upper = _mm512_test_epi8_mask(codes, _mm512_set1_epi8(1 << kBit));
      const Vec low = choose<kFirst, kCount / 2>(tables, codes);
      if constexpr (kCount == 2) {
        return _mm512_mask_shuffle_epi8(low, upper, tables[kFirst + 1], codes);
      } else {
        const Vec high = choose<kFirst + kCount / 2, kCount / 2>(tables, codes);
        return _mm512_mask_blend_epi8(upper, low, high);
      }
    }
  }
  // 16 levels in each quarter, plus 128 as keys.
  static Vec table_of_16(const std::int8_t* levels, bool keys) noexcept {
    const __m128i row = _mm_loadu_si128(reinterpret_cast<const __m128i*>(levels));
    return _mm512_xor_si512(_mm512_broadcast_i32x4(row),
                            _mm512_set1_epi8(keys ? static_cast<char>(-128) : 0));
  }

  template <int kBits>
  struct Table {
    static constexpr int kTables = kBits <= 4 || kBits == 8 ? 1 : 1 << (kBits - 4);
    Vec entries[kTables];

    Table(const std::int8_t* levels, bool keys) noexcept {
      for (int table = 0; table < kTables; ++table) {
        entries[table] = table_of_16(levels + std::ptrdiff_t{16} * table, keys);
      }
    }
    Vec look_up(Vec codes) const noexcept {
      return choose<0, kTables>(entries, kBits <= 4 ? low_bits<4>(codes) : codes);
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
    Vec entries[4];

    explicit WindowTable(const std::int8_t* of_windows) noexcept {
      for (int i = 0; i < 4; ++i) {
        entries[i] = table_of_16(of_windows + std::ptrdiff_t{16} * i, true);
      }
    }
    KeyOperand key_operand(Vec windows) const noexcept {
      return {choose<0, 4>(entries, low_bits<6>(windows))};
    }
  };
};

constexpr Kernels kKernels = table_of<Integer<Avx512Vnni>, WholeLineLanes>(Level::avx512_vnni);
constexpr Parts kParts = parts_of<Integer<Avx512Vnni>>();

}  // namespace TQAI_LOCAL
}  // namespace tqai::kernels::TQAI_LEVEL_NAMESPACE

namespace tqai::kernels {

TQAI_INLINE constinit const Kernels kAvx512VnniKernels = avx512_vnni_level::kKernels;
TQAI_INLINE constinit const Parts kAvx512VnniParts = avx512_vnni_level::kParts;

}  // namespace tqai::kernels

#include "level_end.hpp"

#if defined(__clang__)
#pragma clang attribute pop
#elif defined(__GNUC__)
#pragma GCC pop_options
#pragma GCC diagnostic pop
#endif

#endif  // TQAI_X86
