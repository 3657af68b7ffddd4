// Readers of keys, for integer-inl.hpp's loops: what makes operands of the codes (load_quad) of
// kCount subtiles, lines of 16 tokens, quad after quad of coordinates.
//   begin<kFirst>(last, part)   before a tile's first quad; last: its last group
//   operand(s, code)            of a code of subtile kFirst + s
#ifndef TQAI_KEY_READERS_INL
#define TQAI_KEY_READERS_INL

#include "codes-inl.hpp"

namespace tqai::kernels::TQAI_LEVEL_NAMESPACE {
namespace TQAI_LOCAL {

// Of scalar codes.
template <typename Ops, int kWidth, int /*kCount*/>
struct ScalarKeyReader {
  static constexpr int kBits = kWidth;
  static constexpr int kFactorBits = kWidth;

  explicit ScalarKeyReader(const SegmentPlan& segment) noexcept : table(segment.levels, true) {}

  template <int kFirst>
  static void begin(const std::uint8_t* /*last*/, int /*part*/) noexcept {}
  TQAI_ALWAYS_INLINE auto operand(int /*s*/, typename Ops::Vec code) const noexcept {
    return table.key_operand(code);
  }

  typename Ops::template Table<kBits> table;
};

// Of trellis codes: windows that go on from quad to quad.
template <typename Ops, int kWidth, int kCount>
struct KeyPathReader {
  static constexpr int kBits = kWidth;
  static constexpr int kFactorBits = kWidth;
  static constexpr int kBefore = KeyTrellis::kWindowBits - kBits;
  static_assert(kBefore <= 2 * kBits);

  explicit KeyPathReader(const SegmentPlan& segment) noexcept
      : table(segment.key_trellis->levels.data()),
        before_first(static_cast<std::uint8_t>(segment.key_trellis->before_first())) {}

  // Each byte's path goes on where that of the byte before it ended: with the last group's codes.
  template <int kFirst>
  void begin(const std::uint8_t* last, int part) noexcept {
    typename Ops::Vec codes[2][4];
    load_quad<Ops, kBits, 0>(last, part, codes[0]);
    load_quad<Ops, kBits, 1>(last, part, codes[1]);
    for (int s = 0; s < kCount; ++s) {
      const typename Ops::Vec window = Ops::template shift_left<kBefore>(codes[0][kFirst + s]);
      windows[s] = Ops::next_bytes(next(window, codes[1][kFirst + s]), before_first);
    }
  }
  static typename Ops::Vec next(typename Ops::Vec window, typename Ops::Vec code) noexcept {
    return Ops::template merge<kBefore>(Ops::template shift_right<kBits>(window),
                                        Ops::template shift_left<kBefore>(code));
  }
  TQAI_ALWAYS_INLINE auto operand(int s, typename Ops::Vec code) noexcept {
    windows[s] = next(windows[s], code);
    return table.key_operand(windows[s]);
  }

  typename Ops::WindowTable table;
  std::uint8_t before_first;
  typename Ops::Vec windows[kCount];
};

}  // namespace TQAI_LOCAL
}  // namespace tqai::kernels::TQAI_LEVEL_NAMESPACE

#endif  // TQAI_KEY_READERS_INL
