// Codes by bins against the codebook's search, where they could differ: at each boundary.
#include "kernels/code_bins.hpp"

#include <gtest/gtest.h>

#include <bit>
#include <cmath>
#include <limits>
#include <stdexcept>
#include <tqai/codebook.hpp>
#include <vector>

namespace tqai {
namespace {

using kernels::CodeBins;

constexpr float kInfinity = std::numeric_limits<float>::infinity();

int binned(const CodeBins& bins, float y, bool fuse) {
  const float within = std::fmax(-bins.limit, std::fmin(bins.limit, y));
  const float shifted = fuse ? std::fma(within, bins.scale, kernels::kRoundingShift)
                             : within * bins.scale + kernels::kRoundingShift;
  const auto bin = std::bit_cast<std::uint32_t>(shifted) & static_cast<unsigned>(bins.size - 1);
  return bins.codes[bin] + (y >= bins.boundaries[bin] ? 1 : 0);
}

TEST(CodeBins, GiveTheCodebooksCodes) {
  for (const int dim : {8, 9, 16, 40, 64, 80, 96, 128, 255, 256, 512, 576}) {
    for (int bits = 1; bits <= 7; ++bits) {
      const Codebook& book = codebook(dim, bits, Grid::int8);
      const CodeBins bins(book.boundaries());
      EXPECT_EQ(bins.size, bits <= kNarrowBits ? CodeBins::kNarrowSize : 2 << bits);
      std::vector<float> coordinates{0.0F, -0.0F, 1e-40F, 1e6F, -1e6F};
      for (const float boundary : book.boundaries()) {
        for (const float y : {boundary, std::nextafter(boundary, kInfinity),
                              std::nextafter(boundary, -kInfinity)}) {
          coordinates.push_back(y);
        }
      }
      // Bins' edges, and everything between them.
      for (int i = -1000; i <= 1000; ++i) {
        coordinates.push_back(1.1F * bins.limit * static_cast<float>(i) / 1000.0F);
        coordinates.push_back((static_cast<float>(i) + 0.5F) / bins.scale);
      }
      for (const float y : coordinates) {
        for (const bool fuse : {false, true}) {
          ASSERT_EQ(binned(bins, y, fuse), book.encode(y))
              << "d " << dim << ", bits " << bits << ", y " << y << ", fused " << fuse;
        }
      }
    }
  }
}

// At AVX-512 the tables are registers: of up to 4 bits none may need more.
TEST(CodeBins, OfNarrowCodesFitIntoRegistersAtAllDimensions) {
  for (int dim = 8; dim <= 576; dim += dim < 64 ? 1 : 7) {
    for (int bits = 1; bits <= kNarrowBits; ++bits) {
      const CodeBins bins(codebook(dim, bits, Grid::int8).boundaries());
      EXPECT_EQ(bins.size, CodeBins::kNarrowSize) << "d " << dim << ", bits " << bits;
    }
  }
}

TEST(CodeBins, RefuseBoundariesThatNoBinsPart) {
  const std::vector<float> close{-1.0F, -1e-6F, 1e-6F, 1.0F};
  EXPECT_THROW(CodeBins{close}, std::logic_error);
}

}  // namespace
}  // namespace tqai
