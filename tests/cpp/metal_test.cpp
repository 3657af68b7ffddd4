// The Metal kernels, run as C++ (tests/metal/run), against double precision over the same codes.
#include <gtest/gtest.h>

#include <cmath>
#include <cstring>
#include <limits>
#include <sstream>
#include <tqai/codebook.hpp>
#include <tqai/half.hpp>
#include <tqai/packing.hpp>
#include <vector>

#include "metal_kernels.hpp"
#include "reference.hpp"

namespace tqai {
namespace {

using test::kMetalSimds;
using test::kMetalSizes;
using test::MetalConfig;

constexpr float kInfinity = std::numeric_limits<float>::infinity();
constexpr int kHeads = 2;
constexpr int kTiles = 5;
constexpr int kSplitTiles = 2;
constexpr int kSplits = 3;

std::size_t size(int value) { return static_cast<std::size_t>(value); }

enum class Centres { none, constant, each };
// What a bias is given for: nothing, all queries alike, each query, or each of all.
enum class Bias { none, tokens, steps, all };

struct Case {
  int rows = 2;
  int held = 2;
  int queries_per_head = 1;
  int steps = 1;
  int tokens = kTiles * kTileTokens;
  Centres centres = Centres::none;
  Bias bias = Bias::none;
  float soft_cap = 0.0F;
};

// One side of random tiles: codes packed, and what they stand for.
struct Side {
  Side(int dim, int bits, int count, bool keys, std::mt19937_64& engine)
      : levels(test_levels(dim, bits)),
        vectors(size(count * kTileTokens), std::vector<double>(size(dim))),
        packed(size(count), std::vector<std::uint8_t>(packed_bytes(padded_dim(dim), bits))),
        norms(size(count), std::vector<std::uint16_t>(kTileTokens)) {
    std::uniform_int_distribution<int> code(0, (1 << bits) - 1);
    std::uniform_real_distribution<float> norm(0.5F, 4.0F);
    const int padded = padded_dim(dim);
    for (int tile = 0; tile < count; ++tile) {
      std::vector<std::uint8_t> codes(size(padded * kTileTokens));
      for (std::uint8_t& each : codes) each = static_cast<std::uint8_t>(code(engine));
      (keys ? pack_keys : pack_values)(codes.data(), padded, bits, packed[size(tile)].data());
      for (int t = 0; t < kTileTokens; ++t) {
        norms[size(tile)][size(t)] = to_half(norm(engine));
        const double length = static_cast<double>(from_half(norms[size(tile)][size(t)]));
        for (int c = 0; c < dim; ++c) {
          const double level = static_cast<double>(levels[codes[size(c * kTileTokens + t)]]);
          vectors[size(tile * kTileTokens + t)][size(c)] = length * level;
        }
      }
    }
  }

  static std::vector<float> test_levels(int dim, int bits) {
    const auto levels = codebook(dim, bits, Grid::int8).centroids();
    return {levels.begin(), levels.end()};
  }

  std::vector<float> levels;
  test::Matrix vectors;  // [tiles · 64, dim]
  std::vector<std::vector<std::uint8_t>> packed;
  std::vector<std::vector<std::uint16_t>> norms;
};

// A softmax under way.
struct State {
  explicit State(std::size_t queries, int dim)
      : max(queries), sum(queries), output(queries * size(dim)) {}
  std::vector<float> max, sum, output;
};

bool operator==(const State& a, const State& b) {
  return a.max == b.max && a.sum == b.sum && a.output == b.output;
}

// Random tiles, queries and what else a kernel takes.
class Problem {
 public:
  Problem(const MetalConfig& config, const Case& chosen, unsigned seed = 1)
      : config_(config),
        case_(chosen),
        engine_(test::random_engine(seed)),
        keys_(config.key_dim, config.bits_k, chosen.held * kHeads * kTiles, true, engine_),
        values_(config.value_dim, config.bits_v, chosen.held * kHeads * kTiles, false, engine_) {
    for (int row = 0; row < chosen.rows; ++row) held_.push_back((row + 1) % chosen.held);
    rotated_ = test::random_normal(size(all() * config.key_dim), engine_);
    centre_tokens_ = chosen.centres == Centres::each ? kTiles * kTileTokens : 1;
    centre_.assign(size(all() * centre_tokens_), 0.0F);
    if (chosen.centres != Centres::none)
      centre_ = test::random_normal(centre_.size(), engine_, 2.0F);
    make_bias();
    for (std::size_t tile = 0; tile < keys_.packed.size(); ++tile) {
      add_bytes(keys_.packed[tile]);
      add_bytes(values_.packed[tile]);
      add_bytes(keys_.norms[tile]);
      add_bytes(values_.norms[tile]);
    }
  }

  int queries() const { return case_.queries_per_head * case_.steps; }
  int all() const { return case_.rows * kHeads * queries(); }

  // What both kernels make of it; `previous`: what the softmax has seen before.
  State run(unsigned seed, const State* previous = nullptr) const {
    const std::size_t parts = size(all() * kSplits);
    State each(parts, config_.value_dim);
    const bool biased = case_.bias != Bias::none;
    const std::int64_t sizes[] = {
        kHeads,         kTiles,      case_.tokens, queries(),   case_.steps, kSplitTiles,   kSplits,
        centre_tokens_, strides_[0], strides_[1],  strides_[2], strides_[3], biased ? 1 : 0};
    static_assert(sizeof(sizes) == kMetalSizes * sizeof(std::int64_t));
    const test::MetalAttend attend{case_.rows,
                                   kHeads,
                                   queries(),
                                   kSplits,
                                   rotated_.data(),
                                   tiles_.data(),
                                   held_.data(),
                                   centre_.data(),
                                   bias_.data(),
                                   keys_.levels.data(),
                                   values_.levels.data(),
                                   sizes,
                                   &case_.soft_cap,
                                   each.max.data(),
                                   each.sum.data(),
                                   each.output.data()};
    EXPECT_TRUE(run_metal(config_, attend, seed));
    State merged(size(all()), config_.value_dim);
    const State& before = previous == nullptr ? each : *previous;
    const std::int64_t merge_sizes[] = {kSplits, previous == nullptr ? 0 : 1};
    const test::MetalMerge merge{all(),
                                 each.max.data(),
                                 each.sum.data(),
                                 each.output.data(),
                                 before.max.data(),
                                 before.sum.data(),
                                 before.output.data(),
                                 merge_sizes,
                                 merged.max.data(),
                                 merged.sum.data(),
                                 merged.output.data()};
    EXPECT_TRUE(run_metal(config_, merge, seed));
    return merged;
  }

  // The largest error of the attention that a state stands for, and of log Σ e^score.
  void compare(const State& state) const {
    for (int place = 0; place < all(); ++place) {
      const std::vector<double> scores = scores_of(place);
      double top = -kInfinity;
      for (const double score : scores) top = std::max(top, score);
      double total = 0.0;
      std::vector<double> output(size(config_.value_dim), 0.0);
      const std::size_t first = first_token(place);
      for (std::size_t t = 0; t < scores.size(); ++t) {
        const double weight = scores[t] == -kInfinity ? 0.0 : std::exp(scores[t] - top);
        total += weight;
        for (std::size_t c = 0; c < output.size(); ++c) {
          output[c] += weight * values_.vectors[first + t][c];
        }
      }
      const double sum = static_cast<double>(state.sum[size(place)]);
      if (total == 0.0) {
        EXPECT_EQ(sum, 0.0);
        continue;
      }
      const double logarithm = static_cast<double>(state.max[size(place)]) + std::log(sum);
      EXPECT_NEAR(logarithm, top + std::log(total), 2e-5 * (1.0 + std::abs(top)));
      for (std::size_t c = 0; c < output.size(); ++c) {
        const std::size_t at = size(place) * output.size() + c;
        ASSERT_NEAR(static_cast<double>(state.output[at]) / sum, output[c] / total, 2e-5)
            << "query " << place << ", coordinate " << c;
      }
    }
  }

 private:
  template <typename T>
  void add_bytes(const std::vector<T>& values) {
    const auto* bytes = reinterpret_cast<const std::uint8_t*>(values.data());
    tiles_.insert(tiles_.end(), bytes, bytes + values.size() * sizeof(T));
  }

  void make_bias() {
    const int step = case_.tokens;
    const int group = step * case_.steps;
    const int head = group * case_.queries_per_head;
    int count = 1;  // read by none
    switch (case_.bias) {
      case Bias::none: break;
      case Bias::tokens: count = step; break;
      case Bias::steps: count = group, strides_[3] = step; break;
      case Bias::all:
        count = case_.rows * kHeads * head;
        strides_[0] = kHeads * head, strides_[1] = head, strides_[2] = group, strides_[3] = step;
        break;
    }
    bias_ = test::random_normal(size(count), engine_);
    for (float& each : bias_) each = each > 0.8F ? -kInfinity : each;
    if (case_.bias ==
        Bias::all) {  // a query that sees nothing, and one whose first tiles are hidden
      std::fill(bias_.begin(), bias_.begin() + step, -kInfinity);
      const auto last = bias_.end() - step;
      std::fill(last, last + std::min(step, 3 * kTileTokens), -kInfinity);
    }
  }

  std::size_t first_token(int place) const {
    const int head = place / queries() % kHeads;
    const int row = place / queries() / kHeads;
    return size((held_[size(row)] * kHeads + head) * kTiles * kTileTokens);
  }

  std::vector<double> scores_of(int place) const {
    const int query = place % queries();
    const int head = place / queries() % kHeads;
    const int row = place / queries() / kHeads;
    const int group = query / case_.steps;
    const int step = query % case_.steps;
    std::vector<double> scores;
    for (int t = 0; t < case_.tokens; ++t) {
      const std::vector<double>& key = keys_.vectors[first_token(place) + size(t)];
      double score = 0.0;
      for (std::size_t c = 0; c < key.size(); ++c) {
        score += key[c] * static_cast<double>(rotated_[size(place) * key.size() + c]);
      }
      const int centre = place * centre_tokens_ + (centre_tokens_ == 1 ? 0 : t);
      score += static_cast<double>(centre_[size(centre)]);
      if (case_.soft_cap > 0.0F) {
        const auto cap = static_cast<double>(case_.soft_cap);
        score = cap * std::tanh(score / cap);
      }
      if (case_.bias != Bias::none) {
        const std::int64_t at =
            row * strides_[0] + head * strides_[1] + group * strides_[2] + step * strides_[3] + t;
        score += static_cast<double>(bias_[static_cast<std::size_t>(at)]);
      }
      scores.push_back(score);
    }
    return scores;
  }

  MetalConfig config_;
  Case case_;
  std::mt19937_64 engine_;
  Side keys_;
  Side values_;
  std::vector<int> held_;
  std::vector<float> rotated_, centre_, bias_;
  std::vector<std::uint8_t> tiles_;
  int centre_tokens_ = 1;
  std::int64_t strides_[4] = {0, 0, 0, 0};
};

std::vector<MetalConfig> configs() {
  int count = 0;
  const MetalConfig* first = test::metal_configs(&count);
  return {first, first + count};
}

std::string name_of(const MetalConfig& config) {
  std::ostringstream name;
  name << 'k' << config.bits_k << 'v' << config.bits_v << '_' << config.key_dim << 'x'
       << config.value_dim << "_rows" << config.rows;
  return name.str();
}

TEST(Metal, EveryWidthAndDimensionIsRight) {
  for (const MetalConfig& config : configs()) {
    SCOPED_TRACE(name_of(config));
    Case chosen;
    chosen.queries_per_head = config.rows;
    chosen.tokens -= 13;
    chosen.rows = chosen.held = 1;
    const Problem problem(config, chosen);
    problem.compare(problem.run(1));
  }
}

TEST(Metal, TilesAreTheLibrarysAndThreadgroupsFit) {
  for (const MetalConfig& config : configs()) {
    const TileLayout layout(padded_dim(config.key_dim), padded_dim(config.value_dim), config.bits_k,
                            config.bits_v);
    EXPECT_EQ(size(test::metal_tile_bytes(config)), layout.bytes()) << name_of(config);
    EXPECT_LE(test::metal_shared_bytes(config), 32 << 10) << name_of(config);
  }
}

// The configuration of these dims, with its number of queries.
MetalConfig config_of(int key_dim, int value_dim) {
  for (const MetalConfig& config : configs()) {
    if (config.key_dim == key_dim && config.value_dim == value_dim) return config;
  }
  throw std::out_of_range("no such configuration");
}

// Sets of queries: of one token or several, that fill the kernel's rows or do not.
TEST(Metal, MasksCentresAndCaps) {
  const Bias biases[] = {Bias::tokens, Bias::steps, Bias::all};
  const Centres centres[] = {Centres::none, Centres::constant, Centres::each};
  int number = 0;
  for (const int dim : {64, 80, 128}) {
    for (const auto& [group, steps] : {std::pair{1, 5}, {7, 1}, {8, 2}, {4, 3}}) {
      Case chosen;
      chosen.queries_per_head = group;
      chosen.steps = steps;
      chosen.rows = 1 + number % 2 * 2;  // 1, or 3 of which two are the same held row
      chosen.held = 2;
      chosen.bias = biases[number % 3];
      chosen.centres = centres[number / 3 % 3];
      chosen.soft_cap = number % 4 == 3 ? 1.5F : 0.0F;
      chosen.tokens -= number * 29 % 200;
      const Problem problem(config_of(dim, dim), chosen, static_cast<unsigned>(number));
      SCOPED_TRACE(number);
      problem.compare(problem.run(1));
      ++number;
    }
  }
}

// Positions from 64 · place + distance on.
void check_centres(int pairs, int rows, std::int64_t place, std::int64_t distance) {
  constexpr int kAsked = 19;
  const int tokens = kTiles * kTileTokens;
  auto engine = test::random_engine(7);
  const std::vector<float> factors = test::random_normal(size(kAsked * 2 * pairs), engine);
  const std::vector<float> fixed = test::random_normal(size(kAsked), engine);
  const auto frequency = [&](int f) { return std::pow(100.0, -static_cast<double>(f) / pairs); };
  std::vector<float> tile_cos, tile_sin, cos, sin;
  for (std::int64_t p = 0; p < place + kTiles; ++p) {
    for (int f = 0; f < pairs; ++f) {
      const double angle = static_cast<double>(p * kTileTokens) * frequency(f);
      tile_cos.push_back(static_cast<float>(std::cos(angle)));
      tile_sin.push_back(static_cast<float>(std::sin(angle)));
    }
  }
  for (int f = 0; f < pairs; ++f) {
    for (int t = 0; t < kTileTokens; ++t) {
      cos.push_back(static_cast<float>(std::cos(t * frequency(f))));
      sin.push_back(static_cast<float>(std::sin(t * frequency(f))));
    }
  }
  const std::int64_t sizes[] = {kAsked, kTiles, place, distance};
  std::vector<float> scores(size(kAsked * tokens), std::numeric_limits<float>::quiet_NaN());
  const test::MetalCentres args{kAsked,          kTiles,          factors.data(), fixed.data(),
                                tile_cos.data(), tile_sin.data(), cos.data(),     sin.data(),
                                sizes,           scores.data()};
  ASSERT_TRUE(run_metal(pairs, rows, args, 1));
  for (int query = 0; query < kAsked; ++query) {
    for (int t = 0; t < tokens; ++t) {
      double expected = static_cast<double>(fixed[size(query)]);
      for (int f = 0; f < pairs; ++f) {
        const auto position = static_cast<double>(place * kTileTokens + distance + t);
        const double angle = position * frequency(f);
        const std::size_t at = size(query * 2 * pairs + f);
        expected += static_cast<double>(factors[at]) * std::cos(angle) +
                    static_cast<double>(factors[at + size(pairs)]) * std::sin(angle);
      }
      ASSERT_NEAR(static_cast<double>(scores[size(query * tokens + t)]), expected, 2e-5)
          << "query " << query << ", token " << t;
    }
  }
}

TEST(Metal, CentresTurnWithThePosition) {
  check_centres(32, 16, 0, 0);
  check_centres(32, 16, 3, 4);
  check_centres(30, 5, 1000, 63);
}

TEST(Metal, TheOrderOfThreadsMakesNoDifference) {
  Case chosen;
  chosen.queries_per_head = 4;
  chosen.bias = Bias::all;
  const Problem problem(config_of(128, 128), chosen);
  const State first = problem.run(1);
  for (const unsigned seed : {2U, 3U, 4U}) EXPECT_EQ(first, problem.run(seed));
}

// Softmax over two sets of the same tiles, one after the other, weighs the same values twice.
TEST(Metal, APreviousStateIsGoneOnWith) {
  Case chosen;
  chosen.queries_per_head = 4;
  chosen.bias = Bias::all;
  const Problem problem(config_of(128, 128), chosen);
  const State once = problem.run(1);
  State raised = once;  // the same softmax, written with another largest score
  for (std::size_t i = 0; i < once.sum.size(); ++i) {
    raised.max[i] += 3.0F;
    raised.sum[i] *= std::exp(-3.0F);
    for (std::size_t c = 0; c < 128; ++c) raised.output[i * 128 + c] *= std::exp(-3.0F);
  }
  const State twice = problem.run(1, &raised);
  problem.compare([&] {
    State half = twice;
    for (float& sum : half.sum) sum *= 0.5F;
    for (float& output : half.output) output *= 0.5F;
    return half;
  }());
}

TEST(Metal, BarriersThatLackAreSeen) {
  int wrong = 0;
  for (unsigned seed = 0; seed < 4; ++seed) {
    wrong += run_metal(test::MetalMistake::no_barrier, seed);
  }
  EXPECT_GT(wrong, 0);
}

TEST(MetalDeathTest, ThreadsThatPartEndTheProgram) {
  EXPECT_DEATH(run_metal(test::MetalMistake::parted_simdgroup, 1), "different operations");
  EXPECT_DEATH(run_metal(test::MetalMistake::parted_threadgroup, 1), "not all threads");
}

}  // namespace
}  // namespace tqai
