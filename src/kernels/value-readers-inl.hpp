// Readers of values, for integer-inl.hpp's loops: what makes operands of the codes of four lines at
// a time. group: of the lines; before: the packed line before it, round the ring.
//   load<kQuad>(group, before, part, codes)
//   operand(codes, i)   of the i-th line
//   kByFours            whether all four are multiplied at once (Ops::dot_four)
//   sum(acc)            what the operands' sum stands for
#ifndef TQAI_VALUE_READERS_INL
#define TQAI_VALUE_READERS_INL

#include "codes-inl.hpp"

namespace tqai::kernels::TQAI_LEVEL_NAMESPACE {
namespace TQAI_LOCAL {

// Of scalar codes.
template <typename Ops, int kWidth>
struct ScalarReader {
  static constexpr int kBits = kWidth;
  static constexpr int kFactorBits = kWidth;
  static constexpr bool kByFours = false;
  using Codes = typename Ops::Vec[4];

  explicit ScalarReader(const SegmentPlan& segment) noexcept : table(segment.levels, false) {}

  template <int kQuad>
  TQAI_ALWAYS_INLINE static void load(const std::uint8_t* group, const std::uint8_t* /*before*/,
                                      int part, Codes& codes) noexcept {
    load_quad<Ops, kBits, kQuad>(group, part, codes);
  }
  TQAI_ALWAYS_INLINE auto operand(const Codes& codes, int i) const noexcept {
    return table.value_operand(codes[i]);
  }
  typename Ops::Acc sum(typename Ops::Acc acc) const noexcept { return acc; }

  typename Ops::template Table<kBits> table;
};

// Of scalar codes whose levels have small quotients: four products at a time add up in 16 bits.
template <typename Ops, int kWidth>
struct QuotientReader {
  static constexpr int kBits = kWidth;
  static constexpr int kFactorBits = kWidth;
  static constexpr bool kByFours = true;
  using Codes = typename Ops::Vec[4];

  explicit QuotientReader(const SegmentPlan& segment) noexcept
      : table(segment.quotients, false), divisor(segment.divisor) {}

  template <int kQuad>
  TQAI_ALWAYS_INLINE static void load(const std::uint8_t* group, const std::uint8_t* /*before*/,
                                      int part, Codes& codes) noexcept {
    load_quad<Ops, kBits, kQuad>(group, part, codes);
  }
  TQAI_ALWAYS_INLINE auto operand(const Codes& codes, int i) const noexcept {
    return table.value_operand(codes[i]);
  }
  typename Ops::Acc sum(typename Ops::Acc acc) const noexcept { return Ops::times(acc, divisor); }

  typename Ops::template Table<kBits> table;
  int divisor;
};

// Four bits of a group's stream, from bit kFirst on; upper bits may be dirty.
template <typename Ops, int kFirst>
TQAI_ALWAYS_INLINE typename Ops::Vec load_nibble(const std::uint8_t* group,
                                                 const std::uint8_t* before, int part) noexcept {
  constexpr int kLine = kFirst < 0 ? -1 : kFirst / 8;
  constexpr int kShift = kFirst - 8 * kLine;
  const typename Ops::Vec low =
      kLine < 0 ? load_line<Ops>(before, part, 0) : load_line<Ops>(group, part, kLine);
  if constexpr (kShift == 0) {
    return low;
  } else if constexpr (kShift <= 4) {
    return Ops::template shift_right<kShift>(low);
  } else {
    constexpr int kLow = 8 - kShift;  // bits in the first of two lines
    const typename Ops::Vec high = load_line<Ops>(group, part, kLine + 1);
    return Ops::either(Ops::template low_bits<kLow>(Ops::template shift_right<kShift>(low)),
                       Ops::template shift_left<kLow>(Ops::template low_bits<4 - kLow>(high)));
  }
}

// Of trellis codes: the two halves of their windows.
template <typename Ops, int kWidth>
struct TrellisReader {
  static constexpr int kBits = kWidth;
  static constexpr int kFactorBits = kWidth;
  static constexpr bool kByFours = false;
  struct Codes {
    typename Ops::Vec older[4];
    typename Ops::Vec recent[4];
  };

  explicit TrellisReader(const SegmentPlan& segment) noexcept
      : older(segment.trellis->older.data(), false),
        recent(segment.trellis->recent.data(), false) {}

  template <int kQuad>
  TQAI_ALWAYS_INLINE static void load(const std::uint8_t* group, const std::uint8_t* before,
                                      int part, Codes& codes) noexcept {
    constexpr int kEnd = (4 * kQuad + 1) * kBits;  // of the first code
    codes.older[0] = load_nibble<Ops, kEnd - 8>(group, before, part);
    codes.older[1] = load_nibble<Ops, kEnd + kBits - 8>(group, before, part);
    codes.older[2] = load_nibble<Ops, kEnd + 2 * kBits - 8>(group, before, part);
    codes.older[3] = load_nibble<Ops, kEnd + 3 * kBits - 8>(group, before, part);
    codes.recent[0] = load_nibble<Ops, kEnd - 4>(group, before, part);
    codes.recent[1] = load_nibble<Ops, kEnd + kBits - 4>(group, before, part);
    codes.recent[2] = load_nibble<Ops, kEnd + 2 * kBits - 4>(group, before, part);
    codes.recent[3] = load_nibble<Ops, kEnd + 3 * kBits - 4>(group, before, part);
  }
  TQAI_ALWAYS_INLINE auto operand(const Codes& codes, int i) const noexcept {
    return Ops::add_levels(older.value_operand(codes.older[i]),
                           recent.value_operand(codes.recent[i]));
  }
  typename Ops::Acc sum(typename Ops::Acc acc) const noexcept { return acc; }

  typename Ops::template Table<4> older;
  typename Ops::template Table<4> recent;
};

}  // namespace TQAI_LOCAL
}  // namespace tqai::kernels::TQAI_LEVEL_NAMESPACE

#endif  // TQAI_VALUE_READERS_INL
