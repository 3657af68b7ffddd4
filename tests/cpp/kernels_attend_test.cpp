// Attention of every level over tiles and exact tokens: against the scalar level bit for bit, and
// what the softmax's states are.
#include <array>
#include <cstring>
#include <limits>
#include <numbers>

#include "cache/rope_tables.hpp"
#include "kernels_helpers.hpp"

namespace tqai {
namespace {

using kernels::Kernels;
using kernels::kMaxRows;
using test::kDims;
using test::Levels;
using test::make_codec;
using test::tile_rows;

TQAI_AT_EVERY_LEVEL(Levels);

// Keys and values [64, dim] as a tile, the same at every level.
void encode(const detail::Codec& codec, const std::vector<float>& keys,
            const std::vector<float>& values, std::uint8_t* tile) {
  const Kernels& scalar = kernels::kernels(Level::scalar);
  test::Memory memory;
  scalar.encode(codec.plan().keys, true, keys.data(), tile, memory.bytes());
  scalar.encode(codec.plan().values, false, values.data(), tile, memory.bytes());
}

struct Attended {
  std::vector<float> max;
  std::vector<std::array<float, kernels::kLanes>> sums;
  std::vector<float> output;
};

struct alignas(64) Line {
  std::byte bytes[64];
};

// What rows of queries may see, and how their scores are changed.
struct Sights {
  std::int64_t tokens;
  float soft_cap = 0.0F;
  const float* mask = nullptr;
  kernels::RopeBias rope{};
  // Row r sees [first + r · step, …), the first one to the end where it sees all.
  std::int64_t first = 3;
  std::int64_t step = 0;
};

// One head's arguments of attend_tiles, and what they point to.
class Head {
 public:
  // rotated: [rows, padded key dim].
  Head(const Kernels& kernels, const detail::Codec& codec, int head,
       const std::vector<float>& rotated, int rows, const Sights& sights)
      : padded_(codec.plan().values.padded),
        state_{std::vector<float>(kMaxRows, -std::numeric_limits<float>::infinity()),
               std::vector<std::array<float, kernels::kLanes>>(kMaxRows),
               std::vector<float>(static_cast<std::size_t>(rows * padded_), 0.0F)},
        first_(kMaxRows),
        end_(kMaxRows, sights.first > 0 ? sights.tokens - 1 : sights.tokens),
        centres_(kMaxRows, 0.25F),
        prepared_(kernels.prepared_bytes(codec.plan().keys, rows) / sizeof(Line)) {
    for (std::size_t r = 0; r < kMaxRows; ++r) {
      first_[r] = sights.first + static_cast<std::int64_t>(r) * sights.step;
    }
    kernels.prepare_queries(codec.plan().keys, rotated.data(), rows, prepared_[0].bytes);
    rows_.head = head;
    rows_.rope = sights.rope;
    rows_.softmax.rows = rows;
    rows_.softmax.soft_cap = sights.soft_cap;
    rows_.softmax.mask = sights.mask;
    rows_.softmax.mask_stride = sights.tokens;
    rows_.softmax.output_stride = padded_;
  }
  kernels::HeadRows rows() {
    kernels::HeadRows rows = rows_;
    rows.queries = prepared_[0].bytes;
    rows.centre_scores = centres_.data();
    rows.softmax.first = first_.data();
    rows.softmax.end = end_.data();
    rows.softmax.max = state_.max.data();
    rows.softmax.sums = reinterpret_cast<float (*)[kernels::kLanes]>(state_.sums.data());
    rows.softmax.output = state_.output.data();
    return rows;
  }
  const Attended& state() const { return state_; }

 private:
  int padded_;
  Attended state_;
  std::vector<std::int64_t> first_;
  std::vector<std::int64_t> end_;
  std::vector<float> centres_;
  std::vector<Line> prepared_;
  kernels::HeadRows rows_{};
};

Attended run_tiles(const Kernels& kernels, const detail::Codec& codec,
                   const std::vector<kernels::TileSpan>& spans, const std::vector<float>& rotated,
                   int rows, const Sights& sights, int head = 0) {
  Head one(kernels, codec, head, rotated, rows, sights);
  const kernels::HeadRows args = one.rows();
  kernels.attend_tiles(
      {&codec.plan(), spans.data(), static_cast<std::int64_t>(spans.size()), &args, 1});
  return one.state();
}

TEST_P(Levels, AttentionAgreesWithScalarBitForBit) {
  auto engine = test::random_engine(5);
  for (int bits = 1; bits <= 8; ++bits) {
    for (const int dim : kDims) {
      const auto codec = make_codec(dim, bits);
      std::vector<std::vector<std::uint8_t>> tiles;
      std::vector<kernels::TileSpan> spans;
      for (const int tokens : {64, 64, 17, 64}) {
        const auto rows = tile_rows(dim, engine);
        tiles.emplace_back(codec.layout().bytes());
        encode(codec, rows, rows, tiles.back().data());
        spans.push_back({tiles.back().data(), tokens, {}});
      }
      for (std::size_t i = 0; i < tiles.size(); ++i) spans[i].tiles = tiles[i].data();
      const std::int64_t tokens = 209;
      // The tiles lie at positions of a sequence from which something was cropped.
      const std::int64_t starts[] = {5, 69, 133, 150};
      for (std::size_t i = 0; i < spans.size(); ++i) spans[i].positions.first = starts[i];
      Rope embedding = test::rope_of(dim);
      for (std::size_t f = 0; f < embedding.inv_freq.size(); ++f) {
        embedding.sections.push_back(static_cast<std::uint8_t>(f % 3));
      }
      const detail::RopeTables tables(embedding);
      tables.cover(-70, 3'000'000);
      // An image's positions, and any; the others are consecutive.
      std::vector<std::int32_t> places(3 * std::size_t{kTileTokens});
      for (std::size_t i = 0; i < places.size(); ++i) {
        const auto token = static_cast<std::int32_t>(i % kTileTokens);
        places[i] = i < kTileTokens ? 7 : i < 2 * kTileTokens ? 7 + token / 9 : 7 + token % 9;
      }
      std::vector<std::int32_t> anywhere(kTileTokens);
      for (std::int32_t& place : anywhere) {
        place = static_cast<std::int32_t>(engine() % 3'000'000) - 70;
      }
      spans[1].positions = {0, places.data(), 3};
      spans[2].positions = {0, anywhere.data(), 1};
      // Two of them slow.
      const auto pair_count = static_cast<std::uint16_t>(tables.pair_count());
      const std::vector<std::uint16_t> pairs = {0, 1, 3, static_cast<std::uint16_t>(pair_count - 2),
                                                static_cast<std::uint16_t>(pair_count - 1)};
      kernels::RopeBias rope{};
      rope.count = static_cast<int>(pairs.size());
      rope.slow_count = 2;
      rope.pairs = pairs.data();
      rope.pair_count = tables.pair_count();
      rope.half = tables.half();
      rope.terms = tables.terms();
      rope.tiles = tables.phasors().tiles;
      rope.offsets = tables.offsets();
      rope.far = tables.phasors().far;
      rope.sections = tables.sections();
      for (int rows = 1; rows <= kMaxRows; ++rows) {
        const int lanes = kernels::factor_lanes(rows);
        const auto factors =
            test::random_normal(pairs.size() * static_cast<std::size_t>(lanes), engine);
        rope.factors = factors.data();
        // With both kinds of frequencies, and with one alone.
        kernels::RopeBias fast = rope;
        fast.count = 3;
        fast.slow_count = 0;
        kernels::RopeBias slow = rope;
        slow.count = 2;
        slow.pairs += 3;
        slow.factors += std::ptrdiff_t{3} * lanes;
        const int padded = padded_dim(dim);
        std::vector<float> queries(static_cast<std::size_t>(rows * padded), 0.0F);
        for (int r = 0; r < rows; ++r) {
          const auto query = test::random_normal(static_cast<std::size_t>(dim), engine);
          std::transform(query.begin(), query.end(), queries.begin() + r * padded,
                         [](float q) { return 0.3F * q; });
        }
        const auto mask = test::random_normal(
            static_cast<std::size_t>(rows) * static_cast<std::size_t>(tokens), engine);
        for (const kernels::RopeBias& bias : {kernels::RopeBias{}, rope, fast, slow}) {
          const float cap = bias.count > 0 ? 5.0F : 0.0F;
          const Sights sights{tokens, cap, mask.data(), bias};
          const auto got = run_tiles(level(), codec, spans, queries, rows, sights);
          const auto expected = run_tiles(scalar(), codec, spans, queries, rows, sights);
          ASSERT_EQ(got.max, expected.max);
          ASSERT_EQ(got.sums, expected.sums);
          ASSERT_EQ(got.output, expected.output) << "bits " << bits << ", d " << dim;
        }
        // Whole tiles without a mask; windows that begin in other tiles, or see nothing at all.
        for (const std::int64_t step : {0, 1, 32, 64, 65}) {
          const Sights sights{tokens, 0.0F, nullptr, {}, 0, step};
          const auto got = run_tiles(level(), codec, spans, queries, rows, sights);
          const auto expected = run_tiles(scalar(), codec, spans, queries, rows, sights);
          ASSERT_EQ(got.max, expected.max);
          ASSERT_EQ(got.sums, expected.sums);
          ASSERT_EQ(got.output, expected.output) << "bits " << bits << ", d " << dim;
        }
      }
    }
  }
}

// Heads that share a call, some of them with several sets of rows, find what each finds alone.
TEST_P(Levels, HeadsTogetherFindWhatEachFindsAlone) {
  auto engine = test::random_engine(17);
  for (const auto& [dim, bits] : {std::pair{64, 4}, {80, 2}, {80, 8}, {272, 3}}) {
    const auto codec = make_codec(dim, bits);
    const std::size_t bytes = codec.layout().bytes();
    constexpr int kHeads = 3;
    std::vector<std::vector<std::uint8_t>> blocks;
    std::vector<kernels::TileSpan> spans;
    std::int64_t tokens = 0;
    for (const int count : {64, 17, 64}) {
      blocks.emplace_back(kHeads * bytes);
      for (std::size_t h = 0; h < kHeads; ++h) {
        const auto rows = tile_rows(dim, engine);
        encode(codec, rows, rows, blocks.back().data() + h * bytes);
      }
      spans.push_back({nullptr, count, {tokens}});
      tokens += count;
    }
    for (std::size_t i = 0; i < blocks.size(); ++i) spans[i].tiles = blocks[i].data();
    struct Case {
      int head;
      int rows;
      std::int64_t first;  // the second set sees the last two spans alone, the third one nothing
    };
    const std::vector<Case> cases = {{0, 8, 1},   {1, 3, 70}, {1, 8, 1000}, {2, 1, 0},  {2, 8, 0},
                                     {2, 7, 100}, {2, 8, 2},  {2, 8, 1},    {2, 4, 64}, {2, 8, 3}};
    std::vector<Head> heads;
    std::vector<Attended> alone;
    for (const Case& each : cases) {
      auto queries = test::random_normal(
          static_cast<std::size_t>(each.rows * codec.plan().keys.padded), engine);
      const Sights sights{tokens, 0.0F, nullptr, {}, each.first, 0};
      heads.emplace_back(level(), codec, each.head, queries, each.rows, sights);
      alone.push_back(run_tiles(scalar(), codec, spans, queries, each.rows, sights, each.head));
    }
    std::vector<kernels::HeadRows> args;
    for (Head& head : heads) args.push_back(head.rows());
    level().attend_tiles({&codec.plan(), spans.data(), static_cast<std::int64_t>(spans.size()),
                          args.data(), static_cast<int>(args.size())});
    for (std::size_t i = 0; i < cases.size(); ++i) {
      EXPECT_EQ(heads[i].state().max, alone[i].max) << i;
      EXPECT_EQ(heads[i].state().sums, alone[i].sums) << i;
      EXPECT_EQ(heads[i].state().output, alone[i].output) << i;
    }
    EXPECT_EQ(alone[2].max[0], -std::numeric_limits<float>::infinity());
    EXPECT_NE(alone[0].output, alone[3].output);
  }
}

// Scores by way of a mask, as queries of zeros add none: each lane's sum is then one token's
// weight.
TEST_P(Levels, RoughPowersAgreeAndAreNear) {
  auto engine = test::random_engine(8);
  const auto codec = make_codec(16, 4);
  std::vector<std::uint8_t> tile(codec.layout().bytes());
  const auto vectors = tile_rows(16, engine);
  encode(codec, vectors, vectors, tile.data());
  constexpr int kTokens = 16;
  const std::vector<kernels::TileSpan> spans = {{tile.data(), kTokens, {}}};
  const std::vector<float> queries(static_cast<std::size_t>(codec.plan().keys.padded), 0.0F);
  constexpr float kLog2 = 0.693147181F;
  for (int k = 0; k <= 130; ++k) {
    std::vector<float> mask(kTokens);
    for (int t = 0; t < kTokens; ++t) {
      mask[static_cast<std::size_t>(t)] =
          t == 0 ? 0.0F : -kLog2 * (static_cast<float>(k) + static_cast<float>(t - 1) / 14.0F);
    }
    mask[8] = std::nextafter(mask[8], 0.0F);  // about half an integer
    const Sights sights{kTokens, 0.0F, mask.data(), {}, 0, 0};
    const Attended got = run_tiles(level(), codec, spans, queries, 1, sights);
    const Attended expected = run_tiles(scalar(), codec, spans, queries, 1, sights);
    ASSERT_EQ(got.sums, expected.sums) << k;
    ASSERT_EQ(got.output, expected.output) << k;
    for (std::size_t t = 1; t < kTokens; ++t) {
      const double score = static_cast<double>(mask[t]) / std::numbers::ln2;
      if (score < -75.0) continue;  // what is masked adds 2^-100 to each lane, three times
      const double ratio =
          static_cast<double>(got.sums[0][t]) / static_cast<double>(got.sums[0][0]);
      // Beside both powers' errors scores are rounded, at up to 100.
      EXPECT_NEAR(ratio / std::exp2(score), 1.0, 1.6e-4 + 2e-5) << score;
    }
  }
}

// Values of the largest norms: what a row does not see is no part of its sums and outputs, whether
// it comes first or last.
TEST_P(Levels, MaskedTokensWeighNothing) {
  auto engine = test::random_engine(9);
  for (const int dim : {16, 64, 128}) {
    const auto codec = make_codec(dim, 4);
    std::vector<std::vector<std::uint8_t>> tiles;
    for (int i = 0; i < 2; ++i) {
      const auto keys = tile_rows(dim, engine);
      auto values = keys;
      if (i == 0) {
        for (float& value : values) value *= 1e6F;  // norms are cut off at 65504
      }
      tiles.emplace_back(codec.layout().bytes());
      encode(codec, keys, values, tiles.back().data());
    }
    const kernels::TileSpan large{tiles[0].data(), kTileTokens, {}};
    const kernels::TileSpan seen{tiles[1].data(), kTileTokens, {kTileTokens}};
    const std::size_t padded = static_cast<std::size_t>(codec.plan().keys.padded);
    auto queries = test::random_normal(2 * padded, engine);
    std::fill_n(queries.begin(), padded, 0.0F);  // of row 0: all that it sees weighs as much
    const Attended alone =
        run_tiles(level(), codec, {seen}, queries, 1, {kTileTokens, 0.0F, nullptr, {}, 0, 0});
    for (const bool last : {false, true}) {
      std::vector<float> mask(4 * std::size_t{kTileTokens}, 0.0F);  // [2 rows, 2 tiles]
      std::fill_n(mask.begin() + (last ? kTileTokens : 0), kTileTokens,
                  -std::numeric_limits<float>::infinity());
      const std::vector<kernels::TileSpan> spans =
          last ? std::vector{seen, large} : std::vector{large, seen};
      const Attended both = run_tiles(level(), codec, spans, queries, 2,
                                      {2 * kTileTokens, 0.0F, mask.data(), {}, 0, 0});
      EXPECT_EQ(both.max[0], alone.max[0]);
      EXPECT_EQ(both.sums[0], alone.sums[0]);
      const auto values = static_cast<std::ptrdiff_t>(codec.plan().values.padded);
      EXPECT_TRUE(
          std::equal(alone.output.begin(), alone.output.begin() + values, both.output.begin()));
      EXPECT_GT(*std::max_element(both.output.begin() + values, both.output.end()),
                20.0F);  // row 1 sees them
    }
  }
}

// The second tile's weights are all 2^-below of the first one's, and its values as long as FP16
// norms can be: that they were read shows. Far below they are not, unless another row needs them.
TEST_P(Levels, ValuesWhoseWeightsCannotMatterAreSkipped) {
  auto engine = test::random_engine(10);
  const auto codec = make_codec(64, 4);
  std::vector<std::vector<std::uint8_t>> tiles;
  std::vector<kernels::TileSpan> spans;
  for (int i = 0; i < 2; ++i) {
    const auto keys = tile_rows(64, engine);
    auto values = keys;
    if (i == 1) {
      for (float& value : values) value *= 1e6F;  // norms are cut off at 65504
    }
    tiles.emplace_back(codec.layout().bytes());
    encode(codec, keys, values, tiles.back().data());
  }
  for (const auto& tile : tiles) {
    spans.push_back({tile.data(), kTileTokens, {kTileTokens * std::ssize(spans)}});
  }
  const auto padded = static_cast<std::ptrdiff_t>(codec.plan().values.padded);
  // Queries of zeros: scores are the mask's.
  const std::vector<float> queries(2 * static_cast<std::size_t>(codec.plan().keys.padded), 0.0F);
  struct Rows {
    std::vector<float> first;
    std::vector<float> second;
  };
  const auto attended = [&](const Kernels& kernels, float below, float second_below) {
    std::vector<float> mask(4 * std::size_t{kTileTokens}, 0.0F);  // [2 rows, 2 tiles]
    std::fill_n(mask.begin() + kTileTokens, kTileTokens, -below * std::numbers::ln2_v<float>);
    std::fill_n(mask.begin() + 3 * kTileTokens, kTileTokens,
                -second_below * std::numbers::ln2_v<float>);
    const Attended state = run_tiles(kernels, codec, spans, queries, 2,
                                     {2 * kTileTokens, 0.0F, mask.data(), {}, 0, 0});
    const auto middle = state.output.begin() + padded;
    return Rows{{state.output.begin(), middle}, {middle, state.output.end()}};
  };
  const std::vector<float> alone = attended(level(), 90.0F, 90.0F).first;
  const std::vector<float> near = attended(level(), 0.0F, 0.0F).second;
  for (const float below : {10.0F, 20.0F, 28.0F, 29.0F, 30.0F, 31.0F}) {
    // The first tile's weights are 2^-4: of the second's, four are 2^-32 where they are 2^-30
    // below.
    const bool skipped = below >= 30.0F;
    const Rows far = attended(level(), below, 90.0F);
    EXPECT_EQ(far.first == alone, skipped) << below;
    EXPECT_EQ(far.first, attended(scalar(), below, 90.0F).first) << below;
    const Rows mixed = attended(level(), below, 0.0F);
    EXPECT_NE(mixed.first, alone) << below;
    EXPECT_EQ(mixed.second, near) << below;
    EXPECT_EQ(attended(level(), 0.0F, below).second, mixed.first) << below;
    for (std::size_t c = 0; skipped && c < alone.size(); ++c) {
      // 2^-24 of the sum, which is 4, times the norm.
      EXPECT_NEAR(mixed.first[c], alone[c], 0x1p-24F * 4.0F * 65504.0F) << below;
    }
  }
}

// One row over exact tokens of 16 coordinates with these scores; values are one-hot at token
// mod 16.
Attended run_exact(const Kernels& kernels, const std::vector<float>& scores) {
  constexpr int kDim = 16;
  std::vector<float> keys(scores.size() * kDim, 0.0F);
  std::vector<float> values(keys.size(), 0.0F);
  for (std::size_t t = 0; t < scores.size(); ++t) {
    keys[t * kDim] = scores[t];
    values[t * kDim + t % kDim] = 1.0F;
  }
  std::vector<float> query(kDim, 0.0F);
  query[0] = 1.0F;
  Attended state{std::vector<float>(1, -std::numeric_limits<float>::infinity()),
                 std::vector<std::array<float, kernels::kLanes>>(1),
                 std::vector<float>(kDim, 0.0F)};
  const auto tokens = static_cast<std::int64_t>(scores.size());
  const std::int64_t first = 0;
  kernels::Softmax softmax{};
  softmax.rows = 1;
  softmax.first = &first;
  softmax.end = &tokens;
  softmax.max = state.max.data();
  softmax.sums = reinterpret_cast<float (*)[kernels::kLanes]>(state.sums.data());
  softmax.output = state.output.data();
  softmax.output_stride = kDim;
  kernels.attend_exact(
      {keys.data(), values.data(), DType::f32, kDim, kDim, tokens, query.data(), nullptr, softmax});
  return state;
}

// Rows over exact tokens in 16 bits each, or over the same numbers as fp32.
Attended run_numbers(const Kernels& kernels, DType dtype, const std::vector<std::uint16_t>& numbers,
                     int dim, int rows, bool widened) {
  const int padded = padded_dim(dim);
  const auto count = static_cast<std::int64_t>(numbers.size()) / dim;
  std::vector<float> floats(numbers.size());
  convert_to_float(numbers.data(), dtype, numbers.size(), floats.data());
  const std::size_t working_floats = kernels::exact_floats(dim, dim, dtype, kernels.level);
  std::vector<Line> working(working_floats * sizeof(float) / sizeof(Line));
  std::vector<float> queries(static_cast<std::size_t>(rows * padded), 0.0F);
  for (int r = 0; r < rows; ++r) {
    for (int c = 0; c < dim; ++c) {
      queries[static_cast<std::size_t>(r * padded + c)] =
          0.1F * static_cast<float>((r + 1) * (c % 7 - 3));
    }
  }
  const auto size = static_cast<std::size_t>(rows);
  Attended state{std::vector<float>(size, -std::numeric_limits<float>::infinity()),
                 std::vector<std::array<float, kernels::kLanes>>(size),
                 std::vector<float>(size * static_cast<std::size_t>(padded), 0.0F)};
  const std::vector<std::int64_t> first(size, 0);
  const std::vector<std::int64_t> end(size, count);
  kernels::Softmax softmax{};
  softmax.rows = rows;
  softmax.first = first.data();
  softmax.end = end.data();
  softmax.max = state.max.data();
  softmax.sums = reinterpret_cast<float (*)[kernels::kLanes]>(state.sums.data());
  softmax.output = state.output.data();
  softmax.output_stride = padded;
  const void* data = widened ? static_cast<const void*>(floats.data()) : numbers.data();
  kernels.attend_exact({data, data, widened ? DType::f32 : dtype, dim, dim, count, queries.data(),
                        reinterpret_cast<float*>(working.data()), softmax});
  return state;
}

// Widened where they are used, or by way of memory where rows do not fill registers: denormal FP16
// numbers, zeros of both signs and the largest ones included.
TEST_P(Levels, ExactTokensOfAnyDTypeAreWhatTheirNumbersAreInFloats) {
  auto engine = test::random_engine(31);
  for (const DType dtype : {DType::f16, DType::bf16}) {
    for (const int dim : {8, 16, 41, 48, 64, 80, 128, 256, 576}) {
      for (const int tokens : {1, 17, 64, 100}) {
        std::vector<std::uint16_t> numbers;
        for (const float x : test::random_normal(static_cast<std::size_t>(tokens * dim), engine)) {
          numbers.push_back(dtype == DType::f16 ? to_half(x) : to_bfloat16(x));
        }
        const std::uint16_t special[] = {0x0001, 0x8001, 0x03FF, 0x8000, 0x0400, 0x0000};
        for (std::size_t i = 0; i < numbers.size(); i += 3) numbers[i] = special[i / 3 % 6];
        for (const int rows : {1, 2, 3, 4, 5, 8}) {
          const Attended got = run_numbers(level(), dtype, numbers, dim, rows, false);
          for (const Attended& expected :
               {run_numbers(level(), dtype, numbers, dim, rows, true),
                run_numbers(scalar(), dtype, numbers, dim, rows, false)}) {
            ASSERT_EQ(got.max, expected.max) << dim << ", " << tokens << ", " << rows;
            ASSERT_EQ(got.sums, expected.sums) << dim << ", " << tokens << ", " << rows;
            ASSERT_EQ(0, std::memcmp(got.output.data(), expected.output.data(),
                                     sizeof(float) * got.output.size()))
                << dim << ", " << tokens << ", " << rows;
          }
        }
      }
    }
  }
}

// Halfway between integers, levels could split the exponent in two ways.
TEST_P(Levels, PowersAgreeAtHalfIntegersToo) {
  for (int k = 0; k <= 140; ++k) {
    const float half = -static_cast<float>(k) - 0.5F;
    const float infinity = std::numeric_limits<float>::infinity();
    for (const float score : {half, std::nextafter(half, infinity), std::nextafter(half, -infinity),
                              -static_cast<float>(k), -infinity}) {
      const std::vector<float> scores = {0.0F, score};
      const Attended got = run_exact(level(), scores);
      const Attended expected = run_exact(scalar(), scores);
      ASSERT_EQ(got.sums, expected.sums) << score;
      ASSERT_EQ(got.output, expected.output) << score;
      // Scores lie up to 4 below the maximum, a difference that is rounded; 2^-126 below it is 0.
      const float power = std::exp2(score);
      const float rounding = std::isinf(score) ? 0.0F : 6e-8F * (4.0F - score);
      EXPECT_NEAR(got.output[1] / got.output[0], power, (4e-7F + rounding) * power + 2e-37F)
          << score;
    }
  }
}

TEST_P(Levels, MaximumIsAboveTheScoresAndAtMostFourAway) {
  for (const float growth : {0.0F, 0.5F, 4.0F, 130.0F, -130.0F}) {
    std::vector<float> scores;
    for (int t = 0; t < 6 * kTileTokens; ++t) {
      scores.push_back(growth * static_cast<float>(t / kTileTokens) +
                       0.001F * static_cast<float>(t % kTileTokens));
    }
    const Attended state = run_exact(level(), scores);
    const float largest = *std::max_element(scores.begin(), scores.end());
    EXPECT_GE(state.max[0], largest);
    EXPECT_LE(state.max[0], largest + 4.0F);
    double total = 0.0;
    std::vector<double> expected(16, 0.0);
    for (std::size_t t = 0; t < scores.size(); ++t) {
      const double weight =
          std::exp2(static_cast<double>(scores[t]) - static_cast<double>(largest));
      total += weight;
      expected[t % 16] += weight;
    }
    double sum = 0.0;
    for (const float lane : state.sums[0]) sum += static_cast<double>(lane);
    for (std::size_t c = 0; c < expected.size(); ++c) {
      EXPECT_NEAR(static_cast<double>(state.output[c]) / sum, expected[c] / total, 1e-6) << growth;
    }
  }
}

}  // namespace
}  // namespace tqai
