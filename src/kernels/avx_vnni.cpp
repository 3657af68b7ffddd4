// AVX2 with AVX-VNNI: half a line is a register, products are added up in 32 bits at once.
#include "kernels.hpp"

#ifdef TQAI_X86

#include <immintrin.h>

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstring>
#include <limits>
#include <tqai/codebook.hpp>
#include <utility>

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c,avxvnni"))), apply_to = function)
#elif defined(__GNUC__)
#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c,avxvnni")
#endif

#define TQAI_LEVEL_NAMESPACE avx_vnni_level
#define TQAI_VECTOR_LANES 8
#include "avx2-inl.hpp"

namespace tqai::kernels::TQAI_LEVEL_NAMESPACE {
namespace TQAI_LOCAL {

struct AvxVnni : HalfLines {
  static constexpr int kMaxWords = 1;
  static constexpr int value_blocks(int rows) noexcept { return rows <= 2 ? 2 : 1; }
  static constexpr int value_chains(int rows) noexcept { return rows <= 2 ? 2 : 1; }
  static constexpr bool kSumsQuotients = false;
  static constexpr bool kSumsPairs = false;
  template <int kBits>
  static constexpr int words() noexcept {
    return 1;
  }

  // vpdpbusd multiplies u8 by s8, and does not saturate. Keys are the u8 side, as level + 128, and
  // queries the s8 one; values are the s8 side, weights the u8 one.
  struct KeyOperand {
    Vec levels;
  };
  struct ValueOperand {
    Vec levels;
  };
  using KeyLevels = KeyOperand;
  using ValueLevels = ValueOperand;
  static constexpr int kKeyBias = 128;

  template <int kBits>
  struct Table : Tables<kBits> {
    Table(const std::int8_t* levels, bool keys) noexcept
        : Tables<kBits>(levels, keys ? kKeyBias : 0) {}
    KeyOperand key_operand(Vec codes) const noexcept {
      if constexpr (kBits == 8) return {codes};
      return {this->look_up(codes)};
    }
    ValueOperand value_operand(Vec codes) const noexcept {
      if constexpr (kBits == 8) return {_mm256_xor_si256(codes, broadcast_byte(-128))};
      return {this->look_up(codes)};
    }
  };
  using WindowTable = Windows<KeyOperand, kKeyBias>;

  static void expand_queries(int /*bits*/, const std::int8_t* q, int count,
                             std::uint8_t* words) noexcept {
    std::memcpy(words, q, static_cast<std::size_t>(count));
  }
  static constexpr bool plain_weights(int /*bits*/) noexcept { return true; }
  static void expand_weights(int /*bits*/, const std::uint8_t* w, int count,
                             std::uint8_t* words) noexcept {
    std::memcpy(words, w, static_cast<std::size_t>(count));
  }
  static std::int32_t key_bias(int /*bits*/, const std::int8_t* q, int count) noexcept {
    std::int32_t sum = 0;
    for (int c = 0; c < count; ++c) sum += q[c];
    return -kKeyBias * sum;
  }

  static Acc dot(Acc acc, KeyOperand keys, const std::uint8_t* words) noexcept {
    return _mm256_dpbusd_avx_epi32(acc, keys.levels, broadcast_word(words));
  }
  static Acc dot(Acc acc, ValueOperand values, const std::uint8_t* words) noexcept {
    return _mm256_dpbusd_avx_epi32(acc, broadcast_word(words), values.levels);
  }
  static ValueOperand add_levels(ValueOperand a, ValueOperand b) noexcept {
    return {_mm256_add_epi8(a.levels, b.levels)};
  }
};

template <int kCount>
struct KeyPathReader<AvxVnni, 4, kCount>
    : FourBitPathReader<AvxVnni::KeyOperand, AvxVnni::kKeyBias, kCount> {
  using FourBitPathReader<AvxVnni::KeyOperand, AvxVnni::kKeyBias, kCount>::FourBitPathReader;
};

constexpr Kernels kKernels = table_of<Integer<AvxVnni>, HalfLineLanes>(Level::avx_vnni);
constexpr Parts kParts = parts_of<Integer<AvxVnni>>();

}  // namespace TQAI_LOCAL
}  // namespace tqai::kernels::TQAI_LEVEL_NAMESPACE

namespace tqai::kernels {

TQAI_INLINE constinit const Kernels kAvxVnniKernels = avx_vnni_level::kKernels;
TQAI_INLINE constinit const Parts kAvxVnniParts = avx_vnni_level::kParts;

}  // namespace tqai::kernels

#include "level_end.hpp"

#if defined(__clang__)
#pragma clang attribute pop
#elif defined(__GNUC__)
#pragma GCC pop_options
#endif

#endif  // TQAI_X86
