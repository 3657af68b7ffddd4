// The two quantisers of TurboQuant (arXiv:2504.19874) for single vectors, at any bits and
// dimension: the reference beside the cache, and the paper's reproduction.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <span>
#include <tqai/codebook.hpp>
#include <tqai/export.hpp>
#include <tqai/matrix.hpp>
#include <tqai/rotation.hpp>
#include <tqai/trellis.hpp>
#include <vector>

namespace tqai {

/// What both quantisers do. A vector becomes code_bytes() bytes of codes, little-endian in bits
/// (code i at bits i·b … i·b+b−1 of its run), and norm_count() FP16 norms.
///
/// All arrays are contiguous and row-major; buffers written must not overlap others. Every function
/// throws ValueError for a negative count, a missing buffer or a view of the wrong shape.
/// Immutable: const members may run concurrently.
class TQAI_API VectorQuantizer {
 public:
  virtual ~VectorQuantizer();

  /// Coordinates of a vector.
  int head_dim() const noexcept { return head_dim_; }
  /// Per coordinate.
  int bits() const noexcept { return bits_; }
  /// Bytes of one vector's codes.
  std::size_t code_bytes() const noexcept { return code_bytes_; }
  /// FP16 norms of one vector.
  int norm_count() const noexcept { return norm_count_; }

  /// vectors: [rows, head_dim] fp32. Zero vectors are legal and decode to zeros. Throws ValueError
  /// for NaN, infinity and norms that FP16 cannot hold (codes and norms are then unspecified).
  void encode(const float* vectors, std::int64_t rows, std::uint8_t* codes,
              std::uint16_t* norms) const;

  /// The inverse, up to the quantisation error. codes and norms as `encode` wrote them; any codes
  /// are legal, norms that are not finite come out as such.
  void decode(const std::uint8_t* codes, const std::uint16_t* norms, std::int64_t rows,
              float* vectors) const;

  /// products: [query_rows, rows], of each query with each decoded vector, without un-rotating any.
  /// queries: [query_rows, head_dim] fp32.
  void inner_products(const float* queries, std::int64_t query_rows, const std::uint8_t* codes,
                      const std::uint16_t* norms, std::int64_t rows, float* products) const;

  // The same for Eigen's matrices, maps and blocks whose rows follow one another without gaps
  // (needs <tqai/eigen.hpp>); codes and norms are its CodeMatrix and NormMatrix or views of such.

  /// As above, of each row of `vectors`.
  template <detail::EigenMatrix Vectors, detail::EigenMatrix Codes, detail::EigenMatrix Norms>
  void encode(const Vectors& vectors, Codes&& codes, Norms&& norms) const {
    detail::EigenRows<Vectors>::encode(*this, vectors, codes, norms);
  }
  /// As above, into each row of `vectors`.
  template <detail::EigenMatrix Codes, detail::EigenMatrix Norms, detail::EigenMatrix Vectors>
  void decode(const Codes& codes, const Norms& norms, Vectors&& vectors) const {
    detail::EigenRows<Codes>::decode(*this, codes, norms, vectors);
  }
  /// As above, of each row of `queries` with each vector.
  template <detail::EigenMatrix Queries, detail::EigenMatrix Codes, detail::EigenMatrix Norms,
            detail::EigenMatrix Products>
  void inner_products(const Queries& queries, const Codes& codes, const Norms& norms,
                      Products&& products) const {
    detail::EigenRows<Queries>::inner_products(*this, queries, codes, norms, products);
  }

 protected:
  /// Throws ValueError where head_dim is outside 8…576 or bits outside 1…8.
  VectorQuantizer(int head_dim, int bits);
  /// @{
  /// For classes that derive from it.
  VectorQuantizer(const VectorQuantizer&) = default;
  VectorQuantizer(VectorQuantizer&&) = default;
  VectorQuantizer& operator=(const VectorQuantizer&) = default;
  VectorQuantizer& operator=(VectorQuantizer&&) = default;
  /// @}

  std::size_t code_bytes_ = 0;  ///< code_bytes()
  int norm_count_ = 1;          ///< norm_count()

 private:
  virtual void encode_rows(const float* vectors, std::int64_t rows, std::uint8_t* codes,
                           std::uint16_t* norms) const = 0;
  virtual void decode_rows(const std::uint8_t* codes, const std::uint16_t* norms, std::int64_t rows,
                           float* vectors) const = 0;
  virtual void multiply_rows(const float* queries, std::int64_t query_rows,
                             const std::uint8_t* codes, const std::uint16_t* norms,
                             std::int64_t rows, float* products) const = 0;

  template <typename Matrix>
  friend struct detail::EigenRows;

  static void check_shape(const char* name, std::array<std::int64_t, 2> shape,
                          std::array<std::int64_t, 2> allowed, std::int64_t row_stride);

  int head_dim_;
  int bits_;
};

/// What a Quantizer is made of.
struct QuantizerOptions {
  int head_dim = 0;                                 ///< 8…576
  int bits = 4;                                     ///< 1…8 per coordinate
  RotationKind rotation = RotationKind::automatic;  ///< of all vectors
  std::uint64_t seed = 0x7461'6971;                 ///< of the rotation
  Grid grid = Grid::exact;                          ///< of the codebook
  bool norm_correction = true;                      ///< reconstructions get the original's length
  /// What codes stand for. The trellis has 1…kMaxTrellisBits bits and its own levels, not `grid`'s.
  CodeKind codes = CodeKind::scalar;
};

/// Smallest mean squared error: rotation, then the nearest centroid of each coordinate
/// (arXiv:2504.19874, Alg. 1). Inner products are biased towards zero: by 2/π at 1 bit, before norm
/// correction.
/// With trellis codes, whose stream is the vector's codes, the nearest path of levels is taken in
/// place of centroids: O(256 · head_dim) operations a vector, for a third less error from about 32
/// coordinates on.
/// Differs from the paper: any norm, stored as FP16; with `norm_correction` the norm is divided by
/// that of the quantised unit vector, so that reconstructions have the original length.
class TQAI_API Quantizer final : public VectorQuantizer {
 public:
  /// Throws ValueError for options out of range.
  explicit Quantizer(const QuantizerOptions& options);

  /// As given.
  const QuantizerOptions& options() const noexcept { return options_; }
  /// What vectors go through before they are quantised.
  const Rotation& rotation() const noexcept { return rotation_; }
  /// The centroids of scalar codes.
  const Codebook& codebook() const noexcept { return *codebook_; }

 private:
  void encode_rows(const float* vectors, std::int64_t rows, std::uint8_t* codes,
                   std::uint16_t* norms) const override;
  void decode_rows(const std::uint8_t* codes, const std::uint16_t* norms, std::int64_t rows,
                   float* vectors) const override;
  void multiply_rows(const float* queries, std::int64_t query_rows, const std::uint8_t* codes,
                     const std::uint16_t* norms, std::int64_t rows, float* products) const override;

  void encode_paths(const float* vectors, std::int64_t rows, std::uint8_t* codes,
                    std::uint16_t* norms) const;
  /// Stores a row whose norm, and that of what its codes stand for, are these.
  void store_row(const float* row, std::int64_t index, float norm, float length,
                 const std::uint8_t* row_codes, std::uint8_t* codes, std::uint16_t* norms) const;
  /// What one vector's codes stand for, in units of its norm.
  void unpack(const std::uint8_t* codes, float* unit) const;

  QuantizerOptions options_;
  Rotation rotation_;
  const Codebook* codebook_;          // of the process
  const Trellis* trellis_ = nullptr;  // as well; null for scalar codes
};

/// What a ProdQuantizer is made of.
struct ProdQuantizerOptions {
  int head_dim = 0;  ///< 8…576
  int bits = 4;      ///< 1…8 per coordinate, the sign of the residual's projection included
  RotationKind rotation = RotationKind::automatic;  ///< of all vectors
  std::uint64_t seed = 0x7461'6971;                 ///< of the rotation
  std::uint64_t projection_seed = 0x716A'6C31;  ///< of the Gaussian projection; may equal `seed`
  Grid grid = Grid::exact;                      ///< of the codebook
};

/// Unbiased inner products: `bits` − 1 bits as in Quantizer, without norm correction, and the signs
/// of a Gaussian projection of what they leave (arXiv:2504.19874, Alg. 2; QJL, arXiv:2406.03482).
/// With 1 bit it is the projection alone. Unbiased over projection seeds, at the price of variance.
/// Codes of a vector: the centroids' codes, then one bit a coordinate, each run in whole bytes.
/// Norms: the vector's, then the residual's; with 1 bit only the latter. O(head_dim²) a vector.
class TQAI_API ProdQuantizer final : public VectorQuantizer {
 public:
  /// Throws ValueError for options out of range.
  explicit ProdQuantizer(const ProdQuantizerOptions& options);

  /// As given.
  const ProdQuantizerOptions& options() const noexcept { return options_; }
  /// What vectors go through before they are quantised.
  const Rotation& rotation() const noexcept { return rotation_; }
  /// S, [head_dim, head_dim] row-major; it multiplies rotated residuals.
  std::span<const float> projection() const noexcept { return projection_; }

 private:
  void encode_rows(const float* vectors, std::int64_t rows, std::uint8_t* codes,
                   std::uint16_t* norms) const override;
  void decode_rows(const std::uint8_t* codes, const std::uint16_t* norms, std::int64_t rows,
                   float* vectors) const override;
  void multiply_rows(const float* queries, std::int64_t query_rows, const std::uint8_t* codes,
                     const std::uint16_t* norms, std::int64_t rows, float* products) const override;

  /// One vector's centroids in units of its norm, and its ±1 signs.
  void unpack(const std::uint8_t* codes, float* unit, float* signs) const;

  ProdQuantizerOptions options_;
  Rotation rotation_;
  const Codebook* codebook_ = nullptr;  // of the process; null at 1 bit
  std::size_t centroid_bytes_ = 0;
  std::vector<float> projection_;  // S, [head_dim, head_dim] row-major, and its transpose
  std::vector<float> projection_transposed_;
};

}  // namespace tqai

#if defined(TQAI_HEADER_ONLY) || defined(TQAI_IMPLEMENTATION)
#define TQAI_QUANTIZER_READ
#include <tqai/header_only.hpp>
#endif
