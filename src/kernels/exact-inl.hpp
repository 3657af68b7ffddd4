// Attention over exact tokens, 64 at a time, in fp32.
#ifndef TQAI_EXACT_INL
#define TQAI_EXACT_INL

#include "conversions-inl.hpp"
#include "fetch-inl.hpp"
#include "softmax-inl.hpp"

namespace tqai::kernels::TQAI_LEVEL_NAMESPACE {
namespace TQAI_LOCAL {

#if TQAI_VECTOR_LANES == 4 && !defined(TQAI_NEON)
constexpr bool kWidensFirst = widens_first(Level::scalar);
#else
constexpr bool kWidensFirst = false;
#endif

// A block's keys or values, which are widened where they are used, or before (widens_first).
struct ExactRows {
  const void* numbers;  // [tokens, a multiple of 16]
  DType dtype;
};

// Those of tokens from `start` on. What is not read in place becomes fp32 in `widened`, zero beyond
// dim.
inline ExactRows read_rows(const void* numbers, DType dtype, std::int64_t start, int dim,
                           int padded, int tokens, float* widened) noexcept {
  const std::ptrdiff_t bytes = dim * static_cast<std::ptrdiff_t>(size_of(dtype));
  const char* rows = static_cast<const char*>(numbers) + start * bytes;
  if (dim == padded && (dtype == DType::f32 || !kWidensFirst)) return {rows, dtype};
  for (int t = 0; t < tokens; ++t) {
    float* row = widened + static_cast<std::ptrdiff_t>(t) * padded;
    widen(rows + t * bytes, dtype, dim, row);
    for (int c = dim; c < padded; ++c) row[c] = 0.0F;
  }
  return {widened, DType::f32};
}

// Calls body<dtype>(numbers).
template <typename Body>
inline void with_numbers(ExactRows rows, Body&& body) noexcept {
  switch (rows.dtype) {
    case DType::f32: body.template operator()<DType::f32>(rows.numbers); break;
    case DType::f16: body.template operator()<DType::f16>(rows.numbers); break;
    case DType::bf16: body.template operator()<DType::bf16>(rows.numbers); break;
  }
}

// Whether tokens and columns that are read next are fetched meanwhile: processors foresee neither
// two rows at a time nor a step of a row's length. With one or two query rows there is no time left
// for it: memory is the limit.
constexpr bool fetches_ahead(int rows) noexcept { return rows > 2; }

// Sums of products in 16 lanes, of 16 tokens.
struct TokenSums {
  alignas(64) float lanes[kMaxRows][kLanes][kLanes];  // [rows, tokens, lanes]
};

// The sums of kTokens tokens from `first` on, which share the queries' loads. keys: the group's.
template <DType kType, int kRows, int kTokens>
inline void sum_products(const float* queries, const Number<kType>* keys, int padded, int first,
                         TokenSums& sums) noexcept {
  const Number<kType>* key = keys + static_cast<std::ptrdiff_t>(first) * padded;
  // Of one row, a pass over the keys for all lanes; of more, registers hold one part's sums.
  constexpr bool kAll = kRows == 1 && (kLaneParts == 2 || kTokens == 1);
  constexpr int kTogether = kAll ? kLaneParts : 1;
  for (int part = 0; part < kLaneParts; part += kTogether) {
    FloatVec acc[kRows][kTokens][kTogether] = {};
    for (int c = part * kVectorLanes; c < padded; c += kLanes) {
      for (int p = 0; p < kTogether; ++p) {
        const int at = c + p * kVectorLanes;
        FloatVec parts[kTokens];
        for (int t = 0; t < kTokens; ++t) {
          parts[t] = load_numbers<kType>(key + at + static_cast<std::ptrdiff_t>(t) * padded);
          if (fetches_ahead(kRows) && part == 0) {
            fetch_soon(key + at + static_cast<std::ptrdiff_t>(t + kTokens) * padded);
          }
        }
        for (int r = 0; r < kRows; ++r) {
          const FloatVec query =
              in_register(load_floats(queries + at + static_cast<std::ptrdiff_t>(r) * padded));
          for (int t = 0; t < kTokens; ++t) acc[r][t][p] = acc[r][t][p] + query * parts[t];
        }
      }
    }
    for (int r = 0; r < kRows; ++r) {
      for (int t = 0; t < kTokens; ++t) {
        for (int p = 0; p < kTogether; ++p) {
          store_floats(sums.lanes[r][first + t] + (part + p) * kVectorLanes, acc[r][t][p]);
        }
      }
    }
  }
}

// What is left of rows kRow and on after a step or two of their tokens' trees. Row by row by
// recursion: of a loop GCC keeps the sums in memory.
template <typename Lanes, int kRow = 0, int kRows, int kTokens>
TQAI_ALWAYS_INLINE void begin_trees(const FloatVec (&acc)[kRows][kTokens],
                                    float (*rests)[kLanes][kLanes], int at) noexcept {
  if constexpr (kTokens == 4) {
    store_floats(rests[kRow][at],
                 Lanes::begin_trees(acc[kRow][0], acc[kRow][1], acc[kRow][2], acc[kRow][3]));
  } else {
    store_floats(rests[kRow][at], Lanes::begin_trees(acc[kRow][0], acc[kRow][1]));
  }
  if constexpr (kRow + 1 < kRows) begin_trees<Lanes, kRow + 1>(acc, rests, at);
}

// sum_products where a register has all lanes: what is left of the tokens' trees after a step or
// two is stored, in place of all their sums.
template <typename Lanes, DType kType, int kRows, int kTokens>
inline void begin_products(const float* queries, const Number<kType>* keys, int padded, int first,
                           TokenSums& sums) noexcept {
  const Number<kType>* key = keys + static_cast<std::ptrdiff_t>(first) * padded;
  FloatVec acc[kRows][kTokens] = {};
  for (int c = 0; c < padded; c += kLanes) {
    FloatVec parts[kTokens];
    for (int t = 0; t < kTokens; ++t) {
      parts[t] = load_numbers<kType>(key + c + static_cast<std::ptrdiff_t>(t) * padded);
      if (fetches_ahead(kRows)) {
        fetch_soon(key + c + static_cast<std::ptrdiff_t>(t + kTokens) * padded);
      }
    }
    for (int r = 0; r < kRows; ++r) {
      const FloatVec query =
          in_register(load_floats(queries + c + static_cast<std::ptrdiff_t>(r) * padded));
      for (int t = 0; t < kTokens; ++t) acc[r][t] = acc[r][t] + query * parts[t];
    }
  }
  begin_trees<Lanes>(acc, sums.lanes, first / kTokens);
}

// score_exact of 16 tokens.
template <typename Lanes, DType kType, int kRows>
inline void score_sixteen(const float* queries, const Number<kType>* keys, int padded,
                          TokenSums& sums, float (*scores)[kTileTokens], int at) noexcept {
  constexpr int kTokens = kRows <= 4 ? 4 : 2;
  for (int t = 0; t < kLanes; t += kTokens) {
    begin_products<Lanes, kType, kRows, kTokens>(queries, keys, padded, t, sums);
  }
  for (int r = 0; r < kRows; ++r) {
    Lanes::template end_trees<kTokens>(sums.lanes[r], scores[r] + at);
  }
}

// scores[r, t] = q[r] · keys[t] of up to 16 tokens, summed in 16 lanes and then as a tree, whatever
// a register holds. Trees of 16 tokens are added up side by side.
template <typename Lanes, DType kType, int kRows>
inline void score_exact(const float* queries, const Number<kType>* keys, int padded, int tokens,
                        TokenSums& sums, float (*scores)[kTileTokens], int at) noexcept {
  if constexpr (kLaneParts == 1) {
    if (tokens == kLanes) {
      return score_sixteen<Lanes, kType, kRows>(queries, keys, padded, sums, scores, at);
    }
  }
  constexpr int kTokens = kRows <= (kVectorLanes == 16 ? 4 : 2) ? 4 : 2;
  // Where a pass reads a quarter of each line, long keys of one row take one pass each.
  const bool one_by_one = kRows == 1 && kLaneParts == 4 && padded > 64;
  int t = 0;
  for (; !one_by_one && t + kTokens <= tokens; t += kTokens) {
    sum_products<kType, kRows, kTokens>(queries, keys, padded, t, sums);
  }
  for (; t < tokens; ++t) sum_products<kType, kRows, 1>(queries, keys, padded, t, sums);
  for (int r = 0; r < kRows; ++r) Lanes::sum_trees(sums.lanes[r], scores[r] + at);
}

// output[r] += Σ_t weights[r, t] · values[t], of kVecs registers of coordinates. A block's sum, in
// order of tokens, is rounded on its own: added to what came before, each of many equal tokens
// would be rounded the same way. tokens: at least 1; the first one begins the sum, which is an
// addition less to wait for, 4 % of the time of four rows.
template <DType kType, int kRows, int kVecs>
inline void accumulate_columns(const float (*weights)[kTileTokens], const Number<kType>* values,
                               int padded, int tokens, float* output,
                               std::int64_t stride) noexcept {
  FloatVec sums[kRows][kVecs];
  for (int v = 0; v < kVecs; ++v) {
    const FloatVec part = load_numbers<kType>(values + v * kVectorLanes);
    for (int r = 0; r < kRows; ++r) sums[r][v] = weights[r][0] * part;
  }
  for (int t = 1; t < tokens; ++t) {
    const Number<kType>* value = values + static_cast<std::ptrdiff_t>(t) * padded;
    if (fetches_ahead(kRows)) fetch_soon(value + kVecs * kVectorLanes);
    FloatVec parts[kVecs];
    for (int v = 0; v < kVecs; ++v) parts[v] = load_numbers<kType>(value + v * kVectorLanes);
    for (int r = 0; r < kRows; ++r) {
      for (int v = 0; v < kVecs; ++v) sums[r][v] = sums[r][v] + weights[r][t] * parts[v];
    }
  }
  for (int r = 0; r < kRows; ++r) {
    for (int v = 0; v < kVecs; ++v) {
      float* to = output + r * stride + v * kVectorLanes;
      store_floats(to, load_floats(to) + sums[r][v]);
    }
  }
}

// The same of coordinates from c on, kVecs registers at a time, then fewer.
template <DType kType, int kRows, int kVecs>
inline void accumulate_from(int c, const float (*weights)[kTileTokens], const Number<kType>* values,
                            int padded, int tokens, float* output, std::int64_t stride) noexcept {
  for (; c + kVecs * kVectorLanes <= padded; c += kVecs * kVectorLanes) {
    accumulate_columns<kType, kRows, kVecs>(weights, values + c, padded, tokens, output + c,
                                            stride);
  }
  if constexpr (kVecs > 1) {
    accumulate_from<kType, kRows, kVecs / 2>(c, weights, values, padded, tokens, output, stride);
  }
}

// The same of all coordinates. As many sums at a time as hide an addition's latency.
template <DType kType, int kRows>
inline void accumulate_exact(const float (*weights)[kTileTokens], const Number<kType>* values,
                             int padded, int tokens, float* output, std::int64_t stride) noexcept {
  // Of one row: where it can, the whole vector; at AVX2 half as much of a short one takes less
  // time.
  constexpr int kOne = kVectorLanes == 16 ? 16 : kVectorLanes == 8 ? 4 : 8;
  constexpr int kLong = 256;
  if constexpr (kRows == 1 && kVectorLanes == 8) {
    if (padded >= kLong) {
      return accumulate_from<kType, 1, 2 * kOne>(0, weights, values, padded, tokens, output,
                                                 stride);
    }
  }
  constexpr int kVecs = kRows == 1 ? kOne : kRows <= (kVectorLanes == 16 ? 4 : 2) ? 4 : 2;
  accumulate_from<kType, kRows, kVecs>(0, weights, values, padded, tokens, output, stride);
}

// Calls body<n>(first) for blocks of n rows: as many as registers hold the sums of.
template <typename Body>
inline void for_row_blocks(int rows, Body&& body) noexcept {
  constexpr int kMost = kVectorLanes == 16 ? 8 : 4;
  for (int first = 0; first < rows; first += kMost) {
    switch (std::min(rows - first, kMost)) {
      case 1: body.template operator()<1>(first); break;
      case 2: body.template operator()<2>(first); break;
      case 3: body.template operator()<3>(first); break;
      case 5: body.template operator()<std::min(5, kMost)>(first); break;
      case 6: body.template operator()<std::min(6, kMost)>(first); break;
      case 7: body.template operator()<std::min(7, kMost)>(first); break;
      case 8: body.template operator()<std::min(8, kMost)>(first); break;
      default: body.template operator()<4>(first); break;
    }
  }
}

struct ExactScratch {
  Block block;
  TokenSums sums;
};

// Kernels::attend_exact.
template <typename Lanes>
void attend_exact(const AttendExact& args) noexcept {
  const int key_padded = padded_dim(args.key_dim);
  const int value_padded = padded_dim(args.value_dim);
  const Softmax& softmax = args.softmax;
  const Sight sight(softmax);
  ExactScratch scratch;
  Block& block = scratch.block;
  // Beside the last tokens of all, lanes that belong to none are read, and then left out.
  if (args.tokens % kLanes != 0) std::memset(scratch.sums.lanes, 0, sizeof scratch.sums.lanes);
  for (std::int64_t start = 0; start < args.tokens; start += kTileTokens) {
    const auto tokens = static_cast<int>(std::min<std::int64_t>(kTileTokens, args.tokens - start));
    if (!sight.any(start, tokens)) continue;
    const bool whole = sight.whole(start, tokens);
    const ExactRows keys =
        read_rows(args.keys, args.dtype, start, args.key_dim, key_padded, tokens, args.widened);
    with_numbers(keys, [&]<DType kType>(const void* numbers) {
      for (int at = 0; at < tokens; at += kLanes) {
        const auto* group = static_cast<const Number<kType>*>(numbers) +
                            static_cast<std::ptrdiff_t>(at) * key_padded;
        const int count = std::min(tokens - at, kLanes);
        for_row_blocks(softmax.rows, [&]<int kRows>(int first) {
          score_exact<Lanes, kType, kRows>(
              args.queries + static_cast<std::ptrdiff_t>(first) * key_padded, group, key_padded,
              count, scratch.sums, block.scores + first, at);
        });
      }
    });
    for (int r = 0; r < softmax.rows; ++r) {
      for (int t = tokens; t < kTileTokens; ++t) block.scores[r][t] = 0.0F;
      RowVecs vecs[1];
      load_row(block.scores[r], vecs[0]);
      if (!whole) limit(softmax, r, start, tokens, vecs[0]);
      weigh(softmax, r, vecs);
      store_row(block.scores[r], vecs[0]);
    }
    const ExactRows values = read_rows(args.values, args.dtype, start, args.value_dim, value_padded,
                                       tokens, args.widened);
    with_numbers(values, [&]<DType kType>(const void* numbers) {
      for_row_blocks(softmax.rows, [&]<int kRows>(int first) {
        accumulate_exact<kType, kRows>(
            block.scores + first, static_cast<const Number<kType>*>(numbers), value_padded, tokens,
            softmax.output + first * softmax.output_stride, softmax.output_stride);
      });
    });
  }
}

}  // namespace TQAI_LOCAL
}  // namespace tqai::kernels::TQAI_LEVEL_NAMESPACE

#endif  // TQAI_EXACT_INL
