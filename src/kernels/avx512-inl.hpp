// What the levels share whose register is a line: all but look-ups of levels.
#ifndef TQAI_AVX512_INL
#define TQAI_AVX512_INL

#include "integer-inl.hpp"
#include "parts-inl.hpp"
#include "table-inl.hpp"

namespace tqai::kernels::TQAI_LEVEL_NAMESPACE {
namespace TQAI_LOCAL {

struct WholeLines {
  using Vec = __m512i;
  using Acc = __m512i;
  static constexpr int kParts = 1;
  static constexpr int kMaxWords = 1;
  static constexpr int kRowBlock = 8;
  static constexpr int kMaxSums = 16;  // of 32 registers
  // With one or two rows memory is the limit, and is read in order: blocks side by side are streams
  // that processors follow less well.
  static constexpr int value_blocks(int rows) noexcept { return rows <= 2 ? 1 : 2; }
  static constexpr int value_chains(int rows) noexcept { return rows <= 2 ? 4 : 1; }
  static constexpr bool kSumsQuotients = false;
  static constexpr bool kSumsPairs = false;
  template <int kBits>
  static constexpr int words() noexcept {
    return 1;
  }

  static Vec load(const std::uint8_t* p) noexcept { return _mm512_loadu_si512(p); }
  static void store_levels(std::uint8_t* p, Vec levels) noexcept { _mm512_store_si512(p, levels); }
  // Into L2: what L1 waits for is limited to 16 lines (Intel) or 24 (AMD), half of what memory
  // needs.
  static void prefetch(const std::uint8_t* p) noexcept {
    _mm_prefetch(reinterpret_cast<const char*>(p), _MM_HINT_T1);
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
  template <int kBits>
  static Vec merge(Vec low, Vec high) noexcept {
    constexpr int kChoose = 0xCA;  // first ? second : third
    return _mm512_ternarylogic_epi32(_mm512_set1_epi8((1 << kBits) - 1), low, high, kChoose);
  }
  static Vec next_bytes(Vec v, std::uint8_t value) noexcept {
    return _mm512_or_si512(_mm512_slli_epi32(v, 8), _mm512_set1_epi32(value));
  }

  // vpdpbusd multiplies u8 by s8. Keys are the u8 side, as level + 128, and queries the s8 one;
  // values are the s8 side, weights the u8 one.
  struct KeyOperand {
    Vec levels;
  };
  struct ValueOperand {
    Vec levels;
  };

  using KeyLevels = KeyOperand;
  using ValueLevels = ValueOperand;
  static constexpr int kDecodedBits = kNarrowBits;
  static constexpr bool kDecodesScalars = false;  // a look-up takes no more than a load
  static constexpr bool kDecodesPaths = false;

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
  static Acc add(Acc a, Acc b) noexcept { return _mm512_add_epi32(a, b); }
  static ValueOperand add_levels(ValueOperand a, ValueOperand b) noexcept {
    return {_mm512_add_epi8(a.levels, b.levels)};
  }
  static void store(std::int32_t* p, Acc acc) noexcept { _mm512_storeu_si512(p, acc); }
  // Compilers narrow by permutations of two registers, each of which is three instructions.
  TQAI_ALWAYS_INLINE static void round_weights(const float* products, float inverse,
                                               std::uint8_t* weights) noexcept {
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
inline void transpose16(__m512 (&a)[16], float (*x)[kLanes]) noexcept {
  __m512 b[16];
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

// Σ of the squares of each lane's four bytes, added to `sums`.
inline __m512i add_squares(__m512i sums, __m512i levels) noexcept {
  const __m512i odd = _mm512_srai_epi16(levels, 8);
  const __m512i even = _mm512_srai_epi16(_mm512_slli_epi16(levels, 8), 8);
  return _mm512_dpwssd_epi32(_mm512_dpwssd_epi32(sums, odd, odd), even, even);
}

// Codes of up to 4 bits by bins whose tables are registers, and their levels.
struct NarrowCodes {
  explicit NarrowCodes(const SegmentPlan& segment) noexcept
      : scale(_mm512_set1_ps(segment.bins->scale)),
        limit(_mm512_set1_ps(segment.bins->limit)),
        low_boundaries(_mm512_loadu_ps(segment.bins->boundaries.data())),
        high_boundaries(_mm512_loadu_ps(segment.bins->boundaries.data() + 16)),
        low_codes(widened(segment.bins->codes.data())),
        high_codes(widened(segment.bins->codes.data() + 16)),
        table(_mm512_loadu_si512(segment.levels)) {}

  static __m512i widened(const std::uint8_t* codes) noexcept {
    return _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(codes)));
  }
  __m512i operator()(__m512 value) const noexcept {
    constexpr int kSmallerWithSign = 0b0010;  // of |value| and the limit, with value's sign
    const __m512 within = _mm512_range_ps(value, limit, kSmallerWithSign);
    const __m512i bin =
        _mm512_castps_si512(_mm512_fmadd_ps(within, scale, _mm512_set1_ps(kRoundingShift)));
    const __m512i code = _mm512_permutex2var_epi32(low_codes, bin, high_codes);
    const __m512 boundary = _mm512_permutex2var_ps(low_boundaries, bin, high_boundaries);
    const __mmask16 above = _mm512_cmp_ps_mask(value, boundary, _CMP_GE_OQ);
    return _mm512_mask_add_epi32(code, above, code, _mm512_set1_epi32(1));
  }
  __m512i levels(__m512i codes) const noexcept { return _mm512_shuffle_epi8(table, codes); }

  __m512 scale, limit;
  __m512 low_boundaries, high_boundaries;
  __m512i low_codes, high_codes;
  __m512i table;
};

// Codes of 8 bits.
struct ByteCodes {
  explicit ByteCodes(const SegmentPlan& segment) noexcept
      : inverse_step(_mm512_set1_ps(1.0F / segment.step)) {}

  __m512i operator()(__m512 value) const noexcept {
    const __m512 scaled = _mm512_add_ps(_mm512_mul_ps(value, inverse_step), _mm512_set1_ps(128.5F));
    return _mm512_cvttps_epi32(
        _mm512_min_ps(_mm512_max_ps(scaled, _mm512_setzero_ps()), _mm512_set1_ps(255.0F)));
  }
  static __m512i levels(__m512i codes) noexcept {
    return _mm512_xor_si512(codes, _mm512_set1_epi8(static_cast<char>(-128)));
  }

  __m512 inverse_step;
};

struct WholeLineLanes : PlainLanes {
  static void transpose(const float* rows, int dim, const float* signs, LaneRows& x) noexcept {
    int c = 0;
    for (; c + 16 <= dim; c += 16) {
      __m512 a[16];
      for (int i = 0; i < 16; ++i) a[i] = _mm512_loadu_ps(rows + i * std::ptrdiff_t{dim} + c);
      if (signs != nullptr) {
        const __m512 factors = _mm512_loadu_ps(signs + c);
        for (__m512& row : a) row = _mm512_mul_ps(row, factors);
      }
      transpose16(a, x + c);
    }
    transpose_from(c, rows, dim, signs, x);
  }

  // Two rows of what is left to add share a register after each step: fewer exchanges than turning
  // all rows.
  static void sum_trees(const float (*rows)[kLanes], float* sums) noexcept {
    FloatVec rests[4];
    for (int i = 0; i < 4; ++i) {
      rests[i] = begin_trees(load_floats(rows[4 * i]), load_floats(rows[4 * i + 1]),
                             load_floats(rows[4 * i + 2]), load_floats(rows[4 * i + 3]));
    }
    end_trees(rests, sums);
  }
  // The first two steps of four rows, which have a quarter of a register each then, or the first of
  // two.
  static FloatVec begin_trees(FloatVec a, FloatVec b, FloatVec c, FloatVec d) noexcept {
    return half_trees<0x88, 0xDD>(begin_trees(a, b), begin_trees(c, d));
  }
  static FloatVec begin_trees(FloatVec a, FloatVec b) noexcept {
    return half_trees<0x44, 0xEE>(a, b);
  }
  // rests: what begin_trees leaves of 16 rows, kGiven after kGiven.
  template <int kGiven>
  static void end_trees(const float (*rests)[kLanes], float* sums) noexcept {
    FloatVec fours[4];
    for (int i = 0; i < 4; ++i) {
      if constexpr (kGiven == 4) {
        fours[i] = load_floats(rests[i]);
      } else {
        fours[i] = half_trees<0x88, 0xDD>(load_floats(rests[2 * i]), load_floats(rests[2 * i + 1]));
      }
    }
    end_trees(fours, sums);
  }
  static void end_trees(const FloatVec (&fours)[4], float* sums) noexcept {
    const __m512 first = add_pairs(native(fours[0]), native(fours[1]));
    const __m512 last = add_pairs(native(fours[2]), native(fours[3]));
    const __m512 all =
        _mm512_add_ps(_mm512_shuffle_ps(first, last, 0x88), _mm512_shuffle_ps(first, last, 0xDD));
    // Lane 4 g + i: row 4 i + g.
    const __m512i order = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
    _mm512_storeu_ps(sums, _mm512_permutexvar_ps(order, all));
  }
  // Of two registers, the quarters that kOne chooses plus those that kOther does.
  template <int kOne, int kOther>
  static FloatVec half_trees(FloatVec a, FloatVec b) noexcept {
    return from_native(_mm512_add_ps(_mm512_shuffle_f32x4(native(a), native(b), kOne),
                                     _mm512_shuffle_f32x4(native(a), native(b), kOther)));
  }
  // In each 128 bits lanes 0 + 2 and 1 + 3 of a, then of b.
  static __m512 add_pairs(__m512 a, __m512 b) noexcept {
    const __m512d x = _mm512_castps_pd(a);
    const __m512d y = _mm512_castps_pd(b);
    return _mm512_add_ps(_mm512_castpd_ps(_mm512_unpacklo_pd(x, y)),
                         _mm512_castpd_ps(_mm512_unpackhi_pd(x, y)));
  }

  template <int kBits>
  static void quantise(const SegmentPlan& segment, int dim, const LaneRows& y, const float* factors,
                       std::uint8_t* quads, float* norm2) noexcept {
    if constexpr (kBits <= kNarrowBits) {
      quantise_with(NarrowCodes(segment), segment, dim, y, factors, quads, norm2);
    } else if constexpr (kBits == 8) {
      quantise_with(ByteCodes(segment), segment, dim, y, factors, quads, norm2);
    } else {
      PlainLanes::quantise<kBits>(segment, dim, y, factors, quads, norm2);
    }
  }

  // Of up to 4 bits and of 8.
  template <int kBits>
  struct NearestInRegisters {
    using Codes = std::conditional_t<kBits == 8, ByteCodes, NarrowCodes>;

    explicit NearestInRegisters(const SegmentPlan& segment) noexcept
        : codes(segment), step(_mm512_set1_ps(segment.step)) {}
    template <int kCount>
    void operator()(const float (&numbers)[kCount], std::uint8_t (&found)[kCount],
                    float (&decoded)[kCount]) const noexcept {
      for (int first = 0; first < kCount; first += 16) {
        const __m512i code = codes(_mm512_loadu_ps(numbers + first));
        const __m512i level = _mm512_srai_epi32(_mm512_slli_epi32(codes.levels(code), 24), 24);
        _mm_storeu_si128(reinterpret_cast<__m128i*>(found + first), _mm512_cvtepi32_epi8(code));
        _mm512_storeu_ps(decoded + first, _mm512_mul_ps(_mm512_cvtepi32_ps(level), step));
      }
    }

    Codes codes;
    __m512 step;
  };

  template <int kBits>
  using Nearest = std::conditional_t<kBits <= kNarrowBits || kBits == 8, NearestInRegisters<kBits>,
                                     PlainLanes::Nearest<kBits>>;

  template <typename Codes>
  static void quantise_with(const Codes& codes, const SegmentPlan& segment, int dim,
                            const LaneRows& y, const float* factors, std::uint8_t* quads,
                            float* norm2) noexcept {
    const __m512 factor = _mm512_loadu_ps(factors);
    __m512i squares = _mm512_setzero_si512();
    const auto add_quad = [&](int c, int inside) {
      __m512i quad = _mm512_setzero_si512();
      for (int i = inside - 1; i >= 0; --i) {
        const __m512i code = codes(_mm512_mul_ps(_mm512_loadu_ps(y[c + i]), factor));
        quad = _mm512_or_si512(_mm512_slli_epi32(quad, 8), code);
      }
      const auto kept = 0x1111'1111'1111'1111U * ((std::uint64_t{1} << inside) - 1);
      squares = add_squares(squares, _mm512_maskz_mov_epi8(kept, codes.levels(quad)));
      _mm512_storeu_si512(quads + c * kTileTokens, quad);
    };
    const int end = segment.first + segment.count;
    int c = segment.first;
    for (; c + 4 <= std::min(end, dim); c += 4) add_quad(c, 4);
    for (; c < end; c += 4) add_quad(c, std::clamp(dim - c, 0, 4));
    _mm512_storeu_ps(norm2, _mm512_add_ps(_mm512_loadu_ps(norm2), _mm512_cvtepi32_ps(squares)));
  }

  static void turn_quads(const std::uint8_t* quads, std::uint8_t* lines) noexcept {
    // In each 128 bits 4 tokens of 4 coordinates: [token, coordinate] to [coordinate, token].
    const __m512i turn =
        _mm512_broadcast_i32x4(_mm_setr_epi8(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15));
    for (int half = 0; half < 2; ++half) {
      __m512i a[4];
      for (int quad = 0; quad < 4; ++quad) {
        a[quad] = _mm512_shuffle_epi8(
            _mm512_loadu_si512(quads + (quad * kTileTokens + 16 * half) * 4), turn);
      }
      const __m512i low01 = _mm512_shuffle_i32x4(a[0], a[1], 0x44);
      const __m512i high01 = _mm512_shuffle_i32x4(a[0], a[1], 0xEE);
      const __m512i low23 = _mm512_shuffle_i32x4(a[2], a[3], 0x44);
      const __m512i high23 = _mm512_shuffle_i32x4(a[2], a[3], 0xEE);
      std::uint8_t* to = lines + half * (4 * kLineBytes);
      _mm512_storeu_si512(to, _mm512_shuffle_i32x4(low01, low23, 0x88));
      _mm512_storeu_si512(to + kLineBytes, _mm512_shuffle_i32x4(low01, low23, 0xDD));
      _mm512_storeu_si512(to + 2 * kLineBytes, _mm512_shuffle_i32x4(high01, high23, 0x88));
      _mm512_storeu_si512(to + 3 * kLineBytes, _mm512_shuffle_i32x4(high01, high23, 0xDD));
    }
  }
};

}  // namespace TQAI_LOCAL
}  // namespace tqai::kernels::TQAI_LEVEL_NAMESPACE

#endif  // TQAI_AVX512_INL
