#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <string>
#include <tqai/eigen.hpp>
#include <tqai/half.hpp>
#include <tqai/quantizer.hpp>
#include <vector>

#include "encoded.hpp"
#include "law.hpp"

namespace tqai {
namespace {

using test::at_angle;
using test::both;
using test::Encoded;
using test::inner;
using test::kDataSeed;
using test::Sample;
using test::sphere_vectors;
using test::value_error;

constexpr double kHalfEpsilon = 0x1p-11;  // relative rounding error of FP16

// arXiv:2504.19874, Theorem 1, with the true numbers in place of the bounds.
void expect_table_distortion(int table_row) {
  const int dim = test::kTableDims[table_row];
  const std::vector<float> vectors = sphere_vectors(dim, 2000, kDataSeed);
  for (const RotationKind kind : {RotationKind::hadamard, RotationKind::haar}) {
    for (int bits = 1; bits <= 8; ++bits) {
      for (const Grid grid : {Grid::exact, Grid::int8}) {
        SCOPED_TRACE("bits=" + std::to_string(bits) +
                     (kind == RotationKind::haar ? ", haar" : ", hadamard") +
                     (grid == Grid::int8 ? ", int8" : ", exact"));
        QuantizerOptions options{dim, bits, kind};
        options.grid = grid;
        options.norm_correction = false;
        const Sample error = test::squared_errors(Quantizer(options), vectors);
        const double expected = test::kTable[table_row][bits - 1];
        const double rounding = kHalfEpsilon * kHalfEpsilon;  // of the norm
        const double most = grid == Grid::exact ? 1.01 : test::kGridFactor[bits - 1];
        EXPECT_LE(error.mean(), expected * most + rounding + 4.0 * error.error());
        EXPECT_GE(error.mean(), expected * 0.99 - 4.0 * error.error());
      }
    }
  }
}

TEST(Quantizer, DistortionOf64Dimensions) { expect_table_distortion(0); }
TEST(Quantizer, DistortionOf128Dimensions) { expect_table_distortion(1); }
TEST(Quantizer, DistortionOf256Dimensions) { expect_table_distortion(2); }

TEST(Quantizer, NormCorrectionKeepsTheLength) {
  for (const int dim : {8, 31, 64, 128}) {
    std::vector<float> vectors = sphere_vectors(dim, 50, kDataSeed);
    for (std::size_t i = 0; i < vectors.size(); ++i) vectors[i] *= 37.5F;
    for (int bits = 1; bits <= 8; ++bits) {
      for (const Grid grid : {Grid::exact, Grid::int8}) {
        QuantizerOptions options{dim, bits};
        options.grid = grid;
        const Quantizer quantizer(options);
        const Encoded encoded(quantizer, vectors);
        const std::vector<float> decoded = encoded.decode(quantizer);
        for (std::int64_t r = 0; r < encoded.rows; ++r) {
          const float* row = decoded.data() + r * dim;
          ASSERT_NEAR(std::sqrt(inner(row, row, dim)) / 37.5, 1.0, 1.01 * kHalfEpsilon) << bits;
        }
      }
    }
  }
}

// Written from the definition: rotate the unit vector, take the nearest centroids, store code i at
// bits i·b….
TEST(Quantizer, StoresTheCodesOfTheRotatedUnitVector) {
  for (const int dim : {8, 9, 31, 33, 80}) {
    const std::vector<float> vectors = sphere_vectors(dim, 7, kDataSeed);
    for (int bits = 1; bits <= 8; ++bits) {
      for (const Grid grid : {Grid::exact, Grid::int8}) {
        QuantizerOptions options{dim, bits};
        options.grid = grid;
        options.norm_correction = false;
        const Quantizer quantizer(options);
        EXPECT_EQ(quantizer.code_bytes(), static_cast<std::size_t>((dim * bits + 7) / 8));
        EXPECT_EQ(quantizer.norm_count(), 1);
        const Encoded encoded(quantizer, vectors);
        std::vector<float> rotated(vectors.size());
        quantizer.rotation().apply(vectors.data(), rotated.data(), encoded.rows);
        const auto bit = [&](std::int64_t row, int index) {
          const auto bytes = static_cast<std::int64_t>(quantizer.code_bytes());
          return encoded.codes[static_cast<std::size_t>(row * bytes + index / 8)] >> index % 8 & 1;
        };
        for (std::int64_t r = 0; r < encoded.rows; ++r) {
          EXPECT_EQ(encoded.norms[static_cast<std::size_t>(r)], to_half(1.0F));
          for (int i = 0; i < dim; ++i) {
            unsigned code = 0;
            for (int b = 0; b < bits; ++b) {
              code |= static_cast<unsigned>(bit(r, i * bits + b)) << b;
            }
            // Rounding of the norm may move a coordinate over a boundary beside it.
            const float y = rotated[static_cast<std::size_t>(r * dim + i)];
            const auto low = quantizer.codebook().encode(y - 1e-6F);
            const auto high = quantizer.codebook().encode(y + 1e-6F);
            ASSERT_TRUE(code == low || code == high) << dim << ", " << bits << ", " << i;
          }
          for (int b = dim * bits; b < 8 * static_cast<int>(quantizer.code_bytes()); ++b) {
            ASSERT_EQ(bit(r, b), 0) << "padding";
          }
        }
      }
    }
  }
}

TEST(Quantizer, InnerProductsAreThoseOfTheDecodedVectors) {
  for (const int dim : {8, 31, 64, 80, 128}) {
    std::vector<float> vectors = sphere_vectors(dim, 9, kDataSeed);
    for (std::size_t i = 0; i < vectors.size(); ++i) vectors[i] *= 3.0F;
    const std::vector<float> queries = sphere_vectors(dim, 4, kDataSeed + 1);
    for (int bits = 1; bits <= 8; ++bits) {
      for (const auto& quantizer : both(dim, bits)) {
        const Encoded encoded(*quantizer, vectors);
        const std::vector<float> decoded = encoded.decode(*quantizer);
        const std::vector<float> products = encoded.inner_products(*quantizer, queries);
        for (std::int64_t q = 0; q < 4; ++q) {
          for (std::int64_t r = 0; r < encoded.rows; ++r) {
            const double expected = inner(queries.data() + q * dim, decoded.data() + r * dim, dim);
            ASSERT_NEAR(products[static_cast<std::size_t>(q * encoded.rows + r)], expected, 1e-5)
                << dim << ", " << bits;
          }
        }
      }
    }
  }
}

// arXiv:2504.19874, §3.2: the first quantiser shrinks inner products, at 1 bit to 2/π; by the law
// of the sphere to 1 − D. This is what the second one mends.
TEST(Quantizer, InnerProductsAreBiasedAtOneBit) {
  constexpr int kDim = 64;
  constexpr double kCosine = 0.5;
  const std::vector<float> x = sphere_vectors(kDim, 4000, kDataSeed);
  const std::vector<float> y = at_angle(x, kDim, kCosine);
  QuantizerOptions options{kDim, 1};
  options.norm_correction = false;
  const Quantizer quantizer(options);
  const std::vector<float> decoded = Encoded(quantizer, x).decode(quantizer);
  Sample sample;
  for (std::size_t row = 0; row < x.size(); row += kDim) {
    sample.add(inner(decoded.data() + row, y.data() + row, kDim));
  }
  EXPECT_NEAR(sample.mean(), kCosine * (1.0 - test::kTable[0][0]), 3.0 * sample.error());
  EXPECT_LT(sample.mean(), kCosine - 50.0 * sample.error());
}

TEST(VectorQuantizer, SameOptionsSameBits) {
  const std::vector<float> vectors = sphere_vectors(80, 5, kDataSeed);
  for (const int bits : {1, 4}) {
    const auto first = both(80, bits);
    const auto second = both(80, bits);
    for (std::size_t i = 0; i < first.size(); ++i) {
      const Encoded a(*first[i], vectors);
      const Encoded b(*second[i], vectors);
      EXPECT_EQ(a.codes, b.codes);
      EXPECT_EQ(a.norms, b.norms);
    }
  }
}

TEST(VectorQuantizer, ZeroVectorsDecodeToZeros) {
  for (const int dim : {8, 31, 64}) {
    std::vector<float> vectors(static_cast<std::size_t>(3 * dim), 0.0F);
    vectors[static_cast<std::size_t>(dim)] = 2.0F;  // the middle one is not zero
    for (int bits = 1; bits <= 8; ++bits) {
      for (const auto& quantizer : both(dim, bits)) {
        const Encoded encoded(*quantizer, vectors);
        const std::vector<float> decoded = encoded.decode(*quantizer);
        const std::vector<float> products = encoded.inner_products(*quantizer, vectors);
        for (const std::ptrdiff_t row : {0, 2}) {
          const float* vector = decoded.data() + row * dim;
          EXPECT_EQ(inner(vector, vector, dim), 0.0) << bits;
          for (const std::ptrdiff_t q : {0, 1, 2}) {
            EXPECT_EQ(products[static_cast<std::size_t>(q * 3 + row)], 0.0F) << bits;
          }
        }
        EXPECT_GT(products[4], 0.5F) << bits;
      }
    }
  }
}

TEST(VectorQuantizer, NormsReachAsFarAsFP16) {
  QuantizerOptions options{64, 8};
  options.norm_correction = false;
  const Quantizer quantizer(options);
  std::vector<float> vector(64, 0.0F);
  for (const float norm : {kMaxHalf, 1.0F, 0x1p-14F, 0x1p-24F}) {
    vector[5] = -norm;
    const Encoded encoded(quantizer, vector);
    EXPECT_EQ(from_half(encoded.norms[0]), norm);
    const std::vector<float> decoded = encoded.decode(quantizer);
    EXPECT_NEAR(decoded[5] / -norm, 1.0F, 0.02F);
  }
}

TEST(VectorQuantizer, RefusesVectorsWithoutAnFP16Norm) {
  for (const int bits : {1, 4, 8}) {
    for (const auto& quantizer : both(16, bits)) {
      std::vector<float> vectors(3 * 16, 1.0F);
      const auto error = [&] { return value_error([&] { Encoded(*quantizer, vectors); }); };
      vectors[16 + 3] = std::numeric_limits<float>::quiet_NaN();
      EXPECT_EQ(error(), "row 1: coordinate 3 = nan; allowed: finite numbers");
      vectors[16 + 3] = -std::numeric_limits<float>::infinity();
      EXPECT_EQ(error(), "row 1: coordinate 3 = -inf; allowed: finite numbers");
      vectors[16 + 3] = 1.0F;
      vectors[32] = 80000.0F;
      EXPECT_NE(error().find("row 2: "), std::string::npos) << error();
      EXPECT_NE(error().find("norm 80000 "), std::string::npos) << error();
      EXPECT_NE(error().find("allowed: up to 65504"), std::string::npos) << error();
      vectors[32] = 3e38F;  // its square is not even a float
      EXPECT_NE(error().find("norm 3e+38 "), std::string::npos) << error();
    }
  }
}

TEST(VectorQuantizer, RefusesOptionsOutOfRange) {
  const auto mse = [](int dim, int bits, RotationKind kind = RotationKind::automatic) {
    return value_error([=] { Quantizer({dim, bits, kind}); });
  };
  const auto prod = [](int dim, int bits, RotationKind kind = RotationKind::automatic) {
    return value_error([=] { ProdQuantizer({dim, bits, kind}); });
  };
  EXPECT_EQ(mse(0, 4), "head_dim = 0; allowed: 8…576");
  EXPECT_EQ(prod(577, 4), "head_dim = 577; allowed: 8…576");
  EXPECT_EQ(mse(64, 0), "bits = 0; allowed: 1…8");
  EXPECT_EQ(mse(64, 9), "bits = 9; allowed: 1…8");
  EXPECT_EQ(prod(64, 0), "bits = 0; allowed: 1…8");
  EXPECT_EQ(prod(64, 9), "bits = 9; allowed: 1…8");
  const std::string hadamard =
      "head_dim = 80 with a Hadamard rotation; allowed: powers of two, or a Haar rotation";
  EXPECT_EQ(mse(80, 4, RotationKind::hadamard), hadamard);
  EXPECT_EQ(prod(80, 4, RotationKind::hadamard), hadamard);
}

TEST(VectorQuantizer, RefusesBadCountsAndBuffers) {
  const Quantizer quantizer({16, 4});
  std::vector<float> vectors(16, 1.0F);
  Encoded encoded(quantizer, vectors);
  const float* x = vectors.data();
  std::uint8_t* codes = encoded.codes.data();
  std::uint16_t* norms = encoded.norms.data();
  EXPECT_EQ(value_error([&] { quantizer.encode(x, -1, codes, norms); }),
            "rows = -1; allowed: 0 or more");
  EXPECT_EQ(value_error([&] { quantizer.decode(codes, norms, -2, vectors.data()); }),
            "rows = -2; allowed: 0 or more");
  EXPECT_EQ(value_error([&] { quantizer.inner_products(x, -3, codes, norms, 1, vectors.data()); }),
            "query_rows = -3; allowed: 0 or more");
  EXPECT_EQ(value_error([&] { quantizer.encode(x, 1, codes, nullptr); }),
            "norms is a null pointer for 1 rows; allowed: only for none");
  EXPECT_EQ(value_error([&] { quantizer.decode(nullptr, norms, 1, vectors.data()); }),
            "codes is a null pointer for 1 rows; allowed: only for none");
  quantizer.encode(nullptr, 0, nullptr, nullptr);
  quantizer.inner_products(x, 1, nullptr, nullptr, 0, nullptr);
}

TEST(VectorQuantizer, EigenViewsAreThePointers) {
  const std::vector<float> vectors = sphere_vectors(31, 6, kDataSeed);
  const std::vector<float> queries = sphere_vectors(31, 2, kDataSeed + 1);
  const Eigen::Map<const RowMatrix> x(vectors.data(), 6, 31);
  const Eigen::Map<const RowMatrix> q(queries.data(), 2, 31);
  for (const auto& quantizer : both(31, 3)) {
    const Encoded expected(*quantizer, vectors);
    CodeMatrix codes(6, static_cast<Eigen::Index>(quantizer->code_bytes()));
    NormMatrix norms(6, quantizer->norm_count());
    quantizer->encode(x, codes, norms);
    EXPECT_TRUE(std::equal(expected.codes.begin(), expected.codes.end(), codes.data()));
    EXPECT_TRUE(std::equal(expected.norms.begin(), expected.norms.end(), norms.data()));

    RowMatrix decoded(6, 31);
    RowMatrix products(2, 6);
    quantizer->decode(codes, norms, decoded);
    quantizer->inner_products(q, codes, norms, products);
    const std::vector<float> all = expected.decode(*quantizer);
    const std::vector<float> dots = expected.inner_products(*quantizer, queries);
    EXPECT_TRUE(std::equal(all.begin(), all.end(), decoded.data()));
    EXPECT_TRUE(std::equal(dots.begin(), dots.end(), products.data()));
  }
}

TEST(VectorQuantizer, RefusesViewsOfOtherShapes) {
  for (const auto& quantizer : both(32, 4)) {
    CodeMatrix codes(6, static_cast<Eigen::Index>(quantizer->code_bytes()));
    NormMatrix norms(6, quantizer->norm_count());
    RowMatrix vectors = RowMatrix::Ones(6, 32);
    RowMatrix wide(6, 40);
    RowMatrix turned(6, 2);
    quantizer->encode(vectors, codes, norms);
    EXPECT_EQ(value_error([&] { quantizer->encode(wide, codes, norms); }),
              "vectors has shape [6, 40]; allowed: [6, 32]");
    EXPECT_EQ(value_error([&] { quantizer->encode(vectors.topRows(5), codes, norms); }),
              "codes has shape [6, " + std::to_string(codes.cols()) + "]; allowed: [5, " +
                  std::to_string(codes.cols()) + "]");
    EXPECT_EQ(value_error([&] { quantizer->decode(codes, norms.topRows(4), vectors); }),
              "norms has shape [4, " + std::to_string(norms.cols()) + "]; allowed: [6, " +
                  std::to_string(norms.cols()) + "]");
    EXPECT_EQ(value_error([&] { quantizer->decode(codes, norms, wide.leftCols(32)); }),
              "vectors has rows 40 elements apart; allowed: contiguous ones, 32");
    EXPECT_EQ(
        value_error([&] { quantizer->inner_products(vectors.topRows(2), codes, norms, turned); }),
        "products has shape [6, 2]; allowed: [2, 6]");
  }
}

}  // namespace
}  // namespace tqai
