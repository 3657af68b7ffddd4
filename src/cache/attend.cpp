#include "attend.hpp"

#include <algorithm>
#include <memory>

#include "attention.hpp"
#include "threads.hpp"

namespace tqai::detail {
namespace {

using kernels::kMaxHeads;
using kernels::kMaxRows;

// Blocks of query rows of a kv head up to which its tiles are read once for all of them.
constexpr std::int64_t kMostBlocksTogether = 2;
// In how many shares a thread's last item is split; they still read some heads in order.
constexpr int kShares = 4;
// Below this many multiplications a second thread costs more than it brings.
constexpr double kWorthThreads = 2e6;
// Units are prepared and finished in batches, to bound what lies between.
constexpr std::int64_t kBatchFloats = std::int64_t{1} << 23;

}  // namespace

double Attention::multiplications() const {
  const double dims = context_.options.head_dim + context_.options.value_head_dim;
  return static_cast<double>(units_) * kMaxRows * static_cast<double>(tokens_) * dims;
}

// The sealed parts of a batch: all units of a batch row side by side, so that memory is read in
// order. Where each kv head has many, part by part instead, so that they find its tiles in a cache.
void Attention::add_sealed(const Batch& batch, std::vector<Item>& items) const {
  const bool together = blocks_ <= kMostBlocksTogether;
  const std::int64_t run = together ? context_.options.kv_heads * blocks_ : blocks_;
  const std::int64_t most = together ? kMaxHeads : 1;
  for (std::int64_t first = 0; first < batch.count;) {
    const std::int64_t run_end = round_up(batch.first + first + 1, run) - batch.first;
    const std::int64_t end = std::min(batch.count, run_end);
    const std::int64_t parts = parts_of(unit(batch.first + first).batch_row);
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
std::vector<Attention::Item> Attention::items(const Batch& batch, int threads) const {
  std::vector<Item> items;
  add_sealed(batch, items);
  std::vector<Item> last;
  if (threads > 1) {
    const auto whole = items.end() - std::min<std::ptrdiff_t>(threads, std::ssize(items));
    last.assign(whole, items.end());
    items.erase(whole, items.end());
  }
  for (std::int64_t i = 0; i < batch.count; ++i) items.push_back({i, 1, 0});
  int units = 0;
  for (const Item& item : last) units += item.count;
  const int share = std::max(1, units / (kShares * threads));
  for (const Item& item : last) {
    for (int u = 0; u < item.count; u += share) {
      items.push_back({item.first + u, std::min(share, item.count - u), item.part});
    }
  }
  return items;
}

void Attention::run() {
  const std::int64_t size = std::clamp<std::int64_t>(kBatchFloats / unit_floats_, 1, units_);
  const auto count_of = [size](std::int64_t each) { return static_cast<std::size_t>(size * each); };
  // Left as it is: zeroing would take as long as a short call's attention.
  const std::unique_ptr<Line[]> lines(new Line[count_of(unit_floats_ / kLineFloats)]);
  const std::unique_ptr<PartState[]> states(new PartState[count_of(parts_)]);
  const std::unique_ptr<CentreScores[]> centres(new CentreScores[count_of(sets_)]);
  const std::unique_ptr<bool[]> finite(new bool[count_of(kMaxRows)]);
  const int threads = multiplications() > kWorthThreads ? usable_threads() : 1;
  for (std::int64_t first = 0; first < units_; first += size) {
    const Batch batch{first,
                      std::min(size, units_ - first),
                      reinterpret_cast<float*>(lines.get()),
                      states.get(),
                      centres.get(),
                      finite.get()};
    const std::vector<Item> todo = items(batch, threads);
    const auto count = static_cast<std::int64_t>(todo.size());
    const auto prepare_unit = [&](std::int64_t i) { prepare(unit(first + i), work(batch, i)); };
    const auto attend_nth = [&](std::int64_t i) {
      attend_item(batch, todo[static_cast<std::size_t>(i)]);
    };
    const auto finish_unit = [&](std::int64_t i) { finish(unit(first + i), work(batch, i)); };
#ifdef _OPENMP
    if (threads > 1) {
#pragma omp parallel
      {
        const SubnormalNumbers counted;
#pragma omp for schedule(static)
        for (std::int64_t i = 0; i < batch.count; ++i) prepare_unit(i);
#pragma omp for schedule(dynamic)
        for (std::int64_t i = 0; i < count; ++i) attend_nth(i);
#pragma omp for schedule(static)
        for (std::int64_t i = 0; i < batch.count; ++i) finish_unit(i);
      }
      continue;
    }
#endif
    // A parallel region of one thread would cost a microsecond.
    for (std::int64_t i = 0; i < batch.count; ++i) prepare_unit(i);
    for (std::int64_t i = 0; i < count; ++i) attend_nth(i);
    for (std::int64_t i = 0; i < batch.count; ++i) finish_unit(i);
  }
}

void attend(const Context& context, std::span<const Row> rows, std::int64_t tokens,
            const ConstTensor& queries, const Tensor& output, const AttendOptions& options) {
  if (queries.shape[0] == 0 || queries.shape[1] == 0 || queries.shape[2] == 0) return;
  const SubnormalNumbers counted;
  Attention(context, rows, tokens, queries, output, options).run();
}

}  // namespace tqai::detail