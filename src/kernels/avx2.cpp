// AVX2: half a line is a register.
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
#pragma clang attribute push(__attribute__((target("avx2,fma"))), apply_to = function)
#elif defined(__GNUC__)
#pragma GCC push_options
#pragma GCC target("avx2,fma")
#endif

#define TQAI_VECTOR_LANES 8
#include "integer-inl.hpp"
#include "table-inl.hpp"

namespace tqai::kernels {
namespace {

struct Avx2 {
  using Vec = __m256i;
  using Acc = __m256i;
  static constexpr int kParts = 2;
  static constexpr int kMaxWords = 2;
  static constexpr int kRowBlock = 4;
  static constexpr int kMaxSums = 8;  // of 16 registers
  static constexpr int value_blocks(int rows) noexcept { return rows <= 2 ? 2 : 1; }
  // vpmaddubsw multiplies u8 by s8 and adds pairs in 16 bits, where narrow levels (codebook.hpp) do
  // not saturate: (63 + 64) · 127 · 2 and 255 · 63 · 2 are below 2^15. Wider ones are widened for
  // vpmaddwd: factors 0 and 2 as s16 in one word, 1 and 3 in the next.
  template <int kBits>
  static constexpr int words() noexcept {
    return kBits <= kNarrowBits ? 1 : 2;
  }

  static Vec load(const std::uint8_t* p) noexcept {
    return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
  }
  static void prefetch(const std::uint8_t* p) noexcept {
    _mm_prefetch(reinterpret_cast<const char*>(p), _MM_HINT_T0);
  }
  template <int kBits>
  static Vec shift_right(Vec v) noexcept {
    return _mm256_srli_epi16(v, kBits);
  }
  template <int kBits>
  static Vec shift_left(Vec v) noexcept {
    return _mm256_slli_epi16(v, kBits);
  }
  template <int kBits>
  static Vec low_bits(Vec v) noexcept {
    return _mm256_and_si256(v, _mm256_set1_epi8((1 << kBits) - 1));
  }
  static Vec either(Vec a, Vec b) noexcept { return _mm256_or_si256(a, b); }

  struct NarrowKeys {
    Vec levels;  // u8, plus kNarrowBias
  };
  struct NarrowValues {
    Vec levels;  // s8
  };
  struct Wide {
    Vec even;  // bytes 0 and 2 of each lane as s16
    Vec odd;   // bytes 1 and 3
  };
  static constexpr int kNarrowBias = 64;

  template <int kBits>
  struct Table {
    static constexpr int kTables = kBits <= 4 || kBits == 8 ? 1 : 1 << (kBits - 4);
    Vec entries[kTables];

    Table(const std::int8_t* levels, bool keys) noexcept {
      const int bias = keys && kBits <= kNarrowBits ? kNarrowBias : 0;
      for (int table = 0; table < kTables; ++table) {
        const __m128i row =
            _mm_loadu_si128(reinterpret_cast<const __m128i*>(levels + std::ptrdiff_t{16} * table));
        entries[table] =
            _mm256_broadcastsi128_si256(_mm_add_epi8(row, _mm_set1_epi8(static_cast<char>(bias))));
      }
    }
    // Tables first … first + count − 1, chosen by the code's bits from 4 up.
    template <int kFirst, int kCount>
    Vec choose(Vec codes) const noexcept {
      if constexpr (kCount == 1) {
        return _mm256_shuffle_epi8(entries[kFirst], low_bits<4>(codes));
      } else {
        constexpr int kBit = 4 + std::countr_zero(static_cast<unsigned>(kCount)) - 1;
        // vpblendvb looks at the top bit of each byte; codes are clean, so shifts within 16 bits do
        // not mix bytes at that bit.
        return _mm256_blendv_epi8(choose<kFirst, kCount / 2>(codes),
                                  choose<kFirst + kCount / 2, kCount / 2>(codes),
                                  shift_left<7 - kBit>(codes));
      }
    }
    Wide wide(Vec codes) const noexcept {
      Vec levels;
      if constexpr (kBits == 8) {  // level = code − 128
        levels = _mm256_xor_si256(codes, _mm256_set1_epi8(static_cast<char>(-128)));
      } else {
        levels = choose<0, kTables>(codes);
      }
      return {_mm256_srai_epi16(_mm256_slli_epi16(levels, 8), 8), _mm256_srai_epi16(levels, 8)};
    }
    auto key_operand(Vec codes) const noexcept {
      if constexpr (kBits <= kNarrowBits) {
        return NarrowKeys{choose<0, 1>(codes)};
      } else {
        return wide(codes);
      }
    }
    auto value_operand(Vec codes) const noexcept {
      if constexpr (kBits <= kNarrowBits) {
        return NarrowValues{choose<0, 1>(codes)};
      } else {
        return wide(codes);
      }
    }
  };

  template <typename Byte>
  static void expand(int bits, const Byte* factors, int count, std::uint8_t* words) noexcept {
    if (bits <= kNarrowBits) {
      std::memcpy(words, factors, static_cast<std::size_t>(count));
      return;
    }
    for (int i = 0; i < count; i += 4) {
      const std::int16_t pairs[4] = {factors[i], factors[i + 2], factors[i + 1], factors[i + 3]};
      std::memcpy(words + std::ptrdiff_t{2} * i, pairs, sizeof pairs);
    }
  }
  static void expand_queries(int bits, const std::int8_t* q, int count,
                             std::uint8_t* words) noexcept {
    expand(bits, q, count, words);
  }
  static constexpr bool plain_weights(int bits) noexcept { return bits <= kNarrowBits; }
  static void expand_weights(int bits, const std::uint8_t* w, int count,
                             std::uint8_t* words) noexcept {
    expand(bits, w, count, words);
  }
  static std::int32_t key_bias(int bits, const std::int8_t* q, int count) noexcept {
    if (bits > kNarrowBits) return 0;
    std::int32_t sum = 0;
    for (int c = 0; c < count; ++c) sum += q[c];
    return -kNarrowBias * sum;
  }

  static Acc broadcast(std::int32_t value) noexcept { return _mm256_set1_epi32(value); }
  static Acc add_pairs(Acc acc, Vec pairs) noexcept {
    return _mm256_add_epi32(acc, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
  }
  static Vec broadcast_word(const std::uint8_t* words) noexcept {
    std::int32_t word;
    std::memcpy(&word, words, sizeof word);
    return _mm256_set1_epi32(word);
  }
  static Acc dot(Acc acc, NarrowKeys keys, const std::uint8_t* words) noexcept {
    return add_pairs(acc, _mm256_maddubs_epi16(keys.levels, broadcast_word(words)));
  }
  static Acc dot(Acc acc, NarrowValues values, const std::uint8_t* words) noexcept {
    return add_pairs(acc, _mm256_maddubs_epi16(broadcast_word(words), values.levels));
  }
  static Acc dot(Acc acc, Wide levels, const std::uint8_t* words) noexcept {
    const Acc even = _mm256_madd_epi16(levels.even, broadcast_word(words));
    const Acc odd = _mm256_madd_epi16(levels.odd, broadcast_word(words + 4));
    return _mm256_add_epi32(acc, _mm256_add_epi32(even, odd));
  }
  static void store(std::int32_t* p, Acc acc) noexcept {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), acc);
  }
  static void round_weights(const float* products, float inverse, std::uint8_t* weights) noexcept {
    kernels::round_weights(products, inverse, weights);
  }
  static void read_halves(const std::uint8_t* from, float* to) noexcept {
    kernels::read_halves(from, to);
  }
  static void add_scaled(float* p, Acc acc, float step) noexcept {
    _mm256_storeu_ps(
        p, _mm256_fmadd_ps(_mm256_cvtepi32_ps(acc), _mm256_set1_ps(step), _mm256_loadu_ps(p)));
  }
};

// An 8 × 8 transpose: columns of `rows` into x[0…7], lanes `lane` and on.
inline void transpose8(const float* rows, std::ptrdiff_t stride, float (*x)[kLanes],
                       int lane) noexcept {
  __m256 a[8];
  __m256 b[8];
  for (int i = 0; i < 8; ++i) a[i] = _mm256_loadu_ps(rows + i * stride);
  for (int i = 0; i < 8; i += 2) {
    b[i] = _mm256_unpacklo_ps(a[i], a[i + 1]);
    b[i + 1] = _mm256_unpackhi_ps(a[i], a[i + 1]);
  }
  for (int i = 0; i < 8; i += 4) {
    for (int h = 0; h < 2; ++h) {
      a[i + 2 * h] = _mm256_shuffle_ps(b[i + h], b[i + h + 2], 0x44);
      a[i + 2 * h + 1] = _mm256_shuffle_ps(b[i + h], b[i + h + 2], 0xEE);
    }
  }
  for (int c = 0; c < 4; ++c) {
    _mm256_storeu_ps(x[c] + lane, _mm256_permute2f128_ps(a[c], a[4 + c], 0x20));
    _mm256_storeu_ps(x[4 + c] + lane, _mm256_permute2f128_ps(a[c], a[4 + c], 0x31));
  }
}

struct Avx2Lanes : PlainLanes {
  static void transpose(const float* rows, int dim, LaneRows& x) noexcept {
    int c = 0;
    for (; c + 8 <= dim; c += 8) {
      transpose8(rows + c, dim, x + c, 0);
      transpose8(rows + c + static_cast<std::ptrdiff_t>(8) * dim, dim, x + c, 8);
    }
    for (; c < dim; ++c) {
      for (int i = 0; i < kLanes; ++i) x[c][i] = rows[static_cast<std::ptrdiff_t>(i) * dim + c];
    }
  }

  static void transpose_square(const float (*rows)[kLanes], float (*x)[kLanes]) noexcept {
    for (int c = 0; c < kLanes; c += 8) {
      transpose8(rows[0] + c, kLanes, x + c, 0);
      transpose8(rows[8] + c, kLanes, x + c, 8);
    }
  }

  // Entry `index` (below 16) of a table in two registers.
  static __m256 look_up(__m256 low, __m256 high, __m256i index) noexcept {
    const __m256 upper = _mm256_castsi256_ps(_mm256_slli_epi32(index, 28));  // bit 3 as the sign
    return _mm256_blendv_ps(_mm256_permutevar8x32_ps(low, index),
                            _mm256_permutevar8x32_ps(high, index), upper);
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
      const __m256 low_boundaries = _mm256_loadu_ps(table);
      const __m256 high_boundaries = _mm256_loadu_ps(table + 8);
      for (int i = 0; i < kLevels; ++i) table[i] = static_cast<float>(segment.levels[i]);
      const __m256 low_levels = _mm256_loadu_ps(table);
      const __m256 high_levels = _mm256_loadu_ps(table + 8);
      for (int lane = 0; lane < kLanes; lane += 8) {
        __m256 sum = _mm256_loadu_ps(norm2 + lane);
        for (int c = segment.first; c < end; ++c) {
          const __m256 value = _mm256_loadu_ps(y[c] + lane);
          __m256i found = _mm256_setzero_si256();
          for (int bit = kBits - 1; bit >= 0; --bit) {
            const __m256i next = _mm256_or_si256(found, _mm256_set1_epi32((1 << bit) - 1));
            const __m256 boundary = look_up(low_boundaries, high_boundaries, next);
            const __m256i above = _mm256_castps_si256(_mm256_cmp_ps(value, boundary, _CMP_GE_OQ));
            found = _mm256_or_si256(found, _mm256_and_si256(above, _mm256_set1_epi32(1 << bit)));
          }
          const __m256 level = look_up(low_levels, high_levels, found);
          sum = _mm256_add_ps(sum, _mm256_mul_ps(level, level));
          const __m128i words =
              _mm_packus_epi32(_mm256_castsi256_si128(found), _mm256_extracti128_si256(found, 1));
          _mm_storel_epi64(reinterpret_cast<__m128i*>(codes + c * kTileTokens + lane),
                           _mm_packus_epi16(words, words));
        }
        _mm256_storeu_ps(norm2 + lane, sum);
      }
    }
  }
};

}  // namespace

constinit const Kernels kAvx2Kernels = table_of<Integer<Avx2>, Avx2Lanes>(Level::avx2);

}  // namespace tqai::kernels

#if defined(__clang__)
#pragma clang attribute pop
#elif defined(__GNUC__)
#pragma GCC pop_options
#endif

#endif  // TQAI_X86
