// The library's own random numbers: a seed means the same matrix on every platform, which the
// standard library's distributions do not promise.
#pragma once

#include <array>
#include <bit>
#include <cmath>
#include <cstdint>
#include <numbers>

namespace tqai {

/// Turns one word into well mixed ones; seeds Xoshiro256 (Steele, Lea, Flood: SplitMix64).
class SplitMix64 {
 public:
  explicit constexpr SplitMix64(std::uint64_t seed) noexcept : state_(seed) {}

  constexpr std::uint64_t next() noexcept {
    state_ += 0x9E3779B97F4A7C15U;
    std::uint64_t z = state_;
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9U;
    z = (z ^ (z >> 27)) * 0x94D049BB133111EBU;
    return z ^ (z >> 31);
  }

 private:
  std::uint64_t state_;
};

/// xoshiro256** (Blackman, Vigna: arXiv:1805.01407).
class Xoshiro256 {
 public:
  explicit constexpr Xoshiro256(std::uint64_t seed) noexcept {
    SplitMix64 mix(seed);
    for (std::uint64_t& word : state_) word = mix.next();
  }

  constexpr std::uint64_t next() noexcept {
    const std::uint64_t result = std::rotl(state_[1] * 5, 7) * 9;
    const std::uint64_t shifted = state_[1] << 17;
    state_[2] ^= state_[0];
    state_[3] ^= state_[1];
    state_[1] ^= state_[2];
    state_[0] ^= state_[3];
    state_[2] ^= shifted;
    state_[3] = std::rotl(state_[3], 45);
    return result;
  }

  /// Uniform in (0, 1], a multiple of 2^-53: its logarithm is finite.
  constexpr double uniform() noexcept { return static_cast<double>((next() >> 11) + 1) * 0x1p-53; }

  /// +1 or −1.
  constexpr float sign() noexcept { return (next() >> 63) != 0 ? -1.0F : 1.0F; }

 private:
  std::array<std::uint64_t, 4> state_{};
};

/// Standard normal numbers by Box and Muller; the last bits depend on the platform's libm.
class Gaussian {
 public:
  explicit Gaussian(std::uint64_t seed) noexcept : source_(seed) {}

  double next() noexcept {
    if (has_spare_) {
      has_spare_ = false;
      return spare_;
    }
    const double radius = std::sqrt(-2.0 * std::log(source_.uniform()));
    const double angle = 2.0 * std::numbers::pi * source_.uniform();
    spare_ = radius * std::sin(angle);
    has_spare_ = true;
    return radius * std::cos(angle);
  }

 private:
  Xoshiro256 source_;
  double spare_ = 0.0;
  bool has_spare_ = false;
};

}  // namespace tqai
