// Passes over the tokens that callers hand in.
#pragma once

#include <algorithm>
#include <cstdint>
#include <tqai/resources.hpp>

#include "../threads.hpp"

namespace tqai::detail {

/// Rows of tokens, cut into pieces that several threads share where there are many: a prompt is
/// worth it, a step is not.
struct Pieces {
  std::int64_t rows;
  std::int64_t tokens;       // of a row
  std::int64_t token_bytes;  // that a pass reads or writes

  /// work(row, first token, count) for all of them, in any order. Where it is one thread's it
  /// throws nothing of its own, else what parallel_for does.
  template <class Work>
  void each(const Resources& resources, const Work& work) const {
    constexpr std::int64_t kPieceBytes = 1 << 17;
    constexpr std::int64_t kWorthThreads = 1 << 20;
    if (token_bytes <= 0 || rows * tokens <= kWorthThreads / token_bytes) {
      for (std::int64_t row = 0; row < rows; ++row) work(row, std::int64_t{0}, tokens);
      return;
    }
    const std::int64_t piece = std::max<std::int64_t>(kPieceBytes / token_bytes, 1);
    const std::int64_t pieces = (tokens + piece - 1) / piece;
    parallel_for(resources, rows * pieces, 2, 0, [&](std::int64_t i, std::byte* /*memory*/) {
      const std::int64_t first = i % pieces * piece;
      work(i / pieces, first, std::min(piece, tokens - first));
    });
  }
};

}  // namespace tqai::detail
