// What an application may do with a cache next, chosen by bytes: for caches that came from bytes.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <optional>
#include <random>
#include <span>
#include <tqai/cache.hpp>
#include <vector>

namespace tqai::test {

class AnyOperations {
 public:
  explicit AnyOperations(std::span<const std::uint8_t> choices) : choices_(choices) {}

  /// Until the choices end. What an operation may refuse is refused by ValueError; anything else
  /// that is thrown gets out. Aborts where the bytes of what is left do not give the same cache.
  void apply_to(KvCache& cache) {
    while (!choices_.empty()) {
      try {
        apply_next(cache);
      } catch (const ValueError&) {  // of positions beyond the last, or of padding too late
      }
    }
    const std::vector<std::byte> bytes = cache.serialize();
    if (KvCache::deserialize(bytes).serialize() != bytes) std::abort();
  }

 private:
  // Tokens that one operation touches at most.
  static constexpr std::int64_t kMost = 100;

  std::uint8_t next() {
    if (choices_.empty()) return 0;
    const std::uint8_t first = choices_.front();
    choices_ = choices_.subspan(1);
    return first;
  }
  // A token that the cache still has, or its end.
  std::int64_t token_of(const KvCache& cache) {
    return cache.first_token() + next() * (cache.tokens() - cache.first_token()) / 255;
  }

  void apply_next(KvCache& cache) {
    switch (next() % 11) {
      case 0: append(cache, {}); break;
      case 1: append_at_positions(cache); break;
      case 2: cache.seal(); break;
      case 3: cache.crop(token_of(cache)); break;
      case 4: select(cache); break;
      case 5: {
        KvCache copy = next() % 4 == 0 ? KvCache::deserialize(cache.serialize()) : cache;
        append(cache, {});
        std::swap(copy, cache);
        break;
      }
      case 6: gather(cache); break;
      case 7: attend(cache); break;
      case 8: cache.discard_before(token_of(cache)); break;
      case 9: leave_out(cache); break;
      default: set_padding(cache); break;
    }
  }

  // Numbers of the size that `scale` says, the same whatever the platform.
  std::vector<std::uint32_t> numbers(const KvCache& cache, std::int64_t tokens, int dim,
                                     std::uint8_t scale) {
    const std::size_t count = static_cast<std::size_t>(cache.batch()) *
                              static_cast<std::size_t>(cache.options().kv_heads) *
                              static_cast<std::size_t>(tokens) * static_cast<std::size_t>(dim);
    constexpr float kScales[] = {1.0F, 1e-20F, 3e3F, 1e9F};
    std::vector<std::uint32_t> packed(count);  // room for elements of any dtype
    std::vector<float> plain(count);
    for (float& x : plain) {
      state_ = state_ * 6364136223846793005U + 1442695040888963407U;
      x = (static_cast<float>(state_ >> 40) / static_cast<float>(1 << 23) - 1.0F) *
          kScales[scale % 64 == 0 ? scale / 64 : 0];
      if (cache.options().dtype == DType::f16) x = std::clamp(x, -6e4F, 6e4F);
    }
    convert_from_float(plain.data(), count, cache.options().dtype, packed.data());
    return packed;
  }

  void append(KvCache& cache, const std::optional<PositionTensor>& positions) {
    const std::int64_t tokens = positions ? positions->shape[2] : 1 + next() % kMost;
    const std::uint8_t scale = next();
    const CacheOptions& options = cache.options();
    const auto tensor = [&](const std::vector<std::uint32_t>& data, std::int64_t dim) {
      const std::int64_t heads = options.kv_heads;
      return ConstTensor{data.data(),
                         options.dtype,
                         {cache.batch(), heads, tokens, dim},
                         {heads * tokens * dim, tokens * dim, dim, 1}};
    };
    const auto keys = numbers(cache, tokens, options.head_dim, scale);
    const auto values = numbers(cache, tokens, options.value_head_dim, scale);
    cache.append(tensor(keys, options.head_dim), tensor(values, options.value_head_dim), positions);
  }

  void append_at_positions(KvCache& cache) {
    const std::int64_t tokens = 1 + next() % kMost;
    constexpr std::int64_t kStarts[] = {-KvCache::kMaxPosition, -100, 0, (1 << 20) - 100,
                                        KvCache::kMaxPosition - kMost};
    const std::int64_t start = kStarts[next() % 5];
    const std::int64_t step = next() % 3;  // consecutive or not
    const std::int64_t sections = cache.options().rope ? cache.options().rope->section_count() : 1;
    std::vector<std::int64_t> each;
    for (std::int64_t i = 0; i < sections * tokens; ++i) {
      each.push_back(start + step * (i % tokens) / (1 + i / tokens));
    }
    append(cache, PositionTensor{each.data(), {1, sections, tokens}, {0, tokens, 1}});
  }

  void select(KvCache& cache) {
    std::vector<std::int64_t> rows(1 + next() % 3);
    for (std::int64_t& row : rows) row = next() % cache.batch();
    cache.select(rows);
  }

  void gather(const KvCache& cache) {
    const std::int64_t first = token_of(cache);
    const std::int64_t tokens = std::min(kMost, cache.tokens() - first);
    const std::int64_t heads = cache.options().kv_heads;
    const auto room = [&](std::int64_t dim) {
      return std::vector<float>(static_cast<std::size_t>(cache.batch() * heads * tokens * dim));
    };
    const auto tensor = [&](std::vector<float>& data, std::int64_t dim) {
      return Tensor{data.data(),
                    DType::f32,
                    {cache.batch(), heads, tokens, dim},
                    {heads * tokens * dim, tokens * dim, dim, 1}};
    };
    std::vector<float> keys = room(cache.options().head_dim);
    std::vector<float> values = room(cache.options().value_head_dim);
    cache.gather(first, tensor(keys, cache.options().head_dim),
                 tensor(values, cache.options().value_head_dim));
  }

  void attend(const KvCache& cache) {
    const std::int64_t count = std::min<std::int64_t>(1 + next() % 3, cache.tokens());
    const std::int64_t heads = cache.options().kv_heads;
    const std::int64_t dim = cache.options().head_dim;
    const std::int64_t value_dim = cache.options().value_head_dim;
    std::vector<float> queries(static_cast<std::size_t>(cache.batch() * heads * count * dim));
    for (std::size_t i = 0; i < queries.size(); ++i) {
      queries[i] = static_cast<float>(i % 7) - 3.0F;
    }
    std::vector<float> output(static_cast<std::size_t>(cache.batch() * heads * count * value_dim));
    AttendOptions options;
    options.first_token = token_of(cache);
    options.window = next();
    cache.attend({queries.data(),
                  DType::f32,
                  {cache.batch(), heads, count, dim},
                  {heads * count * dim, count * dim, dim, 1}},
                 {output.data(),
                  DType::f32,
                  {cache.batch(), count, heads, value_dim},
                  {heads * count * value_dim, heads * value_dim, value_dim, 1}},
                 options);
  }

  void leave_out(KvCache& cache) {
    const std::int64_t count = std::min<std::int64_t>(next(), cache.tokens());
    std::vector<std::uint8_t> hidden(static_cast<std::size_t>(cache.batch() * count));
    for (std::uint8_t& mark : hidden) mark = next() % 2;
    cache.leave_out(hidden);
  }

  void set_padding(KvCache& cache) {
    std::vector<std::int64_t> counts(static_cast<std::size_t>(cache.batch()));
    for (std::int64_t& count : counts) count = token_of(cache);
    cache.set_padding(counts);
  }

  std::span<const std::uint8_t> choices_;
  std::uint64_t state_ = 1;
};

/// Flips one bit of a cache's bytes, `trials` times: of each of the first `each` bytes, then of
/// any. What is not refused gives a cache, and any operations follow. Returns how many were
/// refused.
inline int refusals_of_damaged(const std::vector<std::byte>& bytes, int trials, int each,
                               std::mt19937_64& engine) {
  int refused = 0;
  for (int trial = 0; trial < trials; ++trial) {
    auto damaged = bytes;
    const std::size_t at = trial < each ? static_cast<std::size_t>(trial) : engine() % bytes.size();
    damaged[at] ^= static_cast<std::byte>(1U << (engine() % 8));
    std::uint8_t choices[16];
    for (std::uint8_t& choice : choices) choice = static_cast<std::uint8_t>(engine());
    try {
      KvCache cache = KvCache::deserialize(damaged);
      AnyOperations(choices).apply_to(cache);
    } catch (const ValueError&) {
      ++refused;
    }
  }
  return refused;
}

}  // namespace tqai::test
