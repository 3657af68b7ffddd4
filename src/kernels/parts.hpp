// The steps of attention over sealed tiles on their own. Inside a kernel they are inlined; nothing
// but tests calls them from here.
#pragma once

#include "kernels.hpp"

namespace tqai::kernels {

struct Parts {
  /// Integer dot products of one segment of 64 keys: scores[r, t] = Σ_c queries[r, c] ·
  /// levels[code[t, c]], int32, exact. codes: the segment's packed key codes; queries: [rows,
  /// count] in −127…127; scores: [rows, 64]; rows ≥ 1.
  void (*score)(const SegmentPlan& segment, const std::uint8_t* codes, const std::int8_t* queries,
                int rows, std::int32_t* scores) noexcept;

  /// output[r, c] += steps[r] · Σ_t weights[r, t] · levels[code[t, c]], the sum in int32, exact,
  /// the rest rounded once. codes: packed value codes; weights: [rows, 64]; steps: [rows]; output:
  /// [rows, stride]; rows ≥ 1.
  void (*accumulate)(const SegmentPlan& segment, const std::uint8_t* codes,
                     const std::uint8_t* weights, const float* steps, int rows, float* output,
                     std::int64_t stride) noexcept;

  /// scores[r, t] += what RoPE-centred keys leave out at the position of token t, in fp32 from
  /// tables of fp32: relative error below 1e-6 · count. scores: [rows, 64]. Each run of
  /// consecutive positions takes as long as a whole tile, each token of many runs nearly so.
  void (*add_rope)(const RopeBias& bias, const TilePositions& positions, int rows,
                   float (*scores)[kTileTokens]) noexcept;
};

/// The table of a level; throws as `kernels`.
const Parts& parts(Level level);

// One per level that this build has.
extern const Parts kScalarParts;
#if defined(TQAI_X86)
extern const Parts kAvx2Parts;
extern const Parts kAvxVnniParts;
extern const Parts kAvx512VnniParts;
extern const Parts kAvx512Parts;
#elif defined(TQAI_ARM64)
extern const Parts kNeonParts;
#endif

}  // namespace tqai::kernels
