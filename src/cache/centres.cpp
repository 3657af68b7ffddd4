#include "centres.hpp"

#include <algorithm>
#include <cmath>
#include <numeric>
#include <vector>

#include "context.hpp"

namespace tqai::detail {
namespace TQAI_LOCAL {

// A mean of n samples takes about one n-th of the energy of pure noise, by chance; more than twice
// that is a mean worth having.
constexpr double kClearlyAMean = 2.0;
// The RoPE centre must leave at most this share of what the mean leaves, or would leave of the same
// keys elsewhere, not being worse where they are: it costs time.
constexpr double kClearlyLess = 0.9;
// How far elsewhere may be. The mean of the first tokens is no good for later ones where slow
// frequencies have turned by then.
constexpr double kReach = 1 << 15;
// Frequencies are left in the keys again, weakest first, while all of them together raise the
// energy that is quantised, and with it the error's, by no more than this.
constexpr double kNegligibleLeft = 0.01;

TQAI_INLINE double squared(const std::vector<double>& values) {
  return std::inner_product(values.begin(), values.end(), values.begin(), 0.0);
}

// Several sums, as each addition would wait for the one before.
TQAI_INLINE float inner_product(const float* a, const float* b, int count) {
  constexpr int kSums = 8;
  double sums[kSums] = {};
  int i = 0;
  for (; i + kSums <= count; i += kSums) {
    for (int s = 0; s < kSums; ++s) {
      sums[s] += static_cast<double>(a[i + s]) * static_cast<double>(b[i + s]);
    }
  }
  for (; i < count; ++i) sums[0] += static_cast<double>(a[i]) * static_cast<double>(b[i]);
  return static_cast<float>(std::accumulate(std::begin(sums), std::end(sums), 0.0));
}

}  // namespace TQAI_LOCAL

TQAI_INLINE Centres::Centres(const CentreShape& shape)
    : memory_(shape,
              static_cast<std::size_t>(shape.kv_heads) *
                  (static_cast<std::size_t>(shape.head_dim + 2 * shape.pairs + 1) * sizeof(float) +
                   sizeof(Centering))) {
  std::fill_n(memory_.payload(), memory_.payload_bytes(), std::byte{0});
  for (int head = 0; head < shape.kv_heads; ++head) kind(head) = Centering::none;
}

TQAI_INLINE std::size_t Centres::means_offset() const noexcept {
  const CentreShape& shape = memory_.header();
  return static_cast<std::size_t>(shape.kv_heads) * static_cast<std::size_t>(shape.head_dim) *
         sizeof(float);
}

TQAI_INLINE std::size_t Centres::left_offset() const noexcept {
  const CentreShape& shape = memory_.header();
  return means_offset() + static_cast<std::size_t>(shape.kv_heads) * 2 *
                              static_cast<std::size_t>(shape.pairs) * sizeof(float);
}

TQAI_INLINE std::size_t Centres::kinds_offset() const noexcept {
  return left_offset() + static_cast<std::size_t>(memory_.header().kv_heads) * sizeof(float);
}

TQAI_INLINE const float* Centres::constant(int head) const noexcept {
  return reinterpret_cast<const float*>(memory_.payload()) +
         static_cast<std::ptrdiff_t>(head) * memory_.header().head_dim;
}

TQAI_INLINE const float* Centres::means(int head) const noexcept {
  return reinterpret_cast<const float*>(memory_.payload() + means_offset()) +
         static_cast<std::ptrdiff_t>(2 * head) * memory_.header().pairs;
}

TQAI_INLINE float Centres::left(int head) const noexcept {
  return reinterpret_cast<const float*>(memory_.payload() + left_offset())[head];
}

TQAI_INLINE Centering Centres::kind(int head) const noexcept {
  return reinterpret_cast<const Centering*>(memory_.payload() + kinds_offset())[head];
}

TQAI_INLINE float* Centres::constant(int head) noexcept {
  return const_cast<float*>(std::as_const(*this).constant(head));
}

TQAI_INLINE float* Centres::means(int head) noexcept {
  return const_cast<float*>(std::as_const(*this).means(head));
}

TQAI_INLINE float& Centres::left(int head) noexcept {
  return reinterpret_cast<float*>(memory_.payload() + left_offset())[head];
}

TQAI_INLINE Centering& Centres::kind(int head) noexcept {
  return reinterpret_cast<Centering*>(memory_.payload() + kinds_offset())[head];
}

namespace TQAI_LOCAL {

// What each centre takes away of the energy per token.
struct Taken {
  double mean = 0.0;
  double rope = 0.0;
};

// The mean over distances of 0 to kReach of |e^(i distance ω) − 1|².
TQAI_INLINE double drift(double frequency) {
  const double angle = kReach * frequency;
  return angle == 0.0 ? 0.0 : 2.0 * (1.0 - std::sin(angle) / angle);
}

// Energy of pair f's part of the mean.
TQAI_INLINE double mean_of_pair(const RopeTables& tables, const Moments& moments, int f) {
  double sum = 0.0;
  for (const int c : {tables.first_of(f), tables.second_of(f)}) {
    sum += moments.mean[static_cast<std::size_t>(c)] * moments.mean[static_cast<std::size_t>(c)];
  }
  return sum;
}

TQAI_INLINE double strength_of(const Moments& moments, std::size_t f) {
  return moments.real[f] * moments.real[f] + moments.imaginary[f] * moments.imaginary[f];
}

TQAI_INLINE Taken taken(const Context& context, const Moments& moments) {
  Taken taken;
  taken.mean = squared(moments.mean);
  double constant = taken.mean;  // of the coordinates that do not turn
  double turning = 0.0;
  for (std::size_t f = 0; f < moments.real.size(); ++f) {
    constant -= mean_of_pair(*context.rope, moments, static_cast<int>(f));
    turning += strength_of(moments, f);
  }
  taken.rope = constant + turning;
  return taken;
}

// Of what the mean takes away, how much is lost up to kReach positions further on.
TQAI_INLINE double lost_later(const RopeTables& tables, const Moments& moments) {
  double lost = 0.0;
  for (std::size_t f = 0; f < moments.real.size(); ++f) {
    lost += mean_of_pair(tables, moments, static_cast<int>(f)) *
            drift(static_cast<double>(tables.rope().inv_freq[f]));
  }
  return lost;
}

}  // namespace TQAI_LOCAL

TQAI_INLINE void choose_centre(const Context& context, const Moments& moments, int head,
                               Centres& centres) {
  const Centering wanted = context.options.centering;
  centres.left(head) = static_cast<float>(moments.energy);
  if (wanted == Centering::none) return;
  const bool automatic = wanted == Centering::automatic;
  const double count = moments.tokens;
  const RopeTables* tables = context.rope.get();
  const auto [mean_energy, rope_energy] = taken(context, moments);
  const double lost = tables != nullptr ? lost_later(*tables, moments) : 0.0;
  const double mean_left = moments.energy - mean_energy;
  const double rope_left = moments.energy - rope_energy;
  const bool is_less =
      rope_left < kClearlyLess * mean_left ||
      (kClearlyLess * rope_left < mean_left && rope_left < kClearlyLess * (mean_left + lost));
  const bool use_rope = tables != nullptr &&
                        (wanted == Centering::rope ||
                         (automatic && is_less && rope_energy > kClearlyAMean * rope_left / count));
  const bool use_mean =
      wanted == Centering::mean || (automatic && mean_energy > kClearlyAMean * mean_left / count);
  if (!use_rope && !use_mean) return;

  float* constant = centres.constant(head);
  for (std::size_t c = 0; c < moments.mean.size(); ++c) {
    constant[c] = static_cast<float>(moments.mean[c]);
  }
  centres.kind(head) = use_rope ? Centering::rope : Centering::mean;
  centres.left(head) = static_cast<float>(std::max(use_rope ? rope_left : mean_left, 0.0));
  if (!use_rope) return;

  std::vector<double> strengths(moments.real.size());  // [pairs]
  for (std::size_t f = 0; f < strengths.size(); ++f) strengths[f] = strength_of(moments, f);
  std::vector<std::size_t> weakest(strengths.size());
  std::iota(weakest.begin(), weakest.end(), std::size_t{0});
  std::sort(weakest.begin(), weakest.end(),
            [&](std::size_t a, std::size_t b) { return strengths[a] < strengths[b]; });
  double spare = kNegligibleLeft * std::max(rope_left, 0.0);
  float* means = centres.means(head);
  for (const std::size_t f : weakest) {
    const int pair = static_cast<int>(f);
    constant[tables->first_of(pair)] = 0.0F;
    constant[tables->second_of(pair)] = 0.0F;
    spare -= strengths[f];
    if (spare >= 0.0) continue;
    means[f] = static_cast<float>(moments.real[f]);
    means[strengths.size() + f] = static_cast<float>(moments.imaginary[f]);
  }
}

TQAI_INLINE double least_left(const Context& context, const Moments& moments) {
  const auto [mean_energy, rope_energy] = taken(context, moments);
  double most = 0.0;
  switch (context.options.centering) {
    case Centering::none: break;
    case Centering::mean: most = mean_energy; break;
    case Centering::rope: most = rope_energy; break;
    case Centering::automatic: most = std::max(mean_energy, rope_energy); break;
  }
  return std::max(moments.energy - most, 0.0);
}

TQAI_INLINE double left_by(const Centres& centres, int head, const Moments& moments) noexcept {
  // |k − c|² of the mean token, c turning as the keys do.
  double left = moments.energy;
  const float* constant = centres.constant(head);
  for (std::size_t c = 0; c < moments.mean.size(); ++c) {
    const auto value = static_cast<double>(constant[c]);
    left += value * (value - 2.0 * moments.mean[c]);
  }
  const float* means = centres.means(head);
  const std::size_t pairs = moments.real.size();
  for (std::size_t f = 0; f < pairs; ++f) {
    const auto real = static_cast<double>(means[f]);
    const auto imaginary = static_cast<double>(means[pairs + f]);
    left += real * (real - 2.0 * moments.real[f]) +
            imaginary * (imaginary - 2.0 * moments.imaginary[f]);
  }
  return std::max(left, 0.0);
}

TQAI_INLINE void copy_centre(const Centres& from, int head, Centres& to) noexcept {
  const CentreShape& shape = from.memory().header();
  std::copy_n(from.constant(head), shape.head_dim, to.constant(head));
  std::copy_n(from.means(head), 2 * shape.pairs, to.means(head));
  to.left(head) = from.left(head);
  to.kind(head) = from.kind(head);
}

TQAI_INLINE void add_centre(const Context& context, const Centres& centres, int head,
                            const kernels::TilePositions& positions, float factor, float* rows) {
  const Centering kind = centres.kind(head);
  if (kind == Centering::none) return;
  const int dim = context.options.head_dim;
  const float* constant = centres.constant(head);
  if (kind != Centering::rope) {
    context.kernels->add_centre(constant, {}, nullptr, factor, dim, rows);
    return;
  }
  const RopeTables& tables = *context.rope;
  const PositionPhasors& phasors = tables.phasors();
  const int pairs = tables.pair_count();
  const float* means = centres.means(head);
  const bool consecutive = positions.each == nullptr;
  float middles[kernels::kMaxDim] = {};  // [2, pairs]
  for (int f = 0; f < pairs && consecutive; ++f) {
    const Complex mean{means[f], means[pairs + f]};
    if (mean.real == 0.0F && mean.imaginary == 0.0F) continue;
    const Complex middle = multiply(mean, middle_phasor(tables, phasors, positions.first, f));
    middles[f] = middle.real;
    middles[pairs + f] = middle.imaginary;
  }
  context.kernels->add_centre(constant, tables.turns(), consecutive ? middles : nullptr, factor,
                              dim, rows);
  for (int f = 0; f < pairs && !consecutive; ++f) {
    const Complex mean{means[f], means[pairs + f]};
    if (mean.real == 0.0F && mean.imaginary == 0.0F) continue;
    const Complex start = multiply(mean, distance_phasor(tables, f, 0));
    for (int t = 0; t < kTileTokens; ++t) {
      const std::int64_t position = position_of(positions, tables, f, t);
      const Complex turned = multiply(start, middle_phasor(tables, phasors, position, f));
      rows[t * dim + tables.first_of(f)] += factor * turned.real;
      rows[t * dim + tables.second_of(f)] += factor * turned.imaginary;
    }
  }
}

TQAI_INLINE bool CentreScores::has_rope(const Context& context, const Centres& centres) noexcept {
  for (int head = 0; head < context.options.kv_heads; ++head) {
    if (centres.kind(head) == Centering::rope) return true;
  }
  return false;
}

TQAI_INLINE std::int64_t CentreScores::factor_floats(const Context& context, int rows) noexcept {
  constexpr int kLine = kernels::kLanes;
  const int floats = kernels::factor_lanes(rows) * context.rope->pair_count();
  return (floats + kLine - 1) / kLine * kLine;
}

TQAI_INLINE CentreScores::CentreScores(const Context& context, const Centres& centres, int head,
                                       const float* queries, std::ptrdiff_t stride, int rows,
                                       float* factors) noexcept {
  const Centering kind = centres.kind(head);
  if (kind == Centering::none) return;
  const float* constant = centres.constant(head);
  for (int r = 0; r < rows; ++r) {
    constants_[r] = inner_product(queries + r * stride, constant, context.options.head_dim);
  }
  if (kind != Centering::rope) return;
  const RopeTables& tables = *context.rope;
  const float* means = centres.means(head);
  const int pairs = tables.pair_count();
  std::uint16_t slow[kernels::kMaxDim / 2];  // behind the others
  int count = 0;
  int slow_count = 0;
  for (int f = 0; f < pairs; ++f) {
    if (means[f] == 0.0F && means[pairs + f] == 0.0F) continue;
    (tables.is_slow(f) ? slow[slow_count++] : pairs_[count++]) = static_cast<std::uint16_t>(f);
  }
  std::copy_n(slow, slow_count, pairs_ + count);
  count += slow_count;
  const int lanes = kernels::factor_lanes(rows);
  for (int k = 0; k < count; ++k) {
    const int f = pairs_[k];
    float* numbers = factors + static_cast<std::ptrdiff_t>(lanes) * k;
    for (int r = 0; r < rows; ++r) {
      const float* query = queries + r * stride;
      const Complex conjugate{query[tables.first_of(f)], -query[tables.second_of(f)]};
      const Complex product = multiply(conjugate, {means[f], means[pairs + f]});
      numbers[2 * r] = product.real;
      numbers[2 * r + 1] = product.imaginary;
    }
    // Not by std::fill_n: so few bytes take GCC's `rep stos` as long as all the rest.
    for (int lane = 2 * rows; lane < lanes; ++lane) numbers[lane] = 0.0F;
  }
  rope_.count = count;
  rope_.slow_count = slow_count;
  rope_.factors = factors;
  rope_.pair_count = pairs;
  const PositionPhasors& phasors = tables.phasors();
  rope_.half = tables.half();
  rope_.terms = tables.terms();
  rope_.tiles = phasors.tiles;
  rope_.offsets = tables.offsets();
  rope_.far = phasors.far;
  rope_.sections = tables.sections();
}

TQAI_INLINE kernels::RopeBias CentreScores::rope() const noexcept {
  kernels::RopeBias bias = rope_;
  bias.pairs = pairs_;
  return bias;
}

}  // namespace tqai::detail
