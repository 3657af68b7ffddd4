// However a call's work is split over batches of working memory, heads, parts and threads, each
// head of each row gets what it gets alone.
#include <tqai/cache.hpp>

#include "cache_helpers.hpp"
#include "openmp.hpp"

namespace tqai {
namespace {

using test::Array;
using test::attend;
using test::geometry;
using test::Tokens;

constexpr int kDim = 16;

// [batch, heads, tokens, dim], the same for all heads.
ConstTensor for_all_heads(const Array& one, std::int64_t batch_row, std::int64_t batch,
                          std::int64_t heads) {
  ConstTensor tensor = one;
  tensor.data = one.at(batch_row, 0, 0);
  tensor.shape[0] = batch;
  tensor.shape[1] = heads;
  tensor.strides[1] = 0;
  return tensor;
}

KvCache filled(CacheOptions options, const Tokens& one, std::int64_t batch_row, std::int64_t batch,
               const std::vector<std::int64_t>& padding) {
  KvCache cache(options, static_cast<int>(batch));
  cache.append(for_all_heads(one.keys, batch_row, batch, options.kv_heads),
               for_all_heads(one.values, batch_row, batch, options.kv_heads));
  if (!padding.empty()) cache.set_padding(padding);
  cache.seal();
  return cache;
}

// Each row of a batch in turn, with one kv head.
std::vector<Array> attend_alone(const CacheOptions& options, const Tokens& one,
                                const Array& queries, const AttendOptions& how,
                                const std::vector<std::int64_t>& padding) {
  const test::ThreadCount count(1);
  CacheOptions single = options;
  single.kv_heads = 1;
  std::vector<Array> outputs;
  for (std::int64_t b = 0; b < one.keys.shape[0]; ++b) {
    const KvCache cache =
        filled(single, one, b, 1,
               padding.empty() ? padding
                               : std::vector<std::int64_t>{padding[static_cast<std::size_t>(b)]});
    Array output({1, queries.shape[2], queries.shape[1], kDim});
    ConstTensor of_row = queries;
    of_row.data = queries.at(b, 0, 0);
    of_row.shape[0] = 1;
    cache.attend(of_row, output, how);
    outputs.push_back(output);
  }
  return outputs;
}

// queries: [batch, group, n, dim], for every kv head.
void expect_each_alone(const CacheOptions& options, const Tokens& one, const Array& queries,
                       const AttendOptions& how, const std::vector<std::int64_t>& padding) {
  const std::int64_t batch = queries.shape[0];
  const std::int64_t group = queries.shape[1];
  const KvCache cache = filled(options, one, 0, batch, padding);
  Array repeated({batch, group * options.kv_heads, queries.shape[2], kDim});
  for (std::int64_t b = 0; b < batch; ++b) {
    for (std::int64_t h = 0; h < repeated.shape[1]; ++h) {
      std::copy_n(queries.at(b, h % group, 0), queries.shape[2] * kDim, repeated.at(b, h, 0));
    }
  }
  const std::vector<Array> alone = attend_alone(options, one, queries, how, padding);
  for (const int threads : {1, 2, 3, 8}) {
    const test::ThreadCount count(threads);
    const Array output = attend(cache, repeated, how);
    for (std::int64_t b = 0; b < batch; ++b) {
      for (std::int64_t q = 0; q < queries.shape[2]; ++q) {
        for (std::int64_t h = 0; h < repeated.shape[1]; ++h) {
          const float* expected = alone[static_cast<std::size_t>(b)].at(0, q, h % group);
          ASSERT_TRUE(std::equal(expected, expected + kDim, output.at(b, q, h)))
              << threads << " threads, row " << b << ", query " << q << ", head " << h;
        }
      }
    }
  }
}

// With a mask of 8 rows of 10 000 floats for each of 120 units, working memory ends within row 1.
TEST(AttendSplit, ManyHeadsInBatchesOfWorkingMemory) {
  auto engine = test::random_engine(71);
  constexpr std::int64_t kTokens = 10000;
  const Tokens one(2, 1, kTokens, kDim, engine);
  const Array queries({2, 1, 8, kDim}, engine);
  std::vector<std::uint8_t> seen(8 * kTokens);
  for (std::size_t i = 0; i < seen.size(); ++i) seen[i] = i % 7 == 0 ? 0 : 1;
  AttendOptions masked;
  masked.mask = Mask{seen.data(), Mask::Kind::boolean, {1, 1, 8, kTokens}, {0, 0, kTokens, 1}};
  const CacheOptions options = geometry(kDim, 4, 4, 60);
  expect_each_alone(options, one, queries, masked, {});
  expect_each_alone(options, one, queries, {}, {});  // of one batch
}

// Two blocks of query rows a kv head, and rows of three, one and no sealed parts.
TEST(AttendSplit, RowsOfOtherLengthsAndTwoBlocksOfQueryRows) {
  auto engine = test::random_engine(72);
  constexpr std::int64_t kTokens = 10000;
  const Tokens one(3, 1, kTokens, kDim, engine);
  const std::vector<std::int64_t> padding = {0, 9000, 9990};
  const CacheOptions options = geometry(kDim, 4, 4, 3);
  expect_each_alone(options, one, Array({3, 16, 1, kDim}, engine), {}, padding);
  expect_each_alone(options, one, Array({3, 2, 33, kDim}, engine), {}, padding);  // nine blocks
}

TEST(AttendSplit, HeadsCentredByPosition) {
  auto engine = test::random_engine(73);
  CacheOptions options = geometry(kDim, 8, 2, 5);  // queries in two terms
  options.rope = test::rope_of(kDim);
  options.centering = Centering::rope;
  const Tokens one(2, 1, 9000, kDim, engine);
  expect_each_alone(options, one, Array({2, 4, 1, kDim}, engine), {}, {0, 4000});
}

// Codes may be looked up once for many rows of a head: they find what the scalar level does, and a
// few rows at a time. Of heads too long for that, too, and of a window that hides tiles from some.
TEST(AttendSplit, ManyRowsOfAHead) {
  auto engine = test::random_engine(74);
  constexpr std::int64_t kTokens = 300;
  for (const int dim : {16, 80, 272}) {
    const Tokens all(1, 2, kTokens, dim, engine);
    const Array queries({1, 6, 21, dim}, engine);
    for (const auto& [bits_k, bits_v] : {std::pair{1, 3}, {2, 4}, {3, 1}, {4, 2}, {8, 6}}) {
      for (const CodeKind codes : {CodeKind::scalar, CodeKind::trellis}) {
        if (codes == CodeKind::trellis && bits_v > kMaxTrellisBits) continue;
        AttendOptions narrow;
        narrow.window = 70;
        for (const AttendOptions& how : {AttendOptions{}, narrow}) {
          std::vector<float> expected;
          for (const Level level : available_levels()) {
            CacheOptions options = geometry(dim, bits_k, bits_v);
            options.level = level;
            options.value_codes = codes;
            KvCache cache(options);
            all.append_to(cache, 0, kTokens);
            cache.seal();
            const Array output = attend(cache, queries, how);
            if (expected.empty()) expected = output.data;
            ASSERT_EQ(output.data, expected) << name_of(level) << ", d " << dim << ", " << bits_k
                                             << " and " << bits_v << " bits";
          }
        }
      }
    }
  }
}

}  // namespace
}  // namespace tqai
