#include "attend.hpp"

#include <algorithm>
#include <vector>

#include "../threads.hpp"
#include "attend_units.hpp"

namespace tqai::detail {
namespace TQAI_LOCAL {

using Batch = AttendUnits::Batch;
using Item = AttendUnits::Item;

// Blocks of query rows of a kv head up to which its tiles are read once for all of them.
constexpr std::int64_t kMostBlocksTogether = 2;
// In how many shares a thread's last item is split; they still read some heads in order.
constexpr int kShares = 4;
// Below this many multiplications a second thread costs more than it brings.
constexpr double kWorthThreads = 2e6;
// Of working memory in a batch.
constexpr std::int64_t kBatchFloats = std::int64_t{1} << 23;

// What a batch's units attend to, as work for threads.
class Items {
 public:
  /// With room for those of any batch of up to `units` units. Throws std::bad_alloc.
  Items(const AttendUnits& of, std::int64_t units, int threads) : units_(of), threads_(threads) {
    const auto count = static_cast<std::size_t>(threads);
    if (threads > 1) last_.reserve(count);
    // Each unit in each part; what is split makes 2 kShares a thread at most, and one an item.
    items_.reserve(static_cast<std::size_t>(units * of.most_parts()) + (2 * kShares + 1) * count);
  }

  // The last items, one for each thread, are split into kShares a thread, to be spread evenly. How
  // units are split does not change any number.
  const std::vector<Item>& of(const Batch& batch) noexcept {
    items_.clear();
    last_.clear();
    add_sealed(batch);
    if (threads_ > 1) {
      const auto whole = items_.end() - std::min<std::ptrdiff_t>(threads_, std::ssize(items_));
      last_.assign(whole, items_.end());
      items_.erase(whole, items_.end());
    }
    add_exact(batch);
    int last_units = 0;
    for (const Item& item : last_) last_units += item.count;
    const int share = std::max(1, last_units / (kShares * threads_));
    for (const Item& item : last_) {
      for (int u = 0; u < item.count; u += share) {
        items_.push_back({item.first + u, std::min(share, item.count - u), item.part});
      }
    }
    return items_;
  }

 private:
  // The sealed parts of a batch: all units of a batch row side by side, so that memory is read in
  // order. Where each kv head has many, part by part instead, so that they find its tiles in a
  // cache.
  void add_sealed(const Batch& batch) noexcept {
    const bool together = units_.per_head() <= kMostBlocksTogether;
    const std::int64_t run = together ? units_.per_row() : units_.per_head();
    const std::int64_t most = together ? kernels::kMaxHeads : 1;
    for (std::int64_t first = 0; first < batch.count();) {
      const std::int64_t run_end = round_up(batch.first() + first + 1, run) - batch.first();
      const std::int64_t end = std::min(batch.count(), run_end);
      const std::int64_t parts = units_.parts(batch.first() + first);
      const std::int64_t exact_parts = units_.exact_parts(batch.first() + first);
      for (std::int64_t part = exact_parts; part < parts; ++part) {
        for (std::int64_t u = first; u < end; u += most) {
          items_.push_back({u, static_cast<int>(std::min(most, end - u)), part});
        }
      }
      first = end;
    }
  }

  // The exact parts: the units of a kv head one after another, so that they find its tokens in a
  // cache.
  void add_exact(const Batch& batch) noexcept {
    for (std::int64_t first = 0; first < batch.count();) {
      const std::int64_t head_end =
          round_up(batch.first() + first + 1, units_.per_head()) - batch.first();
      const std::int64_t end = std::min(batch.count(), head_end);
      const std::int64_t parts = units_.exact_parts(batch.first() + first);
      for (std::int64_t part = 0; part < parts; ++part) {
        for (std::int64_t u = first; u < end; ++u) items_.push_back({u, 1, part});
      }
      first = end;
    }
  }

  const AttendUnits& units_;
  int threads_;
  std::vector<Item> items_;
  std::vector<Item> last_;
};

TQAI_INLINE void attend_batch(const AttendUnits& units, const Batch& batch,
                              const std::vector<Item>& todo,
                              [[maybe_unused]] int threads) noexcept {
  const std::int64_t count = std::ssize(todo);
  const auto prepare = [&](std::int64_t i) { units.prepare(batch, i); };
  const auto attend_nth = [&](std::int64_t i, int thread) {
    units.attend(batch, todo[static_cast<std::size_t>(i)], thread);
  };
  const auto finish = [&](std::int64_t i) { units.finish(batch, i); };
#ifdef _OPENMP
  if (threads > 1) {
#pragma omp parallel num_threads(threads)
    {
      const UsualArithmetic usual;
      const int thread = omp_get_thread_num();
#pragma omp for schedule(static)
      for (std::int64_t i = 0; i < batch.count(); ++i) prepare(i);
#pragma omp for schedule(dynamic)
      for (std::int64_t i = 0; i < count; ++i) attend_nth(i, thread);
#pragma omp for schedule(static)
      for (std::int64_t i = 0; i < batch.count(); ++i) finish(i);
    }
    return;
  }
#endif
  // A parallel region of one thread would cost a microsecond.
  for (std::int64_t i = 0; i < batch.count(); ++i) prepare(i);
  for (std::int64_t i = 0; i < count; ++i) attend_nth(i, 0);
  for (std::int64_t i = 0; i < batch.count(); ++i) finish(i);
}

}  // namespace TQAI_LOCAL

TQAI_INLINE void attend(const Context& context, std::span<const Row> rows, std::int64_t tokens,
                        const ConstTensor& queries, const Tensor& output,
                        const AttendOptions& options) {
  if (queries.shape[0] == 0 || queries.shape[1] == 0 || queries.shape[2] == 0) return;
  const UsualArithmetic usual;
  const AttendUnits units(context, rows, tokens, queries, output, options);
  const std::int64_t most =
      std::clamp<std::int64_t>(kBatchFloats / units.floats(), 1, units.count());
  const int threads = units.multiplications() > kWorthThreads ? usable_threads() : 1;
  Batch batch(units, most, threads);
  Items items(units, most, threads);
  // From here on nothing may throw: neither in threads nor with a part of the output written.
  for (std::int64_t first = 0; first < units.count(); first += most) {
    batch.move_to(first, std::min(most, units.count() - first));
    attend_batch(units, batch, items.of(batch), threads);
  }
}

}  // namespace tqai::detail
