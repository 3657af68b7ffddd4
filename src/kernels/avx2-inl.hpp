// What the levels share whose register is half a line: all but products of levels and factors.
#ifndef TQAI_AVX2_INL
#define TQAI_AVX2_INL

#include "integer-inl.hpp"
#include "parts-inl.hpp"
#include "table-inl.hpp"

namespace tqai::kernels::TQAI_LEVEL_NAMESPACE {
namespace TQAI_LOCAL {

struct HalfLines {
  using Vec = __m256i;
  using Acc = __m256i;
  static constexpr int kParts = 2;
  static constexpr int kRowBlock = 4;
  static constexpr int kMaxSums = 8;  // of 16 registers
  static constexpr int kDecodedBits = kNarrowBits;
  static constexpr bool kDecodesScalars = true;
  static constexpr bool kDecodesPaths = false;

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

  static Vec broadcast_byte(int value) noexcept {
    return _mm256_set1_epi8(static_cast<char>(value));
  }
  // 16 levels, plus `bias`, in both halves.
  static Vec table_of_16(const std::int8_t* levels, int bias) noexcept {
    const __m128i row = _mm_loadu_si128(reinterpret_cast<const __m128i*>(levels));
    return _mm256_add_epi8(_mm256_broadcastsi128_si256(row), broadcast_byte(bias));
  }

  // Levels plus `bias`, by codes of up to 7 bits; at 8 bits level = code − 128, without a table.
  template <int kBits>
  struct Tables {
    static constexpr int kTables = kBits <= 4 || kBits == 8 ? 1 : 1 << (kBits - 4);
    Vec entries[kTables];

    Tables(const std::int8_t* levels, int bias) noexcept {
      for (int table = 0; table < kTables; ++table) {
        entries[table] = table_of_16(levels + std::ptrdiff_t{16} * table, bias);
      }
    }
    Vec look_up(Vec codes) const noexcept { return choose<0, kTables>(codes); }
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
  };

  // Levels of keys by windows, plus kBias.
  template <typename Keys, int kBias>
  struct Windows {
    Vec entries[4];

    explicit Windows(const std::int8_t* of_windows) noexcept {
      for (int i = 0; i < 4; ++i) {
        entries[i] = table_of_16(of_windows + std::ptrdiff_t{16} * i, kBias);
      }
    }
    // A shuffle gives 0 where the highest bit is set, and else looks at the lowest 4.
    Keys key_operand(Vec windows) const noexcept {
      const Vec low =
          _mm256_blendv_epi8(_mm256_shuffle_epi8(entries[0], windows),
                             _mm256_shuffle_epi8(entries[1], windows), shift_left<3>(windows));
      const Vec high =
          _mm256_blendv_epi8(_mm256_shuffle_epi8(entries[2], windows),
                             _mm256_shuffle_epi8(entries[3], windows), shift_left<3>(windows));
      return {_mm256_blendv_epi8(low, high, shift_left<2>(windows))};
    }
  };

  static Acc broadcast(std::int32_t value) noexcept { return _mm256_set1_epi32(value); }
  static Vec broadcast_word(const std::uint8_t* words) noexcept {
    std::int32_t word;
    std::memcpy(&word, words, sizeof word);
    return _mm256_set1_epi32(word);
  }
  static Acc add(Acc a, Acc b) noexcept { return _mm256_add_epi32(a, b); }
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
template <typename Keys, int kBias, int kCount>
struct FourBitPathReader {
  using Vec = HalfLines::Vec;
  static constexpr int kBits = 4;
  static constexpr int kFactorBits = 4;

  explicit FourBitPathReader(const SegmentPlan& segment) noexcept
      : before_first(static_cast<std::uint8_t>(segment.key_trellis->start << 2)) {
    for (int table = 0; table < 4; ++table) {
      std::int8_t levels[16];
      for (int code = 0; code < 16; ++code) {
        levels[code] = segment.key_trellis->levels[static_cast<std::size_t>(code << 2 | table)];
      }
      tables[table] = HalfLines::table_of_16(levels, kBias);
    }
  }
  template <int kFirst>
  void begin(const std::uint8_t* last, int part) noexcept {
    Vec codes[4];
    load_quad<HalfLines, kBits, 1>(last, part, codes);
    for (int s = 0; s < kCount; ++s) {
      before[s] = HalfLines::next_bytes(codes[kFirst + s], before_first);
    }
  }
  Keys operand(int s, Vec code) noexcept {
    const Vec index = HalfLines::low_bits<4>(code);
    const Vec lower = HalfLines::shift_left<5>(before[s]);  // a blend looks at the highest bit
    const Vec upper = HalfLines::shift_left<4>(before[s]);
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

struct HalfLineLanes : PlainLanes {
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
            _mm256_shuffle_epi8(HalfLines::load(quads + (quad * kTileTokens + 4 * line) * 4), turn);
        auto* to = reinterpret_cast<__m128i*>(lines + line * kLineBytes + 16 * quad);
        _mm_storeu_si128(to, _mm256_castsi256_si128(turned));
        _mm_storeu_si128(to + kLineBytes / 16, _mm256_extracti128_si256(turned, 1));
      }
    }
  }
};

}  // namespace TQAI_LOCAL
}  // namespace tqai::kernels::TQAI_LEVEL_NAMESPACE

#endif  // TQAI_AVX2_INL
