// The integer kernels' loops over a level's primitives, `Ops`:
//   Vec, Acc                     a part of a line; 32-bit sums, one a lane of 4 bytes
//   kParts                       Vecs that make a line
//   load(p), prefetch(p)         a Vec; its line, for later
//   shift_right<n>(v)            each byte's bits n… at its low end; higher bits are dirty
//   low_bits<n>(v), either(a,b)  AND with 2^n − 1, OR
//   shift_left<n>(v)             of bytes whose high bits are 0
//   Table<bits>                  levels by code; low bits count, others may be dirty for bits ≤ 4
//   key_operand, value_operand   levels as the dot product wants them
//   words<bits>()                words of 4 bytes that a lane's 4 factors take
//   expand_*, plain_weights      how words are made; whether those of weights are the weights
//   dot(acc, operand, words)     acc + Σ of 4 products a lane
//   store(p, acc)                the sums
//   read_halves(from, to)        a tile's norms as floats
//   round_weights(…)             as conversions-inl.hpp's
//   merge<n>(low, high)          each byte's n lowest bits of `low`, those from n up to 6 of
//   `high`;
//                                what is above may be dirty
//   next_bytes(v, value)         in each lane of 4, all bytes one further up, `value` in the lowest
//   WindowTable                  levels of keys by 6 bits; key_operand(v) of what merge gives
//   add(a, b)                    of sums
//   add_levels(a, b)             of value operands of up to 4 bits
//   kSumsQuotients               whether levels are read as quotients (SegmentPlan) where they have
//                                some, and if so:
//   dot_four(acc, operands, words, step)  of four operands, words `step` bytes apart
//   times(acc, factor)           of sums
//   add_scaled(p, acc, step)     p[…] += float(acc) · step, rounded once
//   key_bias(bits, q, count)     what score sums start from
//   kSumsPairs                   whether the products of two operands of up to kNarrowBits are
//   added
//                                before they are widened, where factors allow it, and if so:
//   queries_fit(q, count)        RowConstants::fits
//   weights_fit(weights, rows)   whether all rows' weights of a tile do
//   dot_two(acc, a, b, words, step)  of two operands, words `step` bytes apart
//   kRowBlock, kMaxSums          rows and sums that registers hold
//   value_blocks(rows)           value blocks side by side, which share the weights' loads
//   value_chains(rows)           sums of each; with those side by side enough to hide latencies
#ifndef TQAI_INTEGER_INL
#define TQAI_INTEGER_INL

#include <algorithm>
#include <bit>

#include "conversions-inl.hpp"
#include "fetch-inl.hpp"
#include "queries-inl.hpp"

namespace tqai::kernels::TQAI_LEVEL_NAMESPACE {
namespace TQAI_LOCAL {

// No lambda here takes or returns a Vec: GCC compiles lambdas without the region's target.
template <typename Ops>
inline typename Ops::Vec load_line(const std::uint8_t* group, int part, int line) noexcept {
  return Ops::load(group + line * kLineBytes + part * (kLineBytes / Ops::kParts));
}

// Has the compiler load words again: kept for the next use they push sums out of registers.
inline void forget_loads() noexcept {
#if defined(__GNUC__)
  asm volatile("" ::: "memory");
#endif
}

// A 3-bit code from its lower two bits and its upper one; both may have dirty upper bits.
template <typename Ops>
inline typename Ops::Vec join_three(typename Ops::Vec low, typename Ops::Vec high) noexcept {
  return Ops::either(Ops::template low_bits<2>(low),
                     Ops::template shift_left<2>(Ops::template low_bits<1>(high)));
}

// Codes 4 kQuad … 4 kQuad + 3 of a group (packing.hpp), part `part` of their lines. Codes of up to
// 4 bits may have dirty upper bits.
template <typename Ops, int kBits, int kQuad>
inline void load_quad(const std::uint8_t* group, int part, typename Ops::Vec (&codes)[4]) noexcept {
  using Vec = typename Ops::Vec;
  if constexpr (kBits == 8) {
    for (int i = 0; i < 4; ++i) codes[i] = load_line<Ops>(group, part, 4 * kQuad + i);
  } else if constexpr (kBits == 3) {
    if constexpr (kQuad == 0) {
      codes[0] = load_line<Ops>(group, part, 0);
      codes[1] = Ops::template shift_right<3>(codes[0]);
      codes[2] = load_line<Ops>(group, part, 1);
      codes[3] = Ops::template shift_right<3>(codes[2]);
    } else {
      const Vec a = load_line<Ops>(group, part, 0);
      const Vec b = load_line<Ops>(group, part, 1);
      const Vec c = load_line<Ops>(group, part, 2);
      codes[0] = c;
      codes[1] = Ops::template shift_right<3>(c);
      codes[2] = join_three<Ops>(Ops::template shift_right<6>(a), Ops::template shift_right<6>(c));
      codes[3] = join_three<Ops>(Ops::template shift_right<6>(b), Ops::template shift_right<7>(c));
    }
  } else if constexpr (kBits == 4) {
    for (int l = 0; l < 2; ++l) {
      codes[2 * l] = load_line<Ops>(group, part, 2 * kQuad + l);
      codes[2 * l + 1] = Ops::template shift_right<4>(codes[2 * l]);
    }
  } else if constexpr (kBits == 2) {
    codes[0] = load_line<Ops>(group, part, kQuad);
    codes[1] = Ops::template shift_right<2>(codes[0]);
    codes[2] = Ops::template shift_right<4>(codes[0]);
    codes[3] = Ops::template shift_right<6>(codes[0]);
  } else if constexpr (kBits == 1) {
    const Vec line = load_line<Ops>(group, part, 0);
    codes[0] = kQuad == 0 ? line : Ops::template shift_right<4>(line);
    codes[1] = Ops::template shift_right<4 * kQuad + 1>(line);
    codes[2] = Ops::template shift_right<4 * kQuad + 2>(line);
    codes[3] = Ops::template shift_right<4 * kQuad + 3>(line);
  } else {  // 5, 6, 7: the planes of 4 and of 1, 2 or 3 bits, cleaned and joined
    constexpr int kNext = (kBits & 2) != 0 ? 2 : 1;
    load_quad<Ops, 4, kQuad>(group, part, codes);
    Vec next[4];
    load_quad<Ops, kNext, kQuad>(group + 4 * kLineBytes, part, next);
    for (int i = 0; i < 4; ++i) {
      codes[i] = Ops::either(Ops::template low_bits<4>(codes[i]),
                             Ops::template shift_left<4>(Ops::template low_bits<kNext>(next[i])));
    }
    if constexpr (kBits == 7) {
      load_quad<Ops, 1, kQuad>(group + 6 * kLineBytes, part, next);
      for (int i = 0; i < 4; ++i) {
        codes[i] =
            Ops::either(codes[i], Ops::template shift_left<6>(Ops::template low_bits<1>(next[i])));
      }
    }
  }
}

constexpr int kWordBytes = 4;

// Sums of kRows rows over the tokens of subtiles kFirst … kFirst + kCount − 1, for one quad of
// coordinates. words: [kRows, stride bytes], at the quad's.
template <typename Ops, int kBits, int kQuad, int kRows, int kFirst, int kCount>
inline void score_quad(const typename Ops::template Table<kBits>& table, const std::uint8_t* group,
                       int part, const std::uint8_t* words, std::ptrdiff_t stride,
                       typename Ops::Acc (&sums)[kRows][kCount]) noexcept {
  typename Ops::Vec codes[4];
  load_quad<Ops, kBits, kQuad>(group, part, codes);
  for (int s = 0; s < kCount; ++s) {
    const auto operand = table.key_operand(codes[kFirst + s]);
    for (int r = 0; r < kRows; ++r) {
      sums[r][s] = Ops::dot(sums[r][s], operand, words + r * stride);
    }
  }
}

// The same of a group's two quads, whose products add up in 16 bits.
template <typename Ops, int kBits, int kRows, int kFirst, int kCount>
inline void score_pair(const typename Ops::template Table<kBits>& table, const std::uint8_t* group,
                       int part, const std::uint8_t* words, std::ptrdiff_t stride,
                       typename Ops::Acc (&sums)[kRows][kCount]) noexcept {
  constexpr int kStep = Ops::template words<kBits>() * kWordBytes;
  typename Ops::Vec first[4];
  typename Ops::Vec second[4];
  load_quad<Ops, kBits, 0>(group, part, first);
  load_quad<Ops, kBits, 1>(group, part, second);
  for (int s = 0; s < kCount; ++s) {
    const auto a = table.key_operand(first[kFirst + s]);
    const auto b = table.key_operand(second[kFirst + s]);
    if constexpr (kRows > 1) forget_loads();
    for (int r = 0; r < kRows; ++r) {
      sums[r][s] = Ops::dot_two(sums[r][s], a, b, words + r * stride, kStep);
    }
  }
}

// scores[r, t] of kRows rows and the tokens of subtiles kFirst … kFirst + kCount − 1; words: the
// expanded queries, [kRows, count / 4, words].
template <typename Ops, int kBits, int kRows, int kFirst, int kCount>
inline void score_subtiles(const SegmentPlan& segment, const std::uint8_t* packed,
                           const std::uint8_t* words, const RowConstants* rows,
                           std::int32_t* scores, Fetch& ahead) noexcept {
  constexpr int kPartLanes = kCoordinateBlock / Ops::kParts;
  constexpr int kStep = Ops::template words<kBits>() * kWordBytes;
  constexpr bool kPairs = Ops::kSumsPairs && kBits <= kNarrowBits;
  const typename Ops::template Table<kBits> table(segment.levels, true);
  const std::ptrdiff_t stride = static_cast<std::ptrdiff_t>(segment.count) / 4 * kStep;
  Fetch fetch = ahead;  // in registers
  for (int part = 0; part < Ops::kParts; ++part) {
    typename Ops::Acc sums[kRows][kCount];
    for (int r = 0; r < kRows; ++r) {
      for (int s = 0; s < kCount; ++s) sums[r][s] = Ops::broadcast(rows[r].bias);
    }
    std::uint64_t fits = rows[0].fits;
    for (int r = 1; r < kRows; ++r) fits &= rows[r].fits;
    const std::uint8_t* group = packed;
    const std::uint8_t* word = words;
    const std::uint8_t* const end = words + stride;  // compared in place of a count: 2-3 % at AVX2
    do {
      // Loops of their own: of two ways in one, GCC loads what both need before, into memory.
      if constexpr (kPairs) {
        const std::uint8_t* const fitting =
            word + std::min<std::ptrdiff_t>(end - word, 2 * kStep * std::countr_one(fits));
        for (; word != fitting; word += std::ptrdiff_t{2} * kStep) {
          score_pair<Ops, kBits, kRows, kFirst, kCount>(table, group, part, word, stride, sums);
          group += kBits * kLineBytes;
          fits >>= 1;
          fetch.template step<Ops>();
        }
        if (word == end) break;
      }
      score_quad<Ops, kBits, 0, kRows, kFirst, kCount>(table, group, part, word, stride, sums);
      score_quad<Ops, kBits, 1, kRows, kFirst, kCount>(table, group, part, word + kStep, stride,
                                                       sums);
      word += std::ptrdiff_t{2} * kStep;
      group += kBits * kLineBytes;
      fits >>= 1;
      fetch.template step<Ops>();
    } while (word != end);
    for (int r = 0; r < kRows; ++r) {
      for (int s = 0; s < kCount; ++s) {
        Ops::store(scores + r * kTileTokens + (kFirst + s) * kCoordinateBlock + part * kPartLanes,
                   sums[r][s]);
      }
    }
  }
  ahead = fetch;
}

// All subtiles at once where their sums fit into registers, else two at a time.
template <typename Ops, int kBits, int kRows>
inline void score_rows(const SegmentPlan& segment, const std::uint8_t* packed,
                       const std::uint8_t* words, const RowConstants* rows, std::int32_t* scores,
                       Ahead ahead) noexcept {
  const int steps = segment.count / kGroupCodes * Ops::kParts;
  if constexpr (4 * kRows <= Ops::kMaxSums) {
    Fetch fetch = fetch_of(ahead, steps);
    score_subtiles<Ops, kBits, kRows, 0, 4>(segment, packed, words, rows, scores, fetch);
  } else {
    Fetch fetch = fetch_of(ahead, 2 * steps);
    score_subtiles<Ops, kBits, kRows, 0, 2>(segment, packed, words, rows, scores, fetch);
    score_subtiles<Ops, kBits, kRows, 2, 2>(segment, packed, words, rows, scores, fetch);
  }
}

// Keys in trellis codes, as operands of kCount subtiles: windows that go on from quad to quad.
template <typename Ops, int kWidth, int kCount>
struct KeyPathReader {
  static constexpr int kBits = kWidth;
  static constexpr int kBefore = KeyTrellis::kWindowBits - kBits;
  static_assert(kBefore <= 2 * kBits);

  explicit KeyPathReader(const SegmentPlan& segment) noexcept
      : table(segment.key_trellis->levels.data()),
        before_first(static_cast<std::uint8_t>(segment.key_trellis->before_first())) {}

  // Each byte's path goes on where that of the byte before it ended: with the last group's codes.
  template <int kFirst>
  void begin(const typename Ops::Vec (&first)[4], const typename Ops::Vec (&second)[4]) noexcept {
    for (int s = 0; s < kCount; ++s) {
      const typename Ops::Vec window = Ops::template shift_left<kBefore>(first[kFirst + s]);
      windows[s] = Ops::next_bytes(next(window, second[kFirst + s]), before_first);
    }
  }
  static typename Ops::Vec next(typename Ops::Vec window, typename Ops::Vec code) noexcept {
    return Ops::template merge<kBefore>(Ops::template shift_right<kBits>(window),
                                        Ops::template shift_left<kBefore>(code));
  }
  auto operand(int s, typename Ops::Vec code) noexcept {
    windows[s] = next(windows[s], code);
    return table.key_operand(windows[s]);
  }

  typename Ops::WindowTable table;
  std::uint8_t before_first;
  typename Ops::Vec windows[kCount];
};

// As score_quad.
template <typename Ops, int kBits, int kQuad, int kRows, int kFirst, int kCount>
inline void score_path_quad(KeyPathReader<Ops, kBits, kCount>& reader, const std::uint8_t* group,
                            int part, const std::uint8_t* words, std::ptrdiff_t stride,
                            typename Ops::Acc (&sums)[kRows][kCount]) noexcept {
  typename Ops::Vec codes[4];
  load_quad<Ops, kBits, kQuad>(group, part, codes);
  for (int s = 0; s < kCount; ++s) {
    const auto operand = reader.operand(s, codes[kFirst + s]);
    for (int r = 0; r < kRows; ++r) {
      sums[r][s] = Ops::dot(sums[r][s], operand, words + r * stride);
    }
  }
}

// As score_subtiles.
template <typename Ops, int kBits, int kRows, int kFirst, int kCount>
inline void score_path_subtiles(const SegmentPlan& segment, const std::uint8_t* packed,
                                const std::uint8_t* words, const RowConstants* rows,
                                std::int32_t* scores, Fetch& ahead) noexcept {
  constexpr int kPartLanes = kCoordinateBlock / Ops::kParts;
  constexpr int kStep = Ops::template words<kBits>() * kWordBytes;
  KeyPathReader<Ops, kBits, kCount> reader(segment);
  const std::ptrdiff_t stride = static_cast<std::ptrdiff_t>(segment.count) / 4 * kStep;
  const std::uint8_t* const last =
      packed + static_cast<std::ptrdiff_t>(segment.count / kGroupCodes - 1) * (kBits * kLineBytes);
  Fetch fetch = ahead;  // in registers
  for (int part = 0; part < Ops::kParts; ++part) {
    typename Ops::Vec ends[2][4];
    load_quad<Ops, kBits, 0>(last, part, ends[0]);
    load_quad<Ops, kBits, 1>(last, part, ends[1]);
    reader.template begin<kFirst>(ends[0], ends[1]);
    typename Ops::Acc sums[kRows][kCount];
    for (int r = 0; r < kRows; ++r) {
      for (int s = 0; s < kCount; ++s) sums[r][s] = Ops::broadcast(rows[r].bias);
    }
    const std::uint8_t* group = packed;
    const std::uint8_t* word = words;
    const std::uint8_t* const end = words + stride;
    do {
      score_path_quad<Ops, kBits, 0, kRows, kFirst, kCount>(reader, group, part, word, stride,
                                                            sums);
      score_path_quad<Ops, kBits, 1, kRows, kFirst, kCount>(reader, group, part, word + kStep,
                                                            stride, sums);
      word += std::ptrdiff_t{2} * kStep;
      group += kBits * kLineBytes;
      fetch.template step<Ops>();
    } while (word != end);
    for (int r = 0; r < kRows; ++r) {
      for (int s = 0; s < kCount; ++s) {
        Ops::store(scores + r * kTileTokens + (kFirst + s) * kCoordinateBlock + part * kPartLanes,
                   sums[r][s]);
      }
    }
  }
  ahead = fetch;
}

// As score_rows.
template <typename Ops, int kBits, int kRows>
inline void score_path_rows(const SegmentPlan& segment, const std::uint8_t* packed,
                            const std::uint8_t* words, const RowConstants* rows,
                            std::int32_t* scores, Ahead ahead) noexcept {
  const int steps = segment.count / kGroupCodes * Ops::kParts;
  if constexpr (4 * kRows <= Ops::kMaxSums) {
    Fetch fetch = fetch_of(ahead, steps);
    score_path_subtiles<Ops, kBits, kRows, 0, 4>(segment, packed, words, rows, scores, fetch);
  } else {
    Fetch fetch = fetch_of(ahead, 2 * steps);
    score_path_subtiles<Ops, kBits, kRows, 0, 2>(segment, packed, words, rows, scores, fetch);
    score_path_subtiles<Ops, kBits, kRows, 2, 2>(segment, packed, words, rows, scores, fetch);
  }
}

// Values are read as operands of four lines at a time, which a reader makes of their codes.
// group: of the lines; before: the packed line before it, round the ring.

// Of scalar codes.
template <typename Ops, int kWidth>
struct ScalarReader {
  static constexpr int kBits = kWidth;
  static constexpr bool kByFours = false;
  using Codes = typename Ops::Vec[4];

  explicit ScalarReader(const SegmentPlan& segment) noexcept : table(segment.levels, false) {}

  template <int kQuad>
  static void load(const std::uint8_t* group, const std::uint8_t* /*before*/, int part,
                   Codes& codes) noexcept {
    load_quad<Ops, kBits, kQuad>(group, part, codes);
  }
  auto operand(const Codes& codes, int i) const noexcept { return table.value_operand(codes[i]); }
  typename Ops::Acc sum(typename Ops::Acc acc) const noexcept { return acc; }

  typename Ops::template Table<kBits> table;
};

// Of scalar codes whose levels have small quotients: four products at a time add up in 16 bits.
template <typename Ops, int kWidth>
struct QuotientReader {
  static constexpr int kBits = kWidth;
  static constexpr bool kByFours = true;
  using Codes = typename Ops::Vec[4];

  explicit QuotientReader(const SegmentPlan& segment) noexcept
      : table(segment.quotients, false), divisor(segment.divisor) {}

  template <int kQuad>
  static void load(const std::uint8_t* group, const std::uint8_t* /*before*/, int part,
                   Codes& codes) noexcept {
    load_quad<Ops, kBits, kQuad>(group, part, codes);
  }
  auto operand(const Codes& codes, int i) const noexcept { return table.value_operand(codes[i]); }
  typename Ops::Acc sum(typename Ops::Acc acc) const noexcept { return Ops::times(acc, divisor); }

  typename Ops::template Table<kBits> table;
  int divisor;
};

// Four bits of a group's stream, from bit kFirst on; upper bits may be dirty.
template <typename Ops, int kFirst>
inline typename Ops::Vec load_nibble(const std::uint8_t* group, const std::uint8_t* before,
                                     int part) noexcept {
  constexpr int kLine = kFirst < 0 ? -1 : kFirst / 8;
  constexpr int kShift = kFirst - 8 * kLine;
  const typename Ops::Vec low =
      kLine < 0 ? load_line<Ops>(before, part, 0) : load_line<Ops>(group, part, kLine);
  if constexpr (kShift == 0) {
    return low;
  } else if constexpr (kShift <= 4) {
    return Ops::template shift_right<kShift>(low);
  } else {
    constexpr int kLow = 8 - kShift;  // bits in the first of two lines
    const typename Ops::Vec high = load_line<Ops>(group, part, kLine + 1);
    return Ops::either(Ops::template low_bits<kLow>(Ops::template shift_right<kShift>(low)),
                       Ops::template shift_left<kLow>(Ops::template low_bits<4 - kLow>(high)));
  }
}

// Of trellis codes: the two halves of their windows.
template <typename Ops, int kWidth>
struct TrellisReader {
  static constexpr int kBits = kWidth;
  static constexpr bool kByFours = false;
  struct Codes {
    typename Ops::Vec older[4];
    typename Ops::Vec recent[4];
  };

  explicit TrellisReader(const SegmentPlan& segment) noexcept
      : older(segment.trellis->older.data(), false),
        recent(segment.trellis->recent.data(), false) {}

  template <int kQuad>
  static void load(const std::uint8_t* group, const std::uint8_t* before, int part,
                   Codes& codes) noexcept {
    constexpr int kEnd = (4 * kQuad + 1) * kBits;  // of the first code
    codes.older[0] = load_nibble<Ops, kEnd - 8>(group, before, part);
    codes.older[1] = load_nibble<Ops, kEnd + kBits - 8>(group, before, part);
    codes.older[2] = load_nibble<Ops, kEnd + 2 * kBits - 8>(group, before, part);
    codes.older[3] = load_nibble<Ops, kEnd + 3 * kBits - 8>(group, before, part);
    codes.recent[0] = load_nibble<Ops, kEnd - 4>(group, before, part);
    codes.recent[1] = load_nibble<Ops, kEnd + kBits - 4>(group, before, part);
    codes.recent[2] = load_nibble<Ops, kEnd + 2 * kBits - 4>(group, before, part);
    codes.recent[3] = load_nibble<Ops, kEnd + 3 * kBits - 4>(group, before, part);
  }
  auto operand(const Codes& codes, int i) const noexcept {
    return Ops::add_levels(older.value_operand(codes.older[i]),
                           recent.value_operand(codes.recent[i]));
  }
  typename Ops::Acc sum(typename Ops::Acc acc) const noexcept { return acc; }

  typename Ops::template Table<4> older;
  typename Ops::template Table<4> recent;
};

// Sums of kRows rows over 16 tokens, for kBlocks blocks of coordinates, each in kChains parts.
// words: [kRows, stride bytes], at the first token's; before: of each block's group.
template <typename Ops, typename Reader, int kQuad, bool kPairs, int kRows, int kBlocks,
          int kChains>
inline void accumulate_quad(const Reader& reader, const std::uint8_t* group,
                            const std::uint8_t* const (&before)[kBlocks], int part,
                            const std::uint8_t* words, std::ptrdiff_t stride,
                            typename Ops::Acc (&sums)[kBlocks][kChains][kRows]) noexcept {
  constexpr std::ptrdiff_t kBlockBytes = std::ptrdiff_t{2} * Reader::kBits * kLineBytes;
  constexpr int kStep = Ops::template words<Reader::kBits>() * kWordBytes;
  typename Reader::Codes codes[kBlocks];
  for (int b = 0; b < kBlocks; ++b) {
    Reader::template load<kQuad>(group + b * kBlockBytes, before[b], part, codes[b]);
  }
  if constexpr (Reader::kByFours) {
    for (int b = 0; b < kBlocks; ++b) {
      const decltype(reader.operand(codes[b], 0)) operands[4] = {
          reader.operand(codes[b], 0), reader.operand(codes[b], 1), reader.operand(codes[b], 2),
          reader.operand(codes[b], 3)};
      for (int r = 0; r < kRows; ++r) {
        sums[b][0][r] = Ops::dot_four(sums[b][0][r], operands, words + r * stride, kStep);
      }
    }
  } else if constexpr (kPairs) {
    for (int i = 0; i < 4; i += 2) {
      for (int b = 0; b < kBlocks; ++b) {
        const auto first = reader.operand(codes[b], i);
        const auto second = reader.operand(codes[b], i + 1);
        for (int r = 0; r < kRows; ++r) {
          sums[b][0][r] =
              Ops::dot_two(sums[b][0][r], first, second, words + i * kStep + r * stride, kStep);
        }
      }
    }
  } else {
    for (int i = 0; i < 4; ++i) {
      for (int b = 0; b < kBlocks; ++b) {
        const auto operand = reader.operand(codes[b], i);
        for (int r = 0; r < kRows; ++r) {
          sums[b][i % kChains][r] =
              Ops::dot(sums[b][i % kChains][r], operand, words + i * kStep + r * stride);
        }
      }
    }
  }
}

// What output[r, c] += step · sum needs of each row.
struct ScaledOutput {
  const float* steps;
  float* output;
  std::int64_t stride;
};

// Adds the sums of kRows rows and kBlocks blocks of coordinates, the first of them at `group` and
// output's first coordinate. before: the packed line before `group`.
template <typename Ops, typename Reader, bool kPairs, int kRows, int kBlocks, int kChains>
inline void accumulate_blocks(const Reader& reader, const std::uint8_t* group,
                              const std::uint8_t* before, const std::uint8_t* words,
                              const ScaledOutput& out, Fetch& fetch) noexcept {
  constexpr int kPartLanes = kCoordinateBlock / Ops::kParts;
  constexpr int kStep = 4 * Ops::template words<Reader::kBits>() * kWordBytes;
  constexpr std::ptrdiff_t kStride = std::ptrdiff_t{4} * kStep;
  constexpr std::ptrdiff_t kGroupBytes = std::ptrdiff_t{Reader::kBits} * kLineBytes;
  for (int part = 0; part < Ops::kParts; ++part) {
    typename Ops::Acc acc[kBlocks][kChains][kRows];
    for (int b = 0; b < kBlocks; ++b) {
      for (int c = 0; c < kChains; ++c) {
        for (int r = 0; r < kRows; ++r) acc[b][c][r] = Ops::broadcast(0);
      }
    }
#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC unroll 1  // unrolled, it copies most sums from register to register
#endif
    for (int half = 0; half < 2; ++half) {
      const std::uint8_t* lines = group + half * kGroupBytes;
      const std::uint8_t* word = words + static_cast<std::ptrdiff_t>(2 * half) * kStep;
      const std::uint8_t* lines_before[kBlocks];
      for (int b = 0; b < kBlocks; ++b) lines_before[b] = lines + 2 * b * kGroupBytes - kLineBytes;
      if (half == 0) lines_before[0] = before;
      accumulate_quad<Ops, Reader, 0, kPairs, kRows, kBlocks, kChains>(reader, lines, lines_before,
                                                                       part, word, kStride, acc);
      accumulate_quad<Ops, Reader, 1, kPairs, kRows, kBlocks, kChains>(
          reader, lines, lines_before, part, word + kStep, kStride, acc);
      fetch.template step<Ops>();
    }
    for (int b = 0; b < kBlocks; ++b) {
      for (int r = 0; r < kRows; ++r) {
        for (int c = 1; c < kChains; ++c) acc[b][0][r] = Ops::add(acc[b][0][r], acc[b][c][r]);
        Ops::add_scaled(out.output + r * out.stride + b * kCoordinateBlock + part * kPartLanes,
                        reader.sum(acc[b][0][r]), out.steps[r]);
      }
    }
  }
}

// words: the expanded weights, [kRows, 16, words].
template <typename Ops, typename Reader, bool kPairs, int kRows>
inline void accumulate_rows(const SegmentPlan& segment, const std::uint8_t* packed,
                            const std::uint8_t* words, ScaledOutput out, Ahead ahead) noexcept {
  constexpr int kBlocks = Ops::value_blocks(kRows);
  constexpr std::ptrdiff_t kBlockBytes = std::ptrdiff_t{2} * Reader::kBits * kLineBytes;
  const Reader reader(segment);
  const int blocks = segment.count / kCoordinateBlock;
  const std::uint8_t* before = packed + blocks * kBlockBytes - kLineBytes;  // the last line
  Fetch fetch = fetch_of(ahead, 2 * Ops::kParts * (blocks / kBlocks + blocks % kBlocks));
  int block = 0;
  for (; block + kBlocks <= blocks; block += kBlocks) {
    accumulate_blocks<Ops, Reader, kPairs, kRows, kBlocks, Ops::value_chains(kRows)>(
        reader, packed + block * kBlockBytes, before, words, out, fetch);
    out.output += kBlocks * kCoordinateBlock;
    before = packed + (block + kBlocks) * kBlockBytes - kLineBytes;
  }
  for (; block < blocks; ++block) {
    accumulate_blocks<Ops, Reader, kPairs, kRows, 1, Ops::value_chains(kRows)>(
        reader, packed + block * kBlockBytes, before, words, out, fetch);
    out.output += kCoordinateBlock;
    before = packed + (block + 1) * kBlockBytes - kLineBytes;
  }
}

// The same in pairs where the weights allow it.
template <typename Ops, typename Reader, int kRows>
inline void accumulate_fitting_rows(const SegmentPlan& segment, const std::uint8_t* packed,
                                    const std::uint8_t* words, ScaledOutput out,
                                    Ahead ahead) noexcept {
  if constexpr (Ops::kSumsPairs && Reader::kBits <= kNarrowBits && kRows > 1) {
    if (Ops::weights_fit(words, kRows)) {
      accumulate_rows<Ops, Reader, true, kRows>(segment, packed, words, out, ahead);
      return;
    }
  }
  accumulate_rows<Ops, Reader, false, kRows>(segment, packed, words, out, ahead);
}

// Calls body<bits, rows> with both as compile-time constants; 1 ≤ rows ≤ kRowBlock.
template <int kBits, int kRowBlock, typename Body>
inline void with_rows(int rows, Body&& body) noexcept {
  static_assert(kRowBlock == 4 || kRowBlock == 8);
  if constexpr (kRowBlock == 8) {
    switch (rows) {
      case 5: body.template operator()<kBits, 5>(); return;
      case 6: body.template operator()<kBits, 6>(); return;
      case 7: body.template operator()<kBits, 7>(); return;
      case 8: body.template operator()<kBits, 8>(); return;
      default: break;
    }
  }
  switch (rows) {
    case 1: body.template operator()<kBits, 1>(); break;
    case 2: body.template operator()<kBits, 2>(); break;
    case 3: body.template operator()<kBits, 3>(); break;
    default: body.template operator()<kBits, 4>(); break;
  }
}

template <int kRowBlock, typename Body>
inline void with_bits_and_rows(int bits, int rows, Body&& body) noexcept {
  switch (bits) {
    case 1: with_rows<1, kRowBlock>(rows, body); break;
    case 2: with_rows<2, kRowBlock>(rows, body); break;
    case 3: with_rows<3, kRowBlock>(rows, body); break;
    case 4: with_rows<4, kRowBlock>(rows, body); break;
    case 5: with_rows<5, kRowBlock>(rows, body); break;
    case 6: with_rows<6, kRowBlock>(rows, body); break;
    case 7: with_rows<7, kRowBlock>(rows, body); break;
    default: with_rows<8, kRowBlock>(rows, body); break;
  }
}

// The integer part of attention, as attend-inl.hpp wants it.
template <typename Ops>
struct Integer {
  // Bytes of words for each coordinate of a row, at most.
  static constexpr int kQueryBytes = Ops::kMaxWords;

  static void read_halves(const std::uint8_t* from, float* to) noexcept {
    Ops::read_halves(from, to);
  }
  static void fetch(Fetch& ahead) noexcept { ahead.step<Ops>(); }
  TQAI_HOT static void round_weights(const float* products, float inverse,
                                     std::uint8_t* weights) noexcept {
    Ops::round_weights(products, inverse, weights);
  }

  // queries: [rows, count] in −127…127; words: kQueryBytes a query; constants: [rows].
  static void prepare(const SegmentPlan& segment, const std::int8_t* queries, int rows,
                      std::uint8_t* words, RowConstants* constants) noexcept {
    Ops::expand_queries(segment.bits, queries, rows * segment.count, words);
    for (int r = 0; r < rows; ++r) {
      const std::int8_t* row = queries + static_cast<std::ptrdiff_t>(r) * segment.count;
      constants[r] = {Ops::key_bias(segment.bits, row, segment.count), 0};
      if constexpr (Ops::kSumsPairs) constants[r].fits = Ops::queries_fit(row, segment.count);
    }
  }

  // Kernels::score of prepared queries.
  static void score(const SegmentPlan& segment, const std::uint8_t* packed,
                    const std::uint8_t* words, const RowConstants* constants, int rows,
                    std::int32_t* scores, Ahead ahead) noexcept {
    for (int first = 0; first < rows; first += Ops::kRowBlock) {
      const int block = rows - first < Ops::kRowBlock ? rows - first : Ops::kRowBlock;
      with_bits_and_rows<Ops::kRowBlock>(segment.bits, block, [&]<int kBits, int kRows>() {
        const auto row_bytes =
            static_cast<std::ptrdiff_t>(segment.count) * Ops::template words<kBits>();
        const std::uint8_t* own = words + first * row_bytes;
        std::int32_t* to = scores + static_cast<std::ptrdiff_t>(first) * kTileTokens;
        const Ahead next = first == 0 ? ahead : Ahead{};
        if constexpr (kBits >= kMinKeyTrellisBits && kBits <= kMaxTrellisBits) {
          if (segment.key_trellis != nullptr) {
            score_path_rows<Ops, kBits, kRows>(segment, packed, own, constants + first, to, next);
            return;
          }
        }
        score_rows<Ops, kBits, kRows>(segment, packed, own, constants + first, to, next);
      });
    }
  }

  // Kernels::accumulate.
  static void accumulate(const SegmentPlan& segment, const std::uint8_t* packed,
                         const std::uint8_t* weights, const float* steps, int rows, float* output,
                         std::int64_t stride, Ahead ahead) noexcept {
    alignas(64) std::uint8_t expanded[Ops::kRowBlock * kTileTokens * Ops::kMaxWords];
    for (int first = 0; first < rows; first += Ops::kRowBlock) {
      const int block = rows - first < Ops::kRowBlock ? rows - first : Ops::kRowBlock;
      const std::uint8_t* words = weights + static_cast<std::ptrdiff_t>(first) * kTileTokens;
      if (!Ops::plain_weights(segment.bits)) {
        Ops::expand_weights(segment.bits, words, block * kTileTokens, expanded);
        words = expanded;
      }
      const ScaledOutput out{steps + first, output + first * stride, stride};
      const Ahead next = first == 0 ? ahead : Ahead{};
      with_bits_and_rows<Ops::kRowBlock>(segment.bits, block, [&]<int kBits, int kRows>() {
        if constexpr (Ops::kSumsQuotients && kBits <= kMaxQuotientBits) {
          if (segment.quotients != nullptr) {
            accumulate_rows<Ops, QuotientReader<Ops, kBits>, false, kRows>(segment, packed, words,
                                                                           out, next);
            return;
          }
        }
        if (segment.trellis == nullptr) {
          accumulate_fitting_rows<Ops, ScalarReader<Ops, kBits>, kRows>(segment, packed, words, out,
                                                                        next);
        } else if constexpr (kBits <= kMaxTrellisBits) {
          accumulate_fitting_rows<Ops, TrellisReader<Ops, kBits>, kRows>(segment, packed, words,
                                                                         out, next);
        }
      });
    }
  }
};

}  // namespace TQAI_LOCAL
}  // namespace tqai::kernels::TQAI_LEVEL_NAMESPACE

#endif  // TQAI_INTEGER_INL
