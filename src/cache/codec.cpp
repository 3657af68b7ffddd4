#include "codec.hpp"

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <limits>
#include <map>
#include <mutex>
#include <numeric>
#include <tqai/key_basis.hpp>
#include <tuple>
#include <utility>

namespace tqai::detail {
namespace TQAI_LOCAL {

// Values get another matrix than keys: with one seed for both a dense rotation measured worse.
constexpr std::uint64_t kValueSeed = 0x9E37'79B9'7F4A'7C15;

TQAI_INLINE std::vector<LevelTable> repeat_levels(const std::vector<Segment>& segments,
                                                  int head_dim) {
  std::vector<LevelTable> tables;
  for (const Segment& segment : segments) {
    const auto levels = codebook(head_dim, segment.bits, Grid::int8).levels();
    LevelTable& table = tables.emplace_back();
    for (std::size_t i = 0; i < table.levels.size(); ++i) {
      table.levels[i] = levels[i % levels.size()];
    }
    table.divisor = 0;
    for (const int level : levels) table.divisor = std::gcd(table.divisor, level);
    table.has_quotients = segment.bits <= kernels::kMaxQuotientBits &&
                          levels.back() <= kernels::kMaxQuotient * table.divisor;
    for (std::size_t i = 0; i < table.quotients.size() && table.has_quotients; ++i) {
      table.quotients[i] = static_cast<std::int8_t>(table.levels[i] / table.divisor);
    }
  }
  return tables;
}

TQAI_INLINE std::vector<std::optional<kernels::CodeBins>> bins_of(
    const std::vector<Segment>& segments, int head_dim) {
  std::vector<std::optional<kernels::CodeBins>> bins;
  for (const Segment& segment : segments) {
    auto& of_segment = bins.emplace_back();
    if (segment.bits == 8) continue;  // uniform: no look-up
    of_segment.emplace(codebook(head_dim, segment.bits, Grid::int8).boundaries());
  }
  return bins;
}

TQAI_INLINE std::vector<kernels::SegmentPlan> plan_segments(
    const std::vector<Segment>& segments, int head_dim, const std::vector<LevelTable>& tables,
    const std::vector<std::optional<kernels::CodeBins>>& bins) {
  std::vector<kernels::SegmentPlan> plans;
  std::size_t offset = 0;
  for (const Segment& segment : segments) {
    const Codebook& book = codebook(head_dim, segment.bits, Grid::int8);
    const LevelTable& table = tables[plans.size()];
    plans.push_back({segment.first, segment.count, segment.bits, offset, table.levels.data(),
                     book.boundaries().data(), bins[plans.size()] ? &*bins[plans.size()] : nullptr,
                     book.step(), table.has_quotients ? table.quotients.data() : nullptr,
                     table.divisor});
    offset += packed_bytes(segment.count, segment.bits);
  }
  return plans;
}

TQAI_INLINE std::optional<kernels::TrellisPlan> plan_trellis(const CacheOptions& options) {
  if (options.value_codes == CodeKind::scalar) return std::nullopt;
  kernels::TrellisPlan plan{&trellis(options.bits_v), {}, {}};
  for (std::size_t i = 0; i < plan.older.size(); ++i) {
    plan.older[i] = plan.tables->older[i % 16];
    plan.recent[i] = plan.tables->recent[i % 16];
  }
  return plan;
}

// The whole side's.
TQAI_INLINE kernels::SegmentPlan plan_rings(const Segment& segment, int head_dim,
                                            const kernels::TrellisPlan& plan) {
  kernels::SegmentPlan rings{};
  rings.first = segment.first;
  rings.count = segment.count;
  rings.bits = segment.bits;
  rings.step = plan.tables->step(head_dim);
  rings.trellis = &plan;
  return rings;
}

// The same of keys. trials: of scalar codes.
TQAI_INLINE std::vector<kernels::SegmentPlan> plan_paths(
    const CacheOptions& options, const std::vector<kernels::SegmentPlan>& trials) {
  if (options.key_codes == CodeKind::scalar) return trials;
  const kernels::SegmentPlan& trial = trials.front();
  const KeyTrellis& tables = key_trellis(options.bits_k);
  kernels::SegmentPlan paths{};
  paths.first = trial.first;
  paths.count = trial.count;
  paths.bits = trial.bits;
  paths.step = tables.step(options.head_dim);
  paths.key_trellis = &tables;
  paths.trial = &trial;
  return {paths};
}

TQAI_INLINE kernels::SidePlan plan_side(const Rotation& rotation,
                                        const std::vector<kernels::SegmentPlan>& segments,
                                        std::size_t codes, std::size_t norms) {
  const auto data_or_null = [](std::span<const float> values) {
    return values.empty() ? nullptr : values.data();
  };
  return {rotation.head_dim(),
          padded_dim(rotation.head_dim()),
          segments.data(),
          static_cast<int>(segments.size()),
          codes,
          norms,
          data_or_null(rotation.signs()),
          data_or_null(rotation.matrix()),
          data_or_null(rotation.transposed_matrix())};
}

// A tile stores the norm over the length of what a unit vector's codes stand for. That is shortest
// of a vector along one rotated axis, whose coordinate is cut to the outermost level while all
// others get the innermost one.
TQAI_INLINE float longest_vector(int dim, int bits) {
  const Codebook& book = codebook(dim, bits, Grid::int8);
  const auto levels = book.levels();
  int innermost = 127;
  for (const int level : levels) innermost = std::min(innermost, std::abs(level));
  const int outermost = std::min<int>(levels.back(), -levels.front());
  const double squares =
      static_cast<double>(outermost) * outermost + (dim - 1.0) * innermost * innermost;
  constexpr double kRounding = 0.999;
  return static_cast<float>(kRounding * static_cast<double>(kMaxHalf * book.step()) *
                            std::sqrt(squares));
}

// The same for a trellis. The other coordinates may all be 0, though they hardly are at once.
TQAI_INLINE float longest_in_trellis(int dim, const Trellis& tables) {
  int outermost = 0;
  for (unsigned window = 0; window < 256; ++window) {
    outermost = std::max(outermost, tables.level(window));
  }
  constexpr float kRounding = 0.999F;
  return kRounding * kMaxHalf * tables.step(dim) * static_cast<float>(outermost);
}

// The shortest path, found as Viterbi does.
TQAI_INLINE float shortest_path(int dim, const KeyTrellis& tables) {
  const unsigned states = KeyTrellis::kWindows >> tables.bits;
  const int most = std::numeric_limits<int>::max() / 2;
  std::vector<int> squares(states, most);
  squares[tables.start] = 0;
  for (int c = 0; c < dim; ++c) {
    std::vector<int> next(states, most);
    for (unsigned window = 0; window < KeyTrellis::kWindows; ++window) {
      const int level = tables.levels[window];
      int& least = next[window >> tables.bits];
      least = std::min(least, squares[window % states] + level * level);
    }
    squares = std::move(next);
  }
  const int least = *std::min_element(squares.begin(), squares.end());
  return tables.step(dim) * std::sqrt(static_cast<float>(std::max(least, 1)));
}

TQAI_INLINE float shortest_vector(int dim, int bits) {
  const Codebook& book = codebook(dim, bits, Grid::int8);
  int innermost = 127;
  for (const int level : book.levels()) innermost = std::min(innermost, std::abs(level));
  if (innermost == 0) return book.step();  // all others 0
  return book.step() * static_cast<float>(innermost) * std::sqrt(static_cast<float>(dim));
}

}  // namespace TQAI_LOCAL

TQAI_INLINE Codec::Codec(const CacheOptions& options)
    : key_rotation_(options.head_dim, options.rotation, options.seed),
      value_rotation_(options.value_head_dim, options.rotation, options.seed ^ kValueSeed),
      layout_(options.head_dim, options.value_head_dim, options.bits_k, options.bits_v),
      key_levels_(repeat_levels(layout_.key_segments(), options.head_dim)),
      value_levels_(repeat_levels(layout_.value_segments(), options.value_head_dim)),
      key_bins_(bins_of(layout_.key_segments(), options.head_dim)),
      value_bins_(bins_of(layout_.value_segments(), options.value_head_dim)),
      value_trellis_(plan_trellis(options)),
      key_trials_(plan_segments(layout_.key_segments(), options.head_dim, key_levels_, key_bins_)),
      key_segments_(plan_paths(options, key_trials_)),
      value_segments_(value_trellis_
                          ? std::vector{plan_rings(layout_.value_segments().front(),
                                                   options.value_head_dim, *value_trellis_)}
                          : plan_segments(layout_.value_segments(), options.value_head_dim,
                                          value_levels_, value_bins_)),
      plan_{
          plan_side(key_rotation_, key_segments_, layout_.key_codes(), layout_.key_norms()),
          plan_side(value_rotation_, value_segments_, layout_.value_codes(), layout_.value_norms()),
          layout_.bytes()},
      longest_key_(longest_vector(options.head_dim, options.bits_k)),
      longest_value_(value_trellis_
                         ? longest_in_trellis(options.value_head_dim, *value_trellis_->tables)
                         : longest_vector(options.value_head_dim, options.bits_v)),
      shortest_codes_(options.key_codes == CodeKind::trellis
                          ? shortest_path(options.head_dim, key_trellis(options.bits_k))
                          : shortest_vector(options.head_dim, options.bits_k)) {}

TQAI_INLINE std::shared_ptr<const Codec> shared_codec(const CacheOptions& options) {
  using Key = std::tuple<int, int, int, int, RotationKind, std::uint64_t, CodeKind, CodeKind>;
  // Never destroyed: caches in static storage may outlive any order of destruction.
  static auto& mutex = *new std::mutex;
  static auto& table = *new std::map<Key, std::weak_ptr<const Codec>>;
  const Key key{options.head_dim, options.value_head_dim, options.bits_k,    options.bits_v,
                options.rotation, options.seed,           options.key_codes, options.value_codes};
  const std::scoped_lock lock(mutex);
  std::weak_ptr<const Codec>& entry = table[key];
  std::shared_ptr<const Codec> codec = entry.lock();
  if (!codec) {
    codec = std::make_shared<const Codec>(options);
    entry = codec;
    // Those that nobody uses any more would add up where settings come from files.
    std::erase_if(table, [](const auto& each) { return each.second.expired(); });
  }
  return codec;
}

TQAI_INLINE std::shared_ptr<const KeyBasis> shared_basis(std::shared_ptr<const KeyBasis> basis) {
  if (!basis) return basis;
  // Never destroyed: caches in static storage may outlive any order of destruction.
  static auto& mutex = *new std::mutex;
  static auto& table = *new std::map<std::uint64_t, std::weak_ptr<const KeyBasis>>;
  const std::scoped_lock lock(mutex);
  std::weak_ptr<const KeyBasis>& entry = table[basis->id()];
  std::shared_ptr<const KeyBasis> known = entry.lock();
  if (known == basis) return basis;
  // Whoever wrote the bytes may have chosen them for their id.
  if (known) return known->serialize() == basis->serialize() ? known : basis;
  entry = basis;
  std::erase_if(table, [](const auto& each) { return each.second.expired(); });
  return basis;
}

}  // namespace tqai::detail
