// A tile's packed codes as they are loaded, by a level's primitives `Ops` (integer-inl.hpp). No
// lambda here takes or returns a Vec: GCC compiles lambdas without the region's target.
#ifndef TQAI_CODES_INL
#define TQAI_CODES_INL

#include "floats-inl.hpp"
#include "kernels.hpp"

namespace tqai::kernels::TQAI_LEVEL_NAMESPACE {
namespace TQAI_LOCAL {

template <typename Ops>
TQAI_ALWAYS_INLINE typename Ops::Vec load_line(const std::uint8_t* group, int part,
                                               int line) noexcept {
  return Ops::load(group + line * kLineBytes + part * (kLineBytes / Ops::kParts));
}

// A 3-bit code from its lower two bits and its upper one; both may have dirty upper bits.
template <typename Ops>
inline typename Ops::Vec join_three(typename Ops::Vec low, typename Ops::Vec high) noexcept {
  return Ops::either(Ops::template low_bits<2>(low),
                     Ops::template shift_left<2>(Ops::template low_bits<1>(high)));
}

// Codes 4 kQuad … 4 kQuad + 3 of a group (packing.hpp), part `part` of their lines. Codes of up to
// 4 bits may have dirty upper bits.
template <typename Ops, int kBits, int kQuad>
TQAI_ALWAYS_INLINE void load_quad(const std::uint8_t* group, int part,
                                  typename Ops::Vec (&codes)[4]) noexcept {
  using Vec = typename Ops::Vec;
  if constexpr (kBits == 8) {
    for (int i = 0; i < 4; ++i) codes[i] = load_line<Ops>(group, part, 4 * kQuad + i);
  } else if constexpr (kBits == 3) {
    if constexpr (kQuad == 0) {
      codes[0] = load_line<Ops>(group, part, 0);
      codes[1] = Ops::template shift_right<3>(codes[0]);
      codes[2] = load_line<Ops>(group, part, 1);
      codes[3] = Ops::template shift_right<3>(codes[2]);
    } else {
      const Vec a = load_line<Ops>(group, part, 0);
      const Vec b = load_line<Ops>(group, part, 1);
      const Vec c = load_line<Ops>(group, part, 2);
      codes[0] = c;
      codes[1] = Ops::template shift_right<3>(c);
      codes[2] = join_three<Ops>(Ops::template shift_right<6>(a), Ops::template shift_right<6>(c));
      codes[3] = join_three<Ops>(Ops::template shift_right<6>(b), Ops::template shift_right<7>(c));
    }
  } else if constexpr (kBits == 4) {
    for (int l = 0; l < 2; ++l) {
      codes[2 * l] = load_line<Ops>(group, part, 2 * kQuad + l);
      codes[2 * l + 1] = Ops::template shift_right<4>(codes[2 * l]);
    }
  } else if constexpr (kBits == 2) {
    codes[0] = load_line<Ops>(group, part, kQuad);
    codes[1] = Ops::template shift_right<2>(codes[0]);
    codes[2] = Ops::template shift_right<4>(codes[0]);
    codes[3] = Ops::template shift_right<6>(codes[0]);
  } else if constexpr (kBits == 1) {
    const Vec line = load_line<Ops>(group, part, 0);
    codes[0] = kQuad == 0 ? line : Ops::template shift_right<4>(line);
    codes[1] = Ops::template shift_right<4 * kQuad + 1>(line);
    codes[2] = Ops::template shift_right<4 * kQuad + 2>(line);
    codes[3] = Ops::template shift_right<4 * kQuad + 3>(line);
  } else {  // 5, 6, 7: the planes of 4 and of 1, 2 or 3 bits, cleaned and joined
    constexpr int kNext = (kBits & 2) != 0 ? 2 : 1;
    load_quad<Ops, 4, kQuad>(group, part, codes);
    Vec next[4];
    load_quad<Ops, kNext, kQuad>(group + 4 * kLineBytes, part, next);
    for (int i = 0; i < 4; ++i) {
      codes[i] = Ops::either(Ops::template low_bits<4>(codes[i]),
                             Ops::template shift_left<4>(Ops::template low_bits<kNext>(next[i])));
    }
    if constexpr (kBits == 7) {
      load_quad<Ops, 1, kQuad>(group + 6 * kLineBytes, part, next);
      for (int i = 0; i < 4; ++i) {
        codes[i] =
            Ops::either(codes[i], Ops::template shift_left<6>(Ops::template low_bits<1>(next[i])));
      }
    }
  }
}

}  // namespace TQAI_LOCAL
}  // namespace tqai::kernels::TQAI_LEVEL_NAMESPACE

#endif  // TQAI_CODES_INL
