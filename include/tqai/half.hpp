// FP16 and BF16 as they are stored, and their conversions.
#pragma once

#include <bit>
#include <cstddef>
#include <cstdint>
#include <tqai/export.hpp>

namespace tqai {

/// Element types of keys, values, queries and outputs.
enum class DType : std::uint8_t { f32, f16, bf16 };

/// Bytes of one element.
constexpr std::size_t size_of(DType dtype) noexcept { return dtype == DType::f32 ? 4 : 2; }

/// "float32", "float16" or "bfloat16".
constexpr const char* name_of(DType dtype) noexcept {
  return dtype == DType::f32 ? "float32" : dtype == DType::f16 ? "float16" : "bfloat16";
}

/// Largest finite FP16 value.
inline constexpr float kMaxHalf = 65504.0F;

/// IEEE binary16 bits of `value`, rounded to nearest even: bit-exact with F16C, subnormals
/// included. Values beyond ±65504 (after rounding) become infinity, and a NaN stays a quiet NaN
/// with its payload's upper bits; whoever stores norms checks their range before.
constexpr std::uint16_t to_half(float value) noexcept {
  const auto bits = std::bit_cast<std::uint32_t>(value);
  const auto sign = static_cast<std::uint16_t>((bits >> 16) & 0x8000U);
  const std::uint32_t magnitude = bits & 0x7FFFFFFFU;
  const auto with_sign = [sign](std::uint32_t half) {
    return static_cast<std::uint16_t>(sign | half);
  };
  if (magnitude > 0x7F800000U) return with_sign(0x7E00U | ((magnitude >> 13) & 0x3FFU));
  if (magnitude >= 0x477FF000U) return with_sign(0x7C00U);  // rounds to 65536 or is infinite
  if (magnitude < 0x33000000U) return with_sign(0U);        // below half of the smallest subnormal
  const std::uint32_t exponent = magnitude >> 23;
  // Normal results drop 13 mantissa bits; subnormal ones drop more and keep the hidden bit.
  const bool subnormal = exponent < 113U;
  const std::uint32_t shift = subnormal ? 126U - exponent : 13U;
  const std::uint32_t mantissa =
      subnormal ? ((magnitude & 0x7FFFFFU) | 0x800000U) : magnitude - 0x38000000U;
  const std::uint32_t rest = mantissa & ((1U << shift) - 1U);
  const std::uint32_t half_way = 1U << (shift - 1U);
  std::uint32_t half = mantissa >> shift;
  if (rest > half_way || (rest == half_way && (half & 1U) != 0U)) ++half;
  return with_sign(half);
}

/// The value of IEEE binary16 bits; exact.
constexpr float from_half(std::uint16_t half) noexcept {
  const std::uint32_t sign = static_cast<std::uint32_t>(half & 0x8000U) << 16;
  const std::uint32_t exponent = (half >> 10) & 0x1FU;
  std::uint32_t mantissa = half & 0x3FFU;
  if (exponent == 0x1FU) {
    return std::bit_cast<float>(sign | 0x7F800000U | (mantissa << 13) |
                                (mantissa != 0U ? 0x400000U : 0U));
  }
  if (exponent != 0U) {
    return std::bit_cast<float>(sign | ((exponent + 112U) << 23) | (mantissa << 13));
  }
  const float magnitude = static_cast<float>(mantissa) * 0x1p-24F;
  return std::bit_cast<float>(sign | std::bit_cast<std::uint32_t>(magnitude));
}

/// bfloat16 bits of `value`, rounded to nearest even; NaN stays a quiet NaN.
constexpr std::uint16_t to_bfloat16(float value) noexcept {
  const auto bits = std::bit_cast<std::uint32_t>(value);
  if ((bits & 0x7FFFFFFFU) > 0x7F800000U) return static_cast<std::uint16_t>((bits >> 16) | 0x40U);
  return static_cast<std::uint16_t>((bits + 0x7FFFU + ((bits >> 16) & 1U)) >> 16);
}

/// The value of bfloat16 bits; exact.
constexpr float from_bfloat16(std::uint16_t value) noexcept {
  return std::bit_cast<float>(static_cast<std::uint32_t>(value) << 16);
}

/// `count` elements of `dtype` at `from` as fp32. No alignment is needed; the ranges must not
/// overlap.
TQAI_API void convert_to_float(const void* from, DType dtype, std::size_t count,
                               float* to) noexcept;

/// `count` fp32 values rounded to `dtype` (nearest even). The ranges must not overlap.
TQAI_API void convert_from_float(const float* from, std::size_t count, DType dtype,
                                 void* to) noexcept;

}  // namespace tqai

#if defined(TQAI_HEADER_ONLY) || defined(TQAI_IMPLEMENTATION)
#include <tqai/header_only.hpp>
#endif
