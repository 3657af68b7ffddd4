// The search for keys' codes of 2 bits at AVX-512: a token's 16 states are a register's lanes, so
// that paths follow one another by a permutation. With tokens in lanes, as key-paths-inl.hpp has
// them, each state's words are picked from four others', by loads and stores, and the search takes
// a third longer. Wider codes have more levels than states, and would gain nothing. The same paths.
#ifndef TQAI_KEY_STATE_LANES_INL
#define TQAI_KEY_STATE_LANES_INL

#include "key-paths-inl.hpp"

#if defined(TQAI_X86) && TQAI_VECTOR_LANES == 16
#define TQAI_KEY_STATE_LANES

namespace tqai::kernels::TQAI_LEVEL_NAMESPACE {
namespace TQAI_LOCAL {

struct KeyStateLanes : KeyPaths<2> {
  static constexpr int kBits = 2;
  static_assert(kStates == 16 && kGroups * kFrom == kStates && kInto == kFrom);
  // Tokens whose chains of operations run side by side; more do not fit the registers.
  static constexpr int kPair = 2;
  using Words = std::int32_t[kOpenWords][kStates];

  // What a lane, a state, is come into by: number h of kFrom.
  struct Into {
    __m512i from;  // states
    __m512 value;
    __m512i tag;
  };
  // A token's, by state.
  struct TokenPaths {
    __m512i words[kOpenWords];  // the block's, the one before …
    __m512i sums;               // of levels before the block, for the coordinate that is next
    __m512 costs;
  };
  // A block's coordinates, and where its words are: of it, of the one before …
  struct OpenBlock {
    int first;
    int count;
    int slots[kOpenWords];
  };

  Words* all_words() const noexcept { return reinterpret_cast<Words*>(scratch.words[0]); }
  float (*all_costs() const noexcept)[kStates] {
    return reinterpret_cast<float (*)[kStates]>(scratch.costs[0][0]);
  }
  static_assert(sizeof(KeyPathScratch::words[0]) >= kPathLanes * sizeof(Words));
  static_assert(sizeof(KeyPathScratch::costs[0]) >= kPathLanes * kStates * sizeof(float));

  // As KeyPaths::find.
  void find(const LaneRows& y, const float* factors, Row* levels, std::uint8_t* bytes,
            std::ptrdiff_t apart) const noexcept {
    Into into[kFrom];
    for (int h = 0; h < kFrom; ++h) into[h] = into_states(h);
    for (int lane = 0; lane < kPathLanes; ++lane) {
      std::fill_n(all_costs()[lane], kStates, kClosed);
      all_costs()[lane][trellis.start] = 0.0F;
    }
    std::fill_n(all_words()[0][0], kPathLanes * kOpenWords * kStates, kLevelOffset * 0x01010101);
    const int blocks = (dim + kPathBlock - 1) / kPathBlock;
    alignas(64) std::int32_t taken[kOpenWords][kPathLanes];
    for (int block = 0; block < blocks; ++block) {
      OpenBlock open{block * kPathBlock, std::min(kPathBlock, dim - block * kPathBlock), {}};
      for (int age = 0; age < kOpenWords; ++age) {
        open.slots[age] = (block - age + kOpenWords) % kOpenWords;
      }
      alignas(64) Row targets[kPathBlock];
      sum_taken(open.first, open.count, levels, targets);
      for (int c = 0; c < open.count; ++c) {
        for (int lane = 0; lane < kPathLanes; lane += kVectorLanes) {
          const FloatVec target =
              load_floats(y[open.first + c] + lane % kLanes) * load_floats(factors + lane);
          store_floats(targets[c] + lane, target - load_floats(targets[c] + lane));
        }
      }
      const bool take = block + 1 >= kOpenWords;
      for (int lane = 0; lane < kPathLanes; lane += kPair) {
        extend_pair(open, targets, into, lane, take, taken[0]);
      }
      if (take) store_taken(taken[0], block + 1 - kOpenWords, levels, bytes, apart);
    }
    const int first = std::max(blocks + 1 - kOpenWords, 0);
    for (int lane = 0; lane < kPathLanes; ++lane) {
      const int best = cheapest(_mm512_loadu_ps(all_costs()[lane])) & (kStates - 1);
      for (int block = first; block < blocks; ++block) {
        taken[block - first][lane] = all_words()[lane][block % kOpenWords][best];
      }
    }
    for (int block = first; block < blocks; ++block) {
      store_taken(taken[block - first], block, levels, bytes, apart);
    }
  }

  Into into_states(int h) const noexcept {
    alignas(64) std::int32_t from[kStates];
    alignas(64) std::int32_t tags[kStates];
    alignas(64) float values[kStates];
    for (int s = 0; s < kStates; ++s) {
      const int window = s << kBits | h;
      from[s] = window & (kStates - 1);
      tags[s] = scratch.tags[window];
      values[s] = scratch.values[window];
    }
    return {_mm512_load_si512(from), _mm512_load_ps(values), _mm512_load_si512(tags)};
  }

  // The least cost's bits, and its state in the lowest ones.
  static int cheapest(__m512 costs) noexcept {
    const __m512i states = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    const __m512i bits =
        _mm512_and_si512(_mm512_castps_si512(costs), _mm512_set1_epi32(~(kStates - 1)));
    return _mm512_reduce_min_epi32(_mm512_or_si512(bits, states));
  }

  // Paths of kPair tokens get a block's levels; `take`: the oldest block's are taken for good.
  void extend_pair(const OpenBlock& open, const Row* targets, const Into (&into)[kFrom], int lane,
                   bool take, std::int32_t* taken) const noexcept {
    TokenPaths paths[kPair];
    for (int p = 0; p < kPair; ++p) {
      paths[p].words[0] = _mm512_setzero_si512();
      for (int age = 1; age < kOpenWords; ++age) {
        paths[p].words[age] = _mm512_loadu_si512(all_words()[lane + p][open.slots[age]]);
      }
      paths[p].costs = _mm512_loadu_ps(all_costs()[lane + p]);
      paths[p].sums = sum_older(open.first, open, paths[p]);
    }
    for (int place = 0; place < open.count; ++place) {
      const int next = open.first + std::min(place + 1, open.count - 1);
      for (int p = 0; p < kPair; ++p) {
        extend_token(open, place, next, targets[place][lane + p], into, paths[p]);
      }
    }
    for (int p = 0; p < kPair; ++p) {
      TokenPaths& of = paths[p];
      if (take) {
        const __m512i oldest = of.words[kOpenWords - 1];
        const int best = cheapest(of.costs);
        const __m512i word =
            _mm512_permutexvar_epi32(_mm512_set1_epi32(best & (kStates - 1)), oldest);
        taken[lane + p] = _mm_cvtsi128_si32(_mm512_castsi512_si128(word));
        const __m512 least = _mm512_castsi512_ps(_mm512_set1_epi32(best & ~(kStates - 1)));
        of.costs = _mm512_mask_sub_ps(_mm512_set1_ps(kClosed),
                                      _mm512_cmpeq_epi32_mask(oldest, word), of.costs, least);
      }
      for (int age = 0; age < kOpenWords; ++age) {
        _mm512_storeu_si512(all_words()[lane + p][open.slots[age]], of.words[age]);
      }
      _mm512_storeu_ps(all_costs()[lane + p], of.costs);
    }
  }

  // What L says of coordinate c, of the levels before its block.
  TQAI_ALWAYS_INLINE __m512i sum_older(int c, const OpenBlock& open,
                                       const TokenPaths& paths) const noexcept {
    __m512i sums = _mm512_set1_epi32(scratch.offsets[c]);
    for (int age = 1; age < kOpenWords; ++age) {
      sums = _mm512_dpbusd_epi32(sums, paths.words[age],
                                 _mm512_set1_epi32(scratch.factors[c][open.slots[age]]));
    }
    return sums;
  }

  // As KeyPaths::extend and follow, of one token. next: the coordinate after this one.
  TQAI_ALWAYS_INLINE void extend_token(const OpenBlock& open, int place, int next, float target,
                                       const Into (&into)[kFrom],
                                       TokenPaths& paths) const noexcept {
    const int c = open.first + place;
    const __m512i sums = _mm512_dpbusd_epi32(paths.sums, paths.words[0],
                                             _mm512_set1_epi32(scratch.factors[c][open.slots[0]]));
    const __m512 known =
        _mm512_mul_ps(_mm512_set1_ps(scratch.factor_steps[c]), _mm512_cvtepi32_ps(sums));
    const __m512 left = _mm512_sub_ps(_mm512_set1_ps(target), known);
    // Not when it is wanted: a step would wait for it.
    const __m512i next_sums = sum_older(next, open, paths);
    const __m512i cost_mask = _mm512_set1_epi32(~kTagMask);
    __m512i candidates[kFrom];
    for (int h = 0; h < kFrom; ++h) {
      const __m512 rest = _mm512_sub_ps(_mm512_permutexvar_ps(into[h].from, left), into[h].value);
      const __m512 cost = _mm512_add_ps(_mm512_permutexvar_ps(into[h].from, paths.costs),
                                        _mm512_mul_ps(rest, rest));
      // (cost and mask) or tag
      candidates[h] =
          _mm512_ternarylogic_epi32(_mm512_castps_si512(cost), cost_mask, into[h].tag, 0xEA);
    }
    const __m512i best = _mm512_min_epi32(_mm512_min_epi32(candidates[0], candidates[1]),
                                          _mm512_min_epi32(candidates[2], candidates[3]));
    const __m512i number =
        _mm512_and_si512(_mm512_srli_epi32(best, kLevelBits), _mm512_set1_epi32(kFrom - 1));
    const __m512i from = _mm512_add_epi32(into[0].from, number);
    paths.costs = _mm512_castsi512_ps(_mm512_and_si512(best, cost_mask));
    paths.sums = _mm512_permutexvar_epi32(from, next_sums);
    for (__m512i& word : paths.words) word = _mm512_permutexvar_epi32(from, word);
    const __m512i level = _mm512_and_si512(best, _mm512_set1_epi32((1 << kLevelBits) - 1));
    paths.words[0] =
        _mm512_or_si512(paths.words[0], _mm512_sll_epi32(level, _mm_cvtsi32_si128(8 * place)));
  }

  void store_taken(const std::int32_t* words, int block, Row* levels, std::uint8_t* bytes,
                   std::ptrdiff_t apart) const noexcept {
    for (int lane = 0; lane < kPathLanes; lane += kVectorLanes) {
      store_levels(load_ints(words + lane), lane, block, levels, bytes, apart);
    }
  }
};

}  // namespace TQAI_LOCAL
}  // namespace tqai::kernels::TQAI_LEVEL_NAMESPACE

#endif

#endif  // TQAI_KEY_STATE_LANES_INL
