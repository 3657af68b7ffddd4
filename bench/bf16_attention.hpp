// The uncompressed rival: attention of G query heads over one kv head's bf16 keys and values, with
// AVX-512 BF16 products, each key and value read once for all G.
#pragma once

#include <cstdint>

namespace tqai::bench {

/// Whether this build and processor have it.
bool has_bf16_attention() noexcept;

/// keys, values: [tokens, dim] bf16; queries: [group, dim] fp32; output: [group, dim] fp32.
/// tokens: a multiple of 64; dim: a multiple of 32 up to 256; group ≤ 16.
void bf16_attention(const std::uint16_t* keys, const std::uint16_t* values, std::int64_t tokens,
                    int dim, int group, const float* queries, float scale, float* output) noexcept;

}  // namespace tqai::bench
