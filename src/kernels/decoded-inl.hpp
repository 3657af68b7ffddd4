// Tiles whose codes are looked up once for many rows: operands of products, line after line as
// 8-bit codes are packed (packing.hpp), and readers of them.
#ifndef TQAI_DECODED_INL
#define TQAI_DECODED_INL

#include "key-readers-inl.hpp"
#include "value-readers-inl.hpp"

namespace tqai::kernels::TQAI_LEVEL_NAMESPACE {
namespace TQAI_LOCAL {

// For how many rows it is worth it, and of how many codes.
constexpr int kDecodedRows = 24;
constexpr std::size_t kDecodedBytes = std::size_t{256} * kTileTokens;

constexpr std::ptrdiff_t kDecodedGroupBytes = std::ptrdiff_t{kGroupCodes} * kLineBytes;

template <typename Ops>
inline void store_line(std::uint8_t* group, int part, int line, typename Ops::Vec levels) noexcept {
  Ops::store_levels(group + line * kLineBytes + part * (kLineBytes / Ops::kParts), levels);
}

template <typename Ops, typename Reader, int kQuad>
inline void decode_key_quad(Reader& reader, const std::uint8_t* group, int part,
                            std::uint8_t* to) noexcept {
  typename Ops::Vec codes[4];
  load_quad<Ops, Reader::kBits, kQuad>(group, part, codes);
  for (int s = 0; s < 4; ++s) {
    store_line<Ops>(to, part, 4 * kQuad + s, reader.operand(s, codes[s]).levels);
  }
}

// Reader: of all four subtiles; to: a byte for each code.
template <typename Ops, typename Reader>
inline void decode_key_lines(const SegmentPlan& segment, const std::uint8_t* packed,
                             std::uint8_t* to) noexcept {
  constexpr std::ptrdiff_t kGroupBytes = std::ptrdiff_t{Reader::kBits} * kLineBytes;
  const int groups = segment.count / kGroupCodes;
  Reader reader(segment);
  for (int part = 0; part < Ops::kParts; ++part) {
    reader.template begin<0>(packed + (groups - 1) * kGroupBytes, part);
    for (int g = 0; g < groups; ++g) {
      const std::uint8_t* group = packed + g * kGroupBytes;
      decode_key_quad<Ops, Reader, 0>(reader, group, part, to + g * kDecodedGroupBytes);
      decode_key_quad<Ops, Reader, 1>(reader, group, part, to + g * kDecodedGroupBytes);
    }
  }
}

template <typename Ops, typename Reader, int kQuad>
inline void decode_value_quad(const Reader& reader, const std::uint8_t* group,
                              const std::uint8_t* before, int part, std::uint8_t* to) noexcept {
  typename Reader::Codes codes;
  Reader::template load<kQuad>(group, before, part, codes);
  for (int i = 0; i < 4; ++i) {
    store_line<Ops>(to, part, 4 * kQuad + i, reader.operand(codes, i).levels);
  }
}

template <typename Ops, typename Reader>
inline void decode_value_lines(const SegmentPlan& segment, const std::uint8_t* packed,
                               std::uint8_t* to) noexcept {
  constexpr std::ptrdiff_t kGroupBytes = std::ptrdiff_t{Reader::kBits} * kLineBytes;
  const int groups = 2 * segment.count / kCoordinateBlock;
  const Reader reader(segment);
  const std::uint8_t* before = packed + groups * kGroupBytes - kLineBytes;  // the last line
  for (int g = 0; g < groups; ++g) {
    const std::uint8_t* group = packed + g * kGroupBytes;
    for (int part = 0; part < Ops::kParts; ++part) {
      decode_value_quad<Ops, Reader, 0>(reader, group, before, part, to + g * kDecodedGroupBytes);
      decode_value_quad<Ops, Reader, 1>(reader, group, before, part, to + g * kDecodedGroupBytes);
    }
    before = group + kGroupBytes - kLineBytes;
  }
}

template <typename Ops, int /*kWidth*/, int /*kCount*/>
struct DecodedKeyReader {
  static constexpr int kBits = 8;
  static constexpr int kFactorBits = kNarrowBits;

  explicit DecodedKeyReader(const SegmentPlan& /*segment*/) noexcept {}

  template <int kFirst>
  static void begin(const std::uint8_t* /*last*/, int /*part*/) noexcept {}
  static auto operand(int /*s*/, typename Ops::Vec levels) noexcept {
    return typename Ops::KeyLevels{levels};
  }
};

template <typename Ops, bool kQuotients>
struct DecodedReader {
  static constexpr int kBits = 8;
  static constexpr int kFactorBits = kNarrowBits;
  static constexpr bool kByFours = kQuotients;
  using Codes = typename Ops::Vec[4];

  explicit DecodedReader(const SegmentPlan& segment) noexcept : divisor(segment.divisor) {}

  template <int kQuad>
  static void load(const std::uint8_t* group, const std::uint8_t* /*before*/, int part,
                   Codes& codes) noexcept {
    load_quad<Ops, kBits, kQuad>(group, part, codes);
  }
  static auto operand(const Codes& codes, int i) noexcept {
    return typename Ops::ValueLevels{codes[i]};
  }
  typename Ops::Acc sum(typename Ops::Acc acc) const noexcept {
    if constexpr (kQuotients) {
      return Ops::times(acc, divisor);
    } else {
      return acc;
    }
  }

  int divisor;
};

}  // namespace TQAI_LOCAL
}  // namespace tqai::kernels::TQAI_LEVEL_NAMESPACE

#endif  // TQAI_DECODED_INL
