// Random geometries, histories and calls: every level gives the scalar one's bits, and these are
// within the kernels' bound of double-precision attention over the decoded tokens.
#include <algorithm>
#include <cmath>
#include <sstream>
#include <tqai/cache.hpp>

#include "cache_helpers.hpp"

namespace tqai {
namespace {

using test::Array;
using test::Tokens;

class Random {
 public:
  explicit Random(std::uint64_t seed) : engine_(test::random_engine(seed)) {}

  int between(int low, int high) { return std::uniform_int_distribution<int>(low, high)(engine_); }
  bool chance(int percent) { return between(1, 100) <= percent; }
  template <typename T, std::size_t kCount>
  T among(const T (&choices)[kCount]) {
    return choices[between(0, static_cast<int>(kCount) - 1)];
  }
  std::mt19937_64& engine() { return engine_; }

 private:
  std::mt19937_64 engine_;
};

// What is done to a cache, whatever its level, before it is read.
struct History {
  int batch;
  std::vector<std::int64_t> padding;
  std::vector<std::int64_t> chunks;
  std::int64_t crop;
  std::int64_t discard;
};

struct Case {
  CacheOptions options;
  History history;
  int group;
  std::int64_t queries;
  float peak;  // what queries are multiplied by: few tokens get most of the weight at 4
  AttendOptions attend;
  std::vector<std::vector<bool>> hidden;  // [queries], of all tokens; empty: no mask
  std::string text;
};

Case random_case(Random& random) {
  Case all;
  CacheOptions& options = all.options;
  constexpr int kDims[] = {16, 32, 40, 64, 72, 80, 96, 112, 128, 160, 256};
  options.head_dim = random.among(kDims);
  options.value_head_dim = random.chance(80) ? options.head_dim : random.among(kDims);
  options.kv_heads = random.between(1, 3);
  options.bits_k = random.between(1, 8);
  options.bits_v = random.between(1, 8);
  if (options.bits_v <= kMaxTrellisBits && random.chance(50)) {
    options.value_codes = CodeKind::trellis;
  }
  options.sink_tokens = random.between(0, 5);
  options.residual_window = random.between(0, 150);
  constexpr Centering kCenterings[] = {Centering::none, Centering::mean, Centering::rope};
  options.centering = random.among(kCenterings);
  if (options.centering == Centering::rope) {
    options.rope = test::rope_of(options.head_dim / 2 * 2);
  }
  all.group = random.between(1, 16);

  History& history = all.history;
  history.batch = random.between(1, 2);
  std::int64_t tokens = 0;
  for (int i = random.between(1, 6); i > 0; --i) {
    history.chunks.push_back(random.chance(50) ? random.between(1, 9) : random.between(10, 200));
    tokens += history.chunks.back();
  }
  for (int b = 0; b < history.batch; ++b) {
    const auto most = static_cast<int>(std::min<std::int64_t>(history.chunks.front() - 1, 70));
    history.padding.push_back(random.chance(30) ? random.between(0, most) : 0);
  }
  const std::int64_t padded = *std::max_element(history.padding.begin(), history.padding.end());
  const auto croppable = static_cast<int>(std::min(tokens / 3, tokens - padded - 1));
  history.crop = random.chance(30) ? random.between(0, croppable) : 0;
  tokens -= history.crop;
  all.queries = random.chance(50)
                    ? 1
                    : random.between(1, static_cast<int>(std::min<std::int64_t>(tokens, 9)));
  all.peak = random.chance(50) ? 1.0F : 4.0F;
  AttendOptions& attend = all.attend;
  attend.causal = random.chance(80);
  if (random.chance(25)) attend.soft_cap = 2.0F;
  if (random.chance(25)) attend.scale = 0.3F;
  if (random.chance(30)) attend.window = random.between(1, static_cast<int>(tokens));
  history.discard = 0;
  if (attend.window > 0 && attend.causal && random.chance(50)) {
    history.discard = std::max<std::int64_t>(tokens - all.queries + 1 - attend.window, 0);
  }
  if (random.chance(30)) {
    attend.first_token =
        random.between(static_cast<int>(history.discard), static_cast<int>(tokens) - 1);
  }
  if (random.chance(40)) {
    for (std::int64_t q = 0; q < all.queries; ++q) {
      std::vector<bool>& row = all.hidden.emplace_back();
      for (std::int64_t t = 0; t < tokens; ++t) row.push_back(random.chance(30));
    }
  }
  std::ostringstream text;
  text << "d " << options.head_dim << "/" << options.value_head_dim << ", bits " << options.bits_k
       << "/" << options.bits_v << (options.value_codes == CodeKind::trellis ? " in a trellis" : "")
       << ", heads " << options.kv_heads << " x " << all.group << ", sinks " << options.sink_tokens
       << ", exact " << options.residual_window << ", tokens " << tokens << ", queries "
       << all.queries << ", batch " << history.batch << ", crop " << history.crop << ", discard "
       << history.discard << ", first " << attend.first_token << ", window " << attend.window
       << ", cap " << attend.soft_cap << ", mask " << !all.hidden.empty();
  all.text = text.str();
  return all;
}

KvCache make_cache(const Case& all, Level level, const Array& keys, const Array& values) {
  CacheOptions options = all.options;
  options.level = level;
  KvCache cache(options, all.history.batch);
  std::int64_t at = 0;
  for (const std::int64_t count : all.history.chunks) {
    cache.append(Tokens::slice(keys, at, count), Tokens::slice(values, at, count));
    if (at == 0) cache.set_padding(all.history.padding);
    at += count;
  }
  if (all.history.crop > 0) cache.crop(at - all.history.crop);
  cache.seal();
  if (all.history.discard > 0) cache.discard_before(all.history.discard);
  return cache;
}

TEST(Differential, LevelsAgreeAndAreWithinTheBoundOfDouble) {
  int packed = 0;
  for (std::uint64_t seed = 0; seed < 150; ++seed) {
    Random random(1000 + seed);
    Case all = random_case(random);
    std::int64_t tokens = 0;
    for (const std::int64_t count : all.history.chunks) tokens += count;
    const CacheOptions& options = all.options;
    const Array keys({all.history.batch, options.kv_heads, tokens, options.head_dim},
                     random.engine());
    const Array values({all.history.batch, options.kv_heads, tokens, options.value_head_dim},
                       random.engine());
    const Array queries({all.history.batch, std::int64_t{options.kv_heads} * all.group, all.queries,
                         options.head_dim},
                        random.engine(), all.peak);
    tokens -= all.history.crop;
    const std::int64_t columns = tokens - all.attend.first_token;
    std::vector<float> mask;
    for (const auto& row : all.hidden) {
      for (std::int64_t t = all.attend.first_token; t < tokens; ++t) {
        const bool hidden = row[static_cast<std::size_t>(t)];
        mask.push_back(hidden ? -std::numeric_limits<float>::infinity() : 0.0F);
      }
    }
    if (!mask.empty()) {
      all.attend.mask =
          Mask{mask.data(), Mask::Kind::f32, {1, 1, all.queries, columns}, {0, 0, columns, 1}};
    }
    Array expected({0, 0, 0, 0});
    for (const Level level : available_levels()) {
      const KvCache cache = make_cache(all, level, keys, values);
      const Array output = attend(cache, queries, all.attend);
      if (level != Level::scalar) {
        ASSERT_EQ(output.data, expected.data)
            << name_of(level) << ", seed " << seed << ": " << all.text;
        continue;
      }
      expected = output;
      packed += cache.packed_tokens(0) > 0 ? 1 : 0;
      test::ReferenceOptions reference;
      if (all.attend.scale) reference.scale = static_cast<double>(*all.attend.scale);
      reference.soft_cap = static_cast<double>(all.attend.soft_cap);
      reference.causal = all.attend.causal;
      reference.window = all.attend.window;
      std::vector<std::int64_t> first;
      for (const std::int64_t pad : all.history.padding) {
        first.push_back(std::max(pad, all.attend.first_token));
      }
      // The largest of many errors, and one int8 term of a query that is larger is off by as much
      // more; a token too many or too few shows as several times that where it has a weight.
      const double bound = (all.peak > 1.0F ? 10.0 : 2.0) * test::kPackedError;
      const double error = worst_error(cache, queries, output, reference, first, all.hidden);
      ASSERT_LT(error, bound) << "seed " << seed << ": " << all.text;
    }
  }
  EXPECT_GT(packed, 50);
}

}  // namespace
}  // namespace tqai
