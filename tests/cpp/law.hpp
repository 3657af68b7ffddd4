// What the tests of codebooks and quantisers measure against; shares no code with the library.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <numbers>
#include <random>
#include <string>
#include <tqai/error.hpp>
#include <vector>

namespace tqai::test {

inline constexpr int kTableDims[] = {64, 128, 256};

/// Distortion ‖x − x̂‖² of the exact Lloyd–Max codebook per unit vector, for 64, 128 and 256
/// dimensions and 1…8 bits; solved with other code than the library's.
inline constexpr double kTable[3][8] = {
    {.35839, .11453, .033391, .0091315, .0023992, 6.1596e-4, 1.5615e-4, 3.9317e-5},
    {.36089, .11600, .033966, .0093148, .0024515, 6.2996e-4, 1.5977e-4, 4.0241e-5},
    {.36214, .11674, .034256, .0094075, .0024779, 6.3707e-4, 1.6162e-4, 4.0711e-5}};

/// Most that the int8 grid may cost over the exact codebook, as a factor, for 1…8 bits.
inline constexpr double kGridFactor[8] = {1.001, 1.001, 1.001, 1.003, 1.01, 1.025, 1.12, 2.2};

/// ∫ u^power over the law of a unit vector's coordinate from `low` to `high`, by Simpson's rule in
/// the angle θ = asin u.
inline double law_moment(int dim, int power, double low, double high) {
  // Beyond 12 standard deviations there is nothing to integrate.
  const double most = std::min(1.0, 12.0 / std::sqrt(dim));
  const auto clamped = [most](double t) { return std::clamp(t, -most, most); };
  const double start = std::asin(clamped(low));
  const double span = std::asin(clamped(high)) - start;
  const int intervals = 8 + 2 * static_cast<int>(25.0 * span * std::sqrt(dim));
  const double width = span / intervals;
  double sum = 0.0;
  for (int i = 0; i <= intervals; ++i) {
    const double angle = start + i * width;
    const double weight = i == 0 || i == intervals ? 1.0 : i % 2 == 1 ? 4.0 : 2.0;
    sum += weight * std::pow(std::sin(angle), power) * std::pow(std::cos(angle), dim - 2);
  }
  const double scale =
      std::exp(std::lgamma(dim / 2.0) - std::lgamma((dim - 1) / 2.0)) / std::sqrt(std::numbers::pi);
  return scale * sum * width / 3.0;
}

/// Uniform on the unit sphere, [rows, dim].
inline std::vector<float> sphere_vectors(int dim, int rows, std::uint64_t seed) {
  std::mt19937_64 random(seed);
  std::normal_distribution<double> normal;
  std::vector<float> vectors;
  std::vector<double> row(static_cast<std::size_t>(dim));
  for (int r = 0; r < rows; ++r) {
    double square = 0.0;
    for (double& x : row) {
      x = normal(random);
      square += x * x;
    }
    for (const double x : row) vectors.push_back(static_cast<float>(x / std::sqrt(square)));
  }
  return vectors;
}

inline double inner(const float* a, const float* b, int dim) {
  double sum = 0.0;
  for (int i = 0; i < dim; ++i) sum += static_cast<double>(a[i]) * static_cast<double>(b[i]);
  return sum;
}

/// Mean and its standard error.
class Sample {
 public:
  void add(double value) {
    ++count_;
    const double shift = value - mean_;
    mean_ += shift / count_;
    squares_ += shift * (value - mean_);
  }
  double mean() const { return mean_; }
  double variance() const { return squares_ / (count_ - 1.0); }
  double error() const { return std::sqrt(variance() / count_); }

 private:
  double count_ = 0.0;
  double mean_ = 0.0;
  double squares_ = 0.0;
};

/// The message of the ValueError that `call` throws; else says that there was none.
template <typename Call>
std::string value_error(Call&& call) {
  try {
    call();
  } catch (const ValueError& error) {
    return error.what();
  }
  return "no ValueError";
}

}  // namespace tqai::test
