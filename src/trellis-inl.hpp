// The nearest paths through a trellis (Viterbi), kPathLanes sequences side by side in 16-bit lanes:
// whole numbers, so that every inclusion finds the same paths. No namespace, no guard and no
// includes: see rotate-inl.hpp. Whoever includes it says how many lanes a register has,
// kShortLanes.

constexpr int kPathLanes = 32;
constexpr int kWindowBits = 8;

// Targets are 16-bit multiples of 1/kTargetScale of a level, up to kTargetLimit levels from 0,
// which is beyond all levels: differences to levels fit into 16 bits. Their squares by 2^15,
// rounded, are what a path costs: a level's square is 1.6 of it.
constexpr int kTargetLimit = 80;
constexpr int kTargetScale = 32767 / (kTargetLimit + kMaxNarrowLevel);
// Costs begin here, and paths that cost so much more than the best one that they are above −1 are
// equally bad: then sums fit into 16 bits.
constexpr std::int16_t kLeastCost = -32768;
constexpr std::int16_t kMostCost = -1;

// value in levels
inline std::int16_t target_of(float value) noexcept {
  constexpr auto kLimit = static_cast<float>(kTargetLimit);
  const float above = value < -kLimit ? -kLimit : value;
  const float within = above > kLimit ? kLimit : above;
  // Positive, as conversions cut off.
  constexpr auto kShift = static_cast<float>(kTargetLimit * kTargetScale);
  const float scaled = within * static_cast<float>(kTargetScale) + (kShift + 0.5F);
  return static_cast<std::int16_t>(static_cast<int>(scaled) - kTargetLimit * kTargetScale);
}

using PathRow = std::int16_t[kPathLanes];

constexpr int kPathLevels = 2 * kMaxNarrowLevel + 1;
constexpr int kMostStates = 1 << (kWindowBits - 1);
// States whose decisions share a row: 4 bits each.
constexpr int kPathStates = 4;

// In the callers' working memory; decisions follow, [steps, states / kPathStates, kPathLanes].
struct PathScratch {
  alignas(64) PathRow costs[2][kMostStates];
  alignas(64) PathRow distances[kPathLevels];  // of a step, by level
  alignas(64) PathRow scaled[kPathLevels];     // levels that windows have, in all lanes
  alignas(64) PathRow least;                   // of the costs of the step before, from kLeastCost
  std::uint8_t places[kPathLevels];            // of these levels in `distances`
  std::uint8_t level_count;
  std::uint16_t distance_of[1 << kWindowBits];  // of a window: where that of its level is, in lanes
  std::uint8_t starts[kPathLanes];              // of rings
  std::uint8_t states[kPathLanes];              // of the paths while they are gone back
};

// Steps before and after the seam, which decide the state there: 8 windows side by side.
constexpr int seam_steps(int bits) noexcept { return 64 / bits; }

// Rings of so many steps are mostly seam.
constexpr int kShortRing = 16;

constexpr std::size_t path_bytes(int steps, int bits) noexcept {
  const int most = steps > 2 * seam_steps(bits) ? steps : 2 * seam_steps(bits);
  return sizeof(PathScratch) + static_cast<std::size_t>(most) *
                                   (std::size_t{1} << (kWindowBits - bits)) / kPathStates *
                                   sizeof(PathRow);
}

#if defined(__GNUC__)
template <int kCount>
using Shorts [[gnu::vector_size(2 * kCount)]] = std::int16_t;
#else
template <int kCount>
struct Shorts {
  std::int16_t lanes[kCount];
};
#endif
using ShortVec = Shorts<kShortLanes>;

inline ShortVec load_shorts(const std::int16_t* from) noexcept {
  ShortVec vec;
  std::memcpy(&vec, from, sizeof vec);
  return vec;
}
inline void store_shorts(std::int16_t* to, ShortVec vec) noexcept {
  std::memcpy(to, &vec, sizeof vec);
}
#if defined(__GNUC__)
inline ShortVec broadcast_short(std::int16_t value) noexcept { return value - ShortVec{}; }
inline ShortVec add_shorts(ShortVec a, ShortVec b) noexcept { return a + b; }
inline ShortVec subtract_shorts(ShortVec a, ShortVec b) noexcept { return a - b; }
inline ShortVec least_shorts(ShortVec a, ShortVec b) noexcept { return a < b ? a : b; }
template <int kBits>
inline ShortVec join_shorts(ShortVec low, ShortVec high) noexcept {
  return low | high << kBits;
}
// The lesser of two costs, and its number.
inline void keep_lesser(ShortVec cost, ShortVec number, ShortVec& least,
                        ShortVec& chosen) noexcept {
  chosen = cost < least ? number : chosen;
  least = cost < least ? cost : least;
}
#else
template <typename Function>
inline ShortVec each_short(const Function& function) noexcept {
  ShortVec vec;
  for (int i = 0; i < kShortLanes; ++i) vec.lanes[i] = static_cast<std::int16_t>(function(i));
  return vec;
}
inline ShortVec broadcast_short(std::int16_t value) noexcept {
  return each_short([&](int) { return value; });
}
inline ShortVec add_shorts(ShortVec a, ShortVec b) noexcept {
  return each_short([&](int i) { return a.lanes[i] + b.lanes[i]; });
}
inline ShortVec subtract_shorts(ShortVec a, ShortVec b) noexcept {
  return each_short([&](int i) { return a.lanes[i] - b.lanes[i]; });
}
inline ShortVec least_shorts(ShortVec a, ShortVec b) noexcept {
  return each_short([&](int i) { return a.lanes[i] < b.lanes[i] ? a.lanes[i] : b.lanes[i]; });
}
template <int kBits>
inline ShortVec join_shorts(ShortVec low, ShortVec high) noexcept {
  return each_short([&](int i) { return low.lanes[i] | high.lanes[i] << kBits; });
}
inline void keep_lesser(ShortVec cost, ShortVec number, ShortVec& least,
                        ShortVec& chosen) noexcept {
  for (int i = 0; i < kShortLanes; ++i) {
    if (cost.lanes[i] >= least.lanes[i]) continue;
    chosen.lanes[i] = number.lanes[i];
    least.lanes[i] = cost.lanes[i];
  }
}
#endif

inline void list_levels(const Trellis& trellis, PathScratch& scratch) noexcept {
  bool used[kPathLevels] = {};
  for (unsigned window = 0; window < 1U << kWindowBits; ++window) {
    const int place = trellis.level(window) + kMaxNarrowLevel;
    scratch.distance_of[window] = static_cast<std::uint16_t>(place * kPathLanes);
    used[place] = true;
  }
  scratch.level_count = 0;
  for (int place = 0; place < kPathLevels; ++place) {
    if (!used[place]) continue;
    const auto scaled = static_cast<std::int16_t>((place - kMaxNarrowLevel) * kTargetScale);
    std::fill_n(scratch.scaled[scratch.level_count], kPathLanes, scaled);
    scratch.places[scratch.level_count++] = static_cast<std::uint8_t>(place);
  }
}

inline void measure_distances(const std::int16_t* targets, PathScratch& scratch) noexcept {
  PathRow near;  // what is written cannot be this
  std::memcpy(near, targets, sizeof near);
  for (int l = 0; l < scratch.level_count; ++l) {
    const std::int16_t* __restrict scaled = scratch.scaled[l];
    std::int16_t* __restrict to = scratch.distances[scratch.places[l]];
    for (int i = 0; i < kPathLanes; ++i) {
      const auto difference = static_cast<std::int16_t>(near[i] - scaled[i]);
      // As an instruction of most processors has it.
      to[i] = static_cast<std::int16_t>(((difference * difference >> 14) + 1) >> 1);
    }
  }
}

// What reaches the states q, q + states / 4 …, `lane` and on: of the 2^kBits windows that end in a
// state, which begin in states side by side. kDecide: whether which ones is kept.
template <int kBits, bool kDecide>
inline void choose_windows(const PathScratch& scratch, const PathRow* before, int q, int lane,
                           PathRow* after, PathRow* decisions, ShortVec& least) noexcept {
  constexpr int kStates = 1 << (kWindowBits - kBits);
  constexpr int kInto = 1 << kBits;
  constexpr int kStride = kStates / kPathStates;
  const PathRow* from[kPathStates];
  const std::uint16_t* distances[kPathStates];
  ShortVec best[kPathStates];
  ShortVec chosen[kPathStates];
  for (int j = 0; j < kPathStates; ++j) {
    const int window = (q + j * kStride) * kInto;
    from[j] = before + (window & (kStates - 1));
    distances[j] = scratch.distance_of + window;
    best[j] = add_shorts(load_shorts(from[j][0] + lane),
                         load_shorts(scratch.distances[0] + distances[j][0] + lane));
    chosen[j] = broadcast_short(0);
  }
  for (int h = 1; h < kInto; ++h) {
    const ShortVec number = broadcast_short(static_cast<std::int16_t>(h));
    for (int j = 0; j < kPathStates; ++j) {
      const ShortVec cost = add_shorts(load_shorts(from[j][h] + lane),
                                       load_shorts(scratch.distances[0] + distances[j][h] + lane));
      if constexpr (kDecide) {
        keep_lesser(cost, number, best[j], chosen[j]);
      } else {
        best[j] = least_shorts(cost, best[j]);
      }
    }
  }
  const ShortVec base = load_shorts(scratch.least + lane);
  for (int j = 0; j < kPathStates; ++j) {
    const ShortVec cost = least_shorts(subtract_shorts(best[j], base), broadcast_short(kMostCost));
    least = least_shorts(least, cost);
    store_shorts(after[q + j * kStride] + lane, cost);
  }
  if constexpr (kDecide) {
    store_shorts(decisions[q] + lane, join_shorts<8>(join_shorts<4>(chosen[0], chosen[1]),
                                                     join_shorts<4>(chosen[2], chosen[3])));
  }
}

// Levels of one ring of codes, `stride` apart; of at least 8 bits.
template <typename Number>
inline void find_levels(const Trellis& trellis, const std::uint8_t* codes, std::ptrdiff_t stride,
                        int steps, Number* levels) noexcept {
  const int top = kWindowBits - trellis.bits;
  unsigned window = 0;
  for (int step = steps - (kWindowBits + trellis.bits - 1) / trellis.bits; step < steps; ++step) {
    window = window >> trellis.bits | unsigned{codes[step * stride]} << top;
  }
  for (int step = 0; step < steps; ++step) {
    window = window >> trellis.bits | unsigned{codes[step * stride]} << top;
    levels[step * stride] = static_cast<Number>(trellis.level(window));
  }
}

template <int kBits>
struct Paths {
  static constexpr int kStates = 1 << (kWindowBits - kBits);
  static constexpr int kRows = kStates / kPathStates;

  const Trellis& trellis;
  PathScratch& scratch;
  const std::int16_t* targets;  // [steps, stride]
  std::ptrdiff_t stride;
  int steps;

  PathRow* decisions(int step) const noexcept {
    return reinterpret_cast<PathRow*>(&scratch + 1) + static_cast<std::ptrdiff_t>(step) * kRows;
  }

  // Steps until `count`, from step `first` of a ring, after costs[0]; decisions of those from
  // `decided` on. Returns what it costs to end in each state.
  const PathRow* search(int first, int decided, int count) const noexcept {
    std::memset(scratch.least, 0, sizeof scratch.least);
    for (int step = 0; step < decided; ++step) go_on<false>(first, step);
    for (int step = decided; step < count; ++step) go_on<true>(first, step);
    return scratch.costs[count % 2];
  }

  template <bool kDecide>
  void go_on(int first, int step) const noexcept {
    measure_distances(targets + (first + step) % steps * stride, scratch);
    const PathRow* before = scratch.costs[step % 2];
    PathRow* after = scratch.costs[1 - step % 2];
    PathRow* to = decisions(step);
    for (int lane = 0; lane < kPathLanes; lane += kShortLanes) {
      ShortVec least = broadcast_short(kMostCost);
      for (int q = 0; q < kRows; ++q) {
        choose_windows<kBits, kDecide>(scratch, before, q, lane, after, to, least);
      }
      store_shorts(scratch.least + lane, subtract_shorts(least, broadcast_short(kLeastCost)));
    }
  }

  // Goes from scratch.states, after a step, to those before it: all paths side by side, as each has
  // to wait for memory. windows: those between; null: not wanted.
  void go_back(int step, std::uint8_t* windows) const noexcept {
    const PathRow* chosen = decisions(step);
    for (int lane = 0; lane < kPathLanes; ++lane) {
      const unsigned state = scratch.states[lane];
      const unsigned numbers = static_cast<std::uint16_t>(chosen[state % unsigned{kRows}][lane]);
      const unsigned number = numbers >> (4 * (state / unsigned{kRows})) & 15U;
      const unsigned window = state << kBits | number;
      if (windows != nullptr) windows[lane] = static_cast<std::uint8_t>(window);
      scratch.states[lane] = static_cast<std::uint8_t>(window & unsigned{kStates - 1});
    }
  }

  // The states between the last step and the first one, by the paths around that place.
  void find_starts() const noexcept {
    constexpr int kSeam = seam_steps(kBits);
    std::fill_n(scratch.costs[0][0], kStates * kPathLanes, kLeastCost);
    const PathRow* costs = search((steps - kSeam % steps) % steps, kSeam, 2 * kSeam);
    PathRow least;
    PathRow best = {};
    std::memcpy(least, costs[0], sizeof least);
    for (int state = 1; state < kStates; ++state) {
      for (int lane = 0; lane < kPathLanes; ++lane) {
        best[lane] =
            costs[state][lane] < least[lane] ? static_cast<std::int16_t>(state) : best[lane];
        least[lane] = costs[state][lane] < least[lane] ? costs[state][lane] : least[lane];
      }
    }
    for (int lane = 0; lane < kPathLanes; ++lane) {
      scratch.states[lane] = static_cast<std::uint8_t>(best[lane]);
    }
    for (int step = 2 * kSeam - 1; step >= kSeam; --step) go_back(step, nullptr);
    std::memcpy(scratch.starts, scratch.states, sizeof scratch.starts);
  }

  // Codes of the paths that leave scratch.starts and come back to them. codes: `apart` a step.
  void find_rings(std::uint8_t* codes, std::ptrdiff_t apart) const noexcept {
    for (int state = 0; state < kStates; ++state) {
      for (int i = 0; i < kPathLanes; ++i) {
        scratch.costs[0][state][i] = state == scratch.starts[i] ? kLeastCost : kMostCost;
      }
    }
    search(0, 0, steps);
    std::memcpy(scratch.states, scratch.starts, sizeof scratch.states);
    for (int step = steps - 1; step >= 0; --step) {
      std::uint8_t windows[kPathLanes];
      go_back(step, windows);
      for (int lane = 0; lane < kPathLanes; ++lane) {
        codes[step * apart + lane] =
            static_cast<std::uint8_t>(windows[lane] >> (kWindowBits - kBits));
      }
    }
  }

  // The best of all starts.
  void find_short_rings(std::uint8_t* codes) const noexcept {
    std::uint8_t tried[kShortRing][kPathLanes];
    std::int16_t levels[kShortRing][kPathLanes];
    std::int64_t least[kPathLanes];
    for (int start = 0; start < kStates; ++start) {
      std::memset(scratch.starts, start, sizeof scratch.starts);
      find_rings(tried[0], kPathLanes);
      for (int lane = 0; lane < kPathLanes; ++lane) {
        find_levels(trellis, tried[0] + lane, kPathLanes, steps, levels[0] + lane);
        std::int64_t distance = 0;
        for (int step = 0; step < steps; ++step) {
          const int difference = targets[step * stride + lane] - levels[step][lane] * kTargetScale;
          distance += std::int64_t{difference} * difference;
        }
        if (start > 0 && distance >= least[lane]) continue;
        least[lane] = distance;
        for (int step = 0; step < steps; ++step) codes[step * stride + lane] = tried[step][lane];
      }
    }
  }

  // codes: [steps, stride]
  void find(std::uint8_t* codes) const noexcept {
    if (steps <= kShortRing) return find_short_rings(codes);
    find_starts();
    find_rings(codes, stride);
  }
};

// Codes of kPathLanes sequences, whose windows stand for levels near their targets. targets:
// [steps, stride], of target_of; codes: as these; memory: path_bytes, 64-byte aligned. O(steps ·
// 256) a lane: a ring has no ends, so that its seam is searched first, or all that may be there
// where the ring is short.
inline void find_codes(const Trellis& trellis, const std::int16_t* targets, std::ptrdiff_t stride,
                       int steps, std::uint8_t* codes, std::byte* memory) noexcept {
  PathScratch& scratch = *new (memory) PathScratch;
  list_levels(trellis, scratch);
  switch (trellis.bits) {
    case 1: return Paths<1>{trellis, scratch, targets, stride, steps}.find(codes);
    case 2: return Paths<2>{trellis, scratch, targets, stride, steps}.find(codes);
    case 3: return Paths<3>{trellis, scratch, targets, stride, steps}.find(codes);
    default: return Paths<4>{trellis, scratch, targets, stride, steps}.find(codes);
  }
}
