// Complex numbers of several rows side by side, (real, imaginary) of one row after another: in
// registers, or as much of one as they need. Lane by lane the same at any width.
#ifndef TQAI_COMPLEX_INL
#define TQAI_COMPLEX_INL

#include <cstring>

#include "floats-inl.hpp"

namespace tqai::kernels::TQAI_LEVEL_NAMESPACE {
namespace TQAI_LOCAL {

// kFloats: factor_lanes of some number of rows.
template <int kFloats>
struct ComplexRows {
  static constexpr int kWidth = kFloats > kVectorLanes ? kVectorLanes : kFloats < 4 ? 4 : kFloats;
  static constexpr int kParts = (kFloats + kWidth - 1) / kWidth;
  using Vec = Floats<kWidth>;

  // Of one row alone, lanes repeat it.
  static Vec load(const float* from, int part) noexcept {
    if constexpr (kFloats == 2) {
      return broadcast_pair<Vec>(from);
    } else {
      return load_floats<Vec>(from + part * kWidth);
    }
  }
  static void store(float* to, int part, Vec numbers) noexcept {
    if constexpr (kFloats == 2) {
      std::memcpy(to, &numbers, 2 * sizeof(float));
    } else {
      store_floats(to + part * kWidth, numbers);
    }
  }

  // numbers · (real + i imaginary): of the two products of each part the second is rounded first.
  static Vec times(Vec numbers, float real, float imaginary) noexcept {
#if defined(TQAI_X86) && TQAI_VECTOR_LANES >= 8
    constexpr int kSwapped = 0xB1;  // lanes 1, 0, 3, 2
    if constexpr (kWidth == 4) {
      const __m128 x = as<__m128>(numbers);
      const __m128 crossed = _mm_mul_ps(_mm_permute_ps(x, kSwapped), _mm_set1_ps(imaginary));
      return as<Vec>(_mm_fmaddsub_ps(x, _mm_set1_ps(real), crossed));
    } else if constexpr (kWidth == 8) {
      const __m256 x = as<__m256>(numbers);
      const __m256 crossed =
          _mm256_mul_ps(_mm256_permute_ps(x, kSwapped), _mm256_set1_ps(imaginary));
      return as<Vec>(_mm256_fmaddsub_ps(x, _mm256_set1_ps(real), crossed));
    }
#if TQAI_VECTOR_LANES == 16
    else {
      const __m512 x = as<__m512>(numbers);
      const __m512 crossed =
          _mm512_mul_ps(_mm512_permute_ps(x, kSwapped), _mm512_set1_ps(imaginary));
      return as<Vec>(_mm512_fmaddsub_ps(x, _mm512_set1_ps(real), crossed));
    }
#endif
#else
    const float turns[2] = {-imaginary, imaginary};
    return fused_lanes(numbers, broadcast_float<Vec>(real),
                       swap_pairs(numbers) * broadcast_pair<Vec>(turns));
#endif
  }

  // a · b + c of each lane.
  static Vec fused_lanes(Vec a, Vec b, Vec c) noexcept {
    if constexpr (kWidth == kVectorLanes) {
      return fused(a, b, c);
    }
#if defined(TQAI_X86) && TQAI_VECTOR_LANES >= 8
    else if constexpr (kWidth == 4) {
      return as<Vec>(_mm_fmadd_ps(as<__m128>(a), as<__m128>(b), as<__m128>(c)));
    } else {
      return as<Vec>(_mm256_fmadd_ps(as<__m256>(a), as<__m256>(b), as<__m256>(c)));
    }
#endif
  }

 private:
  template <typename To, typename From>
  static To as(From from) noexcept {
    static_assert(sizeof(To) == sizeof(From));
    To to;
    std::memcpy(&to, &from, sizeof to);
    return to;
  }
};

}  // namespace TQAI_LOCAL
}  // namespace tqai::kernels::TQAI_LEVEL_NAMESPACE

#endif  // TQAI_COMPLEX_INL
