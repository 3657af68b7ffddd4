#include "code_bins.hpp"

#include <cmath>
#include <limits>
#include <stdexcept>
#include <tqai/export.hpp>

namespace tqai::kernels {
namespace TQAI_LOCAL {

// Products with `scale` are off by 1e-5 at most, fused or not.
constexpr double kClearance = 1e-4;

TQAI_INLINE bool parts(std::span<const float> boundaries, float scale) {
  double previous = -std::numeric_limits<double>::infinity();
  for (const float boundary : boundaries) {
    const double scaled = static_cast<double>(boundary) * static_cast<double>(scale);
    const double bin = std::nearbyint(scaled);
    if (bin == previous || std::abs(scaled - bin) > 0.5 - kClearance) return false;
    previous = bin;
  }
  return true;
}

}  // namespace TQAI_LOCAL

TQAI_INLINE CodeBins::CodeBins(std::span<const float> ascending) : limit(ascending.back()) {
  const int most = ascending.size() < kNarrowSize / 2 ? kNarrowSize : kMaxSize;
  for (size = kNarrowSize; size <= most; size *= 2) {
    // The outermost boundaries in the outermost bins, or a little further in.
    constexpr float kFinest = 1.0F;
    constexpr float kCoarsest = 0.9F;
    for (float part = kFinest; part >= kCoarsest; part -= 0.001F) {
      scale = limit > 0.0F ? part * static_cast<float>(size / 2 - 1) / limit : 1.0F;
      if (!parts(ascending, scale)) continue;
      boundaries.fill(std::numeric_limits<float>::infinity());
      int code = 0;
      for (int bin = -size / 2; bin < size / 2; ++bin) {
        const auto index = static_cast<std::size_t>(bin & (size - 1));
        codes[index] = static_cast<std::uint8_t>(code);
        if (code == static_cast<int>(ascending.size())) continue;
        const float boundary = ascending[static_cast<std::size_t>(code)];
        if (std::nearbyint(boundary * scale) != static_cast<float>(bin)) continue;
        boundaries[index] = boundary;
        ++code;
      }
      return;
    }
  }
  throw std::logic_error("no bins part these boundaries");
}

}  // namespace tqai::kernels
