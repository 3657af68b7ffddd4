// What the rows of a cache share.
#pragma once

#include <algorithm>
#include <cstddef>
#include <memory>
#include <tqai/cache.hpp>
#include <tqai/key_basis.hpp>

#include "../kernels/kernels.hpp"
#include "codec.hpp"
#include "rope_tables.hpp"

namespace tqai::detail {

/// Geometry and kernels of a cache.
struct Context {
  CacheOptions options;  // defaults filled in
  std::shared_ptr<const Codec> codec;
  std::shared_ptr<const RopeTables> rope;  // null where the options have none
  const kernels::Kernels* kernels = nullptr;

  std::size_t key_bytes() const noexcept {
    return static_cast<std::size_t>(options.head_dim) * size_of(options.dtype);
  }
  std::size_t value_bytes() const noexcept {
    return static_cast<std::size_t>(options.value_head_dim) * size_of(options.dtype);
  }
  /// Of one exact token of all heads.
  std::size_t token_bytes() const noexcept {
    return static_cast<std::size_t>(options.kv_heads) * (key_bytes() + value_bytes());
  }
  /// Of keys and values in a tile. Less its centre, which is no longer than such keys, a key may be
  /// twice as long.
  float longest_key() const noexcept {
    const float less_centre =
        options.key_basis ? kMaxHalf * codec->shortest_codes() / options.key_basis->largest_ratio()
                          : codec->longest_key();
    return std::min(KvCache::kMaxNorm,
                    options.centering == Centering::none ? less_centre : 0.5F * less_centre);
  }
  float longest_value() const noexcept {
    return std::min(KvCache::kMaxNorm, codec->longest_value());
  }
  /// A head's matrices. Only where there is a basis.
  kernels::KeyTransform key_transform(int head) const noexcept {
    return kernels::KeyTransform(options.key_basis->head(head));
  }
  kernels::QueryTransform query_transform(int head) const noexcept {
    return kernels::QueryTransform(options.key_basis->head(head));
  }
  /// Of the kernels' working memory for a tile's keys and values.
  std::size_t coding_bytes() const noexcept {
    const std::size_t of_keys =
        options.key_codes == CodeKind::trellis
            ? kernels::key_path_coding_bytes(options.head_dim)
            : (options.key_basis ? kernels::basis_coding_bytes(options.head_dim)
                                 : kernels::kCodingBytes);
    return options.value_codes == CodeKind::scalar
               ? of_keys
               : std::max(of_keys,
                          kernels::trellis_coding_bytes(options.value_head_dim, options.bits_v));
  }
  /// Whether centres may turn with the position.
  bool uses_positions() const noexcept {
    return rope &&
           (options.centering == Centering::automatic || options.centering == Centering::rope);
  }
  /// Positions a token that are kept.
  int sections() const noexcept { return rope ? rope->rope().section_count() : 1; }
  /// Of a block's payload.
  std::size_t block_bytes() const noexcept {
    return static_cast<std::size_t>(options.kv_heads) * codec->layout().bytes();
  }
};

}  // namespace tqai::detail
