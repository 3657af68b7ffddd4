// Keys and their centres, a tile at a time: what is known of its keys, and what is taken from them
// or given back.
#ifndef TQAI_CENTRES_INL
#define TQAI_CENTRES_INL

#include <cstddef>

#include "conversions-inl.hpp"
#include "kernels.hpp"

namespace tqai::kernels::TQAI_LEVEL_NAMESPACE {
namespace TQAI_LOCAL {

template <DType kType>
inline void widen_registers(const void* from, std::int64_t count, float* __restrict to) noexcept {
  const auto* numbers = static_cast<const Number<kType>*>(from);
  std::int64_t i = 0;
  for (; i + kVectorLanes <= count; i += kVectorLanes) {
    store_floats(to + i, load_numbers<kType>(numbers + i));
  }
  widen(numbers + i, kType, static_cast<int>(count - i), to + i);
}

// Kernels::widen.
TQAI_INLINE void widen_all(const void* from, DType dtype, std::int64_t count, float* to) noexcept {
  switch (dtype) {
    case DType::f32: return widen_registers<DType::f32>(from, count, to);
    case DType::f16: return widen_registers<DType::f16>(from, count, to);
    case DType::bf16: return widen_registers<DType::bf16>(from, count, to);
  }
}

// Kernels::add_up. Four tokens to each visit of a sum, one after another.
TQAI_INLINE void add_up(const float* rows, int dim, double* __restrict sums,
                        double* __restrict squares) noexcept {
  constexpr int kRows = 4;
  for (int t = 0; t < kTileTokens; t += kRows) {
    const float* row = rows + static_cast<std::ptrdiff_t>(t) * dim;
    for (int c = 0; c < dim; ++c) {
      double sum = sums[c];
      double square = squares[c];
      for (int r = 0; r < kRows; ++r) {
        const auto value = static_cast<double>(row[static_cast<std::ptrdiff_t>(r) * dim + c]);
        sum = sum + value;
        square = square + value * value;
      }
      sums[c] = sum;
      squares[c] = square;
    }
  }
}

// Two coordinates of pairs f … f + kVectorLanes − 1.
struct PairVecs {
  FloatVec first;
  FloatVec second;
};

template <bool kInterleaved>
inline PairVecs load_pairs(const float* row, int pairs, int f) noexcept {
  if constexpr (!kInterleaved) {
    return {load_floats(row + f), load_floats(row + pairs + f)};
  } else {
    float first[kVectorLanes];
    float second[kVectorLanes];
    for (int i = 0; i < kVectorLanes; ++i) {
      first[i] = row[2 * (f + i)];
      second[i] = row[2 * (f + i) + 1];
    }
    return {load_floats(first), load_floats(second)};
  }
}

template <bool kInterleaved>
inline void turn_tile_back(const TileTurns& turns, const float* rows, int dim,
                           float* turned) noexcept {
  const int pairs = turns.pair_count;
  const auto row = [&](int t) { return rows + static_cast<std::ptrdiff_t>(t) * dim; };
  int f = 0;
  for (; f + kVectorLanes <= pairs; f += kVectorLanes) {
    FloatVec sums[4] = {};
    for (int j = 0; j < kTileTokens / 2; ++j) {
      const float* table = turns.distances + static_cast<std::ptrdiff_t>(j) * 2 * pairs + f;
      const FloatVec cosines = load_floats(table);
      const FloatVec sines = load_floats(table + pairs);
      const PairVecs after = load_pairs<kInterleaved>(row(kTileTokens / 2 + j), pairs, f);
      const PairVecs before = load_pairs<kInterleaved>(row(kTileTokens / 2 - 1 - j), pairs, f);
      sums[0] = sums[0] + (after.first + before.first) * cosines;
      sums[1] = sums[1] + (after.second - before.second) * sines;
      sums[2] = sums[2] + (after.second + before.second) * cosines;
      sums[3] = sums[3] + (after.first - before.first) * sines;
    }
    store_floats(turned + f, sums[0] + sums[1]);
    store_floats(turned + pairs + f, sums[2] - sums[3]);
  }
  for (; f < pairs; ++f) {
    const int first = kInterleaved ? 2 * f : f;
    const int second = kInterleaved ? 2 * f + 1 : pairs + f;
    float sums[4] = {};
    for (int j = 0; j < kTileTokens / 2; ++j) {
      const float* table = turns.distances + static_cast<std::ptrdiff_t>(j) * 2 * pairs + f;
      const float* after = row(kTileTokens / 2 + j);
      const float* before = row(kTileTokens / 2 - 1 - j);
      sums[0] = sums[0] + (after[first] + before[first]) * table[0];
      sums[1] = sums[1] + (after[second] - before[second]) * table[pairs];
      sums[2] = sums[2] + (after[second] + before[second]) * table[0];
      sums[3] = sums[3] + (after[first] - before[first]) * table[pairs];
    }
    turned[f] = sums[0] + sums[1];
    turned[pairs + f] = sums[2] - sums[3];
  }
}

// Kernels::turn_back: by pairs of distances ± (j + 1/2) from the middle.
TQAI_INLINE void turn_back(const TileTurns& turns, const float* rows, int dim,
                           float* turned) noexcept {
  if (turns.interleaved) {
    turn_tile_back<true>(turns, rows, dim, turned);
  } else {
    turn_tile_back<false>(turns, rows, dim, turned);
  }
}

// Of the tokens at distances ± (j + 1/2): m · e^(± i (j + 1/2) ω) times `factor`. Pairs whose mean
// is nothing keep the sign of a zero.
template <bool kInterleaved>
inline void add_turned(const TileTurns& turns, const float* middles, float factor, int j,
                       float* __restrict after, float* __restrict before) noexcept {
  constexpr int kApart = kInterleaved ? 2 : 1;
  const int pairs = turns.pair_count;
  const int second = kInterleaved ? 1 : pairs;
  const float* __restrict real = middles;
  const float* __restrict imaginary = middles + pairs;
  const float* __restrict cosines = turns.distances + static_cast<std::ptrdiff_t>(j) * 2 * pairs;
  const float* __restrict sines = cosines + pairs;
  for (int f = 0; f < pairs; ++f) {
    const float a = real[f] * cosines[f];
    const float b = imaginary[f] * sines[f];
    const float c = real[f] * sines[f];
    const float d = imaginary[f] * cosines[f];
    const bool none = real[f] == 0.0F && imaginary[f] == 0.0F;
    float* x = after + static_cast<std::ptrdiff_t>(kApart) * f;
    float* y = before + static_cast<std::ptrdiff_t>(kApart) * f;
    const float sums[4] = {x[0] + factor * (a - b), x[second] + factor * (c + d),
                           y[0] + factor * (a + b), y[second] + factor * (d - c)};
    x[0] = none ? x[0] : sums[0];
    x[second] = none ? x[second] : sums[1];
    y[0] = none ? y[0] : sums[2];
    y[second] = none ? y[second] : sums[3];
  }
}

// Kernels::add_centre.
TQAI_INLINE void add_centre(const float* constant, const TileTurns& turns, const float* middles,
                            float factor, int dim, float* rows) noexcept {
  const auto row = [&](int t) { return rows + static_cast<std::ptrdiff_t>(t) * dim; };
  for (int t = 0; t < kTileTokens; ++t) {
    float* __restrict to = row(t);
    const float* __restrict from = constant;
    for (int c = 0; c < dim; ++c) to[c] = to[c] + factor * from[c];
  }
  if (middles == nullptr) return;
  for (int j = 0; j < kTileTokens / 2; ++j) {
    float* after = row(kTileTokens / 2 + j);
    float* before = row(kTileTokens / 2 - 1 - j);
    if (turns.interleaved) {
      add_turned<true>(turns, middles, factor, j, after, before);
    } else {
      add_turned<false>(turns, middles, factor, j, after, before);
    }
  }
}

}  // namespace TQAI_LOCAL
}  // namespace tqai::kernels::TQAI_LEVEL_NAMESPACE

#endif  // TQAI_CENTRES_INL
