// The layout of packing.hpp: codes [coordinate, token] into groups of 8 lines, and those into
// `bits` lines of bytes. The specification that the SIMD levels' decoding is tested against; plain
// loops over lines, which compilers vectorise. No
// namespace, no guard and no includes: see rotate-inl.hpp.

// One byte of each line. codes: [8] with stride kLineBytes; packed: [bits] with the same stride.
template <int kBits>
inline void pack_bytes(const std::uint8_t* codes, std::uint8_t* packed) noexcept {
  const auto code = [codes](int i) -> unsigned { return codes[i * kLineBytes]; };
  const auto put = [packed](int line, unsigned byte) {
    packed[line * kLineBytes] = static_cast<std::uint8_t>(byte);
  };
  if constexpr (kBits == 8) {
    for (int i = 0; i < 8; ++i) put(i, code(i));
  } else if constexpr (kBits == 3) {
    put(0, code(0) | code(1) << 3 | (code(6) & 3U) << 6);
    put(1, code(2) | code(3) << 3 | (code(7) & 3U) << 6);
    put(2, code(4) | code(5) << 3 | (code(6) >> 2) << 6 | (code(7) >> 2) << 7);
  } else {
    int line = 0;
    int shift = 0;  // of the plane in the code
    if constexpr ((kBits & 4) != 0) {
      for (; line < 4; ++line) {
        put(line, (code(2 * line) & 15U) | (code(2 * line + 1) & 15U) << 4);
      }
      shift = 4;
    }
    if constexpr ((kBits & 2) != 0) {
      for (int l = 0; l < 2; ++l, ++line) {
        unsigned byte = 0;
        for (int m = 0; m < 4; ++m) byte |= (code(4 * l + m) >> shift & 3U) << (2 * m);
        put(line, byte);
      }
      shift += 2;
    }
    if constexpr ((kBits & 1) != 0) {
      unsigned byte = 0;
      for (int n = 0; n < 8; ++n) byte |= (code(n) >> shift & 1U) << n;
      put(line, byte);
    }
  }
}

template <int kBits>
inline void unpack_bytes(const std::uint8_t* packed, std::uint8_t* codes) noexcept {
  const auto byte = [packed](int line) -> unsigned { return packed[line * kLineBytes]; };
  const auto put = [codes](int i, unsigned code) {
    codes[i * kLineBytes] = static_cast<std::uint8_t>(code);
  };
  if constexpr (kBits == 8) {
    for (int i = 0; i < 8; ++i) put(i, byte(i));
  } else if constexpr (kBits == 3) {
    for (int i = 0; i < 6; ++i) put(i, byte(i / 2) >> (3 * (i % 2)) & 7U);
    put(6, byte(0) >> 6 | (byte(2) >> 6 & 1U) << 2);
    put(7, byte(1) >> 6 | (byte(2) >> 7) << 2);
  } else {
    for (int i = 0; i < 8; ++i) {
      unsigned code = 0;
      int line = 0;
      int shift = 0;
      if constexpr ((kBits & 4) != 0) {
        code = byte(i / 2) >> (4 * (i % 2)) & 15U;
        line = 4;
        shift = 4;
      }
      if constexpr ((kBits & 2) != 0) {
        code |= (byte(line + i / 4) >> (2 * (i % 4)) & 3U) << shift;
        line += 2;
        shift += 2;
      }
      if constexpr ((kBits & 1) != 0) code |= (byte(line) >> i & 1U) << shift;
      put(i, code);
    }
  }
}

// The same of trellis codes, up to 4 bits: a stream of bits, the first code's lowest first. That is
// another order for 3 bits alone.
template <int kBits>
inline void pack_stream_bytes(const std::uint8_t* codes, std::uint8_t* packed) noexcept {
  if constexpr (kBits == 3) {
    unsigned stream = 0;
    for (int i = 0; i < 8; ++i) {
      stream |= static_cast<unsigned>(codes[i * kLineBytes]) << (3 * i);
    }
    for (int line = 0; line < 3; ++line) {
      packed[line * kLineBytes] = static_cast<std::uint8_t>(stream >> (8 * line));
    }
  } else {
    pack_bytes<kBits>(codes, packed);
  }
}

template <int kBits>
inline void unpack_stream_bytes(const std::uint8_t* packed, std::uint8_t* codes) noexcept {
  if constexpr (kBits == 3) {
    unsigned stream = 0;
    for (int line = 0; line < 3; ++line) {
      stream |= static_cast<unsigned>(packed[line * kLineBytes]) << (8 * line);
    }
    for (int i = 0; i < 8; ++i) {
      codes[i * kLineBytes] = static_cast<std::uint8_t>(stream >> (3 * i) & 7U);
    }
  } else {
    unpack_bytes<kBits>(packed, codes);
  }
}

// codes: [8 lines, 64], packed: [bits lines, 64].
template <int kBits>
inline void pack_group_of(const std::uint8_t* __restrict codes,
                          std::uint8_t* __restrict packed) noexcept {
  for (int i = 0; i < kLineBytes; ++i) pack_bytes<kBits>(codes + i, packed + i);
}

template <int kBits>
inline void unpack_group_of(const std::uint8_t* __restrict packed,
                            std::uint8_t* __restrict codes) noexcept {
  for (int i = 0; i < kLineBytes; ++i) unpack_bytes<kBits>(packed + i, codes + i);
}

// Calls body with bits as a compile-time constant.
template <typename Body>
inline void with_bits(int bits, Body&& body) noexcept {
  switch (bits) {
    case 1: body.template operator()<1>(); break;
    case 2: body.template operator()<2>(); break;
    case 3: body.template operator()<3>(); break;
    case 4: body.template operator()<4>(); break;
    case 5: body.template operator()<5>(); break;
    case 6: body.template operator()<6>(); break;
    case 7: body.template operator()<7>(); break;
    default: body.template operator()<8>(); break;
  }
}

inline void pack_group(const std::uint8_t* codes, int bits, std::uint8_t* packed) noexcept {
  with_bits(bits, [&]<int kBits>() { pack_group_of<kBits>(codes, packed); });
}

inline void unpack_group(const std::uint8_t* packed, int bits, std::uint8_t* codes) noexcept {
  with_bits(bits, [&]<int kBits>() { unpack_group_of<kBits>(packed, codes); });
}

// Lines of a group of keys: coordinates 8 · group …, all 64 tokens. codes: [.., 64].
inline void gather_key_lines(const std::uint8_t* codes, int group,
                             std::uint8_t* __restrict lines) noexcept {
  for (int quad = 0; quad < 2; ++quad) {
    const std::uint8_t* rows = codes + (kGroupCodes * group + 4 * quad) * kTileTokens;
    std::uint8_t* out = lines + 4 * quad * kLineBytes;  // 4 lines of 16 tokens: 64 tokens
    for (int t = 0; t < kTileTokens; ++t) {
      out[4 * t] = rows[t];
      out[4 * t + 1] = rows[kTileTokens + t];
      out[4 * t + 2] = rows[2 * kTileTokens + t];
      out[4 * t + 3] = rows[3 * kTileTokens + t];
    }
  }
}

inline void scatter_key_lines(const std::uint8_t* __restrict lines, int group,
                              std::uint8_t* codes) noexcept {
  for (int quad = 0; quad < 2; ++quad) {
    std::uint8_t* rows = codes + (kGroupCodes * group + 4 * quad) * kTileTokens;
    const std::uint8_t* in = lines + 4 * quad * kLineBytes;
    for (int c = 0; c < 4; ++c) {
      for (int t = 0; t < kTileTokens; ++t) rows[c * kTileTokens + t] = in[4 * t + c];
    }
  }
}

// Lines of a group of values: coordinates 16 · (group / 2) …, tokens 32 · (group % 2) ….
inline void gather_value_lines(const std::uint8_t* codes, int group, std::uint8_t* lines) noexcept {
  const std::uint8_t* first = codes + group / 2 * kCoordinateBlock * kTileTokens + group % 2 * 32;
  for (int line = 0; line < kGroupCodes; ++line) {
    for (int c = 0; c < kCoordinateBlock; ++c) {
      std::memcpy(lines + line * kLineBytes + 4 * c, first + c * kTileTokens + 4 * line, 4);
    }
  }
}

inline void scatter_value_lines(const std::uint8_t* lines, int group,
                                std::uint8_t* codes) noexcept {
  std::uint8_t* first = codes + group / 2 * kCoordinateBlock * kTileTokens + group % 2 * 32;
  for (int line = 0; line < kGroupCodes; ++line) {
    for (int c = 0; c < kCoordinateBlock; ++c) {
      std::memcpy(first + c * kTileTokens + 4 * line, lines + line * kLineBytes + 4 * c, 4);
    }
  }
}

// Both sides have coordinates / 8 groups.
inline void pack_lines(bool keys, const std::uint8_t* codes, int coordinates, int bits,
                       std::uint8_t* packed) noexcept {
  alignas(kLineBytes) std::uint8_t lines[kGroupCodes * kLineBytes];
  for (int group = 0; group < coordinates / kGroupCodes; ++group) {
    if (keys) {
      gather_key_lines(codes, group, lines);
    } else {
      gather_value_lines(codes, group, lines);
    }
    pack_group(lines, bits, packed + static_cast<std::ptrdiff_t>(group) * bits * kLineBytes);
  }
}

inline void unpack_lines(bool keys, const std::uint8_t* packed, int coordinates, int bits,
                         std::uint8_t* codes) noexcept {
  alignas(kLineBytes) std::uint8_t lines[kGroupCodes * kLineBytes];
  for (int group = 0; group < coordinates / kGroupCodes; ++group) {
    unpack_group(packed + static_cast<std::ptrdiff_t>(group) * bits * kLineBytes, bits, lines);
    if (keys) {
      scatter_key_lines(lines, group, codes);
    } else {
      scatter_value_lines(lines, group, codes);
    }
  }
}
