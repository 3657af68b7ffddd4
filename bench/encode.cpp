// Sealing: norm, rotation, codes and packing of whole tiles, one thread.
#include <benchmark/benchmark.h>

#include <memory>
#include <random>
#include <string>
#include <tqai/cpu.hpp>
#include <tqai/key_basis.hpp>
#include <vector>

#include "bench.hpp"
#include "cache/codec.hpp"
#include "kernels/kernels.hpp"
#include "threads.hpp"

namespace tqai::bench {
namespace {

void encode(benchmark::State& state, int dim, int bits, RotationKind rotation, Level level,
            bool keys, CodeKind value_codes = CodeKind::scalar) {
  CacheOptions options;
  options.kv_heads = 1;
  options.head_dim = options.value_head_dim = dim;
  options.bits_k = options.bits_v = bits;
  options.rotation = rotation;
  options.value_codes = value_codes;
  const detail::Codec codec(options);
  std::mt19937_64 engine(0xBE7C);
  std::normal_distribution<float> normal;
  std::vector<float> rows(static_cast<std::size_t>(dim) * kTileTokens);
  for (float& value : rows) value = normal(engine);
  std::vector<std::uint8_t> tile(codec.layout().bytes());
  const kernels::Kernels& kernels = kernels::kernels(level);
  const std::size_t bytes = value_codes == CodeKind::trellis
                                ? kernels::trellis_coding_bytes(dim, bits)
                                : kernels::kCodingBytes;
  const ThreadMemory memory(1, bytes);
  const kernels::SidePlan& side = keys ? codec.plan().keys : codec.plan().values;
  for (auto _ : state) {
    kernels.encode(side, keys, rows.data(), tile.data(), memory.of(0));
    benchmark::DoNotOptimize(tile.data());
  }
  state.counters["per vector"] =
      benchmark::Counter(static_cast<double>(state.iterations()) * kTileTokens,
                         benchmark::Counter::kIsRate | benchmark::Counter::kInvert);
}

// Values in trellis codes, by the rotation of the dimension.
void register_trellises() {
  for (const int dim : {64, 96, 128, 256}) {
    for (int bits = 1; bits <= kMaxTrellisBits; ++bits) {
      for (const Level level : available_levels()) {
        const std::string name = "encode/trellis/d=" + std::to_string(dim) +
                                 "/bits=" + std::to_string(bits) +
                                 "/level=" + std::string(name_of(level));
        benchmark::RegisterBenchmark(name.c_str(), [=](auto& state) {
          encode(state, dim, bits, RotationKind::automatic, level, false, CodeKind::trellis);
        });
      }
    }
  }
}

// Keys in a basis, of white moments: which makes no difference to times.
void encode_in_basis(benchmark::State& state, int dim, int bits, Level level, CodeKind codes) {
  std::mt19937_64 engine(0xBE7C);
  std::normal_distribution<float> normal;
  std::vector<float> rows(static_cast<std::size_t>(dim) * kTileTokens);
  for (float& value : rows) value = normal(engine);
  KeyMoments moments(1, dim);
  moments.add_keys(0, rows);
  moments.add_queries(0, rows);
  CacheOptions options;
  options.kv_heads = 1;
  options.head_dim = options.value_head_dim = dim;
  options.bits_k = options.bits_v = bits;
  options.key_codes = codes;
  options.key_basis = std::make_shared<const KeyBasis>(KeyBasis::learn(moments, bits));
  const KeyBasis::Head of = options.key_basis->head(0);
  const kernels::KeyTransform transform{of.analysis.data(), of.feedback.data(), of.synthesis.data(),
                                        of.analysis_scale, of.synthesis_scale};
  const detail::Codec codec(options);
  std::vector<std::uint8_t> tile(codec.layout().bytes());
  const kernels::Kernels& kernels = kernels::kernels(level);
  const ThreadMemory memory(1, kernels::key_path_coding_bytes(dim));
  for (auto _ : state) {
    kernels.encode_in_basis(codec.plan().keys, transform, rows.data(), tile.data(), memory.of(0));
    benchmark::DoNotOptimize(tile.data());
  }
  state.counters["per vector"] =
      benchmark::Counter(static_cast<double>(state.iterations()) * kTileTokens,
                         benchmark::Counter::kIsRate | benchmark::Counter::kInvert);
}

void register_bases() {
  for (const int dim : {64, 128, 256}) {
    for (const int bits : {2, 4}) {
      for (const Level level : available_levels()) {
        for (const CodeKind codes : {CodeKind::scalar, CodeKind::trellis}) {
          const std::string name = std::string("encode/basis/") +
                                   (codes == CodeKind::scalar ? "scalar" : "trellis") +
                                   "/d=" + std::to_string(dim) + "/bits=" + std::to_string(bits) +
                                   "/level=" + std::string(name_of(level));
          benchmark::RegisterBenchmark(
              name.c_str(), [=](auto& state) { encode_in_basis(state, dim, bits, level, codes); });
        }
      }
    }
  }
}

}  // namespace

void register_all() {
  register_trellises();
  register_bases();
  for (const int dim : {64, 96, 128, 256}) {
    for (const int bits : {2, 4, 8}) {
      for (const bool hadamard : {true, false}) {
        if (hadamard && (dim & (dim - 1)) != 0) continue;
        for (const Level level : available_levels()) {
          for (const bool keys : {true, false}) {
            const std::string name = std::string("encode/") + (keys ? "keys" : "values") +
                                     "/d=" + std::to_string(dim) + "/bits=" + std::to_string(bits) +
                                     (hadamard ? "/hadamard" : "/haar") +
                                     "/level=" + std::string(name_of(level));
            const RotationKind rotation = hadamard ? RotationKind::hadamard : RotationKind::haar;
            benchmark::RegisterBenchmark(name.c_str(), [=](auto& state) {
              encode(state, dim, bits, rotation, level, keys);
            });
          }
        }
      }
    }
  }
}

}  // namespace tqai::bench
