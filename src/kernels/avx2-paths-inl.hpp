// Keys in trellis codes at AVX2, whose shuffles look 16 levels up: a tile's are decoded before they
// are multiplied. Beside sums of products its tables would not stay in registers, and with more
// rows than these hold it would be decoded several times.
#ifndef TQAI_AVX2_PATHS_INL
#define TQAI_AVX2_PATHS_INL

#include "decoded-inl.hpp"

namespace tqai::kernels::TQAI_LEVEL_NAMESPACE {
namespace TQAI_LOCAL {

// 64 levels by windows of 6 bits, of which four are an index into a table and two choose one,
// `flip` and `other`. Two tables are enough, of windows whose flip bit is 0: a window and its
// complement have opposite levels (trellis.cpp).
struct HalvedWindows {
  __m256i tables[2];  // twice (level + kNarrowBias)

  HalvedWindows(__m128i first, __m128i second) noexcept
      : tables{twice_biased(first), twice_biased(second)} {}
  static __m256i twice_biased(__m128i levels) noexcept {
    const __m128i biased = _mm_add_epi8(levels, _mm_set1_epi8(Avx2::kNarrowBias));
    return _mm256_broadcastsi128_si256(_mm_add_epi8(biased, biased));
  }
  // index: in each byte's lower half; flip: its highest bit; differ: flip ^ other, as the highest
  // bit too. The rest may be dirty. Gives level + kNarrowBias.
  TQAI_ALWAYS_INLINE __m256i look_up(__m256i index, __m256i flip, __m256i differ) const noexcept {
    const __m256i zero = _mm256_setzero_si256();
    const __m256i flipped = _mm256_cmpgt_epi8(zero, flip);
    const __m256i clean = Avx2::low_bits<4>(_mm256_xor_si256(index, flipped));
    const __m256i twice = _mm256_blendv_epi8(_mm256_shuffle_epi8(tables[0], clean),
                                             _mm256_shuffle_epi8(tables[1], clean), differ);
    // 255 − 2 x, halved and rounded upwards, is 128 − x.
    return _mm256_avg_epu8(_mm256_xor_si256(twice, flipped), zero);
  }
};

inline __m128i load_levels(const KeyTrellis& trellis, int window) noexcept {
  return _mm_loadu_si128(reinterpret_cast<const __m128i*>(trellis.levels.data() + window));
}

// Windows whose upper four bits are the index, and those whose lower ones are.
inline HalvedWindows by_upper(const KeyTrellis& trellis) noexcept {
  // Each fourth level, from the first on and from the second.
  const __m128i order = _mm_setr_epi8(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
  __m128i rows[4];
  for (int i = 0; i < 4; ++i) rows[i] = _mm_shuffle_epi8(load_levels(trellis, 16 * i), order);
  const __m128i low = _mm_unpacklo_epi32(rows[0], rows[1]);
  const __m128i high = _mm_unpacklo_epi32(rows[2], rows[3]);
  return {_mm_unpacklo_epi64(low, high), _mm_unpackhi_epi64(low, high)};
}
inline HalvedWindows by_lower(const KeyTrellis& trellis) noexcept {
  return {load_levels(trellis, 0), load_levels(trellis, 16)};
}

// Four bits for each half of a byte, those of one subtile's code or codes, and of another's.
struct Nibbles {
  __m256i both;
  __m256i upper;   // at the low end, and dirty above
  __m256i differ;  // each bit ^ the next lower one

  Nibbles() = default;
  explicit Nibbles(__m256i nibbles) noexcept
      : both(nibbles),
        upper(Avx2::shift_right<4>(nibbles)),
        differ(_mm256_xor_si256(nibbles, _mm256_add_epi8(nibbles, nibbles))) {}
};

// Levels by the index `of`, and bits kBit and below of each nibble of `by`, which choose: of the
// lower halves, and of the upper ones.
template <int kBit>
TQAI_ALWAYS_INLINE void look_up(const HalvedWindows& windows, const Nibbles& of, const Nibbles& by,
                                __m256i& lower, __m256i& upper) noexcept {
  lower = windows.look_up(of.both, Avx2::shift_left<7 - kBit>(by.both),
                          Avx2::shift_left<7 - kBit>(by.differ));
  if constexpr (kBit == 3) {
    upper = windows.look_up(of.upper, by.both, by.differ);
  } else {
    upper = windows.look_up(of.upper, Avx2::shift_left<3 - kBit>(by.both),
                            Avx2::shift_left<3 - kBit>(by.differ));
  }
}

// Levels of a part's groups, one after another: eight lines each. begin: before the first, as each
// byte's path goes on where that of the byte before it ended, with the last group's codes.
template <int kBits>
struct PathDecoder;

// A window is a code and the upper half of the one before.
template <>
struct PathDecoder<4> {
  explicit PathDecoder(const KeyTrellis& trellis) noexcept
      : windows(by_upper(trellis)), start(static_cast<std::uint8_t>((trellis.start << 2) * 0x11)) {}
  void begin(const std::uint8_t* last, int part) noexcept {
    for (int i = 0; i < 2; ++i) {
      before[i] = Nibbles(Avx2::next_bytes(load_line<Avx2>(last, part, 2 + i), start));
    }
  }
  TQAI_ALWAYS_INLINE void decode(const std::uint8_t* group, int part,
                                 __m256i (&levels)[8]) noexcept {
    for (int line = 0; line < 4; ++line) {
      const Nibbles codes(load_line<Avx2>(group, part, line));
      look_up<3>(windows, codes, before[line % 2], levels[2 * line], levels[2 * line + 1]);
      before[line % 2] = codes;
    }
  }

  HalvedWindows windows;
  std::uint8_t start;
  Nibbles before[2];  // of subtiles 0 and 1, 2 and 3
};

// Windows of three codes. A group's two of a subtile are put together: with the one before they
// are the window of the second, and those of the group before, with the first, that of the first.
template <>
struct PathDecoder<2> {
  explicit PathDecoder(const KeyTrellis& trellis) noexcept
      : first(by_lower(trellis)),
        second(by_upper(trellis)),
        start(static_cast<std::uint8_t>(trellis.start * 0x11)) {}
  // Of subtiles 0 and 2, and of 1 and 3.
  struct Pairs {
    Nibbles even, odd;

    Pairs() = default;
    Pairs(__m256i even_pairs, __m256i odd_pairs) noexcept : even(even_pairs), odd(odd_pairs) {}
  };
  void begin(const std::uint8_t* last, int part) noexcept {
    const Pairs ends = load(last, part);
    before = {Avx2::next_bytes(ends.even.both, start), Avx2::next_bytes(ends.odd.both, start)};
  }
  static Pairs load(const std::uint8_t* group, int part) noexcept {
    const __m256i mask = _mm256_set1_epi8(0x33);
    const __m256i low = load_line<Avx2>(group, part, 0);
    const __m256i high = load_line<Avx2>(group, part, 1);
    return {Avx2::either(_mm256_and_si256(mask, low),
                         Avx2::shift_left<2>(_mm256_and_si256(mask, high))),
            Avx2::either(Avx2::shift_right<2>(_mm256_andnot_si256(mask, low)),
                         _mm256_andnot_si256(mask, high))};
  }
  TQAI_ALWAYS_INLINE void decode(const std::uint8_t* group, int part,
                                 __m256i (&levels)[8]) noexcept {
    const Pairs codes = load(group, part);
    look_up<1>(first, before.even, codes.even, levels[0], levels[2]);
    look_up<3>(second, codes.even, before.even, levels[4], levels[6]);
    look_up<1>(first, before.odd, codes.odd, levels[1], levels[3]);
    look_up<3>(second, codes.odd, before.odd, levels[5], levels[7]);
    before = codes;
  }

  HalvedWindows first, second;
  std::uint8_t start;
  Pairs before;
};

// A window is a code and the one before.
template <>
struct PathDecoder<3> {
  explicit PathDecoder(const KeyTrellis& trellis) noexcept
      : windows(by_lower(trellis)), start(static_cast<std::uint8_t>(trellis.start)) {}
  void begin(const std::uint8_t* last, int part) noexcept {
    load_quad<Avx2, 3, 1>(last, part, before);
    for (__m256i& code : before) code = Avx2::next_bytes(Avx2::low_bits<3>(code), start);
  }
  TQAI_ALWAYS_INLINE void decode(const std::uint8_t* group, int part,
                                 __m256i (&levels)[8]) noexcept {
    __m256i codes[2][4];
    load_quad<Avx2, 3, 0>(group, part, codes[0]);
    load_quad<Avx2, 3, 1>(group, part, codes[1]);
    for (int i = 0; i < 8; ++i) {
      const __m256i code = Avx2::low_bits<3>(codes[i / 4][i % 4]);
      const __m256i flip = Avx2::shift_left<5>(code);
      levels[i] = windows.look_up(Avx2::either(before[i % 4], Avx2::shift_left<3>(code)), flip,
                                  _mm256_xor_si256(flip, _mm256_add_epi8(flip, flip)));
      before[i % 4] = code;
    }
  }

  HalvedWindows windows;
  std::uint8_t start;
  __m256i before[4];  // codes
};

template <int kBits>
inline void decode_groups(const SegmentPlan& segment, const std::uint8_t* packed,
                          std::uint8_t* decoded) noexcept {
  constexpr std::ptrdiff_t kGroupBytes = std::ptrdiff_t{kBits} * kLineBytes;
  PathDecoder<kBits> decoder(*segment.key_trellis);
  const int groups = segment.count / kGroupCodes;
  for (int part = 0; part < Avx2::kParts; ++part) {
    decoder.begin(packed + (groups - 1) * kGroupBytes, part);
    for (int group = 0; group < groups; ++group) {
      __m256i levels[8];
      decoder.decode(packed + group * kGroupBytes, part, levels);
      for (int line = 0; line < 8; ++line) {
        store_line<Avx2>(decoded + group * kDecodedGroupBytes, part, line, levels[line]);
      }
    }
  }
}

inline void Avx2::decode_paths(const SegmentPlan& segment, const std::uint8_t* packed,
                               std::uint8_t* decoded) noexcept {
  switch (segment.bits) {
    case 2: decode_groups<2>(segment, packed, decoded); break;
    case 3: decode_groups<3>(segment, packed, decoded); break;
    default: decode_groups<4>(segment, packed, decoded); break;
  }
}

}  // namespace TQAI_LOCAL
}  // namespace tqai::kernels::TQAI_LEVEL_NAMESPACE

#endif  // TQAI_AVX2_PATHS_INL
