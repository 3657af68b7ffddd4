// Appends, seals and attends through the public header alone; nonzero where the result is wrong.
#include <cmath>
#include <cstdio>
#include <tqai/cache.hpp>

int main() {
  constexpr int kTokens = 200;
  constexpr int kDim = 64;
  tqai::CacheOptions options;
  options.kv_heads = 1;
  options.head_dim = kDim;
  options.residual_window = 8;
  options.bits_v = 8;
  tqai::KvCache cache(options);

  // Equal values: whatever the weights, attention returns the value, up to its 8 bits.
  const tqai::RowMatrix keys = tqai::RowMatrix::Random(kTokens, kDim);
  const tqai::RowMatrix value = tqai::RowMatrix::Random(1, kDim);
  cache.append(keys, value.replicate(kTokens, 1));
  cache.seal();

  tqai::RowMatrix output(1, kDim);
  cache.attend(tqai::RowMatrix::Random(1, kDim), output);
  const float error = (output - value).norm() / value.norm();
  std::printf("%lld tokens, %lld packed, error %.4f\n", static_cast<long long>(cache.tokens()),
              static_cast<long long>(cache.packed_tokens(0)), static_cast<double>(error));
  if (cache.packed_tokens(0) == 0 || !(error < 0.02F)) return 1;

  try {
    cache.append(keys.leftCols(kDim / 2), keys);
  } catch (const tqai::ValueError& refused) {  // caught across the library's border
    std::printf("refused: %s\n", refused.what());
    return 0;
  }
  return 1;
}
