#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <initializer_list>
#include <limits>
#include <numbers>
#include <random>
#include <span>
#include <string>
#include <thread>
#include <tqai/codebook.hpp>
#include <vector>

#include "law.hpp"

namespace tqai {
namespace {

using test::law_moment;

constexpr float kInfinity = std::numeric_limits<float>::infinity();

/// d · E[(t − c(t))²] by quadrature, each t to the nearest centroid.
double quadrature(int dim, const std::vector<double>& centroids) {
  double sum = 0.0;
  for (std::size_t i = 0; i < centroids.size(); ++i) {
    const double c = centroids[i];
    const double low = i == 0 ? -1.0 : 0.5 * (centroids[i - 1] + c);
    const double high = i + 1 == centroids.size() ? 1.0 : 0.5 * (c + centroids[i + 1]);
    sum += law_moment(dim, 2, low, high) - 2.0 * c * law_moment(dim, 1, low, high) +
           c * c * law_moment(dim, 0, low, high);
  }
  return dim * sum;
}

std::vector<double> doubles(std::span<const float> values) {
  return {values.begin(), values.end()};
}

/// `check` of each codebook of the given bits and grids.
template <typename Check>
void for_each_book(std::initializer_list<Grid> grids, int most_bits, Check&& check) {
  for (const int dim : {8, 9, 31, 64, 96, 128, 256, 512, 576}) {
    for (int bits = 1; bits <= most_bits; ++bits) {
      for (const Grid grid : grids) {
        const Codebook& book = codebook(dim, bits, grid);
        SCOPED_TRACE("d=" + std::to_string(dim) + ", bits=" + std::to_string(bits) +
                     (grid == Grid::exact ? ", exact" : ", int8"));
        EXPECT_EQ(book.head_dim(), dim);
        EXPECT_EQ(book.bits(), bits);
        EXPECT_EQ(book.grid(), grid);
        check(book);
      }
    }
  }
}

TEST(Codebook, ShapeAndOrder) {
  for_each_book({Grid::exact, Grid::int8}, 8, [](const Codebook& book) {
    const auto centroids = book.centroids();
    const auto boundaries = book.boundaries();
    ASSERT_EQ(centroids.size(), 1U << book.bits());
    ASSERT_EQ(boundaries.size(), centroids.size() - 1);
    for (std::size_t i = 0; i < boundaries.size(); ++i) {
      EXPECT_LT(centroids[i], boundaries[i]);
      EXPECT_LT(boundaries[i], centroids[i + 1]);
      const double middle = 0.5 * (static_cast<double>(centroids[i]) + centroids[i + 1]);
      EXPECT_EQ(boundaries[i], static_cast<float>(middle));
    }
    EXPECT_LT(centroids.back(), 1.0F);
  });
}

TEST(Codebook, IsSymmetric) {
  for_each_book({Grid::exact, Grid::int8}, 7, [](const Codebook& book) {
    const auto centroids = book.centroids();
    const auto boundaries = book.boundaries();
    for (std::size_t i = 0; i < centroids.size(); ++i) {
      EXPECT_EQ(centroids[i], -centroids[centroids.size() - 1 - i]);
    }
    EXPECT_EQ(boundaries[boundaries.size() / 2], 0.0F);
  });
}

TEST(Codebook, LevelsAreIntegers) {
  for_each_book({Grid::int8}, 8, [](const Codebook& book) {
    const auto levels = book.levels();
    ASSERT_EQ(levels.size(), book.centroids().size());
    EXPECT_GT(book.step(), 0.0F);
    for (std::size_t i = 0; i < levels.size(); ++i) {
      EXPECT_EQ(book.centroids()[i], static_cast<float>(levels[i]) * book.step());
      if (book.bits() == 8) {
        EXPECT_EQ(levels[i], static_cast<int>(i) - 128);
      } else {
        EXPECT_EQ(levels[i], -levels[levels.size() - 1 - i]);
        EXPECT_NE(levels[i], 0);
      }
    }
  });
}

TEST(Codebook, TheExactOneHasNoLevels) {
  EXPECT_TRUE(codebook(64, 4, Grid::exact).levels().empty());
  EXPECT_EQ(codebook(64, 4, Grid::exact).step(), 0.0F);
}

TEST(Codebook, DistortionIsThatOfTheLaw) {
  for_each_book({Grid::exact, Grid::int8}, 8, [](const Codebook& book) {
    EXPECT_NEAR(book.distortion() / quadrature(book.head_dim(), doubles(book.centroids())), 1.0,
                1e-5);
  });
}

// The two conditions of Lloyd and Max: boundaries are midpoints (above), and each centroid is the
// mean of its cell.
TEST(Codebook, ExactCentroidsAreMeansOfTheirCells) {
  for_each_book({Grid::exact}, 8, [](const Codebook& book) {
    const auto centroids = book.centroids();
    const auto boundaries = book.boundaries();
    for (std::size_t i = 0; i < centroids.size(); ++i) {
      const double low = i == 0 ? -1.0 : boundaries[i - 1];
      const double high = i + 1 == centroids.size() ? 1.0 : boundaries[i];
      const double mean =
          law_moment(book.head_dim(), 1, low, high) / law_moment(book.head_dim(), 0, low, high);
      EXPECT_NEAR(centroids[i], mean, 1e-4 * (centroids[1] - centroids[0])) << i;
    }
  });
}

TEST(Codebook, NoStepNorNeighbouringLevelIsBetter) {
  for_each_book({Grid::int8}, 8, [](const Codebook& book) {
    std::vector<int> levels(book.levels().begin(), book.levels().end());
    const auto distortion = [&](const std::vector<int>& chosen, double step) {
      std::vector<double> centroids;
      for (const int level : chosen) centroids.push_back(level * step);
      return quadrature(book.head_dim(), centroids);
    };
    const double best = distortion(levels, book.step());
    for (const double factor : {0.98, 0.995, 1.005, 1.02}) {
      EXPECT_GT(distortion(levels, factor * book.step()), best) << factor;
    }
    if (book.bits() == 8) return;
    const std::size_t count = levels.size();
    for (std::size_t i = count / 2; i < count; ++i) {
      for (const int change : {-1, 1}) {
        std::vector<int> changed = levels;
        changed[i] += change;
        changed[count - 1 - i] -= change;
        const bool legal = changed[i] > (i == count / 2 ? 0 : changed[i - 1]) &&
                           changed[i] < (i + 1 == count ? 128 : changed[i + 1]);
        if (!legal) continue;
        EXPECT_GE(distortion(changed, book.step()), best * (1.0 - 1e-7)) << i;
      }
    }
  });
}

TEST(Codebook, EncodesToTheNearest) {
  for_each_book({Grid::exact, Grid::int8}, 8, [](const Codebook& book) {
    const auto centroids = book.centroids();
    std::mt19937_64 random(static_cast<std::uint64_t>(book.head_dim() * 16 + book.bits()));
    std::normal_distribution<float> normal(0.0F,
                                           1.2F / std::sqrt(static_cast<float>(book.head_dim())));
    for (int i = 0; i < 500; ++i) {
      const float t = normal(random);
      const auto distance = [t](float c) { return std::abs(static_cast<double>(t) - c); };
      double least = std::numeric_limits<double>::infinity();
      for (const float c : centroids) least = std::min(least, distance(c));
      // Boundaries are rounded to fp32: beside one, the other centroid may be nearer by as much.
      EXPECT_LE(distance(centroids[book.encode(t)]), least + 1e-7) << t;
    }
  });
}

TEST(Codebook, TiesGoUp) {
  for_each_book({Grid::exact, Grid::int8}, 8, [](const Codebook& book) {
    const auto boundaries = book.boundaries();
    for (std::size_t i = 0; i < boundaries.size(); ++i) {
      EXPECT_EQ(book.encode(boundaries[i]), i + 1);
      EXPECT_EQ(book.encode(std::nextafter(boundaries[i], -kInfinity)), i);
    }
    EXPECT_EQ(book.encode(-kInfinity), 0);
    EXPECT_EQ(book.encode(kInfinity), boundaries.size());
  });
}

TEST(Codebook, ExactDistortionIsTheTables) {
  for (int k = 0; k < 3; ++k) {
    for (int bits = 1; bits <= 8; ++bits) {
      const double expected = test::kTable[k][bits - 1];
      const double distortion = codebook(test::kTableDims[k], bits, Grid::exact).distortion();
      // The table has five digits.
      EXPECT_NEAR(distortion / expected, 1.0, 1e-4) << test::kTableDims[k] << ", " << bits;
    }
  }
}

TEST(Codebook, Int8GridCostsLittle) {
  for (int k = 0; k < 3; ++k) {
    for (int bits = 1; bits <= 8; ++bits) {
      const double exact = codebook(test::kTableDims[k], bits, Grid::exact).distortion();
      const double distortion = codebook(test::kTableDims[k], bits, Grid::int8).distortion();
      EXPECT_LE(distortion, exact * test::kGridFactor[bits - 1]) << bits;
      EXPECT_GE(distortion, exact * (1.0 - 1e-6)) << bits;
    }
    EXPECT_LE(codebook(test::kTableDims[k], 8, Grid::int8).distortion(), 1.2e-4);
  }
}

// arXiv:2504.19874, Theorems 1 and 3.
TEST(Codebook, DistortionIsWithinThePapersBounds) {
  for (const int dim : test::kTableDims) {
    for (int bits = 1; bits <= 8; ++bits) {
      const double unit = std::pow(4.0, -bits);
      const double distortion = codebook(dim, bits, Grid::exact).distortion();
      EXPECT_GE(distortion, unit);
      EXPECT_LE(distortion, std::sqrt(3.0) * std::numbers::pi / 2.0 * unit);
    }
  }
}

TEST(Codebook, IsSolvedOnceForAllThreads) {
  std::vector<const Codebook*> found(8);
  std::vector<std::thread> threads;
  for (const Codebook*& place : found) {
    threads.emplace_back([&place] { place = &codebook(77, 5, Grid::int8); });
  }
  for (std::thread& thread : threads) thread.join();
  for (const Codebook* book : found) EXPECT_EQ(book, found.front());
  EXPECT_EQ(&codebook(77, 5, Grid::int8), found.front());
  EXPECT_NE(&codebook(77, 5, Grid::exact), found.front());
}

TEST(Codebook, EveryHeadDimensionIsSolved) {
  for (int dim = 8; dim <= 576; ++dim) {
    const Codebook book(dim, 8, Grid::exact);
    EXPECT_TRUE(std::is_sorted(book.centroids().begin(), book.centroids().end())) << dim;
    // Rises with d towards the Gaussian's 4.1185e-5.
    EXPECT_GT(book.distortion(), 2.8e-5) << dim;
    EXPECT_LT(book.distortion(), 4.1185e-5) << dim;
  }
}

TEST(Codebook, RefusesWhatIsOutOfRange) {
  const auto error = [](int dim, int bits) {
    return test::value_error([=] { codebook(dim, bits, Grid::exact); });
  };
  EXPECT_EQ(error(7, 4), "head_dim = 7; allowed: 8…576");
  EXPECT_EQ(error(577, 4), "head_dim = 577; allowed: 8…576");
  EXPECT_EQ(error(64, 0), "bits = 0; allowed: 1…8");
  EXPECT_EQ(error(64, 9), "bits = 9; allowed: 1…8");
}

}  // namespace
}  // namespace tqai
