// Random sequences of a cache's operations against an implementation that keeps everything.
#include <optional>
#include <tqai/cache.hpp>

#include "cache_helpers.hpp"

namespace tqai {
namespace {

using test::Array;
using test::gather;
using test::Gathered;
using test::geometry;

constexpr int kDim = 16;
constexpr int kWindow = 16;
constexpr int kSinks = 4;
// Of a vector's length: a rare vector along one axis of 16 reaches 6 % at 8 bits, another token's
// would be off by 100 % and more.
constexpr double kCodeError = 0.2;

// A token of one row: what was appended and, once it is sealed, what its codes stand for.
struct Token {
  std::vector<float> exact;  // key, then value
  std::optional<std::vector<float>> coded;
};
using RowModel = std::vector<Token>;

struct Model {
  std::vector<RowModel> rows;

  void append(const Array& keys, const Array& values) {
    for (std::size_t b = 0; b < rows.size(); ++b) {
      for (std::int64_t t = 0; t < keys.shape[2]; ++t) {
        const float* key = keys.at(static_cast<std::int64_t>(b), 0, t);
        const float* value = values.at(static_cast<std::int64_t>(b), 0, t);
        Token token{{key, key + kDim}, {}};
        token.exact.insert(token.exact.end(), value, value + kDim);
        rows[b].push_back(std::move(token));
      }
    }
  }
  void crop(std::int64_t tokens) {
    for (RowModel& row : rows) row.resize(static_cast<std::size_t>(tokens));
  }
  void select(const std::vector<std::int64_t>& chosen) {
    std::vector<RowModel> next;
    for (const std::int64_t row : chosen) next.push_back(rows[static_cast<std::size_t>(row)]);
    rows = std::move(next);
  }
};

double error_of(const std::vector<float>& a, const std::vector<float>& b, std::size_t first) {
  double error = 0.0;
  double length = 0.0;
  for (std::size_t c = first; c < first + kDim; ++c) {
    const double difference = static_cast<double>(a[c]) - static_cast<double>(b[c]);
    error += difference * difference;
    length += static_cast<double>(a[c]) * static_cast<double>(a[c]);
  }
  return std::sqrt(error / length);
}

// Each token is what was appended, to the bit, or, beyond sinks and window, what its codes stand
// for, which never changes again.
void compare(const KvCache& cache, Model& model) {
  ASSERT_EQ(cache.batch(), static_cast<int>(model.rows.size()));
  const auto tokens = static_cast<std::int64_t>(model.rows[0].size());
  ASSERT_EQ(cache.tokens(), tokens);
  const Gathered all = gather(cache, 0, tokens);
  for (std::size_t b = 0; b < model.rows.size(); ++b) {
    std::int64_t coded = 0;
    for (std::int64_t t = 0; t < tokens; ++t) {
      Token& token = model.rows[b][static_cast<std::size_t>(t)];
      const auto row = static_cast<std::int64_t>(b);
      std::vector<float> held(all.keys.at(row, 0, t), all.keys.at(row, 0, t) + kDim);
      held.insert(held.end(), all.values.at(row, 0, t), all.values.at(row, 0, t) + kDim);
      if (token.coded) {
        ASSERT_EQ(held, *token.coded) << "row " << b << ", token " << t;
      } else if (held != token.exact) {
        ASSERT_GE(t, kSinks);
        ASSERT_LT(t, tokens - kWindow);
        ASSERT_LT(error_of(token.exact, held, 0), kCodeError);
        ASSERT_LT(error_of(token.exact, held, kDim), kCodeError);
        token.coded = held;
      }
      coded += token.coded ? 1 : 0;
    }
    ASSERT_EQ(cache.packed_tokens(static_cast<int>(b)), coded);
  }
}

class Operations : public testing::Test {
 protected:
  std::int64_t random(std::int64_t low, std::int64_t high) {
    return std::uniform_int_distribution<std::int64_t>(low, high)(engine_);
  }

  void append(KvCache& cache, Model& model) {
    const std::int64_t count = random(0, 3) == 0 ? random(1, 200) : random(1, 12);
    Array keys({cache.batch(), 1, count, kDim}, engine_);
    const Array values({cache.batch(), 1, count, kDim}, engine_);
    for (std::size_t i = 0; i < keys.data.size(); i += kDim) keys.data[i] += 3.0F;
    cache.append(keys, values);
    model.append(keys, values);
  }

  void select(KvCache& cache, Model& model) {
    std::vector<std::int64_t> rows(static_cast<std::size_t>(random(1, 4)));
    for (auto& row : rows) row = random(0, cache.batch() - 1);
    cache.select(rows);
    model.select(rows);
  }

  void repeat(KvCache& cache, Model& model) {
    if (cache.batch() > 3) return;
    std::vector<std::int64_t> rows;
    for (std::int64_t row = 0; row < cache.batch(); ++row) rows.insert(rows.end(), 2, row);
    cache.select(rows);
    model.select(rows);
  }

  // The copy goes on in the original's place; the original, changed, must not matter to it.
  void copy(KvCache& cache, Model& model) {
    KvCache other = cache;
    std::swap(other, cache);
    Model forgotten = model;
    append(other, forgotten);
    other.crop(random(0, other.tokens()));
  }

  void sequence() {
    KvCache cache(options_, static_cast<int>(random(1, 3)));
    Model model{std::vector<RowModel>(static_cast<std::size_t>(cache.batch()))};
    for (std::int64_t left = random(4, 14); left > 0; --left) {
      switch (random(0, 8)) {
        case 0:
        case 1:
        case 2: append(cache, model); break;
        case 3: {
          const std::int64_t tokens = cache.tokens() - random(0, random(0, 1) * cache.tokens());
          cache.crop(tokens);
          model.crop(tokens);
          break;
        }
        case 4: select(cache, model); break;
        case 5: repeat(cache, model); break;
        case 6: copy(cache, model); break;
        case 7: cache = KvCache::deserialize(cache.serialize()); break;
        default: cache.seal(); break;
      }
      compare(cache, model);
      if (HasFatalFailure()) return;
    }
    sealed_ += cache.packed_tokens(0) > 0 ? 1 : 0;
  }

  CacheOptions options_ = geometry(kDim, 8, 8, 1);
  std::mt19937_64 engine_ = test::random_engine(41);
  int sealed_ = 0;
};

TEST_F(Operations, OfAThousandSequencesGiveWhatKeepingEverythingGives) {
  const std::size_t before = allocated_bytes();
  for (int i = 0; i < 1000; ++i) {
    sequence();
    ASSERT_FALSE(HasFatalFailure()) << "sequence " << i;
    ASSERT_EQ(allocated_bytes(), before) << "after sequence " << i;
  }
  EXPECT_GT(sealed_, 200) << "too few of the sequences came to tiles";
}

}  // namespace
}  // namespace tqai
