// The kernels: one table of functions per level, all with the same results.
#pragma once

#include <algorithm>
#include <array>
#include <cstddef>
#include <cstdint>
#include <tqai/codebook.hpp>
#include <tqai/cpu.hpp>
#include <tqai/half.hpp>
#include <tqai/key_basis.hpp>
#include <tqai/limits.hpp>
#include <tqai/packing.hpp>
#include <tqai/trellis.hpp>

namespace tqai::kernels {

/// Query rows that are served by one reading of a tile.
inline constexpr int kMaxRows = 8;
/// Sets of query rows that one call serves.
inline constexpr int kMaxHeads = 32;
/// Of those, sets of one head that are attended to side by side.
inline constexpr int kMaxTogether = 4;
/// Largest padded head dimension.
inline constexpr int kMaxDim = padded_dim(kMaxHeadDim);
/// Bytes of working memory that coding and decoding a tile needs, 64-byte aligned. Not on the
/// stack, of which a thread may have no more than that (musl's have 128 KB).
inline constexpr std::size_t kCodingBytes = std::size_t{3} * 64 * kMaxDim;
/// Floats that the plain loops treat side by side, at every level.
inline constexpr int kLanes = 16;
/// Bytes of working memory that coding keys in a basis needs, but for its matrices.
inline constexpr std::size_t kBasisCodingBytes =
    kCodingBytes + std::size_t{4} * kLanes * kMaxDim * (sizeof(float) + 1);
/// The same with its matrices.
constexpr std::size_t basis_coding_bytes(int dim) noexcept {
  const auto size = static_cast<std::size_t>(dim);
  return (kBasisCodingBytes + 2 * size * size * sizeof(float) + 63) / 64 * 64;
}

/// What the search for a trellis's paths (trellis-inl.hpp) needs besides its decisions.
inline constexpr std::size_t kPathScratchBytes = 33408;
/// Bytes of working memory that coding values in trellis codes needs.
constexpr std::size_t trellis_coding_bytes(int dim, int bits) noexcept {
  constexpr std::size_t kTargets = std::size_t{2} * kMaxDim * kLineBytes;
  const auto steps = static_cast<std::size_t>(std::max(padded_dim(dim), 128 / bits));
  const std::size_t decisions = steps * (std::size_t{256} >> bits) / 4 * 64;
  return kCodingBytes + kTargets + kPathScratchBytes + decisions;
}

/// Even powers, and odd ones, of a polynomial that stands for slow frequencies: with angles of up
/// to 1 it is off by less than 3e-7.
inline constexpr int kRopePowers = 4;

/// Floats that hold a complex number of each row, in a number of them that registers have.
constexpr int factor_lanes(int rows) noexcept {
  return rows == 1 ? 2 : rows == 2 ? 4 : rows <= 4 ? 8 : 2 * kMaxRows;
}

/// Positions from 0 below this many are looked up; others are turned there by multiples of it, up
/// to kFarSteps of them on either side.
inline constexpr std::int64_t kNearPositions = std::int64_t{1} << 20;
inline constexpr std::int64_t kFarSteps = std::int64_t{1} << 10;

struct CodeBins;

/// Quotients of levels (SegmentPlan) are within ± this, so that eight products with weights of up
/// to 255 add up in 16 bits: 8 · 255 · 16 = 32640 < 2^15.
inline constexpr int kMaxQuotient = 16;
inline constexpr int kMaxQuotientBits = 2;

/// Trellis codes, of values alone, whose stream is a byte position's packed bytes, line after line.
struct TrellisPlan {
  const Trellis* tables;
  std::array<std::int8_t, 256> older;  // Trellis::older and recent, repeated as SegmentPlan::levels
  std::array<std::int8_t, 256> recent;
};

/// States that paths of keys in trellis codes may be in, and what the search for these needs.
inline constexpr int kKeyStates = 16;
inline constexpr std::size_t kKeyPathBytes = 77824;
/// Bytes of working memory that coding keys in trellis codes needs.
constexpr std::size_t key_path_coding_bytes(int dim) noexcept {
  return basis_coding_bytes(dim) + kKeyPathBytes;
}

/// One run of coordinates with its codebook on the int8 grid.
struct SegmentPlan {
  int first;
  int count;
  int bits;
  std::size_t offset;         // of its packed codes, from the side's first
  const std::int8_t* levels;  // [256]: of code i mod 2^bits, so that a vector's table is a load
  const float* boundaries;    // [2^bits − 1], ascending
  const CodeBins* bins;       // the same for look-ups; null at 8 bits
  float step;                 // centroid = step · level
  // Levels of up to 2 bits whose common divisor leaves at most kMaxQuotient: level = divisor ·
  // quotient, so that more products fit into 16 bits. Else null.
  const std::int8_t* quotients = nullptr;  // [16], as levels
  int divisor = 1;
  // Of trellis codes, which have neither levels of their own, nor boundaries, nor bins: these are
  // null then. Null for scalar ones.
  const TrellisPlan* trellis = nullptr;
  // The same of keys, which always are in a basis.
  const KeyTrellis* key_trellis = nullptr;
  // Of these: scalar codes of as many bits, by which a norm is chosen. Its levels are in its step.
  const SegmentPlan* trial = nullptr;
};

/// Keys or values: how a vector becomes codes.
struct SidePlan {
  int dim;
  int padded;
  const SegmentPlan* segments;
  int segment_count;
  std::size_t codes;  // offsets in a tile
  std::size_t norms;
  const float* signs;   // [dim], Hadamard rotation; else null
  const float* matrix;  // [dim, dim] row-major R and its transpose; null for Hadamard
  const float* transposed;
};

/// A kv head's part of a KeyBasis (tqai/key_basis.hpp, KeyBasis::Head), FP16: of its keys.
struct KeyTransform {
  explicit KeyTransform(const KeyBasis::Head& of) noexcept
      : analysis(of.analysis.data()),
        feedback(of.feedback.data()),
        synthesis(of.synthesis.data()),
        analysis_scale(of.analysis_scale),
        synthesis_scale(of.synthesis_scale) {}

  const std::uint16_t* analysis;   // [dim, dim], E / analysis_scale
  const std::uint16_t* feedback;   // [dim (dim − 1) / 2], L below its diagonal, row by row
  const std::uint16_t* synthesis;  // [dim, dim], F / synthesis_scale
  float analysis_scale;
  float synthesis_scale;
};

/// The same of its queries: F_kc = scale · factors[k] · numbers[c / 16][k / 2][c % 16][k % 2].
struct QueryTransform {
  explicit QueryTransform(const KeyBasis::Head& of) noexcept
      : numbers(of.query_numbers.data()), factors(of.query_factors.data()), scale(of.query_scale) {}

  const std::int16_t*
      numbers;           // [padded / 16, ⌈dim / 2⌉, 16, 2], no column longer than kMostColumn
  const float* factors;  // [dim]
  float scale;
};

/// Integers that stand for a query are within ± this, so that its length times a column's, which
/// no sum is beyond, stays below 2^31.
constexpr int most_query_number(int dim) noexcept {
  constexpr int kLongest = 65'400;
  static_assert(std::int64_t{kLongest} * KeyBasis::kMostColumn < std::int64_t{1} << 31);
  int root = 1;
  while (root * root < dim) ++root;
  return std::min(kLongest / root, 32'767);
}

struct TilePlan {
  SidePlan keys;
  SidePlan values;
  std::size_t bytes;  // of a tile
};

/// What a mask adds to all of 64 tokens. Of several runs the bits that all have say what they
/// share.
enum MaskRun : std::uint8_t { mixed = 0, zeros = 1, hidden = 2 };

/// What a query row may see, and how its scores become weights; shared by both attention kernels.
/// Queries come multiplied by scale · log2 e, or by scale / soft_cap where there is a cap.
struct Softmax {
  int rows;                   // 1…kMaxRows
  float soft_cap;             // 0: none
  const std::int64_t* first;  // [rows], visible tokens [first, end) of those given
  const std::int64_t* end;
  const float* mask;  // [rows, …] added to scores, token 0 first; null: none
  std::int64_t mask_stride;
  // MaskRun of each 64 columns of the mask, of which token 0 is column mask_column. Where a run and
  // its neighbours say the same, and not `mixed`, the mask itself is not read. Null: all are mixed.
  const std::uint8_t* mask_runs;  // [rows + 1, mask_run_stride], at last what all rows share
  std::int64_t mask_run_stride;
  std::int64_t mask_column;
  /// State of the running softmax, to be merged (kernels/softmax-inl.hpp): a bound on the scores
  /// times log2 e, kHeadroom above the largest at most; the sum of 2^(score − max) in kLanes parts,
  /// and Σ 2^(score − max) · value.
  float* max;                  // [rows], −inf before any token
  float (*sums)[kLanes];       // [rows], meaningless while max is −inf
  float* output;               // [rows, output_stride]
  std::int64_t output_stride;  // padded head dimension of the values
};

/// Where a tile's tokens stand.
struct TilePositions {
  std::int64_t first = 0;              // consecutive ones from here, where `each` is null
  const std::int32_t* each = nullptr;  // [sections, 64]
  int sections = 1;                    // 1: the same in all of the embedding's sections
};

/// How pairs of coordinates turn over 64 consecutive positions.
struct TileTurns {
  int pair_count = 0;
  bool interleaved = false;          // pair f is coordinates 2f and 2f + 1, else f and f + pairs
  const float* distances = nullptr;  // [32, 2, pairs]: cos, sin of (j + 1/2) ω
};

/// Up to 64 tokens of all kv heads.
struct TileSpan {
  const std::uint8_t* tiles;  // one a kv head, TilePlan::bytes apart
  int tokens;                 // valid ones, 1…64
  TilePositions positions;
};

/// What RoPE-centred keys leave out of the scores: at position p, Σ_f Re(factor_f · e^(i p ω_f)).
struct RopeBias {
  int count;       // frequencies that the head keeps, slow ones last; 0: no bias
  int slow_count;  // those that turn by 1 at most between the middle and the ends of a tile: they
                   // are polynomials of the distance
  const std::uint16_t* pairs;  // [count]: which they are
  const float* factors;  // [count, factor_lanes(rows)]: conj(query pair) · mean pair of all rows,
                         // (real, imaginary) of one after another, zeros behind them
  // Tables over all pairs (cache/rope_tables.hpp).
  int pair_count;
  const float* half;  // [pair_count + kRopePowers, 2, 32]: cos, sin of (j + 1/2) ω; then even and
                      // odd powers of (j + 1/2) / 32
  const float*
      terms;  // [pair_count, kRopePowers, 2]: a frequency's cosine and sine in those powers
  const float* tiles;    // [tile, 2, pair_count]: e^(i (64 tile + 31.5) ω)
  const float* offsets;  // [64, 2, pair_count]: e^(i offset ω)
  const float* far;  // [2 · kFarSteps, 2, pair_count], at step 0: e^(i step · kNearPositions · ω);
                     // null where no position is that far
  const std::uint8_t* sections;  // [pair_count], which of a token's positions turns a pair
};

/// Query rows of one kv head, and what they have found.
struct HeadRows {
  int head;
  const std::byte* queries;    // Kernels::prepare_queries of [rows, keys.padded]
  const float* centre_scores;  // [rows], q · centre
  RopeBias rope;
  Softmax softmax;  // output in the rotated domain of the values
};

/// Attention over sealed tiles, span by span: memory is read in order where the heads' tiles lie
/// side by side, which is what processors foresee.
struct AttendTiles {
  const TilePlan* plan;
  const TileSpan* spans;  // token counts follow one another without gaps
  std::int64_t span_count;
  const HeadRows* heads;  // ascending; one with many rows several times
  int head_count;         // 1…kMaxHeads
};

/// Attention over exact tokens of one head.
struct AttendExact {
  const void* keys;    // [tokens, key_dim] of dtype, contiguous
  const void* values;  // [tokens, value_dim]
  DType dtype;
  int key_dim;
  int value_dim;
  std::int64_t tokens;
  const float* queries;  // [rows, padded_dim(key_dim)], padding 0, finite
  float* widened;        // working memory, 64-byte aligned: exact_floats; null where none
  Softmax softmax;
};

/// Whether a level widens a block of numbers of 16 bits before it reads them: without instructions
/// for that, once for all query rows takes half the time of doing it for each four.
constexpr bool widens_first(Level level) noexcept { return level == Level::scalar; }

/// Floats of AttendExact's working memory: what a block's vectors take where they are not read in
/// place.
constexpr std::size_t exact_floats(int key_dim, int value_dim, DType dtype, Level level) noexcept {
  const bool widened = dtype != DType::f32 && widens_first(level);
  const auto of = [widened](int dim) {
    const bool in_place = dim == padded_dim(dim) && !widened;
    return in_place ? std::size_t{0} : static_cast<std::size_t>(padded_dim(dim) * kTileTokens);
  };
  return std::max(of(key_dim), of(value_dim));
}

struct Kernels {
  Level level;

  /// Bytes of what prepare_queries makes of so many rows or fewer, a multiple of 64.
  std::size_t (*prepared_bytes)(const SidePlan& keys, int rows) noexcept;
  /// Integers that stand for queries. queries: [rows, keys.padded], rotated, padding 0, finite;
  /// prepared: 64-byte aligned, to be read by the same level and with as many rows.
  void (*prepare_queries)(const SidePlan& keys, const float* queries, int rows,
                          std::byte* prepared) noexcept;

  /// Adds the tiles to the softmax states. Error against exact attention over the decoded tiles:
  /// queries are int8 in one term where keys have up to 4 bits, off by up to max|q| / 254 a
  /// coordinate, and in two above, off by max|q| / 64516; each weight is off by up to 1/510 of its
  /// tile's largest p · norm, and by up to 8e-5 of itself. A tile's values are skipped only
  /// where its weights are, for each row, at most 2^-24 of the row's sum so far. Same bits at every
  /// level.
  void (*attend_tiles)(const AttendTiles& args) noexcept;

  /// Adds exact tokens to the softmax state, in fp32.
  void (*attend_exact)(const AttendExact& args) noexcept;

  /// to = factor · from in fp32, of `count` numbers, `from` aligned for its dtype. False where one
  /// is not finite, or beyond 1e30 afterwards: its scores could overflow.
  bool (*load_scaled)(const void* from, DType dtype, int count, float factor, float* to) noexcept;
  /// to += factor · from, of `count` numbers; they do not overlap.
  void (*add_scaled)(const float* from, float factor, int count, float* to) noexcept;

  /// y = R x, and x = Rᵀ y, of one row of side.dim floats; the results do not overlap the
  /// arguments. Same bits at every level, and as Rotation's.
  void (*rotate)(const SidePlan& side, const float* x, float* y) noexcept;
  void (*rotate_back)(const SidePlan& side, const float* y, float* x) noexcept;

  /// Norms, rotates, quantises and packs 64 vectors. rows: [64, dim] fp32, finite; `tile`: the
  /// head's tile, whose part of this side is written; `memory`: kCodingBytes, or
  /// trellis_coding_bytes where codes are a trellis's, also for `decode`. Same bits at every level.
  void (*encode)(const SidePlan& side, bool keys, const float* rows, std::uint8_t* tile,
                 std::byte* memory) noexcept;

  /// The inverse: rows [64, dim], in the original domain. Same bits at every level.
  void (*decode)(const SidePlan& side, bool keys, const std::uint8_t* tile, float* rows,
                 std::byte* memory) noexcept;

  /// Of keys in a basis, which take the place of `rotate`, and of `encode` and `decode` for keys,
  /// otherwise as these: y = Fᵀ x of each row, for prepare_queries; queries: [rows, stride], those
  /// of [rows, dim] finite, up to kMaxRows; transformed: [rows, stride], padding 0. Each
  /// factors[k] · x_k is rounded to 1 / (2 most_query_number) of their largest.
  void (*transform_queries)(const QueryTransform& transform, int dim, const float* queries,
                            int rows, std::int64_t stride, float* transformed) noexcept;
  /// The closed loop with several norms a key, of which the best is kept. side: of keys; memory:
  /// basis_coding_bytes.
  void (*encode_in_basis)(const SidePlan& side, const KeyTransform& transform, const float* rows,
                          std::uint8_t* tile, std::byte* memory) noexcept;
  void (*decode_in_basis)(const SidePlan& side, const KeyTransform& transform,
                          const std::uint8_t* tile, float* rows, std::byte* memory) noexcept;

  /// Whether all elements are finite and, where `max_norm` > 0, no row is longer.
  /// rows: [rows, dim] of dtype, `stride` elements apart.
  bool (*acceptable)(const void* rows, DType dtype, std::int64_t count, int dim,
                     std::int64_t stride, float max_norm) noexcept;

  /// Finite numbers as fp32, `from` aligned for their dtype.
  void (*widen)(const void* from, DType dtype, std::int64_t count, float* to) noexcept;
  /// Adds up 64 tokens, and their squares, in order. rows: [64, dim]; sums, squares: [dim].
  void (*add_up)(const float* rows, int dim, double* sums, double* squares) noexcept;
  /// Σ (a + i b) · e^(−i distance ω) over 64 tokens, the distance being that from the tile's
  /// middle. turned: [2, pairs]. Same bits at every level.
  void (*turn_back)(const TileTurns& turns, const float* rows, int dim, float* turned) noexcept;
  /// rows[t] += factor · (constant + m · e^(i distance ω)), with the means m turned to the tile's
  /// middle. middles: [2, pairs], or null where nothing turns. Same bits at every level.
  void (*add_centre)(const float* constant, const TileTurns& turns, const float* middles,
                     float factor, int dim, float* rows) noexcept;
};

/// The table of a level; throws UnsupportedError where this build or processor lacks it.
const Kernels& kernels(Level level);

// One per level that this build has.
extern const Kernels kScalarKernels;
#if defined(__x86_64__) || defined(_M_X64)
#define TQAI_X86 1
extern const Kernels kAvx2Kernels;
extern const Kernels kAvxVnniKernels;
extern const Kernels kAvx512VnniKernels;
extern const Kernels kAvx512Kernels;
#elif defined(__aarch64__) || defined(_M_ARM64)
#define TQAI_ARM64 1
extern const Kernels kNeonKernels;
#endif

}  // namespace tqai::kernels
