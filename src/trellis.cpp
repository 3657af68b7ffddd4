#include <cmath>
#include <tqai/trellis.hpp>

#include "ranges.hpp"

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

}  // namespace TQAI_LOCAL

TQAI_INLINE float Trellis::step(int head_dim) const noexcept {
  return static_cast<float>(unit / std::sqrt(static_cast<double>(head_dim)));
}

TQAI_INLINE const Trellis& trellis(int bits) {
  check_range("bits of trellis codes", bits, 1, kMaxTrellisBits);
  return kTrellises[bits - 1];
}

}  // namespace tqai
