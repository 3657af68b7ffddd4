#include "centres.hpp"

#include <algorithm>
#include <numeric>
#include <vector>

#include "row.hpp"

namespace tqai::detail {
namespace {

// A mean of n samples takes about one n-th of the energy of pure noise, by chance; more than twice
// that is a mean worth having.
constexpr double kClearlyAMean = 2.0;
// The RoPE centre must leave at most this share of what the mean leaves: it costs time.
constexpr double kClearlyLess = 0.9;
// Frequencies are left in the keys again, weakest first, while all of them together raise the
// energy that is quantised, and with it the error's, by no more than this.
constexpr double kNegligible = 0.01;

struct Complex {
  float real;
  float imaginary;
};

Complex multiply(Complex a, Complex b) noexcept {
  return {a.real * b.real - a.imaginary * b.imaginary, a.real * b.imaginary + a.imaginary * b.real};
}

// e^(i (first_token + 31.5) ω_f).
Complex middle_phasor(const RopeTables& tables, const std::vector<float>& tiles,
                      std::int64_t first_token, int f) noexcept {
  const auto pairs = static_cast<std::size_t>(tables.pair_count());
  const float* tile =
      tiles.data() + static_cast<std::size_t>(first_token / kTileTokens) * 2 * pairs;
  const float* offset =
      tables.offsets() + static_cast<std::size_t>(first_token % kTileTokens) * 2 * pairs;
  return multiply({tile[f], tile[pairs + static_cast<std::size_t>(f)]},
                  {offset[f], offset[pairs + static_cast<std::size_t>(f)]});
}

// e^(i (t − 31.5) ω_f) of a tile's token t.
Complex distance_phasor(const RopeTables& tables, int f, int t) noexcept {
  const float* cosines = tables.half() + static_cast<std::ptrdiff_t>(f) * kTileTokens;
  const float* sines = cosines + kTileTokens / 2;
  return t >= 32 ? Complex{cosines[t - 32], sines[t - 32]}
                 : Complex{cosines[31 - t], -sines[31 - t]};
}

// Sums over a head's tokens, in double.
struct Moments {
  std::vector<double> sum;   // [head_dim]
  std::vector<double> real;  // [pairs], of k · e^(−i p ω)
  std::vector<double> imaginary;
  double energy = 0.0;
};

Moments find_moments(const Context& context, const HeadKeys& keys) {
  const auto dim = static_cast<std::size_t>(context.options.head_dim);
  const RopeTables* tables = context.rope.get();
  const auto pairs = tables != nullptr ? static_cast<std::size_t>(tables->pair_count()) : 0;
  Moments moments{std::vector<double>(dim), std::vector<double>(pairs), std::vector<double>(pairs)};
  std::vector<double> energy(dim);
  std::vector<float> rows(dim * kTileTokens);
  std::shared_ptr<const std::vector<float>> phasors;
  if (pairs > 0) phasors = tables->tiles((keys.first_token + keys.tokens) / kTileTokens + 1);
  for (std::int64_t start = 0; start < keys.tokens; start += kTileTokens) {
    convert_to_float(keys.data + static_cast<std::size_t>(start) * context.key_bytes(),
                     context.options.dtype, rows.size(), rows.data());
    for (std::size_t t = 0; t < kTileTokens; ++t) {
      const float* row = rows.data() + t * dim;
      for (std::size_t c = 0; c < dim; ++c) {
        const auto value = static_cast<double>(row[c]);
        moments.sum[c] += value;
        energy[c] += value * value;
      }
    }
    for (std::size_t f = 0; f < pairs; ++f) {
      const int pair = static_cast<int>(f);
      const Complex middle = middle_phasor(*tables, *phasors, keys.first_token + start, pair);
      // Σ (a + i b) · conj(e^(i distance ω)), by pairs of distances ± (j + 1/2), then turned back
      // to the middle. Four sums, or each addition would wait for the last.
      const float* cosines = tables->half() + static_cast<std::ptrdiff_t>(f) * kTileTokens;
      const float* sines = cosines + kTileTokens / 2;
      const float* first = rows.data() + tables->first_of(pair);
      const float* second = rows.data() + tables->second_of(pair);
      float sums[4] = {};
      for (std::size_t j = 0; j < kTileTokens / 2; ++j) {
        const std::size_t after = (kTileTokens / 2 + j) * dim;
        const std::size_t before = (kTileTokens / 2 - 1 - j) * dim;
        sums[0] += (first[after] + first[before]) * cosines[j];
        sums[1] += (second[after] - second[before]) * sines[j];
        sums[2] += (second[after] + second[before]) * cosines[j];
        sums[3] += (first[after] - first[before]) * sines[j];
      }
      const auto real = static_cast<double>(sums[0] + sums[1]);
      const auto imaginary = static_cast<double>(sums[2] - sums[3]);
      const auto turn_real = static_cast<double>(middle.real);
      const auto turn_imaginary = static_cast<double>(middle.imaginary);
      moments.real[f] += real * turn_real + imaginary * turn_imaginary;
      moments.imaginary[f] += imaginary * turn_real - real * turn_imaginary;
    }
  }
  const auto count = static_cast<double>(keys.tokens);
  for (double& value : moments.sum) value /= count;
  for (double& value : moments.real) value /= count;
  for (double& value : moments.imaginary) value /= count;
  moments.energy = std::accumulate(energy.begin(), energy.end(), 0.0) / count;
  return moments;
}

double squared(const std::vector<double>& values) {
  return std::inner_product(values.begin(), values.end(), values.begin(), 0.0);
}

// Several sums, as each addition would wait for the one before.
float inner_product(const float* a, const float* b, int count) {
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

}  // namespace

Centres::Centres(const CentreShape& shape)
    : memory_(shape,
              static_cast<std::size_t>(shape.kv_heads) *
                  (static_cast<std::size_t>(shape.head_dim + 2 * shape.pairs) * sizeof(float) +
                   sizeof(Centering))) {
  std::fill_n(memory_.payload(), memory_.payload_bytes(), std::byte{0});
  for (int head = 0; head < shape.kv_heads; ++head) kind(head) = Centering::none;
}

std::size_t Centres::means_offset() const noexcept {
  const CentreShape& shape = memory_.header();
  return static_cast<std::size_t>(shape.kv_heads) * static_cast<std::size_t>(shape.head_dim) *
         sizeof(float);
}

std::size_t Centres::kinds_offset() const noexcept {
  const CentreShape& shape = memory_.header();
  return means_offset() + static_cast<std::size_t>(shape.kv_heads) * 2 *
                              static_cast<std::size_t>(shape.pairs) * sizeof(float);
}

const float* Centres::constant(int head) const noexcept {
  return reinterpret_cast<const float*>(memory_.payload()) +
         static_cast<std::ptrdiff_t>(head) * memory_.header().head_dim;
}

const float* Centres::means(int head) const noexcept {
  return reinterpret_cast<const float*>(memory_.payload() + means_offset()) +
         static_cast<std::ptrdiff_t>(2 * head) * memory_.header().pairs;
}

Centering Centres::kind(int head) const noexcept {
  return reinterpret_cast<const Centering*>(memory_.payload() + kinds_offset())[head];
}

float* Centres::constant(int head) noexcept {
  return const_cast<float*>(std::as_const(*this).constant(head));
}

float* Centres::means(int head) noexcept {
  return const_cast<float*>(std::as_const(*this).means(head));
}

Centering& Centres::kind(int head) noexcept {
  return reinterpret_cast<Centering*>(memory_.payload() + kinds_offset())[head];
}

void choose_centre(const Context& context, const HeadKeys& keys, int head, Centres& centres) {
  const Centering wanted = context.options.centering;
  if (wanted == Centering::none) return;
  const bool automatic = wanted == Centering::automatic;
  const Moments moments = find_moments(context, keys);
  const auto count = static_cast<double>(keys.tokens);

  // What each centre takes away of the energy per token.
  const double mean_energy = squared(moments.sum);
  const RopeTables* tables = context.rope.get();
  std::vector<double> strengths(moments.real.size());
  double constant_energy = mean_energy;  // of the coordinates that do not turn
  for (std::size_t f = 0; f < strengths.size(); ++f) {
    strengths[f] = moments.real[f] * moments.real[f] + moments.imaginary[f] * moments.imaginary[f];
    const int pair = static_cast<int>(f);
    for (const int c : {tables->first_of(pair), tables->second_of(pair)}) {
      constant_energy -=
          moments.sum[static_cast<std::size_t>(c)] * moments.sum[static_cast<std::size_t>(c)];
    }
  }
  const double rope_energy =
      constant_energy + std::accumulate(strengths.begin(), strengths.end(), 0.0);
  const double mean_left = moments.energy - mean_energy;
  const double rope_left = moments.energy - rope_energy;
  const bool use_rope = tables != nullptr && (wanted == Centering::rope ||
                                              (automatic && rope_left < kClearlyLess * mean_left &&
                                               rope_energy > kClearlyAMean * rope_left / count));
  const bool use_mean =
      wanted == Centering::mean || (automatic && mean_energy > kClearlyAMean * mean_left / count);
  if (!use_rope && !use_mean) return;

  float* constant = centres.constant(head);
  for (std::size_t c = 0; c < moments.sum.size(); ++c) {
    constant[c] = static_cast<float>(moments.sum[c]);
  }
  centres.kind(head) = use_rope ? Centering::rope : Centering::mean;
  if (!use_rope) return;

  std::vector<std::size_t> weakest(strengths.size());
  std::iota(weakest.begin(), weakest.end(), std::size_t{0});
  std::sort(weakest.begin(), weakest.end(),
            [&](std::size_t a, std::size_t b) { return strengths[a] < strengths[b]; });
  double spare = kNegligible * std::max(rope_left, 0.0);
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

void add_centre(const Context& context, const Centres& centres, int head, std::int64_t first_token,
                float factor, float* rows) {
  const Centering kind = centres.kind(head);
  if (kind == Centering::none) return;
  const int dim = context.options.head_dim;
  const float* constant = centres.constant(head);
  for (int t = 0; t < kTileTokens; ++t) {
    for (int c = 0; c < dim; ++c) rows[t * dim + c] += factor * constant[c];
  }
  if (kind != Centering::rope) return;
  const RopeTables& tables = *context.rope;
  const auto phasors = tables.tiles(first_token / kTileTokens + 1);
  const float* means = centres.means(head);
  for (int f = 0; f < tables.pair_count(); ++f) {
    const Complex mean{means[f], means[tables.pair_count() + f]};
    if (mean.real == 0.0F && mean.imaginary == 0.0F) continue;
    const Complex middle = multiply(mean, middle_phasor(tables, *phasors, first_token, f));
    for (int t = 0; t < kTileTokens; ++t) {
      const Complex turned = multiply(middle, distance_phasor(tables, f, t));
      rows[t * dim + tables.first_of(f)] += factor * turned.real;
      rows[t * dim + tables.second_of(f)] += factor * turned.imaginary;
    }
  }
}

bool CentreScores::has_rope(const Context& context, const Centres& centres) noexcept {
  for (int head = 0; centres && head < context.options.kv_heads; ++head) {
    if (centres.kind(head) == Centering::rope) return true;
  }
  return false;
}

std::int64_t CentreScores::factor_floats(const Context& context) noexcept {
  return std::int64_t{2} * kernels::kLanes * context.rope->pair_count();
}

CentreScores::CentreScores(const Context& context, const Centres& centres, int head,
                           const float* queries, std::ptrdiff_t stride, int rows,
                           const float* tiles, float* factors) noexcept {
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
  int count = 0;
  int slow_count = 0;
  for (const bool slow : {false, true}) {
    for (int f = 0; f < pairs; ++f) {
      if (means[f] == 0.0F && means[pairs + f] == 0.0F) continue;
      if (tables.is_slow(f) != slow) continue;
      pairs_[count++] = static_cast<std::uint16_t>(f);
      slow_count += slow ? 1 : 0;
    }
  }
  for (int k = 0; k < count; ++k) {
    const int f = pairs_[k];
    float* real = factors + std::ptrdiff_t{2} * kernels::kLanes * k;
    float* times_i = real + kernels::kLanes;
    std::fill_n(real, 2 * kernels::kLanes, 0.0F);
    for (int r = 0; r < rows; ++r) {
      const float* query = queries + r * stride;
      const Complex conjugate{query[tables.first_of(f)], -query[tables.second_of(f)]};
      const Complex product = multiply(conjugate, {means[f], means[pairs + f]});
      real[2 * r] = product.real;
      real[2 * r + 1] = product.imaginary;
      times_i[2 * r] = -product.imaginary;
      times_i[2 * r + 1] = product.real;
    }
  }
  rope_.count = count;
  rope_.slow_count = slow_count;
  rope_.factors = factors;
  rope_.pair_count = pairs;
  rope_.half = tables.half();
  rope_.terms = tables.terms();
  rope_.tiles = tiles;
  rope_.offsets = tables.offsets();
}

kernels::RopeBias CentreScores::rope() const noexcept {
  kernels::RopeBias bias = rope_;
  bias.pairs = pairs_;
  return bias;
}

}  // namespace tqai::detail
