// Elementary functions, of one float or of a register of them, with the same bits at every level.
#ifndef TQAI_FUNCTIONS_INL
#define TQAI_FUNCTIONS_INL

#include <bit>
#include <cstdint>
#include <limits>

#include "floats-inl.hpp"

namespace tqai::kernels::TQAI_LEVEL_NAMESPACE {
namespace TQAI_LOCAL {

constexpr float kLog2E = 1.44269504F;
constexpr float kInfinity = std::numeric_limits<float>::infinity();

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

// The same of vectors, lane by lane, all of them step by step: of one after the other processors
// see too few to fill the time that each step takes.
template <int kCount>
inline void exp2_negative(FloatVec (&vecs)[kCount]) noexcept {
  constexpr float kFactors[] = {9.67554133e-3F, 5.55071327e-2F, 2.40221197e-1F, 6.93146967e-1F,
                                1.0F};
  const auto shift = broadcast_float<FloatVec>(kExp2Shift);
#if !defined(TQAI_X86) || TQAI_VECTOR_LANES != 16  // else what is not clamped is masked below
  for (FloatVec& x : vecs) x = larger(x, broadcast_float<FloatVec>(-127.0F));
#endif
  FloatVec shifted[kCount];
  FloatVec f[kCount];
  FloatVec p[kCount];
  for (int i = 0; i < kCount; ++i) shifted[i] = in_register(vecs[i] + shift);
  for (int i = 0; i < kCount; ++i) f[i] = in_register(shifted[i] - shift);
  for (int i = 0; i < kCount; ++i) f[i] = in_register(vecs[i] - f[i]);
  for (FloatVec& power : p) power = broadcast_float<FloatVec>(1.32764718e-3F);
  for (const float factor : kFactors) {
    for (int i = 0; i < kCount; ++i) {
      p[i] = in_register(fused(p[i], f[i], broadcast_float<FloatVec>(factor)));
    }
  }
  for (int i = 0; i < kCount; ++i) {
#if defined(TQAI_X86) && TQAI_VECTOR_LANES == 16
    // Scaled by an instruction, exactly; −126.5 is rounded to −127, whose power is 0.
    const __mmask16 matters =
        _mm512_cmp_ps_mask(native(vecs[i]), _mm512_set1_ps(-126.5F), _CMP_GT_OQ);
    vecs[i] =
        from_native(_mm512_maskz_scalef_ps(matters, native(p[i]), native(shifted[i] - shift)));
#else
    vecs[i] = p[i] * to_exponent(shifted[i]);
#endif
  }
}

// What 2^x is in exp2_rough where x is less, −inf, or no number: no denormal either when multiplied
// by the smallest FP16 norm, as processors take their time over those.
constexpr float kLeastPower = 0x1p-100F;

// 2^x for x ≤ 0, of vectors, to a relative error below 8e-5 (minimax polynomial on [−0.5, 0.5]):
// for weights that are then rounded to 8 bits, which costs up to 25 times as much.
template <int kCount>
inline void exp2_rough(FloatVec (&vecs)[kCount]) noexcept {
  constexpr float kFactors[] = {2.42611122e-1F, 6.93260985e-1F, 9.99928074e-1F};
  const auto shift = broadcast_float<FloatVec>(0x1.8p23F);
  FloatVec shifted[kCount];
  FloatVec f[kCount];
  for (FloatVec& x : vecs) x = in_register(larger_of(x, broadcast_float<FloatVec>(-100.0F)));
  for (int i = 0; i < kCount; ++i) shifted[i] = in_register(vecs[i] + shift);
  for (int i = 0; i < kCount; ++i) f[i] = in_register(shifted[i] - shift);
  for (int i = 0; i < kCount; ++i) f[i] = in_register(vecs[i] - f[i]);
  for (FloatVec& p : vecs) p = broadcast_float<FloatVec>(5.51716691e-2F);
  for (const float factor : kFactors) {
    for (int i = 0; i < kCount; ++i) {
      vecs[i] = in_register(fused(vecs[i], f[i], broadcast_float<FloatVec>(factor)));
    }
  }
  for (int i = 0; i < kCount; ++i) vecs[i] = raise_exponent(vecs[i], shifted[i]);
}

// A row's largest query that is too small to matter; the inverse of what is larger is finite.
constexpr float kNegligible = 1e-30F;

// To the nearest integer, halves away from zero; |x| < 2^23. Bits, as compilers make a branch of a
// comparison, which queries' signs would mispredict.
inline std::int32_t round_lane(float x) noexcept {
  const std::uint32_t sign = std::bit_cast<std::uint32_t>(x) & 0x80000000U;
  return static_cast<std::int32_t>(x +
                                   std::bit_cast<float>(sign | std::bit_cast<std::uint32_t>(0.5F)));
}

// tanh by way of exp2, whose absolute error of 3e-7 is much for a small number, and by its series
// there (to x⁹; the next term is 1e-8 of the first at most); relative error < 1.5e-6.
inline float tanh_lane(float x) noexcept {
  const std::uint32_t bits = std::bit_cast<std::uint32_t>(x);
  const float magnitude = std::bit_cast<float>(bits & 0x7FFFFFFFU);
  const float e = exp2_negative(magnitude * (-2.0F * kLog2E));
  const float far = (1.0F - e) / (1.0F + e);
  const float square = magnitude < 0.25F ? magnitude * magnitude : 0.0F;
  float p = 62.0F / 2835.0F;
  p = fused(p, square, -17.0F / 315.0F);
  p = fused(p, square, 2.0F / 15.0F);
  p = fused(p, square, -1.0F / 3.0F);
  const float near = fused(p * square, magnitude, magnitude);
  const float t = magnitude < 0.25F ? near : far;
  return std::bit_cast<float>(std::bit_cast<std::uint32_t>(t) | (bits & 0x80000000U));
}

// Numbers that are added to scores, in base 2: infinities stay, and no other number becomes one.
inline float in_base_two(float x) noexcept {
  constexpr float kMost = std::numeric_limits<float>::max();
  const float product = x * kLog2E;
  const float bounded = product < -kMost ? -kMost : product > kMost ? kMost : product;
  return x < -kMost || x > kMost ? x : bounded;
}

}  // namespace TQAI_LOCAL
}  // namespace tqai::kernels::TQAI_LEVEL_NAMESPACE

#endif  // TQAI_FUNCTIONS_INL
