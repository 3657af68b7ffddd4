#include "attend.hpp"

#include <algorithm>
#include <vector>

#include "attend_units.hpp"
#include "threads.hpp"

namespace tqai::detail {
namespace {

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

// The sealed parts of a batch: all units of a batch row side by side, so that memory is read in
// order. Where each kv head has many, part by part instead, so that they find its tiles in a cache.
void add_sealed(const AttendUnits& units, const Batch& batch, std::vector<Item>& items) {
  const bool together = units.per_head() <= kMostBlocksTogether;
  const std::int64_t run = together ? units.per_row() : units.per_head();
  const std::int64_t most = together ? kernels::kMaxHeads : 1;
  for (std::int64_t first = 0; first < batch.count();) {
    const std::int64_t run_end = round_up(batch.first() + first + 1, run) - batch.first();
    const std::int64_t end = std::min(batch.count(), run_end);
    const std::int64_t parts = units.parts(batch.first() + first);
    for (std::int64_t part = 1; part < parts; ++part) {
      for (std::int64_t u = first; u < end; u += most) {
        items.push_back({u, static_cast<int>(std::min(most, end - u)), part});
      }
    }
    first = end;
  }
}

// The last items, one for each thread, are split into kShares a thread, to be spread evenly. How
// units are split does not change any number.
std::vector<Item> split(const AttendUnits& units, const Batch& batch, int threads) {
  std::vector<Item> items;
  add_sealed(units, batch, items);
  std::vector<Item> last;
  if (threads > 1) {
    const auto whole = items.end() - std::min<std::ptrdiff_t>(threads, std::ssize(items));
    last.assign(whole, items.end());
    items.erase(whole, items.end());
  }
  for (std::int64_t i = 0; i < batch.count(); ++i) items.push_back({i, 1, 0});
  int last_units = 0;
  for (const Item& item : last) last_units += item.count;
  const int share = std::max(1, last_units / (kShares * threads));
  for (const Item& item : last) {
    for (int u = 0; u < item.count; u += share) {
      items.push_back({item.first + u, std::min(share, item.count - u), item.part});
    }
  }
  return items;
}

void attend_batch(const AttendUnits& units, const Batch& batch, int threads) {
  const std::vector<Item> todo = split(units, batch, threads);
  const auto count = static_cast<std::int64_t>(todo.size());
  const auto prepare = [&](std::int64_t i) { units.prepare(batch, i); };
  const auto attend_nth = [&](std::int64_t i) {
    units.attend(batch, todo[static_cast<std::size_t>(i)]);
  };
  const auto finish = [&](std::int64_t i) { units.finish(batch, i); };
#ifdef _OPENMP
  if (threads > 1) {
#pragma omp parallel
    {
      const SubnormalNumbers counted;
#pragma omp for schedule(static)
      for (std::int64_t i = 0; i < batch.count(); ++i) prepare(i);
#pragma omp for schedule(dynamic)
      for (std::int64_t i = 0; i < count; ++i) attend_nth(i);
#pragma omp for schedule(static)
      for (std::int64_t i = 0; i < batch.count(); ++i) finish(i);
    }
    return;
  }
#endif
  // A parallel region of one thread would cost a microsecond.
  for (std::int64_t i = 0; i < batch.count(); ++i) prepare(i);
  for (std::int64_t i = 0; i < count; ++i) attend_nth(i);
  for (std::int64_t i = 0; i < batch.count(); ++i) finish(i);
}

}  // namespace

void attend(const Context& context, std::span<const Row> rows, std::int64_t tokens,
            const ConstTensor& queries, const Tensor& output, const AttendOptions& options) {
  if (queries.shape[0] == 0 || queries.shape[1] == 0 || queries.shape[2] == 0) return;
  const SubnormalNumbers counted;
  const AttendUnits units(context, rows, tokens, queries, output, options);
  const std::int64_t most =
      std::clamp<std::int64_t>(kBatchFloats / units.floats(), 1, units.count());
  Batch batch(units, most);
  const int threads = units.multiplications() > kWorthThreads ? usable_threads() : 1;
  for (std::int64_t first = 0; first < units.count(); first += most) {
    batch.move_to(first, std::min(most, units.count() - first));
    attend_batch(units, batch, threads);
  }
}

}  // namespace tqai::detail
