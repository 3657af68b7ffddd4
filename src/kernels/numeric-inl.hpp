// Arithmetic on lanes, in plain loops that compilers vectorise for the target region they are
// included in. Nothing here is reassociated, or fused unless it says so (-ffp-contract=off), so
// every level gives the same bits.
#pragma once

#include <bit>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <tqai/half.hpp>

#include "kernels.hpp"

namespace tqai::kernels {
namespace {

constexpr float kLog2E = 1.44269504F;
constexpr float kInfinity = std::numeric_limits<float>::infinity();

// As many floats as a register of the target region holds, for loops whose sums must stay in
// registers; everything else is left to the vectoriser. Lane by lane the same at any width.
// TQAI_VECTOR_LANES, and TQAI_NEON for its instructions, are set by the level's file.
#if defined(__GNUC__)
template <int kCount>
using Floats [[gnu::vector_size(4 * kCount)]] = float;

template <typename Vec>
inline Vec larger(Vec a, Vec b) noexcept {
  return a > b ? a : b;
}

template <typename Vec>
inline Vec broadcast_float(float value) noexcept {
  return value - Vec{};  // as an instruction of its own; a loop over lanes goes through memory
}

template <int kBytes>
using Words64 [[gnu::vector_size(kBytes)]] = std::uint64_t;

// Two floats, over and over.
template <typename Vec>
inline Vec broadcast_pair(const float* pair) noexcept {
  std::uint64_t bits;
  std::memcpy(&bits, pair, sizeof bits);
  return Vec(bits + Words64<static_cast<int>(sizeof(Vec))>{});
}
#else
template <int kCount>
struct Floats {
  float lanes[kCount];
  friend Floats operator+(Floats a, Floats b) noexcept {
    for (int i = 0; i < kCount; ++i) a.lanes[i] = a.lanes[i] + b.lanes[i];
    return a;
  }
  friend Floats operator-(Floats a, Floats b) noexcept {
    for (int i = 0; i < kCount; ++i) a.lanes[i] = a.lanes[i] - b.lanes[i];
    return a;
  }
  friend Floats operator*(Floats a, Floats b) noexcept {
    for (int i = 0; i < kCount; ++i) a.lanes[i] = a.lanes[i] * b.lanes[i];
    return a;
  }
  friend Floats operator*(float a, Floats b) noexcept {
    for (int i = 0; i < kCount; ++i) b.lanes[i] = a * b.lanes[i];
    return b;
  }
};

template <typename Vec>
inline Vec broadcast_float(float value) noexcept {
  Vec vec;
  for (float& lane : vec.lanes) lane = value;
  return vec;
}

template <typename Vec>
inline Vec broadcast_pair(const float* pair) noexcept {
  Vec vec;
  for (std::size_t i = 0; i < sizeof(Vec) / sizeof(float); ++i) vec.lanes[i] = pair[i % 2];
  return vec;
}

template <int kCount>
inline Floats<kCount> larger(Floats<kCount> a, Floats<kCount> b) noexcept {
  for (int i = 0; i < kCount; ++i) a.lanes[i] = a.lanes[i] > b.lanes[i] ? a.lanes[i] : b.lanes[i];
  return a;
}
#endif
constexpr int kVectorLanes = TQAI_VECTOR_LANES;

using FloatVec = Floats<kVectorLanes>;
constexpr int kLaneParts = kLanes / kVectorLanes;  // registers that hold kLanes floats

template <typename Vec = FloatVec>
inline Vec load_floats(const float* from) noexcept {
  Vec vec;
  std::memcpy(&vec, from, sizeof vec);
  return vec;
}

template <typename Vec>
inline void store_floats(float* to, Vec vec) noexcept {
  std::memcpy(to, &vec, sizeof vec);
}

// a · b + c, rounded once: an instruction where the target has one, else the C library's function,
// with the same bits.
inline float fused(float a, float b, float c) noexcept {
#if defined(__GNUC__)
  return __builtin_fmaf(a, b, c);
#else
  return std::fma(a, b, c);
#endif
}

// The same of vectors, lane by lane.
inline FloatVec fused(FloatVec a, FloatVec b, FloatVec c) noexcept {
#if defined(TQAI_X86) && TQAI_VECTOR_LANES == 16 && defined(__GNUC__)
  return FloatVec(_mm512_fmadd_ps(__m512(a), __m512(b), __m512(c)));
#elif defined(TQAI_X86) && TQAI_VECTOR_LANES == 16
  _mm512_storeu_ps(c.lanes, _mm512_fmadd_ps(_mm512_loadu_ps(a.lanes), _mm512_loadu_ps(b.lanes),
                                            _mm512_loadu_ps(c.lanes)));
  return c;
#elif defined(TQAI_X86) && TQAI_VECTOR_LANES == 8 && defined(__GNUC__)
  return FloatVec(_mm256_fmadd_ps(__m256(a), __m256(b), __m256(c)));
#elif defined(TQAI_X86) && TQAI_VECTOR_LANES == 8
  _mm256_storeu_ps(c.lanes, _mm256_fmadd_ps(_mm256_loadu_ps(a.lanes), _mm256_loadu_ps(b.lanes),
                                            _mm256_loadu_ps(c.lanes)));
  return c;
#elif defined(TQAI_NEON) && defined(__GNUC__)
  return FloatVec(vfmaq_f32(float32x4_t(c), float32x4_t(a), float32x4_t(b)));
#else
  float x[kVectorLanes];
  float y[kVectorLanes];
  float z[kVectorLanes];
  store_floats(x, a);
  store_floats(y, b);
  store_floats(z, c);
  for (int i = 0; i < kVectorLanes; ++i) x[i] = fused(x[i], y[i], z[i]);
  return load_floats(x);
#endif
}

// 2^x for x ≤ 0; 0 below −126.5. Relative error < 2e-7 (minimax polynomial on [−0.5, 0.5]). At −127
// the exponent's bits are 0, and so is the result: no branch, which would stop vectorisation.
inline float exp2_negative(float x) noexcept {
  // Next to 1.5 · 2^23 a float's steps are 1, so that the sum's last bits are the nearest integer,
  // here with the exponent's bias.
  constexpr float kShift = 0x1.8p23F + 127.0F;
  const float clamped = x < -127.0F ? -127.0F : x;
  const float shifted = clamped + kShift;
  const float f = clamped - (shifted - kShift);
  float p = 1.32764718e-3F;
  p = fused(p, f, 9.67554133e-3F);
  p = fused(p, f, 5.55071327e-2F);
  p = fused(p, f, 2.40221197e-1F);
  p = fused(p, f, 6.93146967e-1F);
  p = fused(p, f, 1.0F);
  return p * std::bit_cast<float>(std::bit_cast<std::uint32_t>(shifted) << 23);
}

// To the nearest integer, halves away from zero; |x| < 2^23.
inline std::int32_t round_lane(float x) noexcept {
  return static_cast<std::int32_t>(x + (x < 0.0F ? -0.5F : 0.5F));
}

// tanh by way of exp2; absolute error < 3e-7.
inline float tanh_lane(float x) noexcept {
  const std::uint32_t bits = std::bit_cast<std::uint32_t>(x);
  const float magnitude = std::bit_cast<float>(bits & 0x7FFFFFFFU);
  const float e = exp2_negative(magnitude * (-2.0F * kLog2E));
  const float t = (1.0F - e) / (1.0F + e);
  return std::bit_cast<float>(std::bit_cast<std::uint32_t>(t) | (bits & 0x80000000U));
}

// FP16 to fp32 without branches; finite values only.
inline float half_lane(std::uint16_t half) noexcept {
  const std::uint32_t magnitude = static_cast<std::uint32_t>(half & 0x7FFFU) << 13;
  const float value = std::bit_cast<float>(magnitude) * 0x1p112F;
  const std::uint32_t sign = static_cast<std::uint32_t>(half & 0x8000U) << 16;
  return std::bit_cast<float>(std::bit_cast<std::uint32_t>(value) | sign);
}

// A tile's norms: 64 FP16 numbers.
inline void read_halves(const std::uint8_t* from, float* __restrict to) noexcept {
  std::uint16_t halves[kTileTokens];
  std::memcpy(halves, from, sizeof halves);
  for (int t = 0; t < kTileTokens; ++t) to[t] = half_lane(halves[t]);
}

// Sum of 16 lanes as a tree.
inline float sum_lanes(const float* lanes) noexcept {
  float half[8];
  for (int i = 0; i < 8; ++i) half[i] = lanes[i] + lanes[i + 8];
  for (int i = 0; i < 4; ++i) half[i] += half[i + 4];
  return (half[0] + half[2]) + (half[1] + half[3]);
}

// The largest lane. Halves as vectors: of a loop over lanes compilers make one step a lane.
template <int kCount>
inline float largest_lane(Floats<kCount> vec) noexcept {
  float lanes[kCount];
  store_floats(lanes, vec);
  if constexpr (kCount == 4) {
    const float a = lanes[0] > lanes[1] ? lanes[0] : lanes[1];
    const float b = lanes[2] > lanes[3] ? lanes[2] : lanes[3];
    return a > b ? a : b;
  } else {
    using Half = Floats<kCount / 2>;
    return largest_lane<kCount / 2>(
        larger(load_floats<Half>(lanes), load_floats<Half>(lanes + kCount / 2)));
  }
}

// The largest magnitude of `count` numbers, a multiple of 16.
inline float largest_magnitude(const float* numbers, int count) noexcept {
  FloatVec vec{};
  for (int i = 0; i < count; i += kVectorLanes) {
    const FloatVec next = load_floats(numbers + i);
    vec = larger(vec, larger(next, -1.0F * next));
  }
  return largest_lane<kVectorLanes>(vec);
}

// The largest of the floats of a tile's row, which are numbers.
inline float largest_of(const float* row) noexcept {
  FloatVec vec = load_floats(row);
  for (int t = kVectorLanes; t < kTileTokens; t += kVectorLanes) {
    vec = larger(vec, load_floats(row + t));
  }
  return largest_lane<kVectorLanes>(vec);
}

// sums[i] += the row's floats i, i + 16, i + 32 and i + 48, these in order.
inline void add_to_lanes(const float* row, float* sums) noexcept {
  for (int i = 0; i < kLanes; i += kVectorLanes) {
    FloatVec sum = load_floats(row + i);
    for (int t = kLanes; t < kTileTokens; t += kLanes) sum = sum + load_floats(row + t + i);
    store_floats(sums + i, load_floats(sums + i) + sum);
  }
}

// from: [count] of dtype; to: fp32.
inline void widen(const void* from, DType dtype, int count, float* __restrict to) noexcept {
  if (dtype == DType::f32) {
    const auto* source = static_cast<const float*>(from);
    for (int i = 0; i < count; ++i) to[i] = source[i];
  } else if (dtype == DType::f16) {
    const auto* source = static_cast<const std::uint16_t*>(from);
    for (int i = 0; i < count; ++i) to[i] = half_lane(source[i]);
  } else {
    const auto* source = static_cast<const std::uint16_t*>(from);
    for (int i = 0; i < count; ++i) to[i] = from_bfloat16(source[i]);
  }
}

}  // namespace
}  // namespace tqai::kernels
