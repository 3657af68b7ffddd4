// Vectors as short and as long as FP16 norms can be, and beyond, at every level.
#include <cmath>
#include <cstring>
#include <tqai/cache.hpp>

#include "cache/codec.hpp"
#include "cache_helpers.hpp"
#include "every_level.hpp"
#include "kernels/kernels.hpp"
#include "kernels_helpers.hpp"

namespace tqai {
namespace {

using test::Array;
using test::gather;
using test::geometry;

class Norms : public test::EveryLevel {
 protected:
  // One tile's worth of tokens, all of which may be sealed.
  CacheOptions options_of(int dim, int bits) const {
    CacheOptions options = geometry(dim, bits, bits, 1);
    options.value_head_dim = dim;
    options.level = GetParam();
    options.sink_tokens = 0;
    options.residual_window = 0;
    options.centering = Centering::none;
    return options;
  }

  static void scale_rows(Array& array, double norm) {
    for (std::int64_t t = 0; t < array.shape[2]; ++t) {
      auto* row = array.data.data() + t * array.shape[3];
      double squares = 0.0;
      for (int c = 0; c < array.shape[3]; ++c) squares += static_cast<double>(row[c]) * row[c];
      for (int c = 0; c < array.shape[3]; ++c) {
        row[c] = static_cast<float>(row[c] * (norm / std::sqrt(squares)));
      }
    }
  }

  static double relative_error(const Array& expected, const Array& got) {
    double error = 0.0;
    double squares = 0.0;
    for (std::size_t i = 0; i < expected.data.size(); ++i) {
      error += std::pow(static_cast<double>(got.data[i]) - expected.data[i], 2);
      squares += std::pow(static_cast<double>(expected.data[i]), 2);
    }
    return std::sqrt(error / squares);
  }

  // Of keys and values of this norm, the larger; the same directions each time.
  double error_at(double norm, int dim, int bits) const {
    auto engine = test::random_engine(31);
    Array vectors({1, 1, kTileTokens, dim}, engine);
    scale_rows(vectors, norm);
    KvCache cache(options_of(dim, bits));
    cache.append(vectors, vectors);
    cache.seal();
    EXPECT_EQ(cache.packed_tokens(0), kTileTokens);
    const auto held = gather(cache, 0, kTileTokens);
    return std::max(relative_error(vectors, held.keys), relative_error(vectors, held.values));
  }
};

TEST_P(Norms, ShortVectorsAreAsPreciseAsOthersDownToTheLeastHalf) {
  for (const int dim : {64, 80}) {
    for (const int bits : {2, 4, 8}) {
      const double ordinary = error_at(1.0, dim, bits);
      for (const double norm : {1e-4, 6e-5, 1e-5, 1e-6, 3e-7, 2e-7, 1e-7, 6e-8}) {
        // More at most: codes are finer inside than where they end.
        EXPECT_LT(error_at(norm, dim, bits), 1.25 * ordinary)
            << "norm " << norm << ", d " << dim << ", bits " << bits;
      }
    }
  }
}

TEST_P(Norms, ShorterOnesLosePrecisionAndThenAreZero) {
  EXPECT_LT(error_at(1e-8, 64, 8), 0.1);
  EXPECT_LT(error_at(1e-8, 64, 4), 0.8);
  for (const int bits : {1, 2, 4, 8}) {
    for (const double norm : {1e-9, 1e-12, 1e-20, 1e-30}) {
      EXPECT_LE(error_at(norm, 64, bits), 1.0) << "norm " << norm << ", bits " << bits;
    }
    EXPECT_EQ(error_at(1e-12, 64, bits), 1.0);
  }
}

// Its norm after correction is the largest: all but one rotated coordinate fall to the innermost
// level, and that one to the outermost.
TEST_P(Norms, VectorsAlongOneRotatedAxisComeBackAsLong) {
  for (const int dim : {64, 128, 512}) {
    for (const int bits : {1, 2, 3, 4, 5, 6, 8}) {
      KvCache cache(options_of(dim, bits));
      std::vector<float> axis(static_cast<std::size_t>(dim), 0.0F);
      axis[3] = 0.999F * KvCache::kMaxNorm;
      Array keys({1, 1, kTileTokens, dim});
      Array values({1, 1, kTileTokens, dim});
      for (int t = 0; t < kTileTokens; ++t) {
        cache.key_rotation().apply_transposed(axis.data(), keys.data.data() + t * dim, 1);
        cache.value_rotation().apply_transposed(axis.data(), values.data.data() + t * dim, 1);
      }
      cache.append(keys, values);
      cache.seal();
      const auto held = gather(cache, 0, kTileTokens);
      for (const Array* side : {&held.keys, &held.values}) {
        EXPECT_NEAR(test::norm(test::rows_of_head(*side, 0, 0)[5]) / axis[3], 1.0, 2e-3)
            << "d " << dim << ", bits " << bits;
      }
    }
  }
}

TEST_P(Norms, FitIntoHalvesUpToTheLongestVector) {
  test::Memory memory;
  for (const int dim : {8, 18, 64, 96, 128, 512}) {
    for (int bits = 1; bits <= 8; ++bits) {
      const detail::Codec codec = detail::Codec(options_of(dim, bits));
      std::vector<std::uint8_t> tile(codec.layout().bytes());
      std::vector<float> rows(static_cast<std::size_t>(dim) * kTileTokens);
      std::vector<float> axis(static_cast<std::size_t>(dim), 0.0F);
      for (int t = 0; t < kTileTokens; ++t) {
        const auto at = static_cast<std::size_t>(t % dim);
        axis[at] = t % 2 == 0 ? codec.longest_value() : -codec.longest_value();
        codec.value_rotation().apply_transposed(axis.data(), rows.data() + t * dim, 1);
        axis[at] = 0.0F;
      }
      kernels::kernels(GetParam())
          .encode(codec.plan().values, false, rows.data(), tile.data(), memory.bytes());
      std::uint16_t halves[kTileTokens];
      std::memcpy(halves, tile.data() + codec.layout().value_norms(), sizeof halves);
      for (const std::uint16_t half : halves) {
        EXPECT_LT(from_half(half), kMaxHalf) << "d " << dim << ", bits " << bits;
      }
    }
  }
}

TQAI_AT_EVERY_LEVEL(Norms);

}  // namespace
}  // namespace tqai
