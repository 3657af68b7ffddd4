// Query rows as integers, for attention over sealed tiles.
#ifndef TQAI_QUERIES_INL
#define TQAI_QUERIES_INL

#include <cmath>
#include <new>

#include "floats-inl.hpp"
#include "functions-inl.hpp"
#include "kernels.hpp"

namespace tqai::kernels::TQAI_LEVEL_NAMESPACE {
namespace TQAI_LOCAL {

// Query rows as int8 in one term, q ≈ step · a, or two, q ≈ step · (kTermRatio · a + b). After the
// rotation one term is off by about 0.7 % of the query's length, next to the 10 % that 4-bit keys
// are off: half a percent more error energy. Finer keys deserve the second term, which costs as
// much time as the first.
constexpr int kTermRatio = 254;

constexpr int kOneTermBits = 4;

// The largest magnitude of `count` numbers, a multiple of 16.
inline float largest_magnitude(const float* numbers, int count) noexcept {
  FloatVec vec{};
  for (int i = 0; i < count; i += kVectorLanes) {
    const FloatVec next = load_floats(numbers + i);
    vec = larger(vec, larger(next, -1.0F * next));
  }
  return largest_lane<kVectorLanes>(vec);
}

inline int term_count(const SidePlan& keys) noexcept {
  for (int s = 0; s < keys.segment_count; ++s) {
    if (keys.segments[s].bits > kOneTermBits) return 2;
  }
  return 1;
}

// coarse = q · inverse to the nearest integer. A function, as only for parameters compilers heed
// __restrict.
inline void round_queries(const float* __restrict q, float inverse, int count,
                          std::int8_t* __restrict coarse) noexcept {
  for (int c = 0; c < count; ++c) coarse[c] = static_cast<std::int8_t>(round_lane(q[c] * inverse));
}

// What that leaves, in steps kTermRatio times finer.
inline void round_rests(const float* __restrict q, float inverse, int count,
                        const std::int8_t* __restrict coarse,
                        std::int8_t* __restrict fine) noexcept {
  for (int c = 0; c < count; ++c) {
    const float rest = q[c] * inverse - static_cast<float>(coarse[c]);
    fine[c] = static_cast<std::int8_t>(round_lane(rest * static_cast<float>(kTermRatio)));
  }
}

// queries: [rows, stride]; the segment's coordinates of the block.
inline void split_queries(const float* queries, std::int64_t stride, int rows, int term_count,
                          const SegmentPlan& segment, std::int8_t* terms, float* steps) noexcept {
  for (int r = 0; r < rows; ++r) {
    const float* q = queries + r * stride + segment.first;
    const float largest = largest_magnitude(q, segment.count);
    const float unit = largest / 127.0F;
    const float inverse = largest > kNegligible ? 127.0F / largest : 0.0F;
    std::int8_t* coarse = terms + static_cast<std::ptrdiff_t>(r * term_count) * segment.count;
    round_queries(q, inverse, segment.count, coarse);
    if (term_count == 2) {
      round_rests(q, inverse, segment.count, coarse, coarse + segment.count);
    }
    steps[r] = term_count == 1 ? unit : unit / static_cast<float>(kTermRatio);
  }
}

// What a level's integer part finds of one term of a row besides its words.
struct RowConstants {
  std::int32_t bias;   // what score sums start from
  std::uint64_t fits;  // bit g: whether the products of group g's 8 queries add up in 16 bits
};

// A segment's part of the integer queries of all rows.
struct alignas(64) QuerySegment {
  RowConstants constants[2 * kMaxRows];  // [rows, terms]
  float steps[kMaxRows];
};

// What prepare_queries makes: a QuerySegment for each of the keys' segments, then each segment's
// words, [rows, terms, count] of kQueryBytes each.
inline const QuerySegment* query_segments(const std::byte* prepared) noexcept {
  return std::launder(reinterpret_cast<const QuerySegment*>(prepared));
}

inline const std::uint8_t* query_words(const std::byte* prepared, const SidePlan& keys) noexcept {
  return reinterpret_cast<const std::uint8_t*>(
      prepared + static_cast<std::size_t>(keys.segment_count) * sizeof(QuerySegment));
}

// Bytes of a segment's words.
template <typename Integer>
inline std::ptrdiff_t word_bytes(const SegmentPlan& segment, int rows, int terms) noexcept {
  return static_cast<std::ptrdiff_t>(terms * rows) * segment.count * Integer::kQueryBytes;
}

// Kernels::prepared_bytes.
template <typename Integer>
std::size_t prepared_bytes(const SidePlan& keys, int rows) noexcept {
  std::size_t bytes = static_cast<std::size_t>(keys.segment_count) * sizeof(QuerySegment);
  for (int s = 0; s < keys.segment_count; ++s) {
    bytes +=
        static_cast<std::size_t>(word_bytes<Integer>(keys.segments[s], rows, term_count(keys)));
  }
  return (bytes + 63) / 64 * 64;
}

// Kernels::prepare_queries.
template <typename Integer>
void prepare_queries(const SidePlan& keys, const float* queries, int rows,
                     std::byte* prepared) noexcept {
  alignas(64) std::int8_t split[2 * kMaxRows * kMaxDim];  // [rows, terms, count]
  const int terms = term_count(keys);
  auto* words = reinterpret_cast<std::uint8_t*>(
      prepared + static_cast<std::size_t>(keys.segment_count) * sizeof(QuerySegment));
  for (int s = 0; s < keys.segment_count; ++s) {
    const SegmentPlan& plan = keys.segments[s];
    auto* segment =
        new (prepared + static_cast<std::size_t>(s) * sizeof(QuerySegment)) QuerySegment;
    split_queries(queries, keys.padded, rows, terms, plan, split, segment->steps);
    Integer::prepare(plan, split, terms * rows, words, segment->constants);
    words += word_bytes<Integer>(plan, rows, terms);
  }
}

}  // namespace TQAI_LOCAL
}  // namespace tqai::kernels::TQAI_LEVEL_NAMESPACE

#endif  // TQAI_QUERIES_INL
