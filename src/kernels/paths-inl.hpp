// Values in trellis codes: tiles sealed and opened. The codes of one byte position, line after
// line, are a ring, so that 64 paths are searched side by side.
#ifndef TQAI_PATHS_INL
#define TQAI_PATHS_INL

#include <algorithm>
#include <cmath>
#include <cstring>
#include <new>

#include "encode-inl.hpp"

namespace tqai::kernels::TQAI_LEVEL_NAMESPACE {
namespace TQAI_LOCAL {

constexpr int kShortLanes = 2 * kVectorLanes;
#include "../trellis-inl.hpp"

static_assert(sizeof(PathScratch) == kPathScratchBytes);

// [line, byte position]; a tile's values have as many lines as padded coordinates.
using TargetLines = std::int16_t[kMaxDim][kLineBytes];

// In the callers' working memory; the search's follows.
struct RingScratch {
  CodingScratch coding;  // codes: [line, byte position]
  alignas(64) TargetLines targets;
};

// Where coordinate c of a token is (packing.hpp).
constexpr int line_of(int c, int token) noexcept {
  return c / kCoordinateBlock * (2 * kGroupCodes) + token / 32 * kGroupCodes + token % 32 / 4;
}
constexpr int position_of(int c, int token) noexcept {
  return 4 * (c % kCoordinateBlock) + token % 4;
}

// Of a tile's tokens.
struct TokenNorms {
  float lengths[kTileTokens];         // of the vectors
  float factors[kTileTokens];         // of rotated coordinates, for codes
  float norms[kTileTokens];           // to be stored
  std::int32_t squares[kTileTokens];  // of what codes stand for, in levels
};

// Sets targets of 16 tokens from `start` on; where `first`, their lengths and factors as well.
template <typename Lanes>
void aim(const SidePlan& side, const float* rows, int start, bool first, TokenNorms& tokens,
         RingScratch& ring) noexcept {
  LaneRows& x = ring.coding.x;
  Lanes::transpose(rows + static_cast<std::ptrdiff_t>(start) * side.dim, side.dim, side.signs, x);
  float norm2[kLanes];
  if (first) squared_lengths(x, side.dim, norm2);
  rotate_signed_lanes(side, x, ring.coding.y);
  if (first) {
    const float turned =
        side.signs != nullptr ? 1.0F / std::sqrt(static_cast<float>(side.dim)) : 1.0F;
    for (int i = 0; i < kLanes; ++i) {
      const float length = std::sqrt(norm2[i]);
      tokens.lengths[start + i] = length;
      tokens.factors[start + i] = length > 0.0F ? 1.0F / length * turned : 0.0F;
    }
  }
  const float inverse_step = 1.0F / side.segments[0].step;
  for (int c = 0; c < side.dim; ++c) {
    std::int16_t targets[kLanes];
    for (int i = 0; i < kLanes; ++i) {
      targets[i] = target_of(x[c][i] * tokens.factors[start + i] * inverse_step);
    }
    for (int i = 0; i < kLanes; i += 4) {
      std::memcpy(ring.targets[line_of(c, start + i)] + position_of(c, 0), targets + i,
                  4 * sizeof targets[0]);
    }
  }
}

// Windows of all positions: those of the codes that come next.
inline void advance_windows(const Trellis& trellis, const std::uint8_t* codes,
                            std::uint8_t* windows) noexcept {
  const int top = kWindowBits - trellis.bits;
  for (int i = 0; i < kLineBytes; ++i) {
    windows[i] = static_cast<std::uint8_t>(windows[i] >> trellis.bits | codes[i] << top);
  }
}

// The windows of all positions before the first line.
inline void close_rings(const Trellis& trellis, const std::uint8_t* codes, int lines,
                        std::uint8_t* windows) noexcept {
  std::fill_n(windows, kLineBytes, std::uint8_t{0});
  for (int line = lines - kWindowBits; line < lines; ++line) {
    advance_windows(trellis, codes + line * kLineBytes, windows);
  }
}

// Finds codes near the targets, and the squares of what they stand for.
inline void search_rings(const SidePlan& side, TokenNorms& tokens, RingScratch& ring) noexcept {
  const Trellis& trellis = *side.segments[0].trellis->tables;
  std::uint8_t* codes = ring.coding.codes;
  auto* memory = reinterpret_cast<std::byte*>(&ring + 1);
  for (int first = 0; first < kLineBytes; first += kPathLanes) {
    find_codes(trellis, ring.targets[0] + first, kLineBytes, side.padded, codes + first, memory);
  }
  std::uint8_t windows[kLineBytes];
  close_rings(trellis, codes, side.padded, windows);
  std::fill_n(tokens.squares, kTileTokens, 0);
  for (int line = 0; line < side.padded; ++line) {
    advance_windows(trellis, codes + line * kLineBytes, windows);
    const int block = line / (2 * kGroupCodes);
    const int inside = std::min(kCoordinateBlock, side.dim - block * kCoordinateBlock);
    std::int32_t* squares = tokens.squares + line % (2 * kGroupCodes) * 4;
    for (int i = 0; i < 4 * inside; ++i) {
      const int level = trellis.level(windows[i]);
      squares[i % 4] += level * level;
    }
  }
}

// Whether a token's codes are nearer to its targets than nothing is.
inline bool worth_coding(const SidePlan& side, const RingScratch& ring, int token) noexcept {
  const Trellis& trellis = *side.segments[0].trellis->tables;
  std::uint8_t windows[kLineBytes];
  close_rings(trellis, ring.coding.codes, side.padded, windows);
  std::int64_t gain = 0;
  for (int line = 0; line < side.padded; ++line) {
    advance_windows(trellis, ring.coding.codes + line * kLineBytes, windows);
    const int block = line / (2 * kGroupCodes);
    if (line != line_of(block * kCoordinateBlock, token)) continue;
    const int inside = std::min(kCoordinateBlock, side.dim - block * kCoordinateBlock);
    for (int c = 0; c < inside; ++c) {
      const int position = position_of(c, token);
      const std::int64_t target = ring.targets[line][position];
      const std::int64_t rest = target - kTargetScale * trellis.level(windows[position]);
      gain += target * target - rest * rest;
    }
  }
  return gain > 0;
}

// Norm correction: the reconstruction gets the length of the original.
inline void correct_norm(const SidePlan& side, int token, TokenNorms& tokens) noexcept {
  const float step = side.segments[0].step;
  const float length = std::sqrt(static_cast<float>(tokens.squares[token]) * (step * step));
  tokens.norms[token] = length > 0.0F ? tokens.lengths[token] / length : 0.0F;
}

// Norms that are subnormal are rounded, and the codes make up for it, as in encode_small.
template <typename Lanes>
TQAI_NEVER_INLINE void search_small(const SidePlan& side, const float* rows, TokenNorms& tokens,
                                    RingScratch& ring) noexcept {
  bool small[kTileTokens];
  for (int start = 0; start < kTileTokens; start += kLanes) {
    bool any = false;
    for (int t = start; t < start + kLanes; ++t) {
      const float norm = tokens.norms[t];
      small[t] = is_small(norm);
      if (!small[t]) continue;
      any = true;
      const float steps = std::max(1.0F, std::floor(norm / kLeastHalf + 0.5F));
      tokens.norms[t] = steps * kLeastHalf;
      tokens.factors[t] = tokens.factors[t] * (tokens.lengths[t] / tokens.norms[t]);
    }
    if (any) aim<Lanes>(side, rows, start, false, tokens, ring);
  }
  search_rings(side, tokens, ring);
  for (int t = 0; t < kTileTokens; ++t) {
    if (small[t] && !worth_coding(side, ring, t)) tokens.norms[t] = 0.0F;
    if (!small[t]) correct_norm(side, t, tokens);
  }
}

template <typename Lanes>
void encode_rings(const SidePlan& side, const float* rows, std::uint8_t* tile,
                  std::byte* memory) noexcept {
  RingScratch& ring = *new (memory) RingScratch;
  const SegmentPlan& segment = side.segments[0];
  std::memset(ring.targets, 0, static_cast<std::size_t>(side.padded) * sizeof ring.targets[0]);
  TokenNorms tokens;
  for (int start = 0; start < kTileTokens; start += kLanes) {
    aim<Lanes>(side, rows, start, true, tokens, ring);
  }
  search_rings(side, tokens, ring);
  bool small = false;
  for (int t = 0; t < kTileTokens; ++t) {
    correct_norm(side, t, tokens);
    small = small || is_small(tokens.norms[t]);
  }
  if (small) search_small<Lanes>(side, rows, tokens, ring);
  with_bits(segment.bits, [&]<int kBits>() {
    if constexpr (kBits <= kMaxTrellisBits) {
      std::uint8_t* to = tile + side.codes;
      for (int line = 0; line < side.padded; line += kGroupCodes, to += kBits * kLineBytes) {
        const std::uint8_t* codes = ring.coding.codes + line * kLineBytes;
        for (int i = 0; i < kLineBytes; ++i) pack_stream_bytes<kBits>(codes + i, to + i);
      }
    }
  });
  std::uint16_t halves[kTileTokens];
  for (int t = 0; t < kTileTokens; ++t) {
    halves[t] = to_half(tokens.norms[t] < kMaxHalf ? tokens.norms[t] : kMaxHalf);
  }
  std::memcpy(tile + side.norms, halves, sizeof halves);
}

// Codes of some groups of lines: [8 · groups, 64].
inline void unpack_stream(const std::uint8_t* packed, int bits, int groups,
                          std::uint8_t* codes) noexcept {
  with_bits(bits, [&]<int kBits>() {
    if constexpr (kBits <= kMaxTrellisBits) {
      for (int group = 0; group < groups; ++group) {
        const std::uint8_t* from = packed + static_cast<std::ptrdiff_t>(group) * kBits * kLineBytes;
        std::uint8_t* to = codes + static_cast<std::ptrdiff_t>(group) * kGroupCodes * kLineBytes;
        for (int i = 0; i < kLineBytes; ++i) unpack_stream_bytes<kBits>(from + i, to + i);
      }
    }
  });
}

TQAI_INLINE void decode_rings(const SidePlan& side, const std::uint8_t* tile, float* rows,
                              std::byte* memory) noexcept {
  CodingScratch& scratch = *new (memory) CodingScratch;
  const SegmentPlan& segment = side.segments[0];
  const Trellis& trellis = *segment.trellis->tables;
  std::uint16_t halves[kTileTokens];
  std::memcpy(halves, tile + side.norms, sizeof halves);
  unpack_stream(tile + side.codes, segment.bits, side.padded / kGroupCodes, scratch.codes);
  std::uint8_t windows[kLineBytes];
  close_rings(trellis, scratch.codes, side.padded, windows);
  for (int line = 0; line < side.padded; ++line) {  // codes become windows
    std::uint8_t* codes = scratch.codes + line * kLineBytes;
    advance_windows(trellis, codes, windows);
    std::memcpy(codes, windows, sizeof windows);
  }
  for (int start = 0; start < kTileTokens; start += kLanes) {
    for (int c = 0; c < side.dim; ++c) {
      for (int i = 0; i < kLanes; ++i) {
        const std::uint8_t window =
            scratch.codes[line_of(c, start + i) * kLineBytes + position_of(c, start + i)];
        scratch.x[c][i] = static_cast<float>(trellis.level(window)) * segment.step;
      }
    }
    store_rotated_back(side, halves, start, scratch, rows);
  }
}

// Kernels::encode and decode.
template <typename Lanes>
void encode_side(const SidePlan& side, bool keys, const float* rows, std::uint8_t* tile,
                 std::byte* memory) noexcept {
  if (side.segments[0].trellis == nullptr) {
    encode<Lanes>(side, keys, rows, tile, memory);
  } else {
    encode_rings<Lanes>(side, rows, tile, memory);
  }
}

TQAI_INLINE void decode_side(const SidePlan& side, bool keys, const std::uint8_t* tile, float* rows,
                             std::byte* memory) noexcept {
  if (side.segments[0].trellis == nullptr) {
    decode(side, keys, tile, rows, memory);
  } else {
    decode_rings(side, tile, rows, memory);
  }
}

}  // namespace TQAI_LOCAL
}  // namespace tqai::kernels::TQAI_LEVEL_NAMESPACE

#endif  // TQAI_PATHS_INL
