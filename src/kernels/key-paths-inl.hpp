// Keys in trellis codes, in a learnt basis: the search for codes in a closed loop, and their
// levels. 16 tokens side by side in lanes.
//
// What a path's next coordinate has to be depends on all levels before it, so that each path that
// is still open, one for each state, has a closed loop of its own (per-survivor processing: Raheli,
// Polydoros and Tzou, IEEE Transactions on Communications 43, 1995). Paths that are open have all
// but their last levels in common, mostly; kKeyLag coordinates back the best one's level is taken
// for good, and paths that disagree are closed.
#ifndef TQAI_KEY_PATHS_INL
#define TQAI_KEY_PATHS_INL

#include <algorithm>
#include <cstring>

#include "encode-inl.hpp"

namespace tqai::kernels::TQAI_LEVEL_NAMESPACE {
namespace TQAI_LOCAL {

constexpr int kKeyLag = 16;
// More than any path costs.
constexpr float kClosed = 1e30F;

// In the callers' working memory; decisions follow, [dim, states, kLanes].
struct KeyPathScratch {
  // [state, coordinate modulo kKeyLag, lanes of a register]; one of before, one of after a step
  alignas(64) float histories[2][kKeyStates][kKeyLag][kLanes];
  alignas(64) float values[KeyTrellis::kWindows];
  std::uint8_t states[kLanes];
};
static_assert(sizeof(KeyPathScratch) <= kKeyPathBytes);

#if defined(__GNUC__)
inline FloatVec pick(FloatVec number, float wanted, FloatVec that, FloatVec other) noexcept {
  return number == broadcast_float<FloatVec>(wanted) ? that : other;
}
inline FloatVec pick_less(FloatVec a, FloatVec b, FloatVec that, FloatVec other) noexcept {
  return a < b ? that : other;
}
#else
inline FloatVec pick(FloatVec number, float wanted, FloatVec that, FloatVec other) noexcept {
  for (int i = 0; i < kVectorLanes; ++i) {
    if (number.lanes[i] == wanted) other.lanes[i] = that.lanes[i];
  }
  return other;
}
inline FloatVec pick_less(FloatVec a, FloatVec b, FloatVec that, FloatVec other) noexcept {
  for (int i = 0; i < kVectorLanes; ++i) {
    if (a.lanes[i] < b.lanes[i]) other.lanes[i] = that.lanes[i];
  }
  return other;
}
#endif

// The search of kVectorLanes tokens, `lane` and on.
template <int kBits>
struct KeyPaths {
  static constexpr int kStates = 1 << (KeyTrellis::kWindowBits - kBits);
  static constexpr int kInto = 1 << kBits;                // windows that end in a state
  static constexpr int kFrom = std::min(kStates, kInto);  // states that these begin in
  static_assert(kStates <= kKeyStates);
  using History = float[kStates][kKeyLag][kVectorLanes];

  const KeyTrellis& trellis;
  const float* lower;  // [dim, dim], below its diagonal
  int dim;
  KeyPathScratch& scratch;

  std::uint8_t* decisions(int c) const noexcept {
    return reinterpret_cast<std::uint8_t*>(&scratch + 1) +
           static_cast<std::ptrdiff_t>(c) * (kStates * kLanes);
  }

  // targets: y · factors. levels: what those taken for good stand for.
  void search(const LaneRows& y, const float* factors, int lane, LaneRows& levels) const noexcept {
    auto* before = reinterpret_cast<History*>(scratch.histories[0]);
    auto* after = reinterpret_cast<History*>(scratch.histories[1]);
    FloatVec costs[kStates];
    for (int s = 0; s < kStates; ++s) {
      costs[s] =
          broadcast_float<FloatVec>(static_cast<unsigned>(s) == trellis.start ? 0.0F : kClosed);
    }
    const FloatVec factor = load_floats(factors + lane);
    int taken = 0;
    for (int c = 0; c < dim; ++c) {
      const float* row = lower + static_cast<std::ptrdiff_t>(c) * dim;
      FloatVec left[kStates];
      leave(row, taken, c, load_floats(y[c] + lane) * factor, lane, levels, *before, left);
      FloatVec best[kStates];
      extend(c, lane, taken, left, costs, *before, best, *after);
      std::memcpy(costs, best, sizeof costs);
      std::swap(before, after);
      if (c - taken + 1 == kKeyLag) take(taken++, lane, *before, costs, levels);
    }
    FloatVec least = costs[0];
    FloatVec state = broadcast_float<FloatVec>(0.0F);
    for (int s = 1; s < kStates; ++s) {
      state = pick_less(costs[s], least, broadcast_float<FloatVec>(static_cast<float>(s)), state);
      least = pick_less(costs[s], least, costs[s], least);
    }
    float found[kVectorLanes];
    store_floats(found, state);
    for (int i = 0; i < kVectorLanes; ++i) {
      scratch.states[lane + i] = static_cast<std::uint8_t>(found[i]);
    }
  }

  // What each path leaves of coordinate c, less what L says of those before.
  static void leave(const float* row, int taken, int c, FloatVec target, int lane,
                    const LaneRows& levels, const History& history,
                    FloatVec (&left)[kStates]) noexcept {
    constexpr int kSums = 4;  // one would wait for each addition
    FloatVec sums[kSums] = {};
    int j = 0;
    for (; j + kSums <= taken; j += kSums) {
      for (int k = 0; k < kSums; ++k) {
        sums[k] = sums[k] + row[j + k] * load_floats(levels[j + k] + lane);
      }
    }
    for (; j < taken; ++j) sums[0] = sums[0] + row[j] * load_floats(levels[j] + lane);
    target = target - ((sums[0] + sums[1]) + (sums[2] + sums[3]));
    for (int s = 0; s < kStates; ++s) left[s] = target;
    for (j = taken; j < c; ++j) {
      for (int s = 0; s < kStates; ++s) {
        left[s] = left[s] - row[j] * load_floats(history[s][j % kKeyLag]);
      }
    }
  }

  // The best windows into each state, and the paths that go through them.
  void extend(int c, int lane, int taken, const FloatVec (&left)[kStates],
              const FloatVec (&costs)[kStates], const History& before, FloatVec (&best)[kStates],
              History& after) const noexcept {
    for (int s = 0; s < kStates; ++s) {
      FloatVec chosen = broadcast_float<FloatVec>(0.0F);
      FloatVec value = chosen;
      best[s] = broadcast_float<FloatVec>(2.0F * kClosed);
      for (int low = 0; low < kInto; ++low) {
        const int window = s << kBits | low;
        const int from = window & (kStates - 1);
        const FloatVec level = broadcast_float<FloatVec>(scratch.values[window]);
        const FloatVec rest = left[from] - level;
        const FloatVec cost = costs[from] + rest * rest;
        chosen =
            pick_less(cost, best[s], broadcast_float<FloatVec>(static_cast<float>(low)), chosen);
        value = pick_less(cost, best[s], level, value);
        best[s] = pick_less(cost, best[s], cost, best[s]);
      }
      float numbers[kVectorLanes];
      store_floats(numbers, chosen);
      std::uint8_t* to = decisions(c) + s * kLanes + lane;
      for (int i = 0; i < kVectorLanes; ++i) {
        to[i] = static_cast<std::uint8_t>(static_cast<std::int32_t>(numbers[i]));
        numbers[i] = static_cast<float>(to[i] % kFrom);
      }
      const FloatVec number = load_floats(numbers);
      const int first = (s << kBits) & (kStates - 1);
      for (int j = taken; j < c; ++j) {
        const int at = j % kKeyLag;
        FloatVec kept = load_floats(before[first][at]);
        for (int from = 1; from < kFrom; ++from) {
          kept =
              pick(number, static_cast<float>(from), load_floats(before[first + from][at]), kept);
        }
        store_floats(after[s][at], kept);
      }
      store_floats(after[s][c % kKeyLag], value);
    }
  }

  // Takes the best path's level of coordinate c for good.
  static void take(int c, int lane, const History& history, FloatVec (&costs)[kStates],
                   LaneRows& levels) noexcept {
    const int at = c % kKeyLag;
    FloatVec least = costs[0];
    FloatVec level = load_floats(history[0][at]);
    for (int s = 1; s < kStates; ++s) {
      level = pick_less(costs[s], least, load_floats(history[s][at]), level);
      least = pick_less(costs[s], least, costs[s], least);
    }
    store_floats(levels[c] + lane, level);
    const FloatVec closed = broadcast_float<FloatVec>(kClosed);
    for (int s = 0; s < kStates; ++s) {
      const FloatVec own = load_floats(history[s][at]);
      costs[s] = pick_less(own, level, closed, costs[s]);
      costs[s] = pick_less(level, own, closed, costs[s]);
    }
  }

  // Codes of the paths that end in scratch.states, and what these stand for. codes: `apart` a
  // coordinate.
  void go_back(std::uint8_t* codes, std::ptrdiff_t apart, LaneRows& levels) const noexcept {
    for (int c = dim - 1; c >= 0; --c) {
      const std::uint8_t* chosen = decisions(c);
      for (int i = 0; i < kLanes; ++i) {
        const unsigned state = scratch.states[i];
        const unsigned window = state << kBits | chosen[state * kLanes + static_cast<unsigned>(i)];
        codes[c * apart + i] =
            static_cast<std::uint8_t>(window >> (KeyTrellis::kWindowBits - kBits));
        levels[c][i] = scratch.values[window];
        scratch.states[i] = static_cast<std::uint8_t>(window & unsigned{kStates - 1});
      }
    }
  }

  void find(const LaneRows& y, const float* factors, std::uint8_t* codes, std::ptrdiff_t apart,
            LaneRows& levels) const noexcept {
    for (int lane = 0; lane < kLanes; lane += kVectorLanes) search(y, factors, lane, levels);
    go_back(codes, apart, levels);
  }
};

// Codes of y · factors of 16 tokens, and levels, what these stand for.
inline void find_key_paths(const SegmentPlan& segment, const float* lower, int dim,
                           const LaneRows& y, const float* factors, std::uint8_t* codes,
                           std::ptrdiff_t apart, LaneRows& levels,
                           KeyPathScratch& scratch) noexcept {
  const KeyTrellis& trellis = *segment.key_trellis;
  for (int w = 0; w < KeyTrellis::kWindows; ++w) {
    scratch.values[w] =
        static_cast<float>(trellis.levels[static_cast<std::size_t>(w)]) * segment.step;
  }
  switch (trellis.bits) {
    case 2: return KeyPaths<2>{trellis, lower, dim, scratch}.find(y, factors, codes, apart, levels);
    case 3: return KeyPaths<3>{trellis, lower, dim, scratch}.find(y, factors, codes, apart, levels);
    default:
      return KeyPaths<4>{trellis, lower, dim, scratch}.find(y, factors, codes, apart, levels);
  }
}

}  // namespace TQAI_LOCAL
}  // namespace tqai::kernels::TQAI_LEVEL_NAMESPACE

#endif  // TQAI_KEY_PATHS_INL
