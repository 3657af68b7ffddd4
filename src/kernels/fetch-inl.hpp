// Fetching what attention reads next while it computes.
#ifndef TQAI_FETCH_INL
#define TQAI_FETCH_INL

#include "kernels.hpp"

namespace tqai::kernels::TQAI_LEVEL_NAMESPACE {
namespace TQAI_LOCAL {

// Fetches a line that is read soon. Not where it may lie beyond what was allocated by much: such an
// address is looked up in vain.
inline void fetch_soon(const void* line) noexcept {
#if defined(__GNUC__)
  __builtin_prefetch(line);
#elif defined(TQAI_X86)
  _mm_prefetch(static_cast<const char*>(line), _MM_HINT_T0);
#endif
}

// What will be read next, to be fetched meanwhile; may be empty.
struct Ahead {
  const std::uint8_t* data = nullptr;
  std::size_t bytes = 0;
};

// Fetches what is ahead a few lines at a time: dozens at once stall the loads that are needed now.
struct Fetch {
  const std::uint8_t* next;
  const std::uint8_t* end;
  std::ptrdiff_t bytes;  // a step

  template <typename Ops>
  void step() noexcept {
    const std::uint8_t* until = end - next < bytes ? end : next + bytes;
    for (; next < until; next += kLineBytes) Ops::prefetch(next);
  }
};

inline Fetch fetch_of(Ahead ahead, int steps) noexcept {
  const int lines = static_cast<int>(ahead.bytes / kLineBytes);
  return {ahead.data, ahead.data + ahead.bytes,
          std::ptrdiff_t{kLineBytes} * ((lines + steps - 1) / steps)};
}

// Bytes of the next tile that are fetched with each part of this one: evenly over its time, where
// one block holds its rows. A whole tile ahead, as half of one is too late for what comes from
// memory; and not at once, as processors keep track of a few dozen lines, and then wait.
struct FetchShares {
  std::size_t keys;
  std::size_t rows;
  std::size_t values;

  FetchShares(std::size_t tile_bytes, int row_count) noexcept {
    const std::size_t lines = tile_bytes / kLineBytes;
    const std::size_t in_rows =
        lines * static_cast<std::size_t>(row_count - 1) / static_cast<std::size_t>(2 * row_count);
    const std::size_t in_keys = (lines - in_rows) / 2;
    keys = in_keys * kLineBytes;
    rows = in_rows * kLineBytes;
    values = (lines - in_keys - in_rows) * kLineBytes;
  }
};

// The tile that is read next, in those shares; null: none.
struct NextTile {
  Ahead with_keys;
  Ahead with_rows;
  Ahead with_values;

  NextTile(const std::uint8_t* tile, const FetchShares& shares) noexcept {
    if (tile == nullptr) return;
    with_keys = {tile, shares.keys};
    with_rows = {tile + shares.keys, shares.rows};
    with_values = {tile + shares.keys + shares.rows, shares.values};
  }
};

}  // namespace TQAI_LOCAL
}  // namespace tqai::kernels::TQAI_LEVEL_NAMESPACE

#endif  // TQAI_FETCH_INL
