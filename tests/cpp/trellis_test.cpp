#include <gtest/gtest.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <random>
#include <string>
#include <tqai/codebook.hpp>
#include <tqai/half.hpp>
#include <tqai/quantizer.hpp>
#include <tqai/trellis.hpp>
#include <vector>

#include "encoded.hpp"
#include "law.hpp"

namespace tqai {
namespace {

using test::Encoded;
using test::inner;
using test::kDataSeed;
using test::Sample;
using test::sphere_vectors;
using test::value_error;

Quantizer trellis_quantizer(int dim, int bits, bool norm_correction = true) {
  QuantizerOptions options{dim, bits};
  options.norm_correction = norm_correction;
  options.codes = CodeKind::trellis;
  return Quantizer(options);
}

// The 8 bits that end with code i's highest, bit by bit, round the ring.
unsigned window_of(const std::uint8_t* codes, int dim, int bits, int i) {
  const int size = dim * bits;
  unsigned window = 0;
  for (int k = 0; k < 8; ++k) {
    const int place = (((i + 1) * bits - 8 + k) % size + size) % size;
    window |= static_cast<unsigned>(codes[place / 8] >> (place % 8) & 1) << k;
  }
  return window;
}

TEST(Trellis, LevelsGoByTheWindowRoundTheRing) {
  std::mt19937 random(3);
  for (int bits = 1; bits <= kMaxTrellisBits; ++bits) {
    for (const int dim : {8, 9, 31, 64, 131}) {
      const Quantizer quantizer = trellis_quantizer(dim, bits);
      std::vector<std::uint8_t> codes(quantizer.code_bytes());
      for (std::uint8_t& byte : codes) byte = static_cast<std::uint8_t>(random());
      const std::uint16_t one = to_half(1.0F);
      std::vector<float> decoded(static_cast<std::size_t>(dim));
      quantizer.decode(codes.data(), &one, 1, decoded.data());
      quantizer.rotation().apply(decoded.data(), decoded.data(), 1);
      const float step = trellis(bits).step(dim);
      for (int i = 0; i < dim; ++i) {
        const int level = trellis(bits).level(window_of(codes.data(), dim, bits, i));
        ASSERT_NEAR(decoded[static_cast<std::size_t>(i)] / step, level, 1e-3)
            << "bits=" << bits << " dim=" << dim << " i=" << i;
      }
    }
  }
}

TEST(Trellis, AWindowAndItsComplementAreOppositeLevels) {
  for (int bits = 1; bits <= kMaxTrellisBits; ++bits) {
    const Trellis& tables = trellis(bits);
    EXPECT_EQ(tables.bits, bits);
    int most = 0;
    for (unsigned window = 0; window < 256; ++window) {
      EXPECT_EQ(tables.level(window), -tables.level(window ^ 255U));
      most = std::max(most, tables.level(window));
    }
    EXPECT_LE(most, kMaxNarrowLevel);
    EXPECT_GE(most, kMaxNarrowLevel - 3);  // the grid is used
    EXPECT_FLOAT_EQ(tables.step(64), static_cast<float>(tables.unit / 8.0));
  }
}

// Of what Lloyd–Max codebooks have at the same bits; no quantiser is below 4^−bits.
TEST(Trellis, SquaredErrorsAreAThirdLess) {
  constexpr double kMost[] = {.835, .71, .68, .69};
  for (int row = 0; row < 2; ++row) {
    const int dim = test::kTableDims[row];
    const std::vector<float> vectors = sphere_vectors(dim, 1500, kDataSeed);
    for (int bits = 1; bits <= kMaxTrellisBits; ++bits) {
      const Sample error = test::squared_errors(trellis_quantizer(dim, bits, false), vectors);
      const double scalar = test::kTable[row][bits - 1];
      EXPECT_LE(error.mean() - 3.0 * error.error(), kMost[bits - 1] * scalar) << dim << ' ' << bits;
      EXPECT_GE(error.mean() + 3.0 * error.error(), std::pow(4.0, -bits)) << dim << ' ' << bits;
    }
  }
}

// Of the 256 rings of 8 codes of 1 bit, and of the 65536 of 2.
TEST(Trellis, CodesAreTheBestOfShortRings) {
  constexpr int kDim = 8;
  for (const int bits : {1, 2}) {
    const Quantizer quantizer = trellis_quantizer(kDim, bits, false);
    const std::vector<float> vectors = sphere_vectors(kDim, 60, kDataSeed);
    std::vector<float> rotated(vectors.size());
    quantizer.rotation().apply(vectors.data(), rotated.data(), 60);
    const Encoded encoded(quantizer, vectors);
    const float step = trellis(bits).step(kDim);
    const auto error = [&](const float* y, const std::uint8_t* codes) {
      double square = 0.0;
      for (int i = 0; i < kDim; ++i) {
        const int level = trellis(bits).level(window_of(codes, kDim, bits, i));
        square += std::pow(static_cast<double>(y[i] - static_cast<float>(level) * step), 2.0);
      }
      return square;
    };
    double found = 0.0;
    double best = 0.0;
    for (std::int64_t r = 0; r < encoded.rows; ++r) {
      const float* y = rotated.data() + r * kDim;
      found += error(y, encoded.codes.data() + r * bits);
      double least = 1e9;
      for (unsigned ring = 0; ring < 1U << (kDim * bits); ++ring) {
        const std::uint8_t codes[] = {static_cast<std::uint8_t>(ring),
                                      static_cast<std::uint8_t>(ring >> 8)};
        least = std::min(least, error(y, codes));
      }
      best += least;
    }
    EXPECT_LE(found, 1.01 * best) << bits;  // costs are rounded
    EXPECT_GE(found, 0.999 * best) << bits;
  }
}

// By turns the best paths and the best tables, as Lloyd's: moving an entry makes nothing better.
TEST(Trellis, TablesAreTheBestForTheirPaths) {
  constexpr int kDim = 512;
  const std::vector<float> vectors = sphere_vectors(kDim, 200, kDataSeed);
  std::vector<float> rotated(vectors.size());
  for (int bits = 1; bits <= kMaxTrellisBits; ++bits) {
    const Quantizer quantizer = trellis_quantizer(kDim, bits, false);
    quantizer.rotation().apply(vectors.data(), rotated.data(), 200);
    const Encoded encoded(quantizer, vectors);
    const Trellis& tables = trellis(bits);
    std::array<Sample, 16> recent;
    std::array<Sample, 16> older;
    for (std::int64_t r = 0; r < encoded.rows; ++r) {
      const std::uint8_t* codes =
          encoded.codes.data() + r * static_cast<std::int64_t>(quantizer.code_bytes());
      for (int i = 0; i < kDim; ++i) {
        const unsigned window = window_of(codes, kDim, bits, i);
        const double rest = static_cast<double>(rotated[static_cast<std::size_t>(r * kDim + i)]) /
                                tables.step(kDim) -
                            tables.level(window);
        recent[window >> 4].add(rest);
        older[window & 15U].add(rest);
      }
    }
    for (const auto& side : {recent, older}) {
      for (std::size_t i = 0; i < 16; ++i) {
        EXPECT_NEAR(side[i].mean(), 0.0, 0.6 + 4.0 * side[i].error()) << bits << ' ' << i;
      }
    }
  }
}

TEST(Trellis, RowsDoNotDependOnTheirNeighbours) {
  for (const int dim : {31, 64}) {
    const std::vector<float> vectors = sphere_vectors(dim, 70, kDataSeed);
    const Quantizer quantizer = trellis_quantizer(dim, 2);
    const Encoded all(quantizer, vectors);
    for (const int r : {0, 31, 32, 33, 69}) {
      const auto from = vectors.begin() + static_cast<std::ptrdiff_t>(r) * dim;
      const Encoded one(quantizer, std::vector<float>(from, from + dim));
      EXPECT_EQ(one.norms[0], all.norms[static_cast<std::size_t>(r)]);
      EXPECT_TRUE(std::equal(
          one.codes.begin(), one.codes.end(),
          all.codes.begin() +
              static_cast<std::ptrdiff_t>(static_cast<std::size_t>(r) * one.codes.size())));
    }
  }
}

TEST(Trellis, InnerProductsAreThoseOfTheDecodedVectors) {
  constexpr int kDim = 80;
  const std::vector<float> vectors = sphere_vectors(kDim, 40, kDataSeed);
  const std::vector<float> queries = sphere_vectors(kDim, 3, kDataSeed + 1);
  const Quantizer quantizer = trellis_quantizer(kDim, 3);
  const Encoded encoded(quantizer, vectors);
  const std::vector<float> decoded = encoded.decode(quantizer);
  const std::vector<float> products = encoded.inner_products(quantizer, queries);
  for (std::size_t q = 0; q < 3; ++q) {
    for (std::size_t r = 0; r < 40; ++r) {
      EXPECT_NEAR(products[q * 40 + r],
                  inner(queries.data() + q * kDim, decoded.data() + r * kDim, kDim), 1e-5);
    }
  }
}

// All its length in one rotated coordinate, far beyond the outermost level; and nothing at all.
TEST(Trellis, OutliersKeepTheirLengthAndZerosStayZeros) {
  constexpr int kDim = 128;
  for (int bits = 1; bits <= kMaxTrellisBits; ++bits) {
    const Quantizer quantizer = trellis_quantizer(kDim, bits);
    std::vector<float> vectors(3 * kDim, 0.0F);
    vectors[5] = 100.0F;
    vectors[kDim + 7] = -1e-3F;
    quantizer.rotation().apply_transposed(vectors.data(), vectors.data(), 2);
    const std::vector<float> decoded = Encoded(quantizer, vectors).decode(quantizer);
    for (std::size_t r = 0; r < 3; ++r) {
      const float* from = decoded.data() + r * kDim;
      const double length = std::sqrt(inner(from, from, kDim));
      const float* original = vectors.data() + r * kDim;
      EXPECT_NEAR(length, std::sqrt(inner(original, original, kDim)), 1e-3 * length) << bits;
      if (r == 2) {
        EXPECT_EQ(length, 0.0);
      } else {
        EXPECT_GT(inner(from, original, kDim) / length / length, 0.3) << bits;
      }
    }
  }
}

TEST(Trellis, RefusesOtherWidthsAndKinds) {
  EXPECT_EQ(value_error([] { trellis(5); }), "bits of trellis codes = 5; allowed: 1…4");
  EXPECT_EQ(value_error([] { trellis(0); }), "bits of trellis codes = 0; allowed: 1…4");
  EXPECT_EQ(value_error([] { trellis_quantizer(64, 8); }),
            "bits of trellis codes = 8; allowed: 1…4");
  QuantizerOptions options{64, 4};
  options.codes = static_cast<CodeKind>(2);
  EXPECT_EQ(value_error([&] { Quantizer{options}; }), "codes = 2; allowed: 0…1");
}

}  // namespace
}  // namespace tqai
