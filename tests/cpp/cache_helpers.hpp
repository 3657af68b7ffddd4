// Caches of random tokens, and their comparison with double-precision attention.
#pragma once

#include <tqai/cache.hpp>

#include "reference.hpp"

namespace tqai::test {

inline CacheOptions geometry(int dim, int bits_k = 4, int bits_v = 4, int kv_heads = 2) {
  CacheOptions options;
  options.kv_heads = kv_heads;
  options.head_dim = dim;
  options.bits_k = bits_k;
  options.bits_v = bits_v;
  options.sink_tokens = 4;
  options.residual_window = 16;
  return options;
}

// Keys with a mean, as models have them, and values without.
struct Tokens {
  Array keys;
  Array values;

  Tokens(int batch, int heads, std::int64_t tokens, int dim, std::mt19937_64& engine)
      : keys({batch, heads, tokens, dim}, engine), values({batch, heads, tokens, dim}, engine) {
    for (std::size_t i = 0; i < keys.data.size(); ++i) {
      keys.data[i] += 2.0F * std::sin(static_cast<float>(i % static_cast<std::size_t>(dim)));
    }
  }
  // Tokens [first, first + count) as a tensor over the same data.
  static ConstTensor slice(const Array& array, std::int64_t first, std::int64_t count) {
    ConstTensor tensor = array;
    tensor.data = array.data.data() + first * array.shape[3];
    tensor.shape[2] = count;
    return tensor;
  }
  void append_to(KvCache& cache, std::int64_t first, std::int64_t count) const {
    cache.append(slice(keys, first, count), slice(values, first, count));
  }
};

struct Gathered {
  Array keys;
  Array values;
};

inline Gathered gather(const KvCache& cache, std::int64_t first, std::int64_t count) {
  const CacheOptions& options = cache.options();
  Gathered all{Array({cache.batch(), options.kv_heads, count, options.head_dim}),
               Array({cache.batch(), options.kv_heads, count, options.value_head_dim})};
  cache.gather(first, all.keys, all.values);
  return all;
}

inline Matrix rows_of_head(const Array& array, std::int64_t batch_row, std::int64_t head) {
  Matrix rows;
  for (std::int64_t t = 0; t < array.shape[2]; ++t) {
    const float* row = array.at(batch_row, head, t);
    rows.emplace_back(row, row + array.shape[3]);
  }
  return rows;
}

inline Array attend(const KvCache& cache, const Array& queries, const AttendOptions& options = {}) {
  Array output(
      {queries.shape[0], queries.shape[2], queries.shape[1], cache.options().value_head_dim});
  cache.attend(queries, output, options);
  return output;
}

// Largest error of the outputs, relative to the values' scale: against double-precision attention
// over what `gather` returns. padding: tokens of each row that are not seen; none by default.
// hidden[q]: tokens that query q does not see besides.
inline double worst_error(const KvCache& cache, const Array& queries, const Array& output,
                          ReferenceOptions options = {},
                          const std::vector<std::int64_t>& padding = {},
                          const std::vector<std::vector<bool>>& hidden = {}) {
  const Gathered all = gather(cache, 0, cache.tokens());
  const std::int64_t group = queries.shape[1] / cache.options().kv_heads;
  if (options.scale == 0.0) options.scale = 1.0 / std::sqrt(cache.options().head_dim);
  double worst = 0.0;
  for (std::int64_t b = 0; b < queries.shape[0]; ++b) {
    if (!padding.empty()) options.first_token = padding[static_cast<std::size_t>(b)];
    for (std::int64_t h = 0; h < queries.shape[1]; ++h) {
      const Matrix keys = rows_of_head(all.keys, b, h / group);
      const Matrix values = rows_of_head(all.values, b, h / group);
      for (std::int64_t q = 0; q < queries.shape[2]; ++q) {
        const auto expected = attention(
            queries.at(b, h, q), keys, values, cache.tokens() - queries.shape[2] + q, options,
            hidden.empty() ? std::vector<bool>{} : hidden[static_cast<std::size_t>(q)]);
        std::vector<double> difference(expected);
        double scale = 0.0;
        for (const auto& value : values) scale = std::max(scale, norm(value));
        for (std::size_t c = 0; c < difference.size(); ++c) {
          difference[c] -= static_cast<double>(output.at(b, q, h)[c]);
        }
        worst = std::max(worst, norm(difference) / scale);
      }
    }
  }
  return worst;
}

// In units of the largest value. 8-bit weights have one scale a tile: each is off by up to 1/510 of
// the largest one of its tile, and 64 such errors, of either sign, add up to about 8 · 0.3 / 255 of
// it. Queries and fp32 are below that.
inline constexpr double kPackedError = 1.5e-2;

// Calls, and returns the message of the ValueError that must come.
template <typename Call>
std::string message_of(Call call) {
  try {
    call();
  } catch (const ValueError& error) {
    return error.what();
  }
  ADD_FAILURE() << "no ValueError";
  return {};
}

inline bool contains(const std::string& text, const std::string& part) {
  return text.find(part) != std::string::npos;
}

}  // namespace tqai::test
