// Lloyd–Max codebooks of one coordinate of a uniformly random unit vector.
#pragma once

#include <cstdint>
#include <span>
#include <tqai/export.hpp>
#include <vector>

namespace tqai {

/// `exact`: the optimal centroids. `int8`: the best centroids among integer multiples of one step,
/// which the integer kernels multiply without rounding anything again.
enum class Grid : std::uint8_t { exact, int8 };

/// Up to so many bits the levels of the int8 grid are within ±63: then two products with an 8-bit
/// factor fit into 16 bits, which AVX2's fastest instruction needs. It costs 0.2 % of distortion at
/// 4 bits and nothing below.
inline constexpr int kNarrowBits = 4;
/// The largest of those levels.
inline constexpr int kMaxNarrowLevel = 63;

/// 2^bits centroids for the law of a unit vector's coordinate, density ∝ (1−t²)^((d−3)/2) on
/// [−1, 1] (arXiv:2504.19874, Lemma 1), with the midpoints between them. Immutable.
class TQAI_API Codebook {
 public:
  /// Solves the codebook: `head_dim` 8…576, `bits` 1…8, else ValueError. Milliseconds; prefer
  /// `codebook()`, which solves each once.
  Codebook(int head_dim, int bits, Grid grid);

  /// Coordinates of the vectors whose law it is.
  int head_dim() const noexcept { return head_dim_; }
  /// Of a code.
  int bits() const noexcept { return bits_; }
  /// Where centroids may lie.
  Grid grid() const noexcept { return grid_; }

  /// [2^bits], ascending, in units of the vector's norm.
  std::span<const float> centroids() const noexcept { return centroids_; }
  /// [2^bits − 1]: code i is nearest for t in [boundary i−1, boundary i).
  std::span<const float> boundaries() const noexcept { return boundaries_; }
  /// [2^bits], int8 grid only (else empty): centroid i = step() · levels()[i]. Within ±63 up to
  /// kNarrowBits, else within ±127; at 8 bits level i is
  /// i − 128.
  std::span<const std::int8_t> levels() const noexcept { return levels_; }
  /// Distance of neighbouring grid points; 0 for the exact grid.
  float step() const noexcept { return step_; }

  /// Code of the centroid nearest to `coordinate`; a tie takes the upper one. NaN is not allowed.
  std::uint8_t encode(float coordinate) const noexcept;

  /// Expected ‖x − x̂‖² of a unit vector: head_dim · E[(t − c(t))²].
  double distortion() const noexcept { return distortion_; }

 private:
  int head_dim_;
  int bits_;
  Grid grid_;
  std::vector<float> centroids_;
  std::vector<float> boundaries_;
  std::vector<std::int8_t> levels_;
  float step_ = 0.0F;
  double distortion_ = 0.0;
};

/// The codebook, solved at the first call and kept for the life of the process. Thread-safe.
TQAI_API const Codebook& codebook(int head_dim, int bits, Grid grid);

}  // namespace tqai

#if defined(TQAI_HEADER_ONLY) || defined(TQAI_IMPLEMENTATION)
#include <tqai/header_only.hpp>
#endif
