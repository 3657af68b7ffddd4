// Rotations of 16 tokens at once, side by side in lanes.
#ifndef TQAI_ROTATE_LANES_INL
#define TQAI_ROTATE_LANES_INL

#include <cmath>
#include <cstring>

#include "floats-inl.hpp"
#include "kernels.hpp"

namespace tqai::kernels::TQAI_LEVEL_NAMESPACE {
namespace TQAI_LOCAL {

// [coordinates, 16 tokens]
using LaneRows = float[kMaxDim][kLanes];

// The transform of kRadix registers, from distance kStep on. A recursion, since compilers leave a
// loop whose steps double a loop, and its registers in memory.
template <int kRadix, int kStep = 1>
inline void fwht_registers(FloatVec (&r)[kRadix]) noexcept {
  if constexpr (kStep < kRadix) {
    for (int i = 0; i < kRadix; i += 2 * kStep) {
      for (int j = i; j < i + kStep; ++j) {
        const FloatVec sum = r[j] + r[j + kStep];
        r[j + kStep] = r[j] - r[j + kStep];
        r[j] = sum;
      }
    }
    fwht_registers<kRadix, 2 * kStep>(r);
  }
}

// Steps of the transform at strides `stride`, 2 · stride … below kRadix · stride.
template <int kRadix>
inline void fwht_pass(LaneRows& x, int dim, int stride) noexcept {
  for (int block = 0; block < dim; block += kRadix * stride) {
    for (int row = block; row < block + stride; ++row) {
      for (int v = 0; v < kLanes; v += kVectorLanes) {
        FloatVec r[kRadix];
        for (int i = 0; i < kRadix; ++i) r[i] = load_floats(x[row + i * stride] + v);
        fwht_registers(r);
        for (int i = 0; i < kRadix; ++i) store_floats(x[row + i * stride] + v, r[i]);
      }
    }
  }
}

// In-place Walsh–Hadamard transform over coordinates: the same additions as Rotation's, as many
// steps at a time as registers allow.
inline void fwht_lanes(LaneRows& x, int dim) noexcept {
  constexpr int kRadix = kVectorLanes == 16 ? 16 : 8;
  int stride = 1;
  for (; kRadix * stride <= dim; stride *= kRadix) fwht_pass<kRadix>(x, dim, stride);
  switch (dim / stride) {
    case 2: return fwht_pass<2>(x, dim, stride);
    case 4: return fwht_pass<4>(x, dim, stride);
    case 8: return fwht_pass<8>(x, dim, stride);
    default: return;
  }
}

inline void scale_lanes(LaneRows& x, int dim, float factor) noexcept {
  for (int c = 0; c < dim; ++c) {
    for (int i = 0; i < kLanes; ++i) x[c][i] = x[c][i] * factor;
  }
}

inline void sign_lanes(LaneRows& x, int dim, const float* signs) noexcept {
  for (int c = 0; c < dim; ++c) {
    for (int i = 0; i < kLanes; ++i) x[c][i] = x[c][i] * signs[c];
  }
}

// kRows rows of y = matrix · x, summed in order of coordinates.
template <int kRows>
inline void multiply_rows(const float* matrix, const LaneRows& x, int dim,
                          float (*y)[kLanes]) noexcept {
  constexpr int kVecs = kLanes / kVectorLanes;
  FloatVec sums[kRows][kVecs] = {};
  for (int c = 0; c < dim; ++c) {
    for (int v = 0; v < kVecs; ++v) {
      const FloatVec part = load_floats(x[c] + v * kVectorLanes);
      for (int r = 0; r < kRows; ++r) {
        sums[r][v] = sums[r][v] + matrix[static_cast<std::ptrdiff_t>(r) * dim + c] * part;
      }
    }
  }
  for (int r = 0; r < kRows; ++r) {
    for (int v = 0; v < kVecs; ++v) store_floats(y[r] + v * kVectorLanes, sums[r][v]);
  }
}

// y = matrix · x: as many rows at once as hide the additions' latency.
inline void multiply_lanes(const float* matrix, const LaneRows& x, int dim, LaneRows& y) noexcept {
  constexpr int kRows = kVectorLanes / 2;
  int r = 0;
  for (; r + kRows <= dim; r += kRows) {
    multiply_rows<kRows>(matrix + static_cast<std::ptrdiff_t>(r) * dim, x, dim, y + r);
  }
  for (; r < dim; ++r) {
    multiply_rows<1>(matrix + static_cast<std::ptrdiff_t>(r) * dim, x, dim, y + r);
  }
}

// x = R · x for Haar; for Hadamard x = √dim · R · (signs · x): the signs are already on x.
inline void rotate_signed_lanes(const SidePlan& side, LaneRows& x, LaneRows& scratch) noexcept {
  if (side.signs != nullptr) {
    fwht_lanes(x, side.dim);
  } else {
    multiply_lanes(side.matrix, x, side.dim, scratch);
    std::memcpy(x, scratch, static_cast<std::size_t>(side.dim) * sizeof x[0]);
  }
}

// x = Rᵀ · x
inline void rotate_back_lanes(const SidePlan& side, LaneRows& x, LaneRows& scratch) noexcept {
  if (side.signs != nullptr) {
    fwht_lanes(x, side.dim);
    scale_lanes(x, side.dim, 1.0F / std::sqrt(static_cast<float>(side.dim)));
    sign_lanes(x, side.dim, side.signs);
  } else {
    multiply_lanes(side.transposed, x, side.dim, scratch);
    std::memcpy(x, scratch, static_cast<std::size_t>(side.dim) * sizeof x[0]);
  }
}

}  // namespace TQAI_LOCAL
}  // namespace tqai::kernels::TQAI_LEVEL_NAMESPACE

#endif  // TQAI_ROTATE_LANES_INL
