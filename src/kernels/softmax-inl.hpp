// The running softmax over blocks of 64 tokens (arXiv:1805.02867), in base 2.
#pragma once

#include <algorithm>
#include <cstring>

#include "kernels.hpp"
#include "numeric-inl.hpp"

namespace tqai::kernels {
namespace {

// Rows of one block of 64 tokens.
struct Block {
  alignas(64) float scores[kMaxRows][kTileTokens];
};

// Whether any row sees a token in [start, start + tokens).
inline bool sees(const Softmax& softmax, std::int64_t start, int tokens) noexcept {
  for (int r = 0; r < softmax.rows; ++r) {
    if (softmax.first[r] < start + tokens && softmax.end[r] > start) return true;
  }
  return false;
}

// Turns q·k of one row into 2^(score − max), updates max and sum, and scales the row's output when
// max grew. `start`: the block's first token among those given.
inline void weigh(const Softmax& softmax, int row, std::int64_t start, int tokens,
                  float* __restrict scores) noexcept {
  const float cap = softmax.soft_cap;
  if (cap > 0.0F) {
    const float inner = softmax.scale / cap;
    const float outer = cap * kLog2E;
    for (int t = 0; t < kTileTokens; ++t) scores[t] = tanh_lane(scores[t] * inner) * outer;
  } else {
    const float scale = softmax.scale * kLog2E;
    for (int t = 0; t < kTileTokens; ++t) scores[t] = scores[t] * scale;
  }
  if (softmax.mask != nullptr) {
    const float* mask = softmax.mask + row * softmax.mask_stride + start;
    for (int t = 0; t < tokens; ++t) scores[t] = scores[t] + mask[t] * kLog2E;
  }
  const auto seen_from =
      static_cast<int>(std::clamp<std::int64_t>(softmax.first[row] - start, 0, kTileTokens));
  const auto seen_to = static_cast<int>(
      std::clamp<std::int64_t>(softmax.end[row] - start, seen_from, std::max(tokens, seen_from)));
  for (int t = 0; t < seen_from; ++t) scores[t] = -kInfinity;
  for (int t = seen_to; t < kTileTokens; ++t) scores[t] = -kInfinity;

  float lanes[kLanes];
  for (int i = 0; i < kLanes; ++i) lanes[i] = scores[i];
  for (int t = kLanes; t < kTileTokens; t += kLanes) {
    for (int i = 0; i < kLanes; ++i) lanes[i] = scores[t + i] > lanes[i] ? scores[t + i] : lanes[i];
  }
  const float largest = max_lanes(lanes);
  const float before = softmax.max[row];
  if (largest > before) {
    const float shrink = before == -kInfinity ? 0.0F : exp2_negative(before - largest);
    softmax.max[row] = largest;
    softmax.sum[row] = softmax.sum[row] * shrink;
    float* output = softmax.output + row * softmax.output_stride;
    for (std::int64_t c = 0; c < softmax.output_stride; ++c) output[c] = output[c] * shrink;
  }
  const float max = softmax.max[row];
  if (max == -kInfinity) {  // nothing seen so far: −inf − (−inf) is no number
    for (int t = 0; t < kTileTokens; ++t) scores[t] = 0.0F;
    return;
  }
  for (int t = 0; t < kTileTokens; ++t) scores[t] = exp2_negative(scores[t] - max);
  for (int i = 0; i < kLanes; ++i) lanes[i] = scores[i];
  for (int t = kLanes; t < kTileTokens; t += kLanes) {
    for (int i = 0; i < kLanes; ++i) lanes[i] = lanes[i] + scores[t + i];
  }
  softmax.sum[row] = softmax.sum[row] + sum_lanes(lanes);
}

}  // namespace
}  // namespace tqai::kernels
