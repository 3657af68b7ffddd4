// A level's Parts, from its integer part.
#ifndef TQAI_PARTS_INL
#define TQAI_PARTS_INL

#include <algorithm>

#include "attend-inl.hpp"
#include "parts.hpp"

namespace tqai::kernels::TQAI_LEVEL_NAMESPACE {
namespace TQAI_LOCAL {

// Parts::score.
template <typename Integer>
void score(const SegmentPlan& segment, const std::uint8_t* codes, const std::int8_t* queries,
           int rows, std::int32_t* scores) noexcept {
  alignas(64) std::uint8_t words[kMaxRows * kMaxDim * Integer::kQueryBytes];
  RowConstants constants[kMaxRows];
  for (int first = 0; first < rows; first += kMaxRows) {
    const int block = std::min(kMaxRows, rows - first);
    Integer::prepare(segment, queries + static_cast<std::ptrdiff_t>(first) * segment.count, block,
                     words, constants);
    Integer::score(segment, codes, words, constants, block,
                   scores + static_cast<std::ptrdiff_t>(first) * kTileTokens, {});
  }
}

// Parts::accumulate.
template <typename Integer>
void accumulate(const SegmentPlan& segment, const std::uint8_t* codes, const std::uint8_t* weights,
                const float* steps, int rows, float* output, std::int64_t stride) noexcept {
  Integer::accumulate(segment, codes, weights, steps, rows, output, stride, {});
}

template <typename Integer>
constexpr Parts parts_of() noexcept {
  return {score<Integer>, accumulate<Integer>, add_rope};
}

}  // namespace TQAI_LOCAL
}  // namespace tqai::kernels::TQAI_LEVEL_NAMESPACE

#endif  // TQAI_PARTS_INL
