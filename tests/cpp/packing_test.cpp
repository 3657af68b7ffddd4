#include <tqai/packing.hpp>

#include "reference.hpp"

namespace tqai {
namespace {

class Packing : public testing::TestWithParam<std::tuple<int, int>> {
 protected:
  int bits() const { return std::get<0>(GetParam()); }
  int coordinates() const { return std::get<1>(GetParam()); }
  std::vector<std::uint8_t> random_codes() const {
    auto engine = test::random_engine(static_cast<std::uint64_t>(bits()));
    std::uniform_int_distribution<int> code(0, (1 << bits()) - 1);
    std::vector<std::uint8_t> codes(static_cast<std::size_t>(coordinates()) * kTileTokens);
    for (auto& c : codes) c = static_cast<std::uint8_t>(code(engine));
    return codes;
  }
};

TEST_P(Packing, KeysComeBack) {
  const auto codes = random_codes();
  std::vector<std::uint8_t> packed(packed_bytes(coordinates(), bits()));
  std::vector<std::uint8_t> back(codes.size());
  pack_keys(codes.data(), coordinates(), bits(), packed.data());
  unpack_keys(packed.data(), coordinates(), bits(), back.data());
  EXPECT_EQ(codes, back);
}

TEST_P(Packing, ValuesComeBack) {
  const auto codes = random_codes();
  std::vector<std::uint8_t> packed(packed_bytes(coordinates(), bits()));
  std::vector<std::uint8_t> back(codes.size());
  pack_values(codes.data(), coordinates(), bits(), packed.data());
  unpack_values(packed.data(), coordinates(), bits(), back.data());
  EXPECT_EQ(codes, back);
}

// Every bit of the packed bytes carries one bit of one code: flipping any changes exactly one code.
TEST_P(Packing, EveryBitCounts) {
  const auto codes = random_codes();
  std::vector<std::uint8_t> packed(packed_bytes(coordinates(), bits()));
  std::vector<std::uint8_t> back(codes.size());
  pack_keys(codes.data(), coordinates(), bits(), packed.data());
  for (std::size_t byte = 0; byte < packed.size(); byte += 61) {
    for (int bit = 0; bit < 8; ++bit) {
      packed[byte] = static_cast<std::uint8_t>(packed[byte] ^ 1U << bit);
      unpack_keys(packed.data(), coordinates(), bits(), back.data());
      int changed = 0;
      for (std::size_t i = 0; i < codes.size(); ++i) changed += codes[i] != back[i] ? 1 : 0;
      EXPECT_EQ(changed, 1) << "byte " << byte << ", bit " << bit;
      packed[byte] = static_cast<std::uint8_t>(packed[byte] ^ 1U << bit);
    }
  }
}

INSTANTIATE_TEST_SUITE_P(BitsAndDims, Packing,
                         testing::Combine(testing::Range(1, 9), testing::Values(16, 48, 80, 128)));

// The bytes are a format: these places follow from the header's description, not from the code.
TEST(PackingLayout, EightBitsAreLines) {
  std::vector<std::uint8_t> codes(16 * kTileTokens, 0);
  std::vector<std::uint8_t> packed(packed_bytes(16, 8));
  codes[5 * kTileTokens + 37] = 200;  // coordinate 5, token 37: group 0, quad 1, subtile 2
  pack_keys(codes.data(), 16, 8, packed.data());
  EXPECT_EQ(packed[(4 * 1 + 2) * kLineBytes + 4 * (37 - 32) + 1], 200);
  pack_values(codes.data(), 16, 8, packed.data());
  // token 37: half 1, line (37 − 32) / 4 = 1, byte 4 · coordinate + token % 4.
  EXPECT_EQ(packed[(8 + 1) * kLineBytes + 4 * 5 + 1], 200);
}

TEST(PackingLayout, FourAndTwoBitsShareBytesAcrossTokens) {
  std::vector<std::uint8_t> codes(16 * kTileTokens, 0);
  std::vector<std::uint8_t> packed(packed_bytes(16, 4));
  codes[5 * kTileTokens + 37] = 9;  // code 4 · 1 + 2 = 6 of its group: line 3, low nibble
  pack_keys(codes.data(), 16, 4, packed.data());
  EXPECT_EQ(packed[3 * kLineBytes + 4 * 5 + 1], 9);
  codes[5 * kTileTokens + 37] = 3;
  packed.assign(packed_bytes(16, 2), 0);
  pack_values(codes.data(), 16, 2, packed.data());  // code 1 of group 1: line 0, bits 2–3
  EXPECT_EQ(packed[2 * kLineBytes + 4 * 5 + 1], 3 << 2);
}

TEST(PackingLayout, ThreeBitsSplitTheLastTwoCodes) {
  std::vector<std::uint8_t> codes(16 * kTileTokens, 0);
  std::vector<std::uint8_t> packed(packed_bytes(16, 3));
  codes[4 * kTileTokens + 48] = 0b110;  // code 7, byte 0: lower bits in line 1, upper in line 2
  pack_keys(codes.data(), 16, 3, packed.data());
  EXPECT_EQ(packed[1 * kLineBytes], 0b10 << 6);
  EXPECT_EQ(packed[2 * kLineBytes], 1 << 7);
}

TEST(PackingLayout, FiveToSevenBitsArePlanesOfFourTwoAndOne) {
  std::vector<std::uint8_t> codes(16 * kTileTokens, 0);
  // Coordinate 5 of token 37 is code 6 of its group, byte 21.
  const auto pack = [&](int bits, int code) {
    std::vector<std::uint8_t> packed(packed_bytes(16, bits));
    codes[5 * kTileTokens + 37] = static_cast<std::uint8_t>(code);
    pack_keys(codes.data(), 16, bits, packed.data());
    std::vector<int> bytes;
    for (int line = 0; line < bits; ++line) {
      bytes.push_back(packed[static_cast<std::size_t>(line * kLineBytes + 21)]);
    }
    return bytes;
  };
  EXPECT_EQ(pack(5, 0b1'1001), (std::vector<int>{0, 0, 0, 0b1001, 1 << 6}));
  EXPECT_EQ(pack(6, 0b10'1001), (std::vector<int>{0, 0, 0, 0b1001, 0, 0b10 << 4}));
  EXPECT_EQ(pack(7, 0b1'10'1001), (std::vector<int>{0, 0, 0, 0b1001, 0, 0b10 << 4, 1 << 6}));
}

TEST(TileLayout, SealedTokenCosts52BytesAtD64K4V2) {
  const TileLayout layout(64, 64, 4, 2);
  EXPECT_EQ(layout.bytes(), 52U * kTileTokens);
  EXPECT_EQ(layout.value_codes(), 64U * 32);
  EXPECT_EQ(layout.key_norms(), 64U * 48);
  EXPECT_EQ(layout.value_norms(), 64U * 48 + 128);
}

TEST(TileLayout, PadsTo16AndKeepsLinesAligned) {
  for (const int dim : {8, 16, 40, 80, 96, 256, 512, 576}) {
    for (int bits = 1; bits <= 8; ++bits) {
      const TileLayout layout(dim, dim, bits, 9 - bits);
      EXPECT_EQ(layout.key_segments().front().count % kCoordinateBlock, 0);
      EXPECT_LT(layout.key_segments().front().count - dim, kCoordinateBlock);
      EXPECT_EQ(layout.value_codes() % kLineBytes, 0U);
      EXPECT_EQ(layout.key_norms() % kLineBytes, 0U);
      EXPECT_EQ(layout.bytes() % kLineBytes, 0U);
    }
  }
}

}  // namespace
}  // namespace tqai
