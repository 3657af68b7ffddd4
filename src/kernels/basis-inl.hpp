// Keys in a learnt basis (tqai/key_basis.hpp): tiles sealed by a closed loop, and opened. 16 tokens
// side by side in lanes, at kTried norms each.
#ifndef TQAI_BASIS_INL
#define TQAI_BASIS_INL

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <new>

#include "encode-inl.hpp"
#include "key-paths-inl.hpp"
#include "key-state-lanes-inl.hpp"

namespace tqai::kernels::TQAI_LEVEL_NAMESPACE {
namespace TQAI_LOCAL {

// A closed loop cannot know beforehand which norm suits the errors that it will feed back, and with
// one that is too small a coordinate beyond the outermost level spoils those after it. So several
// are tried, and the best is kept.
constexpr int kTried = 4;
constexpr float kTriedNorms[kTried] = {1.0F, 1.25F, 1.6F, 2.5F};
constexpr int kTriedLanes = kTried * kLanes;

// [.., tried norms, 16 tokens]
using TriedRow = float[kTriedLanes];

// In the callers' working memory; two matrices [dim, dim] follow.
struct BasisScratch {
  CodingScratch coding;  // x: keys, then what is left of y; y = E x
  alignas(64) TriedRow decoded[kMaxDim];
  alignas(64) std::uint8_t codes[kMaxDim][kTriedLanes];
};
static_assert(sizeof(BasisScratch) == kBasisCodingBytes);

// What came of a loop, for each norm and token, in units of the norm.
struct Tried {
  alignas(64) TriedRow factors;   // one over norms
  alignas(64) TriedRow errors2;   // ‖y − L z‖²
  alignas(64) TriedRow along;     // ⟨y, y − L z⟩
  alignas(64) TriedRow lengths2;  // ‖L z‖²
};

inline void widen_matrix(const std::uint16_t* from, std::ptrdiff_t count, float scale,
                         float* __restrict to) noexcept {
  for (std::ptrdiff_t i = 0; i < count; ++i) to[i] = half_lane(from[i]) * scale;
}

// L below its diagonal, [dim, dim]; the rest is left as it is.
inline void widen_feedback(const std::uint16_t* from, int dim, float* to) noexcept {
  for (int i = 0; i < dim; ++i) {
    widen_matrix(from, i, 1.0F, to + static_cast<std::ptrdiff_t>(i) * dim);
    from += i;
  }
}

// x = L⁻¹ y, from the first coordinate on: rows of L side by side as far as they need nothing of
// each other.
inline void solve_lanes(const float* lower, const LaneRows& y, int dim, LaneRows& x) noexcept {
  constexpr int kRows = kVectorLanes / 2;
  for (int first = 0; first < dim; first += kRows) {
    const int rows = std::min(kRows, dim - first);
    const float* from = lower + static_cast<std::ptrdiff_t>(first) * dim;
    float sums[kRows][kLanes];
    multiply_leading<kRows>(from, dim, x, first, rows, sums);
    for (int r = 0; r < rows; ++r) {
      const int c = first + r;
      for (int i = 0; i < kLanes; ++i) x[c][i] = y[c][i] - sums[r][i];
      for (int later = r + 1; later < rows; ++later) {
        const float factor = from[static_cast<std::ptrdiff_t>(later) * dim + c];
        for (int i = 0; i < kLanes; ++i) sums[later][i] = sums[later][i] + factor * x[c][i];
      }
    }
  }
}

// Codes of y · factors, coordinate by coordinate: each less what L says of those before it, as they
// are decoded.
template <int kBits, typename Lanes>
void closed_loop(const SegmentPlan& segment, const float* lower, int dim, BasisScratch& scratch,
                 Tried& tried) noexcept {
  constexpr int kRows = kVectorLanes == 16 ? 4 : 1;
  constexpr int kVecs = kTriedLanes / kVectorLanes;
  const typename Lanes::template Nearest<kBits> nearest(segment);
  FloatVec errors2[kVecs] = {};
  FloatVec along[kVecs] = {};
  FloatVec lengths2[kVecs] = {};
  for (int first = 0; first < dim; first += kRows) {
    const int rows = std::min(kRows, dim - first);
    const float* from = lower + static_cast<std::ptrdiff_t>(first) * dim;
    alignas(64) TriedRow sums[kRows];
    multiply_leading<kRows>(from, dim, scratch.decoded, first, rows, sums);
    for (int r = 0; r < rows; ++r) {
      const int c = first + r;
      alignas(64) TriedRow whole;
      alignas(64) TriedRow left;
      for (int v = 0; v < kVecs; ++v) {
        const FloatVec y = load_floats(scratch.coding.y[c] + v * kVectorLanes % kLanes) *
                           load_floats(tried.factors + v * kVectorLanes);
        store_floats(whole + v * kVectorLanes, y);
        store_floats(left + v * kVectorLanes, y - load_floats(sums[r] + v * kVectorLanes));
      }
      nearest(left, scratch.codes[c], scratch.decoded[c]);
      for (int v = 0; v < kVecs; ++v) {
        const FloatVec decoded = load_floats(scratch.decoded[c] + v * kVectorLanes);
        const FloatVec error = load_floats(left + v * kVectorLanes) - decoded;
        const FloatVec sum = load_floats(sums[r] + v * kVectorLanes) + decoded;
        errors2[v] = errors2[v] + error * error;
        along[v] = along[v] + load_floats(whole + v * kVectorLanes) * error;
        lengths2[v] = lengths2[v] + sum * sum;
        for (int later = r + 1; later < rows; ++later) {
          float* to = sums[later] + v * kVectorLanes;
          store_floats(
              to, load_floats(to) + from[static_cast<std::ptrdiff_t>(later) * dim + c] * decoded);
        }
      }
    }
  }
  for (int v = 0; v < kVecs; ++v) {
    store_floats(tried.errors2 + v * kVectorLanes, errors2[v]);
    store_floats(tried.along + v * kVectorLanes, along[v]);
    store_floats(tried.lengths2 + v * kVectorLanes, lengths2[v]);
  }
}

template <typename Lanes>
void closed_loop_of(const SegmentPlan& segment, const float* lower, int dim, BasisScratch& scratch,
                    Tried& tried) noexcept {
  with_bits(segment.bits,
            [&]<int kBits>() { closed_loop<kBits, Lanes>(segment, lower, dim, scratch, tried); });
}

// Calls `function` with the search of a segment's codes.
template <typename Function>
inline void with_key_paths(const SegmentPlan& segment, const float* lower, int dim,
                           KeyPathScratch& scratch, const Function& function) noexcept {
  const KeyTrellis& trellis = *segment.key_trellis;
  switch (trellis.bits) {
#ifdef TQAI_KEY_STATE_LANES
    case 2: return function(KeyStateLanes{{trellis, lower, dim, segment.step, scratch}});
#else
    case 2: return function(KeyPaths<2>{trellis, lower, dim, segment.step, scratch});
#endif
    case 3: return function(KeyPaths<3>{trellis, lower, dim, segment.step, scratch});
    default: return function(KeyPaths<4>{trellis, lower, dim, segment.step, scratch});
  }
}

// The same of trellis codes, for the first norms; codes: bytes of levels.
template <typename Search>
inline void path_loops(const Search& search, BasisScratch& scratch, Tried& tried) noexcept {
  constexpr int kRows = kVectorLanes == 16 ? kPathBlock : 1;
  constexpr int kVecs = Search::kPathLanes / kVectorLanes;
  using Row = typename Search::Row;
  const int dim = search.dim;
  const LaneRows& y = scratch.coding.y;
  auto* levels = reinterpret_cast<Row*>(scratch.decoded);
  search.find(y, tried.factors, levels, scratch.codes[0], kTriedLanes);
  FloatVec errors2[kVecs] = {};
  FloatVec along[kVecs] = {};
  FloatVec lengths2[kVecs] = {};
  for (int first = 0; first < dim; first += kRows) {
    const int rows = std::min(kRows, dim - first);
    const float* from = search.lower + static_cast<std::ptrdiff_t>(first) * dim;
    alignas(64) Row sums[kRows];
    multiply_leading<kRows>(from, dim, levels, first, rows, sums);
    for (int v = 0; v < kVecs; ++v) {
      const int lane = v * kVectorLanes;
      const FloatVec factor = load_floats(tried.factors + lane);
      for (int r = 0; r < rows; ++r) {
        FloatVec sum = load_floats(sums[r] + lane);
        for (int j = 0; j < r; ++j) {
          sum = sum + from[static_cast<std::ptrdiff_t>(r) * dim + first + j] *
                          load_floats(levels[first + j] + lane);
        }
        sum = sum + load_floats(levels[first + r] + lane);
        const FloatVec whole = load_floats(y[first + r] + lane % kLanes) * factor;
        const FloatVec error = whole - sum;
        errors2[v] = errors2[v] + error * error;
        along[v] = along[v] + whole * error;
        lengths2[v] = lengths2[v] + sum * sum;
      }
    }
  }
  for (int v = 0; v < kVecs; ++v) {
    store_floats(tried.errors2 + v * kVectorLanes, errors2[v]);
    store_floats(tried.along + v * kVectorLanes, along[v]);
    store_floats(tried.lengths2 + v * kVectorLanes, lengths2[v]);
  }
}

// Squared error in y of norm · L z, `share` being that norm times the factor.
inline float tried_error2(const Tried& tried, int index, float length2, float share) noexcept {
  const float factor = tried.factors[index];
  const float rest = 1.0F - share;
  const float whole2 = length2 * factor * factor;
  const float sum = rest * rest * whole2 + 2.0F * share * rest * tried.along[index] +
                    share * share * tried.errors2[index];
  return sum / (factor * factor);
}

// Norms that are subnormal halves, rounded down, up, or to 0: as encode_small. lengths2: ‖y‖².
template <typename Lanes>
TQAI_NEVER_INLINE void try_small(const SegmentPlan& segment, const float* lower, int dim,
                                 const float* lengths2, BasisScratch& scratch,
                                 KeyPathScratch* paths, Tried& tried, int* best,
                                 float* norms) noexcept {
  float rounded[2][kLanes] = {};
  for (int i = 0; i < kLanes; ++i) {
    if (!is_small(norms[i])) continue;
    const float steps = static_cast<float>(static_cast<int>(norms[i] / kLeastHalf));
    for (int k = 0; k < kTried; ++k) {
      float& norm = rounded[k % 2][i];
      norm = (steps + static_cast<float>(k % 2)) * kLeastHalf;
      tried.factors[k * kLanes + i] = norm > 0.0F ? 1.0F / norm : 0.0F;
    }
  }
  // The same again for the others.
  if (paths == nullptr) {
    closed_loop_of<Lanes>(segment, lower, dim, scratch, tried);
  } else {
    with_key_paths(segment, lower, dim, *paths,
                   [&](const auto& search) { path_loops(search, scratch, tried); });
  }
  for (int i = 0; i < kLanes; ++i) {
    if (!is_small(norms[i])) continue;
    norms[i] = 0.0F;
    float least = lengths2[i];  // of nothing at all
    for (int k = 0; k < 2; ++k) {
      const int index = k * kLanes + i;
      const float error2 = tried_error2(tried, index, lengths2[i], 1.0F);
      if (!(error2 < least)) continue;
      least = error2;
      best[i] = index;
      norms[i] = rounded[k][i];
    }
  }
}

// The best of the first `count` norms of each token: as long as y, which is norm correction.
inline void keep_best(const Tried& tried, const float* lengths2, int count, int* best,
                      float* norms) noexcept {
  for (int i = 0; i < kLanes; ++i) {
    best[i] = i;
    norms[i] = 0.0F;
    float least = std::numeric_limits<float>::infinity();
    for (int k = 0; k < count; ++k) {
      const int index = k * kLanes + i;
      const float norm =
          tried.lengths2[index] > 0.0F ? std::sqrt(lengths2[i] / tried.lengths2[index]) : 0.0F;
      const float error2 = tried_error2(tried, index, lengths2[i], norm * tried.factors[index]);
      if (!(error2 < least)) continue;
      least = error2;
      best[i] = index;
      norms[i] = norm;
    }
  }
}

// Where the codes of coordinate c are: in a trellis they have another order.
inline int stored_coordinate(const SidePlan& side, int c) noexcept {
  return side.segments[0].key_trellis == nullptr ? c : key_coordinate(c, side.padded);
}

// Kernels::encode_in_basis.
template <typename Lanes>
void encode_in_basis(const SidePlan& side, const KeyTransform& transform, const float* rows,
                     std::uint8_t* tile, std::byte* memory) noexcept {
  BasisScratch& scratch = *new (memory) BasisScratch;
  const int dim = side.dim;
  const SegmentPlan& segment = side.segments[0];
  auto* analysis = reinterpret_cast<float*>(memory + sizeof scratch);
  float* lower = analysis + static_cast<std::ptrdiff_t>(dim) * dim;
  widen_matrix(transform.analysis, static_cast<std::ptrdiff_t>(dim) * dim, transform.analysis_scale,
               analysis);
  widen_feedback(transform.feedback, dim, lower);
  int places[kMaxDim];  // of coordinates' codes in quads, of token 0
  for (int c = 0; c < side.padded; ++c) {
    const int at = stored_coordinate(side, c);
    places[c] = at / 4 * (4 * kTileTokens) + at % 4;
  }
  for (int c = dim; c < side.padded; ++c) {
    for (int t = 0; t < kTileTokens; ++t) scratch.coding.codes[places[c] + 4 * t] = 0;
  }
  KeyPathScratch* paths = nullptr;
  if (segment.key_trellis != nullptr) {  // behind the matrices
    paths = new (memory + basis_coding_bytes(dim)) KeyPathScratch;
    with_key_paths(segment, lower, dim, *paths, [](const auto& search) { search.prepare(); });
  }
  std::uint16_t halves[kTileTokens];
  for (int start = 0; start < kTileTokens; start += kLanes) {
    LaneRows& x = scratch.coding.x;
    LaneRows& y = scratch.coding.y;
    Lanes::transpose(rows + static_cast<std::ptrdiff_t>(start) * dim, dim, nullptr, x);
    multiply_lanes(analysis, x, dim, y);
    float lengths2[kLanes];
    squared_lengths(y, dim, lengths2);
    solve_lanes(lower, y, dim, x);
    float innovations2[kLanes];
    squared_lengths(x, dim, innovations2);
    Tried tried;
    for (int k = 0; k < kTried; ++k) {
      for (int i = 0; i < kLanes; ++i) {
        const float norm = std::sqrt(innovations2[i]) * kTriedNorms[k];
        tried.factors[k * kLanes + i] = norm > 0.0F ? 1.0F / norm : 0.0F;
      }
    }
    closed_loop_of<Lanes>(paths != nullptr ? *segment.trial : segment, lower, dim, scratch, tried);
    int best[kLanes];
    float norms[kLanes];
    keep_best(tried, lengths2, kTried, best, norms);
    if (paths != nullptr) {
      float suits[kLanes];
      for (int i = 0; i < kLanes; ++i) suits[i] = tried.factors[best[i]];
      const int count = path_norms(segment.bits);
      for (int k = 0; k < count; ++k) {
        for (int i = 0; i < kLanes; ++i) {
          tried.factors[k * kLanes + i] = suits[i] * (1.0F / kTriedPathNorms[k]);
        }
      }
      with_key_paths(segment, lower, dim, *paths,
                     [&](const auto& search) { path_loops(search, scratch, tried); });
      keep_best(tried, lengths2, count, best, norms);
    }
    const bool small = std::any_of(norms, norms + kLanes, is_small);
    if (small) try_small<Lanes>(segment, lower, dim, lengths2, scratch, paths, tried, best, norms);
    if (paths != nullptr) {
      with_key_paths(segment, lower, dim, *paths, [&](const auto& search) {
        search.to_codes(best, scratch.codes[0], kTriedLanes);
      });
    }
    for (int c = 0; c < dim; ++c) {
      std::uint8_t* to = scratch.coding.codes + places[c] + 4 * start;
      for (int i = 0; i < kLanes; ++i) to[4 * i] = scratch.codes[c][best[i]];
    }
    for (int i = 0; i < kLanes; ++i) {
      halves[start + i] = to_half(norms[i] < kMaxHalf ? norms[i] : kMaxHalf);
    }
  }
  pack_quads<Lanes>(side, true, scratch.coding.codes, tile);
  std::memcpy(tile + side.norms, halves, sizeof halves);
}

// Kernels::decode_in_basis.
TQAI_INLINE void decode_in_basis(const SidePlan& side, const KeyTransform& transform,
                                 const std::uint8_t* tile, float* rows,
                                 std::byte* memory) noexcept {
  BasisScratch& scratch = *new (memory) BasisScratch;
  const int dim = side.dim;
  auto* synthesis = reinterpret_cast<float*>(memory + sizeof scratch);
  widen_matrix(transform.synthesis, static_cast<std::ptrdiff_t>(dim) * dim,
               transform.synthesis_scale, synthesis);
  std::uint16_t halves[kTileTokens];
  std::memcpy(halves, tile + side.norms, sizeof halves);
  unpack_side(side, true, tile, scratch.coding.codes);
  const SegmentPlan& segment = side.segments[0];
  const KeyTrellis* trellis = segment.key_trellis;
  for (int start = 0; start < kTileTokens; start += kLanes) {
    std::uint8_t windows[kLanes];
    if (trellis != nullptr) std::memset(windows, static_cast<int>(trellis->before_first()), kLanes);
    for (int c = 0; c < dim; ++c) {
      const std::uint8_t* codes =
          scratch.coding.codes + stored_coordinate(side, c) * kTileTokens + start;
      for (int i = 0; i < kLanes; ++i) {
        int level;
        if (trellis == nullptr) {
          level = segment.levels[codes[i]];
        } else {
          windows[i] = static_cast<std::uint8_t>(trellis->next(windows[i], codes[i]));
          level = trellis->levels[windows[i]];
        }
        scratch.coding.x[c][i] = static_cast<float>(level) * segment.step;
      }
    }
    multiply_lanes(synthesis, scratch.coding.x, dim, scratch.coding.y);
    for (int i = 0; i < kLanes; ++i) {
      const float norm = half_lane(halves[start + i]);
      float* row = rows + static_cast<std::ptrdiff_t>(start + i) * dim;
      for (int c = 0; c < dim; ++c) row[c] = scratch.coding.y[c][i] * norm;
    }
  }
}

}  // namespace TQAI_LOCAL
}  // namespace tqai::kernels::TQAI_LEVEL_NAMESPACE

#endif  // TQAI_BASIS_INL
