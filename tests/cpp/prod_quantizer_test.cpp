#include <gtest/gtest.h>

#include <cstddef>
#include <cstdint>
#include <numbers>
#include <tqai/quantizer.hpp>
#include <vector>

#include "encoded.hpp"
#include "law.hpp"

namespace tqai {
namespace {

using test::at_angle;
using test::Encoded;
using test::inner;
using test::kDataSeed;
using test::Sample;
using test::sphere_vectors;

// Unbiased over the projection, for any fixed vectors: the mean over seeds is the inner product to
// 3 standard errors, and the variance is the theory's, (π/2·‖r‖²‖y‖² − ⟨r, y⟩²) / d for the
// residual r.
TEST(ProdQuantizer, InnerProductsAreUnbiased) {
  constexpr int kDim = 32;
  constexpr int kSeeds = 1500;
  for (const int bits : {1, 2, 3, 5, 8}) {
    SCOPED_TRACE(bits);
    std::vector<float> x = sphere_vectors(kDim, 1, kDataSeed + static_cast<unsigned>(bits));
    const std::vector<float> y = at_angle(x, kDim, 0.5);
    for (float& coordinate : x) coordinate *= 6.5F;
    std::vector<double> residual(x.begin(), x.end());
    if (bits > 1) {
      QuantizerOptions options{kDim, bits - 1};
      options.norm_correction = false;
      const Quantizer quantizer(options);
      const std::vector<float> decoded = Encoded(quantizer, x).decode(quantizer);
      for (std::size_t i = 0; i < residual.size(); ++i) residual[i] -= decoded[i];
    }
    double residual_square = 0.0;
    double residual_product = 0.0;
    for (std::size_t i = 0; i < residual.size(); ++i) {
      residual_square += residual[i] * residual[i];
      residual_product += residual[i] * y[i];
    }
    Sample sample;
    ProdQuantizerOptions options{kDim, bits};
    for (int seed = 0; seed < kSeeds; ++seed) {
      options.projection_seed = static_cast<std::uint64_t>(seed);
      const ProdQuantizer quantizer(options);
      sample.add(Encoded(quantizer, x).inner_products(quantizer, y)[0]);
    }
    const double variance =
        (std::numbers::pi / 2.0 * residual_square - residual_product * residual_product) / kDim;
    EXPECT_NEAR(sample.mean(), inner(x.data(), y.data(), kDim), 3.0 * sample.error());
    EXPECT_NEAR(sample.variance() / variance, 1.0, 0.15);
  }
}

// A Haar rotation is the Q of a Gaussian's QR decomposition: were S that Gaussian, QᵀS would be
// upper triangular, and the two not independent.
TEST(ProdQuantizer, ProjectionIsNotTheRotationsGaussian) {
  constexpr std::size_t kDim = 16;
  ProdQuantizerOptions options{kDim, 2, RotationKind::haar};
  options.seed = 9;
  options.projection_seed = 9;
  const ProdQuantizer quantizer(options);
  double below = 0.0;
  for (std::size_t i = 0; i < kDim; ++i) {
    for (std::size_t j = 0; j < i; ++j) {
      double entry = 0.0;
      for (std::size_t k = 0; k < kDim; ++k) {
        entry += static_cast<double>(quantizer.rotation().matrix()[k * kDim + i]) *
                 static_cast<double>(quantizer.projection()[k * kDim + j]);
      }
      below += entry * entry;
    }
  }
  EXPECT_GT(below, 0.5 * kDim * (kDim - 1) / 2);  // 1 each on average
}

TEST(ProdQuantizer, ProjectionIsStandardGaussian) {
  const ProdQuantizer quantizer({256, 2});
  Sample first;
  Sample second;
  for (const float entry : quantizer.projection()) {
    first.add(entry);
    second.add(static_cast<double>(entry) * static_cast<double>(entry));
  }
  EXPECT_NEAR(first.mean(), 0.0, 4.0 * first.error());
  EXPECT_NEAR(second.mean(), 1.0, 4.0 * second.error());
}

TEST(ProdQuantizer, Sizes) {
  for (const int dim : {8, 31, 64}) {
    for (int bits = 1; bits <= 8; ++bits) {
      const ProdQuantizer quantizer({dim, bits});
      EXPECT_EQ(quantizer.code_bytes(),
                static_cast<std::size_t>((dim * (bits - 1) + 7) / 8 + (dim + 7) / 8));
      EXPECT_EQ(quantizer.norm_count(), bits == 1 ? 1 : 2);
    }
  }
}

}  // namespace
}  // namespace tqai
