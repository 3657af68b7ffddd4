// Every level against plain arithmetic on codes, and against the scalar level bit for bit.
#include <bit>
#include <cstdlib>
#include <cstring>
#include <tqai/codebook.hpp>
#include <tqai/rotation.hpp>

#include "kernels_helpers.hpp"

namespace tqai {
namespace {

using kernels::SegmentPlan;
using test::kDims;
using test::Levels;
using test::make_codec;
using test::tile_rows;

TQAI_AT_EVERY_LEVEL(Levels);

template <typename Int>
std::vector<Int> random_ints(std::size_t count, int low, int high, std::mt19937_64& engine) {
  std::uniform_int_distribution<int> uniform(low, high);
  std::vector<Int> values(count);
  for (Int& value : values) value = static_cast<Int>(uniform(engine));
  // Extremes first: they are what would overflow or saturate.
  for (std::size_t i = 0; i < count / 4; ++i) values[i] = static_cast<Int>(i % 2 == 0 ? high : low);
  return values;
}

TEST_P(Levels, ScoresAreExact) {
  auto engine = test::random_engine(1);
  for (int bits = 1; bits <= 8; ++bits) {
    for (const int dim : kDims) {
      const auto codec = make_codec(dim, bits);
      const SegmentPlan& segment = codec.plan().keys.segments[0];
      const auto count = static_cast<std::size_t>(segment.count);
      const auto codes = random_ints<std::uint8_t>(count * kTileTokens, 0, (1 << bits) - 1, engine);
      std::vector<std::uint8_t> packed(packed_bytes(segment.count, bits));
      pack_keys(codes.data(), segment.count, bits, packed.data());
      for (const int rows : {1, 2, 3, 4, 5, 16}) {
        const auto queries =
            random_ints<std::int8_t>(static_cast<std::size_t>(rows) * count, -127, 127, engine);
        std::vector<std::int32_t> scores(static_cast<std::size_t>(rows) * kTileTokens, -1);
        parts().score(segment, packed.data(), queries.data(), rows, scores.data());
        for (std::size_t i = 0; i < scores.size(); ++i) {
          std::int64_t expected = 0;
          for (std::size_t c = 0; c < count; ++c) {
            expected += queries[i / kTileTokens * count + c] *
                        segment.levels[codes[c * kTileTokens + i % kTileTokens]];
          }
          ASSERT_EQ(scores[i], expected) << "bits " << bits << ", d " << dim << ", rows " << rows;
        }
      }
    }
  }
}

TEST_P(Levels, WeightedSumsAreExact) {
  auto engine = test::random_engine(2);
  for (int bits = 1; bits <= 8; ++bits) {
    for (const int dim : kDims) {
      const auto codec = make_codec(dim, bits);
      const SegmentPlan& segment = codec.plan().values.segments[0];
      const auto count = static_cast<std::size_t>(segment.count);
      const auto codes = random_ints<std::uint8_t>(count * kTileTokens, 0, (1 << bits) - 1, engine);
      std::vector<std::uint8_t> packed(packed_bytes(segment.count, bits));
      pack_values(codes.data(), segment.count, bits, packed.data());
      for (const int rows : {1, 2, 3, 4, 5, 8}) {
        const auto weights =
            random_ints<std::uint8_t>(static_cast<std::size_t>(rows) * kTileTokens, 0, 255, engine);
        // Below 2^24, so exact as floats; steps of 2^r and a start of 1 change none of the bits.
        std::vector<float> sums(static_cast<std::size_t>(rows) * count, 1.0F);
        std::vector<float> steps;
        for (int r = 0; r < rows; ++r) steps.push_back(std::ldexp(1.0F, r));
        parts().accumulate(segment, packed.data(), weights.data(), steps.data(), rows, sums.data(),
                           segment.count);
        for (std::size_t i = 0; i < sums.size(); ++i) {
          std::int64_t expected = 0;
          for (std::size_t t = 0; t < kTileTokens; ++t) {
            expected += weights[i / count * kTileTokens + t] *
                        segment.levels[codes[i % count * kTileTokens + t]];
          }
          const auto scaled = static_cast<double>(expected) * steps[i / count] + 1.0;
          ASSERT_EQ(sums[i], static_cast<float>(scaled))
              << "bits " << bits << ", d " << dim << ", rows " << rows;
        }
      }
    }
  }
}

// Four numbers whose sum is `sum`, as equal as can be.
int fourth(int sum, std::size_t i) { return (sum + static_cast<int>(i)) / 4; }

// A level may add up products in 16 bits where queries and weights are small enough for it: here
// they pass by what is, with all codes at the largest level or at its negative.
TEST_P(Levels, SumsAtTheEdgeOf16BitsAreExact) {
  constexpr int kDim = 64;
  constexpr int kRows = 7;
  for (int bits = 1; bits <= kNarrowBits; ++bits) {
    const auto codec = make_codec(kDim, bits);
    for (const int code : {0, (1 << bits) - 1}) {
      const std::vector<std::uint8_t> codes(kDim * kTileTokens, static_cast<std::uint8_t>(code));
      std::vector<std::uint8_t> packed(packed_bytes(kDim, bits));
      const SegmentPlan& keys = codec.plan().keys.segments[0];
      pack_keys(codes.data(), kDim, bits, packed.data());
      for (int sum = 240; sum <= 280; ++sum) {
        for (const int sign : {1, -1}) {
          std::vector<std::int8_t> queries(kRows * kDim);
          std::vector<int> expected(kRows);
          for (std::size_t i = 0; i < queries.size(); ++i) {
            const std::size_t place =
                i % 2 + i / 4 % 2 * 2;  // bytes 0, 1, 4, 5 add up, and 2, 3, …
            queries[i] = static_cast<std::int8_t>(sign * fourth(sum, place));
            expected[i / kDim] += queries[i] * keys.levels[code];
          }
          std::vector<std::int32_t> scores(kRows * kTileTokens);
          parts().score(keys, packed.data(), queries.data(), kRows, scores.data());
          for (std::size_t i = 0; i < scores.size(); ++i) {
            ASSERT_EQ(scores[i], expected[i / kTileTokens]) << "bits " << bits << ", sum " << sum;
          }
        }
      }
      const SegmentPlan& values = codec.plan().values.segments[0];
      pack_values(codes.data(), kDim, bits, packed.data());
      for (int sum = 500; sum <= 540; ++sum) {
        std::vector<std::uint8_t> weights(kRows * kTileTokens);
        int expected = 0;
        for (std::size_t i = 0; i < weights.size(); ++i) {
          weights[i] = static_cast<std::uint8_t>(fourth(sum, i % 2 + i / 4 % 2 * 2));
          if (i < kTileTokens) expected += weights[i] * values.levels[code];
        }
        const std::vector<float> steps(kRows, 1.0F);
        std::vector<float> sums(kRows * kDim, 0.0F);
        parts().accumulate(values, packed.data(), weights.data(), steps.data(), kRows, sums.data(),
                           kDim);
        for (const float found : sums) {
          ASSERT_EQ(found, static_cast<float>(expected)) << "bits " << bits << ", sum " << sum;
        }
      }
    }
  }
}

// What lets a level add up more products in 16 bits: exact, or not there.
TEST(SegmentPlans, QuotientsTimesTheirDivisorAreTheLevels) {
  for (int bits = 1; bits <= 8; ++bits) {
    for (int dim = 8; dim <= 128; ++dim) {
      const auto codec = make_codec(dim, bits);
      const SegmentPlan& segment = codec.plan().values.segments[0];
      // 1 bit has one level and its negative; at 2 bits ±60 and ±18 are best from d = 57 on.
      if (bits == 1 || (bits == 2 && dim >= 57)) {
        ASSERT_NE(segment.quotients, nullptr) << dim;
      } else if (bits > 2 || dim == 40) {
        ASSERT_EQ(segment.quotients, nullptr) << bits << ", " << dim;
      }
      if (segment.quotients == nullptr) continue;
      for (int i = 0; i < 16; ++i) {
        EXPECT_LE(std::abs(segment.quotients[i]), kernels::kMaxQuotient);
        EXPECT_EQ(segment.quotients[i] * segment.divisor, segment.levels[i])
            << "bits " << bits << ", d " << dim;
      }
    }
  }
}

TEST_P(Levels, EncodeAndDecodeAgreeWithScalarBitForBit) {
  auto engine = test::random_engine(3);
  test::Memory memory;
  for (int bits = 1; bits <= 8; ++bits) {
    for (const int dim : {8, 16, 18, 40, 41, 63, 64, 80, 96, 128, 256, 512, 576}) {
      const auto codec = make_codec(dim, bits);
      const auto rows = tile_rows(dim, engine);
      for (const bool keys : {true, false}) {
        const auto& side = keys ? codec.plan().keys : codec.plan().values;
        std::vector<std::uint8_t> tile(codec.layout().bytes(), 0);
        std::vector<std::uint8_t> expected(tile.size(), 0);
        level().encode(side, keys, rows.data(), tile.data(), memory.bytes());
        scalar().encode(side, keys, rows.data(), expected.data(), memory.bytes());
        ASSERT_EQ(tile, expected) << "bits " << bits << ", d " << dim;
        std::vector<float> decoded(rows.size());
        std::vector<float> expected_rows(rows.size());
        level().decode(side, keys, tile.data(), decoded.data(), memory.bytes());
        scalar().decode(side, keys, tile.data(), expected_rows.data(), memory.bytes());
        ASSERT_EQ(
            0, std::memcmp(decoded.data(), expected_rows.data(), decoded.size() * sizeof(float)));
      }
    }
  }
}

TEST_P(Levels, RotationsAreThoseOfTheLibraryBitForBit) {
  auto engine = test::random_engine(6);
  for (const int dim : {8, 16, 40, 64, 80, 128, 256, 512, 576}) {
    for (const auto kind : {RotationKind::automatic, RotationKind::haar}) {
      CacheOptions options;
      options.kv_heads = 1;
      options.head_dim = options.value_head_dim = dim;
      options.rotation = kind;
      const detail::Codec codec(options);
      auto x = test::random_normal(static_cast<std::size_t>(dim), engine);
      x[0] = 0.0F;
      x[1] = -0.0F;
      std::vector<float> y(x.size());
      std::vector<float> expected(x.size());
      level().rotate(codec.plan().keys, x.data(), y.data());
      codec.key_rotation().apply(x.data(), expected.data(), 1);
      ASSERT_EQ(0, std::memcmp(y.data(), expected.data(), y.size() * sizeof(float))) << dim;
      level().rotate_back(codec.plan().values, x.data(), y.data());
      codec.value_rotation().apply_transposed(x.data(), expected.data(), 1);
      ASSERT_EQ(0, std::memcmp(y.data(), expected.data(), y.size() * sizeof(float))) << dim;
    }
  }
}

// The scalar level is the specification; this is the specification of the scalar level.
TEST(Encode, CodesAreNearestCentroidsOfTheRotatedUnitVector) {
  auto engine = test::random_engine(4);
  test::Memory memory;
  for (const int bits : {1, 2, 3, 4, 5, 6, 7, 8}) {
    for (const int dim : kDims) {
      const auto codec = make_codec(dim, bits);
      const Codebook& book = codebook(dim, bits, Grid::int8);
      const auto rows = tile_rows(dim, engine);
      std::vector<std::uint8_t> tile(codec.layout().bytes());
      kernels::kernels(Level::scalar)
          .encode(codec.plan().keys, true, rows.data(), tile.data(), memory.bytes());
      std::vector<std::uint8_t> codes(static_cast<std::size_t>(padded_dim(dim)) * kTileTokens);
      unpack_keys(tile.data(), padded_dim(dim), bits, codes.data());
      std::vector<float> decoded(rows.size());
      kernels::kernels(Level::scalar)
          .decode(codec.plan().keys, true, tile.data(), decoded.data(), memory.bytes());
      for (int t = 0; t < kTileTokens; ++t) {
        const float* x = rows.data() + t * dim;
        double length = 0.0;
        for (int c = 0; c < dim; ++c)
          length += static_cast<double>(x[c]) * static_cast<double>(x[c]);
        length = std::sqrt(length);
        std::vector<float> unit(static_cast<std::size_t>(dim));
        std::vector<float> rotated(unit.size());
        for (int c = 0; c < dim; ++c) {
          unit[static_cast<std::size_t>(c)] =
              length > 0.0 ? static_cast<float>(x[c] / length) : 0.0F;
        }
        codec.key_rotation().apply(unit.data(), rotated.data(), 1);
        double decoded_norm = 0.0;
        for (int c = 0; c < dim; ++c) {
          const auto at = static_cast<std::size_t>(c);
          const int code = codes[at * kTileTokens + static_cast<std::size_t>(t)];
          const float y = rotated[at];
          // Rounding may put a coordinate on the other side of a boundary, never farther.
          if (code > 0) {
            EXPECT_GE(y, book.boundaries()[static_cast<std::size_t>(code - 1)] - 1e-6F);
          }
          if (code + 1 < 1 << bits) {
            EXPECT_LE(y, book.boundaries()[static_cast<std::size_t>(code)] + 1e-6F);
          }
          const auto value = static_cast<double>(decoded[static_cast<std::size_t>(t * dim + c)]);
          decoded_norm += value * value;
        }
        // Norm correction: the length survives, up to FP16's rounding of the norm. The norm stored
        // is at least 2^-12 here, where FP16 is normal.
        EXPECT_NEAR(std::sqrt(decoded_norm), length, length * 6e-4)
            << "bits " << bits << ", d " << dim << ", token " << t;
      }
    }
  }
}
TEST_P(Levels, QueriesAreReadScaledAndJudged) {
  for (const int count : {8, 16, 41, 64, 128}) {
    for (int at = 0; at < count; ++at) {
      const auto judged = [&](DType dtype, std::uint32_t bits, float factor) {
        std::vector<std::uint32_t> words(static_cast<std::size_t>(count), 0);
        auto* halves = reinterpret_cast<std::uint16_t*>(words.data());
        if (dtype == DType::f32) {
          words[static_cast<std::size_t>(at)] = bits;
        } else {
          halves[at] = static_cast<std::uint16_t>(bits);
        }
        std::vector<float> to(static_cast<std::size_t>(count), -1.0F);
        const bool finite = level().load_scaled(words.data(), dtype, count, factor, to.data());
        if (finite) {
          std::vector<float> expected(to.size());
          convert_to_float(words.data(), dtype, to.size(), expected.data());
          for (float& x : expected) x *= factor;
          EXPECT_EQ(to, expected);
        }
        return finite;
      };
      const auto f32 = [](float x) { return std::bit_cast<std::uint32_t>(x); };
      for (const float x : {0.0F, -0.0F, 1.5F, -3e4F, 1e-40F}) {
        EXPECT_TRUE(judged(DType::f32, f32(x), 0.125F));
      }
      EXPECT_TRUE(judged(DType::f16, 0x7BFF, 2.0F));  // 65504
      EXPECT_TRUE(judged(DType::f16, 0x8001, 2.0F));
      EXPECT_TRUE(judged(DType::bf16, 0x4F80, 1.0F));
      for (const std::uint32_t sign : {0U, 1U}) {
        for (const std::uint32_t bits : {0x7F800000U, 0x7FC00000U, 0x7F800001U}) {
          EXPECT_FALSE(judged(DType::f32, bits | sign << 31, 0.125F));
        }
        for (const std::uint32_t bits : {0x7C00U, 0x7E00U, 0x7C01U}) {
          EXPECT_FALSE(judged(DType::f16, bits | sign << 15, 1e-3F));
        }
        for (const std::uint32_t bits : {0x7F80U, 0x7FC0U, 0x7F81U}) {
          EXPECT_FALSE(judged(DType::bf16, bits | sign << 15, 1.0F));
        }
      }
      EXPECT_FALSE(judged(DType::f32, f32(1e38F), 10.0F));
      EXPECT_FALSE(judged(DType::f32, f32(2e30F), 1.0F));
    }
  }
}

}  // namespace
}  // namespace tqai
