// What geometries the library takes.
#pragma once

#include <cstddef>

namespace tqai {

static_assert(sizeof(std::size_t) >= 8,
              "tqai needs a 64-bit processor: sizes of caches would wrap on this one");

/// Fewest coordinates of a vector.
inline constexpr int kMinHeadDim = 8;
/// Most: what attention over latents (DeepSeek's MLA) takes, 512 of the latent and 64 of the rotary
/// key.
inline constexpr int kMaxHeadDim = 576;
/// Fewest bits of a coordinate's code.
inline constexpr int kMinBits = 1;
/// Most.
inline constexpr int kMaxBits = 8;

}  // namespace tqai
