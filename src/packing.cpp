#include <array>
#include <tqai/packing.hpp>

#include "kernels/group-inl.hpp"

namespace tqai {
namespace {

using Lines = std::array<std::uint8_t, static_cast<std::size_t>(kGroupCodes) * kLineBytes>;

// Calls visit(group, line, byte, code) for every code of a tile: where the code at [coordinate,
// token] of the [coordinates, 64] codes lies.
template <typename Visit>
void for_each_key_code(int group, Visit&& visit) {
  for (int line = 0; line < kGroupCodes; ++line) {
    for (int byte = 0; byte < kLineBytes; ++byte) {
      const int coordinate = kGroupCodes * group + line / 4 * 4 + byte % 4;
      const int token = line % 4 * 16 + byte / 4;
      visit(line * kLineBytes + byte, coordinate * kTileTokens + token);
    }
  }
}

template <typename Visit>
void for_each_value_code(int group, Visit&& visit) {
  for (int line = 0; line < kGroupCodes; ++line) {
    for (int byte = 0; byte < kLineBytes; ++byte) {
      const int coordinate = kCoordinateBlock * (group / 2) + byte / 4;
      const int token = group % 2 * 32 + line * 4 + byte % 4;
      visit(line * kLineBytes + byte, coordinate * kTileTokens + token);
    }
  }
}

// Both sides have coordinates / 8 groups.
template <typename ForEach>
void pack(const std::uint8_t* codes, int coordinates, int bits, std::uint8_t* packed,
          ForEach for_each) noexcept {
  for (int group = 0; group < coordinates / kGroupCodes; ++group) {
    Lines lines;
    for_each(group, [&](int at, int code) { lines[static_cast<std::size_t>(at)] = codes[code]; });
    pack_group(lines.data(), bits, packed + static_cast<std::ptrdiff_t>(group) * bits * kLineBytes);
  }
}

template <typename ForEach>
void unpack(const std::uint8_t* packed, int coordinates, int bits, std::uint8_t* codes,
            ForEach for_each) noexcept {
  for (int group = 0; group < coordinates / kGroupCodes; ++group) {
    Lines lines;
    unpack_group(packed + static_cast<std::ptrdiff_t>(group) * bits * kLineBytes, bits,
                 lines.data());
    for_each(group, [&](int at, int code) { codes[code] = lines[static_cast<std::size_t>(at)]; });
  }
}

}  // namespace

void pack_keys(const std::uint8_t* codes, int coordinates, int bits,
               std::uint8_t* packed) noexcept {
  pack(codes, coordinates, bits, packed,
       [](int group, auto visit) { for_each_key_code(group, visit); });
}

void unpack_keys(const std::uint8_t* packed, int coordinates, int bits,
                 std::uint8_t* codes) noexcept {
  unpack(packed, coordinates, bits, codes,
         [](int group, auto visit) { for_each_key_code(group, visit); });
}

void pack_values(const std::uint8_t* codes, int coordinates, int bits,
                 std::uint8_t* packed) noexcept {
  pack(codes, coordinates, bits, packed,
       [](int group, auto visit) { for_each_value_code(group, visit); });
}

void unpack_values(const std::uint8_t* packed, int coordinates, int bits,
                   std::uint8_t* codes) noexcept {
  unpack(packed, coordinates, bits, codes,
         [](int group, auto visit) { for_each_value_code(group, visit); });
}

TileLayout::TileLayout(int key_dim, int value_dim, int bits_k, int bits_v)
    : key_segments_{{0, padded_dim(key_dim), bits_k}},
      value_segments_{{0, padded_dim(value_dim), bits_v}},
      value_codes_(packed_bytes(padded_dim(key_dim), bits_k)),
      key_norms_(value_codes_ + packed_bytes(padded_dim(value_dim), bits_v)) {}

}  // namespace tqai
