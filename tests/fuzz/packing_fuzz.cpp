// Codes that are packed and unpacked again, and whatever bytes are unpacked.
//
// An input is the bits, the blocks of coordinates, the side, and codes.
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <tqai/packing.hpp>
#include <vector>

namespace {

void require(bool holds) {
  if (!holds) std::abort();
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  if (size < 3) return 0;
  const int bits = 1 + data[0] % 8;
  const int coordinates = tqai::kCoordinateBlock * (1 + data[1] % 3);
  const auto pack = data[2] % 2 == 0 ? tqai::pack_keys : tqai::pack_values;
  const auto unpack = data[2] % 2 == 0 ? tqai::unpack_keys : tqai::unpack_values;
  data += 3;
  size -= 3;
  const auto next = [&data, &size]() -> std::uint8_t {
    if (size == 0) return 0;
    --size;
    return *data++;
  };

  std::vector<std::uint8_t> codes(static_cast<std::size_t>(coordinates) * tqai::kTileTokens);
  for (std::uint8_t& code : codes) code = static_cast<std::uint8_t>(next() & ((1 << bits) - 1));
  // Of exactly the size that is said, so that a byte beyond is found.
  std::vector<std::uint8_t> packed(tqai::packed_bytes(coordinates, bits));
  packed.shrink_to_fit();
  pack(codes.data(), coordinates, bits, packed.data());
  std::vector<std::uint8_t> back(codes.size(), 0xFF);
  unpack(packed.data(), coordinates, bits, back.data());
  require(back == codes);

  // No bit is idle: any bytes are those of some codes.
  for (std::uint8_t& byte : packed) byte = static_cast<std::uint8_t>(byte ^ next());
  unpack(packed.data(), coordinates, bits, codes.data());
  for (const std::uint8_t code : codes) require(code < (1 << bits));
  std::vector<std::uint8_t> again(packed.size());
  pack(codes.data(), coordinates, bits, again.data());
  require(again == packed);
  return 0;
}
