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
//   kDecodesPaths                whether keys in trellis codes are decoded before they are
//                                multiplied, and if so:
//   decode_paths(segment, packed, decoded)  as decoded-inl.hpp has levels; and if not:
//   merge<n>(low, high)          each byte's n lowest bits of `low`, those from n up to 6 of
//                                `high`; what is above may be dirty
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
//                                added before they are widened, where factors allow it, and if so:
//   queries_fit(q, count)        RowConstants::fits
//   weights_fit(weights, rows)   whether all rows' weights of a tile do
//   dot_two(acc, a, b, words, step)  of two operands, words `step` bytes apart
//   kDecodedBits                 codes of how many bits are looked up once for many rows: 0 or
//                                kNarrowBits, and if so:
//   kDecodesScalars              not only trellis codes
//   KeyLevels, ValueLevels       their operands, of one Vec
//   store_levels(p, v)           64-byte aligned
//   kRowBlock, kMaxSums          rows and sums that registers hold
//   value_blocks(rows)           value blocks side by side, which share the weights' loads
//   value_chains(rows)           sums of each; with those side by side enough to hide latencies
#ifndef TQAI_INTEGER_INL
#define TQAI_INTEGER_INL

#include <algorithm>
#include <bit>

#include "conversions-inl.hpp"
#include "decoded-inl.hpp"
#include "fetch-inl.hpp"
#include "key-readers-inl.hpp"
#include "queries-inl.hpp"
#include "value-readers-inl.hpp"

namespace tqai::kernels::TQAI_LEVEL_NAMESPACE {
namespace TQAI_LOCAL {

constexpr int kWordBytes = 4;

// What loops are made of is always inlined: where a function grows large, GCC calls it, by way of
// memory. The loops of a width and a number of rows are a function of their own: one function for
// all widths and rows keeps sums and pointers in memory, 8 % of a call with one row.

// Has the compiler load words again: kept for the next use they push sums out of registers.
inline void forget_loads() noexcept {
#if defined(__GNUC__)
  asm volatile("" ::: "memory");
#endif
}

// Sums of kRows rows over the tokens of subtiles kFirst … kFirst + kCount − 1, for one quad of
// coordinates. words: [kRows, stride bytes], at the quad's.
template <typename Ops, typename Reader, int kQuad, int kRows, int kFirst, int kCount>
TQAI_ALWAYS_INLINE void score_quad(Reader& reader, const std::uint8_t* group, int part,
                                   const std::uint8_t* words, std::ptrdiff_t stride,
                                   typename Ops::Acc (&sums)[kRows][kCount]) noexcept {
  typename Ops::Vec codes[4];
  load_quad<Ops, Reader::kBits, kQuad>(group, part, codes);
  for (int s = 0; s < kCount; ++s) {
    const auto operand = reader.operand(s, codes[kFirst + s]);
    for (int r = 0; r < kRows; ++r) {
      sums[r][s] = Ops::dot(sums[r][s], operand, words + r * stride);
    }
  }
}

// The same of a group's two quads, whose products add up in 16 bits.
template <typename Ops, typename Reader, int kRows, int kFirst, int kCount>
TQAI_ALWAYS_INLINE void score_pair(Reader& reader, const std::uint8_t* group, int part,
                                   const std::uint8_t* words, std::ptrdiff_t stride,
                                   typename Ops::Acc (&sums)[kRows][kCount]) noexcept {
  constexpr int kStep = Ops::template words<Reader::kFactorBits>() * kWordBytes;
  typename Ops::Vec first[4];
  typename Ops::Vec second[4];
  load_quad<Ops, Reader::kBits, 0>(group, part, first);
  load_quad<Ops, Reader::kBits, 1>(group, part, second);
  for (int s = 0; s < kCount; ++s) {
    const auto a = reader.operand(s, first[kFirst + s]);
    const auto b = reader.operand(s, second[kFirst + s]);
    if constexpr (kRows > 1) forget_loads();
    for (int r = 0; r < kRows; ++r) {
      sums[r][s] = Ops::dot_two(sums[r][s], a, b, words + r * stride, kStep);
    }
  }
}

// scores[r, t] of kRows rows and the tokens of subtiles kFirst … kFirst + kCount − 1; words: the
// expanded queries, [kRows, count / 4, words].
template <typename Ops, typename Reader, int kRows, int kFirst, int kCount>
TQAI_ALWAYS_INLINE void score_subtiles(const SegmentPlan& segment, const std::uint8_t* packed,
                                       const std::uint8_t* words, const RowConstants* rows,
                                       std::int32_t* scores, Fetch& ahead) noexcept {
  constexpr int kPartLanes = kCoordinateBlock / Ops::kParts;
  constexpr int kStep = Ops::template words<Reader::kFactorBits>() * kWordBytes;
  constexpr std::ptrdiff_t kGroupBytes = std::ptrdiff_t{Reader::kBits} * kLineBytes;
  constexpr bool kPairs = Ops::kSumsPairs && Reader::kFactorBits <= kNarrowBits;
  Reader reader(segment);
  const std::ptrdiff_t stride = static_cast<std::ptrdiff_t>(segment.count) / 4 * kStep;
  Fetch fetch = ahead;  // in registers
  for (int part = 0; part < Ops::kParts; ++part) {
    reader.template begin<kFirst>(packed + (segment.count / kGroupCodes - 1) * kGroupBytes, part);
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
          score_pair<Ops, Reader, kRows, kFirst, kCount>(reader, group, part, word, stride, sums);
          group += kGroupBytes;
          fits >>= 1;
          fetch.template step<Ops>();
        }
        if (word == end) break;
      }
      score_quad<Ops, Reader, 0, kRows, kFirst, kCount>(reader, group, part, word, stride, sums);
      score_quad<Ops, Reader, 1, kRows, kFirst, kCount>(reader, group, part, word + kStep, stride,
                                                        sums);
      word += std::ptrdiff_t{2} * kStep;
      group += kGroupBytes;
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
template <typename Ops, template <typename, int, int> typename Reader, int kBits, int kRows>
TQAI_NEVER_INLINE void score_rows(const SegmentPlan& segment, const std::uint8_t* packed,
                                  const std::uint8_t* words, const RowConstants* rows,
                                  std::int32_t* scores, Ahead ahead) noexcept {
  const int steps = segment.count / kGroupCodes * Ops::kParts;
  if constexpr (4 * kRows <= Ops::kMaxSums) {
    Fetch fetch = fetch_of(ahead, steps);
    score_subtiles<Ops, Reader<Ops, kBits, 4>, kRows, 0, 4>(segment, packed, words, rows, scores,
                                                            fetch);
  } else {
    Fetch fetch = fetch_of(ahead, 2 * steps);
    score_subtiles<Ops, Reader<Ops, kBits, 2>, kRows, 0, 2>(segment, packed, words, rows, scores,
                                                            fetch);
    score_subtiles<Ops, Reader<Ops, kBits, 2>, kRows, 2, 2>(segment, packed, words, rows, scores,
                                                            fetch);
  }
}

// Sums of kRows rows over 16 tokens, for kBlocks blocks of coordinates, each in kChains parts.
// words: [kRows, stride bytes], at the first token's; before: of each block's group.
template <typename Ops, typename Reader, int kQuad, bool kPairs, int kRows, int kBlocks,
          int kChains>
TQAI_ALWAYS_INLINE void accumulate_quad(
    const Reader& reader, const std::uint8_t* group, const std::uint8_t* const (&before)[kBlocks],
    int part, const std::uint8_t* words, std::ptrdiff_t stride,
    typename Ops::Acc (&sums)[kBlocks][kChains][kRows]) noexcept {
  constexpr std::ptrdiff_t kBlockBytes = std::ptrdiff_t{2} * Reader::kBits * kLineBytes;
  constexpr int kStep = Ops::template words<Reader::kFactorBits>() * kWordBytes;
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
TQAI_ALWAYS_INLINE void accumulate_blocks(const Reader& reader, const std::uint8_t* group,
                                          const std::uint8_t* before, const std::uint8_t* words,
                                          const ScaledOutput& out, Fetch& fetch) noexcept {
  constexpr int kPartLanes = kCoordinateBlock / Ops::kParts;
  constexpr int kStep = 4 * Ops::template words<Reader::kFactorBits>() * kWordBytes;
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
TQAI_NEVER_INLINE void accumulate_rows(const SegmentPlan& segment, const std::uint8_t* packed,
                                       const std::uint8_t* words, const ScaledOutput& whole,
                                       Ahead ahead) noexcept {
  constexpr int kBlocks = Ops::value_blocks(kRows);
  constexpr std::ptrdiff_t kBlockBytes = std::ptrdiff_t{2} * Reader::kBits * kLineBytes;
  const Reader reader(segment);
  ScaledOutput out = whole;
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
TQAI_ALWAYS_INLINE void accumulate_fitting_rows(const SegmentPlan& segment,
                                                const std::uint8_t* packed,
                                                const std::uint8_t* words, const ScaledOutput& out,
                                                Ahead ahead) noexcept {
  if constexpr (Ops::kSumsPairs && Reader::kFactorBits <= kNarrowBits && kRows > 1) {
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

// Calls body<bits>; 1 ≤ bits ≤ kNarrowBits.
template <typename Body>
inline void with_narrow_bits(int bits, Body&& body) noexcept {
  static_assert(kNarrowBits == 4);
  switch (bits) {
    case 1: body.template operator()<1>(); break;
    case 2: body.template operator()<2>(); break;
    case 3: body.template operator()<3>(); break;
    default: body.template operator()<4>(); break;
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
  TQAI_ALWAYS_INLINE static void round_weights(const float* products, float inverse,
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

  // A segment's codes looked up once for so many rows, in `decoded` of kDecodedBytes, for
  // score_decoded or accumulate_decoded; null where that is not worth it.
  static const std::uint8_t* decode_keys(const SegmentPlan& segment, const std::uint8_t* packed,
                                         int rows, std::uint8_t* decoded) noexcept {
    if constexpr (Ops::kDecodedBits > 0) {
      if (!worth_decoding(segment, rows)) return nullptr;
      if constexpr (Ops::kDecodesPaths) {
        if (segment.key_trellis != nullptr) {
          Ops::decode_paths(segment, packed, decoded);
          return decoded;
        }
      }
      with_narrow_bits(segment.bits, [&]<int kBits>() {
        if constexpr (!Ops::kDecodesPaths && kBits >= kMinKeyTrellisBits &&
                      kBits <= kMaxTrellisBits) {
          if (segment.key_trellis != nullptr) {
            decode_key_lines<Ops, KeyPathReader<Ops, kBits, 4>>(segment, packed, decoded);
            return;
          }
        }
        decode_key_lines<Ops, ScalarKeyReader<Ops, kBits, 4>>(segment, packed, decoded);
      });
      return decoded;
    }
    return nullptr;
  }
  static const std::uint8_t* decode_values(const SegmentPlan& segment, const std::uint8_t* packed,
                                           int rows, std::uint8_t* decoded) noexcept {
    if constexpr (Ops::kDecodedBits > 0) {
      if (!worth_decoding(segment, rows)) return nullptr;
      with_narrow_bits(segment.bits, [&]<int kBits>() {
        if constexpr (Ops::kSumsQuotients && kBits <= kMaxQuotientBits) {
          if (segment.quotients != nullptr) {
            decode_value_lines<Ops, QuotientReader<Ops, kBits>>(segment, packed, decoded);
            return;
          }
        }
        if (segment.trellis == nullptr) {
          decode_value_lines<Ops, ScalarReader<Ops, kBits>>(segment, packed, decoded);
        } else if constexpr (kBits <= kMaxTrellisBits) {
          decode_value_lines<Ops, TrellisReader<Ops, kBits>>(segment, packed, decoded);
        }
      });
      return decoded;
    }
    return nullptr;
  }
  static bool worth_decoding(const SegmentPlan& segment, int rows) noexcept {
    const bool in_trellis = segment.trellis != nullptr || segment.key_trellis != nullptr;
    return segment.bits <= Ops::kDecodedBits && (Ops::kDecodesScalars || in_trellis) &&
           rows >= kDecodedRows &&
           std::size_t{kTileTokens} * static_cast<std::size_t>(segment.count) <= kDecodedBytes;
  }

  // Parts::score of prepared queries.
  static void score(const SegmentPlan& segment, const std::uint8_t* packed,
                    const std::uint8_t* words, const RowConstants* constants, int rows,
                    std::int32_t* scores, Ahead ahead) noexcept {
    if constexpr (Ops::kDecodesPaths) {
      if (segment.key_trellis != nullptr) {
        score_paths(segment, packed, words, constants, rows, scores, ahead);
        return;
      }
    }
    for (int first = 0; first < rows; first += Ops::kRowBlock) {
      const int block = rows - first < Ops::kRowBlock ? rows - first : Ops::kRowBlock;
      with_bits_and_rows<Ops::kRowBlock>(segment.bits, block, [&]<int kBits, int kRows>() {
        const auto row_bytes =
            static_cast<std::ptrdiff_t>(segment.count) * Ops::template words<kBits>();
        const std::uint8_t* own = words + first * row_bytes;
        std::int32_t* to = scores + static_cast<std::ptrdiff_t>(first) * kTileTokens;
        const Ahead next = first == 0 ? ahead : Ahead{};
        if constexpr (!Ops::kDecodesPaths && kBits >= kMinKeyTrellisBits &&
                      kBits <= kMaxTrellisBits) {
          if (segment.key_trellis != nullptr) {
            score_rows<Ops, KeyPathReader, kBits, kRows>(segment, packed, own, constants + first,
                                                         to, next);
            return;
          }
        }
        score_rows<Ops, ScalarKeyReader, kBits, kRows>(segment, packed, own, constants + first, to,
                                                       next);
      });
    }
  }

  // Of keys in trellis codes that are decoded before they are multiplied.
  TQAI_NEVER_INLINE static void score_paths(const SegmentPlan& segment, const std::uint8_t* packed,
                                            const std::uint8_t* words,
                                            const RowConstants* constants, int rows,
                                            std::int32_t* scores, Ahead ahead) noexcept {
    alignas(64) std::uint8_t decoded[kMaxDim * kTileTokens];
    Ops::decode_paths(segment, packed, decoded);
    score_decoded(segment, decoded, words, constants, rows, scores, ahead);
  }

  // Parts::accumulate.
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

  // The same of what was decoded.
  TQAI_NEVER_INLINE static void score_decoded(const SegmentPlan& segment,
                                              const std::uint8_t* decoded,
                                              const std::uint8_t* words,
                                              const RowConstants* constants, int rows,
                                              std::int32_t* scores, Ahead ahead) noexcept {
    if constexpr (Ops::kDecodedBits > 0) {
      for (int first = 0; first < rows; first += Ops::kRowBlock) {
        const int block = std::min(rows - first, Ops::kRowBlock);
        with_rows<kNarrowBits, Ops::kRowBlock>(block, [&]<int kBits, int kRows>() {
          score_rows<Ops, DecodedKeyReader, kBits, kRows>(
              segment, decoded, words + static_cast<std::ptrdiff_t>(first) * segment.count,
              constants + first, scores + static_cast<std::ptrdiff_t>(first) * kTileTokens,
              first == 0 ? ahead : Ahead{});
        });
      }
    }
  }
  TQAI_NEVER_INLINE static void accumulate_decoded(const SegmentPlan& segment,
                                                   const std::uint8_t* decoded,
                                                   const std::uint8_t* weights, const float* steps,
                                                   int rows, float* output, std::int64_t stride,
                                                   Ahead ahead) noexcept {
    if constexpr (Ops::kDecodedBits > 0) {
      for (int first = 0; first < rows; first += Ops::kRowBlock) {
        const int block = std::min(rows - first, Ops::kRowBlock);
        const std::uint8_t* words = weights + static_cast<std::ptrdiff_t>(first) * kTileTokens;
        const ScaledOutput out{steps + first, output + first * stride, stride};
        const Ahead next = first == 0 ? ahead : Ahead{};
        with_rows<kNarrowBits, Ops::kRowBlock>(block, [&]<int /*kBits*/, int kRows>() {
          if constexpr (Ops::kSumsQuotients) {
            if (segment.quotients != nullptr) {
              accumulate_rows<Ops, DecodedReader<Ops, true>, false, kRows>(segment, decoded, words,
                                                                           out, next);
              return;
            }
          }
          accumulate_fitting_rows<Ops, DecodedReader<Ops, false>, kRows>(segment, decoded, words,
                                                                         out, next);
        });
      }
    }
  }
};

}  // namespace TQAI_LOCAL
}  // namespace tqai::kernels::TQAI_LEVEL_NAMESPACE

#endif  // TQAI_INTEGER_INL
