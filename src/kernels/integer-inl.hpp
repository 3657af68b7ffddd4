// The integer kernels' loops over a level's primitives, `Ops`:
//   Vec, Acc                     a part of a line; 32-bit sums, one a lane of 4 bytes
//   kParts                       Vecs that make a line
//   load(p), prefetch(p)         a Vec; its line, for later
//   shift_right<n>(v)            each byte's bits n… at its low end; higher bits are dirty
//   low_bits<n>(v), either(a,b)  AND with 2^n − 1, OR
//   shift_left<n>(v)             of bytes whose high bits are 0
//   Table<bits>                  levels by code; low bits count, others may be dirty for bits ≤ 4
//   key_operand, value_operand   levels as the dot product wants them
//   words<bits>(), expand_*      words a lane's 4 factors take, and how they are made
//   dot(acc, operand, words)     acc + Σ of 4 products a lane
//   key_bias(bits, q, count)     what score sums start from
//   kRowBlock, kMaxSums          rows and sums that registers hold
#pragma once

#include "kernels.hpp"

namespace tqai::kernels {
namespace {

// No lambda here takes or returns a Vec: GCC compiles lambdas without the region's target.
template <typename Ops>
inline typename Ops::Vec load_line(const std::uint8_t* group, int part, int line) noexcept {
  return Ops::load(group + line * kLineBytes + part * (kLineBytes / Ops::kParts));
}

// A 3-bit code from its lower two bits and its upper one; both may have dirty upper bits.
template <typename Ops>
inline typename Ops::Vec join_three(typename Ops::Vec low, typename Ops::Vec high) noexcept {
  return Ops::either(Ops::template low_bits<2>(low),
                     Ops::template shift_left<2>(Ops::template low_bits<1>(high)));
}

// The 8 lines of codes of a group (packing.hpp), part `part` of each. Codes of up to 4 bits may
// have dirty upper bits.
template <typename Ops, int kBits>
inline void load_group(const std::uint8_t* group, int part,
                       typename Ops::Vec (&codes)[kGroupCodes]) noexcept {
  using Vec = typename Ops::Vec;
  if constexpr (kBits == 8) {
    for (int i = 0; i < 8; ++i) codes[i] = load_line<Ops>(group, part, i);
  } else if constexpr (kBits == 3) {
    const Vec a = load_line<Ops>(group, part, 0);
    const Vec b = load_line<Ops>(group, part, 1);
    const Vec c = load_line<Ops>(group, part, 2);
    codes[0] = a;
    codes[1] = Ops::template shift_right<3>(a);
    codes[2] = b;
    codes[3] = Ops::template shift_right<3>(b);
    codes[4] = c;
    codes[5] = Ops::template shift_right<3>(c);
    codes[6] = join_three<Ops>(Ops::template shift_right<6>(a), Ops::template shift_right<6>(c));
    codes[7] = join_three<Ops>(Ops::template shift_right<6>(b), Ops::template shift_right<7>(c));
  } else if constexpr (kBits == 4) {
    for (int l = 0; l < 4; ++l) {
      codes[2 * l] = load_line<Ops>(group, part, l);
      codes[2 * l + 1] = Ops::template shift_right<4>(codes[2 * l]);
    }
  } else if constexpr (kBits == 2) {
    for (int l = 0; l < 2; ++l) {
      codes[4 * l] = load_line<Ops>(group, part, l);
      codes[4 * l + 1] = Ops::template shift_right<2>(codes[4 * l]);
      codes[4 * l + 2] = Ops::template shift_right<4>(codes[4 * l]);
      codes[4 * l + 3] = Ops::template shift_right<6>(codes[4 * l]);
    }
  } else if constexpr (kBits == 1) {
    codes[0] = load_line<Ops>(group, part, 0);
    codes[1] = Ops::template shift_right<1>(codes[0]);
    codes[2] = Ops::template shift_right<2>(codes[0]);
    codes[3] = Ops::template shift_right<3>(codes[0]);
    codes[4] = Ops::template shift_right<4>(codes[0]);
    codes[5] = Ops::template shift_right<5>(codes[0]);
    codes[6] = Ops::template shift_right<6>(codes[0]);
    codes[7] = Ops::template shift_right<7>(codes[0]);
  } else {  // 5, 6, 7: the planes of 4 and of 1, 2 or 3 bits, cleaned and joined
    Vec low[kGroupCodes];
    load_group<Ops, 4>(group, part, low);
    Vec next[kGroupCodes];
    load_group<Ops, (kBits & 2) != 0 ? 2 : 1>(group + 4 * kLineBytes, part, next);
    for (int i = 0; i < 8; ++i) {
      codes[i] = Ops::either(
          Ops::template low_bits<4>(low[i]),
          Ops::template shift_left<4>(Ops::template low_bits<(kBits & 2) != 0 ? 2 : 1>(next[i])));
    }
    if constexpr (kBits == 7) {
      load_group<Ops, 1>(group + 6 * kLineBytes, part, next);
      for (int i = 0; i < 8; ++i) {
        codes[i] =
            Ops::either(codes[i], Ops::template shift_left<6>(Ops::template low_bits<1>(next[i])));
      }
    }
  }
}

// Fetches what is ahead a few lines at a time: dozens at once stall the loads that are needed now.
struct Fetch {
  const std::uint8_t* next;
  const std::uint8_t* end;
  std::ptrdiff_t bytes;  // a step

  template <typename Ops>
  void step() noexcept {
    const std::uint8_t* until = end - next < bytes ? end : next + bytes;
    for (; next < until; next += kLineBytes) Ops::prefetch(next);
  }
};

inline Fetch fetch_of(Ahead ahead, int steps) noexcept {
  const auto lines = static_cast<std::ptrdiff_t>(ahead.bytes / kLineBytes);
  return {ahead.data, ahead.data + ahead.bytes, (lines + steps - 1) / steps * kLineBytes};
}

// scores[r, t] of kRows rows and the tokens of subtiles kFirst … kFirst + kCount − 1; words: the
// expanded queries, [kRows, count / 4, words].
template <typename Ops, int kBits, int kRows, int kFirst, int kCount>
inline void score_subtiles(const SegmentPlan& segment, const std::uint8_t* packed,
                           const std::int32_t* words, const std::int32_t* bias,
                           std::int32_t* scores, Fetch& fetch) noexcept {
  constexpr int kPartLanes = kCoordinateBlock / Ops::kParts;
  constexpr int kWords = Ops::template words<kBits>();
  const typename Ops::template Table<kBits> table(segment.levels, true);
  const std::ptrdiff_t stride = static_cast<std::ptrdiff_t>(segment.count) / 4 * kWords;
  for (int part = 0; part < Ops::kParts; ++part) {
    typename Ops::Acc sums[kRows][kCount];
    for (int r = 0; r < kRows; ++r) {
      for (int s = 0; s < kCount; ++s) sums[r][s] = Ops::broadcast(bias[r]);
    }
    const std::uint8_t* group = packed;
    const std::int32_t* word = words;
    for (int g = 0; g < segment.count / kGroupCodes; ++g) {
      typename Ops::Vec codes[kGroupCodes];
      load_group<Ops, kBits>(group, part, codes);
      for (int quad = 0; quad < 2; ++quad) {
        for (int s = 0; s < kCount; ++s) {
          const auto operand = table.key_operand(codes[4 * quad + kFirst + s]);
          for (int r = 0; r < kRows; ++r) {
            sums[r][s] = Ops::dot(sums[r][s], operand, word + r * stride);
          }
        }
        word += kWords;
      }
      group += kBits * kLineBytes;
      fetch.template step<Ops>();
    }
    for (int r = 0; r < kRows; ++r) {
      for (int s = 0; s < kCount; ++s) {
        Ops::store(scores + r * kTileTokens + (kFirst + s) * kCoordinateBlock + part * kPartLanes,
                   sums[r][s]);
      }
    }
  }
}

// All subtiles at once where their sums fit into registers, else two at a time.
template <typename Ops, int kBits, int kRows>
inline void score_rows(const SegmentPlan& segment, const std::uint8_t* packed,
                       const std::int32_t* words, const std::int32_t* bias, std::int32_t* scores,
                       Fetch fetch) noexcept {
  if constexpr (4 * kRows <= Ops::kMaxSums) {
    score_subtiles<Ops, kBits, kRows, 0, 4>(segment, packed, words, bias, scores, fetch);
  } else {
    score_subtiles<Ops, kBits, kRows, 0, 2>(segment, packed, words, bias, scores, fetch);
    score_subtiles<Ops, kBits, kRows, 2, 2>(segment, packed, words, bias, scores, fetch);
  }
}

// sums[r, c] of kRows rows; words: the expanded weights, [kRows, 16, words].
template <typename Ops, int kBits, int kRows>
inline void accumulate_rows(const SegmentPlan& segment, const std::uint8_t* packed,
                            const std::int32_t* words, std::int32_t* sums, Fetch fetch) noexcept {
  constexpr int kPartLanes = kCoordinateBlock / Ops::kParts;
  constexpr int kWords = Ops::template words<kBits>();
  constexpr std::ptrdiff_t kStride = kTileTokens / 4 * kWords;
  const typename Ops::template Table<kBits> table(segment.levels, false);
  const std::uint8_t* group = packed;
  for (int block = 0; block < segment.count / kCoordinateBlock; ++block) {
    for (int part = 0; part < Ops::kParts; ++part) {
      typename Ops::Acc acc[kRows];
      for (int r = 0; r < kRows; ++r) acc[r] = Ops::broadcast(0);
      const std::int32_t* word = words;
      for (int half = 0; half < 2; ++half) {
        typename Ops::Vec codes[kGroupCodes];
        load_group<Ops, kBits>(group + half * kBits * kLineBytes, part, codes);
        for (int i = 0; i < kGroupCodes; ++i) {
          const auto operand = table.value_operand(codes[i]);
          for (int r = 0; r < kRows; ++r) acc[r] = Ops::dot(acc[r], operand, word + r * kStride);
          word += kWords;
        }
      }
      for (int r = 0; r < kRows; ++r) {
        Ops::store(sums + static_cast<std::ptrdiff_t>(r) * segment.count +
                       block * kCoordinateBlock + part * kPartLanes,
                   acc[r]);
      }
    }
    group += static_cast<std::ptrdiff_t>(2) * kBits * kLineBytes;
    fetch.template step<Ops>();
  }
}

// Calls body<bits, rows> with both as compile-time constants; 1 ≤ rows ≤ 4.
template <int kBits, typename Body>
inline void with_rows(int rows, Body&& body) noexcept {
  switch (rows) {
    case 1: body.template operator()<kBits, 1>(); break;
    case 2: body.template operator()<kBits, 2>(); break;
    case 3: body.template operator()<kBits, 3>(); break;
    default: body.template operator()<kBits, 4>(); break;
  }
}

template <typename Body>
inline void with_bits_and_rows(int bits, int rows, Body&& body) noexcept {
  switch (bits) {
    case 1: with_rows<1>(rows, body); break;
    case 2: with_rows<2>(rows, body); break;
    case 3: with_rows<3>(rows, body); break;
    case 4: with_rows<4>(rows, body); break;
    case 5: with_rows<5>(rows, body); break;
    case 6: with_rows<6>(rows, body); break;
    case 7: with_rows<7>(rows, body); break;
    default: with_rows<8>(rows, body); break;
  }
}

template <typename Ops>
void score(const SegmentPlan& segment, const std::uint8_t* packed, const std::int8_t* queries,
           int rows, std::int32_t* scores, Ahead ahead) noexcept {
  alignas(64) std::int32_t words[Ops::kRowBlock * kMaxDim / 4 * Ops::kMaxWords];
  std::int32_t bias[Ops::kRowBlock];
  for (int first = 0; first < rows; first += Ops::kRowBlock) {
    const int block = rows - first < Ops::kRowBlock ? rows - first : Ops::kRowBlock;
    const std::int8_t* block_queries = queries + static_cast<std::ptrdiff_t>(first) * segment.count;
    Ops::expand_queries(segment.bits, block_queries, block * segment.count, words);
    for (int r = 0; r < block; ++r) {
      bias[r] = Ops::key_bias(segment.bits,
                              block_queries + static_cast<std::ptrdiff_t>(r) * segment.count,
                              segment.count);
    }
    std::int32_t* block_scores = scores + static_cast<std::ptrdiff_t>(first) * kTileTokens;
    with_bits_and_rows(segment.bits, block, [&]<int kBits, int kRows>() {
      score_rows<Ops, kBits, kRows>(
          segment, packed, words, bias, block_scores,
          fetch_of(first == 0 ? ahead : Ahead{}, segment.count / kGroupCodes * Ops::kParts));
    });
  }
}

template <typename Ops>
void accumulate(const SegmentPlan& segment, const std::uint8_t* packed, const std::uint8_t* weights,
                int rows, std::int32_t* sums, Ahead ahead) noexcept {
  alignas(64) std::int32_t words[Ops::kRowBlock * kTileTokens / 4 * Ops::kMaxWords];
  for (int first = 0; first < rows; first += Ops::kRowBlock) {
    const int block = rows - first < Ops::kRowBlock ? rows - first : Ops::kRowBlock;
    Ops::expand_weights(segment.bits, weights + static_cast<std::ptrdiff_t>(first) * kTileTokens,
                        block * kTileTokens, words);
    std::int32_t* block_sums = sums + static_cast<std::ptrdiff_t>(first) * segment.count;
    with_bits_and_rows(segment.bits, block, [&]<int kBits, int kRows>() {
      accumulate_rows<Ops, kBits, kRows>(
          segment, packed, words, block_sums,
          fetch_of(first == 0 ? ahead : Ahead{}, segment.count / kCoordinateBlock));
    });
  }
}

}  // namespace
}  // namespace tqai::kernels
