// Double-precision references and random data for the C++ tests.
#pragma once

#include <gtest/gtest.h>

#include <cmath>
#include <cstdint>
#include <limits>
#include <random>
#include <string>
#include <tqai/cache.hpp>
#include <tqai/cpu.hpp>
#include <vector>

namespace tqai::test {

using Matrix = std::vector<std::vector<double>>;

/// Seeds of test data; never those of a rotation.
inline std::mt19937_64 random_engine(std::uint64_t seed) { return std::mt19937_64(0xDA7A + seed); }

inline std::vector<float> random_normal(std::size_t count, std::mt19937_64& engine,
                                        float scale = 1.0F) {
  std::normal_distribution<float> normal(0.0F, scale);
  std::vector<float> values(count);
  for (float& value : values) value = normal(engine);
  return values;
}

/// A tensor with its storage, [a, b, c, d] fp32 contiguous.
struct Array {
  std::array<std::int64_t, 4> shape;
  std::vector<float> data;

  explicit Array(std::array<std::int64_t, 4> dims, float fill = 0.0F)
      : shape(dims), data(static_cast<std::size_t>(dims[0] * dims[1] * dims[2] * dims[3]), fill) {}
  Array(std::array<std::int64_t, 4> dims, std::mt19937_64& engine, float scale = 1.0F)
      : Array(dims) {
    data = random_normal(data.size(), engine, scale);
  }
  std::array<std::int64_t, 4> strides() const {
    return {shape[1] * shape[2] * shape[3], shape[2] * shape[3], shape[3], 1};
  }
  const float* at(std::int64_t a, std::int64_t b, std::int64_t c) const {
    const auto s = strides();
    return data.data() + a * s[0] + b * s[1] + c * s[2];
  }
  float* at(std::int64_t a, std::int64_t b, std::int64_t c) {
    return const_cast<float*>(std::as_const(*this).at(a, b, c));
  }
  operator ConstTensor() const { return {data.data(), DType::f32, shape, strides()}; }
  operator Tensor() { return {data.data(), DType::f32, shape, strides()}; }
};

/// A rotary embedding over all of a head, with Llama's frequencies.
inline Rope rope_of(int dim, Rope::Layout layout = Rope::Layout::half_split) {
  Rope rope;
  rope.rotary_dim = dim;
  rope.layout = layout;
  for (int f = 0; f < dim / 2; ++f) {
    rope.inv_freq.push_back(
        std::pow(10000.0F, -2.0F * static_cast<float>(f) / static_cast<float>(dim)));
  }
  return rope;
}

/// Turns a key at `position` as the embedding does, in double.
inline void turn(const Rope& rope, double position, float* key) {
  const int pairs = rope.rotary_dim / 2;
  for (int f = 0; f < pairs; ++f) {
    const bool interleaved = rope.layout == Rope::Layout::interleaved;
    float& a = key[interleaved ? 2 * f : f];
    float& b = key[interleaved ? 2 * f + 1 : f + pairs];
    const double angle = position * static_cast<double>(rope.inv_freq[static_cast<std::size_t>(f)]);
    const double turned = a * std::cos(angle) - b * std::sin(angle);
    b = static_cast<float>(a * std::sin(angle) + b * std::cos(angle));
    a = static_cast<float>(turned);
  }
}

/// What a query sees beyond causality, and how scores are formed.
struct ReferenceOptions {
  double scale = 0.0;
  double soft_cap = 0.0;
  bool causal = true;
  std::int64_t window = 0;
  std::int64_t first_token = 0;  // tokens before it are not seen
  double sink_score = -std::numeric_limits<double>::infinity();
};

/// Softmax attention in double of one query at token `position` over keys and values [tokens, dim].
/// Tokens where `hidden` is set are not seen.
inline std::vector<double> attention(const float* query, const Matrix& keys, const Matrix& values,
                                     std::int64_t position, const ReferenceOptions& options,
                                     const std::vector<bool>& hidden = {}) {
  const std::size_t tokens = keys.size();
  std::vector<double> scores(tokens, -std::numeric_limits<double>::infinity());
  double largest = options.sink_score;
  for (std::size_t t = 0; t < tokens; ++t) {
    const auto token = static_cast<std::int64_t>(t);
    if (token < options.first_token ||
        ((options.causal || options.window > 0) && token > position) ||
        (options.window > 0 && token <= position - options.window) ||
        (!hidden.empty() && hidden[t])) {
      continue;
    }
    double dot = 0.0;
    for (std::size_t c = 0; c < keys[t].size(); ++c)
      dot += static_cast<double>(query[c]) * keys[t][c];
    dot *= options.scale;
    if (options.soft_cap > 0.0) dot = options.soft_cap * std::tanh(dot / options.soft_cap);
    scores[t] = dot;
    largest = std::max(largest, dot);
  }
  std::vector<double> output(values.empty() ? 0 : values[0].size(), 0.0);
  if (std::isinf(largest)) return output;
  double sum = std::exp(options.sink_score - largest);
  for (std::size_t t = 0; t < tokens; ++t) {
    const double weight = std::exp(scores[t] - largest);
    sum += weight;
    for (std::size_t c = 0; c < output.size(); ++c) output[c] += weight * values[t][c];
  }
  for (double& value : output) value /= sum;
  return output;
}

inline double norm(const std::vector<double>& vector) {
  double sum = 0.0;
  for (const double value : vector) sum += value * value;
  return std::sqrt(sum);
}

}  // namespace tqai::test
