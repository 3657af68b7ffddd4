#include "bf16_attention.hpp"

#if defined(__x86_64__) && defined(__GNUC__)

#include <immintrin.h>

#include <cmath>
#include <cstring>
#include <limits>
#include <tqai/half.hpp>

#if defined(__clang__)
#pragma clang attribute push(                                                          \
    __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,avx2,fma"))), \
    apply_to = function)
#else
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,avx2,fma")
#endif

namespace tqai::bench {
namespace {

constexpr int kBlock = 64;
constexpr int kMaxDim = 256;
constexpr int kMaxGroup = 16;
constexpr float kLog2E = 1.44269504F;

inline __m512bh load_pairs(const void* p) noexcept { return (__m512bh)_mm512_loadu_si512(p); }

inline __m512 exp2_lanes(__m512 x) noexcept {
  const __m512 clamped = _mm512_max_ps(x, _mm512_set1_ps(-126.0F));
  const __m512 whole = _mm512_roundscale_ps(clamped, 0);
  const __m512 f = _mm512_sub_ps(clamped, whole);
  __m512 p = _mm512_set1_ps(1.3333558e-3F);
  p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(9.6181291e-3F));
  p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(5.5504109e-2F));
  p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(2.4022651e-1F));
  p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(6.9314718e-1F));
  p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(1.0F));
  return _mm512_scalef_ps(p, whole);
}

// Sums of 16 registers, in the lanes of one.
inline __m512 sum_each(__m512 (&a)[16]) noexcept {
  __m512 b[8];
  for (int i = 0; i < 8; ++i) {
    b[i] = _mm512_add_ps(_mm512_unpacklo_ps(a[2 * i], a[2 * i + 1]),
                         _mm512_unpackhi_ps(a[2 * i], a[2 * i + 1]));
  }
  __m512 c[4];
  for (int i = 0; i < 4; ++i) {
    const __m512d low = _mm512_castps_pd(b[2 * i]);
    const __m512d high = _mm512_castps_pd(b[2 * i + 1]);
    c[i] = _mm512_add_ps(_mm512_castpd_ps(_mm512_unpacklo_pd(low, high)),
                         _mm512_castpd_ps(_mm512_unpackhi_pd(low, high)));
  }
  // c[i]: four partial sums, one in each 128-bit lane, of registers 4 i … 4 i + 3.
  const __m512 low =
      _mm512_add_ps(_mm512_shuffle_f32x4(c[0], c[1], 0x88), _mm512_shuffle_f32x4(c[0], c[1], 0xDD));
  const __m512 high =
      _mm512_add_ps(_mm512_shuffle_f32x4(c[2], c[3], 0x88), _mm512_shuffle_f32x4(c[2], c[3], 0xDD));
  return _mm512_add_ps(_mm512_shuffle_f32x4(low, high, 0x88),
                       _mm512_shuffle_f32x4(low, high, 0xDD));
}

struct State {
  alignas(64) float scores[kMaxGroup][kBlock];
  alignas(64) std::uint16_t weights[kMaxGroup][kBlock];
  alignas(64) std::uint16_t queries[kMaxGroup][kMaxDim];
  alignas(64) float output[kMaxGroup][kMaxDim];  // even and odd halves of 16 as unpacked
  float max[kMaxGroup];
  float sum[kMaxGroup];
};

template <int kDim>
inline void score(const std::uint16_t* keys, const std::uint16_t* next_values, int group,
                  State& state) noexcept {
  for (int start = 0; start < kBlock; start += 16) {
    const std::uint16_t* block = keys + start * kDim;
    for (int i = 0; i < 16 * kDim; i += 32) {
      _mm_prefetch(reinterpret_cast<const char*>(next_values + start * kDim + i), _MM_HINT_T0);
    }
    for (int g = 0; g < group; ++g) {
      __m512 sums[16];
      for (int t = 0; t < 16; ++t) {
        sums[t] = _mm512_setzero_ps();
        for (int c = 0; c < kDim; c += 32) {
          sums[t] = _mm512_dpbf16_ps(sums[t], load_pairs(state.queries[g] + c),
                                     load_pairs(block + t * kDim + c));
        }
      }
      _mm512_store_ps(state.scores[g] + start, sum_each(sums));
    }
  }
}

template <int kDim>
inline void weigh(int g, State& state) noexcept {
  __m512 largest = _mm512_load_ps(state.scores[g]);
  for (int t = 16; t < kBlock; t += 16) {
    largest = _mm512_max_ps(largest, _mm512_load_ps(state.scores[g] + t));
  }
  const float max = _mm512_reduce_max_ps(largest);
  if (max > state.max[g]) {
    const __m512 shrink = _mm512_set1_ps(std::exp2(state.max[g] - max));
    state.max[g] = max;
    state.sum[g] *= _mm512_cvtss_f32(shrink);
    for (int c = 0; c < kDim; c += 16) {
      _mm512_store_ps(state.output[g] + c,
                      _mm512_mul_ps(_mm512_load_ps(state.output[g] + c), shrink));
    }
  }
  __m512 sum = _mm512_setzero_ps();
  for (int t = 0; t < kBlock; t += 16) {
    const __m512 p = exp2_lanes(
        _mm512_sub_ps(_mm512_load_ps(state.scores[g] + t), _mm512_set1_ps(state.max[g])));
    sum = _mm512_add_ps(sum, p);
    _mm256_store_si256(reinterpret_cast<__m256i*>(state.weights[g] + t),
                       (__m256i)(_mm512_cvtneps_pbh(p)));
  }
  state.sum[g] += _mm512_reduce_add_ps(sum);
}

template <int kDim, int kGroup>
inline void accumulate(const std::uint16_t* values, const std::uint16_t* next_keys, int first,
                       State& state) noexcept {
  for (int c = 0; c < kDim; c += 32) {
    __m512 low[kGroup];
    __m512 high[kGroup];
    for (int g = 0; g < kGroup; ++g) {
      low[g] = _mm512_load_ps(state.output[first + g] + c);
      high[g] = _mm512_load_ps(state.output[first + g] + c + 16);
    }
    for (int t = 0; t < kBlock; t += 2) {
      _mm_prefetch(reinterpret_cast<const char*>(next_keys + c * kBlock + t * 32), _MM_HINT_T0);
      _mm_prefetch(reinterpret_cast<const char*>(next_keys + c * kBlock + t * 32 + 32),
                   _MM_HINT_T0);
      const __m512i a = _mm512_loadu_si512(values + t * kDim + c);
      const __m512i b = _mm512_loadu_si512(values + (t + 1) * kDim + c);
      const auto pairs_low = (__m512bh)(_mm512_unpacklo_epi16(a, b));
      const auto pairs_high = (__m512bh)(_mm512_unpackhi_epi16(a, b));
      for (int g = 0; g < kGroup; ++g) {
        std::int32_t pair;
        std::memcpy(&pair, state.weights[first + g] + t, sizeof pair);
        const auto weight = (__m512bh)(_mm512_set1_epi32(pair));
        low[g] = _mm512_dpbf16_ps(low[g], pairs_low, weight);
        high[g] = _mm512_dpbf16_ps(high[g], pairs_high, weight);
      }
    }
    for (int g = 0; g < kGroup; ++g) {
      _mm512_store_ps(state.output[first + g] + c, low[g]);
      _mm512_store_ps(state.output[first + g] + c + 16, high[g]);
    }
  }
}

template <int kDim>
void attend(const std::uint16_t* keys, const std::uint16_t* values, std::int64_t tokens, int group,
            const float* queries, float scale, float* output) noexcept {
  State state{};
  for (int g = 0; g < group; ++g) {
    state.max[g] = -std::numeric_limits<float>::infinity();
    for (int c = 0; c < kDim; ++c) {
      state.queries[g][c] = to_bfloat16(queries[g * kDim + c] * scale * kLog2E);
    }
  }
  for (std::int64_t start = 0; start < tokens; start += kBlock) {
    const std::uint16_t* block = values + start * kDim;
    score<kDim>(keys + start * kDim, block, group, state);
    for (int g = 0; g < group; ++g) weigh<kDim>(g, state);
    const std::uint16_t* next = keys + (start + kBlock < tokens ? start + kBlock : start) * kDim;
    int g = 0;
    for (; g + 4 <= group; g += 4) accumulate<kDim, 4>(block, next, g, state);
    for (; g < group; ++g) accumulate<kDim, 1>(block, next, g, state);
  }
  for (int g = 0; g < group; ++g) {
    for (int c = 0; c < kDim; ++c) {
      // Unpacking took 16-bit elements from each 128-bit lane's lower half, then the upper.
      const int lane = c % 32 / 8;
      const int at = c % 8 < 4 ? lane * 4 + c % 4 : 16 + lane * 4 + c % 4;
      output[g * kDim + c] = state.output[g][c / 32 * 32 + at] / state.sum[g];
    }
  }
}

}  // namespace

void bf16_attention(const std::uint16_t* keys, const std::uint16_t* values, std::int64_t tokens,
                    int dim, int group, const float* queries, float scale, float* output) noexcept {
  switch (dim) {
    case 64: attend<64>(keys, values, tokens, group, queries, scale, output); break;
    case 96: attend<96>(keys, values, tokens, group, queries, scale, output); break;
    case 128: attend<128>(keys, values, tokens, group, queries, scale, output); break;
    default: attend<256>(keys, values, tokens, group, queries, scale, output); break;
  }
}

}  // namespace tqai::bench

#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif

namespace tqai::bench {

bool has_bf16_attention() noexcept {
  __builtin_cpu_init();
  return __builtin_cpu_supports("avx512bf16") != 0 && __builtin_cpu_supports("avx512bw") != 0;
}

}  // namespace tqai::bench

#else

namespace tqai::bench {

bool has_bf16_attention() noexcept { return false; }
void bf16_attention(const std::uint16_t*, const std::uint16_t*, std::int64_t, int, int,
                    const float*, float, float*) noexcept {}

}  // namespace tqai::bench

#endif
