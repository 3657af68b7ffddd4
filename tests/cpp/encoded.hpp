// Vectors through a quantiser and back, for the tests of both quantisers.
#pragma once

#include <cmath>
#include <cstdint>
#include <memory>
#include <tqai/quantizer.hpp>
#include <vector>

#include "law.hpp"

namespace tqai::test {

inline constexpr std::uint64_t kDataSeed = 1234;  // never a rotation's

struct Encoded {
  Encoded(const VectorQuantizer& quantizer, const std::vector<float>& vectors)
      : rows(static_cast<std::int64_t>(vectors.size()) / quantizer.head_dim()),
        codes(static_cast<std::size_t>(rows) * quantizer.code_bytes()),
        norms(static_cast<std::size_t>(rows * quantizer.norm_count())) {
    quantizer.encode(vectors.data(), rows, codes.data(), norms.data());
  }
  std::vector<float> decode(const VectorQuantizer& quantizer) const {
    std::vector<float> vectors(static_cast<std::size_t>(rows * quantizer.head_dim()), -1.0F);
    quantizer.decode(codes.data(), norms.data(), rows, vectors.data());
    return vectors;
  }
  std::vector<float> inner_products(const VectorQuantizer& quantizer,
                                    const std::vector<float>& queries) const {
    const auto query_rows = static_cast<std::int64_t>(queries.size()) / quantizer.head_dim();
    std::vector<float> products(static_cast<std::size_t>(query_rows * rows), -1.0F);
    quantizer.inner_products(queries.data(), query_rows, codes.data(), norms.data(), rows,
                             products.data());
    return products;
  }

  std::int64_t rows;
  std::vector<std::uint8_t> codes;
  std::vector<std::uint16_t> norms;
};

/// Squared errors of vectors that went through a quantiser and back.
inline Sample squared_errors(const Quantizer& quantizer, const std::vector<float>& vectors) {
  const std::vector<float> decoded = Encoded(quantizer, vectors).decode(quantizer);
  const auto dim = static_cast<std::size_t>(quantizer.head_dim());
  Sample errors;
  for (std::size_t row = 0; row < vectors.size(); row += dim) {
    double square = 0.0;
    for (std::size_t i = row; i < row + dim; ++i) {
      square += std::pow(static_cast<double>(vectors[i]) - decoded[i], 2.0);
    }
    errors.add(square);
  }
  return errors;
}

/// Both quantisers at these bits.
inline std::vector<std::unique_ptr<VectorQuantizer>> both(int dim, int bits) {
  std::vector<std::unique_ptr<VectorQuantizer>> quantizers;
  quantizers.push_back(std::make_unique<Quantizer>(QuantizerOptions{dim, bits}));
  quantizers.push_back(std::make_unique<ProdQuantizer>(ProdQuantizerOptions{dim, bits}));
  return quantizers;
}

/// A unit vector y with ⟨x, y⟩ = cosine for each unit vector of `x`.
inline std::vector<float> at_angle(const std::vector<float>& x, int dim, double cosine) {
  std::vector<float> y = sphere_vectors(dim, static_cast<int>(x.size()) / dim, kDataSeed + 1000);
  for (std::size_t row = 0; row < x.size(); row += static_cast<std::size_t>(dim)) {
    const double overlap = inner(x.data() + row, y.data() + row, dim);
    const double scale = std::sqrt((1.0 - cosine * cosine) / (1.0 - overlap * overlap));
    for (std::size_t i = row; i < row + static_cast<std::size_t>(dim); ++i) {
      const double across = static_cast<double>(y[i]) - overlap * static_cast<double>(x[i]);
      y[i] = static_cast<float>(cosine * static_cast<double>(x[i]) + scale * across);
    }
  }
  return y;
}

}  // namespace tqai::test
