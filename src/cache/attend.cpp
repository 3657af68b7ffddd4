#include "attend.hpp"

#include <algorithm>
#include <cmath>
#include <limits>
#include <memory>
#include <numeric>

#ifdef _OPENMP
#include <omp.h>
#endif

namespace tqai::detail {
namespace {

using kernels::kMaxRows;

constexpr float kInfinity = std::numeric_limits<float>::infinity();
constexpr float kLog2E = 1.44269504F;
// Sealed blocks are attended in parts of this many, whatever the number of threads, so that results
// do not depend on it.
constexpr std::size_t kPartBlocks = 64;
// Below this many multiplications a second thread costs more than it brings.
constexpr double kWorthThreads = 2e6;
// Units are prepared and finished in batches, to bound what lies between.
constexpr std::int64_t kBatchFloats = std::int64_t{1} << 23;

std::int64_t divide_up(std::int64_t a, std::int64_t b) { return (a + b - 1) / b; }

// Softmax states of up to kMaxRows query rows (tqai::kernels::Softmax).
struct PartState {
  float max[kMaxRows];
  float sums[kMaxRows][kernels::kLanes];
};

// One call of attend: its units are (batch row, kv head, block of query rows); each has one part of
// exact tokens and one per kPartBlocks sealed blocks.
class Attention {
 public:
  Attention(const Context& context, std::span<const Row> rows, std::int64_t tokens,
            const ConstTensor& queries, const Tensor& output, const AttendOptions& options);
  void run();

 private:
  struct Unit {
    std::int64_t batch_row;
    int kv_head;
    std::int64_t first_row;  // of the kv head's group · queries rows, queries outermost
    int rows;
  };
  struct Place {  // of a query row
    std::int64_t query_head;
    std::int64_t query;
  };
  // Working memory of a unit in a batch.
  struct Work {
    float* plain;       // [rows, padded key dim]
    float* rotated;     // [rows, padded key dim]
    float* mask;        // [rows, mask_columns_] or null
    float* parts;       // [parts_, rows, padded value dim]
    PartState* states;  // [parts_]
    bool* finite;       // [kMaxRows]
  };

  Unit unit(std::int64_t index) const;
  Place place(const Unit& unit, int row) const {
    const std::int64_t r = unit.first_row + row;
    return {unit.kv_head * group_ + r % group_, r / group_};
  }
  void prepare(const Unit& unit, const Work& work) const noexcept;
  void fill_mask(const Unit& unit, const Work& work) const noexcept;
  void attend_part(const Unit& unit, const Work& work, std::int64_t part) const noexcept;
  void attend_exact(const Unit& unit, const Work& work, kernels::Softmax softmax) const noexcept;
  void attend_sealed(const Unit& unit, const Work& work, kernels::Softmax softmax,
                     std::size_t first_block) const noexcept;
  // Points softmax at the part of `count` tokens from token `start` on.
  void set_range(const Unit& unit, const Work& work, std::int64_t start, std::int64_t* first,
                 std::int64_t* end, kernels::Softmax& softmax) const noexcept;
  void finish(const Unit& unit, const Work& work) const noexcept;
  double multiplications() const;

  const Context& context_;
  std::span<const Row> rows_;
  std::int64_t tokens_;
  const ConstTensor& queries_;
  const Tensor& output_;
  const AttendOptions& options_;
  float query_factor_;  // kernels::Softmax
  std::int64_t query_count_;
  std::int64_t group_;   // query heads of a kv head
  std::int64_t blocks_;  // of query rows, per kv head
  std::int64_t units_;
  std::int64_t parts_;           // of the longest row
  std::int64_t mask_first_ = 0;  // token of a mask row's first float
  std::int64_t mask_columns_ = 0;
  int key_padded_;
  int value_padded_;
};

Attention::Attention(const Context& context, std::span<const Row> rows, std::int64_t tokens,
                     const ConstTensor& queries, const Tensor& output, const AttendOptions& options)
    : context_(context),
      rows_(rows),
      tokens_(tokens),
      queries_(queries),
      output_(output),
      options_(options),
      query_factor_((std::isnan(options.scale)
                         ? 1.0F / std::sqrt(static_cast<float>(context.options.head_dim))
                         : options.scale) *
                    (options.soft_cap > 0.0F ? 1.0F / options.soft_cap : kLog2E)),
      query_count_(queries.shape[2]),
      group_(queries.shape[1] / context.options.kv_heads),
      blocks_(divide_up(group_ * query_count_, kMaxRows)),
      units_(queries.shape[0] * context.options.kv_heads * blocks_),
      parts_(1),
      key_padded_(padded_dim(context.options.head_dim)),
      value_padded_(padded_dim(context.options.value_head_dim)) {
  mask_first_ = tokens;
  for (const Row& row : rows) {
    const auto parts =
        static_cast<std::int64_t>((row.sealed.size() + kPartBlocks - 1) / kPartBlocks);
    parts_ = std::max(parts_, parts + 1);
    mask_first_ = std::min(mask_first_, row.first);
  }
  if (options.mask) mask_columns_ = tokens - mask_first_;
}

Attention::Unit Attention::unit(std::int64_t index) const {
  const std::int64_t block = index % blocks_;
  const std::int64_t head = index / blocks_ % context_.options.kv_heads;
  const std::int64_t first = block * kMaxRows;
  return {index / blocks_ / context_.options.kv_heads, static_cast<int>(head), first,
          static_cast<int>(std::min<std::int64_t>(kMaxRows, group_ * query_count_ - first))};
}

void Attention::prepare(const Unit& unit, const Work& work) const noexcept {
  const auto dim = static_cast<std::size_t>(context_.options.head_dim);
  const auto element = static_cast<std::int64_t>(size_of(queries_.dtype));
  for (int r = 0; r < unit.rows; ++r) {
    const Place at = place(unit, r);
    float* plain = work.plain + static_cast<std::ptrdiff_t>(r) * key_padded_;
    float* rotated = work.rotated + static_cast<std::ptrdiff_t>(r) * key_padded_;
    const char* from = static_cast<const char*>(queries_.data) +
                       (unit.batch_row * queries_.strides[0] + at.query_head * queries_.strides[1] +
                        at.query * queries_.strides[2]) *
                           element;
    std::fill_n(plain, key_padded_, 0.0F);
    std::fill_n(rotated, key_padded_, 0.0F);
    // A query that is not finite gives NaN, as in exact attention, and must not reach the kernels.
    work.finite[r] = context_.kernels->load_scaled(from, queries_.dtype, static_cast<int>(dim),
                                                   query_factor_, plain);
    if (!work.finite[r]) std::fill_n(plain, dim, 0.0F);
    context_.kernels->rotate(context_.codec->plan().keys, plain, rotated);
  }
  if (options_.mask) fill_mask(unit, work);
}

// A mask that adds NaN or +inf gives NaN, as in exact attention.
void Attention::fill_mask(const Unit& unit, const Work& work) const noexcept {
  const Mask& mask = *options_.mask;
  const auto pick = [&mask](std::size_t axis, std::int64_t i) {
    return (mask.shape[axis] == 1 ? 0 : i) * mask.strides[axis];
  };
  for (int r = 0; r < unit.rows; ++r) {
    const Place at = place(unit, r);
    float* row = work.mask + r * mask_columns_;
    const std::int64_t base = pick(0, unit.batch_row) + pick(1, at.query_head) + pick(2, at.query);
    const std::int64_t skipped = std::max<std::int64_t>(options_.first_token - mask_first_, 0);
    std::fill_n(row, std::min(skipped, mask_columns_), 0.0F);  // not seen anyhow
    for (std::int64_t i = skipped; i < mask_columns_; ++i) {
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
    if (!std::all_of(row + skipped, row + std::max(skipped, mask_columns_),
                     [](float x) { return x < kInfinity; })) {
      work.finite[r] = false;
      std::fill_n(row, mask_columns_, 0.0F);
    }
  }
}

void Attention::set_range(const Unit& unit, const Work& work, std::int64_t start,
                          std::int64_t* first, std::int64_t* end,
                          kernels::Softmax& softmax) const noexcept {
  for (int r = 0; r < unit.rows; ++r) {
    const std::int64_t position = tokens_ - query_count_ + place(unit, r).query;
    std::int64_t from = options_.first_token;
    if (options_.window > 0) from = std::max(from, position - options_.window + 1);
    first[r] = from - start;
    end[r] = (options_.causal ? position + 1 : tokens_) - start;
  }
  softmax.first = first;
  softmax.end = end;
  softmax.mask = options_.mask ? work.mask + (start - mask_first_) : nullptr;
}

void Attention::attend_part(const Unit& unit, const Work& work, std::int64_t part) const noexcept {
  PartState& state = work.states[part];
  kernels::Softmax softmax{};
  softmax.rows = unit.rows;
  softmax.soft_cap = options_.soft_cap;
  softmax.mask_stride = mask_columns_;
  softmax.max = state.max;
  softmax.sums = state.sums;
  softmax.output = work.parts + part * kMaxRows * value_padded_;
  softmax.output_stride = value_padded_;
  std::fill_n(state.max, kMaxRows, -kInfinity);
  std::fill_n(state.sums[0], kMaxRows * kernels::kLanes, 0.0F);
  std::fill_n(softmax.output, static_cast<std::ptrdiff_t>(unit.rows) * value_padded_, 0.0F);
  if (part == 0) {
    attend_exact(unit, work, softmax);
  } else {
    attend_sealed(unit, work, softmax, static_cast<std::size_t>(part - 1) * kPartBlocks);
  }
}

void Attention::attend_exact(const Unit& unit, const Work& work,
                             kernels::Softmax softmax) const noexcept {
  const Row& row = rows_[static_cast<std::size_t>(unit.batch_row)];
  std::int64_t first[kMaxRows];
  std::int64_t end[kMaxRows];
  const auto attend = [&](const ExactTokens& tokens, std::int64_t start) {
    if (!tokens) return;
    set_range(unit, work, start, first, end, softmax);
    context_.kernels->attend_exact(
        {exact_keys(context_, tokens, unit.kv_head), exact_values(context_, tokens, unit.kv_head),
         context_.options.dtype, context_.options.head_dim, context_.options.value_head_dim,
         tokens.header().tokens, work.plain, softmax});
  };
  attend(row.sinks, row.first);
  attend(row.tail, row.first + row.sink_tokens() + row.sealed_tokens);
}

void Attention::attend_sealed(const Unit& unit, const Work& work, kernels::Softmax softmax,
                              std::size_t first_block) const noexcept {
  const Row& row = rows_[static_cast<std::size_t>(unit.batch_row)];
  if (first_block >= row.sealed.size()) return;
  const std::size_t count = std::min(kPartBlocks, row.sealed.size() - first_block);
  kernels::TileSpan spans[kPartBlocks];
  const std::size_t offset =
      static_cast<std::size_t>(unit.kv_head) * context_.codec->layout().bytes();
  std::int64_t start = row.first + row.sink_tokens();
  for (std::size_t i = 0; i < first_block; ++i) start += row.sealed[i].tokens;
  for (std::size_t i = 0; i < count; ++i) {
    const BlockView& view = row.sealed[first_block + i];
    spans[i] = {reinterpret_cast<const std::uint8_t*>(view.block.payload()) + offset, view.tokens,
                view.block.header().first_token};
  }
  std::int64_t first[kMaxRows];
  std::int64_t end[kMaxRows];
  set_range(unit, work, start, first, end, softmax);
  const CentreScores centre(context_, row.centres, unit.kv_head, work.plain, key_padded_, unit.rows,
                            tokens_);
  context_.kernels->attend_tiles({&context_.codec->plan(), spans, static_cast<std::int64_t>(count),
                                  work.rotated, centre.constants(), centre.rope(), softmax});
}

void Attention::finish(const Unit& unit, const Work& work) const noexcept {
  const auto element = static_cast<std::int64_t>(size_of(output_.dtype));
  const int dim = context_.options.value_head_dim;
  const std::ptrdiff_t part_floats = static_cast<std::ptrdiff_t>(kMaxRows) * value_padded_;
  float merged[kernels::kMaxDim];
  float packed[kernels::kMaxDim];
  float unrotated[kernels::kMaxDim];
  for (int r = 0; r < unit.rows; ++r) {
    const Place at = place(unit, r);
    float max =
        options_.sink_scores != nullptr ? options_.sink_scores[at.query_head] * kLog2E : -kInfinity;
    for (std::int64_t p = 0; p < parts_; ++p) max = std::max(max, work.states[p].max[r]);
    float sums[kernels::kLanes] = {};
    if (options_.sink_scores != nullptr) {
      sums[0] = std::exp2(options_.sink_scores[at.query_head] * kLog2E - max);
    }
    std::fill_n(packed, dim, 0.0F);
    std::fill_n(merged, dim, 0.0F);
    for (std::int64_t p = 0; p < parts_; ++p) {
      const PartState& state = work.states[p];
      if (state.max[r] == -kInfinity) continue;
      const float share = std::exp2(state.max[r] - max);
      context_.kernels->add_scaled(state.sums[r], share, kernels::kLanes, sums);
      const float* from =
          work.parts + p * part_floats + static_cast<std::ptrdiff_t>(r) * value_padded_;
      context_.kernels->add_scaled(from, share, dim, p == 0 ? merged : packed);
    }
    // Sealed values were summed in their rotated domain.
    if (parts_ > 1) {
      context_.kernels->rotate_back(context_.codec->plan().values, packed, unrotated);
      for (int c = 0; c < dim; ++c) merged[c] += unrotated[c];
    }
    const float sum = std::accumulate(std::begin(sums), std::end(sums), 0.0F);
    const float factor = sum > 0.0F ? 1.0F / sum : 0.0F;
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

double Attention::multiplications() const {
  const double dims = context_.options.head_dim + context_.options.value_head_dim;
  return static_cast<double>(units_) * kMaxRows * static_cast<double>(tokens_) * dims;
}

void Attention::run() {
  const std::int64_t plain_floats = std::int64_t{kMaxRows} * key_padded_;
  const std::int64_t part_floats = std::int64_t{kMaxRows} * value_padded_ * parts_;
  const std::int64_t mask_floats = kMaxRows * mask_columns_;
  const std::int64_t unit_floats = 2 * plain_floats + part_floats + mask_floats;
  const std::int64_t batch = std::clamp<std::int64_t>(kBatchFloats / unit_floats, 1, units_);
  // Left as they are: zeroing would take as long as a short call's attention.
  const auto count_of = [batch](std::int64_t each) {
    return static_cast<std::size_t>(batch * each);
  };
  const std::unique_ptr<float[]> floats(new float[count_of(unit_floats)]);
  const std::unique_ptr<PartState[]> states(new PartState[count_of(parts_)]);
  const std::unique_ptr<bool[]> finite(new bool[count_of(kMaxRows)]);
  const auto work = [&](std::int64_t i) {
    float* plain = floats.get() + i * unit_floats;
    float* mask = plain + 2 * plain_floats + part_floats;
    return Work{plain,
                plain + plain_floats,
                options_.mask ? mask : nullptr,
                plain + 2 * plain_floats,
                states.get() + i * parts_,
                finite.get() + i * kMaxRows};
  };
  [[maybe_unused]] const bool threads = multiplications() > kWorthThreads;
  for (std::int64_t first = 0; first < units_; first += batch) {
    const std::int64_t count = std::min(batch, units_ - first);
    const auto prepare_unit = [&](std::int64_t i) { prepare(unit(first + i), work(i)); };
    const auto attend_unit_part = [&](std::int64_t i) {
      attend_part(unit(first + i / parts_), work(i / parts_), i % parts_);
    };
    const auto finish_unit = [&](std::int64_t i) { finish(unit(first + i), work(i)); };
#ifdef _OPENMP
    if (threads && omp_get_max_threads() > 1) {
#pragma omp parallel
      {
#pragma omp for schedule(static)
        for (std::int64_t i = 0; i < count; ++i) prepare_unit(i);
#pragma omp for schedule(dynamic)
        for (std::int64_t i = 0; i < count * parts_; ++i) attend_unit_part(i);
#pragma omp for schedule(static)
        for (std::int64_t i = 0; i < count; ++i) finish_unit(i);
      }
      continue;
    }
#endif
    // A parallel region of one thread would cost a microsecond.
    for (std::int64_t i = 0; i < count; ++i) prepare_unit(i);
    for (std::int64_t i = 0; i < count * parts_; ++i) attend_unit_part(i);
    for (std::int64_t i = 0; i < count; ++i) finish_unit(i);
  }
}

}  // namespace

void attend(const Context& context, std::span<const Row> rows, std::int64_t tokens,
            const ConstTensor& queries, const Tensor& output, const AttendOptions& options) {
  if (queries.shape[0] == 0 || queries.shape[1] == 0 || queries.shape[2] == 0) return;
  Attention(context, rows, tokens, queries, output, options).run();
}

}  // namespace tqai::detail
