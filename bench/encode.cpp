// Sealing: norm, rotation, codes and packing of whole tiles; and queries for keys in a basis. One
// thread.
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

std::vector<float> random_rows(int dim, int count) {
  std::mt19937_64 engine(0xBE7C);
  std::normal_distribution<float> normal;
  std::vector<float> rows(static_cast<std::size_t>(dim * count));
  for (float& value : rows) value = normal(engine);
  return rows;
}

void encode(benchmark::State& state, int dim, int bits, RotationKind rotation, Level level,
            bool keys, CodeKind value_codes = CodeKind::scalar) {
  CacheOptions options;
  options.kv_heads = 1;
  options.head_dim = options.value_head_dim = dim;
  options.bits_k = options.bits_v = bits;
  options.rotation = rotation;
  options.value_codes = value_codes;
  const detail::Codec codec(options);
  const auto rows = random_rows(dim, kTileTokens);
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

// Of white moments: which makes no difference to times.
std::shared_ptr<const KeyBasis> white_basis(int dim, int bits) {
  const auto rows = random_rows(dim, kTileTokens);
  KeyMoments moments(1, dim);
  moments.add_keys(0, rows);
  moments.add_queries(0, rows);
  return std::make_shared<const KeyBasis>(KeyBasis::learn(moments, bits));
}

void encode_in_basis(benchmark::State& state, int dim, int bits, Level level, CodeKind codes) {
  const auto rows = random_rows(dim, kTileTokens);
  CacheOptions options;
  options.kv_heads = 1;
  options.head_dim = options.value_head_dim = dim;
  options.bits_k = options.bits_v = bits;
  options.key_codes = codes;
  options.key_basis = white_basis(dim, bits);
  const kernels::KeyTransform transform(options.key_basis->head(0));
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

// A kv head's query rows, as each call of attention has them multiplied.
void transform_queries(benchmark::State& state, int dim, int rows, Level level) {
  const auto basis = white_basis(dim, 4);
  const kernels::QueryTransform transform(basis->head(0));
  const auto queries = random_rows(dim, rows);
  std::vector<float> transformed(queries.size());
  const kernels::Kernels& kernels = kernels::kernels(level);
  for (auto _ : state) {
    kernels.transform_queries(transform, dim, queries.data(), rows, dim, transformed.data());
    benchmark::DoNotOptimize(transformed.data());
  }
}

void register_bases() {
  for (const int dim : {64, 128, 256}) {
    for (const int rows : {1, 4, 7}) {
      for (const Level level : available_levels()) {
        const std::string name = "transform/d=" + std::to_string(dim) +
                                 "/rows=" + std::to_string(rows) +
                                 "/level=" + std::string(name_of(level));
        benchmark::RegisterBenchmark(
            name.c_str(), [=](auto& state) { transform_queries(state, dim, rows, level); });
      }
    }
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
