// Rotation of one row, as of a query and of an output at every step, at each level and by Rotation,
// which is compiled for every processor. One thread.
#include <benchmark/benchmark.h>

#include <random>
#include <string>
#include <tqai/cpu.hpp>
#include <vector>

#include "bench.hpp"
#include "cache/codec.hpp"
#include "kernels/kernels.hpp"

namespace tqai::bench {
namespace {

struct Case {
  int dim;
  RotationKind kind;
  bool back;
};

template <typename Rotate>
void time_rotation(benchmark::State& state, const Case& which, Rotate rotate) {
  CacheOptions options;
  options.kv_heads = 1;
  options.head_dim = options.value_head_dim = which.dim;
  options.rotation = which.kind;
  const detail::Codec codec(options);
  std::mt19937_64 engine(0xBE7C);
  std::normal_distribution<float> normal;
  std::vector<float> from(static_cast<std::size_t>(which.dim));
  for (float& value : from) value = normal(engine);
  std::vector<float> to(from.size());
  for (auto _ : state) {
    rotate(codec, from.data(), to.data());
    benchmark::DoNotOptimize(to.data());
    benchmark::ClobberMemory();
  }
}

void register_case(const Case& which) {
  const std::string name = std::string("rotate/") + (which.back ? "outputs" : "queries") +
                           "/d=" + std::to_string(which.dim) +
                           (which.kind == RotationKind::haar ? "/haar" : "/hadamard");
  benchmark::RegisterBenchmark((name + "/library").c_str(), [which](auto& state) {
    time_rotation(state, which, [which](const detail::Codec& codec, const float* x, float* y) {
      if (which.back) {
        codec.value_rotation().apply_transposed(x, y, 1);
      } else {
        codec.key_rotation().apply(x, y, 1);
      }
    });
  });
  for (const Level level : available_levels()) {
    const kernels::Kernels& kernels = kernels::kernels(level);
    benchmark::RegisterBenchmark(
        (name + "/level=" + std::string(name_of(level))).c_str(), [which, &kernels](auto& state) {
          time_rotation(state, which,
                        [which, &kernels](const detail::Codec& codec, const float* x, float* y) {
                          if (which.back) {
                            kernels.rotate_back(codec.plan().values, x, y);
                          } else {
                            kernels.rotate(codec.plan().keys, x, y);
                          }
                        });
        });
  }
}

}  // namespace

void register_all() {
  for (const int dim : {64, 96, 128, 256}) {
    for (const RotationKind kind : {RotationKind::hadamard, RotationKind::haar}) {
      if (kind == RotationKind::hadamard && (dim & (dim - 1)) != 0) continue;
      for (const bool back : {false, true}) register_case({dim, kind, back});
    }
  }
}

}  // namespace tqai::bench
