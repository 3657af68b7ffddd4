// Attention over exact tokens, 64 at a time, in fp32.
#pragma once

#include "softmax-inl.hpp"

namespace tqai::kernels {
namespace {

// A block's keys or values as fp32 rows whose length is a multiple of 16.
struct ExactBlock {
  alignas(64) float storage[kTileTokens * kMaxDim];

  // Rows [tokens, dim] of dtype; what comes back has `padded` floats a row, zero beyond dim.
  const float* read(const void* rows, DType dtype, int dim, int padded, int tokens) noexcept {
    if (dtype == DType::f32 && dim == padded) return static_cast<const float*>(rows);
    const std::ptrdiff_t bytes = dim * static_cast<std::ptrdiff_t>(size_of(dtype));
    for (int t = 0; t < tokens; ++t) {
      float* row = storage + static_cast<std::ptrdiff_t>(t) * padded;
      widen(static_cast<const char*>(rows) + t * bytes, dtype, dim, row);
      for (int c = dim; c < padded; ++c) row[c] = 0.0F;
    }
    return storage;
  }
};

// scores[r, t] = q[r] · keys[t], summed in 16 lanes and then as a tree, whatever a register holds.
template <int kRows>
inline void score_exact(const float* queries, const float* keys, int padded, int tokens,
                        float (*scores)[kTileTokens]) noexcept {
  constexpr int kParts = kLanes / kVectorLanes;
  for (int t = 0; t < tokens; ++t) {
    const float* key = keys + static_cast<std::ptrdiff_t>(t) * padded;
    FloatVec sums[kRows][kParts] = {};
    for (int c = 0; c < padded; c += kLanes) {
      for (int p = 0; p < kParts; ++p) {
        const FloatVec part = load_floats(key + c + p * kVectorLanes);
        for (int r = 0; r < kRows; ++r) {
          const float* query = queries + static_cast<std::ptrdiff_t>(r) * padded;
          sums[r][p] = fused(load_floats(query + c + p * kVectorLanes), part, sums[r][p]);
        }
      }
    }
    for (int r = 0; r < kRows; ++r) {
      float lanes[kLanes];
      for (int p = 0; p < kParts; ++p) store_floats(lanes + p * kVectorLanes, sums[r][p]);
      scores[r][t] = sum_lanes(lanes);
    }
  }
}

// output[r] += Σ_t weights[r, t] · values[t], in order of tokens.
template <int kRows>
inline void accumulate_exact(const float (*weights)[kTileTokens], const float* values, int padded,
                             int tokens, float* output, std::int64_t stride) noexcept {
  constexpr int kVecs = kLanes / kVectorLanes;
  for (int c = 0; c < padded; c += kLanes) {
    FloatVec sums[kRows][kVecs];
    for (int r = 0; r < kRows; ++r) {
      for (int v = 0; v < kVecs; ++v) {
        sums[r][v] = load_floats(output + r * stride + c + v * kVectorLanes);
      }
    }
    for (int t = 0; t < tokens; ++t) {
      const float* value = values + static_cast<std::ptrdiff_t>(t) * padded + c;
      for (int v = 0; v < kVecs; ++v) {
        const FloatVec part = load_floats(value + v * kVectorLanes);
        for (int r = 0; r < kRows; ++r) {
          sums[r][v] = fused(broadcast_float<FloatVec>(weights[r][t]), part, sums[r][v]);
        }
      }
    }
    for (int r = 0; r < kRows; ++r) {
      for (int v = 0; v < kVecs; ++v) {
        store_floats(output + r * stride + c + v * kVectorLanes, sums[r][v]);
      }
    }
  }
}

inline void attend_exact(const AttendExact& args) noexcept {
  const int key_padded = padded_dim(args.key_dim);
  const int value_padded = padded_dim(args.value_dim);
  const auto element = static_cast<std::int64_t>(size_of(args.dtype));
  const Softmax& softmax = args.softmax;
  // As many rows at a time as their sums fit into registers.
  constexpr int kRows = kVectorLanes == 4 ? 2 : 4;
  ExactBlock rows;
  Block block;
  for (std::int64_t start = 0; start < args.tokens; start += kTileTokens) {
    const auto tokens = static_cast<int>(std::min<std::int64_t>(kTileTokens, args.tokens - start));
    if (!sees(softmax, start, tokens)) continue;
    const float* keys =
        rows.read(static_cast<const char*>(args.keys) + start * args.key_dim * element, args.dtype,
                  args.key_dim, key_padded, tokens);
    int r = 0;
    for (; r + kRows <= softmax.rows; r += kRows) {
      score_exact<kRows>(args.queries + static_cast<std::ptrdiff_t>(r) * key_padded, keys,
                         key_padded, tokens, block.scores + r);
    }
    for (; r < softmax.rows; ++r) {
      score_exact<1>(args.queries + static_cast<std::ptrdiff_t>(r) * key_padded, keys, key_padded,
                     tokens, block.scores + r);
    }
    for (r = 0; r < softmax.rows; ++r) {
      for (int t = tokens; t < kTileTokens; ++t) block.scores[r][t] = 0.0F;
      weigh(softmax, r, start, tokens, block.scores[r]);
    }
    const float* values =
        rows.read(static_cast<const char*>(args.values) + start * args.value_dim * element,
                  args.dtype, args.value_dim, value_padded, tokens);
    for (r = 0; r + kRows <= softmax.rows; r += kRows) {
      accumulate_exact<kRows>(block.scores + r, values, value_padded, tokens,
                              softmax.output + r * softmax.output_stride, softmax.output_stride);
    }
    for (; r < softmax.rows; ++r) {
      accumulate_exact<1>(block.scores + r, values, value_padded, tokens,
                          softmax.output + r * softmax.output_stride, softmax.output_stride);
    }
  }
}

}  // namespace
}  // namespace tqai::kernels
