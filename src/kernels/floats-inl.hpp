// Registers of floats, in plain loops and vector types that compilers turn into instructions of the
// target region they are included in. Nothing here is reassociated, or fused unless it says so
// (-ffp-contract=off), so every level gives the same bits.
#ifndef TQAI_FLOATS_INL
#define TQAI_FLOATS_INL

#include <bit>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <utility>

#include "kernels.hpp"

// Where compilers would make a call of what has its arguments in registers, which then go through
// memory; and where, inlining a function, they call what it is made of instead, or spill.
#ifdef TQAI_ALWAYS_INLINE
#elif defined(__GNUC__)
#define TQAI_ALWAYS_INLINE [[gnu::always_inline]] inline
#define TQAI_NEVER_INLINE [[gnu::noinline]] inline
#else
#define TQAI_ALWAYS_INLINE inline
#define TQAI_NEVER_INLINE inline
#endif

namespace tqai::kernels::TQAI_LEVEL_NAMESPACE {
namespace TQAI_LOCAL {

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

// Lanes 1, 0, 3, 2 ….
template <typename Vec>
inline Vec swap_pairs(Vec vec) noexcept {
  using Words = Words64<static_cast<int>(sizeof(Vec))>;
  return Vec(Words(vec) >> 32 | Words(vec) << 32);
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

template <typename Vec>
inline Vec swap_pairs(Vec vec) noexcept {
  for (std::size_t i = 0; i < sizeof(Vec) / sizeof(float); i += 2) {
    std::swap(vec.lanes[i], vec.lanes[i + 1]);
  }
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

// A register that is loaded once, and not by each instruction that reads it.
inline FloatVec in_register(FloatVec vec) noexcept {
#if defined(TQAI_X86) && TQAI_VECTOR_LANES >= 8 && defined(__GNUC__)
  asm("" : "+v"(vec));
#endif
  return vec;
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

}  // namespace TQAI_LOCAL
}  // namespace tqai::kernels::TQAI_LEVEL_NAMESPACE

#endif  // TQAI_FLOATS_INL
