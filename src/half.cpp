#include <bit>
#include <cstdint>
#include <cstring>
#include <tqai/half.hpp>

#include "threads.hpp"

// Every conversion here computes all cases and selects, so that compilers turn the loops into SIMD;
// the readable versions, and the specification, are the scalar functions of the header.

namespace tqai {
namespace TQAI_LOCAL {

// condition ? yes : no; a conditional expression would let the compiler move the floating-point
// operation of one case into a branch, and then it cannot vectorise.
constexpr std::int32_t select(bool condition, std::int32_t yes, std::int32_t no) noexcept {
  const std::int32_t mask = -static_cast<std::int32_t>(condition);
  return (yes & mask) | (no & ~mask);
}

// As from_half; subnormals go through an integer, so that flush-to-zero modes cannot touch them.
inline float widen_half(std::uint16_t half) noexcept {
  const std::int32_t magnitude = half & 0x7FFF;
  const std::int32_t shifted = magnitude << 13;
  const auto subnormal = std::bit_cast<std::int32_t>(static_cast<float>(magnitude) * 0x1p-24F);
  const std::int32_t quiet = select(magnitude > 0x7C00, 0x400000, 0);
  const std::int32_t special = shifted | 0x7F800000 | quiet;
  const std::int32_t normal = shifted + 0x38000000;  // exponent bias 127 in place of 15
  std::int32_t bits = select(magnitude < 0x400, subnormal, normal);
  bits = select(magnitude >= 0x7C00, special, bits);
  const std::uint32_t sign = static_cast<std::uint32_t>(half & 0x8000U) << 16;
  return std::bit_cast<float>(static_cast<std::uint32_t>(bits) | sign);
}

// As to_half.
inline std::uint16_t narrow_half(float value) noexcept {
  const auto bits = std::bit_cast<std::uint32_t>(value);
  const auto magnitude = static_cast<std::int32_t>(bits & 0x7FFFFFFFU);
  const std::int32_t odd = (magnitude >> 13) & 1;
  const std::int32_t normal = (magnitude - 0x38000000 + 0xFFF + odd) >> 13;
  // The unit in the last place of 0.5 is the smallest FP16 subnormal: the addition rounds.
  const auto sum = std::bit_cast<std::int32_t>(std::bit_cast<float>(magnitude) + 0.5F);
  const std::int32_t subnormal = sum - 0x3F000000;
  const std::int32_t nan = 0x7E00 | ((magnitude >> 13) & 0x3FF);
  std::int32_t half = select(magnitude < 0x38800000, subnormal, normal);
  half = select(magnitude >= 0x477FF000, 0x7C00, half);
  half = select(magnitude > 0x7F800000, nan, half);
  return static_cast<std::uint16_t>(static_cast<std::uint32_t>(half) | ((bits >> 16) & 0x8000U));
}

// As to_bfloat16.
inline std::uint16_t narrow_bfloat16(float value) noexcept {
  const auto bits = std::bit_cast<std::uint32_t>(value);
  const auto magnitude = static_cast<std::int32_t>(bits & 0x7FFFFFFFU);
  const std::uint32_t rounded = (bits + 0x7FFFU + ((bits >> 16) & 1U)) >> 16;
  const std::uint32_t nan = (bits >> 16) | 0x40U;
  return static_cast<std::uint16_t>(magnitude > 0x7F800000 ? nan : rounded);
}

template <typename Convert>
void widen_all(const void* from, std::size_t count, float* __restrict to, Convert convert) {
  const auto* source = static_cast<const unsigned char*>(from);
  for (std::size_t i = 0; i < count; ++i) {
    std::uint16_t bits;
    std::memcpy(&bits, source + 2 * i, sizeof bits);  // may be unaligned
    to[i] = convert(bits);
  }
}

template <typename Convert>
void narrow_all(const float* __restrict from, std::size_t count, void* to, Convert convert) {
  auto* target = static_cast<unsigned char*>(to);
  for (std::size_t i = 0; i < count; ++i) {
    const std::uint16_t bits = convert(from[i]);
    std::memcpy(target + 2 * i, &bits, sizeof bits);
  }
}

}  // namespace TQAI_LOCAL

TQAI_INLINE void convert_to_float(const void* from, DType dtype, std::size_t count,
                                  float* to) noexcept {
  if (count == 0) return;
  const UsualArithmetic usual;
  switch (dtype) {
    case DType::f32: std::memcpy(to, from, count * sizeof(float)); return;
    case DType::f16: widen_all(from, count, to, [](auto h) { return widen_half(h); }); return;
    case DType::bf16: widen_all(from, count, to, [](auto h) { return from_bfloat16(h); }); return;
  }
}

TQAI_INLINE void convert_from_float(const float* from, std::size_t count, DType dtype,
                                    void* to) noexcept {
  if (count == 0) return;
  const UsualArithmetic usual;
  switch (dtype) {
    case DType::f32: std::memcpy(to, from, count * sizeof(float)); return;
    case DType::f16: narrow_all(from, count, to, [](float v) { return narrow_half(v); }); return;
    case DType::bf16:
      narrow_all(from, count, to, [](float v) { return narrow_bfloat16(v); });
      return;
  }
}

}  // namespace tqai
