// Keys in trellis codes, in a learnt basis: the search for codes in a closed loop, and their
// levels. 16 tokens side by side in lanes, at two or three norms each.
//
// What a path's next coordinate has to be depends on all levels before it, so that each path that
// is still open, one for each state, has a closed loop of its own (per-survivor processing: Raheli,
// Polydoros and Tzou, IEEE Transactions on Communications 43, 1995). Paths that are open have all
// but their last levels in common, mostly: a few coordinates back the best one's levels are taken
// for good, and paths that disagree are closed.
//
// Levels that are open are bytes, four successive coordinates to a word, and what L says of them is
// a sum of products of bytes: L's entries next to the diagonal are rounded to 1/127 of their row's
// largest. The search alone reads these; norms are those of exact products.
#ifndef TQAI_KEY_PATHS_INL
#define TQAI_KEY_PATHS_INL

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>

#include "encode-inl.hpp"
#include "feedback-inl.hpp"

namespace tqai::kernels::TQAI_LEVEL_NAMESPACE {
namespace TQAI_LOCAL {

// Coordinates of a word.
constexpr int kPathBlock = 4;
// Words of a path: of the coordinates that are coded now, and of those before them that are open.
constexpr int kOpenWords = 6;
// Levels as bytes above 0.
constexpr int kLevelOffset = 64;
constexpr int kLevelBits = 7;

// Norms that paths are searched for, beside the one that suits a plain loop best. The last is for
// keys that go beyond the outermost levels, whose errors are many times the others' at 3 and 4
// bits.
constexpr int kMostPathNorms = 3;
constexpr float kTriedPathNorms[kMostPathNorms] = {0.92F, 1.08F, 1.3F};
constexpr int path_norms(int bits) noexcept { return bits == 2 ? 2 : kMostPathNorms; }
constexpr int kMostPathLanes = kMostPathNorms * kLanes;

#if defined(__GNUC__)
template <int kCount>
using Ints [[gnu::vector_size(4 * kCount)]] = std::int32_t;
#else
template <int kCount>
struct Ints {
  std::int32_t lanes[kCount];
};
#endif
using IntVec = Ints<kVectorLanes>;

inline IntVec load_ints(const std::int32_t* from) noexcept {
  IntVec vec;
  std::memcpy(&vec, from, sizeof vec);
  return vec;
}
inline void store_ints(std::int32_t* to, IntVec vec) noexcept { std::memcpy(to, &vec, sizeof vec); }
inline IntVec bits_of(FloatVec vec) noexcept {
  IntVec bits;
  std::memcpy(&bits, &vec, sizeof bits);
  return bits;
}
inline FloatVec floats_of(IntVec bits) noexcept {
  FloatVec vec;
  std::memcpy(&vec, &bits, sizeof vec);
  return vec;
}

#if defined(__GNUC__)
inline IntVec broadcast_int(std::int32_t value) noexcept { return value - IntVec{}; }
inline IntVec and_bits(IntVec a, std::int32_t mask) noexcept { return a & mask; }
inline IntVec or_bits(IntVec a, IntVec b) noexcept { return a | b; }
template <int kCount>
inline IntVec shift_down(IntVec a) noexcept {
  return a >> kCount;
}
inline IntVec shift_up(IntVec a, int bits) noexcept { return a << bits; }
inline IntVec lesser(IntVec a, IntVec b) noexcept { return a < b ? a : b; }
inline IntVec pick(IntVec number, std::int32_t wanted, IntVec that, IntVec other) noexcept {
  return number == broadcast_int(wanted) ? that : other;
}
inline FloatVec pick_equal(IntVec a, IntVec b, FloatVec that, FloatVec other) noexcept {
  return a == b ? that : other;
}
inline FloatVec to_floats(IntVec vec) noexcept { return __builtin_convertvector(vec, FloatVec); }
#else
template <typename Function>
inline IntVec each_int(const Function& function) noexcept {
  IntVec vec;
  for (int i = 0; i < kVectorLanes; ++i) vec.lanes[i] = function(i);
  return vec;
}
inline IntVec broadcast_int(std::int32_t value) noexcept {
  return each_int([&](int) { return value; });
}
inline IntVec and_bits(IntVec a, std::int32_t mask) noexcept {
  return each_int([&](int i) { return a.lanes[i] & mask; });
}
inline IntVec or_bits(IntVec a, IntVec b) noexcept {
  return each_int([&](int i) { return a.lanes[i] | b.lanes[i]; });
}
template <int kCount>
inline IntVec shift_down(IntVec a) noexcept {
  return each_int([&](int i) { return a.lanes[i] >> kCount; });
}
inline IntVec shift_up(IntVec a, int bits) noexcept {
  return each_int([&](int i) { return a.lanes[i] << bits; });
}
inline IntVec lesser(IntVec a, IntVec b) noexcept {
  return each_int([&](int i) { return a.lanes[i] < b.lanes[i] ? a.lanes[i] : b.lanes[i]; });
}
inline IntVec pick(IntVec number, std::int32_t wanted, IntVec that, IntVec other) noexcept {
  return each_int([&](int i) { return (number.lanes[i] == wanted ? that : other).lanes[i]; });
}
inline FloatVec pick_equal(IntVec a, IntVec b, FloatVec that, FloatVec other) noexcept {
  for (int i = 0; i < kVectorLanes; ++i) {
    if (a.lanes[i] == b.lanes[i]) other.lanes[i] = that.lanes[i];
  }
  return other;
}
inline FloatVec to_floats(IntVec vec) noexcept {
  FloatVec floats;
  for (int i = 0; i < kVectorLanes; ++i) floats.lanes[i] = static_cast<float>(vec.lanes[i]);
  return floats;
}
#endif

// sums + the four products of each lane's bytes with those of `factors`. levels: of 0…127; factors:
// of ±127, so that two products add up in 16 bits.
inline IntVec add_byte_products(IntVec sums, IntVec levels, std::int32_t factors) noexcept {
#if defined(TQAI_X86) && TQAI_VECTOR_LANES == 16
  __m512i to;
  __m512i bytes;
  std::memcpy(&to, &sums, sizeof to);
  std::memcpy(&bytes, &levels, sizeof bytes);
  to = _mm512_dpbusd_epi32(to, bytes, _mm512_set1_epi32(factors));
  std::memcpy(&sums, &to, sizeof to);
  return sums;
#elif defined(TQAI_X86) && TQAI_VECTOR_LANES == 8
  __m256i to;
  __m256i bytes;
  std::memcpy(&to, &sums, sizeof to);
  std::memcpy(&bytes, &levels, sizeof bytes);
  const __m256i pairs = _mm256_maddubs_epi16(bytes, _mm256_set1_epi32(factors));
  to = _mm256_add_epi32(to, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
  std::memcpy(&sums, &to, sizeof to);
  return sums;
#elif defined(TQAI_NEON) && defined(__GNUC__)
  const int8x16_t bytes = vreinterpretq_s8_s32(int32x4_t(levels));
  const int8x8_t by = vreinterpret_s8_s32(vdup_n_s32(factors));
  const int32x4_t low = vpaddlq_s16(vmull_s8(vget_low_s8(bytes), by));
  const int32x4_t high = vpaddlq_s16(vmull_s8(vget_high_s8(bytes), by));
  return sums + IntVec(vpaddq_s32(low, high));
#elif defined(__GNUC__)
  using Shorts [[gnu::vector_size(sizeof(IntVec))]] = std::int16_t;
  const std::int32_t even = (factors << 24 >> 24 & 0xFFFF) | (factors << 8 >> 24) * 0x10000;
  const std::int32_t odd = (factors << 16 >> 24 & 0xFFFF) | (factors >> 24) * 0x10000;
  const IntVec pairs = IntVec(Shorts(levels & 0x00FF00FF) * Shorts(broadcast_int(even)) +
                              Shorts(levels >> 8 & 0x00FF00FF) * Shorts(broadcast_int(odd)));
  return sums + (pairs << 16 >> 16) + (pairs >> 16);
#else
  std::int8_t by[4];
  std::memcpy(by, &factors, sizeof by);
  for (int i = 0; i < kVectorLanes; ++i) {
    for (int k = 0; k < 4; ++k) sums.lanes[i] += (levels.lanes[i] >> (8 * k) & 127) * by[k];
  }
  return sums;
#endif
}

// In the callers' working memory.
struct KeyPathScratch {
  // Of paths, by the state that they end in; one of before, one of after a coordinate.
  alignas(64) float costs[2][kKeyStates][kMostPathLanes];
  // [register][state, word, lanes of a register]: bytes of levels, of block b in word b mod
  // kOpenWords
  alignas(64) std::int32_t words[2][kKeyStates * kOpenWords * path_norms(2) * kLanes];
  // L's row c where levels may be open, as `words` has these: bytes; what one of them stands for;
  // and what they say of levels that are all 0.
  std::int32_t factors[kMaxDim][kOpenWords];
  float factor_steps[kMaxDim];
  std::int32_t offsets[kMaxDim];
  float values[KeyTrellis::kWindows];       // of windows
  std::int32_t tags[KeyTrellis::kWindows];  // of windows: byte of the level, and lowest bits
  std::uint8_t codes[kKeyStates][1 << kLevelBits];  // of a level's byte after a state
};
static_assert(sizeof(KeyPathScratch) <= kKeyPathBytes);

// The search. lower: [dim, dim], L below its diagonal.
template <int kBits>
struct KeyPaths {
  static constexpr int kStates = 1 << (KeyTrellis::kWindowBits - kBits);
  static constexpr int kInto = 1 << kBits;                // windows that end in a state
  static constexpr int kFrom = std::min(kStates, kInto);  // states that these begin in
  static constexpr int kGroups = kStates / kFrom;         // of states, by where they are come from
  // What a cost's lowest bits give way to: a window's level, and its lowest bits.
  static constexpr std::int32_t kTagMask = (1 << (kLevelBits + kBits)) - 1;
  static_assert(kStates <= kKeyStates && kTagMask >= kStates - 1);
  // [tried norms, 16 tokens]
  static constexpr int kNorms = path_norms(kBits);
  static constexpr int kPathLanes = kNorms * kLanes;
  using Row = float[kPathLanes];
  static_assert(kStates * kNorms <= kKeyStates * path_norms(2));
  static constexpr float kClosed = 1e30F;  // more than any path costs
  using Words = std::int32_t[kStates][kOpenWords][kVectorLanes];

  const KeyTrellis& trellis;
  const float* lower;
  int dim;
  float step;
  KeyPathScratch& scratch;

  // What does not depend on keys.
  void prepare() const noexcept {
    for (int window = 0; window < KeyTrellis::kWindows; ++window) {
      const int level = trellis.levels[static_cast<std::size_t>(window)];
      const int byte = level + kLevelOffset;
      scratch.values[window] = static_cast<float>(level) * step;
      scratch.tags[window] = (window & (kInto - 1)) << kLevelBits | byte;
      scratch.codes[window & (kStates - 1)][byte] =
          static_cast<std::uint8_t>(window >> (KeyTrellis::kWindowBits - kBits));
    }
    for (int c = 0; c < dim; ++c) prepare_row(c);
  }

  void prepare_row(int c) const noexcept {
    const float* row = lower + static_cast<std::ptrdiff_t>(c) * dim;
    const int open = first_open(c / kPathBlock);
    float most = 0.0F;
    for (int j = open; j < c; ++j) most = std::max(most, std::abs(row[j]));
    const float inverse = most > 0.0F ? 127.0F / most : 0.0F;
    std::int8_t bytes[kOpenWords][kPathBlock] = {};
    int sum = 0;
    for (int j = open; j < c; ++j) {
      const float scaled = row[j] * inverse;
      const int factor = static_cast<int>(scaled + (scaled < 0.0F ? -0.5F : 0.5F));
      bytes[j / kPathBlock % kOpenWords][j % kPathBlock] = static_cast<std::int8_t>(factor);
      sum += factor;
    }
    std::memcpy(scratch.factors[c], bytes, sizeof bytes);
    scratch.factor_steps[c] = most * (1.0F / 127.0F) * step;
    scratch.offsets[c] = -kLevelOffset * sum;
  }

  // The first coordinate whose level is open while a block is coded.
  static int first_open(int block) noexcept {
    return std::max(block - (kOpenWords - 1), 0) * kPathBlock;
  }

  Words& words(int coded, int lane) const noexcept {
    return *reinterpret_cast<Words*>(scratch.words[coded % 2] + kStates * kOpenWords * lane);
  }

  // targets: y · factors. levels, bytes: of the paths that are found, [dim, kPathLanes]; bytes:
  // `apart` a coordinate.
  void find(const LaneRows& y, const float* factors, Row* levels, std::uint8_t* bytes,
            std::ptrdiff_t apart) const noexcept {
    for (int s = 0; s < kStates; ++s) {
      std::fill_n(scratch.costs[0][s], kPathLanes,
                  static_cast<unsigned>(s) == trellis.start ? 0.0F : kClosed);
    }
    std::fill_n(scratch.words[0], kStates * kOpenWords * kPathLanes, kLevelOffset * 0x01010101);
    const int blocks = (dim + kPathBlock - 1) / kPathBlock;
    for (int block = 0; block < blocks; ++block) {
      const int first = block * kPathBlock;
      const int count = std::min(kPathBlock, dim - first);
      alignas(64) Row feedback[kPathBlock];
      sum_taken(first, count, levels, feedback);
      for (int lane = 0; lane < kPathLanes; lane += kVectorLanes) {
        const FloatVec factor = load_floats(factors + lane);
        for (int c = first; c < first + count; ++c) {
          const FloatVec target = load_floats(y[c] + lane % kLanes) * factor;
          extend(c, lane, target - load_floats(feedback[c - first] + lane));
        }
        if (block + 1 >= kOpenWords) {
          take(first + count, lane, block + 1 - kOpenWords, levels, bytes, apart);
        }
      }
    }
    for (int lane = 0; lane < kPathLanes; lane += kVectorLanes) {
      const IntVec best = cheapest(dim, lane);
      for (int block = std::max(blocks + 1 - kOpenWords, 0); block < blocks; ++block) {
        store_levels(word_of(best, dim, lane, block), lane, block, levels, bytes, apart);
      }
    }
  }

  // What L says of a block's coordinates, of levels that are taken.
  void sum_taken(int first, int count, const Row* levels, Row* feedback) const noexcept {
    constexpr int kRows = kVectorLanes == 16 ? kPathBlock : 1;
    const int taken = first_open(first / kPathBlock);
    for (int r = 0; r < count; r += kRows) {
      multiply_leading<kRows>(lower + static_cast<std::ptrdiff_t>(first + r) * dim, dim, levels,
                              taken, std::min(kRows, count - r), feedback + r);
    }
  }

  // Each state's best path gets coordinate c's level. target: less what is known of it.
  void extend(int c, int lane, FloatVec target) const noexcept {
    const Words& before = words(c, lane);
    const float (&costs)[kKeyStates][kMostPathLanes] = scratch.costs[c % 2];
    FloatVec left[kStates];
    for (int s = 0; s < kStates; ++s) {
      IntVec sums = broadcast_int(scratch.offsets[c]);
      for (int k = 0; k < kOpenWords; ++k) {
        sums = add_byte_products(sums, load_ints(before[s][k]), scratch.factors[c][k]);
      }
      left[s] = target - scratch.factor_steps[c] * to_floats(sums);
    }
    for (int group = 0; group < kGroups; ++group) {
      IntVec best[kFrom];
      for (IntVec& each : best) each = broadcast_int(std::numeric_limits<std::int32_t>::max());
      for (int from = 0; from < kFrom; ++from) {
        const FloatVec rest_of = left[group * kFrom + from];
        const FloatVec cost_of = load_floats(costs[group * kFrom + from] + lane);
        for (int q = 0; q < kFrom; ++q) {
          for (int low = from; low < kInto; low += kFrom) {
            const int window = (group + kGroups * q) << kBits | low;
            const FloatVec rest = rest_of - broadcast_float<FloatVec>(scratch.values[window]);
            const IntVec cost = and_bits(bits_of(cost_of + rest * rest), ~kTagMask);
            best[q] = lesser(best[q], or_bits(cost, broadcast_int(scratch.tags[window])));
          }
        }
      }
      for (int q = 0; q < kFrom; ++q) {
        follow(c, lane, best[q], group + kGroups * q, &before[group * kFrom]);
      }
    }
  }

  // The path into a state goes on from one of kFrom.
  void follow(int c, int lane, IntVec best, int state,
              const std::int32_t (*from)[kOpenWords][kVectorLanes]) const noexcept {
    Words& after = words(c + 1, lane);
    store_floats(scratch.costs[(c + 1) % 2][state] + lane, floats_of(and_bits(best, ~kTagMask)));
    const IntVec number = and_bits(shift_down<kLevelBits>(best), kFrom - 1);
    const int now = c / kPathBlock % kOpenWords;
    for (int k = 0; k < kOpenWords; ++k) {
      IntVec kept = load_ints(from[0][k]);
      for (int f = 1; f < kFrom; ++f) kept = pick(number, f, load_ints(from[f][k]), kept);
      store_ints(after[state][k], kept);
    }
    const int place = c % kPathBlock;
    const IntVec level = and_bits(best, (1 << kLevelBits) - 1);
    store_ints(
        after[state][now],
        place == 0 ? level : or_bits(load_ints(after[state][now]), shift_up(level, 8 * place)));
  }

  // After `coded` coordinates the cheapest path's cost, and its state in the lowest bits.
  IntVec cheapest(int coded, int lane) const noexcept {
    IntVec least = broadcast_int(std::numeric_limits<std::int32_t>::max());
    for (int s = 0; s < kStates; ++s) {
      const IntVec cost = bits_of(load_floats(scratch.costs[coded % 2][s] + lane));
      least = lesser(least, or_bits(and_bits(cost, ~(kStates - 1)), broadcast_int(s)));
    }
    return least;
  }

  IntVec word_of(IntVec best, int coded, int lane, int block) const noexcept {
    const Words& now = words(coded, lane);
    const IntVec number = and_bits(best, kStates - 1);
    IntVec word = load_ints(now[0][block % kOpenWords]);
    for (int s = 1; s < kStates; ++s) {
      word = pick(number, s, load_ints(now[s][block % kOpenWords]), word);
    }
    return word;
  }

  // Takes the cheapest path's levels of a block for good.
  void take(int coded, int lane, int block, Row* levels, std::uint8_t* bytes,
            std::ptrdiff_t apart) const noexcept {
    const IntVec best = cheapest(coded, lane);
    const IntVec word = word_of(best, coded, lane, block);
    store_levels(word, lane, block, levels, bytes, apart);
    const FloatVec least = floats_of(and_bits(best, ~(kStates - 1)));
    const Words& now = words(coded, lane);
    for (int s = 0; s < kStates; ++s) {
      float* cost = scratch.costs[coded % 2][s] + lane;
      store_floats(cost, pick_equal(load_ints(now[s][block % kOpenWords]), word,
                                    load_floats(cost) - least, broadcast_float<FloatVec>(kClosed)));
    }
  }

  void store_levels(IntVec word, int lane, int block, Row* levels, std::uint8_t* bytes,
                    std::ptrdiff_t apart) const noexcept {
    const int first = block * kPathBlock;
    for (int c = first; c < std::min(first + kPathBlock, dim); ++c) {
      const IntVec byte = and_bits(word, (1 << kLevelBits) - 1);
      word = shift_down<8>(word);
      const FloatVec level = to_floats(byte) - broadcast_float<FloatVec>(kLevelOffset);
      store_floats(levels[c] + lane, step * level);
      std::int32_t numbers[kVectorLanes];
      store_ints(numbers, byte);
      for (int i = 0; i < kVectorLanes; ++i) {
        bytes[c * apart + lane + i] = static_cast<std::uint8_t>(numbers[i]);
      }
    }
  }

  // Makes codes of levels' bytes: of token i those at places[i].
  void to_codes(const int* places, std::uint8_t* bytes, std::ptrdiff_t apart) const noexcept {
    unsigned states[kLanes];
    std::fill_n(states, kLanes, trellis.start);
    for (int c = 0; c < dim; ++c) {
      for (int i = 0; i < kLanes; ++i) {
        std::uint8_t& at = bytes[c * apart + places[i]];
        at = scratch.codes[states[i]][at];
        const unsigned window = unsigned{at} << (KeyTrellis::kWindowBits - kBits) | states[i];
        states[i] = window >> kBits;
      }
    }
  }
};

}  // namespace TQAI_LOCAL
}  // namespace tqai::kernels::TQAI_LEVEL_NAMESPACE

#endif  // TQAI_KEY_PATHS_INL
