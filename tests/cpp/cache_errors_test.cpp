// What a KvCache refuses, and that it is then as it was.
#include <cmath>
#include <cstring>
#include <tqai/cache.hpp>

#include "cache_helpers.hpp"

namespace tqai {
namespace {

using test::Array;
using test::attend;
using test::contains;
using test::gather;
using test::Gathered;
using test::geometry;
using test::message_of;
using test::Tokens;

class CacheErrors : public testing::Test {
 protected:
  std::mt19937_64 engine_ = test::random_engine(20);
};

TEST_F(CacheErrors, RefusesOptionsOutOfRange) {
  const auto make = [](auto change) {
    CacheOptions options = geometry(64);
    change(options);
    return message_of([&] { KvCache cache(options); });
  };
  EXPECT_TRUE(contains(make([](auto& o) { o.bits_k = 9; }), "bits_k = 9; allowed: 1…8"));
  EXPECT_TRUE(contains(make([](auto& o) { o.bits_v = 0; }), "bits_v = 0; allowed: 1…8"));
  EXPECT_TRUE(contains(make([](auto& o) { o.head_dim = 7; }), "head_dim = 7; allowed: 8…512"));
  EXPECT_TRUE(contains(make([](auto& o) { o.head_dim = 513; }), "allowed: 8…512"));
  EXPECT_TRUE(contains(make([](auto& o) { o.kv_heads = 0; }), "kv_heads = 0"));
  EXPECT_TRUE(contains(make([](auto& o) { o.sink_tokens = -1; }), "sink_tokens = -1"));
  EXPECT_TRUE(contains(make([](auto& o) { o.residual_window = -1; }), "residual_window = -1"));
  EXPECT_TRUE(contains(message_of([] { KvCache cache(geometry(64), 0); }), "batch = 0"));
  CacheOptions haar = geometry(96);
  haar.rotation = RotationKind::hadamard;
  EXPECT_TRUE(contains(message_of([&] { KvCache cache(haar); }), "96"));
}

TEST_F(CacheErrors, RefusesBadTensorsAndStaysAsItWas) {
  KvCache cache(geometry(64));
  const Tokens all(1, 2, 200, 64, engine_);
  all.append_to(cache, 0, 150);
  cache.seal();
  const Gathered before = gather(cache, 0, 150);

  Tokens bad(1, 2, 5, 64, engine_);
  bad.values.at(0, 1, 3)[7] = std::numeric_limits<float>::quiet_NaN();
  EXPECT_TRUE(contains(message_of([&] { bad.append_to(cache, 0, 5); }), "values[0, 1, 3]"));
  bad.values.at(0, 1, 3)[7] = std::numeric_limits<float>::infinity();
  EXPECT_TRUE(contains(message_of([&] { bad.append_to(cache, 0, 5); }), "NaN or infinity"));
  const Tokens other(1, 3, 5, 64, engine_);
  EXPECT_TRUE(contains(message_of([&] { other.append_to(cache, 0, 5); }), "[1, 3, 5, 64]"));
  const Tokens narrow(1, 2, 5, 32, engine_);
  EXPECT_TRUE(contains(message_of([&] { narrow.append_to(cache, 0, 5); }), "[1, 2, any, 64]"));
  ConstTensor half = Tokens::slice(all.keys, 0, 5);
  half.dtype = DType::f16;
  EXPECT_TRUE(contains(message_of([&] { cache.append(half, half); }), "float16"));
  ConstTensor sparse = Tokens::slice(all.keys, 0, 5);
  sparse.strides[3] = 2;
  EXPECT_TRUE(contains(message_of([&] { cache.append(sparse, sparse); }), "contiguous"));

  const Array queries({1, 3, 1, 64}, engine_);
  EXPECT_TRUE(contains(message_of([&] { attend(cache, queries); }), "3 heads"));
  const Array many({1, 2, 151, 64}, engine_);
  EXPECT_TRUE(contains(message_of([&] { attend(cache, many); }), "151 queries"));
  AttendOptions options;
  options.mask = Mask{queries.data.data(), Mask::Kind::f32, {1, 1, 1, 149}, {0, 0, 0, 1}};
  const Array good({1, 2, 1, 64}, engine_);
  EXPECT_TRUE(contains(message_of([&] { attend(cache, good, options); }), "[1, 1, 1, 149]"));
  const auto refused = [&](auto change) {
    AttendOptions changed;
    change(changed);
    return message_of([&] { attend(cache, good, changed); });
  };
  constexpr float kInfinity = std::numeric_limits<float>::infinity();
  const float kNan = std::numeric_limits<float>::quiet_NaN();
  for (const float scale : {kNan, kInfinity, -kInfinity}) {
    EXPECT_TRUE(contains(refused([&](auto& o) { o.scale = scale; }), "scale = ")) << scale;
  }
  for (const float cap : {kNan, kInfinity, -1.0F, 1e-39F}) {
    EXPECT_TRUE(contains(refused([&](auto& o) { o.soft_cap = cap; }), "soft_cap = ")) << cap;
  }
  const Tensor nothing{nullptr, DType::f32, {1, 2, 0, 64}, {0, 64, 64, 1}};
  EXPECT_NO_THROW(cache.gather(3, nothing, nothing));  // UBSan: nothing is added to null
  // Outputs whose elements share addresses: threads would write the same bytes.
  std::vector<float> output(2 * 64);
  const auto overlapping = [&](std::array<std::int64_t, 4> strides) {
    return message_of(
        [&] { cache.attend(good, {output.data(), DType::f32, {1, 1, 2, 64}, strides}); });
  };
  EXPECT_TRUE(contains(overlapping({0, 0, 0, 1}), "at one address"));
  EXPECT_TRUE(contains(overlapping({128, 128, 63, 1}), "at one address"));
  cache.attend(good, {output.data(), DType::f32, {1, 1, 2, 64}, {0, 0, 64, 1}});  // strides of 1s
  EXPECT_TRUE(contains(message_of([&] {
                         const Tensor all_one{
                             output.data(), DType::f32, {1, 2, 2, 64}, {0, 64, 0, 1}};
                         cache.gather(0, all_one, all_one);
                       }),
                       "at one address"));
  EXPECT_TRUE(contains(message_of([&] { cache.crop(151); }), "0…150"));
  EXPECT_TRUE(contains(message_of([&] { cache.select({}); }), "1 or more"));
  EXPECT_THROW(cache.select(std::vector<std::int64_t>{0, 1}), IndexError);
  EXPECT_THROW((void)gather(cache, 100, 51), IndexError);
  EXPECT_THROW((void)cache.packed_tokens(1), IndexError);
  EXPECT_TRUE(
      contains(message_of([&] { cache.set_padding(std::vector<std::int64_t>{3}); }), "sealed"));

  EXPECT_TRUE(contains(refused([](auto& o) { o.first_token = 151; }), "first_token = 151"));
  EXPECT_TRUE(contains(refused([](auto& o) { o.window = -1; }), "window = -1"));
  EXPECT_TRUE(contains(message_of([&] { cache.set_padding(std::vector<std::int64_t>{0, 0}); }),
                       "2 padding counts for a batch of 1"));
  for (const std::int64_t token : {-1, 151}) {
    EXPECT_TRUE(contains(message_of([&] { cache.discard_before(token); }), "allowed: 0…150"));
  }
  ConstTensor nowhere = Tokens::slice(all.keys, 0, 5);
  nowhere.data = nullptr;
  EXPECT_TRUE(contains(message_of([&] { cache.append(nowhere, nowhere); }), "no data"));
  for (const auto& [row, head] : {std::pair{1, 0}, {-1, 0}, {0, 2}, {0, -1}}) {
    EXPECT_THROW((void)cache.centering(row, head), IndexError) << row << ", " << head;
  }

  EXPECT_EQ(cache.tokens(), 150);
  EXPECT_EQ(gather(cache, 0, 150).keys.data, before.keys.data);
  EXPECT_EQ(gather(cache, 0, 150).values.data, before.values.data);
  all.append_to(cache, 150, 50);  // and goes on
  EXPECT_EQ(cache.tokens(), 200);
}

// Without an embedding positions are of no use, but must still be some for these tokens.
TEST_F(CacheErrors, PositionsOfACacheWithoutEmbedding) {
  KvCache cache(geometry(64));
  const Tokens all(1, 2, 5, 64, engine_);
  const std::vector<std::int64_t> at = {7, 3, 9, 9, 1};
  const PositionTensor positions{at.data(), {1, 1, 5}, {0, 0, 1}};
  cache.append(all.keys, all.values, positions);
  EXPECT_EQ(cache.tokens(), 5);
  const PositionTensor few{at.data(), {1, 1, 4}, {0, 0, 1}};
  EXPECT_TRUE(contains(message_of([&] { cache.append(all.keys, all.values, few); }), "[1, 1, 4]"));
  EXPECT_EQ(gather(cache, 0, 5).keys.data, all.keys.data);
}

}  // namespace
}  // namespace tqai
