// The compressed key/value cache of one attention layer.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <tqai/centering.hpp>
#include <tqai/cpu.hpp>
#include <tqai/error.hpp>
#include <tqai/export.hpp>
#include <tqai/half.hpp>
#include <tqai/matrix.hpp>
#include <tqai/packing.hpp>
#include <tqai/resources.hpp>
#include <tqai/rotation.hpp>
#include <tqai/trellis.hpp>
#include <vector>

namespace tqai {

class CacheFile;
class KeyBasis;
namespace detail {
class Reader;
struct CacheAccess;
}  // namespace detail

/// Geometry and settings of a cache; checked by KvCache's constructor.
struct CacheOptions {
  int kv_heads = 0;           ///< ≥ 1
  int head_dim = 0;           ///< of keys and queries, 8…576
  int value_head_dim = 0;     ///< 8…576; 0: as head_dim
  DType dtype = DType::f32;   ///< of keys and values, and of what is kept exact
  int bits_k = 4;             ///< 1…8 per coordinate
  int bits_v = 2;             ///< 1…8 per coordinate
  int sink_tokens = 4;        ///< first tokens of each row, kept exact for ever
  int residual_window = 128;  ///< last tokens of each row, kept exact
  /// What spreads a vector's energy over its coordinates.
  RotationKind rotation = RotationKind::automatic;
  /// What is left out of the keys' codes.
  Centering centering = Centering::automatic;
  std::optional<Rope> rope;  ///< what the keys have gone through, if known
  std::uint64_t seed =
      0x7461'6971;             ///< of the key rotation; the value rotation takes another from it
  std::optional<Level> level;  ///< default: default_level()
  /// What keys are quantised in, in place of the rotation, which then is of values alone; learnt
  /// for as many heads, coordinates and bits (<tqai/key_basis.hpp>). Null: none. A cache takes
  /// the object of another cache of this process where that one has the same matrices.
  std::shared_ptr<const KeyBasis> key_basis = nullptr;
  /// What codes of keys stand for. A trellis takes kMinKeyTrellisBits…kMaxTrellisBits bits, the
  /// same bytes, and a `key_basis`.
  CodeKind key_codes = CodeKind::scalar;
  /// What codes of values stand for. A trellis takes 1…kMaxTrellisBits bits, and the same bytes.
  CodeKind value_codes = CodeKind::scalar;
};

/// A borrowed 4-dimensional tensor.
struct ConstTensor {
  const void* data = nullptr;           ///< first element, at a multiple of its size
  DType dtype = DType::f32;             ///< of the elements
  std::array<std::int64_t, 4> shape{};  ///< elements along each dimension
  /// In elements; may be 0 (broadcast). The last dimension must be contiguous.
  std::array<std::int64_t, 4> strides{};
};

/// As ConstTensor, to be written: no two elements at one address.
struct Tensor {
  void* data = nullptr;                   ///< first element
  DType dtype = DType::f32;               ///< of the elements
  std::array<std::int64_t, 4> shape{};    ///< elements along each dimension
  std::array<std::int64_t, 4> strides{};  ///< in elements; 1 for the last dimension
};

/// Positions of tokens, [batch or 1, sections, tokens]; sections: 1 for positions that hold in all
/// of the embedding's, else as many as it has (`Rope::section_count`). Any strides, also 0.
struct PositionTensor {
  const std::int64_t* data = nullptr;     ///< first position
  std::array<std::int64_t, 3> shape{};    ///< batch or 1, sections, tokens
  std::array<std::int64_t, 3> strides{};  ///< in elements
};

/// An attention mask, [batch or 1, query_heads or 1, queries, columns]; column j is token
/// `AttendOptions::first_token` + j. Any strides, also for the last dimension.
struct Mask {
  /// What the elements are.
  enum class Kind : std::uint8_t { boolean, f32, f16, bf16 };
  const void* data = nullptr;  ///< first element
  Kind kind = Kind::boolean;   ///< boolean: bytes, nonzero = may be seen; else added to the scores,
                               ///< where −2.36e38 is the least that is not −∞
  std::array<std::int64_t, 4> shape{};    ///< as above
  std::array<std::int64_t, 4> strides{};  ///< in elements
};

/// What of the tokens a query sees, and how scores become weights.
struct AttendOptions {
  /// Multiplies q·k; up to ± 1e28. Nothing: 1/√head_dim.
  std::optional<float> scale;
  /// > 0: scores become soft_cap · tanh(score / soft_cap), before the mask. Finite, and
  /// 1e-10 or more.
  float soft_cap = 0.0F;
  /// The last query stands at the last token, and none sees later tokens than its own.
  bool causal = true;
  /// > 0: a query at token p sees tokens p − window + 1 … p only, whatever `causal` says.
  std::int64_t window = 0;
  /// Tokens before this one are not seen; the mask's first column.
  std::int64_t first_token = 0;
  /// Applied together with `causal` and `window`.
  std::optional<Mask> mask;
  /// [query_heads] fp32 attention sinks: a score that joins the softmax's sum with no value of its
  /// own; null: none. One of +∞ has all weight, and the output is 0; NaN gives NaN.
  const float* sink_scores = nullptr;
  /// To be written beside the output: log Σ exp(score) of what each query saw, sinks included, fp32
  /// [batch, queries, query_heads, 1], any strides, overlapping nothing else. −∞ for a query that
  /// sees nothing, NaN where the output is. With it outputs over different tokens merge: outputs a,
  /// b with logarithms s, t are (e^s a + e^t b) / (e^s + e^t) over all of them, whose logarithm is
  /// log(e^s + e^t).
  std::optional<Tensor> log_sum_exp;
};

/// Bytes that a cache holds, as its allocator handed them out. Tiles shared with other caches count
/// in each of them, once.
struct MemoryReport {
  std::int64_t tokens = 0;             ///< batch · tokens held, padding and discarded ones left out
  std::int64_t packed_tokens = 0;      ///< of those, in tiles
  std::size_t packed_bytes = 0;        ///< tiles: codes and norms
  std::size_t exact_bytes = 0;         ///< sinks, window and what waits for sealing, with capacity
  std::size_t overhead_bytes = 0;      ///< headers, lists, centres, what is reserved
  std::size_t mapped_bytes = 0;        ///< tiles in pages of files (files.hpp), not in the total
  std::size_t basis_bytes = 0;         ///< the shared CacheOptions::key_basis, not in the total
  std::size_t uncompressed_bytes = 0;  ///< of the same tokens in `dtype`
  /// All that the cache holds.
  std::size_t total_bytes() const noexcept { return packed_bytes + exact_bytes + overhead_bytes; }
};

/// Bytes now held by all caches of this process. Thread-safe.
TQAI_API std::size_t allocated_bytes() noexcept;

/// From now on a call that would make all caches of this process hold more than `bytes` throws
/// MemoryLimitError instead, with nothing changed; 0: no limit, as at first. What is held already
/// stays, also where it is more. Working memory of calls does not count. Thread-safe.
TQAI_API void limit_memory(std::size_t bytes) noexcept;
/// What `limit_memory` was given last.
TQAI_API std::size_t memory_limit() noexcept;

/// What of a KeyBasis a cache's bytes have.
enum class BasisAs : std::uint8_t { id, matrices };

/// Tokens first … first + count − 1.
struct TokenSpan {
  std::int64_t first = 0;  ///< number of the first token
  std::int64_t count = 0;  ///< how many
};

/// 64 sealed tokens of a row as they lie in memory, read-only: for runtimes that bring tiles to
/// another device, or send them elsewhere. What the bytes mean is in packing.hpp and
/// docs/format.md.
///
/// They stay where they are, and as they are, for as long as any cache holds the tokens: this one
/// until it is cropped below them, discards them or ends, and each copy of it likewise. Whoever
/// keeps a copy keeps them.
struct SealedBlock {
  std::int64_t first_token = 0;     ///< number of the first one
  int tokens = 0;                   ///< of the 64, the first ones: those that the row still has
  std::int64_t first_position = 0;  ///< of the first token, where `positions` is empty
  /// [sections, 64], where tokens do not stand one after another; sections is 1 where all of the
  /// embedding's stand alike.
  std::span<const std::int32_t> positions;
  int centre_set = 0;                  ///< of the row's (KvCache::centre), what keys are less of
  const TileLayout* layout = nullptr;  ///< KvCache::tile_layout
  std::span<const std::byte> tiles;    ///< [kv_heads, layout->bytes()], 64-byte aligned

  /// A head's tile, TileLayout::bytes(). For 0 ≤ head < kv_heads, here and below.
  std::span<const std::byte> tile(int head) const noexcept {
    return tiles.subspan(static_cast<std::size_t>(head) * layout->bytes(), layout->bytes());
  }
  /// What unpack_keys takes.
  std::span<const std::byte> key_codes(int head) const noexcept {
    return tile(head).first(layout->value_codes());
  }
  /// What unpack_values takes.
  std::span<const std::byte> value_codes(int head) const noexcept {
    return tile(head).subspan(layout->value_codes(), layout->key_norms() - layout->value_codes());
  }
  /// [64] FP16: a key, less its centre, is norm · step · level of each code, turned back by
  /// KvCache::key_rotation; of keys in a basis see key_basis.hpp.
  std::span<const std::uint16_t> key_norms(int head) const noexcept {
    return norms(head, layout->key_norms());
  }
  /// [64] FP16, of values, turned back by KvCache::value_rotation.
  std::span<const std::uint16_t> value_norms(int head) const noexcept {
    return norms(head, layout->value_norms());
  }

 private:
  std::span<const std::uint16_t> norms(int head, std::size_t offset) const noexcept {
    return {reinterpret_cast<const std::uint16_t*>(tile(head).data() + offset),
            static_cast<std::size_t>(kTileTokens)};
  }
};

/// What is added to the keys of a head that codes stand for: at position p `constant`, and on pair
/// f of the embedding (real[f] + i imaginary[f]) · e^(i p ω_f). Lives as a SealedBlock's bytes.
struct CentreView {
  Centering kind = Centering::none;  ///< none, mean or rope
  std::span<const float> constant;   ///< [head_dim]
  std::span<const float> real;       ///< [pairs], empty without an embedding
  std::span<const float> imaginary;  ///< [pairs]
};

/// Keys and values of one attention layer for a batch of rows, compressed by TurboQuant
/// (arXiv:2504.19874) but for the first and the last tokens, and attention over them.
///
/// A token is appended exact. When it has left the residual window, 64 of them at a time are sealed
/// into an immutable tile: rotated codes and one FP16 norm a vector. Copies share tiles; copying
/// costs a few pointers a tile, and no copy sees another's later changes.
///
/// All or nothing: a member that throws leaves the cache as it was. Const members may run
/// concurrently on one cache; anything else needs a lock. `append`, `attend` and `seal` use OpenMP
/// threads, or the application's (`Resources`), where the work is worth it; results do not depend
/// on their number, on the level, or on the rounding, flushing and traps that the application has
/// chosen for its own arithmetic. A forked child of a process that had several threads works with
/// one, but for those of an application's executor.
class TQAI_API KvCache {
 public:
  /// Throws ValueError for options out of range, UnsupportedError for a level this machine lacks.
  explicit KvCache(const CacheOptions& options, int batch = 1);
  /// Shares what is sealed: a few pointers a tile.
  KvCache(const KvCache& other);
  /// Leaves `other` fit for nothing but to be assigned to or destroyed.
  KvCache(KvCache&& other) noexcept;
  /// As the copy; what this cache held is let go.
  KvCache& operator=(const KvCache& other);
  /// As the move; what this cache held is let go.
  KvCache& operator=(KvCache&& other) noexcept;
  ~KvCache();

  /// As given, with the defaults filled in.
  const CacheOptions& options() const noexcept;
  /// Rows.
  int batch() const noexcept;
  /// Tokens appended and not cropped, padding and discarded ones included; the same for each row.
  std::int64_t tokens() const noexcept;
  /// First token that some row still holds (see `discard_before`).
  std::int64_t first_token() const noexcept;
  /// Tokens of row `row` that are held as codes. Throws IndexError.
  std::int64_t packed_tokens(int row) const;
  /// What the keys of `row` and `head` that were sealed last are centred on; nothing before the
  /// first sealing. Throws IndexError.
  std::optional<Centering> centering(int row, int head) const;
  /// Sets of centres that the tiles of `row` refer to. Throws IndexError.
  int centre_sets(int row) const;

  /// Adds tokens at the end. keys: [batch, kv_heads, n, head_dim], values: [batch, kv_heads, n,
  /// value_head_dim], both of the cache's dtype. Tokens that had left the window before this call
  /// are sealed first. `positions` is what the keys have been turned by; without it, each token is
  /// one further than the one before in its row, and the first stands at its index. Positions bear
  /// on how well keys are compressed; what a query sees goes by the order of the tokens. Throws
  /// ValueError for a wrong shape or dtype, for NaN or infinity, and for positions beyond
  /// ± kMaxPosition.
  void append(const ConstTensor& keys, const ConstTensor& values,
              const std::optional<PositionTensor>& positions = {}, const Resources& resources = {});

  /// Largest position that `append` takes, and the negative of the smallest.
  static constexpr std::int64_t kMaxPosition = (std::int64_t{1} << 30) - 1;

  /// Largest norm of a key or value in a tile. It is less where FP16 could not hold the norm of any
  /// vector as long, after norm correction and for keys after centring: at 4 bits 11 000 for values
  /// of 512 coordinates, and half of that for keys. A longer one stays exact for ever, as do the
  /// tokens after it.
  ///
  /// Short ones: from 6e-5 down FP16 norms are coarse, and the codes make up for that, so that
  /// errors stay what the bits allow down to norms of about 6e-8. Below, codes lose precision as
  /// well, and from about 1e-8 down (8 bits: 1e-9) vectors become zeros.
  static constexpr float kMaxNorm = 16376.0F;

  /// Seals what has left the window; without it the next `append` does. O(tokens · head_dim · log).
  /// Returns how many tokens of a row, at most, have left it and stay exact because of a vector
  /// that is too long for a tile (kMaxNorm); 0 where there is none.
  std::int64_t seal(const Resources& resources = {});

  /// Softmax attention. queries: [batch, query_heads, n, head_dim], query_heads a multiple of
  /// kv_heads, query head h reads kv head h / (query_heads / kv_heads); the n queries are the last
  /// n tokens. output: [batch, n, query_heads, value_head_dim], must not overlap anything else. A
  /// query that sees no token gives zeros. Any dtypes.
  /// Tiles are read by integer arithmetic: against exact decoding of the same codes the relative
  /// error is about 1e-2 of the output's norm (docs/kernels.md). Throws ValueError.
  void attend(const ConstTensor& queries, const Tensor& output, const AttendOptions& options = {},
              const Resources& resources = {}) const;

  /// Decompresses tokens [first, first + n) into keys [batch, kv_heads, n, head_dim] and values
  /// [batch, kv_heads, n, value_head_dim], of any dtype; padding and discarded tokens become zeros.
  /// Exact tokens come out as they went in. The two must not overlap. Throws IndexError for tokens
  /// that do not exist.
  void gather(std::int64_t first, const Tensor& keys, const Tensor& values) const;

  /// Forgets all tokens from `tokens` on. Within what is kept exact nothing else changes, and
  /// nothing is copied but what a copy of the cache shares; below, the kept part stays as codes.
  /// Throws ValueError where tokens is negative or more than there are, or less than first_token()
  /// and not 0.
  void crop(std::int64_t tokens);

  /// Row i becomes a copy of row rows[i]; the batch becomes rows.size(). For beams, repeats and
  /// choices of rows. Throws IndexError, or ValueError for no rows.
  void select(std::span<const std::int64_t> rows);

  /// The first `counts[row]` tokens of each row are padding: they are dropped, never seen, and do
  /// not use up the sink tokens. counts: [batch], each in 0…tokens(). Only before anything is
  /// sealed or discarded, else ValueError; a later call may not lower a count.
  void set_padding(std::span<const std::int64_t> counts);

  /// Takes out of the rows those of the last n tokens that no query will ever see, such as padding
  /// between the turns of a conversation: they take neither window nor bytes, are never seen, and
  /// read as zeros. hidden: [batch, n], not 0 for these. Tokens keep their index, by which masks
  /// go. Throws ValueError for another size, and where one is sealed already.
  void leave_out(std::span<const std::uint8_t> hidden);

  /// What `leave_out` has taken out of row `row`, but for padding at its start. Throws IndexError.
  std::vector<TokenSpan> left_out(int row) const;

  /// Says that tokens before `token` will never be seen again (sliding windows): whole tiles and
  /// exact tokens before it are freed. Sinks too.
  void discard_before(std::int64_t token);

  /// Bytes by part, counted as they were allocated. O(batch · tiles).
  MemoryReport memory() const;

  /// Sets memory aside, in each row, for the tiles that `tokens` tokens in all will be sealed into,
  /// so that what runs out is known now and not in the midst of generation: sealing them takes no
  /// more memory for tiles. What is kept exact takes as much as before, whatever a cache's length.
  /// Pages are not touched before they are used. `memory()` counts it as overhead until then.
  /// Copies, `select` and `deserialize` set nothing aside; 0 gives it back. Throws ValueError for
  /// less than 0, std::bad_alloc and MemoryLimitError.
  void reserve(std::int64_t tokens);

  /// Where the parts of a tile lie; of all tiles of this cache, as long as it lives.
  const TileLayout& tile_layout() const noexcept;
  /// What is sealed of row `row`, in order. O(blocks). Throws IndexError.
  std::vector<SealedBlock> sealed_blocks(int row) const;
  /// What the keys of `head` in blocks of set `set`, 0 … centre_sets(row) − 1, are centred on.
  /// Throws IndexError.
  CentreView centre(int row, int set, int head) const;

  /// What keys (less their centre) and queries go through before codes and products, and what sums
  /// of values come back from; for runtimes that read tiles on another device. They live as long as
  /// the cache. Throws ValueError where keys are in a basis instead.
  const Rotation& key_rotation() const;
  /// As `key_rotation`, for values; never throws.
  const Rotation& value_rotation() const noexcept;

  /// The cache as bytes (docs/format.md), for other processes; about memory().total_bytes() of
  /// them. What rows share is written once. Throws UnsupportedError on a big-endian processor.
  ///
  /// A basis that keys are in is written as its id, or with its matrices.
  std::vector<std::byte> serialize(BasisAs basis = BasisAs::id) const;
  /// The same bytes, handed to `write` in order as they lie in the cache, without a copy of them.
  void serialize(const std::function<void(std::span<const std::byte>)>& write,
                 BasisAs basis = BasisAs::id) const;
  /// How many they are. Reads no tiles.
  std::size_t serialized_bytes(BasisAs basis = BasisAs::id) const;
  /// The cache that `serialize` wrote, at any level; nothing is kept of `bytes`. Throws ValueError
  /// for bytes that it cannot have written, UnsupportedError for a level this machine lacks. Codes
  /// are not checked, any are valid: guard files by a checksum.
  ///
  /// key_bases: of these a cache whose keys are in a basis takes the one of its id, and only where
  /// there is none what was written with it; ValueError where there is neither.
  static KvCache deserialize(std::span<const std::byte> bytes, std::optional<Level> level = {},
                             std::span<const std::shared_ptr<const KeyBasis>> key_bases = {});

  /// `append` for one batch row of an inference runtime, with Eigen's matrices, maps, blocks or
  /// expressions (needs <tqai/eigen.hpp>): keys [n, kv_heads · head_dim], values [n, kv_heads ·
  /// value_head_dim], fp32, as projections leave them. What is not row-major is copied first.
  template <detail::EigenMatrix Keys, detail::EigenMatrix Values>
  void append(const Keys& keys, const Values& values, const Resources& resources = {}) {
    detail::EigenRows<Keys>::append(*this, keys, values, resources);
  }
  /// `attend` for one batch row (needs <tqai/eigen.hpp>): queries [n, query_heads · head_dim];
  /// output [n, query_heads · value_head_dim], fp32, row-major.
  template <detail::EigenMatrix Queries, detail::EigenMatrix Output>
  void attend(const Queries& queries, Output&& output, const AttendOptions& options = {},
              const Resources& resources = {}) const {
    detail::EigenRows<Queries>::attend(*this, queries, output, options, resources);
  }

 private:
  friend class CacheFile;
  friend struct detail::CacheAccess;
  static KvCache read(detail::Reader& reader, std::optional<Level> level,
                      std::span<const std::shared_ptr<const KeyBasis>> key_bases);

  struct State;
  std::unique_ptr<State> state_;
};

}  // namespace tqai

#if defined(TQAI_HEADER_ONLY) || defined(TQAI_IMPLEMENTATION)
#define TQAI_CACHE_READ
#include <tqai/header_only.hpp>
#endif
