#include "key_moments.hpp"

#include <algorithm>
#include <cmath>
#include <string>
#include <tqai/cache.hpp>
#include <tqai/key_basis.hpp>
#include <utility>

#include "cache/check.hpp"
#include "ranges.hpp"
#include "threads.hpp"

namespace tqai {
namespace TQAI_LOCAL {

// Positions that moments are averaged over.
constexpr int kPositions = 97;
// Half of these are nearer than this, where they reach farther at all: a text has near positions
// whatever its length, and is longer than this sometimes.
constexpr double kMiddlePosition = 2048.0;
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
      const double most =
          1.0001 * std::sqrt(std::max(at(i, i), 0.0)) * std::sqrt(std::max(at(j, j), 0.0));
      if (std::isfinite(at(i, j)) && std::abs(at(i, j)) <= most) continue;
      throw ValueError(std::string(name) + " are no second moments: number [" + std::to_string(i) +
                       ", " + std::to_string(j) + "] is " +
                       detail::number_text(static_cast<float>(at(i, j))) +
                       "; needed: a symmetric, positive semidefinite matrix of finite numbers");
    }
  }
}

TQAI_INLINE void check_seen(double count, int head, const char* name) {
  if (count > 0.0) return;
  throw ValueError("kv head " + std::to_string(head) + " has no " + name +
                   " to learn from: add some, or a prior");
}

}  // namespace TQAI_LOCAL

TQAI_INLINE SquareMatrix detail::matrix_of(const std::vector<double>& values, std::size_t dim,
                                           double factor) {
  SquareMatrix matrix(dim);
  for (std::size_t i = 0; i < values.size(); ++i) matrix.row(0)[i] = factor * values[i];
  return matrix;
}

TQAI_INLINE double detail::mean_diagonal(const std::vector<double>& moments,
                                         std::size_t dim) noexcept {
  double sum = 0.0;
  for (std::size_t i = 0; i < dim; ++i) sum += moments[i * dim + i];
  return sum / static_cast<double>(dim);
}

TQAI_INLINE KeyMoments::KeyMoments(int kv_heads, int head_dim, std::optional<Rope> rope)
    : kv_heads_(kv_heads),
      head_dim_(checked_head_dim("head_dim", head_dim)),
      rope_(std::move(rope)) {
  check_range("kv_heads", kv_heads, 1, detail::kMostKvHeads);
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
  const UsualArithmetic usual;
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
  const UsualArithmetic usual;
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
      const double energy = detail::mean_diagonal(moments(sums, central), dim);
      const double prior_energy = detail::mean_diagonal({prior.begin(), prior.end()}, dim);
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
    SquareMatrix turned = detail::matrix_of(moments, static_cast<std::size_t>(head_dim_), 1.0);
    const double position = std::floor(last * std::pow(i / (kPositions - 1.0), power));
    turn_matrix(*rope_, turns_at(*rope_, position), turned);
    for (std::size_t k = 0; k < sum.size(); ++k) sum[k] += turned.row(0)[k] / kPositions;
  }
  return sum;
}

TQAI_INLINE std::vector<double> KeyMoments::keys_until(int head, std::int64_t last_position) const {
  const UsualArithmetic usual;
  check_head(head);
  check_range("last_position", last_position, 0, KvCache::kMaxPosition);
  const Sums& sums = keys_[static_cast<std::size_t>(head)];
  check_seen(sums.count, head, "keys");
  return averaged(moments(sums, true), last_position);
}

TQAI_INLINE std::vector<double> KeyMoments::queries_until(int head,
                                                          std::int64_t last_position) const {
  const UsualArithmetic usual;
  check_head(head);
  check_range("last_position", last_position, 0, KvCache::kMaxPosition);
  const Sums& sums = queries_[static_cast<std::size_t>(head)];
  check_seen(sums.count, head, "queries");
  return averaged(moments(sums, false), last_position);
}

}  // namespace tqai
