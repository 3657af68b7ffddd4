// C++14. The Metal kernels of python/tqai/stores/gpu/attend.metal, as C++ (tests/metal/run).
#pragma once

#include <cstdint>

namespace tqai {
namespace test {

struct MetalConfig {
  int bits_k;
  int bits_v;
  int key_dim;
  int value_dim;
  int rows;  // queries that are computed with at once
  friend bool operator==(const MetalConfig& a, const MetalConfig& b) {
    return a.bits_k == b.bits_k && a.bits_v == b.bits_v && a.key_dim == b.key_dim &&
           a.value_dim == b.value_dim && a.rows == b.rows;
  }
};

constexpr int kMetalSimds = 4;
constexpr int kMetalSizes = 13;

// Pointers as attend.metal explains them.
struct MetalAttend {
  int rows, heads, queries, splits;
  const float* rotated;
  const unsigned char* tiles;
  const int* held;
  const float* centre;
  const float* bias;
  const float* key_levels;
  const float* value_levels;
  const std::int64_t* sizes;
  const float* soft_cap;
  float* maxima;
  float* sums;
  float* outputs;
};

struct MetalMerge {
  int queries;  // of all rows and heads
  const float* maxima;
  const float* sums;
  const float* outputs;
  const float* previous_max;
  const float* previous_sum;
  const float* previous_output;
  const std::int64_t* sizes;
  float* maximum;
  float* sum;
  float* output;
};

// The configurations that are compiled.
const MetalConfig* metal_configs(int* count);

// Runs a kernel; `seed` decides the threads' order. False where the configuration is not compiled.
bool run_metal(const MetalConfig& config, const MetalAttend& args, unsigned seed);
bool run_metal(const MetalConfig& config, const MetalMerge& args, unsigned seed);

struct MetalCentres {
  int queries, tiles;
  const float* factors;
  const float* fixed;
  const float* tile_cos;
  const float* tile_sin;
  const float* cos;
  const float* sin;
  const std::int64_t* sizes;
  float* scores;
};

// With 32 or 30 pairs, 16 or 5 queries at once.
bool run_metal(int pairs, int rows, const MetalCentres& args, unsigned seed);

// Bytes of threadgroup memory, and of a tile.
int metal_shared_bytes(const MetalConfig& config);
int metal_tile_bytes(const MetalConfig& config);

// Kernels that are wrong, each in its own way, to see that the shim tells.
enum class MetalMistake { no_barrier, parted_simdgroup, parted_threadgroup };
int run_metal(MetalMistake mistake, unsigned seed);

}  // namespace test
}  // namespace tqai
