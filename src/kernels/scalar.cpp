// The specification: plain C++ for every processor.
#define TQAI_LEVEL_NAMESPACE scalar_level
#define TQAI_VECTOR_LANES 4
#include "parts-inl.hpp"
#include "table-inl.hpp"

namespace tqai::kernels::TQAI_LEVEL_NAMESPACE {
namespace TQAI_LOCAL {

struct Integer {
  static constexpr int kQueryBytes = 1;

  static void read_halves(const std::uint8_t* from, float* to) noexcept {
    scalar_level::read_halves(from, to);
  }
  static void fetch(Fetch& /*ahead*/) noexcept {}
  static void round_weights(const float* products, float inverse, std::uint8_t* weights) noexcept {
    scalar_level::round_weights(products, inverse, weights);
  }

  static void prepare(const SegmentPlan& segment, const std::int8_t* queries, int rows,
                      std::uint8_t* words, RowConstants* /*constants*/) noexcept {
    std::memcpy(words, queries, static_cast<std::size_t>(rows * segment.count));
  }

  static const std::uint8_t* decode_keys(const SegmentPlan& /*segment*/,
                                         const std::uint8_t* /*packed*/, int /*rows*/,
                                         std::uint8_t* /*decoded*/) noexcept {
    return nullptr;
  }
  static const std::uint8_t* decode_values(const SegmentPlan& /*segment*/,
                                           const std::uint8_t* /*packed*/, int /*rows*/,
                                           std::uint8_t* /*decoded*/) noexcept {
    return nullptr;
  }
  static void score_decoded(const SegmentPlan& /*segment*/, const std::uint8_t* /*decoded*/,
                            const std::uint8_t* /*words*/, const RowConstants* /*constants*/,
                            int /*rows*/, std::int32_t* /*scores*/, Ahead /*ahead*/) noexcept {}
  static void accumulate_decoded(const SegmentPlan& /*segment*/, const std::uint8_t* /*decoded*/,
                                 const std::uint8_t* /*weights*/, const float* /*steps*/,
                                 int /*rows*/, float* /*output*/, std::int64_t /*stride*/,
                                 Ahead /*ahead*/) noexcept {}

  static void score(const SegmentPlan& segment, const std::uint8_t* packed,
                    const std::uint8_t* words, const RowConstants* /*constants*/, int rows,
                    std::int32_t* scores, Ahead /*ahead*/) noexcept {
    std::fill_n(scores, rows * kTileTokens, 0);
    if (segment.key_trellis != nullptr) return score_paths(segment, packed, words, rows, scores);
    for (int first = 0; first < segment.count; first += kCoordinateBlock) {
      std::uint8_t codes[kCoordinateBlock * kTileTokens];
      unpack_keys(packed + packed_bytes(first, segment.bits), kCoordinateBlock, segment.bits,
                  codes);
      for (int r = 0; r < rows; ++r) {
        std::int32_t* row = scores + static_cast<std::ptrdiff_t>(r) * kTileTokens;
        for (int c = 0; c < kCoordinateBlock; ++c) {
          const auto q = static_cast<std::int8_t>(words[r * segment.count + first + c]);
          for (int t = 0; t < kTileTokens; ++t) {
            row[t] += q * segment.levels[codes[c * kTileTokens + t]];
          }
        }
      }
    }
  }

  // Of trellis codes.
  static void score_paths(const SegmentPlan& segment, const std::uint8_t* packed,
                          const std::uint8_t* words, int rows, std::int32_t* scores) noexcept {
    const KeyTrellis& trellis = *segment.key_trellis;
    std::uint8_t codes[kCoordinateBlock * kTileTokens];
    // Coordinates 0, 4, 8 …, then 1, 5, 9 … follow one another: four paths side by side, of which
    // each but the first begins with the last codes of the one before.
    std::uint8_t windows[4][kTileTokens] = {};
    unpack_keys(packed + packed_bytes(segment.count - kCoordinateBlock, segment.bits),
                kCoordinateBlock, segment.bits, codes);
    for (int c = 0; c < kCoordinateBlock; ++c) {
      advance(trellis, codes + c * kTileTokens, windows[(c + 1) % 4]);
    }
    std::fill_n(windows[0], kTileTokens, static_cast<std::uint8_t>(trellis.before_first()));
    for (int first = 0; first < segment.count; first += kCoordinateBlock) {
      unpack_keys(packed + packed_bytes(first, segment.bits), kCoordinateBlock, segment.bits,
                  codes);
      for (int c = 0; c < kCoordinateBlock; ++c) {
        advance(trellis, codes + c * kTileTokens, windows[c % 4]);
        for (int r = 0; r < rows; ++r) {
          const auto q = static_cast<std::int8_t>(words[r * segment.count + first + c]);
          std::int32_t* row = scores + static_cast<std::ptrdiff_t>(r) * kTileTokens;
          for (int t = 0; t < kTileTokens; ++t) row[t] += q * trellis.levels[windows[c % 4][t]];
        }
      }
    }
  }
  static void advance(const KeyTrellis& trellis, const std::uint8_t* codes,
                      std::uint8_t* windows) noexcept {
    for (int t = 0; t < kTileTokens; ++t) {
      windows[t] = static_cast<std::uint8_t>(trellis.next(windows[t], codes[t]));
    }
  }

  static void accumulate(const SegmentPlan& segment, const std::uint8_t* packed,
                         const std::uint8_t* weights, const float* steps, int rows, float* output,
                         std::int64_t stride, Ahead /*ahead*/) noexcept {
    if (segment.trellis != nullptr) {
      return accumulate_rings(segment, packed, weights, steps, rows, output, stride);
    }
    for (int first = 0; first < segment.count; first += kCoordinateBlock) {
      std::uint8_t codes[kCoordinateBlock * kTileTokens];
      unpack_values(packed + packed_bytes(first, segment.bits), kCoordinateBlock, segment.bits,
                    codes);
      for (int r = 0; r < rows; ++r) {
        for (int c = 0; c < kCoordinateBlock; ++c) {
          std::int32_t sum = 0;
          for (int t = 0; t < kTileTokens; ++t) {
            sum += weights[r * kTileTokens + t] * segment.levels[codes[c * kTileTokens + t]];
          }
          float& out = output[r * stride + first + c];
          out = fused(static_cast<float>(sum), steps[r], out);
        }
      }
    }
  }

  // Of trellis codes.
  static void accumulate_rings(const SegmentPlan& segment, const std::uint8_t* packed,
                               const std::uint8_t* weights, const float* steps, int rows,
                               float* output, std::int64_t stride) noexcept {
    const Trellis& trellis = *segment.trellis->tables;
    // A packed byte is the window that ends with it; before the first stands the last.
    std::uint8_t windows[kLineBytes];
    std::memcpy(windows, packed + packed_bytes(segment.count, segment.bits) - kLineBytes,
                sizeof windows);
    for (int first = 0; first < segment.count; first += kCoordinateBlock) {
      std::uint8_t codes[kCoordinateBlock * kTileTokens];
      unpack_stream(packed + packed_bytes(first, segment.bits), segment.bits, 2, codes);
      int levels[kCoordinateBlock][kTileTokens];
      for (int line = 0; line < kCoordinateBlock; ++line) {
        advance_windows(trellis, codes + line * kLineBytes, windows);
        for (int i = 0; i < kLineBytes; ++i) {
          levels[i / 4][4 * line + i % 4] = trellis.level(windows[i]);
        }
      }
      for (int r = 0; r < rows; ++r) {
        for (int c = 0; c < kCoordinateBlock; ++c) {
          std::int32_t sum = 0;
          for (int t = 0; t < kTileTokens; ++t) {
            sum += weights[r * kTileTokens + t] * levels[c][t];
          }
          float& out = output[r * stride + first + c];
          out = fused(static_cast<float>(sum), steps[r], out);
        }
      }
    }
  }
};

constexpr Kernels kKernels = table_of<Integer, PlainLanes>(Level::scalar);
constexpr Parts kParts = parts_of<Integer>();

}  // namespace TQAI_LOCAL
}  // namespace tqai::kernels::TQAI_LEVEL_NAMESPACE

namespace tqai::kernels {

TQAI_INLINE constinit const Kernels kScalarKernels = scalar_level::kKernels;
TQAI_INLINE constinit const Parts kScalarParts = scalar_level::kParts;

}  // namespace tqai::kernels

#include "level_end.hpp"
