// The running softmax over blocks of 64 tokens (arXiv:1805.02867), in base 2.
#ifndef TQAI_SOFTMAX_INL
#define TQAI_SOFTMAX_INL

#include <algorithm>
#include <cstring>
#include <limits>

#include "functions-inl.hpp"
#include "kernels.hpp"
#include "tile-row-inl.hpp"

namespace tqai::kernels::TQAI_LEVEL_NAMESPACE {
namespace TQAI_LOCAL {

// Rows of one block of 64 tokens.
struct Block {
  alignas(64) float scores[kMaxRows][kTileTokens];
};

// What a row's mask adds to tokens [start, start + tokens).
inline std::uint8_t mask_run(const Softmax& softmax, int row, std::int64_t start,
                             int tokens) noexcept {
  if (softmax.mask_runs == nullptr) return MaskRun::mixed;
  const std::uint8_t* runs = softmax.mask_runs + row * softmax.mask_run_stride;
  const std::int64_t first = softmax.mask_column + start;
  return static_cast<std::uint8_t>(runs[first / kTileTokens] &
                                   runs[(first + tokens - 1) / kTileTokens]);
}

// What rows see, of blocks of 64 tokens.
class Sight {
 public:
  Sight() = default;
  explicit Sight(const Softmax& softmax) noexcept
      : softmax_(&softmax), limited_(softmax.soft_cap > 0.0F) {
    for (int r = 0; r < softmax.rows; ++r) {
      any_first_ = std::min(any_first_, softmax.first[r]);
      any_end_ = std::max(any_end_, softmax.end[r]);
      all_first_ = std::max(all_first_, softmax.first[r]);
      all_end_ = std::min(all_end_, softmax.end[r]);
    }
  }
  // False only where no row sees a token in [start, start + tokens).
  bool any(std::int64_t start, int tokens) const noexcept {
    if (any_first_ >= start + tokens || any_end_ <= start) return false;
    return softmax_->mask == nullptr || (common_run(start, tokens) & MaskRun::hidden) == 0;
  }
  // Whether all rows see all of the block's tokens, just as they are.
  bool whole(std::int64_t start, int tokens) const noexcept {
    return !limited_ && tokens == kTileTokens && all_first_ <= start &&
           all_end_ >= start + kTileTokens &&
           (softmax_->mask == nullptr || (common_run(start, tokens) & MaskRun::zeros) != 0);
  }

 private:
  // What the masks of all rows add.
  std::uint8_t common_run(std::int64_t start, int tokens) const noexcept {
    return mask_run(*softmax_, softmax_->rows, start, tokens);
  }

  using Limits = std::numeric_limits<std::int64_t>;
  const Softmax* softmax_ = nullptr;
  bool limited_ = false;
  std::int64_t any_first_ = Limits::max();
  std::int64_t any_end_ = Limits::min();
  std::int64_t all_first_ = Limits::min();
  std::int64_t all_end_ = Limits::max();
};

// Soft cap, mask and range of one row's scores. `start`: the block's first token among those given.
inline void limit(const Softmax& softmax, int row, std::int64_t start, int tokens,
                  RowVecs& vecs) noexcept {
  alignas(64) float scores[kTileTokens];
  store_row(scores, vecs);
  if (softmax.soft_cap > 0.0F) {
    const float outer = softmax.soft_cap * kLog2E;
    for (int t = 0; t < kTileTokens; ++t) scores[t] = tanh_lane(scores[t]) * outer;
  }
  const std::uint8_t run = softmax.mask == nullptr ? std::uint8_t{MaskRun::zeros}
                                                   : mask_run(softmax, row, start, tokens);
  if (run == MaskRun::hidden) {
    std::fill_n(scores, kTileTokens, -kInfinity);
  } else if (run == MaskRun::mixed) {
    const float* mask = softmax.mask + row * softmax.mask_stride + start;
    for (int t = 0; t < tokens; ++t) scores[t] = scores[t] + in_base_two(mask[t]);
  }
  const std::int64_t first = softmax.first[row] - start;
  const std::int64_t end = std::min<std::int64_t>(softmax.end[row] - start, tokens);
  for (int t = 0; t < kTileTokens; ++t) {
    if (t < first || t >= end) scores[t] = -kInfinity;
  }
  load_row(scores, vecs);
}

// How far above the largest score so far a new maximum is put: the next tokens' would soon exceed
// it a little, again and again, at the cost of a mispredicted branch and of scaling the output.
constexpr float kHeadroom = 4.0F;

// Puts a row's maximum kHeadroom above `largest`, and scales what was summed so far.
TQAI_NEVER_INLINE void raise_max(const Softmax& softmax, int row, float largest) noexcept {
  const float before = softmax.max[row];
  const float max = largest + kHeadroom;
  const float shrink = before == -kInfinity ? 0.0F : exp2_negative(before - max);
  softmax.max[row] = max;
  float* sums = softmax.sums[row];
  for (int i = 0; i < kLanes; ++i) sums[i] = sums[i] * shrink;
  float* output = softmax.output + row * softmax.output_stride;
  for (std::int64_t c = 0; c < softmax.output_stride; ++c) output[c] = output[c] * shrink;
}

// Raises a row's maximum where its scores are above it.
TQAI_ALWAYS_INLINE void bound(const Softmax& softmax, int row, const RowVecs& scores) noexcept {
  const FloatVec parts = largest_parts(scores);
  if (any_above(parts, softmax.max[row])) raise_max(softmax, row, largest_of(parts));
}

// Rows that are weighed side by side where there are as many, and registers of them that powers are
// taken of at a time.
constexpr int kRowsTogether = kVectorLanes == 16 ? 2 : 1;
constexpr int kVecsTogether = kVectorLanes == 16 ? kRowsTogether * kRowVecs : 4;

// 2^(score − max), of rows `row` and on.
template <bool kRoughly, int kRows>
inline void raise_two(const Softmax& softmax, int row, RowVecs (&rows)[kRows]) noexcept {
  constexpr int kCount = std::min(kVecsTogether, kRows * kRowVecs);
  static_assert(kRows * kRowVecs % kCount == 0);
  for (int first = 0; first < kRows * kRowVecs; first += kCount) {
    FloatVec some[kCount];
    for (int i = 0; i < kCount; ++i) {
      const int r = (first + i) / kRowVecs;
      some[i] = rows[r][(first + i) % kRowVecs] - broadcast_float<FloatVec>(softmax.max[row + r]);
    }
    if constexpr (kRoughly) {
      exp2_rough(some);
    } else {
      exp2_negative(some);
    }
    for (int i = 0; i < kCount; ++i) rows[(first + i) / kRowVecs][(first + i) % kRowVecs] = some[i];
  }
}

// Turns one row's scores into 2^(score − max), and updates max and sums.
TQAI_ALWAYS_INLINE void weigh(const Softmax& softmax, int row, RowVecs (&vecs)[1]) noexcept {
  bound(softmax, row, vecs[0]);
  if (softmax.max[row] == -kInfinity) {  // nothing seen so far: −inf − (−inf) is no number
    for (FloatVec& vec : vecs[0]) vec = broadcast_float<FloatVec>(0.0F);
    return;
  }
  raise_two<false>(softmax, row, vecs);
  add_to_lanes(vecs[0], softmax.sums[row]);
}

// Where no four weights of a block, 16 tokens apart, sum up to more than this, all 64 are at most
// 2^-28, and what the row has seen is at least 2^-kHeadroom: 2^-24 of its sum, as fp32 rounds it.
constexpr float kNegligibleSum = 0x1p-32F;
static_assert(kLanes * kNegligibleSum <= 0x1p-24F / 16.0F && kHeadroom == 4.0F);

// The same of some rows, roughly; whether any row's weights matter. While nothing was seen sums are
// meaningless: raise_max clears them, and who merges states leaves out one without a maximum.
template <int kRows>
TQAI_ALWAYS_INLINE bool weigh_roughly(const Softmax& softmax, int row,
                                      RowVecs (&rows)[kRows]) noexcept {
  unrolled<kRows>([&](int r) { bound(softmax, row + r, rows[r]); });
  raise_two<true>(softmax, row, rows);
  FloatVec largest = add_to_lanes(rows[0], softmax.sums[row]);
  unrolled<kRows - 1>([&](int r) {
    largest = larger(largest, add_to_lanes(rows[r + 1], softmax.sums[row + r + 1]));
  });
  return any_above(largest, kNegligibleSum);
}

}  // namespace TQAI_LOCAL
}  // namespace tqai::kernels::TQAI_LEVEL_NAMESPACE

#endif  // TQAI_SOFTMAX_INL
