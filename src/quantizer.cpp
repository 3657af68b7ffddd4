#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <limits>
#include <new>
#include <numbers>
#include <string>
#include <tqai/error.hpp>
#include <tqai/half.hpp>
#include <tqai/quantizer.hpp>

#include "random.hpp"
#include "ranges.hpp"
#include "rotate.hpp"
#include "threads.hpp"

namespace tqai {
namespace TQAI_LOCAL {

constexpr std::uint16_t kHalfInfinity = 0x7C00;

constexpr int kShortLanes = 8;  // of the registers that every processor has
#include "trellis-inl.hpp"

TQAI_INLINE std::size_t bytes_for(int codes, int bits) {
  return (static_cast<std::size_t>(codes) * static_cast<std::size_t>(bits) + 7) / 8;
}

// Little-endian in bits: the first code takes the lowest bits of the first byte.
TQAI_INLINE void pack_bits(const std::uint8_t* codes, int count, int bits, std::uint8_t* packed) {
  unsigned pending = 0;
  int filled = 0;
  for (int i = 0; i < count; ++i) {
    pending |= static_cast<unsigned>(codes[i]) << filled;
    for (filled += bits; filled >= 8; filled -= 8) {
      *packed++ = static_cast<std::uint8_t>(pending);
      pending >>= 8;
    }
  }
  if (filled > 0) *packed = static_cast<std::uint8_t>(pending);
}

TQAI_INLINE void unpack_bits(const std::uint8_t* packed, int count, int bits, std::uint8_t* codes) {
  const unsigned mask = (1U << bits) - 1U;
  unsigned pending = 0;
  int filled = 0;
  for (int i = 0; i < count; ++i) {
    if (filled < bits) {
      pending |= static_cast<unsigned>(*packed++) << filled;
      filled += 8;
    }
    codes[i] = static_cast<std::uint8_t>(pending & mask);
    pending >>= bits;
    filled -= bits;
  }
}

TQAI_INLINE float norm_of(const float* x, int dim) {
  float sum = 0.0F;
  for (int i = 0; i < dim; ++i) sum = sum + x[i] * x[i];
  return std::sqrt(sum);
}

TQAI_INLINE float dot(const float* a, const float* b, int dim) {
  constexpr int kLanes = 16;
  float lanes[kLanes] = {};
  int i = 0;
  for (; i + kLanes <= dim; i += kLanes) {
    for (int lane = 0; lane < kLanes; ++lane) lanes[lane] += a[i + lane] * b[i + lane];
  }
  for (int lane = 0; i < dim; ++i, ++lane) lanes[lane] += a[i] * b[i];
  float sum = 0.0F;
  for (const float lane : lanes) sum += lane;
  return sum;
}

TQAI_INLINE std::string text_of(double value) {
  char text[32];
  std::snprintf(text, sizeof text, "%.6g", value);
  return text;
}

/// Says why a row has no finite FP16 norm.
[[noreturn]] TQAI_INLINE void refuse_row(const float* row, std::int64_t index, int dim,
                                         const char* what) {
  const std::string prefix = "row " + std::to_string(index) + ": ";
  double sum = 0.0;
  for (int i = 0; i < dim; ++i) {
    if (!std::isfinite(row[i])) {
      throw ValueError(prefix + "coordinate " + std::to_string(i) + " = " + text_of(row[i]) +
                       "; allowed: finite numbers");
    }
    sum += static_cast<double>(row[i]) * row[i];
  }
  throw ValueError(prefix + what + " of a vector of norm " + text_of(std::sqrt(sum)) +
                   " is beyond FP16; allowed: up to " + text_of(kMaxHalf));
}

/// y = R · row / ‖row‖, or zeros; returns ‖row‖.
TQAI_INLINE float rotated_unit(const Rotation& rotation, const float* row, float* y) {
  const int dim = rotation.head_dim();
  const float norm = norm_of(row, dim);
  const float inverse = norm > 0.0F ? 1.0F / norm : 0.0F;
  for (int i = 0; i < dim; ++i) y[i] = row[i] * inverse;
  rotation.apply(y, y, 1);
  return norm;
}

/// Rotated queries; the inner products need no other rotation: ⟨q, Rᵀŷ⟩ = ⟨Rq, ŷ⟩.
TQAI_INLINE std::vector<float> rotated(const Rotation& rotation, const float* queries,
                                       std::int64_t rows) {
  std::vector<float> result(static_cast<std::size_t>(rows * rotation.head_dim()));
  rotation.apply(queries, result.data(), rows);
  return result;
}

/// E[s · sign⟨s, r⟩] = √(2/π) · r/‖r‖ for Gaussian s: what makes d signs an unbiased estimate
/// (arXiv:2504.19874, Alg. 2, line 11).
TQAI_INLINE float projection_scale(int dim) {
  return static_cast<float>(std::sqrt(std::numbers::pi / 2.0) / dim);
}

// row_floats: of the largest of a row's buffers.
TQAI_INLINE void check_count(const char* name, std::int64_t count, std::int64_t row_floats) {
  constexpr std::int64_t kMost = std::numeric_limits<std::ptrdiff_t>::max() / sizeof(float);
  if (count >= 0 && count <= kMost / std::max<std::int64_t>(row_floats, 1)) return;
  throw ValueError(std::string(name) + " = " + std::to_string(count) + "; allowed: 0 or more" +
                   (count < 0 ? "" : ", of as many as fit into memory"));
}

TQAI_INLINE void check_buffer(const char* name, const void* data, std::int64_t rows) {
  if (data != nullptr || rows == 0) return;
  throw ValueError(std::string(name) + " is a null pointer for " + std::to_string(rows) +
                   " rows; allowed: only for none");
}

}  // namespace TQAI_LOCAL

TQAI_INLINE VectorQuantizer::VectorQuantizer(int head_dim, int bits)
    : head_dim_(checked_head_dim("head_dim", head_dim)), bits_(checked_bits("bits", bits)) {}

TQAI_INLINE VectorQuantizer::~VectorQuantizer() = default;

TQAI_INLINE void VectorQuantizer::encode(const float* vectors, std::int64_t rows,
                                         std::uint8_t* codes, std::uint16_t* norms) const {
  check_count("rows", rows, head_dim_);
  check_buffer("vectors", vectors, rows);
  check_buffer("codes", codes, rows);
  check_buffer("norms", norms, rows);
  const UsualArithmetic usual;
  encode_rows(vectors, rows, codes, norms);
}

TQAI_INLINE void VectorQuantizer::decode(const std::uint8_t* codes, const std::uint16_t* norms,
                                         std::int64_t rows, float* vectors) const {
  check_count("rows", rows, head_dim_);
  check_buffer("codes", codes, rows);
  check_buffer("norms", norms, rows);
  check_buffer("vectors", vectors, rows);
  const UsualArithmetic usual;
  decode_rows(codes, norms, rows, vectors);
}

TQAI_INLINE void VectorQuantizer::inner_products(const float* queries, std::int64_t query_rows,
                                                 const std::uint8_t* codes,
                                                 const std::uint16_t* norms, std::int64_t rows,
                                                 float* products) const {
  check_count("query_rows", query_rows, head_dim_);
  check_count("rows", rows, std::max<std::int64_t>(head_dim_, query_rows));
  check_buffer("queries", queries, query_rows);
  check_buffer("codes", codes, rows);
  check_buffer("norms", norms, rows);
  check_buffer("products", products, query_rows == 0 ? 0 : rows);
  const UsualArithmetic usual;
  multiply_rows(queries, query_rows, codes, norms, rows, products);
}

TQAI_INLINE void VectorQuantizer::check_shape(const char* name, std::array<std::int64_t, 2> shape,
                                              std::array<std::int64_t, 2> allowed,
                                              std::int64_t row_stride) {
  const auto text = [](const std::array<std::int64_t, 2>& s) {
    return "[" + std::to_string(s[0]) + ", " + std::to_string(s[1]) + "]";
  };
  if (shape != allowed) {
    throw ValueError(std::string(name) + " has shape " + text(shape) +
                     "; allowed: " + text(allowed));
  }
  if (shape[0] > 1 && row_stride != shape[1]) {
    throw ValueError(std::string(name) + " has rows " + std::to_string(row_stride) +
                     " elements apart; allowed: contiguous ones, " + std::to_string(shape[1]));
  }
}

TQAI_INLINE Quantizer::Quantizer(const QuantizerOptions& options)
    : VectorQuantizer(options.head_dim, options.bits),
      options_(options),
      rotation_(options.head_dim, options.rotation, options.seed),
      codebook_(&tqai::codebook(options.head_dim, options.bits, options.grid)) {
  check_enumerator("codes", options.codes, CodeKind::trellis);
  if (options.codes == CodeKind::trellis) trellis_ = &tqai::trellis(options.bits);
  code_bytes_ = bytes_for(options.head_dim, options.bits);
}

TQAI_INLINE void Quantizer::store_row(const float* row, std::int64_t index, float norm,
                                      float length, const std::uint8_t* row_codes,
                                      std::uint8_t* codes, std::uint16_t* norms) const {
  if (options_.norm_correction) norm = length > 0.0F ? norm / length : 0.0F;
  norms[index] = to_half(norm);
  if (norms[index] >= kHalfInfinity) refuse_row(row, index, head_dim(), "the stored norm");
  pack_bits(row_codes, head_dim(), bits(), codes + index * static_cast<std::int64_t>(code_bytes()));
}

TQAI_INLINE void Quantizer::encode_rows(const float* vectors, std::int64_t rows,
                                        std::uint8_t* codes, std::uint16_t* norms) const {
  if (trellis_ != nullptr) return encode_paths(vectors, rows, codes, norms);
  const int dim = head_dim();
  const auto levels = codebook_->levels();
  const auto centroids = codebook_->centroids();
  const float step = codebook_->step();
  float y[kMaxHeadDim];
  std::uint8_t row_codes[kMaxHeadDim];
  for (std::int64_t r = 0; r < rows; ++r) {
    const float* row = vectors + r * dim;
    const float norm = rotated_unit(rotation_, row, y);  // arXiv:2504.19874, Alg. 1, line 5
    if (!std::isfinite(norm)) refuse_row(row, r, dim, "the norm");
    for (int i = 0; i < dim; ++i) row_codes[i] = codebook_->encode(y[i]);  // Alg. 1, line 6
    // On the integer grid in units of the step, where the sum is exact; as the kernels do.
    float square = 0.0F;
    for (int i = 0; i < dim; ++i) {
      const float c =
          levels.empty() ? centroids[row_codes[i]] : static_cast<float>(levels[row_codes[i]]);
      square = square + c * c;
    }
    const float length = std::sqrt(levels.empty() ? square : square * (step * step));
    store_row(row, r, norm, length, row_codes, codes, norms);
  }
}

TQAI_INLINE void Quantizer::encode_paths(const float* vectors, std::int64_t rows,
                                         std::uint8_t* codes, std::uint16_t* norms) const {
  const int dim = head_dim();
  const float step = trellis_->step(dim);
  const ThreadMemory memory(1, path_bytes(dim, bits()));
  std::vector<std::int16_t> targets(static_cast<std::size_t>(dim) * kPathLanes);
  std::vector<std::uint8_t> found(targets.size());
  std::uint8_t row_codes[kMaxHeadDim];
  std::int16_t levels[kMaxHeadDim];
  for (std::int64_t first = 0; first < rows; first += kPathLanes) {
    const int count = static_cast<int>(std::min<std::int64_t>(kPathLanes, rows - first));
    float row_norms[kPathLanes];
    std::fill(targets.begin(), targets.end(), std::int16_t{0});
    for (int lane = 0; lane < count; ++lane) {
      float y[kMaxHeadDim];
      const float* row = vectors + (first + lane) * dim;
      row_norms[lane] = rotated_unit(rotation_, row, y);
      if (!std::isfinite(row_norms[lane])) refuse_row(row, first + lane, dim, "the norm");
      for (int i = 0; i < dim; ++i) {
        targets[static_cast<std::size_t>(i * kPathLanes + lane)] = target_of(y[i] * (1.0F / step));
      }
    }
    find_codes(*trellis_, targets.data(), kPathLanes, dim, found.data(), memory.of(0));
    for (int lane = 0; lane < count; ++lane) {
      for (int i = 0; i < dim; ++i) {
        row_codes[i] = found[static_cast<std::size_t>(i * kPathLanes + lane)];
      }
      find_levels(*trellis_, row_codes, 1, dim, levels);
      float square = 0.0F;  // a whole number below 2^24
      for (int i = 0; i < dim; ++i) square = square + static_cast<float>(levels[i] * levels[i]);
      store_row(vectors + (first + lane) * dim, first + lane, row_norms[lane],
                std::sqrt(square * (step * step)), row_codes, codes, norms);
    }
  }
}

TQAI_INLINE void Quantizer::unpack(const std::uint8_t* codes, float* unit) const {
  const int dim = head_dim();
  std::uint8_t row_codes[kMaxHeadDim];
  unpack_bits(codes, dim, bits(), row_codes);
  if (trellis_ != nullptr) {
    find_levels(*trellis_, row_codes, 1, dim, unit);
    scale_row(unit, dim, trellis_->step(dim));
    return;
  }
  const auto centroids = codebook_->centroids();
  for (int i = 0; i < dim; ++i) unit[i] = centroids[row_codes[i]];
}

TQAI_INLINE void Quantizer::decode_rows(const std::uint8_t* codes, const std::uint16_t* norms,
                                        std::int64_t rows, float* vectors) const {
  const int dim = head_dim();
  for (std::int64_t r = 0; r < rows; ++r) {
    float* row = vectors + r * dim;
    unpack(codes + r * static_cast<std::int64_t>(code_bytes()), row);
    rotation_.apply_transposed(row, row, 1);  // arXiv:2504.19874, Alg. 1, line 10
    scale_row(row, dim, from_half(norms[r]));
  }
}

TQAI_INLINE void Quantizer::multiply_rows(const float* queries, std::int64_t query_rows,
                                          const std::uint8_t* codes, const std::uint16_t* norms,
                                          std::int64_t rows, float* products) const {
  const int dim = head_dim();
  const std::vector<float> rotated_queries = rotated(rotation_, queries, query_rows);
  float unit[kMaxHeadDim];
  for (std::int64_t r = 0; r < rows; ++r) {
    unpack(codes + r * static_cast<std::int64_t>(code_bytes()), unit);
    const float norm = from_half(norms[r]);
    for (std::int64_t q = 0; q < query_rows; ++q) {
      products[q * rows + r] = norm * dot(rotated_queries.data() + q * dim, unit, dim);
    }
  }
}

TQAI_INLINE ProdQuantizer::ProdQuantizer(const ProdQuantizerOptions& options)
    : VectorQuantizer(options.head_dim, options.bits),
      options_(options),
      rotation_(options.head_dim, options.rotation, options.seed) {
  const UsualArithmetic usual;
  const int dim = options.head_dim;
  const bool has_centroids = options.bits > 1;
  if (has_centroids) codebook_ = &tqai::codebook(dim, options.bits - 1, options.grid);
  centroid_bytes_ = bytes_for(dim, options.bits - 1);
  code_bytes_ = centroid_bytes_ + bytes_for(dim, 1);
  norm_count_ = has_centroids ? 2 : 1;
  // Another stream than Rotation's: with equal seeds its Gaussian would be the same matrix.
  constexpr std::uint64_t kStream = 0x514A'4C5F'6761'7573;
  Gaussian random(SplitMix64(options.projection_seed ^ kStream).next());
  const auto size = static_cast<std::size_t>(dim);
  projection_.resize(size * size);
  projection_transposed_.resize(size * size);
  for (std::size_t i = 0; i < size; ++i) {
    for (std::size_t k = 0; k < size; ++k) {
      const auto entry = static_cast<float>(random.next());
      projection_[i * size + k] = entry;
      projection_transposed_[k * size + i] = entry;
    }
  }
}

TQAI_INLINE void ProdQuantizer::encode_rows(const float* vectors, std::int64_t rows,
                                            std::uint8_t* codes, std::uint16_t* norms) const {
  const int dim = head_dim();
  float residual[kMaxHeadDim];
  float projected[kMaxHeadDim];
  std::uint8_t row_codes[kMaxHeadDim];
  for (std::int64_t r = 0; r < rows; ++r) {
    const float* row = vectors + r * dim;
    std::uint8_t* packed = codes + r * static_cast<std::int64_t>(code_bytes());
    std::uint16_t* row_norms = norms + r * norm_count();
    const float norm = rotated_unit(rotation_, row, residual);
    if (!std::isfinite(norm)) refuse_row(row, r, dim, "the norm");
    if (codebook_ == nullptr) {
      scale_row(residual, dim, norm);
    } else {
      // arXiv:2504.19874, Alg. 2, lines 5 and 6. The residual is of what the decoder will see: norm
      // rounded.
      row_norms[0] = to_half(norm);
      if (row_norms[0] >= kHalfInfinity) refuse_row(row, r, dim, "the norm");
      const float stored = from_half(row_norms[0]);
      const auto centroids = codebook_->centroids();
      for (int i = 0; i < dim; ++i) {
        row_codes[i] = codebook_->encode(residual[i]);
        residual[i] = norm * residual[i] - stored * centroids[row_codes[i]];
      }
      pack_bits(row_codes, dim, bits() - 1, packed);
    }
    const std::uint16_t length = to_half(norm_of(residual, dim));
    if (length >= kHalfInfinity) refuse_row(row, r, dim, "the residual's norm");
    row_norms[norm_count() - 1] = length;
    // Alg. 2, line 7. Differs from the paper: S multiplies the rotated residual, which spares two
    // rotations; S·R has the law of S.
    matrix_row(projection_transposed_.data(), residual, dim, projected);
    for (int i = 0; i < dim; ++i) row_codes[i] = projected[i] >= 0.0F ? 1 : 0;
    pack_bits(row_codes, dim, 1, packed + centroid_bytes_);
  }
}

TQAI_INLINE void ProdQuantizer::unpack(const std::uint8_t* codes, float* unit, float* signs) const {
  const int dim = head_dim();
  std::uint8_t row_codes[kMaxHeadDim];
  unpack_bits(codes + centroid_bytes_, dim, 1, row_codes);
  for (int i = 0; i < dim; ++i) signs[i] = row_codes[i] != 0 ? 1.0F : -1.0F;
  if (codebook_ == nullptr) {
    for (int i = 0; i < dim; ++i) unit[i] = 0.0F;
    return;
  }
  const auto centroids = codebook_->centroids();
  unpack_bits(codes, dim, bits() - 1, row_codes);
  for (int i = 0; i < dim; ++i) unit[i] = centroids[row_codes[i]];
}

TQAI_INLINE void ProdQuantizer::decode_rows(const std::uint8_t* codes, const std::uint16_t* norms,
                                            std::int64_t rows, float* vectors) const {
  const int dim = head_dim();
  const float scale = projection_scale(dim);
  float unit[kMaxHeadDim];
  float signs[kMaxHeadDim];
  float residual[kMaxHeadDim];
  for (std::int64_t r = 0; r < rows; ++r) {
    const std::uint16_t* row_norms = norms + r * norm_count();
    const float norm = from_half(row_norms[0]);
    const float length = from_half(row_norms[norm_count() - 1]);
    unpack(codes + r * static_cast<std::int64_t>(code_bytes()), unit, signs);
    matrix_row(projection_.data(), signs, dim, residual);
    float* row = vectors + r * dim;
    for (int i = 0; i < dim; ++i) row[i] = norm * unit[i] + scale * length * residual[i];
    rotation_.apply_transposed(row, row, 1);
  }
}

TQAI_INLINE void ProdQuantizer::multiply_rows(const float* queries, std::int64_t query_rows,
                                              const std::uint8_t* codes, const std::uint16_t* norms,
                                              std::int64_t rows, float* products) const {
  const int dim = head_dim();
  const float scale = projection_scale(dim);
  const std::vector<float> rotated_queries = rotated(rotation_, queries, query_rows);
  std::vector<float> projected(rotated_queries.size());
  for (std::int64_t q = 0; q < query_rows; ++q) {
    matrix_row(projection_transposed_.data(), rotated_queries.data() + q * dim, dim,
               projected.data() + q * dim);
  }
  float unit[kMaxHeadDim];
  float signs[kMaxHeadDim];
  for (std::int64_t r = 0; r < rows; ++r) {
    const std::uint16_t* row_norms = norms + r * norm_count();
    const float norm = from_half(row_norms[0]);
    const float length = from_half(row_norms[norm_count() - 1]);
    unpack(codes + r * static_cast<std::int64_t>(code_bytes()), unit, signs);
    for (std::int64_t q = 0; q < query_rows; ++q) {
      const float estimate = scale * length * dot(projected.data() + q * dim, signs, dim);
      products[q * rows + r] = norm * dot(rotated_queries.data() + q * dim, unit, dim) + estimate;
    }
  }
}

}  // namespace tqai
