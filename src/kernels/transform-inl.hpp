// Queries for keys in a learnt basis: y = Fᵀ x in integers of 16 bits, whose products two by two
// take half the time of floats'.
#ifndef TQAI_TRANSFORM_INL
#define TQAI_TRANSFORM_INL

#include <algorithm>
#include <cstring>

#include "floats-inl.hpp"
#include "functions-inl.hpp"
#include "kernels.hpp"
#include "queries-inl.hpp"

namespace tqai::kernels::TQAI_LEVEL_NAMESPACE {
namespace TQAI_LOCAL {

// Sums of kVectorLanes columns, 0 at first. add(pairs, x): + two rows' numbers of each column times
// a pair of a query's.
#if defined(TQAI_X86) && TQAI_VECTOR_LANES == 16
struct ColumnSums {
  ColumnSums() noexcept : sums(_mm512_setzero_si512()) {}
  void add(const std::int16_t* pairs, std::int32_t x) noexcept {
    sums = _mm512_dpwssd_epi32(sums, _mm512_loadu_si512(pairs), _mm512_set1_epi32(x));
  }
  FloatVec floats() const noexcept { return from_native(_mm512_cvtepi32_ps(sums)); }

  __m512i sums;
};
#elif defined(TQAI_X86) && TQAI_VECTOR_LANES == 8
struct ColumnSums {
  ColumnSums() noexcept : sums(_mm256_setzero_si256()) {}
  void add(const std::int16_t* pairs, std::int32_t x) noexcept {
    const __m256i both = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(pairs));
    sums = _mm256_add_epi32(sums, _mm256_madd_epi16(both, _mm256_set1_epi32(x)));
  }
  FloatVec floats() const noexcept { return from_native(_mm256_cvtepi32_ps(sums)); }

  __m256i sums;
};
#elif defined(TQAI_NEON) && defined(__GNUC__)
struct ColumnSums {  // of each row of a pair by itself, two columns a register
  ColumnSums() noexcept : low(vdupq_n_s32(0)), high(vdupq_n_s32(0)) {}
  void add(const std::int16_t* pairs, std::int32_t x) noexcept {
    const int16x8_t both = vld1q_s16(pairs);
    const int16x8_t factors = vreinterpretq_s16_s32(vdupq_n_s32(x));
    low = vmlal_s16(low, vget_low_s16(both), vget_low_s16(factors));
    high = vmlal_high_s16(high, both, factors);
  }
  FloatVec floats() const noexcept { return FloatVec(vcvtq_f32_s32(vpaddq_s32(low, high))); }

  int32x4_t low;
  int32x4_t high;
};
#else
struct ColumnSums {
  void add(const std::int16_t* pairs, std::int32_t x) noexcept {
    std::int16_t factors[2];
    std::memcpy(factors, &x, sizeof factors);
    for (int i = 0; i < kVectorLanes; ++i) {
      sums[i] += pairs[2 * i] * factors[0] + pairs[2 * i + 1] * factors[1];
    }
  }
  FloatVec floats() const noexcept {
    float lanes[kVectorLanes];
    for (int i = 0; i < kVectorLanes; ++i) lanes[i] = static_cast<float>(sums[i]);
    return load_floats(lanes);
  }

  std::int32_t sums[kVectorLanes] = {};
};
#endif

// What queries are rounded to, of kMaxRows at most.
struct RoundedQueries {
  alignas(64) std::int16_t numbers[kMaxRows][kMaxDim];
  float units[kMaxRows];  // what one stands for
};

// x · factors as integers of ±most_query_number.
inline float round_query(const float* __restrict x, const float* __restrict factors, int dim,
                         std::int16_t* __restrict numbers) noexcept {
  float scaled[kMaxDim];
  for (int k = 0; k < dim; ++k) scaled[k] = x[k] * factors[k];
  for (int k = dim; k < padded_dim(dim); ++k) scaled[k] = 0.0F;
  const float largest = largest_magnitude(scaled, padded_dim(dim));
  const auto most = static_cast<float>(most_query_number(dim));
  const float inverse = largest > kNegligible ? most / largest : 0.0F;
  for (int k = 0; k < padded_dim(dim); ++k) {
    numbers[k] = static_cast<std::int16_t>(round_lane(scaled[k] * inverse));
  }
  return largest / most;
}

// kVecs registers of columns of kRows rows.
template <int kRows, int kVecs>
TQAI_ALWAYS_INLINE void transform_columns(const QueryTransform& transform, int dim, int first,
                                          const RoundedQueries& x, std::int64_t stride,
                                          float* y) noexcept {
  constexpr std::ptrdiff_t kPairNumbers = std::ptrdiff_t{2} * kCoordinateBlock;
  constexpr int kBlockVecs = kCoordinateBlock / kVectorLanes;
  const std::ptrdiff_t block_numbers = (dim + 1) / 2 * kPairNumbers;
  const std::int16_t* pairs = transform.numbers + first / kCoordinateBlock * block_numbers +
                              std::ptrdiff_t{2} * (first % kCoordinateBlock);
  ColumnSums sums[kRows][kVecs];
  for (int k = 0; k < dim; k += 2, pairs += kPairNumbers) {
    for (int r = 0; r < kRows; ++r) {
      std::int32_t both;
      std::memcpy(&both, x.numbers[r] + k, sizeof both);
      for (int v = 0; v < kVecs; ++v) {
        sums[r][v].add(pairs + v / kBlockVecs * block_numbers +
                           std::ptrdiff_t{2} * (v % kBlockVecs) * kVectorLanes,
                       both);
      }
    }
  }
  for (int r = 0; r < kRows; ++r) {
    for (int v = 0; v < kVecs; ++v) {
      store_floats(y + r * stride + first + v * kVectorLanes,
                   transform.scale * (x.units[r] * sums[r][v].floats()));
    }
  }
}

// All columns of kRows rows, as many sums in registers as hide the additions' latency.
template <int kRows>
TQAI_NEVER_INLINE void transform_rows(const QueryTransform& transform, int dim,
                                      const RoundedQueries& x, std::int64_t stride,
                                      float* y) noexcept {
  constexpr int kVecs = std::max(8 / kRows, 1);
  int c = 0;
  for (; c + kVecs * kVectorLanes <= padded_dim(dim); c += kVecs * kVectorLanes) {
    transform_columns<kRows, kVecs>(transform, dim, c, x, stride, y);
  }
  for (; c < padded_dim(dim); c += kVectorLanes) {
    transform_columns<kRows, 1>(transform, dim, c, x, stride, y);
  }
}

// Kernels::transform_queries. All rows at once, as reading the matrix takes most of the time.
TQAI_INLINE void transform_queries(const QueryTransform& transform, int dim, const float* queries,
                                   int rows, std::int64_t stride, float* transformed) noexcept {
  RoundedQueries x;
  for (int r = 0; r < rows; ++r) {
    x.units[r] = round_query(queries + r * stride, transform.factors, dim, x.numbers[r]);
  }
  switch (rows) {
    case 1: return transform_rows<1>(transform, dim, x, stride, transformed);
    case 2: return transform_rows<2>(transform, dim, x, stride, transformed);
    case 3: return transform_rows<3>(transform, dim, x, stride, transformed);
    case 4: return transform_rows<4>(transform, dim, x, stride, transformed);
    case 5: return transform_rows<5>(transform, dim, x, stride, transformed);
    case 6: return transform_rows<6>(transform, dim, x, stride, transformed);
    case 7: return transform_rows<7>(transform, dim, x, stride, transformed);
    default: return transform_rows<8>(transform, dim, x, stride, transformed);
  }
}

}  // namespace TQAI_LOCAL
}  // namespace tqai::kernels::TQAI_LEVEL_NAMESPACE

#endif  // TQAI_TRANSFORM_INL
