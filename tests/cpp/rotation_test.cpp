#include <gtest/gtest.h>

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstdint>
#include <tqai/eigen.hpp>
#include <tqai/rotation.hpp>
#include <vector>

#include "law.hpp"
#include "random.hpp"

namespace tqai {
namespace {

using test::inner;
using test::sphere_vectors;
using test::value_error;

constexpr std::uint64_t kSeed = 20250419;
constexpr std::uint64_t kDataSeed = 77;  // never a rotation's

struct Case {
  int dim;
  RotationKind kind;
};

const std::vector<Case> kCases = {
    {8, RotationKind::hadamard},   {8, RotationKind::haar},   {9, RotationKind::haar},
    {31, RotationKind::haar},      {32, RotationKind::haar},  {33, RotationKind::haar},
    {64, RotationKind::hadamard},  {64, RotationKind::haar},  {80, RotationKind::haar},
    {128, RotationKind::hadamard}, {96, RotationKind::haar},  {128, RotationKind::haar},
    {256, RotationKind::hadamard}, {257, RotationKind::haar}, {512, RotationKind::hadamard},
    {512, RotationKind::haar}};

std::vector<float> identity(int dim) {
  std::vector<float> matrix(static_cast<std::size_t>(dim * dim), 0.0F);
  for (int i = 0; i < dim; ++i) matrix[static_cast<std::size_t>(i * dim + i)] = 1.0F;
  return matrix;
}

// Row i: R times unit vector i, that is column i of R.
std::vector<float> columns_of(const Rotation& rotation) {
  const int dim = rotation.head_dim();
  std::vector<float> columns = identity(dim);
  rotation.apply(columns.data(), columns.data(), dim);
  return columns;
}

// A product that no compiler can fuse with the sum that follows.
float product(float a, float b) {
  const volatile float result = a * b;
  return result;
}

// The published first outputs of SplitMix64 for this seed, and of xoshiro256** seeded by it as
// computed by an implementation of its own.
TEST(Random, KnownSequences) {
  SplitMix64 mix(1234567);
  for (const std::uint64_t expected :
       {6457827717110365317U, 3203168211198807973U, 9817491932198370423U, 4593380528125082431U}) {
    EXPECT_EQ(mix.next(), expected);
  }
  Xoshiro256 random(42);
  for (const std::uint64_t expected :
       {0x15780B2E0C2EC716U, 0x6104D9866D113A7EU, 0xAE17533239E499A1U, 0xECB8AD4703B360A1U}) {
    EXPECT_EQ(random.next(), expected);
  }
  Gaussian gaussian(7);
  for (const double expected :
       {-0.15157274547711408, 0.8298970879692569, 0.5870995807125803, -0.07005746853436715}) {
    EXPECT_NEAR(gaussian.next(), expected, 1e-13);
  }
}

TEST(Random, UniformIsNeverZero) {
  Xoshiro256 random(1);
  test::Sample sample;
  for (int i = 0; i < 100000; ++i) {
    const double u = random.uniform();
    ASSERT_GT(u, 0.0);
    ASSERT_LE(u, 1.0);
    sample.add(u);
  }
  EXPECT_NEAR(sample.mean(), 0.5, 4.0 * sample.error());
  EXPECT_NEAR(sample.variance(), 1.0 / 12.0, 1e-3);
}

TEST(Random, GaussianHasItsMoments) {
  Gaussian random(3);
  test::Sample first;
  test::Sample second;
  test::Sample fourth;
  test::Sample neighbours;  // the two of one Box–Muller pair
  double previous = 0.0;
  for (int i = 0; i < 200000; ++i) {
    const double z = random.next();
    first.add(z);
    second.add(z * z);
    fourth.add(z * z * z * z);
    if (i % 2 == 1) neighbours.add(z * previous);
    previous = z;
  }
  EXPECT_NEAR(first.mean(), 0.0, 4.0 * first.error());
  EXPECT_NEAR(second.mean(), 1.0, 4.0 * second.error());
  EXPECT_NEAR(fourth.mean(), 3.0, 4.0 * fourth.error());
  EXPECT_NEAR(neighbours.mean(), 0.0, 4.0 * neighbours.error());
}

TEST(Rotation, IsOrthogonal) {
  for (const auto& [dim, kind] : kCases) {
    const std::vector<float> columns = columns_of({dim, kind, kSeed});
    double worst = 0.0;
    for (int i = 0; i < dim; ++i) {
      for (int j = i; j < dim; ++j) {
        const double dot = inner(columns.data() + i * dim, columns.data() + j * dim, dim);
        worst = std::max(worst, std::abs(dot - (i == j ? 1.0 : 0.0)));
      }
    }
    EXPECT_LT(worst, 1e-6) << dim;
  }
}

TEST(Rotation, TransposedIsTheInverse) {
  constexpr int kRows = 3;
  for (const auto& [dim, kind] : kCases) {
    const Rotation rotation(dim, kind, kSeed);
    const std::vector<float> x = sphere_vectors(dim, kRows, kDataSeed);
    std::vector<float> y(x.size());
    std::vector<float> back(x.size());
    rotation.apply(x.data(), y.data(), kRows);
    rotation.apply_transposed(y.data(), back.data(), kRows);
    EXPECT_GT(1.0 - inner(x.data(), y.data(), dim), 1e-3) << dim;  // it does rotate
    for (std::size_t i = 0; i < x.size(); ++i) ASSERT_NEAR(back[i], x[i], 1e-6) << dim;
    rotation.apply_transposed(x.data(), y.data(), kRows);
    rotation.apply(y.data(), back.data(), kRows);
    for (std::size_t i = 0; i < x.size(); ++i) ASSERT_NEAR(back[i], x[i], 1e-6) << dim;
  }
}

TEST(Rotation, InPlaceAndRowByRowGiveTheSameBits) {
  constexpr int kRows = 5;
  for (const auto& [dim, kind] : kCases) {
    const Rotation rotation(dim, kind, kSeed);
    const std::vector<float> x = sphere_vectors(dim, kRows, kDataSeed);
    for (const bool transposed : {false, true}) {
      const auto rotate = [&](const float* from, float* to, int rows) {
        transposed ? rotation.apply_transposed(from, to, rows) : rotation.apply(from, to, rows);
      };
      std::vector<float> apart(x.size());
      std::vector<float> single(x.size());
      std::vector<float> in_place = x;
      rotate(x.data(), apart.data(), kRows);
      rotate(in_place.data(), in_place.data(), kRows);
      for (int r = 0; r < kRows; ++r) rotate(x.data() + r * dim, single.data() + r * dim, 1);
      EXPECT_EQ(in_place, apart) << dim;
      EXPECT_EQ(single, apart) << dim;
    }
  }
}

TEST(Rotation, HadamardIsTheExplicitMatrix) {
  for (int dim = 8; dim <= 512; dim *= 2) {
    const Rotation rotation(dim, RotationKind::hadamard, kSeed);
    const std::vector<float> columns = columns_of(rotation);
    ASSERT_EQ(rotation.signs().size(), static_cast<std::size_t>(dim));
    for (int i = 0; i < dim; ++i) {
      for (int j = 0; j < dim; ++j) {
        const bool negative = std::popcount(static_cast<unsigned>(i & j)) % 2 == 1;
        const double h = (negative ? -1.0 : 1.0) / std::sqrt(dim);
        const float sign = rotation.signs()[static_cast<std::size_t>(j)];
        ASSERT_NEAR(columns[static_cast<std::size_t>(j * dim + i)], h * sign, 1e-7);
      }
    }
  }
}

// The kernels rotate with other loops and rely on this order of additions.
TEST(Rotation, HadamardAddsInTheStatedOrder) {
  for (int dim = 8; dim <= 512; dim *= 2) {
    const Rotation rotation(dim, RotationKind::hadamard, kSeed);
    std::vector<float> x = sphere_vectors(dim, 1, kDataSeed);
    std::vector<float> y(x.size());
    rotation.apply(x.data(), y.data(), 1);
    for (std::size_t i = 0; i < x.size(); ++i) x[i] *= rotation.signs()[i];
    for (std::size_t stride = 1; stride < x.size(); stride *= 2) {
      std::vector<float> next(x.size());
      for (std::size_t i = 0; i < x.size(); ++i) {
        next[i] = (i & stride) == 0 ? x[i] + x[i + stride] : x[i - stride] - x[i];
      }
      x = next;
    }
    const float scale = 1.0F / std::sqrt(static_cast<float>(dim));
    for (std::size_t i = 0; i < x.size(); ++i) ASSERT_EQ(y[i], x[i] * scale) << dim;
  }
}

TEST(Rotation, HaarAddsInTheStatedOrder) {
  for (const int dim : {8, 9, 31, 80, 128}) {
    const Rotation rotation(dim, RotationKind::haar, kSeed);
    const auto size = static_cast<std::size_t>(dim);
    const std::vector<float> x = sphere_vectors(dim, 1, kDataSeed);
    std::vector<float> y(size);
    std::vector<float> z(size);
    rotation.apply(x.data(), y.data(), 1);
    rotation.apply_transposed(x.data(), z.data(), 1);
    for (std::size_t i = 0; i < size; ++i) {
      float sum = 0.0F;
      float transposed_sum = 0.0F;
      for (std::size_t k = 0; k < size; ++k) {
        sum += product(rotation.matrix()[i * size + k], x[k]);
        transposed_sum += product(rotation.matrix()[k * size + i], x[k]);
        ASSERT_EQ(rotation.matrix()[i * size + k], rotation.transposed_matrix()[k * size + i]);
      }
      ASSERT_EQ(y[i], sum) << dim;
      ASSERT_EQ(z[i], transposed_sum) << dim;
    }
  }
}

// Only uniformly random matrices have a trace of mean 0 and variance 1; without the fixed signs,
// QR's own choice shows in the mean.
TEST(Rotation, HaarIsUniform) {
  constexpr int kDim = 8;
  test::Sample trace;
  test::Sample trace_square;
  test::Sample corner_square;
  for (std::uint64_t seed = 0; seed < 3000; ++seed) {
    const Rotation rotation(kDim, RotationKind::haar, seed);
    double sum = 0.0;
    for (std::size_t i = 0; i < kDim; ++i) sum += rotation.matrix()[i * kDim + i];
    trace.add(sum);
    trace_square.add(sum * sum);
    corner_square.add(std::pow(rotation.matrix()[0], 2.0));
  }
  EXPECT_NEAR(trace.mean(), 0.0, 4.0 * trace.error());
  EXPECT_NEAR(trace_square.mean(), 1.0, 4.0 * trace_square.error());
  EXPECT_NEAR(corner_square.mean(), 1.0 / kDim, 4.0 * corner_square.error());
}

// Caches on disk keep only the seed. Pins computed by other code (NumPy).
TEST(Rotation, SeedsArePinned) {
  const Rotation hadamard(64, RotationKind::hadamard, 1);
  std::uint64_t negative = 0;
  for (std::size_t i = 0; i < 64; ++i) {
    ASSERT_EQ(std::abs(hadamard.signs()[i]), 1.0F);
    if (hadamard.signs()[i] < 0.0F) negative |= std::uint64_t{1} << i;
  }
  EXPECT_EQ(negative, 0xBD79C824B840FF17U);

  const Rotation haar(12, RotationKind::haar, 1);
  const auto matrix = haar.matrix();
  const float first[] = {-0.32056687F, -0.05600651F, -0.28734415F, 0.30431271F};
  const float last[] = {-0.09917626F, 0.05015341F, -0.10229716F, 0.22932319F};
  for (std::size_t i = 0; i < 4; ++i) {
    EXPECT_NEAR(matrix[i], first[i], 1e-6);
    EXPECT_NEAR(matrix[140 + i], last[i], 1e-6);
  }
}

// As Eigen's QR gave them, with which caches were written: files keep only the seed.
TEST(Rotation, HaarIsWhatItWasInEarlierVersions) {
  struct Pin {
    int dim;
    std::uint64_t seed;
    float first_row[2];  // its first and last entry
    float last_row[2];
    double trace;
  };
  const Pin pins[] = {
      {9, kSeed, {-0.0770749F, -0.46040037F}, {-0.2697861F, -0.49135002F}, -0.19721523},
      {24, 1, {-0.23062493F, -0.036937345F}, {0.12085741F, -0.036445983F}, 0.21425484},
      {80, 7, {-0.016596632F, -0.10054461F}, {-0.0015013291F, -0.11649322F}, -1.9069754},
      {96, kSeed, {-0.024279501F, -0.014267299F}, {-0.10375134F, -0.069499336F}, -1.3216626},
      {257, 3, {-0.03702116F, 0.059333365F}, {0.1048319F, 0.032594956F}, -0.44079191}};
  for (const Pin& pin : pins) {
    const Rotation rotation(pin.dim, RotationKind::haar, pin.seed);
    const auto matrix = rotation.matrix();
    const auto dim = static_cast<std::size_t>(pin.dim);
    double trace = 0.0;
    for (std::size_t i = 0; i < dim; ++i) trace += matrix[i * dim + i];
    EXPECT_NEAR(matrix[0], pin.first_row[0], 1e-6) << pin.dim;
    EXPECT_NEAR(matrix[dim - 1], pin.first_row[1], 1e-6) << pin.dim;
    EXPECT_NEAR(matrix[(dim - 1) * dim], pin.last_row[0], 1e-6) << pin.dim;
    EXPECT_NEAR(matrix[dim * dim - 1], pin.last_row[1], 1e-6) << pin.dim;
    EXPECT_NEAR(trace, pin.trace, 1e-5) << pin.dim;
  }
}

TEST(Rotation, SeedsDecide) {
  for (const RotationKind kind : {RotationKind::hadamard, RotationKind::haar}) {
    const Rotation rotation(64, kind, 5);
    EXPECT_EQ(rotation.seed(), 5U);
    EXPECT_EQ(columns_of(rotation), columns_of({64, kind, 5}));
    EXPECT_NE(columns_of(rotation), columns_of({64, kind, 6}));
  }
}

TEST(Rotation, AutomaticTakesHadamardForPowersOfTwo) {
  for (const int dim : {8, 64, 128, 512}) {
    const Rotation rotation(dim, RotationKind::automatic, kSeed);
    EXPECT_EQ(rotation.kind(), RotationKind::hadamard);
    EXPECT_TRUE(rotation.matrix().empty());
    EXPECT_TRUE(rotation.transposed_matrix().empty());
  }
  for (const int dim : {9, 80, 96, 511}) {
    const Rotation rotation(dim, RotationKind::automatic, kSeed);
    EXPECT_EQ(rotation.kind(), RotationKind::haar);
    EXPECT_TRUE(rotation.signs().empty());
  }
}

TEST(Rotation, EigenViewsAreThePointers) {
  constexpr int kRows = 4;
  const Rotation rotation(80, RotationKind::haar, kSeed);
  const std::vector<float> data = sphere_vectors(80, kRows, kDataSeed);
  const Eigen::Map<const RowMatrix> x(data.data(), kRows, 80);
  RowMatrix expected(kRows, 80);
  RowMatrix y(kRows, 80);
  RowMatrix wide = RowMatrix::Zero(kRows, 100);
  rotation.apply(data.data(), expected.data(), kRows);
  rotation.apply(x, y);
  EXPECT_EQ(y, expected);
  rotation.apply(x, wide.middleCols(10, 80));  // rows further apart
  EXPECT_EQ(wide.middleCols(10, 80), expected);
  EXPECT_TRUE((wide.rightCols(10).array() == 0.0F).all());
  rotation.apply_transposed(data.data(), expected.data(), kRows);
  rotation.apply_transposed(x, y);
  EXPECT_EQ(y, expected);
}

TEST(Rotation, RefusesWhatItCannotDo) {
  const auto error = [](int dim, RotationKind kind) {
    return value_error([=] { Rotation(dim, kind, 0); });
  };
  EXPECT_EQ(error(7, RotationKind::automatic), "head_dim = 7; allowed: 8…576");
  EXPECT_EQ(error(577, RotationKind::haar), "head_dim = 577; allowed: 8…576");
  EXPECT_EQ(error(80, RotationKind::hadamard),
            "head_dim = 80 with a Hadamard rotation; allowed: powers of two, or a Haar rotation");

  const Rotation rotation(16, RotationKind::automatic, 0);
  RowMatrix x = RowMatrix::Zero(3, 16);
  RowMatrix narrow(3, 8);
  RowMatrix few(2, 16);
  for (RowMatrix* y : {&narrow, &few}) {
    EXPECT_THROW(rotation.apply(x, *y), ValueError);
    EXPECT_THROW(rotation.apply_transposed(*y, x), ValueError);
  }
  EXPECT_EQ(value_error([&] { rotation.apply(x, narrow); }),
            "rotation of [3, 16] into [3, 8]; allowed: both [rows, 16]");
  EXPECT_EQ(value_error([&] { rotation.apply(x.data(), x.data(), -1); }),
            "rows = -1; allowed: 0 or more");
  EXPECT_EQ(value_error([&] { rotation.apply(nullptr, x.data(), 2); }),
            "null pointer for rows = 2; allowed: only for no rows");
  rotation.apply(nullptr, nullptr, 0);
}

}  // namespace
}  // namespace tqai
