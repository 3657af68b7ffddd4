#include <cmath>
#include <tqai/trellis.hpp>

#include "ranges.hpp"
#include "threads.hpp"

namespace tqai {
namespace TQAI_LOCAL {

// What scripts/trellis_tables prints. The second half of a table is minus the first, backwards.
constexpr Trellis kTrellises[kMaxTrellisBits] = {
    {1,
     0.030295,
     {-19, 26, -18, 16, 15, -21, 35, -15, 15, -35, 21, -15, -16, 18, -26, 19},
     {-23, -10, 25, 19, 17, 22, -12, -28, 28, 12, -22, -17, -19, -25, 10, 23}},
    {2,
     0.040888,
     {29, -8, -18, 8, -3, -18, 9, 32, -32, -9, 18, 3, -8, 18, 8, -29},
     {-4, -31, -4, -14, -28, 26, 11, 8, -8, -11, -26, 28, 14, 4, 31, 4}},
    {3,
     0.045301,
     {5, -13, -19, 4, 15, -3, 17, -6, 6, -17, 3, -15, -4, 19, 13, -5},
     {33, 6, -26, 15, -44, -1, 20, -10, 10, -20, 1, 44, -15, 26, -6, -33}},
    {4,
     0.052060,
     {-29, 9, 13, 6, -1, 3, -12, -18, 18, 12, -3, 1, -6, -13, -9, 29},
     {2, -22, -17, 13, -27, -9, -34, -5, 5, 34, 9, 27, -13, 17, 22, -2}}};

// The second half of a table is minus the first, backwards.
constexpr KeyTrellis kKeyTrellises[] = {
    {2, 0.041915, 0, {37,  16, -4,  -29, 15,  -20, -7, -45, 16,  -1,  -34, 50,  -8,
                      -24, 4,  27,  -3,  -14, -30, 26, -8,  16,  44,  5,   -35, -17,
                      1,   22, 8,   63,  33,  -13, 13, -33, -63, -8,  -22, -1,  17,
                      35,  -5, -44, -16, 8,   -26, 30, 14,  3,   -27, -4,  24,  8,
                      -50, 34, 1,   -16, 45,  7,   20, -15, 29,  4,   -16, -37}},
    {3, 0.046684, 4, {14,  -7,  2,   -46, -29, -17, 29, -36, 5,  63,  -28, -21, -52,
                      -41, -10, 22,  -12, -17, -7,  1,  9,   16, -2,  -24, -35, 21,
                      29,  10,  -19, -9,  -39, 3,   -3, 39,  9,  19,  -10, -29, -21,
                      35,  24,  2,   -16, -9,  -1,  7,  17,  12, -22, 10,  41,  52,
                      21,  28,  -63, -5,  36,  -29, 17, 29,  46, -2,  7,   -14}},
    {4, 0.050893, 1, {-37, -52, -45, -63, -8, -16, -12, -21, 8,  0,  4,  -4, 27, 17, 21, 13,
                      -24, -35, -30, -41, -4, -12, -7,  -16, 12, 3,  8,  0,  33, 23, 28, 18,
                      -18, -28, -23, -33, 0,  -8,  -3,  -12, 16, 7,  12, 4,  41, 30, 35, 24,
                      -13, -21, -17, -27, 4,  -4,  0,   -8,  21, 12, 16, 8,  63, 45, 52, 37}}};

}  // namespace TQAI_LOCAL

TQAI_INLINE float Trellis::step(int head_dim) const noexcept {
  const UsualArithmetic usual;
  return static_cast<float>(unit / std::sqrt(static_cast<double>(head_dim)));
}

TQAI_INLINE const Trellis& trellis(int bits) {
  check_range("bits of trellis codes", bits, 1, kMaxTrellisBits);
  return kTrellises[bits - 1];
}

TQAI_INLINE float KeyTrellis::step(int head_dim) const noexcept {
  const UsualArithmetic usual;
  return static_cast<float>(unit / std::sqrt(static_cast<double>(head_dim)));
}

TQAI_INLINE const KeyTrellis& key_trellis(int bits) {
  check_range("bits of keys' trellis codes", bits, kMinKeyTrellisBits, kMaxTrellisBits);
  return kKeyTrellises[bits - kMinKeyTrellisBits];
}

}  // namespace tqai
