// What prompts go through before they are encoded, at every level: plain loops here, bit for bit.
#include <cmath>
#include <limits>
#include <tqai/half.hpp>

#include "cache/rope_tables.hpp"
#include "cache_helpers.hpp"
#include "kernels_helpers.hpp"

namespace tqai {
namespace {

using test::Levels;

TQAI_AT_EVERY_LEVEL(Levels);

constexpr auto kTile = static_cast<std::size_t>(kTileTokens);

struct Turning {
  Rope rope;
  int dim;
};

// Of both layouts, with pairs that are no whole registers, and coordinates that do not turn.
std::vector<Turning> turnings() {
  std::vector<Turning> all;
  for (const auto layout : {Rope::Layout::half_split, Rope::Layout::interleaved}) {
    for (const int rotary : {16, 40, 64, 128}) {
      for (const int more : {0, 24}) all.push_back({test::rope_of(rotary, layout), rotary + more});
    }
  }
  return all;
}

TEST_P(Levels, NumbersAreWidened) {
  auto engine = test::random_engine(11);
  for (const std::int64_t count : {1, 7, 16, 41, 64, 130}) {
    std::vector<std::uint16_t> halves(static_cast<std::size_t>(count));
    for (std::uint16_t& half : halves) {  // finite, some subnormal
      half = static_cast<std::uint16_t>(engine());
      if ((half & 0x7C00U) == 0x7C00U) half &= 0x83FFU;
    }
    for (const DType dtype : {DType::f16, DType::bf16}) {
      std::vector<float> expected(halves.size());
      std::vector<float> found(halves.size(), -1.0F);
      convert_to_float(halves.data(), dtype, halves.size(), expected.data());
      level().widen(halves.data(), dtype, count, found.data());
      EXPECT_EQ(found, expected) << name_of(dtype) << ", " << count;
    }
    const auto floats = test::random_normal(halves.size(), engine);
    std::vector<float> found(halves.size());
    level().widen(floats.data(), DType::f32, count, found.data());
    EXPECT_EQ(found, std::vector<float>(floats.begin(), floats.end()));
  }
}

TEST_P(Levels, OneNumberThatIsNotFiniteIsFoundAnywhere) {
  for (const DType dtype : {DType::f32, DType::f16, DType::bf16}) {
    const std::uint32_t infinite = dtype == DType::f32   ? 0x7F800000U
                                   : dtype == DType::f16 ? 0x7C00U
                                                         : 0x7F80U;
    for (const int dim : {5, 16, 41, 64}) {
      for (const std::int64_t stride : {dim, dim + 3}) {
        constexpr std::int64_t kRows = 5;
        std::vector<std::uint32_t> words(static_cast<std::size_t>(kRows * stride), 0);
        auto* halves = reinterpret_cast<std::uint16_t*>(words.data());
        const auto put = [&](std::size_t at, std::uint32_t bits) {
          if (dtype == DType::f32) {
            words[at] = bits;
          } else {
            halves[at] = static_cast<std::uint16_t>(bits);
          }
        };
        const auto accepted = [&] {
          return level().acceptable(words.data(), dtype, kRows, dim, stride, 0.0F);
        };
        for (std::int64_t row = 0; row < kRows; ++row) {
          for (std::int64_t c = 0; c < stride; ++c) {
            const auto at = static_cast<std::size_t>(row * stride + c);
            put(at, infinite - 1);  // the largest number
            EXPECT_TRUE(accepted());
            for (const std::uint32_t bits : {infinite, infinite + 1}) {
              put(at, bits);
              EXPECT_EQ(accepted(), c >= dim) << name_of(dtype) << ", " << row << ", " << c;
            }
            put(at, 0);
          }
        }
      }
    }
  }
}

TEST_P(Levels, OneRowThatIsTooLongIsFound) {
  auto engine = test::random_engine(12);
  for (const DType dtype : {DType::f32, DType::f16, DType::bf16}) {
    for (const int dim : {5, 16, 41, 64, 128}) {
      constexpr std::size_t kRows = 37;
      const auto size = static_cast<std::size_t>(dim);
      auto rows = test::random_normal(kRows * size, engine);
      std::vector<std::uint16_t> halves(rows.size());
      for (std::size_t longest = 0; longest < kRows; ++longest) {
        auto numbers = rows;
        for (std::size_t c = 0; c < size; ++c) numbers[longest * size + c] *= 16.0F;
        double most = 0.0;
        double next = 0.0;
        for (std::size_t row = 0; row < kRows; ++row) {
          double length2 = 0.0;
          for (std::size_t c = 0; c < size; ++c) {
            const auto x = static_cast<double>(numbers[row * size + c]);
            length2 += x * x;
          }
          (row == longest ? most : next) =
              std::max(row == longest ? 0.0 : next, std::sqrt(length2));
        }
        const void* data = numbers.data();
        if (dtype != DType::f32) {
          convert_from_float(numbers.data(), numbers.size(), dtype, halves.data());
          data = halves.data();
        }
        const auto accepted = [&](double bound) {
          return level().acceptable(data, dtype, kRows, dim, dim, static_cast<float>(bound));
        };
        ASSERT_LT(next, 0.9 * most);
        EXPECT_TRUE(accepted(1.02 * most)) << name_of(dtype) << ", d " << dim;
        EXPECT_FALSE(accepted(0.98 * most)) << name_of(dtype) << ", d " << dim;
      }
    }
  }
}

TEST_P(Levels, TokensAreAddedUpInOrder) {
  auto engine = test::random_engine(13);
  for (const int dim : {1, 7, 16, 41, 64, 128}) {
    const auto size = static_cast<std::size_t>(dim);
    const auto rows = test::random_normal(kTile * size, engine);
    std::vector<double> sums(size, 0.5);
    std::vector<double> squares(size, 0.25);
    level().add_up(rows.data(), dim, sums.data(), squares.data());
    for (std::size_t c = 0; c < size; ++c) {
      double sum = 0.5;
      double square = 0.25;
      for (std::size_t t = 0; t < kTile; ++t) {
        const auto x = static_cast<double>(rows[t * size + c]);
        sum += x;
        square += x * x;
      }
      ASSERT_EQ(sums[c], sum);
      ASSERT_EQ(squares[c], square);
    }
  }
}

TEST_P(Levels, KeysAreTurnedBackToTheMiddle) {
  auto engine = test::random_engine(14);
  for (const auto& [rope, dim] : turnings()) {
    const auto tables = detail::shared_rope_tables(rope);
    const auto rows = test::random_normal(kTile * static_cast<std::size_t>(dim), engine);
    const int pairs = tables->pair_count();
    std::vector<float> turned(2 * static_cast<std::size_t>(pairs));
    level().turn_back(tables->turns(), rows.data(), dim, turned.data());
    for (int f = 0; f < pairs; ++f) {
      const float* cosines = tables->half() + std::ptrdiff_t{kTileTokens} * f;
      const float* sines = cosines + 32;
      const auto at = [&rows, width = dim](int t, int c) {
        return rows[static_cast<std::size_t>(t * width + c)];
      };
      const int a = tables->first_of(f);
      const int b = tables->second_of(f);
      float sums[4] = {};
      for (int j = 0; j < 32; ++j) {
        sums[0] += (at(32 + j, a) + at(31 - j, a)) * cosines[j];
        sums[1] += (at(32 + j, b) - at(31 - j, b)) * sines[j];
        sums[2] += (at(32 + j, b) + at(31 - j, b)) * cosines[j];
        sums[3] += (at(32 + j, a) - at(31 - j, a)) * sines[j];
      }
      ASSERT_EQ(turned[static_cast<std::size_t>(f)], sums[0] + sums[1]);
      ASSERT_EQ(turned[static_cast<std::size_t>(pairs + f)], sums[2] - sums[3]);
    }
  }
}

TEST_P(Levels, CentresAreAddedAndTaken) {
  auto engine = test::random_engine(15);
  for (const auto& [rope, dim] : turnings()) {
    const auto tables = detail::shared_rope_tables(rope);
    const int pairs = tables->pair_count();
    auto rows = test::random_normal(kTile * static_cast<std::size_t>(dim), engine);
    rows[0] = -0.0F;
    auto constant = test::random_normal(static_cast<std::size_t>(dim), engine);
    auto middles = test::random_normal(2 * static_cast<std::size_t>(pairs), engine);
    for (int f = 0; f < pairs; f += 3) {  // left in the keys
      middles[static_cast<std::size_t>(f)] = 0.0F;
      middles[static_cast<std::size_t>(pairs + f)] = 0.0F;
    }
    constant[0] = -0.0F;
    for (const float factor : {1.0F, -1.0F}) {
      for (const bool turns : {true, false}) {
        auto found = rows;
        level().add_centre(constant.data(), tables->turns(), turns ? middles.data() : nullptr,
                           factor, dim, found.data());
        auto expected = rows;
        for (int t = 0; t < kTileTokens; ++t) {
          float* row = expected.data() + static_cast<std::ptrdiff_t>(t) * dim;
          for (int c = 0; c < dim; ++c) row[c] += factor * constant[static_cast<std::size_t>(c)];
          for (int f = 0; f < pairs && turns; ++f) {
            const float real = middles[static_cast<std::size_t>(f)];
            const float imaginary = middles[static_cast<std::size_t>(pairs + f)];
            if (real == 0.0F && imaginary == 0.0F) continue;
            const int j = t >= 32 ? t - 32 : 31 - t;
            const float* cosines = tables->half() + std::ptrdiff_t{kTileTokens} * f;
            const float cosine = cosines[j];
            const float sine = t >= 32 ? cosines[32 + j] : -cosines[32 + j];
            row[tables->first_of(f)] += factor * (real * cosine - imaginary * sine);
            row[tables->second_of(f)] += factor * (real * sine + imaginary * cosine);
          }
        }
        ASSERT_EQ(found, expected);
        EXPECT_EQ(std::signbit(found[0]), std::signbit(expected[0]));
      }
    }
  }
}

}  // namespace
}  // namespace tqai
