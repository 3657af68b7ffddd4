// What is left out of a row's keys before they are quantised, per head.
#pragma once

#include <cstdint>
#include <tqai/cache.hpp>

#include "../kernels/kernels.hpp"
#include "memory.hpp"
#include "moments.hpp"
#include "rope_tables.hpp"

namespace tqai::detail {

struct Context;

/// The centre of head h at position p is constant[h] + Σ_f mean[h, f] · e^(i p ω_f), the latter on
/// the coordinates of pair f. Payload: constants [kv_heads, head_dim] fp32, means [kv_heads, 2,
/// pairs] fp32 (real, imaginary), left [kv_heads] fp32, the energy per token that it left of the
/// keys it was chosen from, kinds [kv_heads] of Centering. Chosen once, then immutable.
struct CentreShape {
  int kv_heads = 0;
  int head_dim = 0;
  int pairs = 0;
};

class Centres {
 public:
  Centres() = default;
  /// All zero, of kind `none`. Throws std::bad_alloc.
  explicit Centres(const CentreShape& shape);

  explicit operator bool() const noexcept { return static_cast<bool>(memory_); }
  const Shared<CentreShape>& memory() const noexcept { return memory_; }

  float* constant(int head) noexcept;
  const float* constant(int head) const noexcept;
  float* means(int head) noexcept;
  const float* means(int head) const noexcept;
  float& left(int head) noexcept;
  float left(int head) const noexcept;
  Centering& kind(int head) noexcept;
  Centering kind(int head) const noexcept;

 private:
  std::size_t means_offset() const noexcept;
  std::size_t left_offset() const noexcept;
  std::size_t kinds_offset() const noexcept;

  Shared<CentreShape> memory_;
};

/// Chooses head `head`'s centre for keys with these moments, as the context's options say.
void choose_centre(const Context& context, const Moments& moments, int head, Centres& centres);

/// The least energy per token that a choice for these very keys could leave.
double least_left(const Context& context, const Moments& moments);

/// The energy per token that a centre leaves of keys with these moments.
double left_by(const Centres& centres, int head, const Moments& moments) noexcept;

void copy_centre(const Centres& from, int head, Centres& to) noexcept;

/// rows[t] += factor · centre at the position of token t. rows: [64, head_dim] fp32.
void add_centre(const Context& context, const Centres& centres, int head,
                const kernels::TilePositions& positions, float factor, float* rows);

/// What the centre adds to the scores of query rows: constants, and the arguments of the kernel.
class CentreScores {
 public:
  CentreScores() = default;  // nothing

  /// queries: [rows, stride] fp32. factors: factor_floats of 64-byte aligned memory of the
  /// caller's, unused where no head is centred by position.
  CentreScores(const Context& context, const Centres& centres, int head, const float* queries,
               std::ptrdiff_t stride, int rows, float* factors) noexcept;

  /// Whether any head is centred by position.
  static bool has_rope(const Context& context, const Centres& centres) noexcept;
  /// A multiple of 16. rows: as many as are given, or more.
  static std::int64_t factor_floats(const Context& context, int rows) noexcept;

  const float* constants() const noexcept { return constants_; }
  /// Points into this.
  kernels::RopeBias rope() const noexcept;

 private:
  float constants_[kernels::kMaxRows] = {};
  std::uint16_t pairs_[kernels::kMaxDim / 2];
  kernels::RopeBias rope_{};
};

}  // namespace tqai::detail
