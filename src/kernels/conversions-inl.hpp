// Other numbers as floats, and floats as integers.
#ifndef TQAI_CONVERSIONS_INL
#define TQAI_CONVERSIONS_INL

#include <bit>
#include <cstdint>
#include <cstring>
#include <tqai/half.hpp>
#include <type_traits>

#include "floats-inl.hpp"

namespace tqai::kernels::TQAI_LEVEL_NAMESPACE {
namespace TQAI_LOCAL {

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

// A number as a cache holds it.
template <DType kType>
using Number = std::conditional_t<kType == DType::f32, float, std::uint16_t>;

// A register of fp32 from as many numbers, finite ones.
template <DType kType>
inline FloatVec load_numbers(const Number<kType>* from) noexcept {
  if constexpr (kType == DType::f32) {
    return load_floats(from);
#if defined(TQAI_X86) && TQAI_VECTOR_LANES == 16
  } else {
    const __m256i numbers = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from));
    if constexpr (kType == DType::f16) return from_native(_mm512_cvtph_ps(numbers));
    // One permutation in place of a widening and a shift: number i into the upper half of lane i.
    const __m512i upper = _mm512_set_epi16(15, 0, 14, 0, 13, 0, 12, 0, 11, 0, 10, 0, 9, 0, 8, 0, 7,
                                           0, 6, 0, 5, 0, 4, 0, 3, 0, 2, 0, 1, 0, 0, 0);
    return from_native(_mm512_castsi512_ps(
        _mm512_maskz_permutexvar_epi16(0xAAAA'AAAAU, upper, _mm512_castsi256_si512(numbers))));
  }
#elif defined(TQAI_X86) && TQAI_VECTOR_LANES == 8
  } else {
    const __m128i numbers = _mm_loadu_si128(reinterpret_cast<const __m128i*>(from));
    if constexpr (kType == DType::f16) return from_native(_mm256_cvtph_ps(numbers));
    // One shuffle in place of a widening and a shift: number i into the upper half of lane i.
    const __m256i upper =
        _mm256_setr_epi8(-1, -1, 0, 1, -1, -1, 2, 3, -1, -1, 4, 5, -1, -1, 6, 7, -1, -1, 8, 9, -1,
                         -1, 10, 11, -1, -1, 12, 13, -1, -1, 14, 15);
    return from_native(
        _mm256_castsi256_ps(_mm256_shuffle_epi8(_mm256_broadcastsi128_si256(numbers), upper)));
  }
#elif defined(TQAI_NEON) && defined(__GNUC__)
  } else {
    const uint16x4_t numbers = vld1_u16(from);
    if constexpr (kType == DType::f16) {
      return FloatVec(vcvt_f32_f16(vreinterpret_f16_u16(numbers)));
    } else {
      return FloatVec(vreinterpretq_f32_u32(vshll_n_u16(numbers, 16)));
    }
  }
#else
  } else {
    float lanes[kVectorLanes];
    for (int i = 0; i < kVectorLanes; ++i) {
      lanes[i] = kType == DType::f16 ? half_lane(from[i]) : from_bfloat16(from[i]);
    }
    return load_floats(lanes);
  }
#endif
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

// weights = inverse · products, to the nearest integer. products: 64 numbers, inverse times which
// is 0…255.
inline void round_weights(const float* __restrict products, float inverse,
                          std::uint8_t* __restrict weights) noexcept {
  for (int t = 0; t < kTileTokens; ++t) {
    weights[t] =
        static_cast<std::uint8_t>(static_cast<std::int32_t>(fused(products[t], inverse, 0.5F)));
  }
}

}  // namespace TQAI_LOCAL
}  // namespace tqai::kernels::TQAI_LEVEL_NAMESPACE

#endif  // TQAI_CONVERSIONS_INL
