// What a KvCache refuses, and that it is then as it was.
#include <cmath>
#include <cstring>
#include <limits>
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
  EXPECT_TRUE(contains(make([](auto& o) { o.head_dim = 7; }), "head_dim = 7; allowed: 8…576"));
  EXPECT_TRUE(contains(make([](auto& o) { o.head_dim = 577; }), "allowed: 8…576"));
  EXPECT_TRUE(contains(make([](auto& o) { o.kv_heads = 0; }), "kv_heads = 0"));
  EXPECT_TRUE(contains(make([](auto& o) { o.sink_tokens = -1; }), "sink_tokens = -1"));
  EXPECT_TRUE(contains(make([](auto& o) { o.residual_window = -1; }), "residual_window = -1"));
  EXPECT_TRUE(contains(message_of([] { KvCache cache(geometry(64), 0); }), "batch = 0"));
  EXPECT_TRUE(contains(make([](auto& o) { o.dtype = static_cast<DType>(3); }), "dtype = 3"));
  EXPECT_TRUE(contains(make([](auto& o) { o.rotation = static_cast<RotationKind>(3); }),
                       "rotation = 3; allowed: 0…2"));
  EXPECT_TRUE(
      contains(make([](auto& o) { o.centering = static_cast<Centering>(4); }), "centering = 4"));
  EXPECT_TRUE(contains(make([](auto& o) {
                         o.rope = test::rope_of(64);
                         o.rope->layout = static_cast<Rope::Layout>(2);
                       }),
                       "layout = 2"));
  EXPECT_TRUE(contains(make([](auto& o) { o.level = static_cast<Level>(44); }),
                       "level = 44; allowed: 0…5"));
  CacheOptions haar = geometry(96);
  haar.rotation = RotationKind::hadamard;
  EXPECT_TRUE(contains(message_of([&] { KvCache cache(haar); }), "96"));
}

// A prompt that several threads look through, of which the first vector in order is named.
TEST_F(CacheErrors, NamesTheFirstBadVectorOfALongPrompt) {
  constexpr std::int64_t kTokens = 6000;
  Tokens all(2, 2, kTokens, 64, engine_);
  all.values.at(1, 0, 17)[63] = std::numeric_limits<float>::infinity();
  all.values.at(0, 1, 5990)[0] = std::numeric_limits<float>::quiet_NaN();
  KvCache cache(geometry(64), 2);
  Resources resources;
  for (const int threads : {1, 2, 5}) {
    resources.threads = threads;
    const auto message = message_of([&] {
      cache.append(Tokens::slice(all.keys, 0, kTokens), Tokens::slice(all.values, 0, kTokens), {},
                   resources);
    });
    EXPECT_TRUE(contains(message, "values[0, 1, 5990] holds NaN or infinity")) << message;
    EXPECT_EQ(cache.tokens(), 0);
  }
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
  half.dtype = static_cast<DType>(77);
  EXPECT_TRUE(contains(message_of([&] { cache.append(half, half); }), "dtype = 77"));
  ConstTensor negative = Tokens::slice(all.keys, 0, 5);
  negative.shape[2] = -1;
  EXPECT_TRUE(contains(message_of([&] { cache.append(negative, negative); }),
                       "keys has shape [1, 2, -1, 64]; needed: [1, 2, any, 64]"));
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
  for (const float cap : {kNan, kInfinity, -1.0F, 1e-39F, 1e-30F, 9.9e-11F}) {
    EXPECT_TRUE(contains(refused([&](auto& o) { o.soft_cap = cap; }), "soft_cap = ")) << cap;
  }
  AttendOptions least;
  least.soft_cap = 1e-10F;
  EXPECT_NO_THROW(attend(cache, good, least));
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
  constexpr std::int64_t kLast = std::numeric_limits<std::int64_t>::max();
  EXPECT_THROW((void)gather(cache, kLast, 51), IndexError);  // UBSan: nothing is added to it
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

// Pointers, strides and numbers that no tensor has. UBSan: none of them is used.
TEST_F(CacheErrors, RefusesMemoryThatNoTensorHas) {
  CacheOptions with_rope = geometry(64);
  with_rope.rope = test::rope_of(64);
  KvCache cache(with_rope);
  const Tokens all(1, 2, 100, 64, engine_);
  all.append_to(cache, 0, 100);
  const std::vector<std::byte> before = cache.serialize();
  constexpr std::int64_t kLeast = std::numeric_limits<std::int64_t>::min();
  constexpr std::int64_t kLargest = std::numeric_limits<std::int64_t>::max();
  const Array queries({1, 2, 2, 64}, engine_);
  Array output({1, 2, 2, 64});
  const auto beside = [](const void* data) { return static_cast<const std::byte*>(data) + 1; };
  const ConstTensor five = Tokens::slice(all.keys, 0, 5);
  const ConstTensor query = queries;
  const Tensor out = output;

  const auto append = [&](auto change) {
    ConstTensor keys = five;
    change(keys);
    return message_of([&] { cache.append(keys, five); }) +
           message_of([&] { cache.append(five, keys); });
  };
  const auto attend = [&](auto change) {
    ConstTensor changed = query;
    Tensor changed_output = out;
    AttendOptions options;
    change(changed, changed_output, options);
    return message_of([&] { cache.attend(changed, changed_output, options); });
  };
  EXPECT_TRUE(contains(append([&](auto& t) { t.data = beside(t.data); }), "multiple of 4 bytes"));
  EXPECT_TRUE(contains(attend([&](auto& q, auto&, auto&) { q.data = beside(q.data); }),
                       "queries lies at an address"));
  EXPECT_TRUE(contains(
      attend([&](auto&, auto& o, auto&) { o.data = const_cast<std::byte*>(beside(o.data)); }),
      "output lies at an address"));
  for (const std::int64_t stride : {kLeast, kLargest, kLeast / 8, kLargest / 8}) {
    for (const std::size_t axis : {std::size_t{1}, std::size_t{2}}) {
      SCOPED_TRACE(stride);
      EXPECT_TRUE(
          contains(append([&](auto& t) { t.strides[axis] = stride; }), "out of any memory"));
      EXPECT_TRUE(contains(attend([&](auto& q, auto&, auto&) { q.strides[axis] = stride; }),
                           "out of any memory"));
      EXPECT_TRUE(contains(attend([&](auto&, auto& o, auto&) { o.strides[axis] = stride; }),
                           "out of any memory"));
    }
  }
  const auto dtype = static_cast<DType>(3);
  EXPECT_TRUE(contains(append([&](auto& t) { t.dtype = dtype; }), "dtype = 3; allowed: 0…2"));
  EXPECT_TRUE(contains(attend([&](auto& q, auto&, auto&) { q.dtype = dtype; }),
                       "a tensor's dtype = 3; allowed: 0…2"));
  EXPECT_TRUE(contains(attend([&](auto&, auto& o, auto&) { o.dtype = dtype; }), "allowed: 0…2"));
  // As many tokens as one likes lie in the memory of one.
  for (const std::int64_t tokens : {kLargest, (std::int64_t{1} << 40) + 1}) {
    ConstTensor endless = five;
    endless.shape[2] = tokens;
    endless.strides[2] = 0;
    EXPECT_TRUE(contains(message_of([&] { cache.append(endless, endless); }), "number of tokens"))
        << tokens;
  }

  const std::int64_t at[6] = {1, 2, 3, 4, 5, 6};
  const auto positions = [&](const PositionTensor& places) {
    return message_of([&] { cache.append(five, five, places); });
  };
  EXPECT_TRUE(contains(positions({nullptr, {1, 1, 5}, {0, 0, 1}}), "positions has no data"));
  EXPECT_TRUE(contains(positions({at, {1, 1, 5}, {0, 0, kLargest}}), "out of any memory"));
  EXPECT_TRUE(
      contains(positions({reinterpret_cast<const std::int64_t*>(beside(at)), {1, 1, 5}, {0, 0, 1}}),
               "multiple of 8 bytes"));

  const std::vector<float> added(200, 0.0F);
  const auto mask = [&](const void* data, Mask::Kind kind, std::int64_t stride) {
    return attend([&](auto&, auto&, auto& options) {
      options.mask = Mask{data, kind, {1, 1, 1, 100}, {0, 0, 0, stride}};
    });
  };
  EXPECT_TRUE(contains(mask(nullptr, Mask::Kind::f32, 1), "the mask has no data"));
  EXPECT_TRUE(contains(mask(beside(added.data()), Mask::Kind::f32, 1), "multiple of 4 bytes"));
  EXPECT_TRUE(contains(mask(beside(added.data()), Mask::Kind::bf16, 1), "multiple of 2 bytes"));
  EXPECT_TRUE(contains(mask(added.data(), Mask::Kind::f16, kLeast), "out of any memory"));
  EXPECT_TRUE(contains(mask(added.data(), static_cast<Mask::Kind>(4), 1), "kind = 4"));
  AttendOptions bytes;
  bytes.mask = Mask{beside(added.data()), Mask::Kind::boolean, {1, 1, 1, 100}, {0, 0, 0, 1}};
  EXPECT_NO_THROW(cache.attend(query, out, bytes));
  EXPECT_TRUE(contains(attend([&](auto&, auto&, auto& options) {
                         options.sink_scores = reinterpret_cast<const float*>(beside(added.data()));
                       }),
                       "sink_scores lies at an address"));

  EXPECT_EQ(cache.serialize(), before);
}

// What is written while something else is read or written there; what lies between it is not.
TEST_F(CacheErrors, RefusesOutputsThatOverlap) {
  KvCache cache(geometry(64));
  const Tokens all(1, 2, 100, 64, engine_);
  all.append_to(cache, 0, 100);
  std::vector<float> memory(4 * 2 * 64);
  for (std::size_t i = 0; i < memory.size(); ++i) memory[i] = static_cast<float>(i % 5);
  const std::vector<float> unchanged = memory;
  const auto attend = [&](std::int64_t from, std::int64_t to, std::int64_t apart) {
    const ConstTensor queries{memory.data() + from, DType::f32, {1, 2, 1, 64}, {0, apart, 0, 1}};
    const Tensor output{memory.data() + to, DType::f32, {1, 1, 2, 64}, {0, 0, apart, 1}};
    cache.attend(queries, output);
  };
  for (const auto& places : {std::array<std::int64_t, 3>{0, 0, 64},
                             {0, 0, 128},
                             {0, 127, 64},
                             {127, 0, 64},
                             {64, 0, 64}}) {
    EXPECT_TRUE(contains(message_of([&] { attend(places[0], places[1], places[2]); }),
                         "output overlaps the queries"))
        << places[0] << ", " << places[1] << ", " << places[2];
  }
  EXPECT_EQ(memory, unchanged);
  EXPECT_NO_THROW(attend(0, 128, 64));
  EXPECT_NO_THROW(attend(128, 0, 64));
  EXPECT_NO_THROW(attend(0, 64, 128));  // a head of one, a head of the other
  EXPECT_NO_THROW(attend(64, 0, 128));

  const auto gather = [&](std::int64_t keys, std::int64_t values, std::int64_t apart) {
    const auto tensor = [&](std::int64_t at) {
      return Tensor{memory.data() + at, DType::f32, {1, 2, 1, 64}, {0, apart, 64, 1}};
    };
    cache.gather(7, tensor(keys), tensor(values));
  };
  EXPECT_TRUE(contains(message_of([&] { gather(0, 0, 64); }), "keys overlaps values"));
  EXPECT_TRUE(contains(message_of([&] { gather(0, 63, 64); }), "keys overlaps values"));
  EXPECT_NO_THROW(gather(0, 64, 128));
  EXPECT_NO_THROW(gather(128, 0, 64));
  const float* key = all.keys.at(0, 0, 7);
  EXPECT_TRUE(std::equal(key, key + 64, memory.begin() + 128));
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
