// C++14, as the Metal Shading Language is.
#include "metal_kernels.hpp"

#include <metal_stdlib>

#include "attend.metal"

namespace tqai {
namespace test {
namespace {

static_assert(kMetalSizes == tqai::kSizes, "");

// All widths of keys and values at each head dimension, and with each number of queries.
#define TQAI_WIDTHS(X, dim, rows, add)    \
  X(2, 2 + add % 7, dim, dim, rows)       \
  X(3, 2 + (1 + add) % 7, dim, dim, rows) \
  X(4, 2 + (2 + add) % 7, dim, dim, rows) \
  X(5, 2 + (3 + add) % 7, dim, dim, rows) \
  X(6, 2 + (4 + add) % 7, dim, dim, rows) \
  X(7, 2 + (5 + add) % 7, dim, dim, rows) \
  X(8, 2 + (6 + add) % 7, dim, dim, rows)
#ifdef TQAI_FEW_CONFIGS  // sanitizers make a long compilation of the others
#define TQAI_CONFIGS(X)    \
  TQAI_WIDTHS(X, 64, 8, 0) \
  X(4, 2, 80, 80, 7) X(3, 7, 128, 128, 4) X(3, 5, 24, 40, 2)
#else
#define TQAI_CONFIGS(X)     \
  TQAI_WIDTHS(X, 64, 8, 0)  \
  TQAI_WIDTHS(X, 80, 7, 2)  \
  TQAI_WIDTHS(X, 96, 1, 3)  \
  TQAI_WIDTHS(X, 128, 4, 5) \
  TQAI_WIDTHS(X, 256, 4, 6) \
  X(1, 1, 64, 64, 4) X(4, 2, 128, 64, 8) X(4, 4, 192, 128, 3) X(3, 5, 24, 40, 2)
#endif

const MetalConfig kConfigs[] = {
#define TQAI_CONFIG(bits_k, bits_v, key_dim, value_dim, rows) \
  {bits_k, bits_v, key_dim, value_dim, rows},
    TQAI_CONFIGS(TQAI_CONFIG)
#undef TQAI_CONFIG
};

// Calls `use` with the configuration's type.
template <typename Use>
bool with(const MetalConfig& config, Use use) {
#define TQAI_CONFIG(bits_k, bits_v, key_dim, value_dim, rows)                   \
  if (config == MetalConfig{bits_k, bits_v, key_dim, value_dim, rows}) {        \
    use(tqai::Attend<bits_k, bits_v, key_dim, value_dim, rows, kMetalSimds>()); \
    return true;                                                                \
  }
  TQAI_CONFIGS(TQAI_CONFIG)
#undef TQAI_CONFIG
  return false;
}

uint as_uint(int value) { return static_cast<uint>(value); }

}  // namespace

const MetalConfig* metal_configs(int* count) {
  *count = static_cast<int>(sizeof(kConfigs) / sizeof(kConfigs[0]));
  return kConfigs;
}

bool run_metal(const MetalConfig& config, const MetalAttend& args, unsigned seed) {
  const int groups = (args.splits + kMetalSimds - 1) / kMetalSimds;
  const uint3 grid = {as_uint(groups * kMetalSimds * 32), as_uint(args.rows * args.heads),
                      as_uint((args.queries + config.rows - 1) / config.rows)};
  return with(config, [&](auto configured) {
    using Kernel = decltype(configured);
    static metal_shim::Shared<float4, Kernel::kShared> shared;
    metal_shim::launch(grid, {kMetalSimds * 32, 1, 1}, seed, [&](const metal_shim::Thread& at) {
      Kernel::run(args.rotated, args.tiles, args.held, args.centre, args.bias, args.key_levels,
                  args.value_levels, args.sizes, args.soft_cap, args.maxima, args.sums,
                  args.outputs, shared, at.threadgroup_position_in_grid,
                  at.simdgroup_index_in_threadgroup, at.thread_index_in_simdgroup);
    });
  });
}

namespace {

template <int ValueDim>
void merge(const MetalMerge& args, unsigned seed) {
  const uint3 grid = {as_uint(ValueDim), as_uint(args.queries), 1};
  metal_shim::launch(grid, {as_uint(ValueDim), 1, 1}, seed, [&](const metal_shim::Thread& at) {
    tqai::merge<ValueDim>(args.maxima, args.sums, args.outputs, args.previous_max,
                          args.previous_sum, args.previous_output, args.sizes, args.maximum,
                          args.sum, args.output, at.thread_position_in_grid);
  });
}

template <int B, int V, int K, int D, int R, int S>
void merge(tqai::Attend<B, V, K, D, R, S>, const MetalMerge& args, unsigned seed) {
  merge<D>(args, seed);
}

}  // namespace

bool run_metal(const MetalConfig& config, const MetalMerge& args, unsigned seed) {
  return with(config, [&](auto configured) { merge(configured, args, seed); });
}

namespace {

template <int Pairs, int Rows>
void centres(const MetalCentres& args, unsigned seed) {
  static metal_shim::Shared<float4, tqai::Centres<Pairs, Rows>::kShared> shared;
  const uint3 grid = {as_uint(args.tiles * 64), as_uint((args.queries + Rows - 1) / Rows), 1};
  metal_shim::launch(grid, {64, 1, 1}, seed, [&](const metal_shim::Thread& at) {
    tqai::Centres<Pairs, Rows>::run(
        args.factors, args.fixed, args.tile_cos, args.tile_sin, args.cos, args.sin, args.sizes,
        args.scores, shared, at.threadgroup_position_in_grid, at.thread_index_in_threadgroup);
  });
}

}  // namespace

bool run_metal(int pairs, int rows, const MetalCentres& args, unsigned seed) {
  if (pairs == 32 && rows == 16) return centres<32, 16>(args, seed), true;
  if (pairs == 30 && rows == 5) return centres<30, 5>(args, seed), true;
  return false;
}

int metal_shared_bytes(const MetalConfig& config) {
  int bytes = 0;
  with(config, [&](auto configured) {
    bytes = decltype(configured)::kShared * static_cast<int>(sizeof(float4));
  });
  return bytes;
}

int metal_tile_bytes(const MetalConfig& config) {
  int bytes = 0;
  with(config, [&](auto configured) { bytes = decltype(configured)::kTileBytes; });
  return bytes;
}

int run_metal(MetalMistake mistake, unsigned seed) {
  static metal_shim::Shared<float, 64> shared;
  int wrong = 0;
  metal_shim::launch({64, 1, 1}, {64, 1, 1}, seed, [&](const metal_shim::Thread& at) {
    const uint index = at.thread_position_in_grid.x;
    float* memory = shared;
    memory[index] = 1.0f;
    if (mistake == MetalMistake::no_barrier) wrong += memory[63 - index] == 1.0f ? 0 : 1;
    if (mistake == MetalMistake::parted_simdgroup) {
      index % 2 == 0 ? metal::simd_sum(1.0f) : metal::simd_max(1.0f);
    }
    if (mistake == MetalMistake::parted_threadgroup && index < 32) {
      metal::threadgroup_barrier(metal::mem_flags::mem_threadgroup);
    }
  });
  return wrong;
}

}  // namespace test
}  // namespace tqai
