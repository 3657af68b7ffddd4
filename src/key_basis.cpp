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
#include "ranges.hpp"

namespace tqai {
namespace TQAI_LOCAL {

constexpr int kMostKvHeads = 1 << 16;
constexpr std::uint32_t kBasisMagic = 0x424B'5154;  // "TQKB"
constexpr std::uint32_t kBasisVersion = 1;

// A share of even energy in both moments: what few tokens show of the smallest directions is noise.
constexpr double kEvenShare = 0.05;
// Of the query metric's exponent ½: all of it amplifies directions that the queries seen happen not
// to use.
constexpr double kMetricExponent = 0.25;
// Positions that moments are averaged over.
constexpr int kPositions = 97;
// Half of these are nearer than this, where they reach farther at all: a text has near positions
// whatever its length, and is longer than this sometimes.
constexpr double kMiddlePosition = 2048.0;
// Norms of keys like those learnt from, in tiles: FP16 has room for some 2^14 times longer ones,
// less what a closed loop may need, and is fine down to 1/256 of it.
constexpr double kUsualNorm = 0x1p-6;
// Between these F's largest number is; beyond, products with the largest queries could overflow.
constexpr int kLeastExponent = -40;
constexpr int kLargestExponent = 17;
constexpr int kMostScale = 64;

TQAI_INLINE std::size_t square(int dim) {
  return static_cast<std::size_t>(dim) * static_cast<std::size_t>(dim);
}

// Coordinates of pair f.
struct PairPlace {
  int a;
  int b;
};

TQAI_INLINE PairPlace pair_place(const Rope& rope, int f) {
  if (rope.layout == Rope::Layout::interleaved) return {2 * f, 2 * f + 1};
  return {f, f + rope.rotary_dim / 2};
}

TQAI_INLINE double frequency(const Rope& rope, int f) {
  return static_cast<double>(rope.inv_freq[static_cast<std::size_t>(f)]);
}

// Cosines and sines of all pairs at a position.
struct Turns {
  std::vector<double> cosines;
  std::vector<double> sines;
};

TQAI_INLINE Turns turns_at(const Rope& rope, double position) {
  Turns turns;
  for (int f = 0; f < rope.rotary_dim / 2; ++f) {
    turns.cosines.push_back(std::cos(position * frequency(rope, f)));
    turns.sines.push_back(std::sin(position * frequency(rope, f)));
  }
  return turns;
}

// Turns pairs first … last − 1 of a vector.
TQAI_INLINE void turn_pairs(const Rope& rope, const Turns& turns, std::size_t first,
                            std::size_t last, double* vector) {
  const bool interleaved = rope.layout == Rope::Layout::interleaved;
  const std::size_t apart = interleaved ? 2 : 1;
  double* a = vector;
  double* b = vector + (interleaved ? 1 : rope.rotary_dim / 2);
  for (std::size_t f = first; f < last; ++f) {
    double& x = a[apart * f];
    double& y = b[apart * f];
    const double turned = turns.cosines[f] * x - turns.sines[f] * y;
    y = turns.sines[f] * x + turns.cosines[f] * y;
    x = turned;
  }
}

// Turns rows and columns of a symmetric matrix as the embedding turns a vector: as if pair by pair,
// its rows and then its columns, so that where the two cross the lower pair goes first.
TQAI_INLINE void turn_matrix(const Rope& rope, const Turns& turns, SquareMatrix& matrix) {
  const std::size_t dim = matrix.dim();
  const auto rotary = static_cast<std::size_t>(rope.rotary_dim);
  const std::size_t pairs = rotary / 2;
  for (std::size_t f = 0; f < pairs; ++f) {
    const auto [first, second] = pair_place(rope, static_cast<int>(f));
    double* a = matrix.row(static_cast<std::size_t>(first));
    double* b = matrix.row(static_cast<std::size_t>(second));
    turn_pairs(rope, turns, 0, f, a);
    turn_pairs(rope, turns, 0, f, b);
    const double cosine = turns.cosines[f];
    const double sine = turns.sines[f];
    for (std::size_t i = 0; i < dim; ++i) {
      const double turned = cosine * a[i] - sine * b[i];
      b[i] = sine * a[i] + cosine * b[i];
      a[i] = turned;
    }
    turn_pairs(rope, turns, f, pairs, a);
    turn_pairs(rope, turns, f, pairs, b);
  }
  for (std::size_t i = rotary; i < dim; ++i) turn_pairs(rope, turns, 0, pairs, matrix.row(i));
}

TQAI_INLINE SquareMatrix matrix_of(const std::vector<double>& values, std::size_t dim,
                                   double factor) {
  SquareMatrix matrix(dim);
  for (std::size_t i = 0; i < values.size(); ++i) matrix.row(0)[i] = factor * values[i];
  return matrix;
}

// Of mean energy 1 a coordinate, with a share of it spread evenly. Without any energy: all of it.
TQAI_INLINE SquareMatrix normalised(const std::vector<double>& moments, std::size_t dim,
                                    double energy) {
  SquareMatrix matrix = matrix_of(moments, dim, energy > 0.0 ? (1.0 - kEvenShare) / energy : 0.0);
  for (std::size_t i = 0; i < dim; ++i) matrix.row(i)[i] += energy > 0.0 ? kEvenShare : 1.0;
  return matrix;
}

TQAI_INLINE SquareMatrix transposed(const SquareMatrix& matrix) {
  SquareMatrix turned(matrix.dim());
  for (std::size_t i = 0; i < matrix.dim(); ++i) {
    for (std::size_t j = 0; j < matrix.dim(); ++j) turned.row(j)[i] = matrix.row(i)[j];
  }
  return turned;
}

TQAI_INLINE double mean_diagonal(const std::vector<double>& moments, std::size_t dim) {
  double sum = 0.0;
  for (std::size_t i = 0; i < dim; ++i) sum += moments[i * dim + i];
  return sum / static_cast<double>(dim);
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

TQAI_INLINE void check_moments(const char* name, std::span<const double> moments, int dim) {
  if (moments.size() != square(dim)) {
    throw ValueError(std::string(name) + " have " + std::to_string(moments.size()) +
                     " numbers; needed: " + std::to_string(dim) + " × " + std::to_string(dim));
  }
  const auto at = [&](int i, int j) {
    return moments[static_cast<std::size_t>(i) * static_cast<std::size_t>(dim) +
                   static_cast<std::size_t>(j)];
  };
  for (int i = 0; i < dim; ++i) {
    for (int j = 0; j < dim; ++j) {
      // No moments of anything are larger than this off the diagonal.
      const double most = 1.0001 * std::sqrt(std::max(at(i, i), 0.0) * std::max(at(j, j), 0.0));
      if (std::isfinite(at(i, j)) && std::abs(at(i, j)) <= most) continue;
      throw ValueError(std::string(name) + " are no second moments: number [" + std::to_string(i) +
                       ", " + std::to_string(j) + "] is " +
                       detail::number_text(static_cast<float>(at(i, j))) +
                       "; needed: a symmetric, positive semidefinite matrix of finite numbers");
    }
  }
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

TQAI_INLINE KeyMoments::KeyMoments(int kv_heads, int head_dim, std::optional<Rope> rope)
    : kv_heads_(kv_heads),
      head_dim_(checked_head_dim("head_dim", head_dim)),
      rope_(std::move(rope)) {
  check_range("kv_heads", kv_heads, 1, kMostKvHeads);
  if (rope_) detail::check_rope(*rope_, head_dim);
  Sums empty;
  empty.sums.resize(static_cast<std::size_t>(head_dim));
  empty.products.resize(square(head_dim));
  keys_.assign(static_cast<std::size_t>(kv_heads), empty);
  queries_.assign(static_cast<std::size_t>(kv_heads), std::move(empty));
}

TQAI_INLINE void KeyMoments::check_head(int head) const {
  if (head >= 0 && head < kv_heads_) return;
  throw IndexError("kv head " + std::to_string(head) + " of " + std::to_string(kv_heads_));
}

TQAI_INLINE void KeyMoments::add_keys(int head, std::span<const float> keys,
                                      std::span<const std::int64_t> positions) {
  check_head(head);
  add(keys_[static_cast<std::size_t>(head)], "keys", keys, positions);
}

TQAI_INLINE void KeyMoments::add_queries(int head, std::span<const float> queries,
                                         std::span<const std::int64_t> positions) {
  check_head(head);
  add(queries_[static_cast<std::size_t>(head)], "queries", queries, positions);
}

TQAI_INLINE void KeyMoments::add(Sums& sums, const char* name, std::span<const float> vectors,
                                 std::span<const std::int64_t> positions) const {
  const auto dim = static_cast<std::size_t>(head_dim_);
  const std::size_t tokens = vectors.size() / dim;
  const auto sections = static_cast<std::size_t>(rope_ ? rope_->section_count() : 1);
  if (tokens * dim != vectors.size()) {
    throw ValueError(std::string(name) + " have " + std::to_string(vectors.size()) +
                     " numbers; needed: [tokens, " + std::to_string(dim) + "]");
  }
  if (!positions.empty() && positions.size() != tokens && positions.size() != sections * tokens) {
    throw ValueError(std::to_string(positions.size()) + " positions for " + std::to_string(tokens) +
                     " " + name + " and " + std::to_string(sections) +
                     " sections; needed: one each, or one each in every section, or none");
  }
  for (std::size_t i = 0; i < vectors.size(); ++i) {
    if (std::isfinite(vectors[i])) continue;
    throw ValueError(std::string(name) + "[" + std::to_string(i / dim) +
                     "] holds NaN or infinity; only finite numbers have moments");
  }
  // Several to each visit of a product, one after another.
  constexpr std::size_t kTogether = 4;
  std::vector<double> together(kTogether * dim);
  const std::size_t pairs = rope_ ? static_cast<std::size_t>(rope_->rotary_dim / 2) : 0;
  std::vector<std::int64_t> standing(pairs);  // where each pair's cosine and sine are of
  std::vector<double> cosines(pairs, 1.0);
  std::vector<double> sines(pairs, 0.0);
  for (std::size_t first = 0; first < tokens; first += kTogether) {
    const std::size_t count = std::min(kTogether, tokens - first);
    for (std::size_t n = 0; n < count; ++n) {
      const std::size_t t = first + n;
      double* vector = together.data() + n * dim;
      for (std::size_t i = 0; i < dim; ++i) vector[i] = static_cast<double>(vectors[t * dim + i]);
      for (std::size_t f = 0; f < pairs; ++f) {
        const std::size_t section =
            rope_->sections.empty() || positions.size() == tokens ? 0 : rope_->sections[f];
        const std::int64_t position =
            positions.empty() ? static_cast<std::int64_t>(t) : positions[section * tokens + t];
        if (position != standing[f]) {
          const double angle =
              static_cast<double>(position) * frequency(*rope_, static_cast<int>(f));
          standing[f] = position;
          cosines[f] = std::cos(angle);
          sines[f] = std::sin(angle);
        }
        const auto [at, beside] = pair_place(*rope_, static_cast<int>(f));
        double& a = vector[at];
        double& b = vector[beside];
        const double turned = cosines[f] * a + sines[f] * b;
        b = cosines[f] * b - sines[f] * a;
        a = turned;
      }
      for (std::size_t i = 0; i < dim; ++i) sums.sums[i] += vector[i];
    }
    for (std::size_t n = count; n < kTogether; ++n) {
      std::fill_n(together.begin() + static_cast<std::ptrdiff_t>(n * dim), dim, 0.0);
    }
    for (std::size_t i = 0; i < dim; ++i) {
      double* products = sums.products.data() + i * dim;
      const double* v = together.data();
      for (std::size_t j = 0; j <= i; ++j) {
        products[j] = (((products[j] + v[i] * v[j]) + v[dim + i] * v[dim + j]) +
                       v[2 * dim + i] * v[2 * dim + j]) +
                      v[3 * dim + i] * v[3 * dim + j];
      }
    }
  }
  sums.count += static_cast<double>(tokens);
}

TQAI_INLINE void KeyMoments::add_prior(int head, std::span<const double> keys,
                                       std::span<const double> queries, double tokens) {
  check_head(head);
  check_moments("the prior's keys", keys, head_dim_);
  check_moments("the prior's queries", queries, head_dim_);
  if (!(std::isfinite(tokens) && tokens > 0.0)) {
    throw ValueError("a prior of " + detail::number_text(static_cast<float>(tokens)) +
                     " tokens; allowed: finite numbers above 0");
  }
  const auto dim = static_cast<std::size_t>(head_dim_);
  Sums& of_keys = keys_[static_cast<std::size_t>(head)];
  Sums& of_queries = queries_[static_cast<std::size_t>(head)];
  const auto blend = [&](Sums& sums, std::span<const double> prior, bool central, double weight) {
    double factor = 1.0;
    std::vector<double> mean(dim);
    if (sums.count > 0.0) {
      const double energy = mean_diagonal(moments(sums, central), dim);
      const double prior_energy = mean_diagonal({prior.begin(), prior.end()}, dim);
      if (prior_energy > 0.0) factor = energy / prior_energy;
      if (central) {
        for (std::size_t i = 0; i < dim; ++i) mean[i] = sums.sums[i] / sums.count;
      }
    }
    for (std::size_t i = 0; i < dim; ++i) {
      sums.sums[i] += weight * mean[i];
      for (std::size_t j = 0; j <= i; ++j) {
        sums.products[i * dim + j] += weight * (factor * prior[i * dim + j] + mean[i] * mean[j]);
      }
    }
    sums.count += weight;
  };
  const double queries_a_key = of_keys.count > 0.0 ? of_queries.count / of_keys.count : 1.0;
  blend(of_queries, queries, false, tokens * std::max(queries_a_key, 1.0));
  blend(of_keys, keys, true, tokens);
}

TQAI_INLINE double KeyMoments::tokens(int head) const {
  check_head(head);
  return keys_[static_cast<std::size_t>(head)].count;
}

TQAI_INLINE std::vector<double> KeyMoments::moments(const Sums& sums, bool central) const {
  const auto dim = static_cast<std::size_t>(head_dim_);
  std::vector<double> result(dim * dim);
  for (std::size_t i = 0; i < dim; ++i) {
    for (std::size_t j = 0; j <= i; ++j) {
      double moment = sums.products[i * dim + j] / sums.count;
      if (central) moment -= sums.sums[i] / sums.count * (sums.sums[j] / sums.count);
      if (i == j) moment = std::max(moment, 0.0);
      result[i * dim + j] = moment;
      result[j * dim + i] = moment;
    }
  }
  return result;
}

TQAI_INLINE std::vector<double> KeyMoments::averaged(std::vector<double> moments,
                                                     std::int64_t last_position) const {
  if (!rope_ || last_position == 0) return moments;
  const auto last = static_cast<double>(last_position);
  // Evenly spaced positions, to the power that brings the middle one to kMiddlePosition.
  const double power = std::max(std::log2(last / kMiddlePosition), 1.0);
  std::vector<double> sum(moments.size());
  for (int i = 0; i < kPositions; ++i) {
    SquareMatrix turned = matrix_of(moments, static_cast<std::size_t>(head_dim_), 1.0);
    const double position = std::floor(last * std::pow(i / (kPositions - 1.0), power));
    turn_matrix(*rope_, turns_at(*rope_, position), turned);
    for (std::size_t k = 0; k < sum.size(); ++k) sum[k] += turned.row(0)[k] / kPositions;
  }
  return sum;
}

TQAI_INLINE std::vector<double> KeyMoments::keys_until(int head, std::int64_t last_position) const {
  check_head(head);
  check_range("last_position", last_position, 0, KvCache::kMaxPosition);
  const Sums& sums = keys_[static_cast<std::size_t>(head)];
  if (sums.count == 0.0) {
    throw ValueError("kv head " + std::to_string(head) +
                     " has no keys to learn from: add some, or a prior");
  }
  return averaged(moments(sums, true), last_position);
}

TQAI_INLINE std::vector<double> KeyMoments::queries_until(int head,
                                                          std::int64_t last_position) const {
  check_head(head);
  check_range("last_position", last_position, 0, KvCache::kMaxPosition);
  const Sums& sums = queries_[static_cast<std::size_t>(head)];
  if (sums.count == 0.0) {
    throw ValueError("kv head " + std::to_string(head) +
                     " has no queries to learn from: add some, or a prior");
  }
  return averaged(moments(sums, false), last_position);
}

TQAI_INLINE KeyBasis::KeyBasis(int kv_heads, int head_dim, int bits)
    : kv_heads_(kv_heads),
      head_dim_(checked_head_dim("head_dim", head_dim)),
      bits_(checked_bits("bits", bits)) {
  check_range("kv_heads", kv_heads, 1, kMostKvHeads);
  scales_.resize(2 * static_cast<std::size_t>(kv_heads));
}

TQAI_INLINE std::size_t KeyBasis::head_halves() const noexcept {
  return 2 * square(head_dim_) + (square(head_dim_) - static_cast<std::size_t>(head_dim_)) / 2;
}

TQAI_INLINE KeyBasis KeyBasis::learn(const KeyMoments& moments, int bits,
                                     std::int64_t last_position) {
  KeyBasis basis(moments.kv_heads(), moments.head_dim(), bits);
  basis.halves_.resize(static_cast<std::size_t>(basis.kv_heads_) * basis.head_halves());
  for (int head = 0; head < basis.kv_heads_; ++head) {
    const std::vector<double> keys = moments.keys_until(head, last_position);
    basis.learn_head(head, keys, moments.queries_until(head, last_position));
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
  const double energy = mean_diagonal(keys, dim);
  const SquareMatrix metric =
      power(normalised(queries, dim, mean_diagonal(queries, dim)), kMetricExponent);
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
  const std::size_t full = square(head_dim_);
  const std::span<const std::uint16_t> all =
      std::span(halves_).subspan(index * head_halves(), head_halves());
  return {all.first(full), all.subspan(full, all.size() - 2 * full), all.last(full),
          scales_[2 * index], scales_[2 * index + 1]};
}

TQAI_INLINE void KeyBasis::finish() {
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
  all.reserve(sizeof beginning + scale_bytes + bytes() + sizeof id_);
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
  basis.halves_.resize(count);
  std::memcpy(basis.halves_.data(), bytes.data() + sizeof beginning + scale_bytes,
              count * sizeof(std::uint16_t));
  std::uint64_t id = 0;
  std::memcpy(&id, bytes.data() + bytes.size() - sizeof id, sizeof id);
  if (id != hash_of(bytes.first(bytes.size() - sizeof id))) refuse_basis("its hash does not fit");
  for (const float scale : basis.scales_) {
    int exponent = 0;
    if (!(std::isfinite(scale) && std::frexp(scale, &exponent) == 0.5F &&
          std::abs(exponent) <= kMostScale)) {
      refuse_basis("a scale of " + detail::number_text(scale));
    }
  }
  for (int head = 0; head < basis.kv_heads_; ++head) {
    if (basis.scales_[2 * static_cast<std::size_t>(head) + 1] >
        std::ldexp(1.0F, kLargestExponent)) {
      refuse_basis("a synthesis that is too large");
    }
  }
  for (const std::uint16_t half : basis.halves_) {
    if ((half & 0x7C00U) == 0x7C00U) refuse_basis("a number that is NaN or infinite");
  }
  for (int head = 0; head < basis.kv_heads_; ++head) {
    const Head of = basis.head(head);
    for (const auto& square : {of.analysis, of.synthesis}) {
      constexpr std::uint16_t kOne = 0x3C00;
      for (const std::uint16_t half : square) {
        if ((half & 0x7FFFU) > kOne) refuse_basis("a number that is larger than its scale");
      }
    }
  }
  basis.finish();
  return basis;
}

}  // namespace tqai
