#include <tqai/packing.hpp>

#include "pack.hpp"

namespace tqai {

TQAI_INLINE void pack_keys(const std::uint8_t* codes, int coordinates, int bits,
                           std::uint8_t* packed) noexcept {
  pack_lines(true, codes, coordinates, bits, packed);
}

TQAI_INLINE void unpack_keys(const std::uint8_t* packed, int coordinates, int bits,
                             std::uint8_t* codes) noexcept {
  unpack_lines(true, packed, coordinates, bits, codes);
}

TQAI_INLINE void pack_values(const std::uint8_t* codes, int coordinates, int bits,
                             std::uint8_t* packed) noexcept {
  pack_lines(false, codes, coordinates, bits, packed);
}

TQAI_INLINE void unpack_values(const std::uint8_t* packed, int coordinates, int bits,
                               std::uint8_t* codes) noexcept {
  unpack_lines(false, packed, coordinates, bits, codes);
}

TQAI_INLINE TileLayout::TileLayout(int key_dim, int value_dim, int bits_k, int bits_v)
    : key_segments_{{0, padded_dim(key_dim), bits_k}},
      value_segments_{{0, padded_dim(value_dim), bits_v}},
      value_codes_(packed_bytes(padded_dim(key_dim), bits_k)),
      key_norms_(value_codes_ + packed_bytes(padded_dim(value_dim), bits_v)) {}

}  // namespace tqai
