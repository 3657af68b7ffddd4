// The checksum that zlib and PNG use: finds accidents, not forgeries.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>

namespace tqai::detail {

/// CRC-32 of what `before` is the checksum of, and then `bytes`. crc32({}) = 0.
std::uint32_t crc32(std::span<const std::byte> bytes, std::uint32_t before = 0) noexcept;

}  // namespace tqai::detail
