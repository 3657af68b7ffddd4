// Decode attention of one query per head: compressed, the exact window, and uncompressed bf16
// beside them; calls with masks and many queries, and what cropping takes; what a prompt takes to
// get into a cache; and a whole model's layers, which come from memory. The benchmarks' names say
// all but the number of threads, which is OMP_NUM_THREADS, or all cores, where they do not.
#include <benchmark/benchmark.h>
#ifdef _OPENMP
#include <omp.h>
#endif

#include <algorithm>
#include <chrono>
#include <cmath>
#include <map>
#include <memory>
#include <optional>
#include <random>
#include <string>
#include <tqai/cache.hpp>
#include <tqai/key_basis.hpp>
#include <tuple>
#include <utility>
#include <vector>

#include "bench.hpp"
#include "bf16_attention.hpp"

namespace tqai::bench {
namespace {

constexpr int kKvHeads = 8;

struct Shape {
  int dim;
  int group;
  int bits_k;
  int bits_v;
  std::int64_t tokens;
  CodeKind value_codes = CodeKind::scalar;
  DType dtype = DType::f32;               // of exact tokens
  CodeKind key_codes = CodeKind::scalar;  // of a trellis: in a basis

  bool operator==(const Shape&) const = default;
};

std::vector<float> random_floats(std::size_t count) {
  std::mt19937_64 engine(0xBE7C);
  std::normal_distribution<float> normal;
  std::vector<float> values(count);
  for (float& value : values) value = normal(engine);
  return values;
}

Rope rope_of(int dim) {
  Rope rope;
  rope.rotary_dim = dim;
  for (int f = 0; f < dim / 2; ++f) {
    rope.inv_freq.push_back(
        std::pow(10000.0F, -2.0F * static_cast<float>(f) / static_cast<float>(dim)));
  }
  return rope;
}

// A bias on half of the frequencies, as found in models. keys: [.., tokens, dim].
void add_turning(const Rope& rope, std::int64_t tokens, std::vector<float>& keys) {
  const auto dim = static_cast<std::size_t>(rope.rotary_dim);
  for (std::size_t i = 0; i < keys.size(); ++i) {
    const std::size_t row = i / dim;
    const std::size_t c = i % dim;
    const std::size_t f = c % (dim / 2);
    if (f % 2 != 0) continue;
    const double angle = static_cast<double>(row % static_cast<std::size_t>(tokens)) *
                         static_cast<double>(rope.inv_freq[f]);
    keys[i] += static_cast<float>(5.0 * (c == f ? std::cos(angle) : std::sin(angle)));
  }
}

// A basis of random keys and queries, one for all cases that it serves.
std::shared_ptr<const KeyBasis> basis_of(int dim, int bits) {
  static std::map<std::pair<int, int>, std::shared_ptr<const KeyBasis>> bases;
  auto& basis = bases[{dim, bits}];
  if (!basis) {
    const auto vectors = random_floats(static_cast<std::size_t>(4 * dim * dim));
    KeyMoments moments(kKvHeads, dim);
    for (int head = 0; head < kKvHeads; ++head) {
      moments.add_keys(head, vectors);
      moments.add_queries(head, vectors);
    }
    basis = std::make_shared<const KeyBasis>(KeyBasis::learn(moments, bits));
  }
  return basis;
}

// The floats in `dtype`, by way of `halves` where that has 16 bits.
const void* numbers(const std::vector<float>& floats, DType dtype,
                    std::vector<std::uint16_t>& halves) {
  if (dtype == DType::f32) return floats.data();
  for (const float x : floats) {
    halves.push_back(dtype == DType::f16 ? to_half(x) : to_bfloat16(x));
  }
  return halves.data();
}

// Every token sealed, so that it is the packed path that is timed. One block of random tokens is
// repeated: the kernels' time does not depend on the numbers.
// `exact`: none sealed instead.
KvCache filled_cache(const Shape& shape, Level level, Centering centering, bool exact = false) {
  const std::int64_t kBlock = std::min<std::int64_t>(1024, shape.tokens);
  CacheOptions options;
  options.kv_heads = kKvHeads;
  options.head_dim = shape.dim;
  options.bits_k = shape.bits_k;
  options.bits_v = shape.bits_v;
  options.key_codes = shape.key_codes;
  options.value_codes = shape.value_codes;
  if (shape.key_codes == CodeKind::trellis) {
    options.key_basis = basis_of(shape.dim, shape.bits_k);
  }
  options.sink_tokens = 0;
  options.residual_window = exact ? static_cast<int>(shape.tokens) : 0;
  options.level = level;
  options.dtype = shape.dtype;
  options.centering = centering;
  if (centering == Centering::rope) options.rope = rope_of(shape.dim);
  KvCache cache(options);
  auto keys = random_floats(static_cast<std::size_t>(kKvHeads * kBlock * shape.dim));
  const std::vector<float> values = keys;
  if (centering == Centering::rope) add_turning(*options.rope, kBlock, keys);
  std::vector<std::uint16_t> key_halves;
  std::vector<std::uint16_t> value_halves;
  const auto as_dtype = [&shape](const std::vector<float>& floats,
                                 std::vector<std::uint16_t>& halves) -> const void* {
    return numbers(floats, shape.dtype, halves);
  };
  const void* key_data = as_dtype(keys, key_halves);
  const void* value_data = as_dtype(values, value_halves);
  const std::array<std::int64_t, 4> tensor_shape = {1, kKvHeads, kBlock, shape.dim};
  const std::array<std::int64_t, 4> strides = {0, kBlock * shape.dim, shape.dim, 1};
  for (std::int64_t start = 0; start < shape.tokens; start += kBlock) {
    cache.append({key_data, shape.dtype, tensor_shape, strides},
                 {value_data, shape.dtype, tensor_shape, strides});
  }
  if (!exact) cache.seal();
  return cache;
}

void report(benchmark::State& state, const Shape& shape, double bytes) {
  const auto iterations = static_cast<double>(state.iterations());
  state.counters["GB/s"] =
      benchmark::Counter(bytes * iterations / 1e9, benchmark::Counter::kIsRate);
  state.counters["per token and head"] =
      benchmark::Counter(iterations * static_cast<double>(shape.tokens) * kKvHeads,
                         benchmark::Counter::kIsRate | benchmark::Counter::kInvert);
}

// `layers`: as many caches one after another, as a model has them; of enough of them each one's
// bytes come from memory.
void attend_cache(benchmark::State& state, const Shape& shape, Level level, Centering centering,
                  bool exact = false, int layers = 1) {
  // The benchmark is called several times, with more rounds each time.
  static std::tuple<Shape, Level, Centering, bool, int> filled_as;
  static std::vector<KvCache> filled;
  if (const auto now = std::tuple{shape, level, centering, exact, layers};
      filled.empty() || now != filled_as) {
    filled.clear();  // before others
    for (int i = 0; i < layers; ++i) {
      filled.push_back(filled_cache(shape, level, centering, exact));
    }
    filled_as = now;
  }
  const std::int64_t heads = kKvHeads * shape.group;
  const auto queries = random_floats(static_cast<std::size_t>(heads * shape.dim));
  std::vector<float> output(queries.size());
  const ConstTensor query{
      queries.data(), DType::f32, {1, heads, 1, shape.dim}, {0, shape.dim, shape.dim, 1}};
  const Tensor out{
      output.data(), DType::f32, {1, 1, heads, shape.dim}, {0, heads * shape.dim, shape.dim, 1}};
  for (auto _ : state) {
    for (const KvCache& cache : filled) {
      cache.attend(query, out);
      benchmark::DoNotOptimize(output.data());
    }
  }
  Shape all = shape;
  all.tokens *= layers;
  const MemoryReport memory = filled[0].memory();
  report(
      state, all,
      static_cast<double>(layers) * static_cast<double>(memory.packed_bytes + memory.exact_bytes));
}

void attend_bf16(benchmark::State& state, const Shape& shape) {
  if (!has_bf16_attention()) {
    state.SkipWithError("this processor has no AVX-512 BF16");
    return;
  }
  const std::int64_t floats = shape.tokens * shape.dim;
  const auto random = random_floats(static_cast<std::size_t>(1024 * shape.dim));
  std::vector<std::uint16_t> keys(static_cast<std::size_t>(kKvHeads * floats));
  for (std::size_t i = 0; i < keys.size(); ++i) keys[i] = to_bfloat16(random[i % random.size()]);
  const std::vector<std::uint16_t> values = keys;
  const auto queries = random_floats(static_cast<std::size_t>(kKvHeads * shape.group * shape.dim));
  std::vector<float> output(queries.size());
  const float scale = 1.0F / std::sqrt(static_cast<float>(shape.dim));
  for (auto _ : state) {
#ifdef _OPENMP
#pragma omp parallel for schedule(dynamic)
#endif
    for (int head = 0; head < kKvHeads; ++head) {
      const std::ptrdiff_t at = static_cast<std::ptrdiff_t>(head) * shape.group * shape.dim;
      bf16_attention(keys.data() + head * floats, values.data() + head * floats, shape.tokens,
                     shape.dim, shape.group, queries.data() + at, scale, output.data() + at);
    }
    benchmark::DoNotOptimize(output.data());
  }
  report(state, shape, static_cast<double>(2 * keys.size() * sizeof(std::uint16_t)));
}

// A prompt's way into a cache: `append`, then `seal`.
void append_prompt(benchmark::State& state, const Shape& shape, Level level, Centering centering,
                   int threads) {
#ifdef _OPENMP
  const int before = omp_get_max_threads();
  omp_set_num_threads(threads);
#else
  if (threads > 1) {
    state.SkipWithError("this build has no OpenMP");
    return;
  }
#endif
  CacheOptions options;
  options.kv_heads = kKvHeads;
  options.head_dim = shape.dim;
  options.bits_k = shape.bits_k;
  options.bits_v = shape.bits_v;
  options.level = level;
  options.dtype = shape.dtype;
  if (centering == Centering::rope) options.rope = rope_of(shape.dim);
  auto keys = random_floats(static_cast<std::size_t>(kKvHeads * shape.tokens * shape.dim));
  const std::vector<float> values = keys;
  if (options.rope) add_turning(*options.rope, shape.tokens, keys);
  std::vector<std::uint16_t> key_halves;
  std::vector<std::uint16_t> value_halves;
  const std::array<std::int64_t, 4> tensor_shape = {1, kKvHeads, shape.tokens, shape.dim};
  const std::array<std::int64_t, 4> strides = {0, shape.tokens * shape.dim, shape.dim, 1};
  const ConstTensor key{numbers(keys, shape.dtype, key_halves), shape.dtype, tensor_shape, strides};
  const ConstTensor value{numbers(values, shape.dtype, value_halves), shape.dtype, tensor_shape,
                          strides};
  KvCache cache(options);  // a first one makes what all share
  for (auto _ : state) {
    state.PauseTiming();
    cache = KvCache(options);
    state.ResumeTiming();
    cache.append(key, value);
    cache.seal();
  }
  report(state, shape, 2.0 * static_cast<double>(keys.size() * size_of(shape.dtype)));
#ifdef _OPENMP
  omp_set_num_threads(before);
#endif
}

void register_prompts() {
  for (const int dim : {64, 128}) {
    for (const DType dtype : {DType::f32, DType::bf16}) {
      for (const Level level : available_levels()) {
        if (level == Level::scalar) continue;
        for (const Centering centering : {Centering::mean, Centering::rope}) {
          for (const int threads : {1, 2}) {
            const Shape shape{dim, 1, 4, 2, 16384, CodeKind::scalar, dtype};
            const std::string name = "append/d=" + std::to_string(dim) +
                                     "/tokens=16384/bits=4,2/level=" + std::string(name_of(level)) +
                                     (dtype == DType::f32 ? "" : "/bf16") +
                                     (centering == Centering::rope ? "/rope" : "") +
                                     "/threads=" + std::to_string(threads);
            benchmark::RegisterBenchmark(
                name.c_str(),
                [=](auto& state) { append_prompt(state, shape, level, centering, threads); })
                ->UseRealTime()
                ->Unit(benchmark::kMillisecond);
          }
        }
      }
    }
  }
}

std::string name_of_shape(const char* what, const Shape& shape, const std::string& rest) {
  return std::string(what) + "/d=" + std::to_string(shape.dim) +
         "/g=" + std::to_string(shape.group) + "/tokens=" + std::to_string(shape.tokens) + rest;
}

// Calls of other kinds, on a cache as conversations have: sinks, sealed tokens, an exact window.
// With `jump`, positions begin anew every so many tokens, as those of joined texts.
KvCache conversation(const Shape& shape, Level level, Centering centering = Centering::none,
                     std::int64_t jump = 0) {
  CacheOptions options;
  options.kv_heads = kKvHeads;
  options.head_dim = shape.dim;
  options.bits_k = shape.bits_k;
  options.bits_v = shape.bits_v;
  options.level = level;
  options.centering = centering;
  if (centering == Centering::rope) options.rope = rope_of(shape.dim);
  auto keys = random_floats(static_cast<std::size_t>(kKvHeads * shape.tokens * shape.dim));
  const std::vector<float> values = keys;
  std::vector<std::int64_t> positions(static_cast<std::size_t>(shape.tokens));
  for (std::size_t t = 0; t < positions.size(); ++t) {
    const auto token = static_cast<std::int64_t>(t);
    positions[t] = jump > 0 ? token % jump : token;
  }
  if (options.rope) add_turning(*options.rope, jump > 0 ? jump : shape.tokens, keys);
  const std::array<std::int64_t, 4> tensor_shape = {1, kKvHeads, shape.tokens, shape.dim};
  const std::array<std::int64_t, 4> strides = {0, shape.tokens * shape.dim, shape.dim, 1};
  KvCache cache(options);
  std::optional<PositionTensor> given;
  if (options.rope) given = PositionTensor{positions.data(), {1, 1, shape.tokens}, {0, 0, 1}};
  cache.append({keys.data(), DType::f32, tensor_shape, strides},
               {values.data(), DType::f32, tensor_shape, strides}, given);
  cache.seal();
  return cache;
}

// The last `count` tokens' queries, each of which sees what is before it: as the causal rule says,
// or as a boolean mask that says the same.
void attend_queries(benchmark::State& state, const Shape& shape, const KvCache& cache,
                    std::int64_t count, bool masked) {
  const std::int64_t heads = kKvHeads * shape.group;
  const auto queries = random_floats(static_cast<std::size_t>(heads * count * shape.dim));
  std::vector<float> output(queries.size());
  const ConstTensor query{queries.data(),
                          DType::f32,
                          {1, heads, count, shape.dim},
                          {0, count * shape.dim, shape.dim, 1}};
  const Tensor out{output.data(),
                   DType::f32,
                   {1, count, heads, shape.dim},
                   {0, heads * shape.dim, shape.dim, 1}};
  std::vector<std::uint8_t> seen(static_cast<std::size_t>(count * shape.tokens));
  for (std::int64_t q = 0; q < count; ++q) {
    std::fill_n(seen.begin() + q * shape.tokens, shape.tokens - count + q + 1, std::uint8_t{1});
  }
  AttendOptions options;
  if (masked) {
    options.causal = false;
    options.mask = Mask{
        seen.data(), Mask::Kind::boolean, {1, 1, count, shape.tokens}, {0, 0, shape.tokens, 1}};
  }
  for (auto _ : state) {
    cache.attend(query, out, options);
    benchmark::DoNotOptimize(output.data());
  }
  report(state, shape, static_cast<double>(cache.memory().packed_bytes));
}

// What it takes to give back four tokens, as guesses that were wrong are.
void crop_four(benchmark::State& state, const Shape& shape, Level level) {
  KvCache cache = conversation(shape, level);
  const auto tokens = random_floats(static_cast<std::size_t>(kKvHeads * 4 * shape.dim));
  const ConstTensor four{
      tokens.data(), DType::f32, {1, kKvHeads, 4, shape.dim}, {0, 4 * shape.dim, shape.dim, 1}};
  for (auto _ : state) {
    cache.append(four, four);
    const auto start = std::chrono::steady_clock::now();
    cache.crop(cache.tokens() - 4);
    const std::chrono::duration<double> taken = std::chrono::steady_clock::now() - start;
    state.SetIterationTime(taken.count());
  }
}

void register_calls() {
  const Shape shape{128, 4, 4, 2, 8192};
  for (const Level level : available_levels()) {
    if (level == Level::scalar) continue;
    const std::string rest = "/level=" + std::string(name_of(level));
    for (const std::int64_t count : {1, 32, 512}) {
      for (const bool masked : {false, true}) {
        benchmark::RegisterBenchmark(name_of_shape(masked ? "mask" : "causal", shape,
                                                   "/queries=" + std::to_string(count) + rest)
                                         .c_str(),
                                     [=](auto& state) {
                                       attend_queries(state, shape, conversation(shape, level),
                                                      count, masked);
                                     })
            ->UseRealTime();
      }
    }
    benchmark::RegisterBenchmark(name_of_shape("crop", shape, rest).c_str(), [=](auto& state) {
      crop_four(state, shape, level);
    })->UseManualTime();
    for (const std::int64_t jump : {0, 100, 16}) {
      benchmark::RegisterBenchmark(
          name_of_shape("jumps", shape, "/every=" + std::to_string(jump) + rest).c_str(),
          [=](auto& state) {
            const KvCache cache = conversation(shape, level, Centering::rope, jump);
            attend_queries(state, shape, cache, 1, false);
          })
          ->UseRealTime();
    }
  }
}

// More than processors' caches hold.
void register_layers() {
  constexpr int kLayers = 32;
  for (const int dim : {64, 128}) {
    for (const auto& [bits_k, bits_v] : {std::pair{4, 4}, {4, 2}, {2, 2}}) {
      for (const Level level : available_levels()) {
        if (level == Level::scalar) continue;
        for (const CodeKind codes : {CodeKind::scalar, CodeKind::trellis}) {
          Shape shape{dim, 1, bits_k, bits_v, 32768, codes};
          shape.key_codes = codes;
          const std::string rest = "/bits=" + std::to_string(bits_k) + "," +
                                   std::to_string(bits_v) +
                                   "/level=" + std::string(name_of(level)) +
                                   (codes == CodeKind::scalar ? "" : "/adaptive");
          benchmark::RegisterBenchmark(
              name_of_shape("layers", shape, "/layers=" + std::to_string(kLayers) + rest).c_str(),
              [=](auto& state) {
                attend_cache(state, shape, level, Centering::mean, false, kLayers);
              })
              ->UseRealTime()
              ->Unit(benchmark::kMillisecond);
        }
      }
    }
  }
}

}  // namespace

void register_all() {
  register_layers();
  register_prompts();
  register_calls();
  for (const int dim : {64, 96, 128, 256}) {
    for (const int group : {1, 4, 7, 8}) {
      for (const Level level : available_levels()) {  // an exact window at its longest
        for (const DType dtype : {DType::f32, DType::bf16, DType::f16}) {
          Shape shape{dim, group, 4, 2, 192};
          shape.dtype = dtype;
          std::string rest = "/level=" + std::string(name_of(level));
          if (dtype != DType::f32) rest += dtype == DType::bf16 ? "/bf16" : "/f16";
          benchmark::RegisterBenchmark(
              name_of_shape("exact", shape, rest).c_str(),
              [=](auto& state) { attend_cache(state, shape, level, Centering::none, true); })
              ->UseRealTime();
        }
      }
      for (const std::int64_t tokens : {8192, 32768, 262144}) {
        if (tokens > 32768 && (dim != 128 || group > 4)) continue;
        const Shape plain{dim, group, 16, 16, tokens};
        benchmark::RegisterBenchmark(name_of_shape("bf16", plain, "").c_str(), [plain](
                                                                                   auto& state) {
          attend_bf16(state, plain);
        })->UseRealTime();
        for (const Level level : available_levels()) {
          if (level == Level::scalar) continue;
          for (const auto& [bits_k, bits_v] : {std::pair{4, 4}, {4, 2}, {2, 2}}) {
            const std::string bits =
                "/bits=" + std::to_string(bits_k) + "," + std::to_string(bits_v);
            for (const Centering centering : {Centering::mean, Centering::rope}) {
              const Shape shape{dim, group, bits_k, bits_v, tokens};
              const std::string rest = bits + "/level=" + std::string(name_of(level)) +
                                       (centering == Centering::rope ? "/rope" : "");
              benchmark::RegisterBenchmark(
                  name_of_shape("attend", shape, rest).c_str(),
                  [=](auto& state) { attend_cache(state, shape, level, centering); })
                  ->UseRealTime();
            }
            for (const CodeKind key_codes : {CodeKind::scalar, CodeKind::trellis}) {
              Shape shape{dim, group, bits_k, bits_v, tokens};
              shape.key_codes = key_codes;
              shape.value_codes = CodeKind::trellis;
              const std::string rest = bits + "/level=" + std::string(name_of(level)) +
                                       (key_codes == CodeKind::scalar ? "/trellis" : "/adaptive");
              benchmark::RegisterBenchmark(
                  name_of_shape("attend", shape, rest).c_str(),
                  [=](auto& state) { attend_cache(state, shape, level, Centering::mean); })
                  ->UseRealTime();
            }
          }
        }
      }
    }
  }
}

}  // namespace tqai::bench
