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
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c"))), apply_to = function)
#elif defined(__GNUC__)
#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c")
#endif

#define TQAI_LEVEL_NAMESPACE avx2_level
#define TQAI_VECTOR_LANES 8
#include "avx2-inl.hpp"

namespace tqai::kernels::TQAI_LEVEL_NAMESPACE {
namespace TQAI_LOCAL {

struct Avx2 : HalfLines {
  static constexpr int kMaxWords = 2;
  static constexpr int value_blocks(int rows) noexcept { return rows <= 2 ? 2 : 1; }
  static constexpr int value_chains(int /*rows*/) noexcept { return 1; }
  static constexpr bool kSumsQuotients = true;
  static constexpr bool kSumsPairs = true;
  static constexpr bool kDecodesPaths = true;
  // vpmaddubsw multiplies u8 by s8 and adds pairs in 16 bits, where narrow levels (codebook.hpp) do
  // not saturate: (63 + 64) · 127 · 2 and 255 · 63 · 2 are below 2^15. Wider ones are widened for
  // vpmaddwd: factors 0 and 2 as s16 in one word, 1 and 3 in the next.
  template <int kBits>
  static constexpr int words() noexcept {
    return kBits <= kNarrowBits ? 1 : 2;
  }

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
  using KeyLevels = NarrowKeys;
  using ValueLevels = NarrowValues;
  static constexpr int kNarrowBias = 64;
  static void decode_paths(const SegmentPlan& segment, const std::uint8_t* packed,
                           std::uint8_t* decoded) noexcept;

  template <int kBits>
  struct Table : Tables<kBits> {
    Table(const std::int8_t* levels, bool keys) noexcept
        : Tables<kBits>(levels, keys && kBits <= kNarrowBits ? kNarrowBias : 0) {}
    Wide wide(Vec codes) const noexcept {
      Vec levels;
      if constexpr (kBits == 8) {
        levels = _mm256_xor_si256(codes, broadcast_byte(-128));
      } else {
        levels = this->look_up(codes);
      }
      return {_mm256_srai_epi16(_mm256_slli_epi16(levels, 8), 8), _mm256_srai_epi16(levels, 8)};
    }
    auto key_operand(Vec codes) const noexcept {
      if constexpr (kBits <= kNarrowBits) {
        return NarrowKeys{this->look_up(codes)};
      } else {
        return wide(codes);
      }
    }
    auto value_operand(Vec codes) const noexcept {
      if constexpr (kBits <= kNarrowBits) {
        return NarrowValues{this->look_up(codes)};
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

  static Acc add_pairs(Acc acc, Vec pairs) noexcept {
    return in_order(_mm256_add_epi32(acc, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1))));
  }
  // A sum that is added to as it is written here: GCC makes trees of additions, whose leaves then
  // wait in memory.
  static Acc in_order(Acc acc) noexcept {
#if defined(__GNUC__) && !defined(__clang__)
    asm("" : "+x"(acc));
#endif
    return acc;
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
    return in_order(_mm256_add_epi32(acc, _mm256_add_epi32(even, odd)));
  }
  // Four products of a lane's 16 bits: keys are within 1…127, with the bias, so that neither those
  // with positive queries nor the others leave 16 bits.
  static std::uint64_t queries_fit(const std::int8_t* q, int count) noexcept {
    constexpr int kMost = 32767 / (kMaxNarrowLevel + kNarrowBias);
    static_assert(kCoordinateBlock == 2 * kGroupCodes);
    std::uint64_t fits = 0;
    for (int c = 0; c < count && c < 64 * kGroupCodes; c += kCoordinateBlock) {
      const __m128i row = _mm_loadu_si128(reinterpret_cast<const __m128i*>(q + c));
      const __m128i magnitudes = _mm_abs_epi8(row);
      const __m128i below = _mm_and_si128(magnitudes, _mm_cmpgt_epi8(_mm_setzero_si128(), row));
      const Vec both = sums_of_four(_mm256_set_m128i(below, _mm_sub_epi8(magnitudes, below)));
      const Vec beyond = _mm256_cmpgt_epi16(both, _mm256_set1_epi16(kMost));
      const auto found = static_cast<std::uint32_t>(_mm256_movemask_epi8(beyond));
      const std::uint32_t groups = found | found >> 16;
      fits |= std::uint64_t{(groups & 0xFFU) == 0 ? 1U : 0U} << c / kGroupCodes;
      fits |= std::uint64_t{(groups & 0xFF00U) == 0 ? 1U : 0U} << (c / kGroupCodes + 1);
    }
    return fits;
  }
  // Values may have either sign.
  static bool weights_fit(const std::uint8_t* weights, int rows) noexcept {
    constexpr int kMost = 32767 / kMaxNarrowLevel;
    Vec most = _mm256_setzero_si256();
    for (int i = 0; i < rows * kTileTokens; i += kTileTokens / 2) {
      most = _mm256_max_epi16(most, sums_of_four(load(weights + i)));
    }
    const Vec beyond = _mm256_cmpgt_epi16(most, _mm256_set1_epi16(kMost));
    return _mm256_testz_si256(beyond, beyond) != 0;
  }
  // In 16 bits: bytes 2 i, 2 i + 1 and those of the neighbour of their lane.
  static Vec sums_of_four(Vec bytes) noexcept {
    const Vec pairs = _mm256_maddubs_epi16(bytes, _mm256_set1_epi8(1));
    return _mm256_add_epi16(pairs, _mm256_shuffle_epi32(pairs, _MM_SHUFFLE(2, 3, 0, 1)));
  }
  static Acc dot_two(Acc acc, NarrowKeys a, NarrowKeys b, const std::uint8_t* words,
                     int step) noexcept {
    return add_pairs(
        acc, _mm256_add_epi16(_mm256_maddubs_epi16(a.levels, broadcast_word(words)),
                              _mm256_maddubs_epi16(b.levels, broadcast_word(words + step))));
  }
  static Acc dot_two(Acc acc, NarrowValues a, NarrowValues b, const std::uint8_t* words,
                     int step) noexcept {
    return add_pairs(
        acc, _mm256_add_epi16(_mm256_maddubs_epi16(broadcast_word(words), a.levels),
                              _mm256_maddubs_epi16(broadcast_word(words + step), b.levels)));
  }
  // Of quotients: kMaxQuotient holds four pairs in 16 bits.
  static Acc dot_four(Acc acc, const NarrowValues (&values)[4], const std::uint8_t* words,
                      int step) noexcept {
    Vec pairs = _mm256_maddubs_epi16(broadcast_word(words), values[0].levels);
    for (int i = 1; i < 4; ++i) {
      pairs = _mm256_add_epi16(
          pairs, _mm256_maddubs_epi16(broadcast_word(words + i * step), values[i].levels));
    }
    return add_pairs(acc, pairs);
  }
  static Acc times(Acc acc, int factor) noexcept {
    return _mm256_mullo_epi32(acc, _mm256_set1_epi32(factor));
  }
  static NarrowValues add_levels(NarrowValues a, NarrowValues b) noexcept {
    return {_mm256_add_epi8(a.levels, b.levels)};
  }
};

}  // namespace TQAI_LOCAL
}  // namespace tqai::kernels::TQAI_LEVEL_NAMESPACE

#include "avx2-paths-inl.hpp"

namespace tqai::kernels::TQAI_LEVEL_NAMESPACE {
namespace TQAI_LOCAL {

constexpr Kernels kKernels = table_of<Integer<Avx2>, HalfLineLanes>(Level::avx2);
constexpr Parts kParts = parts_of<Integer<Avx2>>();

}  // namespace TQAI_LOCAL
}  // namespace tqai::kernels::TQAI_LEVEL_NAMESPACE

namespace tqai::kernels {

TQAI_INLINE constinit const Kernels kAvx2Kernels = avx2_level::kKernels;
TQAI_INLINE constinit const Parts kAvx2Parts = avx2_level::kParts;

}  // namespace tqai::kernels

#include "level_end.hpp"

#if defined(__clang__)
#pragma clang attribute pop
#elif defined(__GNUC__)
#pragma GCC pop_options
#endif

#endif  // TQAI_X86
