// What geometries the library takes.
#pragma once

namespace tqai {

/// Coordinates of a vector. Sums over more than these could leave the kernels' 32 bits.
inline constexpr int kMinHeadDim = 8;
inline constexpr int kMaxHeadDim = 512;
/// Bits of a coordinate's code.
inline constexpr int kMinBits = 1;
inline constexpr int kMaxBits = 8;

}  // namespace tqai
