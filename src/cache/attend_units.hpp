// One call of attention over a cache's rows, as units of work that threads can share.
#pragma once

#include <algorithm>
#include <cstdint>
#include <span>
#include <tqai/cache.hpp>

#include "../kernels/kernels.hpp"
#include "centres.hpp"
#include "row.hpp"

namespace tqai::detail {

// Tokens are attended to in parts of this many blocks, whatever the number of threads, so that
// results do not depend on it; and of no more, as a part's sums are single floats, which round.
inline constexpr std::size_t kPartBlocks = 64;
inline constexpr std::int64_t kPartTokens = std::int64_t{kPartBlocks} * kTileTokens;

constexpr std::int64_t divide_up(std::int64_t a, std::int64_t b) { return (a + b - 1) / b; }
constexpr std::int64_t round_up(std::int64_t a, std::int64_t unit) {
  return divide_up(a, unit) * unit;
}

/// What KvCache::attend was called with, already checked. `tokens`: the cache's logical length.
struct AttendCall {
  const Context* context;
  std::span<const Row> rows;
  std::int64_t tokens;
  const ConstTensor* queries;
  const Tensor* output;
  const AttendOptions* options;
};

/// The units of a call: (batch row, kv head, block of query rows), each with a part per
/// kPartTokens exact tokens, sinks first, then one per kPartBlocks sealed blocks. A unit is
/// prepared, its parts attended to in any order, then it is finished. Units are held in batches, to
/// bound what lies between. Thread-safe for different units, and for different parts of one.
class AttendUnits {
 public:
  explicit AttendUnits(const AttendCall& call);

  std::int64_t count() const noexcept { return units_; }
  /// Units of a kv head, and of a batch row: they follow one another.
  std::int64_t per_head() const noexcept { return blocks_; }
  std::int64_t per_row() const noexcept { return context_.options.kv_heads * blocks_; }
  /// Parts of unit `index`, and how many of them, the first ones, are of exact tokens.
  std::int64_t parts(std::int64_t index) const noexcept { return parts_of(unit(index).batch_row); }
  std::int64_t exact_parts(std::int64_t index) const noexcept {
    return exact_parts_of(unit(index).batch_row);
  }
  std::int64_t most_parts() const noexcept { return parts_; }
  /// Of all units, about.
  double multiplications() const noexcept;
  /// Bytes of working memory for `count` units, a multiple of 64.
  std::size_t bytes(std::int64_t count) const noexcept;
  /// Floats of a thread's working memory (kernels::AttendExact).
  std::size_t widened_floats() const noexcept {
    const CacheOptions& options = context_.options;
    return kernels::exact_floats(options.head_dim, options.value_head_dim, options.dtype,
                                 context_.kernels->level);
  }

 private:
  // Working memory, of which each array begins a line.
  static constexpr std::int64_t kLineFloats = 16;
  // Softmax states of up to kMaxRows query rows (kernels::Softmax).
  struct PartState {
    alignas(64) float sums[kernels::kMaxRows][kernels::kLanes];
    float max[kernels::kMaxRows];
  };

 public:
  /// Units first() … first() + count() − 1, and their working memory.
  class Batch {
   public:
    /// memory: bytes(count), 64-byte aligned.
    Batch(const AttendUnits& units, std::int64_t first, std::int64_t count,
          std::byte* memory) noexcept;
    const AttendUnits& units() const noexcept { return *units_; }
    std::int64_t first() const noexcept { return first_; }
    std::int64_t count() const noexcept { return count_; }

   private:
    friend AttendUnits;
    const AttendUnits* units_;
    std::int64_t first_;
    std::int64_t count_;
    float* floats_;
    PartState* states_;
    CentreScores* centres_;
    bool* finite_;
  };
  /// A part of `count` units from the batch's unit `first` on: one for a part of exact tokens, else
  /// up to kMaxHeads of one batch row.
  struct Item {
    std::int64_t first;
    int count;
    std::int64_t part;
  };

  /// index: of a unit in the batch.
  void prepare(const Batch& batch, std::int64_t index) const noexcept;
  /// widened: the thread's, widened_floats().
  void attend(const Batch& batch, const Item& item, float* widened) const noexcept;
  void finish(const Batch& batch, std::int64_t index) const noexcept;

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
  // Working memory of a unit in a batch; what floats point to is 64-byte aligned.
  struct Work {
    float* plain;           // [row_capacity_, padded key dim]
    float* factors;         // of `centres`
    float* mask;            // [row_capacity_, mask_stride_], where there is one
    std::uint8_t* runs;     // [row_capacity_ + 1, run_stride_], Softmax::mask_runs
    float* outputs;         // of parts: [parts_, row_capacity_, padded value dim]
    std::byte* prepared;    // Kernels::prepare_queries, 64-byte aligned too
    PartState* states;      // of parts: [parts_]
    CentreScores* centres;  // of the batch row's sets: [sets_]
    bool* finite;           // [kMaxRows]
  };

  Unit unit(std::int64_t index) const noexcept;
  Place place(const Unit& unit, int row) const noexcept {
    const std::int64_t r = unit.first_row + row;
    return {unit.kv_head * group_ + r % group_, r / group_};
  }
  Work work(const Batch& batch, std::int64_t index) const noexcept;

  std::int64_t exact_parts_of(std::int64_t batch_row) const noexcept {
    const Row& row = rows_[static_cast<std::size_t>(batch_row)];
    const std::int64_t tokens = row.sink_tokens() + row.tail_tokens();
    return std::max<std::int64_t>(divide_up(tokens, kPartTokens), 1);
  }
  std::int64_t parts_of(std::int64_t batch_row) const noexcept {
    const auto blocks = std::ssize(rows_[static_cast<std::size_t>(batch_row)].sealed);
    return exact_parts_of(batch_row) + divide_up(blocks, std::int64_t{kPartBlocks});
  }

  void fill_mask(const Unit& unit, const Work& work) const noexcept;
  // Columns [from, to) of a mask row; `base`: of its first element.
  void convert_mask(std::int64_t base, std::int64_t from, std::int64_t to,
                    float* row) const noexcept;
  // Of a boolean mask row whose columns follow one another: its runs, and its columns only where
  // the kernels read them. skipped: columns that are not seen anyhow.
  void find_runs(const std::uint8_t* seen, std::int64_t skipped, std::uint8_t* runs) const noexcept;
  void fill_boolean(const std::uint8_t* seen, std::int64_t skipped, const std::uint8_t* runs,
                    float* row) const noexcept;
  // Puts a mask row's columns where the row's tokens have their places.
  void close_gaps(const Row& row, float* mask) const noexcept;
  void attend_exact(const Unit& unit, const Work& work, std::int64_t part, kernels::Softmax softmax,
                    float* widened) const noexcept;
  // Blocks of one part and one centre set.
  void attend_sealed(const Row& row, std::size_t first_block, std::size_t end_block,
                     std::span<const kernels::HeadRows> heads) const noexcept;
  // The state of a part, nothing seen so far.
  kernels::Softmax begin(const Unit& unit, const Work& work, std::int64_t part) const noexcept;
  // Points softmax at the tokens from place `start` on.
  void set_range(const Unit& unit, const Work& work, std::int64_t start, std::int64_t* first,
                 std::int64_t* end, kernels::Softmax& softmax) const noexcept;

  const Context& context_;
  std::span<const Row> rows_;
  std::int64_t tokens_;
  const ConstTensor& queries_;
  const Tensor& output_;
  const AttendOptions& options_;
  float soft_cap_;      // 0: none
  float query_factor_;  // kernels::Softmax
  std::int64_t query_count_;
  std::int64_t group_;   // query heads of a kv head
  std::int64_t blocks_;  // of query rows, per kv head
  std::int64_t units_;
  std::int64_t row_capacity_;    // of a unit: rows that the largest has
  std::int64_t parts_;           // of the longest batch row
  std::int64_t mask_first_ = 0;  // place of a mask row's first float
  std::int64_t mask_columns_ = 0;
  std::int64_t mask_stride_ = 0;
  std::int64_t run_stride_ = 0;  // a multiple of 64
  int key_padded_;
  int value_padded_;
  std::int64_t sets_ = 1;           // centre sets of the batch row that has most
  std::int64_t factor_floats_ = 0;  // of one
  std::int64_t prepared_floats_ = 0;
  std::int64_t unit_floats_ = 0;
};

}  // namespace tqai::detail
