#include <gtest/gtest.h>

#include <bit>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <tqai/half.hpp>
#include <vector>

#if defined(__x86_64__) && defined(__GNUC__)
#include <immintrin.h>
#endif

namespace tqai {
namespace {

std::uint32_t bits_of(float value) { return std::bit_cast<std::uint32_t>(value); }
float float_of(std::uint32_t bits) { return std::bit_cast<float>(bits); }

bool is_nan(std::uint16_t half) { return (half & 0x7FFFU) > 0x7C00U; }

// By the definition of IEEE binary16; not for NaN.
double value_of(std::uint16_t half) {
  const int exponent = (half >> 10) & 0x1F;
  const int mantissa = half & 0x3FF;
  const double sign = (half & 0x8000) != 0 ? -1.0 : 1.0;
  if (exponent == 0x1F) return sign * std::numeric_limits<double>::infinity();
  if (exponent == 0) return sign * std::ldexp(mantissa, -24);
  return sign * std::ldexp(1024 + mantissa, exponent - 25);
}

std::uint16_t converted(float value, DType dtype) {
  std::uint16_t result = 0;
  convert_from_float(&value, 1, dtype, &result);
  return result;
}

// Every FP16 value, every midpoint between neighbours and the floats next to all of those; then
// patterns from the whole range of floats.
std::vector<float> interesting_floats() {
  std::vector<float> values;
  const auto add_around = [&values](std::uint32_t magnitude) {
    for (const std::uint32_t sign : {0U, 0x80000000U}) {
      for (const std::uint32_t near : {magnitude - 1, magnitude, magnitude + 1}) {
        if (near <= 0x7FFFFFFFU) values.push_back(float_of(sign | near));
      }
    }
  };
  for (std::uint32_t half = 0; half < 0x7C00; ++half) {
    const double low = value_of(static_cast<std::uint16_t>(half));
    // Above 65504 the next value would be 65536: from the middle on, infinity.
    const double high = half == 0x7BFF ? 65536.0 : value_of(static_cast<std::uint16_t>(half + 1));
    add_around(bits_of(static_cast<float>(low)));
    add_around(bits_of(static_cast<float>(0.5 * (low + high))));
  }
  for (std::uint32_t bits = 0; bits < 0xFFFFFFFFU - 9973U; bits += 9973U) {
    values.push_back(float_of(bits));
  }
  for (const std::uint32_t bits :
       {0x7F800000U, 0xFF800000U, 0x7F800001U, 0x7FC00000U, 0xFFFFFFFFU}) {
    values.push_back(float_of(bits));
  }
  return values;
}

static_assert(to_half(1.0F) == 0x3C00 && from_half(0x3C00) == 1.0F);
static_assert(to_bfloat16(1.0F) == 0x3F80 && from_bfloat16(0x3F80) == 1.0F);
static_assert(size_of(DType::f32) == 4 && size_of(DType::f16) == 2 && size_of(DType::bf16) == 2);

TEST(Half, EveryHalfHasItsValue) {
  std::vector<std::uint16_t> halves(65536);
  for (std::size_t i = 0; i < halves.size(); ++i) halves[i] = static_cast<std::uint16_t>(i);
  std::vector<float> floats(halves.size());
  convert_to_float(halves.data(), DType::f16, halves.size(), floats.data());
  for (const std::uint16_t half : halves) {
    const float value = from_half(half);
    ASSERT_EQ(bits_of(value), bits_of(floats[half])) << half;
    if (is_nan(half)) {
      // Sign and payload stay, the quiet bit is set.
      const std::uint32_t sign = static_cast<std::uint32_t>(half & 0x8000U) << 16;
      const std::uint32_t payload = static_cast<std::uint32_t>(half & 0x3FFU) << 13;
      ASSERT_EQ(bits_of(value), sign | 0x7FC00000U | payload) << half;
      ASSERT_EQ(to_half(value), half | 0x200U) << half;
    } else {
      ASSERT_EQ(static_cast<double>(value), value_of(half)) << half;
      ASSERT_EQ(std::signbit(value), (half & 0x8000) != 0) << half;
      ASSERT_EQ(to_half(value), half) << half;
    }
  }
}

TEST(Half, RoundsToNearestEven) {
  for (std::uint32_t index = 0; index < 0x7C00; ++index) {
    const auto low = static_cast<std::uint16_t>(index);
    const auto high = static_cast<std::uint16_t>(index + 1);
    const double above = index == 0x7BFF ? 65536.0 : value_of(high);
    const auto middle = static_cast<float>(0.5 * (value_of(low) + above));  // exact
    const std::uint16_t even = (low & 1U) == 0 ? low : high;
    for (const int sign : {0, 0x8000}) {
      const float signed_middle = sign != 0 ? -middle : middle;
      const float towards_zero = std::nextafter(signed_middle, 0.0F);
      const float away = std::nextafter(signed_middle, 2.0F * signed_middle);
      ASSERT_EQ(to_half(towards_zero), low | sign) << index;
      ASSERT_EQ(to_half(signed_middle), even | sign) << index;
      ASSERT_EQ(to_half(away), high | sign) << index;
    }
  }
}

TEST(Half, ArraysAgreeWithTheScalarFunctions) {
  const std::vector<float> values = interesting_floats();
  std::vector<std::uint16_t> halves(values.size());
  std::vector<std::uint16_t> brains(values.size());
  convert_from_float(values.data(), values.size(), DType::f16, halves.data());
  convert_from_float(values.data(), values.size(), DType::bf16, brains.data());
  for (std::size_t i = 0; i < values.size(); ++i) {
    ASSERT_EQ(halves[i], to_half(values[i])) << std::hex << bits_of(values[i]);
    ASSERT_EQ(brains[i], to_bfloat16(values[i])) << std::hex << bits_of(values[i]);
  }
}

#if defined(__x86_64__) && defined(__GNUC__)
__attribute__((target("avx,f16c"))) std::uint16_t f16c_narrow(float value) {
  const __m128i packed = _mm_cvtps_ph(_mm_set_ss(value), _MM_FROUND_TO_NEAREST_INT);
  return static_cast<std::uint16_t>(_mm_extract_epi16(packed, 0));
}

__attribute__((target("avx,f16c"))) std::uint32_t f16c_widen(std::uint16_t half) {
  const __m128 value = _mm_cvtph_ps(_mm_cvtsi32_si128(half));
  return static_cast<std::uint32_t>(_mm_cvtsi128_si32(_mm_castps_si128(value)));
}

TEST(Half, AgreesWithF16C) {
  // Every processor with AVX2 has F16C; older Clang cannot ask for that by name.
  if (!__builtin_cpu_supports("avx2")) GTEST_SKIP() << "this processor has no AVX2";
  for (std::uint32_t half = 0; half < 65536; ++half) {
    const auto bits = static_cast<std::uint16_t>(half);
    ASSERT_EQ(bits_of(from_half(bits)), f16c_widen(bits)) << half;
  }
  for (const float value : interesting_floats()) {
    ASSERT_EQ(to_half(value), f16c_narrow(value)) << std::hex << bits_of(value);
  }
}
#endif

TEST(Half, BFloat16RoundsToNearestEven) {
  for (std::uint32_t high = 0; high < 0x7F80; ++high) {  // finite magnitudes
    for (const std::uint32_t sign : {0U, 0x8000U}) {
      const std::uint32_t top = high | sign;
      const std::uint32_t even = (top & 1U) == 0 ? top : top + 1;
      ASSERT_EQ(to_bfloat16(float_of(top << 16)), top);
      ASSERT_EQ(to_bfloat16(float_of(top << 16 | 0x7FFFU)), top);
      ASSERT_EQ(to_bfloat16(float_of(top << 16 | 0x8000U)), even);
      ASSERT_EQ(to_bfloat16(float_of(top << 16 | 0x8001U)), top + 1);
      ASSERT_EQ(bits_of(from_bfloat16(static_cast<std::uint16_t>(top))), top << 16);
    }
  }
}

TEST(Half, BFloat16KeepsInfinityAndNaN) {
  const float infinity = std::numeric_limits<float>::infinity();
  EXPECT_EQ(to_bfloat16(infinity), 0x7F80);
  EXPECT_EQ(to_bfloat16(-infinity), 0xFF80);
  EXPECT_EQ(to_bfloat16(float_of(0x7F800001U)), 0x7FC0);  // would round to infinity
  EXPECT_EQ(to_bfloat16(float_of(0xFFFFFFFFU)), 0xFFFF);
  EXPECT_EQ(converted(float_of(0x7F800001U), DType::bf16), 0x7FC0);
}

TEST(Half, AnyCountAndAlignment) {
  for (const DType dtype : {DType::f32, DType::f16, DType::bf16}) {
    for (const std::size_t count : {0U, 1U, 3U, 7U, 8U, 15U, 16U, 17U, 31U, 33U, 100U}) {
      std::vector<float> values(count);
      for (std::size_t i = 0; i < count; ++i) values[i] = static_cast<float>(i) - 8.5F;
      // One byte off any alignment, and a guard behind.
      std::vector<unsigned char> stored(count * size_of(dtype) + 2, 0xAB);
      convert_from_float(values.data(), count, dtype, stored.data() + 1);
      EXPECT_EQ(stored.front(), 0xAB);
      EXPECT_EQ(stored.back(), 0xAB);
      std::vector<float> back(count + 1, -1.0F);
      convert_to_float(stored.data() + 1, dtype, count, back.data());
      EXPECT_EQ(back.back(), -1.0F);
      back.pop_back();
      EXPECT_EQ(back, values) << name_of(dtype) << ", " << count;  // all are exact in 8 bits
    }
  }
}

}  // namespace
}  // namespace tqai
