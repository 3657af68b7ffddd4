#include "attend_units.hpp"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <memory>
#include <numbers>
#include <numeric>
#include <type_traits>
#include <utility>

namespace tqai::detail {
namespace TQAI_LOCAL {

using kernels::kMaxHeads;
using kernels::kMaxRows;
using kernels::MaskRun;

constexpr float kInfinity = std::numeric_limits<float>::infinity();
constexpr float kLog2E = 1.44269504F;
// Larger caps change no score of a size that there is, and queries over them would be too small.
constexpr float kLargestSoftCap = 1e10F;

// What 64 bytes of a boolean mask add, eight at a time.
TQAI_INLINE std::uint8_t run_of(const std::uint8_t* seen) noexcept {
  constexpr std::uint64_t kOnes = 0x0101'0101'0101'0101U;
  std::uint64_t words[kTileTokens / 8];
  std::memcpy(words, seen, sizeof words);
  std::uint64_t any = 0;
  std::uint64_t zeros = 0;  // the lowest zero byte of a word, if any, has its top bit set
  for (const std::uint64_t word : words) {
    any |= word;
    zeros |= (word - kOnes) & ~word;
  }
  if (any == 0) return MaskRun::hidden;
  return (zeros & (kOnes << 7U)) == 0 ? MaskRun::zeros : MaskRun::mixed;
}

// Whether ten runs say the same.
TQAI_INLINE bool ten_alike(const std::uint8_t* runs) noexcept {
  std::uint64_t first = 0;
  std::uint64_t last = 0;
  std::memcpy(&first, runs, sizeof first);
  std::memcpy(&last, runs + 2, sizeof last);
  return first == last && first == runs[0] * 0x0101'0101'0101'0101U;
}

// An attention sink's score in base 2, finite if it is.
TQAI_INLINE float sink_of(float score) noexcept {
  if (!std::isfinite(score)) return score;
  constexpr float kMost = std::numeric_limits<float>::max();
  return std::clamp(score * kLog2E, -kMost, kMost);
}

// ln(sum · 2^max). In double, since it is a difference of such numbers that counts.
TQAI_INLINE float log_of(float sum, float max, bool is_finite) noexcept {
  if (!is_finite) return std::numeric_limits<float>::quiet_NaN();
  if (!(sum > 0.0F)) return -kInfinity;
  return static_cast<float>(std::numbers::ln2 *
                            (static_cast<double>(max) + std::log2(static_cast<double>(sum))));
}

// Coordinates of rows [rows, padded] as trellis codes of keys are stored: by key_coordinate,
// without its divisions.
TQAI_INLINE void order_as_stored(float* rows, int count, std::int64_t padded) noexcept {
  float row[kernels::kMaxDim];
  const std::int64_t quads = padded / 4;
  for (int r = 0; r < count; ++r, rows += padded) {
    std::copy_n(rows, padded, row);
    for (std::int64_t i = 0; i < quads; ++i) {
      for (std::int64_t part = 0; part < 4; ++part) rows[4 * i + part] = row[part * quads + i];
    }
  }
}

}  // namespace TQAI_LOCAL

TQAI_INLINE AttendUnits::AttendUnits(const AttendCall& call)
    : context_(*call.context),
      rows_(call.rows),
      tokens_(call.tokens),
      queries_(*call.queries),
      output_(*call.output),
      options_(*call.options),
      soft_cap_(options_.soft_cap <= kLargestSoftCap ? options_.soft_cap : 0.0F),
      query_factor_(
          options_.scale.value_or(1.0F / std::sqrt(static_cast<float>(context_.options.head_dim))) *
          (soft_cap_ > 0.0F ? 1.0F / soft_cap_ : kLog2E)),
      query_count_(queries_.shape[2]),
      group_(queries_.shape[1] / context_.options.kv_heads),
      blocks_(divide_up(group_ * query_count_, kMaxRows)),
      units_(queries_.shape[0] * context_.options.kv_heads * blocks_),
      row_capacity_(std::min<std::int64_t>(kMaxRows, group_ * query_count_)),
      parts_(1),
      key_padded_(padded_dim(context_.options.head_dim)),
      value_padded_(padded_dim(context_.options.value_head_dim)) {
  mask_first_ = tokens_;
  for (std::size_t b = 0; b < rows_.size(); ++b) {
    parts_ = std::max(parts_, parts_of(static_cast<std::int64_t>(b)));
    mask_first_ = std::min(mask_first_, rows_[b].first);
  }
  if (options_.mask) mask_columns_ = tokens_ - mask_first_;
  mask_stride_ = round_up(mask_columns_, kLineFloats);
  run_stride_ = round_up(divide_up(mask_columns_, std::int64_t{kTileTokens}), kLineBytes);
  bool has_rope = false;
  for (const Row& row : rows_) {
    sets_ = std::max(sets_, std::ssize(row.centre_sets));
    for (const Centres& centres : row.centre_sets) {
      has_rope = has_rope || CentreScores::has_rope(context_, centres);
    }
  }
  if (has_rope) {
    factor_floats_ = CentreScores::factor_floats(context_, static_cast<int>(row_capacity_));
  }
  prepared_floats_ =
      static_cast<std::int64_t>(context_.kernels->prepared_bytes(context_.codec->plan().keys,
                                                                 static_cast<int>(row_capacity_)) /
                                sizeof(float));
  unit_floats_ = row_capacity_ * (key_padded_ + mask_stride_ + parts_ * value_padded_) +
                 (row_capacity_ + 1) * run_stride_ / static_cast<std::int64_t>(sizeof(float)) +
                 sets_ * factor_floats_ + prepared_floats_;
}

TQAI_INLINE AttendUnits::Unit AttendUnits::unit(std::int64_t index) const noexcept {
  const std::int64_t block = index % blocks_;
  const std::int64_t head = index / blocks_ % context_.options.kv_heads;
  const std::int64_t first = block * kMaxRows;
  return {index / blocks_ / context_.options.kv_heads, static_cast<int>(head), first,
          static_cast<int>(std::min<std::int64_t>(kMaxRows, group_ * query_count_ - first))};
}

TQAI_INLINE double AttendUnits::multiplications() const noexcept {
  const double dims = context_.options.head_dim + context_.options.value_head_dim;
  return static_cast<double>(units_) * kMaxRows * static_cast<double>(tokens_) * dims;
}

TQAI_INLINE std::size_t AttendUnits::bytes(std::int64_t count) const noexcept {
  static_assert(std::is_trivially_destructible_v<CentreScores>);
  const std::size_t of_one = static_cast<std::size_t>(unit_floats_) * sizeof(float) +
                             static_cast<std::size_t>(parts_) * sizeof(PartState) +
                             static_cast<std::size_t>(sets_) * sizeof(CentreScores) +
                             std::size_t{kMaxRows};
  return (static_cast<std::size_t>(count) * of_one + 63) / 64 * 64;
}

// What lies in the memory is left as it is: zeroing would take as long as a short call's attention.
TQAI_INLINE AttendUnits::Batch::Batch(const AttendUnits& units, std::int64_t first,
                                      std::int64_t count, std::byte* memory) noexcept
    : units_(&units), first_(first), count_(count) {
  // In order of alignment: multiples of lines, of 8 bytes, and bytes.
  static_assert(sizeof(PartState) % 64 == 0 && sizeof(CentreScores) % alignof(CentreScores) == 0);
  const auto take = [&memory, count](std::int64_t each, std::size_t bytes) {
    return std::exchange(memory, memory + static_cast<std::size_t>(count * each) * bytes);
  };
  floats_ = reinterpret_cast<float*>(take(units.unit_floats_, sizeof(float)));
  states_ = reinterpret_cast<PartState*>(take(units.parts_, sizeof(PartState)));
  centres_ = reinterpret_cast<CentreScores*>(take(units.sets_, sizeof(CentreScores)));
  finite_ = reinterpret_cast<bool*>(take(kMaxRows, 1));
}

TQAI_INLINE AttendUnits::Work AttendUnits::work(const Batch& batch,
                                                std::int64_t index) const noexcept {
  Work work{};
  work.plain = batch.floats_ + index * unit_floats_;
  work.factors = work.plain + row_capacity_ * key_padded_;
  work.mask = work.factors + sets_ * factor_floats_;
  float* const runs = work.mask + row_capacity_ * mask_stride_;
  work.runs = reinterpret_cast<std::uint8_t*>(runs);
  work.outputs =
      runs + (row_capacity_ + 1) * run_stride_ / static_cast<std::int64_t>(sizeof(float));
  work.prepared =
      reinterpret_cast<std::byte*>(work.outputs + row_capacity_ * parts_ * value_padded_);
  work.states = batch.states_ + index * parts_;
  work.centres = batch.centres_ + index * sets_;
  work.finite = batch.finite_ + index * kMaxRows;
  return work;
}

TQAI_INLINE void AttendUnits::prepare(const Batch& batch, std::int64_t index) const noexcept {
  const Unit unit = this->unit(batch.first_ + index);
  const Work work = this->work(batch, index);
  const auto dim = static_cast<std::size_t>(context_.options.head_dim);
  const auto element = static_cast<std::int64_t>(size_of(queries_.dtype));
  alignas(64) float rotated[kMaxRows * kernels::kMaxDim];
  for (int r = 0; r < unit.rows; ++r) {
    const Place at = place(unit, r);
    float* plain = work.plain + static_cast<std::ptrdiff_t>(r) * key_padded_;
    const char* from = static_cast<const char*>(queries_.data) +
                       (unit.batch_row * queries_.strides[0] + at.query_head * queries_.strides[1] +
                        at.query * queries_.strides[2]) *
                           element;
    std::fill_n(plain, key_padded_, 0.0F);
    // A query that is not finite gives NaN, as in exact attention, and must not reach the kernels.
    work.finite[r] = context_.kernels->load_scaled(from, queries_.dtype, static_cast<int>(dim),
                                                   query_factor_, plain);
    if (!work.finite[r]) std::fill_n(plain, dim, 0.0F);
  }
  if (options_.mask) fill_mask(unit, work);
  const Row& row = rows_[static_cast<std::size_t>(unit.batch_row)];
  if (row.sealed.empty()) return;
  const kernels::SidePlan& keys = context_.codec->plan().keys;
  std::fill_n(rotated, unit.rows * key_padded_, 0.0F);
  if (context_.options.key_basis) {
    context_.kernels->transform_queries(context_.query_transform(unit.kv_head),
                                        static_cast<int>(dim), work.plain, unit.rows, key_padded_,
                                        rotated);
    if (context_.options.key_codes == CodeKind::trellis) {
      order_as_stored(rotated, unit.rows, key_padded_);
    }
  } else {
    for (int r = 0; r < unit.rows; ++r) {
      context_.kernels->rotate(keys, work.plain + static_cast<std::ptrdiff_t>(r) * key_padded_,
                               rotated + static_cast<std::ptrdiff_t>(r) * key_padded_);
    }
  }
  context_.kernels->prepare_queries(keys, rotated, unit.rows, work.prepared);
  for (std::size_t set = 0; set < row.centre_sets.size(); ++set) {
    std::construct_at(work.centres + set, context_, row.centre_sets[set], unit.kv_head, work.plain,
                      key_padded_, unit.rows,
                      work.factors + static_cast<std::ptrdiff_t>(set) * factor_floats_);
  }
}

// A mask that adds NaN or +inf gives NaN, as in exact attention.
TQAI_INLINE void AttendUnits::fill_mask(const Unit& unit, const Work& work) const noexcept {
  const Mask& mask = *options_.mask;
  const auto pick = [&mask](std::size_t axis, std::int64_t i) {
    return (mask.shape[axis] == 1 ? 0 : i) * mask.strides[axis];
  };
  std::int64_t base_before = 0;
  for (int r = 0; r < unit.rows; ++r) {
    const Place at = place(unit, r);
    float* row = work.mask + r * mask_stride_;
    const std::int64_t base = pick(0, unit.batch_row) + pick(1, at.query_head) + pick(2, at.query);
    const std::int64_t skipped = std::max<std::int64_t>(options_.first_token - mask_first_, 0);
    std::uint8_t* runs = work.runs + r * run_stride_;
    const Row& tokens = rows_[static_cast<std::size_t>(unit.batch_row)];
    if (mask.kind == Mask::Kind::boolean && mask.strides[3] == 1 && tokens.gaps.empty()) {
      // Query heads of one query mostly share a mask.
      if (r > 0 && base == base_before) {
        std::copy_n(runs - run_stride_, run_stride_, runs);
      } else {
        find_runs(static_cast<const std::uint8_t*>(mask.data) + base, skipped, runs);
      }
      base_before = base;
      fill_boolean(static_cast<const std::uint8_t*>(mask.data) + base, skipped, runs, row);
      continue;
    }
    std::fill_n(row, std::min(skipped, mask_columns_), 0.0F);  // not seen anyhow
    convert_mask(base, skipped, mask_columns_, row);
    if (!std::all_of(row + skipped, row + std::max(skipped, mask_columns_),
                     [](float x) { return x < kInfinity; })) {
      work.finite[r] = false;
      std::fill_n(row, mask_columns_, 0.0F);
    }
    close_gaps(tokens, row);
    for (std::int64_t from = 0; from < mask_columns_; from += kTileTokens) {
      const float* end = row + std::min<std::int64_t>(from + kTileTokens, mask_columns_);
      const auto all = [&](float value) {
        return std::all_of(static_cast<const float*>(row + from), end,
                           [=](float x) { return x == value; });
      };
      runs[from / kTileTokens] = all(0.0F)         ? MaskRun::zeros
                                 : all(-kInfinity) ? MaskRun::hidden
                                                   : MaskRun::mixed;
    }
  }
  std::uint8_t* const common = work.runs + unit.rows * run_stride_;
  const std::int64_t count = divide_up(mask_columns_, std::int64_t{kTileTokens});
  std::copy_n(work.runs, count, common);
  for (int r = 1; r < unit.rows; ++r) {
    const std::uint8_t* runs = work.runs + r * run_stride_;
    for (std::int64_t i = 0; i < count; ++i) {
      common[i] = static_cast<std::uint8_t>(common[i] & runs[i]);
    }
  }
}

TQAI_INLINE void AttendUnits::convert_mask(std::int64_t base, std::int64_t from, std::int64_t to,
                                           float* row) const noexcept {
  const Mask& mask = *options_.mask;
  for (std::int64_t i = from; i < to; ++i) {
    const std::int64_t at_element =
        base + (mask_first_ + i - options_.first_token) * mask.strides[3];
    switch (mask.kind) {
      case Mask::Kind::boolean:
        row[i] = static_cast<const std::uint8_t*>(mask.data)[at_element] != 0 ? 0.0F : -kInfinity;
        break;
      case Mask::Kind::f32: row[i] = static_cast<const float*>(mask.data)[at_element]; break;
      case Mask::Kind::f16:
        row[i] = from_half(static_cast<const std::uint16_t*>(mask.data)[at_element]);
        break;
      case Mask::Kind::bf16:
        row[i] = from_bfloat16(static_cast<const std::uint16_t*>(mask.data)[at_element]);
        break;
    }
  }
}

TQAI_INLINE void AttendUnits::find_runs(const std::uint8_t* seen, std::int64_t skipped,
                                        std::uint8_t* runs) const noexcept {
  const std::int64_t offset = mask_first_ - options_.first_token;
  const std::int64_t count = divide_up(mask_columns_, std::int64_t{kTileTokens});
  const auto end_of = [this](std::int64_t run) {
    return std::min<std::int64_t>((run + 1) * kTileTokens, mask_columns_);
  };
  for (std::int64_t run = 0; run < count; ++run) {
    // Columns before `skipped` are not seen anyhow.
    const std::int64_t from = std::max(run * kTileTokens, skipped);
    if (end_of(run) - from == kTileTokens) {
      runs[run] = run_of(seen + offset + from);
      continue;
    }
    std::uint8_t unseen = 0;  // at most 64
    for (std::int64_t i = from; i < end_of(run); ++i) {
      unseen = static_cast<std::uint8_t>(unseen + (seen[offset + i] == 0 ? 1 : 0));
    }
    runs[run] = unseen == 0                    ? MaskRun::zeros
                : unseen == end_of(run) - from ? MaskRun::hidden
                                               : MaskRun::mixed;
  }
}

TQAI_INLINE void AttendUnits::fill_boolean(const std::uint8_t* seen, std::int64_t skipped,
                                           const std::uint8_t* runs, float* row) const noexcept {
  const std::int64_t offset = mask_first_ - options_.first_token;
  const std::int64_t count = divide_up(mask_columns_, std::int64_t{kTileTokens});
  const auto end_of = [this](std::int64_t run) {
    return std::min<std::int64_t>((run + 1) * kTileTokens, mask_columns_);
  };
  for (std::int64_t run = 0; run < count; ++run) {
    if (run > 0 && run + 8 < count && runs[run] != MaskRun::mixed && ten_alike(runs + run - 1)) {
      run += 7;
      continue;
    }
    const bool alike = (run == 0 || runs[run - 1] == runs[run]) &&
                       (run + 1 == count || runs[run + 1] == runs[run]);
    if (alike && runs[run] != MaskRun::mixed) continue;
    for (std::int64_t i = run * kTileTokens; i < end_of(run); ++i) {
      row[i] = i < skipped || seen[offset + i] != 0 ? 0.0F : -kInfinity;
    }
  }
}

TQAI_INLINE void AttendUnits::close_gaps(const Row& row, float* mask) const noexcept {
  if (row.gaps.empty()) return;
  auto gap = row.gaps.begin();
  std::int64_t token = row.first;
  for (std::int64_t place = row.first; place < row.first + row.held(); ++place, ++token) {
    for (; gap != row.gaps.end() && gap->first <= token; ++gap) token += gap->count;
    mask[place - mask_first_] = mask[token - mask_first_];
  }
}

TQAI_INLINE void AttendUnits::set_range(const Unit& unit, const Work& work, std::int64_t start,
                                        std::int64_t* first, std::int64_t* end,
                                        kernels::Softmax& softmax) const noexcept {
  const Row& row = rows_[static_cast<std::size_t>(unit.batch_row)];
  for (int r = 0; r < unit.rows; ++r) {
    const std::int64_t position = tokens_ - query_count_ + place(unit, r).query;
    std::int64_t from = options_.first_token;
    if (options_.window > 0) from = std::max(from, position - options_.window + 1);
    first[r] = place_of(row, from) - start;
    const bool sees_later = !options_.causal && options_.window == 0;
    end[r] = place_of(row, sees_later ? tokens_ : position + 1) - start;
  }
  softmax.first = first;
  softmax.end = end;
  softmax.mask = options_.mask ? work.mask + (start - mask_first_) : nullptr;
  softmax.mask_runs = work.runs;
  softmax.mask_column = start - mask_first_;
}

TQAI_INLINE kernels::Softmax AttendUnits::begin(const Unit& unit, const Work& work,
                                                std::int64_t part) const noexcept {
  PartState& state = work.states[part];
  kernels::Softmax softmax{};
  softmax.rows = unit.rows;
  softmax.soft_cap = soft_cap_;
  softmax.mask_stride = mask_stride_;
  softmax.mask_run_stride = run_stride_;
  softmax.max = state.max;
  softmax.sums = state.sums;
  softmax.output = work.outputs + part * row_capacity_ * value_padded_;
  softmax.output_stride = value_padded_;
  std::fill_n(state.max, kMaxRows, -kInfinity);
  std::fill_n(state.sums[0], kMaxRows * kernels::kLanes, 0.0F);
  std::fill_n(softmax.output, static_cast<std::ptrdiff_t>(unit.rows) * value_padded_, 0.0F);
  return softmax;
}

TQAI_INLINE void AttendUnits::attend(const Batch& batch, const Item& item,
                                     float* widened) const noexcept {
  const std::int64_t batch_row = unit(batch.first_ + item.first).batch_row;
  const std::int64_t exact_parts = exact_parts_of(batch_row);
  if (item.part < exact_parts) {
    for (int u = 0; u < item.count; ++u) {
      const Unit each = unit(batch.first_ + item.first + u);
      const Work memory = work(batch, item.first + u);
      attend_exact(each, memory, item.part, begin(each, memory, item.part), widened);
    }
    return;
  }
  kernels::HeadRows heads[kMaxHeads];
  std::int64_t first[kMaxHeads][kMaxRows];
  std::int64_t end[kMaxHeads][kMaxRows];
  const Row& row = rows_[static_cast<std::size_t>(batch_row)];
  const std::size_t first_block = static_cast<std::size_t>(item.part - exact_parts) * kPartBlocks;
  const std::size_t end_block = std::min(first_block + kPartBlocks, row.sealed.size());
  std::int64_t start = row.first + row.sink_tokens();
  for (std::size_t i = 0; i < first_block; ++i) {
    start += row.sealed[i].tokens;
  }
  for (int u = 0; u < item.count; ++u) {
    const Unit each = unit(batch.first_ + item.first + u);
    const Work memory = work(batch, item.first + u);
    heads[u].head = each.kv_head;
    heads[u].queries = memory.prepared;
    heads[u].softmax = begin(each, memory, item.part);
  }
  // Blocks with the same centres together: mostly all of them.
  for (std::size_t block = first_block; block < end_block;) {
    const std::int32_t set = row.sealed[block].set;
    std::int64_t run_tokens = 0;
    std::size_t run_end = block;
    for (; run_end < end_block && row.sealed[run_end].set == set; ++run_end) {
      run_tokens += row.sealed[run_end].tokens;
    }
    for (int u = 0; u < item.count; ++u) {
      const Unit each = unit(batch.first_ + item.first + u);
      const Work memory = work(batch, item.first + u);
      const CentreScores& centre = memory.centres[set];
      set_range(each, memory, start, first[u], end[u], heads[u].softmax);
      heads[u].centre_scores = centre.constants();
      heads[u].rope = centre.rope();
    }
    attend_sealed(row, block, run_end, {heads, static_cast<std::size_t>(item.count)});
    block = run_end;
    start += run_tokens;
  }
}

TQAI_INLINE void AttendUnits::attend_exact(const Unit& unit, const Work& work, std::int64_t part,
                                           kernels::Softmax softmax,
                                           float* widened) const noexcept {
  const Row& row = rows_[static_cast<std::size_t>(unit.batch_row)];
  std::int64_t first[kMaxRows];
  std::int64_t end[kMaxRows];
  // Tokens [from, to) of those, of which the first is token `start`.
  const auto attend = [&](const ExactTokens& tokens, std::int64_t start, std::int64_t from,
                          std::int64_t to) {
    if (from >= to) return;
    set_range(unit, work, start + from, first, end, softmax);
    const auto skipped = static_cast<std::size_t>(from);
    context_.kernels->attend_exact(
        {exact_keys(context_, tokens, unit.kv_head) + skipped * context_.key_bytes(),
         exact_values(context_, tokens, unit.kv_head) + skipped * context_.value_bytes(),
         context_.options.dtype, context_.options.head_dim, context_.options.value_head_dim,
         to - from, work.plain, widened, softmax});
  };
  const std::int64_t sinks = row.sink_tokens();
  const std::int64_t from = part * kPartTokens;
  const std::int64_t to = std::min(from + kPartTokens, sinks + row.tail_tokens());
  attend(row.sinks, row.first, from, std::min(to, sinks));
  attend(row.tail, row.first + sinks + row.sealed_tokens, std::max(from, sinks) - sinks,
         to - sinks);
}

TQAI_INLINE void AttendUnits::attend_sealed(
    const Row& row, std::size_t first_block, std::size_t end_block,
    std::span<const kernels::HeadRows> heads) const noexcept {
  const std::size_t count = end_block - first_block;
  kernels::TileSpan spans[kPartBlocks];
  for (std::size_t i = 0; i < count; ++i) {
    const BlockView& view = row.sealed[first_block + i];
    spans[i] = {reinterpret_cast<const std::uint8_t*>(view.block.header().tiles), view.tokens,
                positions_of(view)};
  }
  context_.kernels->attend_tiles({&context_.codec->plan(), spans, static_cast<std::int64_t>(count),
                                  heads.data(), static_cast<int>(heads.size())});
}

TQAI_INLINE void AttendUnits::finish(const Batch& batch, std::int64_t index) const noexcept {
  const Unit unit = this->unit(batch.first_ + index);
  const Work work = this->work(batch, index);
  const auto element = static_cast<std::int64_t>(size_of(output_.dtype));
  const int dim = context_.options.value_head_dim;
  const std::int64_t part_floats = row_capacity_ * value_padded_;
  const std::int64_t parts = parts_of(unit.batch_row);
  const std::int64_t exact_parts = exact_parts_of(unit.batch_row);
  float merged[kernels::kMaxDim];
  float packed[kernels::kMaxDim];
  float unrotated[kernels::kMaxDim];
  for (int r = 0; r < unit.rows; ++r) {
    const Place at = place(unit, r);
    const float sink =
        options_.sink_scores != nullptr ? sink_of(options_.sink_scores[at.query_head]) : -kInfinity;
    if (std::isnan(sink)) work.finite[r] = false;
    float max = sink;
    for (std::int64_t p = 0; p < parts; ++p) max = std::max(max, work.states[p].max[r]);
    float sums[kernels::kLanes] = {};
    // One of +inf has all weight, and differs from itself by NaN.
    if (sink > -kInfinity) sums[0] = sink == max ? 1.0F : std::exp2(sink - max);
    std::fill_n(packed, dim, 0.0F);
    std::fill_n(merged, dim, 0.0F);
    for (std::int64_t p = 0; p < parts; ++p) {
      const PartState& state = work.states[p];
      if (state.max[r] == -kInfinity) continue;
      const float share = std::exp2(state.max[r] - max);
      context_.kernels->add_scaled(state.sums[r], share, kernels::kLanes, sums);
      const float* from =
          work.outputs + p * part_floats + static_cast<std::ptrdiff_t>(r) * value_padded_;
      context_.kernels->add_scaled(from, share, dim, p < exact_parts ? merged : packed);
    }
    // Sealed values were summed in their rotated domain.
    if (parts > exact_parts) {
      context_.kernels->rotate_back(context_.codec->plan().values, packed, unrotated);
      for (int c = 0; c < dim; ++c) merged[c] += unrotated[c];
    }
    const float sum = std::accumulate(std::begin(sums), std::end(sums), 0.0F);
    const float factor = sum > 0.0F ? 1.0F / sum : 0.0F;
    if (options_.log_sum_exp) {
      const Tensor& logs = *options_.log_sum_exp;
      static_cast<float*>(logs.data)[unit.batch_row * logs.strides[0] + at.query * logs.strides[1] +
                                     at.query_head * logs.strides[2]] =
          log_of(sum, max, work.finite[r]);
    }
    for (int c = 0; c < dim; ++c) {
      merged[c] = work.finite[r] ? merged[c] * factor : std::numeric_limits<float>::quiet_NaN();
    }
    convert_from_float(merged, static_cast<std::size_t>(dim), output_.dtype,
                       static_cast<char*>(output_.data) +
                           (unit.batch_row * output_.strides[0] + at.query * output_.strides[1] +
                            at.query_head * output_.strides[2]) *
                               element);
  }
}

}  // namespace tqai::detail
