#include <gtest/gtest.h>

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
    const std::vector<float> x = sphere_vectors(kDim, 1, kDataSeed + static_cast<unsigned>(bits));
    const std::vector<float> y = at_angle(x, kDim, 0.5);
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

TEST(ProdQuantizer, ProjectionIsNotTheRotation) {
  // With one generator for both, equal seeds would make the rotation a function of the projection.
  constexpr int kDim = 16;
  ProdQuantizerOptions options{kDim, 1, RotationKind::haar, 9, 9};
  Sample sample;
  const std::vector<float> x = sphere_vectors(kDim, 1, kDataSeed);
  for (std::uint64_t seed = 0; seed < 2000; ++seed) {
    options.seed = seed;
    options.projection_seed = seed;
    const ProdQuantizer quantizer(options);
    sample.add(Encoded(quantizer, x).inner_products(quantizer, x)[0]);
  }
  EXPECT_NEAR(sample.mean(), 1.0, 3.0 * sample.error());
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
