// A row of a tile, 64 floats, in registers.
#ifndef TQAI_TILE_ROW_INL
#define TQAI_TILE_ROW_INL

#include <utility>

#include "floats-inl.hpp"

namespace tqai::kernels::TQAI_LEVEL_NAMESPACE {
namespace TQAI_LOCAL {

constexpr int kRowVecs = kTileTokens / kVectorLanes;
using RowVecs = FloatVec[kRowVecs];

// body(0), … body(kCount − 1), each with a number that compilers know: what a loop indexes they may
// keep in memory.
template <int kCount, typename Body>
TQAI_ALWAYS_INLINE void unrolled(Body&& body) noexcept {
  [&]<int... kIndex>(std::integer_sequence<int, kIndex...>) {
    (body(kIndex), ...);
  }(std::make_integer_sequence<int, kCount>{});
}

inline void fill_row(float value, RowVecs& row) noexcept {
  for (FloatVec& vec : row) vec = broadcast_float<FloatVec>(value);
}
inline void load_row(const float* from, RowVecs& row) noexcept {
  for (int v = 0; v < kRowVecs; ++v) row[v] = load_floats(from + v * kVectorLanes);
}
inline void store_row(float* to, const RowVecs& row) noexcept {
  for (int v = 0; v < kRowVecs; ++v) store_floats(to + v * kVectorLanes, row[v]);
}

// The largest of a row, of numbers: lane i of the floats i, i + kVectorLanes…
inline FloatVec largest_parts(const RowVecs& row) noexcept {
  FloatVec vec = row[0];
  for (int v = 1; v < kRowVecs; ++v) vec = larger(vec, row[v]);
  return vec;
}

// sums[i] += the row's floats i, i + 16, i + 32 and i + 48, these in order. Returns the largest of
// what was added, lane by lane of a register.
inline FloatVec add_to_lanes(const RowVecs& row, float* sums) noexcept {
  constexpr int kStep = kLanes / kVectorLanes;
  FloatVec largest{};  // the first lanes replace it; GCC's thread sanitizer does not see that
  for (int i = 0; i < kStep; ++i) {
    FloatVec sum = row[i];
    for (int v = i + kStep; v < kRowVecs; v += kStep) sum = sum + row[v];
    largest = i == 0 ? sum : larger(largest, sum);
    float* to = sums + i * kVectorLanes;
    store_floats(to, load_floats(to) + sum);
  }
  return largest;
}

}  // namespace TQAI_LOCAL
}  // namespace tqai::kernels::TQAI_LEVEL_NAMESPACE

#endif  // TQAI_TILE_ROW_INL
