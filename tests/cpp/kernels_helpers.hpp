// What the kernels' tests share: a fixture of each level, and tiles for it.
#pragma once

#include <algorithm>
#include <cmath>
#include <random>
#include <vector>

#include "cache/codec.hpp"
#include "every_level.hpp"
#include "kernels/kernels.hpp"
#include "kernels/parts.hpp"
#include "reference.hpp"

namespace tqai::test {

inline detail::Codec make_codec(int dim, int bits, CodeKind value_codes = CodeKind::scalar) {
  CacheOptions options;
  options.kv_heads = 1;
  options.head_dim = dim;
  options.value_head_dim = dim;
  options.bits_k = bits;
  options.bits_v = bits;
  options.value_codes = value_codes;
  return detail::Codec(options);
}

constexpr int kDims[] = {16, 40, 64, 80, 96, 128, 256};

class Levels : public EveryLevel {
 protected:
  const kernels::Kernels& level() const { return kernels::kernels(GetParam()); }
  const kernels::Parts& parts() const { return kernels::parts(GetParam()); }
  static const kernels::Kernels& scalar() { return kernels::kernels(Level::scalar); }
};

// Working memory for a kernel, 64-byte aligned.
class Memory {
 public:
  explicit Memory(std::size_t bytes = kernels::kCodingBytes) : lines_(bytes / sizeof(Line) + 1) {}
  std::byte* bytes() noexcept { return lines_.front().bytes; }

 private:
  struct alignas(64) Line {
    std::byte bytes[64];
  };
  std::vector<Line> lines_;
};

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
