// NEON with the dot product instructions of ARMv8.2: a quarter of a line is a register.
#include "kernels.hpp"

#ifdef TQAI_ARM64

#include <arm_neon.h>

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstring>
#include <limits>
#include <utility>

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("dotprod"))), apply_to = function)
#elif defined(__GNUC__)
#pragma GCC push_options
#pragma GCC target("arch=armv8.2-a+dotprod")
#endif

#define TQAI_LEVEL_NAMESPACE neon_level
#define TQAI_VECTOR_LANES 4
#define TQAI_NEON 1
#include "integer-inl.hpp"
#include "parts-inl.hpp"
#include "table-inl.hpp"

namespace tqai::kernels::TQAI_LEVEL_NAMESPACE {
namespace TQAI_LOCAL {

struct Neon {
  using Vec = uint8x16_t;
  using Acc = int32x4_t;
  static constexpr int kParts = 4;
  static constexpr int kMaxWords = 1;
  static constexpr int kRowBlock = 4;
  static constexpr int kMaxSums = 16;  // of 32 registers
  static constexpr int value_blocks(int rows) noexcept { return rows <= 2 ? 4 : 2; }
  static constexpr int value_chains(int /*rows*/) noexcept { return 1; }
  static constexpr bool kSumsQuotients = false;
  static constexpr bool kSumsPairs = false;
  static constexpr bool kDecodesPaths = false;
  static constexpr int kDecodedBits = 0;
  template <int kBits>
  static constexpr int words() noexcept {
    return 1;
  }

  static Vec load(const std::uint8_t* p) noexcept { return vld1q_u8(p); }
  static void prefetch(const std::uint8_t* p) noexcept { __builtin_prefetch(p); }
  template <int kBits>
  static Vec shift_right(Vec v) noexcept {
    return vshrq_n_u8(v, kBits);
  }
  template <int kBits>
  static Vec shift_left(Vec v) noexcept {
    return vshlq_n_u8(v, kBits);
  }
  template <int kBits>
  static Vec low_bits(Vec v) noexcept {
    return vandq_u8(v, vdupq_n_u8((1U << kBits) - 1));
  }
  static Vec either(Vec a, Vec b) noexcept { return vorrq_u8(a, b); }
  template <int kBits>
  static Vec merge(Vec low, Vec high) noexcept {  // clean
    return vandq_u8(vbslq_u8(vdupq_n_u8((1U << kBits) - 1), low, high), vdupq_n_u8(0x3F));
  }
  static Vec next_bytes(Vec v, std::uint8_t value) noexcept {
    return vreinterpretq_u8_u32(
        vorrq_u32(vshlq_n_u32(vreinterpretq_u32_u8(v), 8), vdupq_n_u32(value)));
  }

  // sdot multiplies s8 by s8. Weights are u8: as w − 128, and 128 times the levels, in two halves,
  // come back.
  struct KeyOperand {
    int8x16_t levels;
  };
  struct ValueOperand {
    int8x16_t levels;
  };

  template <int kBits>
  struct Table {
    static constexpr int kVecs = kBits <= 4 || kBits == 8 ? 1 : 1 << (kBits - 4);
    Vec entries[kVecs];

    Table(const std::int8_t* levels, bool /*keys*/) noexcept {
      for (int vec = 0; vec < kVecs; ++vec) {
        entries[vec] = vreinterpretq_u8_s8(vld1q_s8(levels + std::ptrdiff_t{16} * vec));
      }
    }
    // An index beyond the tables of tbl gives 0, of tbx what was there before.
    Vec look_up(Vec codes) const noexcept {
      if constexpr (kBits <= 4) {
        return vqtbl1q_u8(entries[0], low_bits<4>(codes));
      } else if constexpr (kBits == 5) {
        return vqtbl2q_u8({{entries[0], entries[1]}}, codes);
      } else if constexpr (kBits == 6) {
        return vqtbl4q_u8({{entries[0], entries[1], entries[2], entries[3]}}, codes);
      } else if constexpr (kBits == 7) {
        const Vec low = vqtbl4q_u8({{entries[0], entries[1], entries[2], entries[3]}}, codes);
        return vqtbx4q_u8(low, {{entries[4], entries[5], entries[6], entries[7]}},
                          vsubq_u8(codes, vdupq_n_u8(64)));
      } else {  // level = code − 128
        return veorq_u8(codes, vdupq_n_u8(128));
      }
    }
    KeyOperand key_operand(Vec codes) const noexcept {
      return {vreinterpretq_s8_u8(look_up(codes))};
    }
    ValueOperand value_operand(Vec codes) const noexcept {
      return {vreinterpretq_s8_u8(look_up(codes))};
    }
  };

  struct WindowTable {
    uint8x16x4_t entries;

    explicit WindowTable(const std::int8_t* of_windows) noexcept
        : entries{vreinterpretq_u8_s8(vld1q_s8(of_windows)),
                  vreinterpretq_u8_s8(vld1q_s8(of_windows + 16)),
                  vreinterpretq_u8_s8(vld1q_s8(of_windows + 32)),
                  vreinterpretq_u8_s8(vld1q_s8(of_windows + 48))} {}
    KeyOperand key_operand(Vec windows) const noexcept {
      return {vreinterpretq_s8_u8(vqtbl4q_u8(entries, windows))};
    }
  };

  static void expand_queries(int /*bits*/, const std::int8_t* q, int count,
                             std::uint8_t* words) noexcept {
    std::memcpy(words, q, static_cast<std::size_t>(count));
  }
  static constexpr bool plain_weights(int /*bits*/) noexcept { return false; }
  static void expand_weights(int /*bits*/, const std::uint8_t* w, int count,
                             std::uint8_t* words) noexcept {
    for (int i = 0; i < count; ++i) words[i] = static_cast<std::uint8_t>(w[i] ^ 0x80U);
  }
  static std::int32_t key_bias(int /*bits*/, const std::int8_t* /*q*/, int /*count*/) noexcept {
    return 0;
  }

  static Acc broadcast(std::int32_t value) noexcept { return vdupq_n_s32(value); }
  static int8x16_t factors(const std::uint8_t* words) noexcept {
    std::int32_t word;
    std::memcpy(&word, words, sizeof word);
    return vreinterpretq_s8_s32(vdupq_n_s32(word));
  }
  // Clang before 16 has the intrinsic only where the whole program may use it.
  static Acc dot_bytes(Acc acc, int8x16_t a, int8x16_t b) noexcept {
#if defined(__clang__) && __clang_major__ < 16 && !defined(__ARM_FEATURE_DOTPROD)
    asm("sdot %0.4s, %1.16b, %2.16b" : "+w"(acc) : "w"(a), "w"(b));
    return acc;
#else
    return vdotq_s32(acc, a, b);
#endif
  }
  static Acc dot(Acc acc, KeyOperand keys, const std::uint8_t* words) noexcept {
    return dot_bytes(acc, keys.levels, factors(words));
  }
  static Acc dot(Acc acc, ValueOperand values, const std::uint8_t* words) noexcept {
    const int8x16_t half = vdupq_n_s8(64);
    acc = dot_bytes(acc, values.levels, factors(words));
    return dot_bytes(dot_bytes(acc, values.levels, half), values.levels, half);
  }
  static Acc add(Acc a, Acc b) noexcept { return vaddq_s32(a, b); }
  static ValueOperand add_levels(ValueOperand a, ValueOperand b) noexcept {
    return {vaddq_s8(a.levels, b.levels)};
  }
  static void store(std::int32_t* p, Acc acc) noexcept { vst1q_s32(p, acc); }
  static void round_weights(const float* products, float inverse, std::uint8_t* weights) noexcept {
    TQAI_LEVEL_NAMESPACE::round_weights(products, inverse, weights);
  }
  static void read_halves(const std::uint8_t* from, float* to) noexcept {
    TQAI_LEVEL_NAMESPACE::read_halves(from, to);
  }
  static void add_scaled(float* p, Acc acc, float step) noexcept {
    vst1q_f32(p, vfmaq_n_f32(vld1q_f32(p), vcvtq_f32_s32(acc), step));
  }
};

constexpr Kernels kKernels = table_of<Integer<Neon>, PlainLanes>(Level::neon);
constexpr Parts kParts = parts_of<Integer<Neon>>();

}  // namespace TQAI_LOCAL
}  // namespace tqai::kernels::TQAI_LEVEL_NAMESPACE

namespace tqai::kernels {

TQAI_INLINE constinit const Kernels kNeonKernels = neon_level::kKernels;
TQAI_INLINE constinit const Parts kNeonParts = neon_level::kParts;

}  // namespace tqai::kernels

#include "level_end.hpp"

#if defined(__clang__)
#pragma clang attribute pop
#elif defined(__GNUC__)
#pragma GCC pop_options
#endif

#endif  // TQAI_ARM64
