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

// Where compilers would make a call of what has its arguments in registers, which then go through
// memory; and where inlining what is rare makes them leave what is not a call.
#if defined(__GNUC__)
#define TQAI_HOT [[gnu::always_inline]] inline
#define TQAI_COLD [[gnu::noinline]] inline
#else
#define TQAI_HOT inline
#define TQAI_COLD inline
#endif

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

// Each lane's lowest bits as a float's exponent.
template <typename Vec>
inline Vec to_exponent(Vec vec) noexcept {
  using Words [[gnu::vector_size(sizeof(Vec))]] = std::uint32_t;
  return Vec(Words(vec) << 23);
}

// vec · 2^n, n being the lowest bits of each lane of `shifted`; the result is no denormal.
template <typename Vec>
inline Vec raise_exponent(Vec vec, Vec shifted) noexcept {
  using Words [[gnu::vector_size(sizeof(Vec))]] = std::uint32_t;
  return Vec(Words(vec) + (Words(shifted) << 23));
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
inline Vec to_exponent(Vec vec) noexcept {
  for (float& lane : vec.lanes) {
    lane = std::bit_cast<float>(std::bit_cast<std::uint32_t>(lane) << 23);
  }
  return vec;
}

template <typename Vec>
inline Vec raise_exponent(Vec vec, Vec shifted) noexcept {
  constexpr std::size_t kCount = sizeof(Vec) / sizeof(float);
  for (std::size_t i = 0; i < kCount; ++i) {
    vec.lanes[i] = std::bit_cast<float>(std::bit_cast<std::uint32_t>(vec.lanes[i]) +
                                        (std::bit_cast<std::uint32_t>(shifted.lanes[i]) << 23));
  }
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

// A FloatVec as intrinsics take it. No std::bit_cast: compiled without the target region.
#if defined(TQAI_X86) && TQAI_VECTOR_LANES == 16
using NativeFloats = __m512;
#elif defined(TQAI_X86) && TQAI_VECTOR_LANES == 8
using NativeFloats = __m256;
#endif
#if defined(TQAI_X86) && TQAI_VECTOR_LANES >= 8
inline NativeFloats native(FloatVec vec) noexcept {
  NativeFloats result;
  std::memcpy(&result, &vec, sizeof result);
  return result;
}
inline FloatVec from_native(NativeFloats vec) noexcept {
  return load_floats(reinterpret_cast<const float*>(&vec));
}
#endif

// larger(a, b), b where a is no number: where b is constant compilers make a comparison and a blend
// of it at 512 bits.
inline FloatVec larger_of(FloatVec a, FloatVec b) noexcept {
#if defined(TQAI_X86) && TQAI_VECTOR_LANES == 16
  return from_native(_mm512_max_ps(native(a), native(b)));
#else
  return larger(a, b);
#endif
}

// The same of vectors, lane by lane.
inline FloatVec fused(FloatVec a, FloatVec b, FloatVec c) noexcept {
#if defined(TQAI_X86) && TQAI_VECTOR_LANES == 16
  return from_native(_mm512_fmadd_ps(native(a), native(b), native(c)));
#elif defined(TQAI_X86) && TQAI_VECTOR_LANES == 8
  return from_native(_mm256_fmadd_ps(native(a), native(b), native(c)));
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

// Next to 1.5 · 2^23 a float's steps are 1, so that a sum's last bits are the nearest integer, here
// with the exponent's bias.
constexpr float kExp2Shift = 0x1.8p23F + 127.0F;

// 2^x for x ≤ 0, a number; 0 up to −126.5. Relative error < 2e-7 (minimax polynomial on [−0.5,
// 0.5]). At −127 the exponent's bits are 0, and so is the result: no branch, which would stop
// vectorisation.
inline float exp2_negative(float x) noexcept {
  const float clamped = x < -127.0F ? -127.0F : x;
  const float shifted = clamped + kExp2Shift;
  const float f = clamped - (shifted - kExp2Shift);
  float p = 1.32764718e-3F;
  p = fused(p, f, 9.67554133e-3F);
  p = fused(p, f, 5.55071327e-2F);
  p = fused(p, f, 2.40221197e-1F);
  p = fused(p, f, 6.93146967e-1F);
  p = fused(p, f, 1.0F);
  return p * std::bit_cast<float>(std::bit_cast<std::uint32_t>(shifted) << 23);
}

// The same of vectors, lane by lane.
inline FloatVec exp2_negative(FloatVec vec) noexcept {
  const auto shift = broadcast_float<FloatVec>(kExp2Shift);
#if defined(TQAI_X86) && TQAI_VECTOR_LANES == 16
  const FloatVec x = vec;  // what is not clamped is masked below
#else
  const FloatVec x = larger(vec, broadcast_float<FloatVec>(-127.0F));
#endif
  const FloatVec shifted = x + shift;
  const FloatVec n = shifted - shift;
  const FloatVec f = x - n;
  auto p = broadcast_float<FloatVec>(1.32764718e-3F);
  p = fused(p, f, broadcast_float<FloatVec>(9.67554133e-3F));
  p = fused(p, f, broadcast_float<FloatVec>(5.55071327e-2F));
  p = fused(p, f, broadcast_float<FloatVec>(2.40221197e-1F));
  p = fused(p, f, broadcast_float<FloatVec>(6.93146967e-1F));
  p = fused(p, f, broadcast_float<FloatVec>(1.0F));
#if defined(TQAI_X86) && TQAI_VECTOR_LANES == 16
  // Scaled by an instruction, exactly; −126.5 is rounded to −127, whose power is 0.
  const __mmask16 matters = _mm512_cmp_ps_mask(native(x), _mm512_set1_ps(-126.5F), _CMP_GT_OQ);
  return from_native(_mm512_maskz_scalef_ps(matters, native(p), native(n)));
#else
  return p * to_exponent(shifted);
#endif
}

// What 2^x is in exp2_rough where x is less, −inf, or no number: no denormal either when multiplied
// by the smallest FP16 norm, as processors take their time over those.
constexpr float kLeastPower = 0x1p-100F;

// 2^x for x ≤ 0, of vectors, to a relative error below 8e-5 (minimax polynomial on [−0.5, 0.5]):
// for weights that are then rounded to 8 bits, which costs up to 25 times as much.
inline FloatVec exp2_rough(FloatVec vec) noexcept {
  const auto shift = broadcast_float<FloatVec>(0x1.8p23F);
  const FloatVec x = larger_of(vec, broadcast_float<FloatVec>(-100.0F));
  const FloatVec shifted = x + shift;
  const FloatVec f = x - (shifted - shift);
  auto p = broadcast_float<FloatVec>(5.51716691e-2F);
  p = fused(p, f, broadcast_float<FloatVec>(2.42611122e-1F));
  p = fused(p, f, broadcast_float<FloatVec>(6.93260985e-1F));
  p = fused(p, f, broadcast_float<FloatVec>(9.99928074e-1F));
  return raise_exponent(p, shifted);
}

// To the nearest integer, halves away from zero; |x| < 2^23. Bits, as compilers make a branch of a
// comparison, which queries' signs would mispredict.
inline std::int32_t round_lane(float x) noexcept {
  const std::uint32_t sign = std::bit_cast<std::uint32_t>(x) & 0x80000000U;
  return static_cast<std::int32_t>(x +
                                   std::bit_cast<float>(sign | std::bit_cast<std::uint32_t>(0.5F)));
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

// The largest lane of a register; at 512 bits not by way of memory.
inline float largest_of(FloatVec vec) noexcept {
#if defined(TQAI_X86) && TQAI_VECTOR_LANES == 16
  const __m512 all = native(vec);
  const __m256 half = _mm256_max_ps(_mm512_castps512_ps256(all), _mm512_extractf32x8_ps(all, 1));
  const __m128 quarter = _mm_max_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1));
  const __m128 pair = _mm_max_ps(quarter, _mm_movehl_ps(quarter, quarter));
  return _mm_cvtss_f32(_mm_max_ss(pair, _mm_movehdup_ps(pair)));
#else
  return largest_lane<kVectorLanes>(vec);
#endif
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

// Integers as floats.
inline FloatVec load_converted(const std::int32_t* from) noexcept {
#if defined(__clang__) || !defined(__GNUC__)
  float lanes[kVectorLanes];
  for (int i = 0; i < kVectorLanes; ++i) lanes[i] = static_cast<float>(from[i]);
  return load_floats(lanes);
#else
  using Words [[gnu::vector_size(sizeof(FloatVec))]] = std::int32_t;
  Words words;
  std::memcpy(&words, from, sizeof words);
  return __builtin_convertvector(words, FloatVec);
#endif
}

// A tile's row in registers.
constexpr int kRowVecs = kTileTokens / kVectorLanes;
using RowVecs = FloatVec[kRowVecs];

inline void fill_row(float value, RowVecs& row) noexcept {
  for (FloatVec& vec : row) vec = broadcast_float<FloatVec>(value);
}
inline void load_row(const float* from, RowVecs& row) noexcept {
  for (int v = 0; v < kRowVecs; ++v) row[v] = load_floats(from + v * kVectorLanes);
}
inline void store_row(float* to, const RowVecs& row) noexcept {
  for (int v = 0; v < kRowVecs; ++v) store_floats(to + v * kVectorLanes, row[v]);
}

// The largest of a row, of numbers: lane i of the floats i, i + kVectorLanes…
inline FloatVec largest_parts(const RowVecs& row) noexcept {
  FloatVec vec = row[0];
  for (int v = 1; v < kRowVecs; ++v) vec = larger(vec, row[v]);
  return vec;
}

// Whether any lane is larger.
inline bool any_above(FloatVec vec, float bound) noexcept {
#if defined(TQAI_X86) && TQAI_VECTOR_LANES == 16
  return _mm512_cmp_ps_mask(native(vec), _mm512_set1_ps(bound), _CMP_GT_OQ) != 0;
#elif defined(TQAI_X86) && TQAI_VECTOR_LANES == 8
  return _mm256_movemask_ps(_mm256_cmp_ps(native(vec), _mm256_set1_ps(bound), _CMP_GT_OQ)) != 0;
#else
  return largest_lane<kVectorLanes>(vec) > bound;
#endif
}

// sums[i] += the row's floats i, i + 16, i + 32 and i + 48, these in order. Returns the largest of
// what was added, lane by lane of a register.
inline FloatVec add_to_lanes(const RowVecs& row, float* sums) noexcept {
  constexpr int kStep = kLanes / kVectorLanes;
  FloatVec largest;
  for (int i = 0; i < kStep; ++i) {
    FloatVec sum = row[i];
    for (int v = i + kStep; v < kRowVecs; v += kStep) sum = sum + row[v];
    largest = i == 0 ? sum : larger(largest, sum);
    float* to = sums + i * kVectorLanes;
    store_floats(to, load_floats(to) + sum);
  }
  return largest;
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
