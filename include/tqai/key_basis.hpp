// A basis for keys that is learnt from what keys and queries look like.
#pragma once

#include <cstddef>
#include <cstdint>
#include <optional>
#include <span>
#include <string>
#include <tqai/centering.hpp>
#include <tqai/error.hpp>
#include <tqai/export.hpp>
#include <tqai/limits.hpp>
#include <vector>

namespace tqai {

/// Second moments of one attention layer's keys and queries, which a KeyBasis is learnt from. Those
/// of keys are about their mean, and all are of keys and queries turned back to position 0 where
/// the rotary embedding is known, so that they hold at any position.
class TQAI_API KeyMoments {
 public:
  /// Of nothing yet. rope: what the keys and queries that will come have been turned by. Throws
  /// ValueError for numbers out of range.
  KeyMoments(int kv_heads, int head_dim, std::optional<Rope> rope = {});

  /// As given.
  int kv_heads() const noexcept { return kv_heads_; }
  /// As given.
  int head_dim() const noexcept { return head_dim_; }

  /// Adds keys of a kv head, [tokens, head_dim] fp32, as attention sees them. positions: what they
  /// have been turned by, [sections, tokens] with as many sections as the embedding has, or
  /// [tokens] for one that holds in all of them; empty: token i stands at i. O(tokens ·
  /// head_dim²). Throws IndexError for a head that there is not, and ValueError for another size or
  /// for NaN or infinity.
  void add_keys(int head, std::span<const float> keys,
                std::span<const std::int64_t> positions = {});
  /// Adds queries that read a kv head, of any of its query heads; otherwise as `add_keys`.
  void add_queries(int head, std::span<const float> queries,
                   std::span<const std::int64_t> positions = {});

  /// Adds what is known without having seen any, such as from a model's weights: moments of keys
  /// and of queries turned back to position 0, each [head_dim, head_dim], symmetric and positive
  /// semidefinite, of any scale: they are scaled to what has been added so far, if anything has,
  /// and weigh as much as `tokens` tokens of it. Throws as `add_keys`.
  void add_prior(int head, std::span<const double> keys, std::span<const double> queries,
                 double tokens);

  /// Tokens of a head's keys that were added, with those that priors weigh. Throws IndexError.
  double tokens(int head) const;

  /// Moments of a head's keys, less their mean, [head_dim, head_dim]: the mean over 97 positions
  /// 0 … last_position of what they are when turned there. Positions are evenly spaced up to 4096;
  /// farther ones lie closer together towards 0, so that half of them are up to 2048. Throws
  /// IndexError, and ValueError where no keys were added.
  std::vector<double> keys_until(int head, std::int64_t last_position) const;
  /// The same of its queries, which keep their mean.
  std::vector<double> queries_until(int head, std::int64_t last_position) const;

 private:
  struct Sums {
    double count = 0.0;
    std::vector<double> sums;      // [dim]
    std::vector<double> products;  // [dim, dim], up to the diagonal
  };
  void check_head(int head) const;
  void add(Sums& sums, const char* name, std::span<const float> vectors,
           std::span<const std::int64_t> positions) const;
  std::vector<double> moments(const Sums& sums, bool central) const;
  std::vector<double> averaged(std::vector<double> moments, std::int64_t last_position) const;

  int kv_heads_;
  int head_dim_;
  std::optional<Rope> rope_;
  std::vector<Sums> keys_;
  std::vector<Sums> queries_;
};

/// For each kv head of a layer, the matrices by which its keys are quantised so that codes of one
/// width reach what reverse water-filling promises.
///
/// A key less its centre, r, becomes y = E r. Codes z are found coordinate by coordinate in a
/// closed loop, so that L z, L unit lower triangular, comes near to y over its norm n. It is read
/// as n F z with F = E⁻¹ L: a query is multiplied by Fᵀ once, and then with codes as ever.
///
/// All are FP16, and the two square matrices have a power of two as a factor; F is there once more
/// for queries, in 16-bit integers. Immutable; one object
/// serves any number of caches (`CacheOptions::key_basis`), from any threads.
class TQAI_API KeyBasis {
 public:
  /// Positions of a text up to which a basis is learnt to be good, where nothing else is said.
  static constexpr std::int64_t kLastPosition = 32768;

  /// The basis for codes of `bits` bits. The same moments give the same basis on one build of the
  /// library; elsewhere sums may round otherwise, and its `id` differ. O(kv_heads · head_dim³): 5
  /// ms a head for 64, 0.3 s for 256. Throws ValueError for numbers out of range and for a head
  /// without keys or queries, or with some of a size far from what models have.
  static KeyBasis learn(const KeyMoments& moments, int bits,
                        std::int64_t last_position = kLastPosition);

  /// As learnt for.
  int kv_heads() const noexcept { return kv_heads_; }
  /// As learnt for.
  int head_dim() const noexcept { return head_dim_; }
  /// As learnt for.
  int bits() const noexcept { return bits_; }
  /// A number that tells it from others: the 64-bit FNV-1a hash of what `serialize` writes before
  /// it.
  std::uint64_t id() const noexcept { return id_; }
  /// Of all matrices, including F once more for queries.
  std::size_t bytes() const noexcept;
  /// What `bytes` is for so many heads. Throws ValueError for numbers out of range.
  static std::size_t bytes_of(int kv_heads, int head_dim);

  /// A kv head's matrices, as FP16 bits.
  struct Head {
    std::span<const std::uint16_t> analysis;  ///< [head_dim, head_dim] row-major E / analysis_scale
    std::span<const std::uint16_t> feedback;  ///< L's rows up to before the diagonal, one after
                                              ///< another: head_dim (head_dim − 1) / 2
    std::span<const std::uint16_t>
        synthesis;          ///< [head_dim, head_dim] row-major F / synthesis_scale
    float analysis_scale;   ///< a power of two
    float synthesis_scale;  ///< a power of two
    /// F for queries, as integers whose products are added up in 32 bits: F_kc is
    /// query_scale · query_factors[k] · query_numbers[c / 16][k / 2][c % 16][k % 2].
    /// [padded_dim(head_dim) / 16, ⌈head_dim / 2⌉, 16, 2], 0 where F has no such row or column; no
    /// column is longer than kMostColumn.
    std::span<const std::int16_t> query_numbers;
    std::span<const float> query_factors;  ///< [head_dim], powers of two, or 0 for a row of zeros
    float query_scale;                     ///< above 0
  };
  /// √Σ n² of a column of Head::query_numbers is at most that.
  static constexpr int kMostColumn = 32'710;
  /// Throws IndexError.
  Head head(int head) const;

  /// ‖E r‖ / ‖L z‖ is up to this many times ‖r‖ / ‖z‖, in any head.
  float largest_ratio() const noexcept { return largest_ratio_; }

  /// As bytes (docs/format.md), for files and other processes. Throws UnsupportedError on a
  /// big-endian processor.
  std::vector<std::byte> serialize() const;
  /// What `serialize` wrote. Throws ValueError for anything else.
  static KeyBasis deserialize(std::span<const std::byte> bytes);

 private:
  KeyBasis(int kv_heads, int head_dim, int bits);
  std::size_t head_halves() const noexcept;
  std::size_t head_numbers() const noexcept;
  void reserve();  // room for all numbers
  void learn_head(int head, const std::vector<double>& keys, const std::vector<double>& queries);
  void finish();  // what follows from the matrices
  void round_for_queries(int head);
  std::string fault() const;  // what is wrong with its numbers; empty: nothing

  int kv_heads_;
  int head_dim_;
  int bits_;
  float largest_ratio_ = 0.0F;
  std::uint64_t id_ = 0;
  std::vector<float> scales_;          // [kv_heads, 2]
  std::vector<std::int16_t> numbers_;  // [kv_heads][query_numbers]
  std::vector<float> factors_;         // [kv_heads][query_factors, query_scale]
  std::vector<std::uint16_t> halves_;  // [kv_heads][E, L, F]
};

}  // namespace tqai

#if defined(TQAI_HEADER_ONLY) || defined(TQAI_IMPLEMENTATION)
#include <tqai/header_only.hpp>
#endif
