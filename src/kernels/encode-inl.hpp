// Sealing and opening tiles: 16 tokens side by side in lanes. The steps are plain loops over lanes;
// those of PlainLanes have versions of their own at some levels.
#ifndef TQAI_ENCODE_INL
#define TQAI_ENCODE_INL

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstring>
#include <new>
#include <type_traits>
#include <utility>

#include "code_bins.hpp"
#include "conversions-inl.hpp"
#include "kernels.hpp"
#include "rotate-lanes-inl.hpp"

namespace tqai::kernels::TQAI_LEVEL_NAMESPACE {
namespace TQAI_LOCAL {

#include "../pack-inl.hpp"

// Squared lengths. Four sums, of coordinates c mod 4: one would wait for each addition.
inline void squared_lengths(const LaneRows& x, int dim, float* norm2) noexcept {
  constexpr int kSums = 4;
  for (int v = 0; v < kLanes; v += kVectorLanes) {
    FloatVec sums[kSums] = {};
    int c = 0;
    for (; c + kSums <= dim; c += kSums) {
      for (int s = 0; s < kSums; ++s) {
        const FloatVec part = load_floats(x[c + s] + v);
        sums[s] = sums[s] + part * part;
      }
    }
    for (; c < dim; ++c) {
      const FloatVec part = load_floats(x[c] + v);
      sums[0] = sums[0] + part * part;
    }
    store_floats(norm2 + v, (sums[0] + sums[1]) + (sums[2] + sums[3]));
  }
}

// What a level may do better than plain loops, with the same results.
struct PlainLanes {
  // x[c, i] = rows[i, c] · signs[c], which are 1 where null: 16 tokens of `dim` coordinates.
  static void transpose(const float* rows, int dim, const float* signs, LaneRows& x) noexcept {
    transpose_from(0, rows, dim, signs, x);
  }
  static void transpose_from(int first, const float* rows, int dim, const float* signs,
                             LaneRows& x) noexcept {
    for (int c = first; c < dim; ++c) {
      const float sign = signs != nullptr ? signs[c] : 1.0F;
      for (int i = 0; i < kLanes; ++i) {
        x[c][i] = rows[static_cast<std::ptrdiff_t>(i) * dim + c] * sign;
      }
    }
  }

  // sums[i] = sum_lanes(rows[i]) of 16 rows, whose trees are added up side by side.
  static void sum_trees(const float (*rows)[kLanes], float* sums) noexcept {
    alignas(64) float turned[kLanes][kLanes];
    for (int c = 0; c < kLanes; ++c) {
      for (int i = 0; i < kLanes; ++i) turned[c][i] = rows[i][c];
    }
    for (int v = 0; v < kLanes; v += kVectorLanes) {
      FloatVec half[8];
      for (int i = 0; i < 8; ++i) {
        half[i] = load_floats(turned[i] + v) + load_floats(turned[i + 8] + v);
      }
      for (int i = 0; i < 4; ++i) half[i] = half[i] + half[i + 4];
      store_floats(sums + v, (half[0] + half[2]) + (half[1] + half[3]));
    }
  }

  // Codes of a segment's coordinates y[c, i] · factors[i] of 16 tokens; those from dim on are 0.
  // quads: [.., 64 tokens, 4 coordinates], the first of these tokens. norm2 += the squares of the
  // levels, whole numbers below 2^24: any order gives the same sum.
  template <int kBits>
  static void quantise(const SegmentPlan& segment, int dim, const LaneRows& y, const float* factors,
                       std::uint8_t* quads, float* norm2) noexcept {
    for (int c = segment.first; c < segment.first + segment.count; ++c) {
      std::uint8_t* to = quads + c / 4 * (4 * kTileTokens) + c % 4;
      if (c >= dim) {
        for (int i = 0; i < kLanes; ++i) to[4 * i] = 0;
        continue;
      }
      std::int32_t found[kLanes];
      if constexpr (kBits == 8) {
        nearest_levels(y[c], factors, 1.0F / segment.step, found);
      } else {
        binned_codes(*segment.bins, y[c], factors, found);
      }
      for (int i = 0; i < kLanes; ++i) {
        const auto level = static_cast<float>(segment.levels[found[i]]);
        norm2[i] = norm2[i] + level * level;
        to[4 * i] = static_cast<std::uint8_t>(found[i]);
      }
    }
  }

  // 8 bits are uniform: code i is level i − 128.
  static void nearest_levels(const float* y, const float* factors, float inverse_step,
                             std::int32_t* codes) noexcept {
    for (int i = 0; i < kLanes; ++i) {
      const float scaled = y[i] * factors[i] * inverse_step + 128.5F;
      const float low = scaled < 0.0F ? 0.0F : scaled;
      codes[i] = static_cast<std::int32_t>(low > 255.0F ? 255.0F : low);
    }
  }

  static void binned_codes(const CodeBins& bins, const float* y, const float* factors,
                           std::int32_t* codes) noexcept {
    for (int i = 0; i < kLanes; ++i) {
      const float value = y[i] * factors[i];
      const float above = value < -bins.limit ? -bins.limit : value;
      const float within = above > bins.limit ? bins.limit : above;
      const auto bits = std::bit_cast<std::uint32_t>(within * bins.scale + kRoundingShift);
      const std::uint32_t bin = bits & static_cast<std::uint32_t>(bins.size - 1);
      codes[i] = bins.codes[bin] + (value >= bins.boundaries[bin] ? 1 : 0);
    }
  }

  // Codes of kLanes · k numbers, and what they stand for.
  template <int kBits>
  struct Nearest {
    explicit Nearest(const SegmentPlan& plan) noexcept : segment(plan) {}
    template <int kCount>
    void operator()(const float (&numbers)[kCount], std::uint8_t (&codes)[kCount],
                    float (&decoded)[kCount]) const noexcept {
      static constexpr float kPlain[kLanes] = {1.0F, 1.0F, 1.0F, 1.0F, 1.0F, 1.0F, 1.0F, 1.0F,
                                               1.0F, 1.0F, 1.0F, 1.0F, 1.0F, 1.0F, 1.0F, 1.0F};
      for (int first = 0; first < kCount; first += kLanes) {
        std::int32_t found[kLanes];
        if constexpr (kBits == 8) {
          nearest_levels(numbers + first, kPlain, 1.0F / segment.step, found);
        } else {
          binned_codes(*segment.bins, numbers + first, kPlain, found);
        }
        for (int i = 0; i < kLanes; ++i) {
          codes[first + i] = static_cast<std::uint8_t>(found[i]);
          decoded[first + i] = static_cast<float>(segment.levels[found[i]]) * segment.step;
        }
      }
    }
    const SegmentPlan& segment;
  };

  // Quads of 16 coordinates and 32 tokens into a group of value lines (packing.hpp).
  static void turn_quads(const std::uint8_t* quads, std::uint8_t* lines) noexcept {
    for (int quad = 0; quad < 4; ++quad) {
      for (int line = 0; line < kGroupCodes; ++line) {
        const std::uint8_t* from = quads + (quad * kTileTokens + 4 * line) * 4;
        std::uint8_t* to = lines + line * kLineBytes + 16 * quad;
        for (int c = 0; c < 4; ++c) {
          for (int t = 0; t < 4; ++t) to[4 * c + t] = from[4 * t + c];
        }
      }
    }
  }
};

// In the callers' working memory.
struct CodingScratch {
  alignas(64) LaneRows x;
  alignas(64) LaneRows y;
  alignas(64) std::uint8_t codes[kMaxDim * kTileTokens];
};
static_assert(sizeof(CodingScratch) == kCodingBytes);

// Quads [padded / 4, 64 tokens, 4 coordinates] into the side's segments. Quads are lines of keys.
template <typename Lanes>
void pack_quads(const SidePlan& side, bool keys, const std::uint8_t* quads,
                std::uint8_t* tile) noexcept {
  constexpr int kGroupBytes = kGroupCodes * kLineBytes;
  for (int s = 0; s < side.segment_count; ++s) {
    const SegmentPlan& segment = side.segments[s];
    const std::uint8_t* from = quads + segment.first * kTileTokens;
    std::uint8_t* to = tile + side.codes + segment.offset;
    with_bits(segment.bits, [&]<int kBits>() {
      for (int group = 0; group < segment.count / kGroupCodes; ++group, to += kBits * kLineBytes) {
        if (keys) {
          pack_group_of<kBits>(from + group * kGroupBytes, to);
        } else {
          alignas(kLineBytes) std::uint8_t lines[kGroupBytes];
          Lanes::turn_quads(from + group / 2 * (2 * kGroupBytes) + group % 2 * (4 * 32), lines);
          pack_group_of<kBits>(lines, to);
        }
      }
    });
  }
}

// The side's segments into codes [padded, 64].
inline void unpack_side(const SidePlan& side, bool keys, const std::uint8_t* tile,
                        std::uint8_t* codes) noexcept {
  for (int s = 0; s < side.segment_count; ++s) {
    const SegmentPlan& segment = side.segments[s];
    unpack_lines(keys, tile + side.codes + segment.offset, segment.count, segment.bits,
                 codes + segment.first * kTileTokens);
  }
}

// FP16 norms below this are subnormal: multiples of kLeastHalf, whatever their size.
constexpr float kLeastNormalHalf = 0x1p-14F;
constexpr float kLeastHalf = 0x1p-24F;

inline bool is_small(float norm) noexcept { return norm > 0.0F && norm < kLeastNormalHalf; }

// Of 16 tokens.
struct LaneNorms {
  float lengths[kLanes];  // of the vectors
  float norms[kLanes];    // to be stored
  float factors[kLanes];  // of rotated coordinates, for codes
};

// Codes of the tokens from `start` on. lengths: of what they stand for, as unit vectors.
template <typename Lanes>
inline void quantise_lanes(const SidePlan& side, const float* factors, int start,
                           CodingScratch& scratch, float* lengths) noexcept {
  float correction2[kLanes] = {};
  for (int s = 0; s < side.segment_count; ++s) {
    const SegmentPlan& segment = side.segments[s];
    float levels2[kLanes] = {};
    with_bits(segment.bits, [&]<int kBits>() {
      Lanes::template quantise<kBits>(segment, side.dim, scratch.x, factors,
                                      scratch.codes + 4 * start, levels2);
    });
    for (int i = 0; i < kLanes; ++i) {
      correction2[i] = correction2[i] + levels2[i] * (segment.step * segment.step);
    }
  }
  for (int i = 0; i < kLanes; ++i) lengths[i] = std::sqrt(correction2[i]);
}

// Squared distance between a token's unit vector, whose coordinates are y · factor, and what its
// codes stand for times `share`.
inline float distance2(const SidePlan& side, const CodingScratch& scratch, int token, float factor,
                       float share) noexcept {
  float sum = 0.0F;
  for (int s = 0; s < side.segment_count; ++s) {
    const SegmentPlan& segment = side.segments[s];
    const int end = std::min(segment.first + segment.count, side.dim);
    for (int c = segment.first; c < end; ++c) {
      const int code = scratch.codes[c / 4 * (4 * kTileTokens) + 4 * token + c % 4];
      const float level = static_cast<float>(segment.levels[code]) * segment.step;
      const float rest = scratch.x[c][token % kLanes] * factor - level * share;
      sum = sum + rest * rest;
    }
  }
  return sum;
}

// Norms that are subnormal are rounded down, up, or to 0, and the codes make up for it: they are
// those of u · norm / rounded. Whichever is nearest.
template <typename Lanes>
TQAI_NEVER_INLINE void encode_small(const SidePlan& side, int start, CodingScratch& scratch,
                                    LaneNorms& lanes) noexcept {
  LaneNorms best = lanes;
  float least[kLanes];
  for (int i = 0; i < kLanes; ++i) {
    least[i] = 1.0F;  // of nothing at all
    if (is_small(lanes.norms[i])) best.norms[i] = 0.0F;
  }
  for (const float above : {0.0F, 1.0F}) {
    LaneNorms tried = lanes;
    for (int i = 0; i < kLanes; ++i) {
      if (!is_small(lanes.norms[i])) continue;
      const auto steps = static_cast<float>(static_cast<int>(lanes.norms[i] / kLeastHalf)) + above;
      tried.norms[i] = steps * kLeastHalf;
      tried.factors[i] = steps > 0.0F ? lanes.factors[i] * (lanes.norms[i] / tried.norms[i]) : 0.0F;
    }
    float lengths[kLanes];
    quantise_lanes<Lanes>(side, tried.factors, start, scratch, lengths);
    for (int i = 0; i < kLanes; ++i) {
      if (!is_small(lanes.norms[i]) || tried.norms[i] == 0.0F) continue;
      const float distance =
          distance2(side, scratch, start + i, lanes.factors[i], tried.norms[i] / lanes.lengths[i]);
      if (distance >= least[i]) continue;
      least[i] = distance;
      best.norms[i] = tried.norms[i];
      best.factors[i] = tried.factors[i];
    }
  }
  float lengths[kLanes];
  quantise_lanes<Lanes>(side, best.factors, start, scratch, lengths);
  lanes = best;
}

template <typename Lanes>
void encode(const SidePlan& side, bool keys, const float* rows, std::uint8_t* tile,
            std::byte* memory) noexcept {
  CodingScratch& scratch = *new (memory) CodingScratch;
  std::uint16_t halves[kTileTokens];
  const float turned =
      side.signs != nullptr ? 1.0F / std::sqrt(static_cast<float>(side.dim)) : 1.0F;
  for (int start = 0; start < kTileTokens; start += kLanes) {
    Lanes::transpose(rows + static_cast<std::ptrdiff_t>(start) * side.dim, side.dim, side.signs,
                     scratch.x);
    float norm2[kLanes];
    squared_lengths(scratch.x, side.dim, norm2);
    rotate_signed_lanes(side, scratch.x, scratch.y);
    LaneNorms lanes;
    for (int i = 0; i < kLanes; ++i) {
      lanes.lengths[i] = std::sqrt(norm2[i]);
      lanes.factors[i] = lanes.lengths[i] > 0.0F ? 1.0F / lanes.lengths[i] * turned : 0.0F;
    }
    float lengths[kLanes];
    quantise_lanes<Lanes>(side, lanes.factors, start, scratch, lengths);
    // Norm correction: the reconstruction gets the length of the original.
    bool small = false;
    for (int i = 0; i < kLanes; ++i) {
      lanes.norms[i] = lengths[i] > 0.0F ? lanes.lengths[i] / lengths[i] : 0.0F;
      small = small || is_small(lanes.norms[i]);
    }
    if (small) encode_small<Lanes>(side, start, scratch, lanes);
    for (int i = 0; i < kLanes; ++i) {
      halves[start + i] = to_half(lanes.norms[i] < kMaxHalf ? lanes.norms[i] : kMaxHalf);
    }
  }
  pack_quads<Lanes>(side, keys, scratch.codes, tile);
  std::memcpy(tile + side.norms, halves, sizeof halves);
}

// scratch.x, in units of the norms, as the rows of tokens `start` and on.
inline void store_rotated_back(const SidePlan& side, const std::uint16_t* norms, int start,
                               CodingScratch& scratch, float* rows) noexcept {
  rotate_back_lanes(side, scratch.x, scratch.y);
  for (int i = 0; i < kLanes; ++i) {
    const float norm = half_lane(norms[start + i]);
    float* row = rows + static_cast<std::ptrdiff_t>(start + i) * side.dim;
    for (int c = 0; c < side.dim; ++c) row[c] = scratch.x[c][i] * norm;
  }
}

TQAI_INLINE void decode(const SidePlan& side, bool keys, const std::uint8_t* tile, float* rows,
                        std::byte* memory) noexcept {
  CodingScratch& scratch = *new (memory) CodingScratch;
  std::uint16_t halves[kTileTokens];
  std::memcpy(halves, tile + side.norms, sizeof halves);
  unpack_side(side, keys, tile, scratch.codes);
  for (int start = 0; start < kTileTokens; start += kLanes) {
    for (int s = 0; s < side.segment_count; ++s) {
      const SegmentPlan& segment = side.segments[s];
      const int end = std::min(segment.first + segment.count, side.dim);
      for (int c = segment.first; c < end; ++c) {
        const std::uint8_t* codes = scratch.codes + c * kTileTokens + start;
        for (int i = 0; i < kLanes; ++i) {
          scratch.x[c][i] = static_cast<float>(segment.levels[codes[i]]) * segment.step;
        }
      }
    }
    store_rotated_back(side, halves, start, scratch, rows);
  }
}

// Whether no number is infinite or NaN: their exponents are largest.
template <DType kType>
inline bool all_finite(const void* from, std::int64_t count) noexcept {
  using Bits = std::conditional_t<kType == DType::f32, std::uint32_t, std::uint16_t>;
  constexpr Bits kMagnitude = static_cast<Bits>(~Bits{0}) >> 1;
  constexpr Bits kInfinite = kType == DType::f32   ? Bits(0x7F800000U)
                             : kType == DType::f16 ? Bits(0x7C00U)
                                                   : Bits(0x7F80U);
  constexpr std::int64_t kBlock = 1024;
  const auto* bytes = static_cast<const unsigned char*>(from);
  for (std::int64_t first = 0; first < count; first += kBlock) {
    const std::int64_t end = std::min(first + kBlock, count);
    Bits largest = 0;
    for (std::int64_t i = first; i < end; ++i) {
      Bits bits;
      std::memcpy(&bits, bytes + i * static_cast<std::int64_t>(sizeof bits), sizeof bits);
      const auto magnitude = static_cast<Bits>(bits & kMagnitude);
      largest = magnitude > largest ? magnitude : largest;
    }
    if (largest >= kInfinite) return false;
  }
  return true;
}

template <DType kType>
inline bool rows_finite(const char* rows, std::int64_t count, int dim,
                        std::int64_t stride) noexcept {
  if (stride == dim) return all_finite<kType>(rows, count * dim);
  for (std::int64_t r = 0; r < count; ++r) {
    const auto element = static_cast<std::int64_t>(sizeof(Number<kType>));
    if (!all_finite<kType>(rows + r * stride * element, dim)) return false;
  }
  return true;
}

// Squared lengths of 16 rows: sum_lanes of coordinates c mod 16. dim: a multiple of 16.
template <DType kType, typename Lanes>
inline void row_lengths(const char* rows, int dim, std::int64_t stride, float* norm2) noexcept {
  alignas(64) float lanes[kLanes][kLanes];
  for (int r = 0; r < kLanes; ++r) {
    const auto* row = reinterpret_cast<const Number<kType>*>(rows) + r * stride;
    FloatVec sums[kLaneParts] = {};
    for (int c = 0; c < dim; c += kLanes) {
      for (int p = 0; p < kLaneParts; ++p) {
        const FloatVec part = load_numbers<kType>(row + c + p * kVectorLanes);
        sums[p] = sums[p] + part * part;
      }
    }
    for (int p = 0; p < kLaneParts; ++p) store_floats(lanes[r] + p * kVectorLanes, sums[p]);
  }
  Lanes::sum_trees(lanes, norm2);
}

// The squared length of one row, in the same order.
inline float row_length(const char* from, DType dtype, int dim) noexcept {
  float row[kMaxDim];
  const int padded = padded_dim(dim);
  for (int c = dim; c < padded; ++c) row[c] = 0.0F;
  widen(from, dtype, dim, row);
  float lanes[kLanes] = {};
  for (int c = 0; c < padded; c += kLanes) {
    for (int i = 0; i < kLanes; ++i) lanes[i] = lanes[i] + row[c + i] * row[c + i];
  }
  return sum_lanes(lanes);
}

template <typename Lanes>
bool acceptable(const void* rows, DType dtype, std::int64_t count, int dim, std::int64_t stride,
                float max_norm) noexcept {
  const auto* from = static_cast<const char*>(rows);
  if (max_norm <= 0.0F) {
    switch (dtype) {
      case DType::f32: return rows_finite<DType::f32>(from, count, dim, stride);
      case DType::f16: return rows_finite<DType::f16>(from, count, dim, stride);
      case DType::bf16: return rows_finite<DType::bf16>(from, count, dim, stride);
    }
  }
  const auto element = static_cast<std::int64_t>(size_of(dtype));
  std::int64_t r = 0;
  if (dim % kLanes == 0) {
    for (; r + kLanes <= count; r += kLanes) {
      const char* group = from + r * stride * element;
      float norm2[kLanes];
      switch (dtype) {
        case DType::f32: row_lengths<DType::f32, Lanes>(group, dim, stride, norm2); break;
        case DType::f16: row_lengths<DType::f16, Lanes>(group, dim, stride, norm2); break;
        case DType::bf16: row_lengths<DType::bf16, Lanes>(group, dim, stride, norm2); break;
      }
      for (const float length2 : norm2) {
        if (!(length2 <= max_norm * max_norm)) return false;  // also where one is not finite
      }
    }
  }
  for (; r < count; ++r) {
    if (!(row_length(from + r * stride * element, dtype, dim) <= max_norm * max_norm)) return false;
  }
  return true;
}

}  // namespace TQAI_LOCAL
}  // namespace tqai::kernels::TQAI_LEVEL_NAMESPACE

#endif  // TQAI_ENCODE_INL
