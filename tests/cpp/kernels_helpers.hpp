// What the kernels' tests share: a fixture of each level, and tiles for it.
#pragma once

#include <algorithm>
#include <cmath>
#include <random>
#include <vector>

#include "cache/codec.hpp"
#include "kernels/kernels.hpp"
#include "reference.hpp"

namespace tqai::test {

inline detail::Codec make_codec(int dim, int bits) {
  CacheOptions options;
  options.kv_heads = 1;
  options.head_dim = dim;
  options.value_head_dim = dim;
  options.bits_k = bits;
  options.bits_v = bits;
  return detail::Codec(options);
}

// The parameter is the level, or nothing runs: a level that this machine lacks is skipped.
class Levels : public testing::TestWithParam<Level> {
 protected:
  void SetUp() override {
    const auto levels = available_levels();
    if (std::find(levels.begin(), levels.end(), GetParam()) == levels.end()) {
      GTEST_SKIP() << "this processor has no " << name_of(GetParam());
    }
  }
  const kernels::Kernels& level() const { return kernels::kernels(GetParam()); }
  static const kernels::Kernels& scalar() { return kernels::kernels(Level::scalar); }
};

// All of a file's tests, at each level.
#define TQAI_AT_EVERY_LEVEL(Suite)                                                         \
  INSTANTIATE_TEST_SUITE_P(                                                                \
      All, Suite, testing::Values(Level::scalar, Level::neon, Level::avx2, Level::avx512), \
      [](const auto& param) { return test::level_text(param.param); })

// Tiles with vectors of all sizes, a zero vector and a one-hot one among them.
inline std::vector<float> tile_rows(int dim, std::mt19937_64& engine) {
  auto rows = random_normal(static_cast<std::size_t>(dim) * kTileTokens, engine);
  for (int t = 0; t < kTileTokens; ++t) {
    const float scale = std::ldexp(1.0F, t % 20 - 10);
    for (int c = 0; c < dim; ++c) rows[static_cast<std::size_t>(t * dim + c)] *= scale;
  }
  std::fill_n(rows.begin() + 7 * dim, dim, 0.0F);
  std::fill_n(rows.begin() + 8 * dim, dim, 0.0F);
  rows[static_cast<std::size_t>(8 * dim + 3)] = 42.0F;
  return rows;
}

}  // namespace tqai::test
