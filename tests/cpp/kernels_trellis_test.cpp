// Values in trellis codes: every level against the description of the bytes, and against the scalar
// level bit for bit.
#include <cstring>
#include <tqai/trellis.hpp>

#include "kernels_helpers.hpp"

namespace tqai {
namespace {

using kernels::SegmentPlan;
using test::kDims;
using test::Levels;
using test::make_codec;
using test::tile_rows;

TQAI_AT_EVERY_LEVEL(Levels);

// Of coordinate c of a token, from packed bytes: those of its byte position are a ring of bits,
// line after line, and its window the 8 that end with its code.
int level_at(const std::uint8_t* packed, int padded, int bits, int c, int token) {
  const int position = 4 * (c % 16) + token % 4;
  const int code = c / 16 * 16 + token / 32 * 8 + token % 32 / 4;
  const int size = padded * bits;
  unsigned window = 0;
  for (int k = 0; k < 8; ++k) {
    const int bit = ((code + 1) * bits - 8 + k + size) % size;
    window |= static_cast<unsigned>(packed[bit / 8 * 64 + position] >> (bit % 8) & 1) << k;
  }
  return trellis(bits).level(window);
}

std::vector<std::uint8_t> random_bytes(std::size_t count, std::mt19937_64& engine) {
  std::vector<std::uint8_t> bytes(count);
  for (std::uint8_t& byte : bytes) byte = static_cast<std::uint8_t>(engine());
  return bytes;
}

TEST_P(Levels, WeightedSumsOfTrellisCodesAreExact) {
  auto engine = test::random_engine(21);
  for (int bits = 1; bits <= kMaxTrellisBits; ++bits) {
    for (const int dim : kDims) {
      const auto codec = make_codec(dim, bits, CodeKind::trellis);
      const SegmentPlan& segment = codec.plan().values.segments[0];
      const auto count = static_cast<std::size_t>(segment.count);
      const auto packed = random_bytes(packed_bytes(segment.count, bits), engine);
      std::vector<int> levels(count * kTileTokens);
      for (int c = 0; c < segment.count; ++c) {
        for (int t = 0; t < kTileTokens; ++t) {
          levels[static_cast<std::size_t>(c * kTileTokens + t)] =
              level_at(packed.data(), segment.count, bits, c, t);
        }
      }
      for (const int rows : {1, 2, 3, 4, 5, 6, 7, 8}) {
        std::vector<std::uint8_t> weights =
            random_bytes(static_cast<std::size_t>(rows) * kTileTokens, engine);
        std::fill_n(weights.begin(), kTileTokens / 2, std::uint8_t{255});
        std::vector<float> sums(static_cast<std::size_t>(rows) * count, 1.0F);
        std::vector<float> steps;
        for (int r = 0; r < rows; ++r) steps.push_back(std::ldexp(1.0F, r));
        parts().accumulate(segment, packed.data(), weights.data(), steps.data(), rows, sums.data(),
                           segment.count);
        for (std::size_t i = 0; i < sums.size(); ++i) {
          std::int64_t expected = 0;
          for (std::size_t t = 0; t < kTileTokens; ++t) {
            expected += weights[i / count * kTileTokens + t] * levels[i % count * kTileTokens + t];
          }
          const auto scaled = static_cast<double>(expected) * steps[i / count] + 1.0;
          ASSERT_EQ(sums[i], static_cast<float>(scaled))
              << "bits " << bits << ", d " << dim << ", rows " << rows;
        }
      }
    }
  }
}

TEST_P(Levels, TrellisCodesAgreeWithScalarBitForBit) {
  auto engine = test::random_engine(22);
  for (int bits = 1; bits <= kMaxTrellisBits; ++bits) {
    for (const int dim : {8, 18, 41, 64, 80, 128}) {
      const auto codec = make_codec(dim, bits, CodeKind::trellis);
      test::Memory memory(kernels::trellis_coding_bytes(dim, bits));
      auto rows = tile_rows(dim, engine);
      for (int c = 0; c < dim; ++c) {  // subnormal norms too
        rows[static_cast<std::size_t>(20 * dim + c)] *= 1e-9F;
        rows[static_cast<std::size_t>(53 * dim + c)] *= 1e-6F;
      }
      const auto& side = codec.plan().values;
      std::vector<std::uint8_t> tile(codec.layout().bytes(), 0);
      std::vector<std::uint8_t> expected(tile.size(), 0);
      level().encode(side, false, rows.data(), tile.data(), memory.bytes());
      scalar().encode(side, false, rows.data(), expected.data(), memory.bytes());
      ASSERT_EQ(tile, expected) << "bits " << bits << ", d " << dim;
      std::vector<float> decoded(rows.size());
      std::vector<float> expected_rows(rows.size());
      level().decode(side, false, tile.data(), decoded.data(), memory.bytes());
      scalar().decode(side, false, tile.data(), expected_rows.data(), memory.bytes());
      ASSERT_EQ(0,
                std::memcmp(decoded.data(), expected_rows.data(), decoded.size() * sizeof(float)));
    }
  }
}

double squared(const float* x, int dim) {
  double sum = 0.0;
  for (int c = 0; c < dim; ++c) sum += static_cast<double>(x[c]) * static_cast<double>(x[c]);
  return sum;
}

// Squared errors in units of the vectors' lengths, of Gaussian ones.
double mean_error(const detail::Codec& codec, const std::vector<float>& rows, int dim, int bits) {
  test::Memory memory(kernels::trellis_coding_bytes(dim, bits));
  std::vector<std::uint8_t> tile(codec.layout().bytes());
  std::vector<float> decoded(rows.size());
  const auto& kernels = kernels::kernels(default_level());
  const auto tile_floats = static_cast<std::size_t>(dim) * kTileTokens;
  double sum = 0.0;
  for (std::size_t from = 0; from < rows.size(); from += tile_floats) {
    kernels.encode(codec.plan().values, false, rows.data() + from, tile.data(), memory.bytes());
    kernels.decode(codec.plan().values, false, tile.data(), decoded.data() + from, memory.bytes());
    for (std::size_t at = from; at < from + tile_floats; at += static_cast<std::size_t>(dim)) {
      const double length2 = squared(rows.data() + at, dim);
      EXPECT_NEAR(squared(decoded.data() + at, dim) / length2, 1.0, 2e-3);  // norm correction
      double error = 0.0;
      for (std::size_t c = at; c < at + static_cast<std::size_t>(dim); ++c) {
        error += std::pow(static_cast<double>(decoded[c] - rows[c]), 2.0);
      }
      sum += error / length2;
    }
  }
  return sum * dim / static_cast<double>(rows.size());
}

TEST(TrellisTiles, HaveAThirdLessErrorThanScalarOnes) {
  auto engine = test::random_engine(23);
  for (const int dim : {64, 80, 128}) {
    const auto rows = test::random_normal(static_cast<std::size_t>(dim) * kTileTokens * 6, engine);
    constexpr double kMost[] = {.84, .72, .68, .68};
    for (int bits = 1; bits <= kMaxTrellisBits; ++bits) {
      const double scalar = mean_error(make_codec(dim, bits), rows, dim, bits);
      const double rings = mean_error(make_codec(dim, bits, CodeKind::trellis), rows, dim, bits);
      EXPECT_LE(rings, kMost[bits - 1] * scalar) << "bits " << bits << ", d " << dim;
      EXPECT_GE(rings, std::pow(4.0, -bits)) << "bits " << bits << ", d " << dim;
    }
  }
}

// What is decoded is what the bytes mean.
TEST(TrellisTiles, AreReadAsDescribed) {
  auto engine = test::random_engine(24);
  for (int bits = 1; bits <= kMaxTrellisBits; ++bits) {
    for (const int dim : {40, 64}) {
      const auto codec = make_codec(dim, bits, CodeKind::trellis);
      test::Memory memory(kernels::trellis_coding_bytes(dim, bits));
      std::vector<std::uint8_t> tile = random_bytes(codec.layout().bytes(), engine);
      for (int t = 0; t < kTileTokens; ++t) {
        const std::uint16_t two = to_half(2.0F);
        std::memcpy(tile.data() + codec.layout().value_norms() + 2 * t, &two, sizeof two);
      }
      std::vector<float> rows(static_cast<std::size_t>(dim) * kTileTokens);
      kernels::kernels(Level::scalar)
          .decode(codec.plan().values, false, tile.data(), rows.data(), memory.bytes());
      codec.value_rotation().apply(rows.data(), rows.data(), kTileTokens);
      const float step = trellis(bits).step(dim);
      for (int t = 0; t < kTileTokens; ++t) {
        for (int c = 0; c < dim; ++c) {
          const int level =
              level_at(tile.data() + codec.layout().value_codes(), padded_dim(dim), bits, c, t);
          ASSERT_NEAR(rows[static_cast<std::size_t>(t * dim + c)] / step, 2 * level, 1e-2)
              << "bits " << bits << ", d " << dim << ", token " << t << ", " << c;
        }
      }
    }
  }
}

// FP16 norms are subnormal below 6e-5; codes make up for what rounding takes.
TEST(TrellisTiles, ShortVectorsKeepTheirDirection) {
  constexpr int kDim = 64;
  auto engine = test::random_engine(25);
  for (int bits = 2; bits <= kMaxTrellisBits; ++bits) {
    const auto codec = make_codec(kDim, bits, CodeKind::trellis);
    test::Memory memory(kernels::trellis_coding_bytes(kDim, bits));
    auto rows = test::random_normal(std::size_t{kDim} * kTileTokens, engine);
    for (int t = 0; t < kTileTokens; ++t) {
      const float length = std::exp2(-10.0F - static_cast<float>(t) / 4.0F);  // to 2^-25.75
      const auto scale =
          length / static_cast<float>(std::sqrt(squared(rows.data() + t * kDim, kDim)));
      for (int c = 0; c < kDim; ++c) rows[static_cast<std::size_t>(t * kDim + c)] *= scale;
    }
    std::vector<std::uint8_t> tile(codec.layout().bytes());
    std::vector<float> decoded(rows.size());
    const auto& kernels = kernels::kernels(default_level());
    kernels.encode(codec.plan().values, false, rows.data(), tile.data(), memory.bytes());
    kernels.decode(codec.plan().values, false, tile.data(), decoded.data(), memory.bytes());
    for (int t = 0; t < kTileTokens; ++t) {
      double error = 0.0;
      for (int c = t * kDim; c < (t + 1) * kDim; ++c) {
        const auto at = static_cast<std::size_t>(c);
        error += std::pow(static_cast<double>(decoded[at]) - static_cast<double>(rows[at]), 2.0);
      }
      const double relative = std::sqrt(error / squared(rows.data() + t * kDim, kDim));
      const double usual = std::pow(2.0, -bits);
      // Down to about 2^-24; below, nothing is worse than nothing.
      EXPECT_LE(relative, t < 54 ? 2.2 * usual : 1.0 + 1e-6) << "bits " << bits << ", " << t;
    }
  }
}

}  // namespace
}  // namespace tqai
