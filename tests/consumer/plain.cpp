// Appends, seals and attends as a runtime without Eigen does; nonzero where a result is wrong.
#include <cmath>
#include <cstdio>
#include <span>
#include <string>
#include <tqai/cache.hpp>
#include <tqai/quantizer.hpp>
#include <vector>

#ifdef EIGEN_WORLD_VERSION
#error "<tqai/cache.hpp> or <tqai/quantizer.hpp> brings Eigen along"
#endif

int main() {
  constexpr int kTokens = 200;
  constexpr int kDim = 64;
  tqai::CacheOptions options;
  options.kv_heads = 1;
  options.head_dim = kDim;
  options.residual_window = 8;
  options.bits_v = 8;
  tqai::KvCache cache(options);

  std::vector<float> keys(kTokens * kDim);
  for (std::size_t i = 0; i < keys.size(); ++i) {
    keys[i] = std::sin(0.37F * static_cast<float>(i * i % 1009));
  }
  // Equal values: whatever the weights, attention returns the value, up to its 8 bits.
  const std::span<const float> value(keys.data(), kDim);
  const auto tensor = [](const float* data, std::int64_t row_stride) {
    return tqai::ConstTensor{data, tqai::DType::f32, {1, 1, kTokens, kDim}, {0, 0, row_stride, 1}};
  };
  cache.append(tensor(keys.data(), kDim), tensor(value.data(), 0));
  cache.seal();

  std::vector<float> output(kDim);
  cache.attend({keys.data(), tqai::DType::f32, {1, 1, 1, kDim}, {kDim, kDim, kDim, 1}},
               {output.data(), tqai::DType::f32, {1, 1, 1, kDim}, {kDim, kDim, kDim, 1}});
  float error = 0.0F;
  float norm = 0.0F;
  for (std::size_t i = 0; i < kDim; ++i) {
    error += (output[i] - value[i]) * (output[i] - value[i]);
    norm += value[i] * value[i];
  }
  error = std::sqrt(error / norm);
  const tqai::KvCache loaded = tqai::KvCache::deserialize(cache.serialize());
  std::printf("%s: %lld tokens, %lld packed, error %.4f\n",
              std::string(tqai::name_of(*loaded.options().level)).c_str(),
              static_cast<long long>(loaded.tokens()),
              static_cast<long long>(loaded.packed_tokens(0)), static_cast<double>(error));
  if (loaded.packed_tokens(0) == 0 || !(error < 0.02F)) return 1;

  // Whatever flags the project has that compiles the library.
  for (const tqai::Level level : tqai::available_levels()) {
    options.level = level;
    tqai::KvCache other(options);
    other.append(tensor(keys.data(), kDim), tensor(keys.data(), kDim));
    other.seal();
    cache.crop(0);
    cache.append(tensor(keys.data(), kDim), tensor(keys.data(), kDim));
    cache.seal();
    std::vector<float> outputs[2] = {output, output};
    int i = 0;
    for (const tqai::KvCache* each : {&cache, &other}) {
      each->attend({keys.data(), tqai::DType::f32, {1, 1, 1, kDim}, {kDim, kDim, kDim, 1}},
                   {outputs[i++].data(), tqai::DType::f32, {1, 1, 1, kDim}, {kDim, kDim, kDim, 1}});
    }
    if (outputs[0] != outputs[1] || cache.serialize() != other.serialize()) {
      std::printf("%s differs\n", std::string(tqai::name_of(level)).c_str());
      return 1;
    }
  }

  try {
    cache.crop(kTokens + 1);
  } catch (const tqai::ValueError& refused) {  // caught across the library's border
    std::printf("refused: %s\n", refused.what());
    return 0;
  }
  return 1;
}
