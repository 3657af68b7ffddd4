#include <algorithm>
#include <bit>
#include <cmath>
#include <cstring>
#include <iterator>
#include <limits>
#include <string>
#include <tqai/cache.hpp>
#include <tqai/half.hpp>
#include <tqai/key_basis.hpp>
#include <utility>

#include "cache/check.hpp"
#include "decompositions.hpp"
#include "key_moments.hpp"
#include "ranges.hpp"
#include "threads.hpp"

namespace tqai {
namespace TQAI_LOCAL {

constexpr std::uint32_t kBasisMagic = 0x424B'5154;  // "TQKB"
constexpr std::uint32_t kBasisVersion = 1;

// A share of even energy in both moments: what few tokens show of the smallest directions is noise.
constexpr double kEvenShare = 0.05;
// Of the query metric's exponent ½: all of it amplifies directions that the queries seen happen not
// to use.
constexpr double kMetricExponent = 0.25;
// Norms of keys like those learnt from, in tiles: FP16 has room for some 2^14 times longer ones,
// less what a closed loop may need, and is fine down to 1/256 of it.
constexpr double kUsualNorm = 0x1p-6;
// Between these F's largest number is; beyond, products with the largest queries could overflow.
constexpr int kLeastExponent = -40;
constexpr int kLargestExponent = 17;
constexpr int kMostScale = 64;

// Of mean energy 1 a coordinate, with a share of it spread evenly. Without any energy: all of it.
TQAI_INLINE SquareMatrix normalised(const std::vector<double>& moments, std::size_t dim,
                                    double energy) {
  SquareMatrix matrix =
      detail::matrix_of(moments, dim, energy > 0.0 ? (1.0 - kEvenShare) / energy : 0.0);
  for (std::size_t i = 0; i < dim; ++i) matrix.row(i)[i] += energy > 0.0 ? kEvenShare : 1.0;
  return matrix;
}

// matrix^exponent of a positive definite one.
TQAI_INLINE SquareMatrix power(const SquareMatrix& matrix, double exponent) {
  const std::size_t dim = matrix.dim();
  const Spectrum of = eigenvectors(matrix);
  SquareMatrix scaled(dim);
  SquareMatrix columns(dim);
  for (std::size_t i = 0; i < dim; ++i) {
    const double value = std::max(of.values[i], 1e-12 * of.values.front());
    for (std::size_t j = 0; j < dim; ++j) {
      scaled.row(i)[j] = std::pow(value, exponent) * of.vectors.row(i)[j];
      columns.row(j)[i] = of.vectors.row(i)[j];
    }
  }
  return product(columns, scaled);
}

// The level θ of reverse water-filling (Cover, Thomas: Elements of Information Theory, §10.3.3) at
// `bits` bits a coordinate on average: the mean of ½ log2 max(λ/θ, 1) is that many.
TQAI_INLINE double water_level(const std::vector<double>& variances, int bits) {
  double high = *std::max_element(variances.begin(), variances.end());
  double low = 1e-12 * high;
  for (int step = 0; step < 60; ++step) {
    const double level = std::sqrt(low * high);
    double rate = 0.0;
    for (const double variance : variances)
      rate += 0.5 * std::log2(std::max(variance / level, 1.0));
    (rate > bits * static_cast<double>(variances.size()) ? low : high) = level;
  }
  return low;
}

TQAI_INLINE double largest_entry(const SquareMatrix& matrix) {
  double largest = 0.0;
  for (std::size_t i = 0; i < matrix.dim() * matrix.dim(); ++i) {
    largest = std::max(largest, std::abs(matrix.row(0)[i]));
  }
  return largest;
}

// The least power of two above.
TQAI_INLINE int exponent_above(double value) {
  int exponent = 0;
  static_cast<void>(std::frexp(value, &exponent));
  return exponent;
}

// The matrix over `scale` as FP16 bits; it becomes what they stand for.
TQAI_INLINE void round_to_halves(SquareMatrix& matrix, double scale, std::uint16_t* halves) {
  for (std::size_t i = 0; i < matrix.dim() * matrix.dim(); ++i) {
    halves[i] = to_half(static_cast<float>(matrix.row(0)[i] / scale));
    matrix.row(0)[i] = static_cast<double>(from_half(halves[i])) * scale;
  }
}

// √(‖A‖₁ ‖A‖∞), which no vector is stretched beyond.
TQAI_INLINE double stretch_bound(const SquareMatrix& matrix) {
  const std::size_t dim = matrix.dim();
  std::vector<double> columns(dim);
  double most = 0.0;
  for (std::size_t i = 0; i < dim; ++i) {
    double sum = 0.0;
    for (std::size_t j = 0; j < dim; ++j) {
      sum += std::abs(matrix.row(i)[j]);
      columns[j] += std::abs(matrix.row(i)[j]);
    }
    most = std::max(most, sum);
  }
  return std::sqrt(most * *std::max_element(columns.begin(), columns.end()));
}

// Of a unit lower triangular matrix.
TQAI_INLINE SquareMatrix inverse_of_lower(const SquareMatrix& lower) {
  const std::size_t dim = lower.dim();
  SquareMatrix result = SquareMatrix::identity(dim);
  for (std::size_t i = 0; i < dim; ++i) {
    for (std::size_t k = 0; k < i; ++k) {
      for (std::size_t j = 0; j <= k; ++j) result.row(i)[j] -= lower.row(i)[k] * result.row(k)[j];
    }
  }
  return result;
}

// Where Head::query_numbers has F_kc.
TQAI_INLINE std::size_t query_index(std::size_t k, std::size_t c, std::size_t dim) {
  constexpr std::size_t kColumns = kCoordinateBlock;
  return ((c / kColumns * ((dim + 1) / 2) + k / 2) * kColumns + c % kColumns) * 2 + k % 2;
}

// FNV-1a (draft-eastlake-fnv).
TQAI_INLINE std::uint64_t hash_of(std::span<const std::byte> bytes) {
  std::uint64_t hash = 0xCBF2'9CE4'8422'2325;
  for (const std::byte byte : bytes) {
    hash = (hash ^ static_cast<std::uint64_t>(byte)) * 0x0000'0100'0000'01B3;
  }
  return hash;
}

// What a basis' bytes begin with; its scales, its matrices and its id follow.
struct BasisBytes {
  std::uint32_t magic = kBasisMagic;
  std::uint32_t version = kBasisVersion;
  std::int32_t kv_heads = 0;
  std::int32_t head_dim = 0;
  std::int32_t bits = 0;
};

TQAI_INLINE void check_basis_order() {
  if constexpr (std::endian::native != std::endian::little) {
    throw UnsupportedError("bases are written and read on little-endian processors only");
  }
}

[[noreturn]] TQAI_INLINE void refuse_basis(const std::string& what) {
  throw ValueError("not the bytes of a key basis, or damaged: " + what);
}

}  // namespace TQAI_LOCAL

TQAI_INLINE KeyBasis::KeyBasis(int kv_heads, int head_dim, int bits)
    : kv_heads_(kv_heads),
      head_dim_(checked_head_dim("head_dim", head_dim)),
      bits_(checked_bits("bits", bits)) {
  check_range("kv_heads", kv_heads, 1, detail::kMostKvHeads);
  scales_.resize(2 * static_cast<std::size_t>(kv_heads));
}

TQAI_INLINE std::size_t KeyBasis::head_halves() const noexcept {
  const auto dim = static_cast<std::size_t>(head_dim_);
  return 2 * dim * dim + (dim * dim - dim) / 2;
}

TQAI_INLINE std::size_t KeyBasis::head_numbers() const noexcept {
  const auto padded = static_cast<std::size_t>(padded_dim(head_dim_));
  return (static_cast<std::size_t>(head_dim_) + 1) / 2 * padded * 2;
}

TQAI_INLINE void KeyBasis::reserve() {
  const auto heads = static_cast<std::size_t>(kv_heads_);
  halves_.resize(heads * head_halves());
  numbers_.resize(heads * head_numbers());
  factors_.resize(heads * (static_cast<std::size_t>(head_dim_) + 1));
}

TQAI_INLINE std::size_t KeyBasis::bytes() const noexcept {
  return halves_.size() * sizeof(std::uint16_t) + numbers_.size() * sizeof(std::int16_t) +
         (scales_.size() + factors_.size()) * sizeof(float);
}

TQAI_INLINE std::size_t KeyBasis::bytes_of(int kv_heads, int head_dim) {
  const KeyBasis none(kv_heads, head_dim, 1);
  const std::size_t head = none.head_halves() * sizeof(std::uint16_t) +
                           none.head_numbers() * sizeof(std::int16_t) +
                           (static_cast<std::size_t>(head_dim) + 3) * sizeof(float);
  return static_cast<std::size_t>(kv_heads) * head;
}

TQAI_INLINE KeyBasis KeyBasis::learn(const KeyMoments& moments, int bits,
                                     std::int64_t last_position) {
  const UsualArithmetic usual;
  KeyBasis basis(moments.kv_heads(), moments.head_dim(), bits);
  basis.reserve();
  for (int head = 0; head < basis.kv_heads_; ++head) {
    const std::vector<double> keys = moments.keys_until(head, last_position);
    const std::vector<double> queries = moments.queries_until(head, last_position);
    const auto finite = [](double moment) { return std::isfinite(moment); };
    if (!std::ranges::all_of(keys, finite) || !std::ranges::all_of(queries, finite)) {
      throw ValueError("kv head " + std::to_string(head) +
                       " has moments that are too large to be finite: of its prior, or of keys or "
                       "queries far from what a model has");
    }
    basis.learn_head(head, keys, queries);
  }
  if (const std::string fault = basis.fault(); !fault.empty()) {
    throw ValueError("keys or queries of a size that no basis is for (" + fault + ")");
  }
  basis.finish();
  return basis;
}

// With C and M the moments of keys and queries, S = M^¼, and S C S = U Λ Uᵀ: the geometric mean
// decomposition of √(Λ + θ) gives P and L, and E = Pᵀ Uᵀ S. Then E r has the moments L Lᵀ, less
// those of the noise: each coordinate, less what L says of those before it, is as large as any
// other. This is generalised triangular decomposition transform coding (Weng, Chen, Vaidyanathan,
// IEEE Transactions on Signal Processing 58, 2010) with the noise in its prediction (Zamir,
// Kochman, Erez, IEEE Transactions on Information Theory 54, 2008).
TQAI_INLINE void KeyBasis::learn_head(int head, const std::vector<double>& keys,
                                      const std::vector<double>& queries) {
  const auto dim = static_cast<std::size_t>(head_dim_);
  const double energy = detail::mean_diagonal(keys, dim);
  const SquareMatrix metric =
      power(normalised(queries, dim, detail::mean_diagonal(queries, dim)), kMetricExponent);
  const Spectrum seen =
      eigenvectors(product(metric, product(normalised(keys, dim, energy), metric)));
  const double level = water_level(seen.values, bits_);
  std::vector<double> lengths;
  double logarithms = 0.0;
  for (const double value : seen.values) {
    lengths.push_back(std::sqrt(std::max(value, 0.0) + level));
    logarithms += std::log(lengths.back());
  }
  const double mean = std::exp(logarithms / static_cast<double>(dim));
  SquareMatrix analysis = product(seen.vectors, metric);
  // Moments of queries before Qᵀ, of which Fᵀ q = Qᵀ √(Λ + θ) Uᵀ S⁻¹ q / mean.
  static_assert(kMetricExponent == 0.25);  // so that S⁻¹ M S⁻¹ = S²
  SquareMatrix read = product(analysis, transposed(analysis));
  for (std::size_t i = 0; i < dim; ++i) {
    for (std::size_t j = 0; j < dim; ++j) read.row(i)[j] *= lengths[i] * lengths[j];
  }
  SquareMatrix feedback = geometric_mean_decomposition(lengths, analysis, std::move(read));

  // Innovations of keys like these have the length `mean` · √dim.
  double factor = kUsualNorm / (mean * std::sqrt(static_cast<double>(dim)) *
                                std::sqrt(energy > 0.0 ? energy : 1.0));
  const double inverse_size = largest_entry(product(inverse(analysis), feedback)) / factor;  // of F
  const int exponent = exponent_above(inverse_size);
  factor = std::ldexp(factor, exponent - std::clamp(exponent, kLeastExponent, kLargestExponent));
  for (std::size_t i = 0; i < dim * dim; ++i) analysis.row(0)[i] *= factor;

  std::uint16_t* halves = halves_.data() + static_cast<std::size_t>(head) * head_halves();
  const double analysis_scale = std::ldexp(1.0, exponent_above(largest_entry(analysis)));
  round_to_halves(analysis, analysis_scale, halves);
  halves += dim * dim;
  for (std::size_t i = 0; i < dim; ++i) {
    for (std::size_t j = 0; j < i; ++j, ++halves) {
      *halves = to_half(static_cast<float>(feedback.row(i)[j]));
      feedback.row(i)[j] = static_cast<double>(from_half(*halves));
    }
  }
  // Of E and L as they are stored.
  SquareMatrix synthesis = product(inverse(analysis), feedback);
  const double synthesis_scale = std::ldexp(1.0, exponent_above(largest_entry(synthesis)));
  round_to_halves(synthesis, synthesis_scale, halves);
  scales_[2 * static_cast<std::size_t>(head)] = static_cast<float>(analysis_scale);
  scales_[2 * static_cast<std::size_t>(head) + 1] = static_cast<float>(synthesis_scale);
}

TQAI_INLINE KeyBasis::Head KeyBasis::head(int head) const {
  if (head < 0 || head >= kv_heads_) {
    throw IndexError("kv head " + std::to_string(head) + " of " + std::to_string(kv_heads_));
  }
  const auto index = static_cast<std::size_t>(head);
  const auto dim = static_cast<std::size_t>(head_dim_);
  const std::size_t full = dim * dim;
  const std::span<const std::uint16_t> all =
      std::span(halves_).subspan(index * head_halves(), head_halves());
  const std::size_t count = head_numbers();
  const auto factors = std::span(factors_).subspan(index * (dim + 1), dim + 1);
  return {all.first(full),        all.subspan(full, all.size() - 2 * full),
          all.last(full),         scales_[2 * index],
          scales_[2 * index + 1], std::span(numbers_).subspan(index * count, count),
          factors.first(dim),     factors.back()};
}

TQAI_INLINE std::string KeyBasis::fault() const {
  for (const float scale : scales_) {
    int exponent = 0;
    if (!(std::isfinite(scale) && std::frexp(scale, &exponent) == 0.5F &&
          std::abs(exponent) <= kMostScale)) {
      return "a scale of " + detail::number_text(scale);
    }
  }
  for (int head = 0; head < kv_heads_; ++head) {
    if (scales_[2 * static_cast<std::size_t>(head) + 1] > std::ldexp(1.0F, kLargestExponent)) {
      return "a synthesis that is too large";
    }
  }
  for (const std::uint16_t half : halves_) {
    if ((half & 0x7C00U) == 0x7C00U) return "a number that is NaN or infinite";
  }
  for (int head = 0; head < kv_heads_; ++head) {
    const Head of = this->head(head);
    for (const auto& square : {of.analysis, of.synthesis}) {
      constexpr std::uint16_t kOne = 0x3C00;
      for (const std::uint16_t half : square) {
        if ((half & 0x7FFFU) > kOne) return "a number that is larger than its scale";
      }
    }
  }
  return {};
}

// Rows by powers of two alike in length, so that each part of a query is rounded alike in what it
// adds to the product: queries may have coordinates hundreds of times as large as others.
TQAI_INLINE void KeyBasis::round_for_queries(int head) {
  const auto dim = static_cast<std::size_t>(head_dim_);
  const Head of = this->head(head);
  std::int16_t* numbers = numbers_.data() + static_cast<std::size_t>(head) * head_numbers();
  float* factors = factors_.data() + static_cast<std::size_t>(head) * (dim + 1);
  SquareMatrix rows(dim);
  std::vector<double> columns2(dim);
  for (std::size_t k = 0; k < dim; ++k) {
    double length2 = 0.0;
    for (std::size_t c = 0; c < dim; ++c) {
      const double number =
          static_cast<double>(from_half(of.synthesis[k * dim + c]) * of.synthesis_scale);
      rows.row(k)[c] = number;
      length2 += number * number;
    }
    const double factor = length2 > 0.0 ? std::ldexp(1.0, exponent_above(std::sqrt(length2))) : 0.0;
    factors[k] = static_cast<float>(factor);
    for (std::size_t c = 0; c < dim && factor > 0.0; ++c) {
      rows.row(k)[c] /= factor;
      columns2[c] += rows.row(k)[c] * rows.row(k)[c];
    }
  }
  constexpr int kLonger = 12;  // by rounding: √dim / 2
  static_assert(kMaxHeadDim <= 4 * kLonger * kLonger);
  const double longest = std::sqrt(*std::ranges::max_element(columns2));
  const double scale = longest > 0.0 ? longest / (kMostColumn - kLonger) : 1.0;
  for (std::size_t k = 0; k < dim; ++k) {
    for (std::size_t c = 0; c < dim; ++c) {
      numbers[query_index(k, c, dim)] =
          static_cast<std::int16_t>(std::lround(rows.row(k)[c] / scale));
    }
  }
  factors[dim] = static_cast<float>(scale);
}

TQAI_INLINE void KeyBasis::finish() {
  for (int h = 0; h < kv_heads_; ++h) round_for_queries(h);
  const auto dim = static_cast<std::size_t>(head_dim_);
  double largest = 0.0;
  for (int h = 0; h < kv_heads_; ++h) {
    const Head of = head(h);
    SquareMatrix analysis(dim);
    for (std::size_t i = 0; i < dim * dim; ++i) {
      analysis.row(0)[i] = static_cast<double>(from_half(of.analysis[i]) * of.analysis_scale);
    }
    SquareMatrix lower = SquareMatrix::identity(dim);
    std::size_t next = 0;
    for (std::size_t i = 0; i < dim; ++i) {
      for (std::size_t j = 0; j < i; ++j) {
        lower.row(i)[j] = static_cast<double>(from_half(of.feedback[next++]));
      }
    }
    largest = std::max(largest, stretch_bound(analysis) * stretch_bound(inverse_of_lower(lower)));
  }
  // Bytes from elsewhere may hold an L that no number bounds.
  constexpr double kMost = std::numeric_limits<float>::max();
  largest_ratio_ = static_cast<float>(largest < kMost ? largest : kMost);
  const std::vector<std::byte> bytes = serialize();
  id_ = hash_of(std::span(bytes).first(bytes.size() - sizeof id_));
}

TQAI_INLINE std::vector<std::byte> KeyBasis::serialize() const {
  check_basis_order();
  const BasisBytes beginning{.kv_heads = kv_heads_, .head_dim = head_dim_, .bits = bits_};
  const std::size_t scale_bytes = scales_.size() * sizeof(float);
  std::vector<std::byte> all;
  all.reserve(sizeof beginning + scale_bytes + halves_.size() * sizeof(std::uint16_t) + sizeof id_);
  const auto write = [&all](std::span<const std::byte> part) {
    std::copy(part.begin(), part.end(), std::back_inserter(all));
  };
  write(std::as_bytes(std::span(&beginning, 1)));
  write(std::as_bytes(std::span(scales_)));
  write(std::as_bytes(std::span(halves_)));
  write(std::as_bytes(std::span(&id_, 1)));
  return all;
}

TQAI_INLINE KeyBasis KeyBasis::deserialize(std::span<const std::byte> bytes) {
  const UsualArithmetic usual;
  check_basis_order();
  BasisBytes beginning;
  if (bytes.size() < sizeof beginning) refuse_basis("it ends too early");
  std::memcpy(&beginning, bytes.data(), sizeof beginning);
  if (beginning.magic != kBasisMagic) refuse_basis("it does not begin as one");
  if (beginning.version != kBasisVersion) {
    throw ValueError("the key basis is of format version " + std::to_string(beginning.version) +
                     "; this tqai reads version " + std::to_string(kBasisVersion) +
                     ": use the tqai that wrote it, or a newer one");
  }
  KeyBasis basis(beginning.kv_heads, beginning.head_dim, beginning.bits);
  const std::size_t scale_bytes = basis.scales_.size() * sizeof(float);
  const std::size_t count = static_cast<std::size_t>(basis.kv_heads_) * basis.head_halves();
  const std::size_t needed =
      sizeof beginning + scale_bytes + count * sizeof(std::uint16_t) + sizeof basis.id_;
  if (bytes.size() != needed) {
    refuse_basis(std::to_string(bytes.size()) + " bytes where its numbers make " +
                 std::to_string(needed));
  }
  std::memcpy(basis.scales_.data(), bytes.data() + sizeof beginning, scale_bytes);
  basis.reserve();
  std::memcpy(basis.halves_.data(), bytes.data() + sizeof beginning + scale_bytes,
              count * sizeof(std::uint16_t));
  std::uint64_t id = 0;
  std::memcpy(&id, bytes.data() + bytes.size() - sizeof id, sizeof id);
  if (id != hash_of(bytes.first(bytes.size() - sizeof id))) refuse_basis("its hash does not fit");
  if (const std::string fault = basis.fault(); !fault.empty()) refuse_basis(fault);
  basis.finish();
  return basis;
}

}  // namespace tqai
