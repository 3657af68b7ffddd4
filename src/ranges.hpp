// Checks of numbers that callers hand in.
#pragma once

#include <cstdint>
#include <string>
#include <tqai/error.hpp>
#include <tqai/limits.hpp>

namespace tqai {

/// Throws ValueError where `value` is not in low…high.
inline void check_range(const char* name, std::int64_t value, std::int64_t low, std::int64_t high) {
  if (value >= low && value <= high) return;
  throw ValueError(std::string(name) + " = " + std::to_string(value) +
                   "; allowed: " + std::to_string(low) + "…" + std::to_string(high));
}

/// Throws ValueError for a number that an enumeration from 0 to `last` does not have.
template <typename Enumeration>
void check_enumerator(const char* name, Enumeration value, Enumeration last) {
  check_range(name, static_cast<std::int64_t>(value), 0, static_cast<std::int64_t>(last));
}

/// `dim` where it is a head dimension that the library takes, else ValueError.
inline int checked_head_dim(const char* name, int dim) {
  check_range(name, dim, kMinHeadDim, kMaxHeadDim);
  return dim;
}

/// `bits` where the library has codes of so many, else ValueError.
inline int checked_bits(const char* name, int bits) {
  check_range(name, bits, kMinBits, kMaxBits);
  return bits;
}

}  // namespace tqai
