// AVX-512 with VBMI and VNNI: a line is a register.
#include "kernels.hpp"

#ifdef TQAI_X86

#include <immintrin.h>

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstring>
#include <limits>
#include <utility>

#if defined(__clang__)
#pragma clang attribute push(                                                                     \
    __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx512vbmi,avx512vnni,avx2,fma"))), \
    apply_to = function)
#elif defined(__GNUC__)
// GCC 12 takes the undefined upper parts inside its own intrinsics for uninitialised variables.
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx512vbmi,avx512vnni,avx2,fma")
#endif

#define TQAI_VECTOR_LANES 16
#include "integer-inl.hpp"
#include "table-inl.hpp"

namespace tqai::kernels {
namespace {

struct Avx512 {
  using Vec = __m512i;
  using Acc = __m512i;
  static constexpr int kParts = 1;
  static constexpr int kMaxWords = 1;
  static constexpr int kRowBlock = 8;
  static constexpr int kMaxSums = 16;  // of 32 registers
  static constexpr int value_blocks(int rows) noexcept { return rows <= 2 ? 4 : 2; }
  template <int kBits>
  static constexpr int words() noexcept {
    return 1;
  }

  static Vec load(const std::uint8_t* p) noexcept { return _mm512_loadu_si512(p); }
  static void prefetch(const std::uint8_t* p) noexcept {
    _mm_prefetch(reinterpret_cast<const char*>(p), _MM_HINT_T0);
  }
  template <int kBits>
  static Vec shift_right(Vec v) noexcept {
    return _mm512_srli_epi16(v, kBits);
  }
  template <int kBits>
  static Vec shift_left(Vec v) noexcept {
    return _mm512_slli_epi16(v, kBits);
  }
  template <int kBits>
  static Vec low_bits(Vec v) noexcept {
    return _mm512_and_si512(v, _mm512_set1_epi8((1 << kBits) - 1));
  }
  static Vec either(Vec a, Vec b) noexcept { return _mm512_or_si512(a, b); }

  // vpdpbusd multiplies u8 by s8. Keys are the u8 side, as level + 128, and queries the s8 one;
  // values are the s8 side, weights the u8 one.
  struct KeyOperand {
    Vec levels;
  };
  struct ValueOperand {
    Vec levels;
  };

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

  static void expand_queries(int /*bits*/, const std::int8_t* q, int count,
                             std::uint8_t* words) noexcept {
    std::memcpy(words, q, static_cast<std::size_t>(count));
  }
  static constexpr bool plain_weights(int /*bits*/) noexcept { return true; }
  static void expand_weights(int /*bits*/, const std::uint8_t* w, int count,
                             std::uint8_t* words) noexcept {
    std::memcpy(words, w, static_cast<std::size_t>(count));
  }
  static std::int32_t key_bias(int /*bits*/, const std::int8_t* q, int count) noexcept {
    std::int32_t sum = 0;
    for (int c = 0; c < count; ++c) sum += q[c];
    return -128 * sum;
  }

  static Acc broadcast(std::int32_t value) noexcept { return _mm512_set1_epi32(value); }
  static Vec broadcast_word(const std::uint8_t* words) noexcept {
    std::int32_t word;
    std::memcpy(&word, words, sizeof word);
    return _mm512_set1_epi32(word);
  }
  static Acc dot(Acc acc, KeyOperand keys, const std::uint8_t* words) noexcept {
    return _mm512_dpbusd_epi32(acc, keys.levels, broadcast_word(words));
  }
  static Acc dot(Acc acc, ValueOperand values, const std::uint8_t* words) noexcept {
    return _mm512_dpbusd_epi32(acc, broadcast_word(words), values.levels);
  }
  static void store(std::int32_t* p, Acc acc) noexcept { _mm512_storeu_si512(p, acc); }
  // Compilers narrow by permutations of two registers, each of which is three instructions.
  static void round_weights(const float* products, float inverse, std::uint8_t* weights) noexcept {
    __m512i parts[4];
    for (int i = 0; i < 4; ++i) {
      parts[i] = _mm512_cvttps_epi32(_mm512_fmadd_ps(
          _mm512_loadu_ps(products + 16 * i), _mm512_set1_ps(inverse), _mm512_set1_ps(0.5F)));
    }
    // Packing works within 128 bits: 4 tokens of each part lie side by side, to be put in order.
    const __m512i packed = _mm512_packus_epi16(_mm512_packus_epi32(parts[0], parts[1]),
                                               _mm512_packus_epi32(parts[2], parts[3]));
    const __m512i order = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
    _mm512_storeu_si512(weights, _mm512_permutexvar_epi32(order, packed));
  }
  static void read_halves(const std::uint8_t* from, float* to) noexcept {
    for (int t = 0; t < kTileTokens; t += 16) {
      const auto* halves = reinterpret_cast<const __m256i*>(from + std::ptrdiff_t{2} * t);
      _mm512_storeu_ps(to + t, _mm512_cvtph_ps(_mm256_loadu_si256(halves)));
    }
  }
  static void add_scaled(float* p, Acc acc, float step) noexcept {
    _mm512_storeu_ps(
        p, _mm512_fmadd_ps(_mm512_cvtepi32_ps(acc), _mm512_set1_ps(step), _mm512_loadu_ps(p)));
  }
};

// A 16 × 16 transpose of what 4-wide, then 16-wide exchanges leave in order.
inline void transpose16(const float* rows, std::ptrdiff_t stride, float (*x)[kLanes]) noexcept {
  __m512 a[16];
  __m512 b[16];
  for (int i = 0; i < 16; ++i) a[i] = _mm512_loadu_ps(rows + i * stride);
  for (int i = 0; i < 16; i += 2) {
    b[i] = _mm512_unpacklo_ps(a[i], a[i + 1]);
    b[i + 1] = _mm512_unpackhi_ps(a[i], a[i + 1]);
  }
  for (int i = 0; i < 16; i += 4) {
    for (int h = 0; h < 2; ++h) {
      const __m512d low = _mm512_castps_pd(b[i + h]);
      const __m512d high = _mm512_castps_pd(b[i + h + 2]);
      a[i + 2 * h] = _mm512_castpd_ps(_mm512_unpacklo_pd(low, high));
      a[i + 2 * h + 1] = _mm512_castpd_ps(_mm512_unpackhi_pd(low, high));
    }
  }
  // a[4 g + c]: in each 128-bit lane q, coordinate 4 q + c of tokens 4 g … 4 g + 3.
  for (int c = 0; c < 4; ++c) {
    const __m512 low01 = _mm512_shuffle_f32x4(a[c], a[4 + c], 0x44);
    const __m512 high01 = _mm512_shuffle_f32x4(a[c], a[4 + c], 0xEE);
    const __m512 low23 = _mm512_shuffle_f32x4(a[8 + c], a[12 + c], 0x44);
    const __m512 high23 = _mm512_shuffle_f32x4(a[8 + c], a[12 + c], 0xEE);
    _mm512_storeu_ps(x[c], _mm512_shuffle_f32x4(low01, low23, 0x88));
    _mm512_storeu_ps(x[4 + c], _mm512_shuffle_f32x4(low01, low23, 0xDD));
    _mm512_storeu_ps(x[8 + c], _mm512_shuffle_f32x4(high01, high23, 0x88));
    _mm512_storeu_ps(x[12 + c], _mm512_shuffle_f32x4(high01, high23, 0xDD));
  }
}

struct Avx512Lanes : PlainLanes {
  static void transpose(const float* rows, int dim, LaneRows& x) noexcept {
    int c = 0;
    for (; c + 16 <= dim; c += 16) transpose16(rows + c, dim, x + c);
    for (; c < dim; ++c) {
      for (int i = 0; i < kLanes; ++i) x[c][i] = rows[static_cast<std::ptrdiff_t>(i) * dim + c];
    }
  }

  static void transpose_square(const float (*rows)[kLanes], float (*x)[kLanes]) noexcept {
    transpose16(rows[0], kLanes, x);
  }

  // The binary search with boundaries and levels in registers.
  template <int kBits>
  static void quantise(const SegmentPlan& segment, const LaneRows& y, int end, std::uint8_t* codes,
                       float* norm2) noexcept {
    if constexpr (kBits > 4) {
      PlainLanes::quantise<kBits>(segment, y, end, codes, norm2);
    } else {
      constexpr int kLevels = 1 << kBits;
      float table[16] = {};
      for (int i = 0; i + 1 < kLevels; ++i) table[i] = segment.boundaries[i];
      const __m512 boundaries = _mm512_loadu_ps(table);
      for (int i = 0; i < kLevels; ++i) table[i] = static_cast<float>(segment.levels[i]);
      const __m512 levels = _mm512_loadu_ps(table);
      __m512 sum = _mm512_loadu_ps(norm2);
      for (int c = segment.first; c < end; ++c) {
        const __m512 value = _mm512_loadu_ps(y[c]);
        __m512i found = _mm512_setzero_si512();
        for (int bit = kBits - 1; bit >= 0; --bit) {
          const __m512i next = _mm512_or_si512(found, _mm512_set1_epi32((1 << bit) - 1));
          const __m512 boundary = _mm512_permutexvar_ps(next, boundaries);
          const __mmask16 above = _mm512_cmp_ps_mask(value, boundary, _CMP_GE_OQ);
          found = _mm512_mask_or_epi32(found, above, found, _mm512_set1_epi32(1 << bit));
        }
        const __m512 level = _mm512_permutexvar_ps(found, levels);
        sum = _mm512_add_ps(sum, _mm512_mul_ps(level, level));
        _mm_storeu_si128(reinterpret_cast<__m128i*>(codes + c * kTileTokens),
                         _mm512_cvtepi32_epi8(found));
      }
      _mm512_storeu_ps(norm2, sum);
    }
  }
};

}  // namespace

constinit const Kernels kAvx512Kernels = table_of<Integer<Avx512>, Avx512Lanes>(Level::avx512);

}  // namespace tqai::kernels

#if defined(__clang__)
#pragma clang attribute pop
#elif defined(__GNUC__)
#pragma GCC pop_options
#endif

#endif  // TQAI_X86
