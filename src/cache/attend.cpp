#include "attend.hpp"

#include <algorithm>
#include <vector>

#include "../threads.hpp"

namespace tqai::detail {
namespace TQAI_LOCAL {

using Batch = AttendUnits::Batch;

// Blocks of query rows of a kv head up to which its tiles are read once for all of them.
constexpr std::int64_t kMostBlocksTogether = 2;
// In how many shares a thread's last item is split; they still read some heads in order.
constexpr int kShares = 4;
// Below this many multiplications a second thread costs more than it brings.
constexpr double kWorthThreads = 2e6;
// Of working memory at a time: of each thread's, which its core's cache and a share of the common
// one should hold, as units are prepared, attended to and finished one after the other; and of all.
constexpr std::size_t kThreadBytes = std::size_t{1} << 20;
constexpr std::size_t kWaveBytes = std::size_t{1} << 25;

// Units of one call that are held at the same time as others, and where in the working memory.
struct Share {
  const AttendUnits* units;
  std::int64_t first;
  std::int64_t count;
  std::size_t offset;
};

// The units of all calls in waves, whose working memory is bounded.
TQAI_INLINE std::vector<std::vector<Share>> waves_of(const std::vector<AttendUnits>& calls,
                                                     int threads) {
  const std::size_t most = std::min(static_cast<std::size_t>(threads) * kThreadBytes, kWaveBytes);
  std::vector<std::vector<Share>> waves(1);
  std::size_t used = 0;
  for (const AttendUnits& units : calls) {
    for (std::int64_t first = 0; first < units.count();) {
      const std::size_t left = most - std::min(used, most);
      const auto fitting = static_cast<std::int64_t>(left / units.bytes(1));
      if (fitting == 0 && used > 0) {
        waves.emplace_back();
        used = 0;
        continue;
      }
      const std::int64_t count = std::clamp<std::int64_t>(fitting, 1, units.count() - first);
      waves.back().push_back({&units, first, count, used});
      used += units.bytes(count);
      first += count;
    }
  }
  return waves;
}

// A wave's units and what they attend to, as work for threads. Results do not depend on how that is
// split.
class Wave {
 public:
  // In working memory of as many bytes as the wave's last share ends at. Throws std::bad_alloc.
  Wave(const std::vector<Share>& shares, int threads, std::byte* memory) : threads_(threads) {
    std::int64_t units = 0;
    std::int64_t parts = 0;
    batches_.reserve(shares.size());
    for (const Share& share : shares) {
      batches_.emplace_back(*share.units, share.first, share.count, memory + share.offset);
      units += share.count;
      parts += share.count * share.units->most_parts();
      most_parts_ = std::max(most_parts_, share.units->most_parts());
    }
    units_.reserve(static_cast<std::size_t>(units));
    for (const Batch& batch : batches_) {
      for (std::int64_t i = 0; i < batch.count(); ++i) units_.push_back({&batch, i});
    }
    const auto count = static_cast<std::size_t>(threads);
    std::vector<Item> last;
    if (threads > 1) last.reserve(count);
    // Each unit in each part; what is split makes 2 kShares a thread at most, and one an item.
    items_.reserve(static_cast<std::size_t>(parts) + (2 * kShares + 1) * count);
    fill(last);
  }

  std::int64_t units() const noexcept { return std::ssize(units_); }
  std::int64_t items() const noexcept { return std::ssize(items_); }

  // Each unit is prepared before an item of it is attended to, and finished after all are.
  void prepare(std::int64_t i) const noexcept {
    const Unit& unit = units_[static_cast<std::size_t>(i)];
    unit.batch->units().prepare(*unit.batch, unit.index);
  }
  void attend(std::int64_t i, float* widened) const noexcept {
    const Item& item = items_[static_cast<std::size_t>(i)];
    item.batch->units().attend(*item.batch, item.of_units, widened);
  }
  void finish(std::int64_t i) const noexcept {
    const Unit& unit = units_[static_cast<std::size_t>(i)];
    unit.batch->units().finish(*unit.batch, unit.index);
  }

 private:
  struct Unit {
    const Batch* batch;
    std::int64_t index;
  };
  struct Item {
    const Batch* batch;
    AttendUnits::Item of_units;
  };

  // The last sealed items, one for each thread, are split into kShares a thread, to be spread
  // evenly.
  void fill(std::vector<Item>& last) noexcept {
    for (std::int64_t part = 0; part < most_parts_; ++part) add_sealed(part);
    if (threads_ > 1) {
      const auto whole = items_.end() - std::min<std::ptrdiff_t>(threads_, std::ssize(items_));
      last.assign(whole, items_.end());
      items_.erase(whole, items_.end());
    }
    for (const Batch& batch : batches_) add_exact(batch);
    int last_units = 0;
    for (const Item& item : last) last_units += item.of_units.count;
    const int share = std::max(1, last_units / (kShares * threads_));
    for (const Item& item : last) {
      const auto& [first, count, part] = item.of_units;
      for (int u = 0; u < count; u += share) {
        items_.push_back({item.batch, {first + u, std::min(share, count - u), part}});
      }
    }
  }

  // One sealed part of all rows, so that forks find its tiles in a cache: all units of a batch row
  // side by side, so that memory is read in order. Where each kv head has many, head by head
  // instead, a few at a time, so that they find its tiles in a cache.
  void add_sealed(std::int64_t part) noexcept {
    for (const Batch& batch : batches_) {
      const AttendUnits& units = batch.units();
      const bool together = units.per_head() <= kMostBlocksTogether;
      const std::int64_t run = together ? units.per_row() : units.per_head();
      const std::int64_t most = together ? kernels::kMaxHeads : kernels::kMaxTogether;
      for (std::int64_t first = 0; first < batch.count();) {
        const std::int64_t run_end = round_up(batch.first() + first + 1, run) - batch.first();
        const std::int64_t end = std::min(batch.count(), run_end);
        const std::int64_t unit = batch.first() + first;
        if (part >= units.exact_parts(unit) && part < units.parts(unit)) {
          for (std::int64_t u = first; u < end; u += most) {
            items_.push_back({&batch, {u, static_cast<int>(std::min(most, end - u)), part}});
          }
        }
        first = end;
      }
    }
  }

  // The exact parts: the units of a kv head one after another, so that they find its tokens in a
  // cache.
  void add_exact(const Batch& batch) noexcept {
    const AttendUnits& units = batch.units();
    for (std::int64_t first = 0; first < batch.count();) {
      const std::int64_t head_end =
          round_up(batch.first() + first + 1, units.per_head()) - batch.first();
      const std::int64_t end = std::min(batch.count(), head_end);
      const std::int64_t parts = units.exact_parts(batch.first() + first);
      for (std::int64_t part = 0; part < parts; ++part) {
        for (std::int64_t u = first; u < end; ++u) items_.push_back({&batch, {u, 1, part}});
      }
      first = end;
    }
  }

  int threads_;
  std::int64_t most_parts_ = 0;
  std::vector<Batch> batches_;
  std::vector<Unit> units_;
  std::vector<Item> items_;
};

// widened: of each thread.
TQAI_INLINE void attend_wave(const Wave& wave, const Resources& resources, int threads,
                             const std::vector<float*>& widened) {
  const auto prepare = [&](std::int64_t i, int /*thread*/ = 0) noexcept { wave.prepare(i); };
  const auto attend = [&](std::int64_t i, int thread = 0) noexcept {
    wave.attend(i, widened[static_cast<std::size_t>(thread)]);
  };
  const auto finish = [&](std::int64_t i, int /*thread*/ = 0) noexcept { wave.finish(i); };
  if (threads > 1 && resources.parallel_for) {
    hand_out(resources, threads, wave.units(), prepare);
    hand_out(resources, threads, wave.items(), attend);
    hand_out(resources, threads, wave.units(), finish);
    return;
  }
#ifdef _OPENMP
  if (threads > 1) {
#pragma omp parallel num_threads(threads)
    {
      const UsualArithmetic usual;
      const int thread = omp_get_thread_num();
#pragma omp for schedule(static)
      for (std::int64_t i = 0; i < wave.units(); ++i) prepare(i);
#pragma omp for schedule(dynamic)
      for (std::int64_t i = 0; i < wave.items(); ++i) attend(i, thread);
#pragma omp for schedule(static)
      for (std::int64_t i = 0; i < wave.units(); ++i) finish(i);
    }
    return;
  }
#endif
  // A parallel region of one thread would cost a microsecond.
  for (std::int64_t i = 0; i < wave.units(); ++i) prepare(i);
  for (std::int64_t i = 0; i < wave.items(); ++i) attend(i);
  for (std::int64_t i = 0; i < wave.units(); ++i) finish(i);
}

}  // namespace TQAI_LOCAL

TQAI_INLINE void attend(std::span<const AttendCall> calls, const Resources& resources) {
  const int usable = usable_threads(resources);
  const UsualArithmetic usual;
  std::vector<AttendUnits> units;
  units.reserve(calls.size());
  double multiplications = 0.0;
  std::size_t widened_bytes = 0;
  for (const AttendCall& call : calls) {
    const auto& shape = call.queries->shape;
    if (shape[0] == 0 || shape[1] == 0 || shape[2] == 0) continue;
    const AttendUnits& added = units.emplace_back(call);
    multiplications += added.multiplications();
    widened_bytes = std::max(widened_bytes, added.widened_floats() * sizeof(float));
  }
  if (units.empty()) return;
  const int threads = multiplications > kWorthThreads ? usable : 1;
  const std::vector<std::vector<Share>> shares = waves_of(units, threads);
  std::size_t bytes = 0;
  for (const auto& wave : shares) {
    bytes = std::max(bytes, wave.back().offset + wave.back().units->bytes(wave.back().count));
  }
  widened_bytes = (widened_bytes + 63) / 64 * 64;
  const WorkingMemory memory(resources, bytes + widened_bytes * static_cast<std::size_t>(threads));
  std::vector<float*> widened;
  for (int thread = 0; thread < threads; ++thread) {
    widened.push_back(reinterpret_cast<float*>(memory.data() + bytes +
                                               widened_bytes * static_cast<std::size_t>(thread)));
  }
  std::vector<Wave> waves;
  waves.reserve(shares.size());
  for (const auto& wave : shares) waves.emplace_back(wave, threads, memory.data());
  // From here on nothing may throw but an executor: neither in threads nor with a part of the
  // output written.
  for (const Wave& wave : waves) attend_wave(wave, resources, threads, widened);
}

}  // namespace tqai::detail
