// One call of attention over a cache's rows, as work that threads can share.
#pragma once

#include <cstdint>
#include <memory>
#include <span>
#include <tqai/cache.hpp>
#include <vector>

#include "centres.hpp"
#include "kernels/kernels.hpp"
#include "row.hpp"

namespace tqai::detail {

// Sealed blocks are attended in parts of this many, whatever the number of threads, so that results
// do not depend on it.
inline constexpr std::size_t kPartBlocks = 64;

constexpr std::int64_t divide_up(std::int64_t a, std::int64_t b) { return (a + b - 1) / b; }
constexpr std::int64_t round_up(std::int64_t a, std::int64_t unit) {
  return divide_up(a, unit) * unit;
}

// Working memory, of which each array begins a line.
constexpr std::int64_t kLineFloats = 16;
struct alignas(64) Line {
  float floats[kLineFloats];
};

// Softmax states of up to kMaxRows query rows (tqai::kernels::Softmax).
struct PartState {
  alignas(64) float sums[kernels::kMaxRows][kernels::kLanes];
  float max[kernels::kMaxRows];
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
  // Working memory of a unit in a batch; what floats point to is 64-byte aligned.
  struct Work {
    float* plain;           // [row_capacity_, padded key dim]
    float* factors;         // of `centres`
    float* mask;            // [row_capacity_, mask_stride_], where there is one
    float* outputs;         // of parts: [parts_, row_capacity_, padded value dim]
    std::byte* prepared;    // Kernels::prepare_queries, 64-byte aligned too
    PartState* states;      // of parts: [parts_]
    CentreScores* centres;  // of the batch row's sets: [sets_]
    bool* finite;           // [kMaxRows]
  };
  // Units first … first + count − 1, and their working memory.
  struct Batch {
    std::int64_t first;
    std::int64_t count;
    float* floats;
    PartState* states;
    CentreScores* centres;
    bool* finite;
  };
  // Units of a batch, and what they attend to: all of one batch row where they are several.
  struct Item {
    std::int64_t first;
    int count;
    std::int64_t part;
  };

  Unit unit(std::int64_t index) const noexcept;
  Place place(const Unit& unit, int row) const noexcept {
    const std::int64_t r = unit.first_row + row;
    return {unit.kv_head * group_ + r % group_, r / group_};
  }
  Work work(const Batch& batch, std::int64_t i) const noexcept;

  // Exact tokens are part 0; sealed blocks the next ones.
  std::int64_t parts_of(std::int64_t batch_row) const noexcept {
    const auto blocks = std::ssize(rows_[static_cast<std::size_t>(batch_row)].sealed);
    return 1 + divide_up(blocks, std::int64_t{kPartBlocks});
  }

  // attend.cpp: how the work is split.
  void add_sealed(const Batch& batch, std::vector<Item>& items) const;
  std::vector<Item> items(const Batch& batch, int threads) const;
  double multiplications() const;

  // attention.cpp: the work itself.
  void prepare(const Unit& unit, const Work& work) const noexcept;
  void fill_mask(const Unit& unit, const Work& work) const noexcept;
  void attend_item(const Batch& batch, const Item& item) const noexcept;
  void attend_exact(const Unit& unit, const Work& work, kernels::Softmax softmax) const noexcept;
  // Blocks of one part and one centre set.
  void attend_sealed(const Row& row, std::size_t first_block, std::size_t end_block,
                     std::span<const kernels::HeadRows> heads) const noexcept;
  // The state of a part, nothing seen so far.
  kernels::Softmax begin(const Unit& unit, const Work& work, std::int64_t part) const noexcept;
  // Points softmax at the tokens from token `start` on.
  void set_range(const Unit& unit, const Work& work, std::int64_t start, std::int64_t* first,
                 std::int64_t* end, kernels::Softmax& softmax) const noexcept;
  void finish(const Unit& unit, const Work& work) const noexcept;

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
  std::int64_t row_capacity_;    // of a unit: rows that the largest has
  std::int64_t parts_;           // of the longest batch row
  std::int64_t mask_first_ = 0;  // token of a mask row's first float
  std::int64_t mask_columns_ = 0;
  std::int64_t mask_stride_ = 0;
  int key_padded_;
  int value_padded_;
  std::int64_t sets_ = 1;           // centre sets of the batch row that has most
  std::int64_t factor_floats_ = 0;  // of one
  std::int64_t prepared_floats_ = 0;
  std::int64_t unit_floats_ = 0;
};

}  // namespace tqai::detail
