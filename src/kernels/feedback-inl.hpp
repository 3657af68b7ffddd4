// Products with the rows of a triangular matrix up to where they have come, as closed loops need
// them (tqai/key_basis.hpp).
#ifndef TQAI_FEEDBACK_INL
#define TQAI_FEEDBACK_INL

#include <cstddef>

#include "floats-inl.hpp"

namespace tqai::kernels::TQAI_LEVEL_NAMESPACE {
namespace TQAI_LOCAL {

// Registers at a time, of so many side by side.
constexpr int registers_together(int count) noexcept {
  return count <= 8 ? count : registers_together(count / 2);
}

// The first `count` terms of kRows rows of a product, summed in order. rows: `stride` apart.
template <int kRows, int kWidth>
inline void multiply_leading(const float* rows, int stride, const float (*x)[kWidth], int count,
                             float (*sums)[kWidth]) noexcept {
  constexpr int kVecs = registers_together(kWidth / kVectorLanes);
  static_assert(kWidth % (kVecs * kVectorLanes) == 0);
  for (int first = 0; first < kWidth; first += kVecs * kVectorLanes) {
    FloatVec parts[kRows][kVecs] = {};
    for (int c = 0; c < count; ++c) {
      for (int v = 0; v < kVecs; ++v) {
        const FloatVec part = load_floats(x[c] + first + v * kVectorLanes);
        for (int r = 0; r < kRows; ++r) {
          parts[r][v] = parts[r][v] + rows[static_cast<std::ptrdiff_t>(r) * stride + c] * part;
        }
      }
    }
    for (int r = 0; r < kRows; ++r) {
      for (int v = 0; v < kVecs; ++v) {
        store_floats(sums[r] + first + v * kVectorLanes, parts[r][v]);
      }
    }
  }
}

// The same of `rows` rows, up to kRows.
template <int kRows, int kWidth>
inline void multiply_leading(const float* matrix, int stride, const float (*x)[kWidth], int count,
                             int rows, float (*sums)[kWidth]) noexcept {
  if (rows == kRows) return multiply_leading<kRows>(matrix, stride, x, count, sums);
  for (int r = 0; r < rows; ++r) {
    multiply_leading<1>(matrix + static_cast<std::ptrdiff_t>(r) * stride, stride, x, count,
                        sums + r);
  }
}

}  // namespace TQAI_LOCAL
}  // namespace tqai::kernels::TQAI_LEVEL_NAMESPACE

#endif  // TQAI_FEEDBACK_INL
