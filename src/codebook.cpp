#include <algorithm>
#include <array>
#include <cmath>
#include <cstdint>
#include <map>
#include <mutex>
#include <numbers>
#include <span>
#include <string>
#include <tqai/codebook.hpp>
#include <tqai/error.hpp>
#include <tuple>
#include <utility>
#include <vector>

#include "ranges.hpp"
#include "threads.hpp"

namespace tqai {
namespace TQAI_LOCAL {

constexpr int kMaxLevel = 127;

/// One coordinate T of a uniformly random unit vector in R^d: density C·(1−t²)^((d−3)/2)
/// (arXiv:2504.19874, Lemma 1). All integrals start at 0 and need no quadrature: with t = sin θ the
/// mass is ∫ cos^(d−2) θ, whose reduction formula is a polynomial in cos² θ with positive terms.
class SphereLaw {
 public:
  explicit SphereLaw(int head_dim) : dim_(head_dim), even_(head_dim % 2 == 0) {
    // Wallis: w = ∫_0^{π/2} cos^k for k = 0, 2, 4… or 1, 3, 5…; each k ≥ 2 adds one term
    // sin θ cos^(k−1) θ / (2 k w).
    double w = even_ ? std::numbers::pi / 2 : 1.0;
    for (int k = even_ ? 2 : 3; k <= head_dim - 2; k += 2) {
      w *= static_cast<double>(k - 1) / k;
      terms_.push_back(0.5 / (k * w));
    }
    peak_ = 0.5 / w;
  }

  int dim() const { return dim_; }

  double density(double t) const { return peak_ * std::pow(cos2(t), 0.5 * (dim_ - 3)); }

  /// P(0 ≤ T ≤ t); odd in t.
  double mass(double t) const {
    const double c2 = cos2(t);
    double sum = 0.0;
    for (std::size_t j = terms_.size(); j-- > 0;) sum = sum * c2 + terms_[j];
    if (!even_) return std::clamp(t, -1.0, 1.0) * (0.5 + c2 * sum);
    const double s = std::clamp(t, -1.0, 1.0);
    return std::asin(s) / std::numbers::pi + s * std::sqrt(c2) * sum;
  }

  /// ∫_0^t u dP; even in t.
  double moment(double t) const {
    return peak_ / (dim_ - 1) * (1.0 - std::pow(cos2(t), 0.5 * (dim_ - 1)));
  }

 private:
  static double cos2(double t) { return std::max(0.0, (1.0 - t) * (1.0 + t)); }

  int dim_;
  bool even_;
  double peak_;
  std::vector<double> terms_;
};

/// d · E[(T − c(T))²]. boundaries: one fewer than centroids.
TQAI_INLINE double distortion_of(const SphereLaw& law, std::span<const float> centroids,
                                 std::span<const float> boundaries) {
  // E[T²] = 1/d, so only the terms with c are left to sum.
  double gain = 0.0;
  double mass = law.mass(-1.0);
  double moment = law.moment(-1.0);
  for (std::size_t i = 0; i < centroids.size(); ++i) {
    const double end = i < boundaries.size() ? static_cast<double>(boundaries[i]) : 1.0;
    const double next_mass = law.mass(end);
    const double next_moment = law.moment(end);
    const double c = centroids[i];
    gain += c * (2.0 * (next_moment - moment) - c * (next_mass - mass));
    mass = next_mass;
    moment = next_moment;
  }
  return 1.0 - law.dim() * gain;
}

/// Positive half of a start near the optimum: for many levels the best point density is the cube
/// root of the law's (Panter and Dite).
TQAI_INLINE std::vector<double> companded(int head_dim, int count) {
  constexpr int kSamples = 4096;
  std::vector<double> sums(kSamples + 1, 0.0);
  for (int i = 0; i < kSamples; ++i) {
    const double t = (i + 0.5) / kSamples;
    sums[static_cast<std::size_t>(i) + 1] =
        sums[static_cast<std::size_t>(i)] + std::pow(1.0 - t * t, (head_dim - 3) / 6.0);
  }
  std::vector<double> centroids;
  for (int i = 0; i < count; ++i) {
    const double wanted = (i + 0.5) / count * sums.back();
    const auto above = std::upper_bound(sums.begin(), sums.end(), wanted);
    const double part = (*above - wanted) / (*above - *(above - 1));
    centroids.push_back((static_cast<double>(above - sums.begin()) - part) / kSamples);
  }
  return centroids;
}

/// What Lloyd–Max has to solve for the positive half: c_i·mass_i − moment_i = 0, each centroid is
/// the mean of its cell. Its Jacobian, which is half of the distortion's Hessian, is tridiagonal.
struct Stationarity {
  std::vector<double> residual;
  std::vector<double> mass;
  std::vector<double> diagonal;
  std::vector<double> below;  // coupling with the centroid below
};

TQAI_INLINE Stationarity stationarity(const SphereLaw& law, const std::vector<double>& c) {
  const std::size_t n = c.size();
  Stationarity result{std::vector<double>(n), std::vector<double>(n), std::vector<double>(n),
                      std::vector<double>(n)};
  double mass = 0.0;
  double moment = 0.0;
  double below = 0.0;
  for (std::size_t i = 0; i < n; ++i) {
    const bool last = i + 1 == n;
    const double end = last ? 1.0 : 0.5 * (c[i] + c[i + 1]);
    const double next_mass = law.mass(end);
    const double next_moment = law.moment(end);
    const double above = last ? 0.0 : -0.5 * (end - c[i]) * law.density(end);
    result.mass[i] = next_mass - mass;
    result.residual[i] = c[i] * (next_mass - mass) - (next_moment - moment);
    result.diagonal[i] = next_mass - mass + below + above;
    result.below[i] = below;
    mass = next_mass;
    moment = next_moment;
    below = above;
  }
  return result;
}

/// Newton's step where the Hessian is positive definite, else Lloyd's, which always descends.
TQAI_INLINE std::vector<double> descent_step(const Stationarity& at) {
  const std::size_t n = at.residual.size();
  std::vector<double> step(n);
  std::vector<double> upper(n);  // tridiagonal elimination (Thomas)
  bool positive = true;
  for (std::size_t i = 0; i < n; ++i) {
    const double before = i > 0 ? step[i - 1] : 0.0;
    const double pivot = at.diagonal[i] - (i > 0 ? at.below[i] * upper[i - 1] : 0.0);
    positive = positive && pivot > 0.0;
    upper[i] = i + 1 < n ? at.below[i + 1] / pivot : 0.0;
    step[i] = (-at.residual[i] - at.below[i] * before) / pivot;
  }
  for (std::size_t i = n - 1; i-- > 0;) step[i] -= upper[i] * step[i + 1];
  if (positive) return step;
  for (std::size_t i = 0; i < n; ++i) step[i] = -at.residual[i] / at.mass[i];
  return step;
}

/// Positive half of the Lloyd–Max codebook. The law is log-concave, so the stationary point is the
/// optimum (Fleischer 1964).
TQAI_INLINE std::vector<double> solve_exact(const SphereLaw& law, int count) {
  constexpr int kMaxSteps = 1000;
  constexpr double kTolerance = 1e-11;
  std::vector<double> centroids = companded(law.dim(), count);
  for (int iteration = 0; iteration < kMaxSteps; ++iteration) {
    const std::vector<double> step = descent_step(stationarity(law, centroids));
    // A whole step may cross a neighbour: none moves further than half way.
    double fraction = 1.0;
    double largest = 0.0;
    for (std::size_t i = 0; i < step.size(); ++i) {
      const double below = centroids[i] - (i > 0 ? centroids[i - 1] : 0.0);
      const double above = (i + 1 < step.size() ? centroids[i + 1] : 1.0) - centroids[i];
      const double room = 0.5 * (step[i] < 0.0 ? below : above);
      if (std::abs(step[i]) > room) fraction = std::min(fraction, room / std::abs(step[i]));
      largest = std::max(largest, std::abs(step[i]));
    }
    for (std::size_t i = 0; i < step.size(); ++i) centroids[i] += fraction * step[i];
    if (largest < kTolerance) break;
  }
  return centroids;
}

/// Where a function with one minimum between `low` and `high` has it: golden section.
template <typename Function>
double minimum(double low, double high, Function&& function) {
  constexpr double kTolerance = 1e-6;
  const double ratio = std::numbers::phi - 1.0;
  double left = high - ratio * (high - low);
  double right = low + ratio * (high - low);
  double at_left = function(left);
  double at_right = function(right);
  while (high - low > kTolerance * high) {
    if (at_left < at_right) {
      high = std::exchange(right, left);
      at_right = at_left;
      left = high - ratio * (high - low);
      at_left = function(left);
    } else {
      low = std::exchange(left, right);
      at_left = at_right;
      right = low + ratio * (high - low);
      at_right = function(right);
    }
  }
  return 0.5 * (low + high);
}

// With g(c, t) = 2c·moment(t) − c²·mass(t), centroid c with the cell from s to t takes
// g(c, t) − g(c, s) from E[T²]. Summed over the positive half, neighbours a < b with the midpoint m
// between them contribute g(a, m) − g(b, m) = (b − a)·edge_gain(m), and the last one g(c, 1): a sum
// over edges, which is what dynamic programming can maximise.

TQAI_INLINE double edge_gain(const SphereLaw& law, double middle) {
  return 2.0 * (middle * law.mass(middle) - law.moment(middle));
}

TQAI_INLINE double last_gain(const SphereLaw& law, double c) {
  return c * (2.0 * law.moment(1.0) - c * law.mass(1.0));
}

TQAI_INLINE double gain_of(const SphereLaw& law, const std::vector<int>& levels, double step) {
  double gain = last_gain(law, levels.back() * step);
  for (std::size_t i = 1; i < levels.size(); ++i) {
    const double middle = 0.5 * step * (levels[i - 1] + levels[i]);
    gain += (levels[i] - levels[i - 1]) * step * edge_gain(law, middle);
  }
  return gain;
}

struct GridSolution {
  double step = 0.0;
  double gain = 0.0;
  std::vector<int> levels;  // ascending, positive
};

/// The `count` levels of 1…max_level that are best for this step; exact, O(count · max_level²).
TQAI_INLINE GridSolution best_levels(const SphereLaw& law, int count, std::size_t max_level,
                                     double step) {
  std::array<double, 2 * kMaxLevel> edge{};  // by the sum of its levels, for one level's distance
  for (std::size_t sum = 3; sum < edge.size(); ++sum) {
    edge[sum] = step * edge_gain(law, 0.5 * static_cast<double>(sum) * step);
  }
  using PerLevel = std::array<double, kMaxLevel + 1>;
  using Origins = std::array<std::uint8_t, kMaxLevel + 1>;
  PerLevel best{};  // gain of the best i + 1 levels that end here, but for last_gain
  std::vector<Origins> origins(static_cast<std::size_t>(count));
  for (std::size_t i = 1; i < origins.size(); ++i) {
    PerLevel next{};
    for (std::size_t b = i + 1; b <= max_level - (origins.size() - 1 - i); ++b) {
      double most = -1.0;
      for (std::size_t a = i; a < b; ++a) {
        const double gain = best[a] + static_cast<double>(b - a) * edge[a + b];
        if (gain > most) {
          most = gain;
          origins[i][b] = static_cast<std::uint8_t>(a);
        }
      }
      next[b] = most;
    }
    best = next;
  }
  GridSolution solution;
  solution.step = step;
  std::size_t last = origins.size();
  for (std::size_t level = last; level <= max_level; ++level) {
    const double gain = best[level] + last_gain(law, static_cast<double>(level) * step);
    if (level == origins.size() || gain > solution.gain) {
      solution.gain = gain;
      last = level;
    }
  }
  for (std::size_t i = origins.size(); i-- > 0; last = origins[i][last]) {
    solution.levels.insert(solution.levels.begin(), static_cast<int>(last));
  }
  return solution;
}

/// Best levels and step for 2·count ≤ 128 centroids ±level·step. The distortion has many shallow
/// minima over the step: a scan finds the best ones, better steps and levels in turn refine them.
/// Within 0.1 % of a thirty times finer scan.
TQAI_INLINE GridSolution solve_grid(const SphereLaw& law, int count, int max_level,
                                    double largest_centroid) {
  const auto top_level = static_cast<std::size_t>(max_level);
  constexpr int kScan = 64;
  constexpr int kRefined = 2;
  constexpr int kMaxRounds = 8;
  // The top level at the outermost exact centroid, or beyond it by so much, holds every optimum.
  constexpr double kFirst = 0.9;
  constexpr double kLast = 1.8;
  const double ratio = std::pow(kLast / kFirst, 1.0 / (kScan - 1));
  // A gain must be larger by more than rounding noise, so that ties fall alike on every platform.
  const double noise = 1e-10 / law.dim();
  std::vector<GridSolution> scan;
  double step = kFirst * largest_centroid / max_level;
  for (int i = 0; i < kScan; ++i, step *= ratio)
    scan.push_back(best_levels(law, count, top_level, step));
  GridSolution best;
  for (int k = 0; k < kRefined; ++k) {
    auto top = scan.begin();
    for (auto it = scan.begin(); it != scan.end(); ++it) {
      if (it->gain > top->gain + noise) top = it;
    }
    GridSolution solution = *top;
    scan.erase(top);
    for (int round = 0; round < kMaxRounds; ++round) {
      const double better_step =
          minimum(solution.step / ratio, solution.step * ratio,
                  [&](double s) { return -gain_of(law, solution.levels, s); });
      GridSolution next = best_levels(law, count, top_level, better_step);
      const bool better = next.gain > solution.gain + noise;
      if (next.gain > solution.gain) solution = std::move(next);
      if (!better) break;
    }
    if (solution.gain > best.gain + noise) best = std::move(solution);
  }
  return best;
}

/// Step of the 256 levels −128…127.
TQAI_INLINE double best_uniform_step(const SphereLaw& law, double largest_centroid) {
  std::vector<float> centroids(256);
  std::vector<float> boundaries(255);
  const auto distortion = [&](double step) {
    for (int i = 0; i < 256; ++i) {
      centroids[static_cast<std::size_t>(i)] = static_cast<float>((i - 128) * step);
      if (i > 0) {
        boundaries[static_cast<std::size_t>(i) - 1] = static_cast<float>((i - 128.5) * step);
      }
    }
    return distortion_of(law, centroids, boundaries);
  };
  const double step = largest_centroid / kMaxLevel;
  return minimum(0.5 * step, 1.5 * step, distortion);
}

}  // namespace TQAI_LOCAL

TQAI_INLINE Codebook::Codebook(int head_dim, int bits, Grid grid)
    : head_dim_(checked_head_dim("head_dim", head_dim)),
      bits_(checked_bits("bits", bits)),
      grid_(grid) {
  check_enumerator("grid", grid, Grid::int8);
  const UsualArithmetic usual;
  const SphereLaw law(head_dim);
  const int count = 1 << (bits - 1);
  const std::vector<double> exact = solve_exact(law, count);
  const auto add_pairs = [count](auto&& positive, auto& to) {
    for (int i = count; i-- > 0;) to.push_back(-positive(static_cast<std::size_t>(i)));
    for (int i = 0; i < count; ++i) to.push_back(positive(static_cast<std::size_t>(i)));
  };
  if (grid == Grid::exact) {
    add_pairs([&](std::size_t i) { return static_cast<float>(exact[i]); }, centroids_);
  } else if (bits == 8) {
    step_ = static_cast<float>(best_uniform_step(law, exact.back()));
    for (int i = -128; i < 128; ++i) levels_.push_back(static_cast<std::int8_t>(i));
  } else {
    const GridSolution solution =
        solve_grid(law, count, bits <= kNarrowBits ? kMaxNarrowLevel : kMaxLevel, exact.back());
    step_ = static_cast<float>(solution.step);
    add_pairs([&](std::size_t i) { return static_cast<std::int8_t>(solution.levels[i]); }, levels_);
  }
  for (const std::int8_t level : levels_) centroids_.push_back(static_cast<float>(level) * step_);
  for (std::size_t i = 1; i < centroids_.size(); ++i) {
    boundaries_.push_back(0.5F * (centroids_[i - 1] + centroids_[i]));
  }
  distortion_ = distortion_of(law, centroids_, boundaries_);
}

TQAI_INLINE std::uint8_t Codebook::encode(float coordinate) const noexcept {
  // The number of boundaries that are not above the coordinate, bit by bit.
  unsigned code = 0;
  for (unsigned bit = 1U << (bits_ - 1); bit != 0; bit >>= 1) {
    code = coordinate >= boundaries_[(code | bit) - 1] ? code | bit : code;
  }
  return static_cast<std::uint8_t>(code);
}

TQAI_INLINE const Codebook& codebook(int head_dim, int bits, Grid grid) {
  // Never destroyed: caches in static storage may outlive any order of destruction.
  static auto& table = *new std::map<std::tuple<int, int, Grid>, Codebook>;
  static auto& mutex = *new std::mutex;
  const std::lock_guard lock(mutex);
  const std::tuple key(head_dim, bits, grid);
  const auto found = table.find(key);
  if (found != table.end()) return found->second;
  return table.emplace(key, Codebook(head_dim, bits, grid)).first->second;
}

}  // namespace tqai
