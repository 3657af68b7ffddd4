#include "bytes.hpp"

#include <cstring>
#include <string>
#include <tqai/error.hpp>

namespace tqai::detail {
namespace TQAI_LOCAL {

constexpr std::size_t kMostPadding = 64;

TQAI_INLINE std::size_t padding(std::size_t at, std::size_t unit) {
  return (unit - at % unit) % unit;
}

}  // namespace TQAI_LOCAL

TQAI_INLINE void Writer::align(std::size_t unit) {
  const std::byte zeros[kMostPadding] = {};
  write_from(zeros, padding(written_, unit));
}

TQAI_INLINE void Reader::need(std::size_t count, std::size_t bytes) const {
  const std::size_t left = size_ - read_;
  if (count <= left / bytes) return;
  throw ValueError(
      "not the bytes of a cache, or damaged: it ends too early: " + std::to_string(count) +
      " times " + std::to_string(bytes) + " bytes should follow, " + std::to_string(left) + " do");
}

TQAI_INLINE void Reader::align(std::size_t unit) {
  std::byte zeros[kMostPadding];
  const std::size_t count = padding(read_, unit);
  read_into(zeros, count);
  for (std::size_t i = 0; i < count; ++i) {
    if (zeros[i] != std::byte{0}) {
      throw ValueError("not the bytes of a cache, or damaged: its padding");
    }
  }
}

TQAI_INLINE bool Reader::keeps(std::size_t unit) const noexcept {
  return owner_ && reinterpret_cast<std::uintptr_t>(here_) % unit == 0;
}

TQAI_INLINE const std::byte* Reader::keep(std::size_t bytes) {
  need(bytes, 1);
  const std::byte* kept = here_ + read_;
  read_ += bytes;
  return kept;
}

TQAI_INLINE void Reader::copy(std::span<std::byte> to) {
  if (to.empty()) return;
  if (source_) {
    source_(to);
  } else {
    std::memcpy(to.data(), here_ + read_, to.size());
  }
  read_ += to.size();
}

}  // namespace tqai::detail
