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
#include "integer-inl.hpp"
#include "parts-inl.hpp"
#include "table-inl.hpp"

namespace tqai::kernels::TQAI_LEVEL_NAMESPACE {
namespace TQAI_LOCAL {

struct Avx2 {
  using Vec = __m256i;
  using Acc = __m256i;
  static constexpr int kParts = 2;
  static constexpr int kMaxWords = 2;
  static constexpr int kRowBlock = 4;
  static constexpr int kMaxSums = 8;  // of 16 registers
  static constexpr int value_blocks(int rows) noexcept { return rows <= 2 ? 2 : 1; }
  static constexpr int value_chains(int /*rows*/) noexcept { return 1; }
  static constexpr bool kSumsQuotients = true;
  static constexpr bool kSumsPairs = true;
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
  static void store_levels(std::uint8_t* p, Vec levels) noexcept {
    _mm256_store_si256(reinterpret_cast<__m256i*>(p), levels);
  }
  static void prefetch(const std::uint8_t* p) noexcept {  // into L2, as avx512.cpp's
    _mm_prefetch(reinterpret_cast<const char*>(p), _MM_HINT_T1);
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
  template <int kBits>
  static Vec merge(Vec low, Vec high) noexcept {  // clean
    constexpr int kLow = (1 << kBits) - 1;
    return _mm256_or_si256(_mm256_and_si256(low, _mm256_set1_epi8(kLow)),
                           _mm256_and_si256(high, _mm256_set1_epi8(0x3F & ~kLow)));
  }
  static Vec next_bytes(Vec v, std::uint8_t value) noexcept {
    return _mm256_or_si256(_mm256_slli_epi32(v, 8), _mm256_set1_epi32(value));
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
  static constexpr int kDecodedBits = kNarrowBits;
  static constexpr bool kDecodesScalars = true;
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

  struct WindowTable {
    Vec entries[4];

    explicit WindowTable(const std::int8_t* of_windows) noexcept {
      for (int i = 0; i < 4; ++i) {
        const __m128i row =
            _mm_loadu_si128(reinterpret_cast<const __m128i*>(of_windows + std::ptrdiff_t{16} * i));
        entries[i] = _mm256_broadcastsi128_si256(_mm_add_epi8(row, _mm_set1_epi8(kNarrowBias)));
      }
    }
    // A shuffle gives 0 where the highest bit is set, and else looks at the lowest 4.
    NarrowKeys key_operand(Vec windows) const noexcept {
      const Vec low =
          _mm256_blendv_epi8(_mm256_shuffle_epi8(entries[0], windows),
                             _mm256_shuffle_epi8(entries[1], windows), shift_left<3>(windows));
      const Vec high =
          _mm256_blendv_epi8(_mm256_shuffle_epi8(entries[2], windows),
                             _mm256_shuffle_epi8(entries[3], windows), shift_left<3>(windows));
      return {_mm256_blendv_epi8(low, high, shift_left<2>(windows))};
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
  static Acc add(Acc a, Acc b) noexcept { return _mm256_add_epi32(a, b); }
  static NarrowValues add_levels(NarrowValues a, NarrowValues b) noexcept {
    return {_mm256_add_epi8(a.levels, b.levels)};
  }
  static void store(std::int32_t* p, Acc acc) noexcept {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), acc);
  }
  static void round_weights(const float* products, float inverse, std::uint8_t* weights) noexcept {
    TQAI_LEVEL_NAMESPACE::round_weights(products, inverse, weights);
  }
  static void read_halves(const std::uint8_t* from, float* to) noexcept {
    TQAI_LEVEL_NAMESPACE::read_halves(from, to);
  }
  static void add_scaled(float* p, Acc acc, float step) noexcept {
    _mm256_storeu_ps(
        p, _mm256_fmadd_ps(_mm256_cvtepi32_ps(acc), _mm256_set1_ps(step), _mm256_loadu_ps(p)));
  }
};

// Of 4 bits: the lower part of a window is the two upper bits of the code before, which choose
// among tables where they are. Windows that are put together take four instructions more.
template <int kCount>
struct KeyPathReader<Avx2, 4, kCount> {
  using Vec = Avx2::Vec;
  static constexpr int kBits = 4;
  static constexpr int kFactorBits = 4;

  explicit KeyPathReader(const SegmentPlan& segment) noexcept
      : before_first(static_cast<std::uint8_t>(segment.key_trellis->start << 2)) {
    for (int table = 0; table < 4; ++table) {
      std::int8_t levels[16];
      for (int code = 0; code < 16; ++code) {
        levels[code] = static_cast<std::int8_t>(
            segment.key_trellis->levels[static_cast<std::size_t>(code << 2 | table)] +
            Avx2::kNarrowBias);
      }
      tables[table] =
          _mm256_broadcastsi128_si256(_mm_loadu_si128(reinterpret_cast<const __m128i*>(levels)));
    }
  }
  template <int kFirst>
  void begin(const std::uint8_t* last, int part) noexcept {
    Vec codes[4];
    load_quad<Avx2, kBits, 1>(last, part, codes);
    for (int s = 0; s < kCount; ++s) {
      before[s] = Avx2::next_bytes(codes[kFirst + s], before_first);
    }
  }
  Avx2::NarrowKeys operand(int s, Vec code) noexcept {
    const Vec index = Avx2::low_bits<4>(code);
    const Vec lower = Avx2::shift_left<5>(before[s]);  // a blend looks at the highest bit
    const Vec upper = Avx2::shift_left<4>(before[s]);
    before[s] = code;
    return {_mm256_blendv_epi8(_mm256_blendv_epi8(_mm256_shuffle_epi8(tables[0], index),
                                                  _mm256_shuffle_epi8(tables[1], index), lower),
                               _mm256_blendv_epi8(_mm256_shuffle_epi8(tables[2], index),
                                                  _mm256_shuffle_epi8(tables[3], index), lower),
                               upper)};
  }

  Vec tables[4];
  std::uint8_t before_first;
  Vec before[kCount];
};

// An 8 × 8 transpose: columns of `rows` into x[0…7], lanes `lane` and on.
inline void transpose8(__m256 (&a)[8], float (*x)[kLanes], int lane) noexcept {
  __m256 b[8];
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

// Codes of up to 4 bits: a binary search whose boundaries are in registers. Comparisons give −1, so
// codes are counted downwards; a permutation looks at the lowest 3 bits of its index.
template <int kBits>
struct NarrowCodes {
  explicit NarrowCodes(const SegmentPlan& segment) noexcept
      : table(_mm256_broadcastsi128_si256(
            _mm_loadu_si128(reinterpret_cast<const __m128i*>(segment.levels)))) {
    for (int bit = kBits - 1; bit >= 0; --bit) {
      // Where the higher bits are `index`: the middle of what is left.
      float middles[8] = {};
      for (int index = 0; index < 1 << (kBits - 1 - bit); ++index) {
        middles[-index & 7] = segment.boundaries[(2 * index + 1) * (1 << bit) - 1];
      }
      boundaries[bit] = bit == kBits - 1 ? _mm256_set1_ps(middles[0]) : _mm256_loadu_ps(middles);
    }
  }
  // quad · 256 + code
  __m256i append(__m256i quad, __m256 value) const noexcept {
    __m256i found = compare(value, boundaries[kBits - 1]);
    for (int bit = kBits - 2; bit >= 0; --bit) {
      const __m256 middle = _mm256_permutevar8x32_ps(boundaries[bit], found);
      found = _mm256_add_epi32(_mm256_add_epi32(found, found), compare(value, middle));
    }
    return _mm256_sub_epi32(_mm256_slli_epi32(quad, 8), found);
  }
  static __m256i compare(__m256 value, __m256 boundary) noexcept {
    return _mm256_castps_si256(_mm256_cmp_ps(value, boundary, _CMP_GE_OQ));
  }
  __m256i levels(__m256i codes) const noexcept { return _mm256_shuffle_epi8(table, codes); }

  __m256i table;
  __m256 boundaries[kBits];
};

// Codes of 8 bits.
struct ByteCodes {
  explicit ByteCodes(const SegmentPlan& segment) noexcept
      : inverse_step(_mm256_set1_ps(1.0F / segment.step)) {}

  __m256i append(__m256i quad, __m256 value) const noexcept {
    const __m256 scaled = _mm256_add_ps(_mm256_mul_ps(value, inverse_step), _mm256_set1_ps(128.5F));
    const __m256i code = _mm256_cvttps_epi32(
        _mm256_min_ps(_mm256_max_ps(scaled, _mm256_setzero_ps()), _mm256_set1_ps(255.0F)));
    return _mm256_or_si256(_mm256_slli_epi32(quad, 8), code);
  }
  static __m256i levels(__m256i codes) noexcept {
    return _mm256_xor_si256(codes, _mm256_set1_epi8(static_cast<char>(-128)));
  }

  __m256 inverse_step;
};

// Σ of the squares of each lane's four bytes, added to `sums`.
inline __m256i add_squares(__m256i sums, __m256i levels) noexcept {
  const __m256i odd = _mm256_srai_epi16(levels, 8);
  const __m256i even = _mm256_srai_epi16(_mm256_slli_epi16(levels, 8), 8);
  return _mm256_add_epi32(
      sums, _mm256_add_epi32(_mm256_madd_epi16(odd, odd), _mm256_madd_epi16(even, even)));
}

struct Avx2Lanes : PlainLanes {
  static void transpose(const float* rows, int dim, const float* signs, LaneRows& x) noexcept {
    int c = 0;
    for (; c + 8 <= dim; c += 8) {
      for (int half = 0; half < kLanes; half += 8) {
        __m256 a[8];
        for (int i = 0; i < 8; ++i) {
          a[i] = _mm256_loadu_ps(rows + (half + i) * std::ptrdiff_t{dim} + c);
        }
        if (signs != nullptr) {
          const __m256 factors = _mm256_loadu_ps(signs + c);
          for (__m256& row : a) row = _mm256_mul_ps(row, factors);
        }
        transpose8(a, x + c, half);
      }
    }
    transpose_from(c, rows, dim, signs, x);
  }

  // Two rows of what is left to add share a register after each step: fewer exchanges than turning
  // all rows. Which do is chosen so that the last step leaves their order.
  static void sum_trees(const float (*rows)[kLanes], float* sums) noexcept {
    for (int row = 0; row < kLanes; row += 8) {
      __m256 a[4];  // the lower half: row + i, the upper one: row + 4 + i
      for (int i = 0; i < 4; ++i) {
        const __m256 x = half_tree(rows[row + i]);
        const __m256 y = half_tree(rows[row + 4 + i]);
        a[i] =
            _mm256_add_ps(_mm256_permute2f128_ps(x, y, 0x20), _mm256_permute2f128_ps(x, y, 0x31));
      }
      const __m256 first = add_pairs(a[0], a[1]);
      const __m256 last = add_pairs(a[2], a[3]);
      _mm256_storeu_ps(sums + row, _mm256_add_ps(_mm256_shuffle_ps(first, last, 0x88),
                                                 _mm256_shuffle_ps(first, last, 0xDD)));
    }
  }
  // Lanes i + (i + 8).
  static __m256 half_tree(const float* row) noexcept {
    return _mm256_add_ps(_mm256_loadu_ps(row), _mm256_loadu_ps(row + 8));
  }
  // In each 128 bits lanes 0 + 2 and 1 + 3 of a, then of b.
  static __m256 add_pairs(__m256 a, __m256 b) noexcept {
    const __m256d x = _mm256_castps_pd(a);
    const __m256d y = _mm256_castps_pd(b);
    return _mm256_add_ps(_mm256_castpd_ps(_mm256_unpacklo_pd(x, y)),
                         _mm256_castpd_ps(_mm256_unpackhi_pd(x, y)));
  }

  template <int kBits>
  static void quantise(const SegmentPlan& segment, int dim, const LaneRows& y, const float* factors,
                       std::uint8_t* quads, float* norm2) noexcept {
    if constexpr (kBits <= kNarrowBits) {
      quantise_with(NarrowCodes<kBits>(segment), segment, dim, y, factors, quads, norm2);
    } else if constexpr (kBits == 8) {
      quantise_with(ByteCodes(segment), segment, dim, y, factors, quads, norm2);
    } else {
      PlainLanes::quantise<kBits>(segment, dim, y, factors, quads, norm2);
    }
  }

  // Of up to 4 bits and of 8.
  template <int kBits>
  struct NearestInRegisters {
    explicit NearestInRegisters(const SegmentPlan& segment) noexcept
        : codes(segment), step(_mm256_set1_ps(segment.step)) {}
    template <int kCount>
    void operator()(const float (&numbers)[kCount], std::uint8_t (&found)[kCount],
                    float (&decoded)[kCount]) const noexcept {
      const __m256i lowest = _mm256_set1_epi32(0x0C080400);
      const __m256i halves = _mm256_setr_epi32(0, 4, 0, 4, 0, 4, 0, 4);
      for (int first = 0; first < kCount; first += 8) {
        const __m256i code = codes.append(_mm256_setzero_si256(), _mm256_loadu_ps(numbers + first));
        const __m256i level = _mm256_srai_epi32(_mm256_slli_epi32(codes.levels(code), 24), 24);
        const __m256i bytes =
            _mm256_permutevar8x32_epi32(_mm256_shuffle_epi8(code, lowest), halves);
        _mm_storel_epi64(reinterpret_cast<__m128i*>(found + first), _mm256_castsi256_si128(bytes));
        _mm256_storeu_ps(decoded + first, _mm256_mul_ps(_mm256_cvtepi32_ps(level), step));
      }
    }

    std::conditional_t<kBits == 8, ByteCodes, NarrowCodes<kBits>> codes;
    __m256 step;
  };

  template <int kBits>
  using Nearest = std::conditional_t<kBits <= kNarrowBits || kBits == 8, NearestInRegisters<kBits>,
                                     PlainLanes::Nearest<kBits>>;

  template <typename Codes>
  static void quantise_with(const Codes& codes, const SegmentPlan& segment, int dim,
                            const LaneRows& y, const float* factors, std::uint8_t* quads,
                            float* norm2) noexcept {
    const int end = segment.first + segment.count;
    for (int lane = 0; lane < kLanes; lane += 8) {
      const __m256 factor = _mm256_loadu_ps(factors + lane);
      __m256i squares = _mm256_setzero_si256();
      const auto add_quad = [&](int c, int inside) {
        __m256i quad = _mm256_setzero_si256();
        for (int i = inside - 1; i >= 0; --i) {
          quad = codes.append(quad, _mm256_mul_ps(_mm256_loadu_ps(y[c + i] + lane), factor));
        }
        const auto kept = static_cast<std::uint32_t>((std::uint64_t{1} << (8 * inside)) - 1);
        const __m256i levels = codes.levels(quad);
        squares = add_squares(squares,
                              _mm256_and_si256(levels, _mm256_set1_epi32(static_cast<int>(kept))));
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(quads + c * kTileTokens + 4 * lane), quad);
      };
      int c = segment.first;
      for (; c + 4 <= std::min(end, dim); c += 4) add_quad(c, 4);
      for (; c < end; c += 4) add_quad(c, std::clamp(dim - c, 0, 4));
      _mm256_storeu_ps(norm2 + lane,
                       _mm256_add_ps(_mm256_loadu_ps(norm2 + lane), _mm256_cvtepi32_ps(squares)));
    }
  }

  static void turn_quads(const std::uint8_t* quads, std::uint8_t* lines) noexcept {
    // In each 128 bits 4 tokens of 4 coordinates: [token, coordinate] to [coordinate, token].
    const __m256i turn = _mm256_broadcastsi128_si256(
        _mm_setr_epi8(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15));
    for (int quad = 0; quad < 4; ++quad) {
      for (int line = 0; line < kGroupCodes; line += 2) {
        const __m256i turned =
            _mm256_shuffle_epi8(Avx2::load(quads + (quad * kTileTokens + 4 * line) * 4), turn);
        auto* to = reinterpret_cast<__m128i*>(lines + line * kLineBytes + 16 * quad);
        _mm_storeu_si128(to, _mm256_castsi256_si128(turned));
        _mm_storeu_si128(to + kLineBytes / 16, _mm256_extracti128_si256(turned, 1));
      }
    }
  }
};

constexpr Kernels kKernels = table_of<Integer<Avx2>, Avx2Lanes>(Level::avx2);
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
