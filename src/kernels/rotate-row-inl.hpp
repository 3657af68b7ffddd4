// One row at a time: queries into the rotated domain, with Rotation's results, parts of outputs
// together and back.
#ifndef TQAI_ROTATE_ROW_INL
#define TQAI_ROTATE_ROW_INL

#include <bit>
#include <cmath>
#include <cstring>
#include <utility>

#include "conversions-inl.hpp"
#include "kernels.hpp"

namespace tqai::kernels::TQAI_LEVEL_NAMESPACE {
namespace TQAI_LOCAL {

#include "../rotate-inl.hpp"

// Elsewhere a fused multiply-add may be a call.
#if defined(__GNUC__) && (TQAI_VECTOR_LANES > 4 || defined(TQAI_ARM64))
// vec[i ^ kStride] for each lane i.
template <std::size_t kStride, std::size_t... kLane>
inline FloatVec exchange_lanes(FloatVec vec, std::index_sequence<kLane...>) noexcept {
#if defined(__clang__)
  return __builtin_shufflevector(vec, vec, static_cast<int>(kLane ^ kStride)...);
#else
  using Indices [[gnu::vector_size(sizeof(FloatVec))]] = std::int32_t;
  return __builtin_shuffle(vec, Indices{static_cast<std::int32_t>(kLane ^ kStride)...});
#endif
}

// 1 where lane i comes first of its pair, else −1.
template <std::size_t kStride, std::size_t... kLane>
inline FloatVec pair_signs(std::index_sequence<kLane...>) noexcept {
  return FloatVec{((kLane & kStride) == 0 ? 1.0F : -1.0F)...};
}

// The transform's steps inside a register: (a, b) ← (a + b, a − b) at distances kStride, 2 kStride…
template <std::size_t kStride>
inline FloatVec fwht_register(FloatVec vec) noexcept {
  if constexpr (kStride < static_cast<std::size_t>(kVectorLanes)) {
    constexpr auto kEach = std::make_index_sequence<kVectorLanes>{};
    return fwht_register<2 * kStride>(
        fused(vec, pair_signs<kStride>(kEach), exchange_lanes<kStride>(vec, kEach)));
  } else {
    return vec;
  }
}

// fwht_row, the steps in its order.
inline void fwht(float* x, int dim) noexcept {
  if (dim < kVectorLanes) return fwht_row(x, dim);
  for (int i = 0; i < dim; i += kVectorLanes) {
    store_floats(x + i, fwht_register<1>(load_floats(x + i)));
  }
  for (int stride = kVectorLanes; stride < dim; stride *= 2) {
    for (int block = 0; block < dim; block += 2 * stride) {
      for (int i = block; i < block + stride; i += kVectorLanes) {
        const FloatVec a = load_floats(x + i);
        const FloatVec b = load_floats(x + i + stride);
        store_floats(x + i, a + b);
        store_floats(x + i + stride, a - b);
      }
    }
  }
}
#else
inline void fwht(float* x, int dim) noexcept { fwht_row(x, dim); }
#endif

// kVecs registers of matrix_row's results from `first` on, in its order of sums.
template <int kVecs>
inline void multiply_columns(const float* columns, const float* x, int dim, int first,
                             float* y) noexcept {
  FloatVec sums[kVecs] = {};
  for (int k = 0; k < dim; ++k) {
    const float* column = columns + static_cast<std::ptrdiff_t>(k) * dim + first;
    const auto factor = broadcast_float<FloatVec>(x[k]);
    for (int v = 0; v < kVecs; ++v) {
      sums[v] = sums[v] + load_floats(column + v * kVectorLanes) * factor;
    }
  }
  for (int v = 0; v < kVecs; ++v) store_floats(y + first + v * kVectorLanes, sums[v]);
}

// matrix_row, with as many sums in registers as hide the additions' latency.
inline void multiply_matrix(const float* columns, const float* x, int dim, float* y) noexcept {
  int c = 0;
  for (; c + 8 * kVectorLanes <= dim; c += 8 * kVectorLanes) {
    multiply_columns<8>(columns, x, dim, c, y);
  }
  if (c + 4 * kVectorLanes <= dim) {
    multiply_columns<4>(columns, x, dim, c, y);
    c += 4 * kVectorLanes;
  }
  if (c + 2 * kVectorLanes <= dim) {
    multiply_columns<2>(columns, x, dim, c, y);
    c += 2 * kVectorLanes;
  }
  for (; c + kVectorLanes <= dim; c += kVectorLanes) multiply_columns<1>(columns, x, dim, c, y);
  for (; c < dim; ++c) {
    float sum = 0.0F;
    for (int k = 0; k < dim; ++k) {
      sum = sum + columns[static_cast<std::ptrdiff_t>(k) * dim + c] * x[k];
    }
    y[c] = sum;
  }
}

// Scores of larger queries could overflow.
constexpr float kLargestQuery = 1e30F;

// Kernels::load_scaled. A function of the level, as a rotation that reads wider than what was
// written just before waits for it.
TQAI_INLINE bool load_scaled(const void* from, DType dtype, int count, float factor,
                             float* to) noexcept {
  constexpr std::uint32_t kInfinite = 0x7F800000U;
  constexpr auto kTooLarge = std::bit_cast<std::uint32_t>(kLargestQuery);
  // half_lane makes an infinity 2^16, which no finite half reaches.
  const std::uint32_t infinite =
      dtype == DType::f16 ? std::bit_cast<std::uint32_t>(0x1p16F) : kInfinite;
  widen(from, dtype, count, to);
  std::uint32_t bad = 0;
  for (int i = 0; i < count; ++i) {
    const float scaled = to[i] * factor;
    bad |= (std::bit_cast<std::uint32_t>(to[i]) & 0x7FFFFFFFU) >= infinite ? 1U : 0U;
    bad |= (std::bit_cast<std::uint32_t>(scaled) & 0x7FFFFFFFU) > kTooLarge ? 1U : 0U;
    to[i] = scaled;
  }
  return bad == 0;
}

// As only here compilers need not check for overlap.
inline void add_apart(const float* __restrict from, float factor, int count,
                      float* __restrict to) noexcept {
  for (int i = 0; i < count; ++i) to[i] = to[i] + factor * from[i];
}

// Kernels::add_scaled.
TQAI_INLINE void add_scaled(const float* from, float factor, int count, float* to) noexcept {
  add_apart(from, factor, count, to);
}

// Kernels::rotate.
TQAI_INLINE void rotate(const SidePlan& side, const float* x, float* y) noexcept {
  if (side.signs == nullptr) return multiply_matrix(side.transposed, x, side.dim, y);
  multiply_row(x, side.signs, side.dim, y);
  fwht(y, side.dim);
  scale_row(y, side.dim, 1.0F / std::sqrt(static_cast<float>(side.dim)));
}

// Kernels::rotate_back.
TQAI_INLINE void rotate_back(const SidePlan& side, const float* y, float* x) noexcept {
  if (side.signs == nullptr) return multiply_matrix(side.matrix, y, side.dim, x);
  std::memcpy(x, y, static_cast<std::size_t>(side.dim) * sizeof(float));
  fwht(x, side.dim);
  scale_signed_row(x, side.dim, 1.0F / std::sqrt(static_cast<float>(side.dim)), side.signs);
}

}  // namespace TQAI_LOCAL
}  // namespace tqai::kernels::TQAI_LEVEL_NAMESPACE

#endif  // TQAI_ROTATE_ROW_INL
