// Sealing and opening tiles: 16 tokens side by side in lanes, so that every step is the same plain
// loop over lanes at each level.
#pragma once

#include <cmath>
#include <cstring>
#include <utility>

#include "kernels.hpp"
#include "numeric-inl.hpp"
#include "pack-inl.hpp"

namespace tqai::kernels {
namespace {

// [coordinates, 16 tokens]
using LaneRows = float[kMaxDim][kLanes];

// In-place Walsh–Hadamard transform over coordinates, two of its steps at a time to halve the loads
// and stores; the same additions as Rotation's.
inline void fwht_lanes(LaneRows& x, int dim) noexcept {
  int stride = 1;
  for (; 4 * stride <= dim; stride *= 4) {
    for (int block = 0; block < dim; block += 4 * stride) {
      for (int row = block; row < block + stride; ++row) {
        for (int v = 0; v < kLanes; v += kVectorLanes) {
          const FloatVec a = load_floats(x[row] + v);
          const FloatVec b = load_floats(x[row + stride] + v);
          const FloatVec c = load_floats(x[row + 2 * stride] + v);
          const FloatVec d = load_floats(x[row + 3 * stride] + v);
          const FloatVec sum = a + b;
          const FloatVec difference = a - b;
          const FloatVec next_sum = c + d;
          const FloatVec next_difference = c - d;
          store_floats(x[row] + v, sum + next_sum);
          store_floats(x[row + stride] + v, difference + next_difference);
          store_floats(x[row + 2 * stride] + v, sum - next_sum);
          store_floats(x[row + 3 * stride] + v, difference - next_difference);
        }
      }
    }
  }
  if (stride == dim) return;
  for (int row = 0; row < stride; ++row) {
    float* __restrict a = x[row];
    float* __restrict b = x[row + stride];
    for (int i = 0; i < kLanes; ++i) {
      const float sum = a[i] + b[i];
      b[i] = a[i] - b[i];
      a[i] = sum;
    }
  }
}

inline void scale_lanes(LaneRows& x, int dim, float factor) noexcept {
  for (int c = 0; c < dim; ++c) {
    for (int i = 0; i < kLanes; ++i) x[c][i] = x[c][i] * factor;
  }
}

inline void sign_lanes(LaneRows& x, int dim, const float* signs) noexcept {
  for (int c = 0; c < dim; ++c) {
    for (int i = 0; i < kLanes; ++i) x[c][i] = x[c][i] * signs[c];
  }
}

// kRows rows of y = matrix · x, summed in order of coordinates.
template <int kRows>
inline void multiply_rows(const float* matrix, const LaneRows& x, int dim,
                          float (*y)[kLanes]) noexcept {
  constexpr int kVecs = kLanes / kVectorLanes;
  FloatVec sums[kRows][kVecs] = {};
  for (int c = 0; c < dim; ++c) {
    for (int v = 0; v < kVecs; ++v) {
      const FloatVec part = load_floats(x[c] + v * kVectorLanes);
      for (int r = 0; r < kRows; ++r) {
        sums[r][v] = sums[r][v] + matrix[static_cast<std::ptrdiff_t>(r) * dim + c] * part;
      }
    }
  }
  for (int r = 0; r < kRows; ++r) {
    for (int v = 0; v < kVecs; ++v) store_floats(y[r] + v * kVectorLanes, sums[r][v]);
  }
}

// y = matrix · x: as many rows at once as hide the additions' latency.
inline void multiply_lanes(const float* matrix, const LaneRows& x, int dim, LaneRows& y) noexcept {
  constexpr int kRows = kVectorLanes / 2;
  int r = 0;
  for (; r + kRows <= dim; r += kRows) {
    multiply_rows<kRows>(matrix + static_cast<std::ptrdiff_t>(r) * dim, x, dim, y + r);
  }
  for (; r < dim; ++r) {
    multiply_rows<1>(matrix + static_cast<std::ptrdiff_t>(r) * dim, x, dim, y + r);
  }
}

// x = R · (x · inverse), for each lane its own inverse.
inline void rotate_lanes(const SidePlan& side, const float* inverse, LaneRows& x,
                         LaneRows& scratch) noexcept {
  for (int c = 0; c < side.dim; ++c) {
    const float sign = side.signs != nullptr ? side.signs[c] : 1.0F;
    for (int i = 0; i < kLanes; ++i) x[c][i] = x[c][i] * inverse[i] * sign;
  }
  if (side.signs != nullptr) {
    fwht_lanes(x, side.dim);
    scale_lanes(x, side.dim, 1.0F / std::sqrt(static_cast<float>(side.dim)));
  } else {
    multiply_lanes(side.matrix, x, side.dim, scratch);
    std::memcpy(x, scratch, static_cast<std::size_t>(side.dim) * sizeof x[0]);
  }
}

inline void rotate_back_lanes(const SidePlan& side, LaneRows& x, LaneRows& scratch) noexcept {
  if (side.signs != nullptr) {
    fwht_lanes(x, side.dim);
    scale_lanes(x, side.dim, 1.0F / std::sqrt(static_cast<float>(side.dim)));
    sign_lanes(x, side.dim, side.signs);
  } else {
    multiply_lanes(side.transposed, x, side.dim, scratch);
    std::memcpy(x, scratch, static_cast<std::size_t>(side.dim) * sizeof x[0]);
  }
}

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

// Codes of 16 coordinates by counting the boundaries ≤ y; the specification of every level's
// Ops::quantise. norm2 += the squares of their levels.
template <int kBits>
inline void quantise_lanes(const SegmentPlan& segment, const float* __restrict y,
                           std::uint8_t* __restrict codes, float* __restrict norm2) noexcept {
  std::int32_t found[kLanes];
  if constexpr (kBits == 8) {  // uniform: level i is i − 128
    const float inverse = 1.0F / segment.step;
    for (int i = 0; i < kLanes; ++i) {
      const float scaled = y[i] * inverse + 128.5F;
      const float low = scaled < 0.0F ? 0.0F : scaled;
      found[i] = static_cast<std::int32_t>(low > 255.0F ? 255.0F : low);
    }
    for (int i = 0; i < kLanes; ++i) {
      const auto level = static_cast<float>(found[i] - 128);
      norm2[i] = norm2[i] + level * level;
    }
  } else {  // a binary search
    const float* boundaries = segment.boundaries;
    for (int i = 0; i < kLanes; ++i) found[i] = 0;
    for (int bit = kBits - 1; bit >= 0; --bit) {
      for (int i = 0; i < kLanes; ++i) {
        const std::int32_t next = found[i] | 1 << bit;
        found[i] = y[i] >= boundaries[next - 1] ? next : found[i];
      }
    }
    for (int i = 0; i < kLanes; ++i) {
      const auto level = static_cast<float>(segment.levels[found[i]]);
      norm2[i] = norm2[i] + level * level;
    }
  }
  for (int i = 0; i < kLanes; ++i) codes[i] = static_cast<std::uint8_t>(found[i]);
}

// What a level may do better than plain loops, with the same results.
struct PlainLanes {
  // x[c, i] = rows[i, c]: 16 tokens of `dim` coordinates, a multiple of 16 or not.
  static void transpose(const float* rows, int dim, LaneRows& x) noexcept {
    for (int c = 0; c < dim; ++c) {
      for (int i = 0; i < kLanes; ++i) x[c][i] = rows[static_cast<std::ptrdiff_t>(i) * dim + c];
    }
  }
  // x[c, i] = rows[i, c], of 16 of each.
  static void transpose_square(const float (*rows)[kLanes], float (*x)[kLanes]) noexcept {
    for (int c = 0; c < kLanes; ++c) {
      for (int i = 0; i < kLanes; ++i) x[c][i] = rows[i][c];
    }
  }
  // Codes of coordinates [segment.first, end) of 16 tokens; codes: [.., 64], the first of these
  // tokens. norm2 += the squares of their levels.
  template <int kBits>
  static void quantise(const SegmentPlan& segment, const LaneRows& y, int end, std::uint8_t* codes,
                       float* norm2) noexcept {
    for (int c = segment.first; c < end; ++c) {
      quantise_lanes<kBits>(segment, y[c], codes + c * kTileTokens, norm2);
    }
  }
};

struct EncodeScratch {
  alignas(64) LaneRows x;
  alignas(64) LaneRows y;
  alignas(64) std::uint8_t codes[kMaxDim * kTileTokens];  // [padded, 64]
};

// Codes [padded, 64] into the side's segments and back.
inline void pack_side(const SidePlan& side, bool keys, const std::uint8_t* codes,
                      std::uint8_t* tile) noexcept {
  for (int s = 0; s < side.segment_count; ++s) {
    const SegmentPlan& segment = side.segments[s];
    pack_lines(keys, codes + segment.first * kTileTokens, segment.count, segment.bits,
               tile + side.codes + segment.offset);
  }
}

inline void unpack_side(const SidePlan& side, bool keys, const std::uint8_t* tile,
                        std::uint8_t* codes) noexcept {
  for (int s = 0; s < side.segment_count; ++s) {
    const SegmentPlan& segment = side.segments[s];
    unpack_lines(keys, tile + side.codes + segment.offset, segment.count, segment.bits,
                 codes + segment.first * kTileTokens);
  }
}

template <typename Lanes>
void encode(const SidePlan& side, bool keys, const float* rows, std::uint8_t* tile) noexcept {
  EncodeScratch scratch;
  std::uint16_t halves[kTileTokens];
  for (int start = 0; start < kTileTokens; start += kLanes) {
    Lanes::transpose(rows + static_cast<std::ptrdiff_t>(start) * side.dim, side.dim, scratch.x);
    float norm2[kLanes];
    squared_lengths(scratch.x, side.dim, norm2);
    float norms[kLanes];
    float inverse[kLanes];
    for (int i = 0; i < kLanes; ++i) {
      norms[i] = std::sqrt(norm2[i]);
      inverse[i] = norms[i] > 0.0F ? 1.0F / norms[i] : 0.0F;
    }
    rotate_lanes(side, inverse, scratch.x, scratch.y);
    // Norm correction: the reconstruction gets the length of the original.
    float correction2[kLanes] = {};
    for (int s = 0; s < side.segment_count; ++s) {
      const SegmentPlan& segment = side.segments[s];
      float levels2[kLanes] = {};
      const int end = std::min(segment.first + segment.count, side.dim);
      with_bits(segment.bits, [&]<int kBits>() {
        Lanes::template quantise<kBits>(segment, scratch.x, end, scratch.codes + start, levels2);
      });
      for (int i = 0; i < kLanes; ++i) {
        correction2[i] = correction2[i] + levels2[i] * (segment.step * segment.step);
      }
    }
    for (int i = 0; i < kLanes; ++i) {
      const float length = std::sqrt(correction2[i]);
      const float norm = length > 0.0F ? norms[i] / length : 0.0F;
      halves[start + i] = to_half(norm < kMaxHalf ? norm : kMaxHalf);
    }
  }
  std::memset(scratch.codes + side.dim * kTileTokens, 0,
              static_cast<std::size_t>(side.padded - side.dim) * kTileTokens);
  pack_side(side, keys, scratch.codes, tile);
  std::memcpy(tile + side.norms, halves, sizeof halves);
}

void decode(const SidePlan& side, bool keys, const std::uint8_t* tile, float* rows) noexcept {
  EncodeScratch scratch;
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
    rotate_back_lanes(side, scratch.x, scratch.y);
    for (int i = 0; i < kLanes; ++i) {
      const float norm = half_lane(halves[start + i]);
      float* row = rows + static_cast<std::ptrdiff_t>(start + i) * side.dim;
      for (int c = 0; c < side.dim; ++c) row[c] = scratch.x[c][i] * norm;
    }
  }
}

bool acceptable(const void* rows, DType dtype, std::int64_t count, int dim, std::int64_t stride,
                float max_norm) noexcept {
  const auto element = static_cast<std::int64_t>(size_of(dtype));
  float row[kMaxDim];
  const int padded = padded_dim(dim);
  for (int c = dim; c < padded; ++c) row[c] = 0.0F;
  for (std::int64_t r = 0; r < count; ++r) {
    widen(static_cast<const char*>(rows) + r * stride * element, dtype, dim, row);
    float lanes[kLanes] = {};
    for (int c = 0; c < padded; c += kLanes) {
      for (int i = 0; i < kLanes; ++i) lanes[i] = lanes[i] + row[c + i] * row[c + i];
    }
    const float norm2 = sum_lanes(lanes);  // not finite where an element is not
    if (!(norm2 <= max_norm * max_norm)) return false;
  }
  return true;
}

}  // namespace
}  // namespace tqai::kernels
