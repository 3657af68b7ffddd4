#include <cmath>
#include <cstdio>
#include <cstring>
#include <limits>
#include <string>
#include <tqai/key_basis.hpp>
#include <vector>

#include "cache_format.hpp"
#include "check.hpp"
#include "serialize.hpp"

namespace tqai::detail {
namespace TQAI_LOCAL {

[[noreturn]] TQAI_INLINE void refuse(const std::string& what) {
  throw ValueError("not the bytes of a cache, or damaged: " + what);
}

TQAI_INLINE void require(bool holds, const char* what) {
  if (!holds) refuse(what);
}

TQAI_INLINE void require_range(const char* what, std::int64_t value, std::int64_t low,
                               std::int64_t high) {
  if (value >= low && value <= high) return;
  refuse(std::string(what) + " = " + std::to_string(value) + "; allowed: " + std::to_string(low) +
         "…" + std::to_string(high));
}

// Of a part or a set: its place in a list of `size`.
TQAI_INLINE void require_index(const char* what, std::int64_t index, std::size_t size) {
  if (index >= 0 && static_cast<std::size_t>(index) < size) return;
  refuse(std::string(what) + " = " + std::to_string(index) + " where there are " +
         std::to_string(size));
}

TQAI_INLINE void check_codebooks(const CacheOptions& options, Reader& reader) {
  // Levels are whole numbers; steps come from sums that other processors may round otherwise.
  constexpr float kTolerance = 1e-5F;
  for (const CodebookMark& ours : marks_of(options)) {
    const auto levels = reader.read<std::uint32_t>();
    const auto step = reader.read<float>();
    if (levels != ours.levels || !(std::abs(step - ours.step) <= kTolerance * ours.step)) {
      throw ValueError(
          "the cache was written with another codebook than this tqai has for its dimensions and "
          "bits: use the tqai that wrote it, or make the cache again");
    }
  }
}

template <typename T>
T enumerator(Reader& reader, T last, const char* what) {
  const auto value = reader.read<std::uint8_t>();
  require_range(what, value, 0, static_cast<std::int64_t>(last));
  return static_cast<T>(value);
}

TQAI_INLINE std::shared_ptr<const KeyBasis> read_basis(
    std::span<const std::shared_ptr<const KeyBasis>> bases, Reader& reader) {
  const auto id = reader.read<std::uint64_t>();
  const auto as = enumerator(reader, BasisAs::matrices, "what is written of a basis");
  std::shared_ptr<const KeyBasis> basis;
  if (as == BasisAs::matrices) {
    const auto size = reader.read<std::uint64_t>();
    reader.need(size, 1);
    std::vector<std::byte> bytes(size);
    reader.read_into(bytes.data(), size);
    basis = std::make_shared<const KeyBasis>(KeyBasis::deserialize(bytes));
    require(basis->id() == id, "another basis than its keys are in");
  }
  for (const auto& each : bases) {
    if (each && each->id() == id) return each;
  }
  if (basis) return basis;
  char text[17];
  std::snprintf(text, sizeof text, "%016llx", static_cast<unsigned long long>(id));
  throw ValueError("the cache's keys are in the key basis " + std::string(text) +
                   ", which is none of the " + std::to_string(bases.size()) +
                   " given: hand over the one that it was made with, or have caches written "
                   "with their bases");
}

TQAI_INLINE void check_exact(const Context& context, const ExactTokens& exact) {
  const CacheOptions& options = context.options;
  const std::int64_t tokens = exact.header().tokens;
  const auto check = [&](const char* name, const std::byte* data, int dim) {
    check_vectors(
        *context.kernels, name,
        {data, options.dtype, {1, options.kv_heads, tokens, dim}, {0, tokens * dim, dim, 1}}, {});
  };
  check("keys", exact_keys(context, exact, 0), options.head_dim);
  check("values", exact_values(context, exact, 0), options.value_head_dim);
}

TQAI_INLINE std::vector<ExactTokens> read_exact(const Context& context, Reader& reader) {
  const auto count = reader.read<std::uint32_t>();
  reader.need(count, sizeof(std::int64_t));
  std::vector<ExactTokens> parts;
  for (std::uint32_t i = 0; i < count; ++i) {
    const auto tokens = reader.read<std::int64_t>();
    require_range("a number of exact tokens", tokens, 0, kMostTokens);
    reader.need(static_cast<std::size_t>(tokens), context.token_bytes());
    const std::size_t bytes = static_cast<std::size_t>(tokens) * context.token_bytes();
    ExactTokens exact(ExactShape{tokens, tokens}, bytes);
    reader.read_into(exact.payload(), bytes);
    check_exact(context, exact);
    parts.push_back(std::move(exact));
  }
  return parts;
}

TQAI_INLINE void require_position(std::int64_t position) {
  require_range("a token's position", position, -KvCache::kMaxPosition, KvCache::kMaxPosition);
}

// Of `count` tokens that stand one after another. The tables of an embedding end where positions
// do.
TQAI_INLINE Positions consecutive(std::int64_t first, std::int64_t count) {
  require_position(first);
  if (count > 0) require_position(first + count - 1);
  return Positions::consecutive(first, count);
}

// Of `count` tokens.
TQAI_INLINE Positions read_positions(const Context& context, std::int64_t count, Reader& reader) {
  const auto first = reader.read<std::int64_t>();
  const auto numbers = reader.read<std::uint64_t>();
  if (numbers == 0) return consecutive(first, count);
  require_position(first);
  const auto sections = static_cast<std::uint64_t>(context.sections());
  const std::uint64_t needed =
      context.uses_positions() ? static_cast<std::uint64_t>(count) * sections : 0;
  if (numbers != needed) {
    refuse("a number of positions = " + std::to_string(numbers) + "; allowed: 0 or " +
           std::to_string(needed));
  }
  reader.need(numbers, sizeof(std::int32_t));
  CountedVector<std::int32_t> each(numbers);
  reader.read_into(each.data(), numbers);
  for (const std::int32_t position : each) require_position(position);
  return Positions::each(std::move(each), static_cast<int>(sections));
}

TQAI_INLINE Places read_places(const Context& context, Reader& reader) {
  const auto sections = reader.read<std::uint32_t>();
  if (sections == 0) return {};
  const int most = context.uses_positions() ? context.sections() : 0;
  if (most == 0 || (sections != 1 && sections != static_cast<std::uint32_t>(most))) {
    refuse("a tile's number of sections = " + std::to_string(sections) +
           "; allowed: 0, 1 or those of its embedding, " + std::to_string(most));
  }
  const std::size_t count = std::size_t{sections} * kTileTokens;
  reader.need(count, sizeof(std::int32_t));
  Places places(PlacesShape{static_cast<int>(sections)}, count * sizeof(std::int32_t));
  auto* each = reinterpret_cast<std::int32_t*>(places.payload());
  reader.read_into(each, count);
  for (std::size_t i = 0; i < count; ++i) require_position(each[i]);
  return places;
}

TQAI_INLINE SealedShape read_shape(const Context& context, std::uint32_t version, Reader& reader) {
  SealedShape shape;
  shape.first_token = reader.read<std::int64_t>();
  shape.first_position = shape.first_token;
  if (version != kFirstVersion) {
    shape.first_position = reader.read<std::int64_t>();
    shape.places = read_places(context, reader);
  }
  require_position(shape.first_position);
  if (context.rope) cover(*context.rope, tile_positions(shape.first_position, shape.places));
  return shape;
}

TQAI_INLINE void check_norms(const Context& context, const SealedTokens& block) {
  const TileLayout& layout = context.codec->layout();
  for (int head = 0; head < context.options.kv_heads; ++head) {
    std::uint16_t norms[2 * kTileTokens];  // of keys, then of values
    std::memcpy(
        norms,
        block.header().tiles + static_cast<std::size_t>(head) * layout.bytes() + layout.key_norms(),
        sizeof(norms));
    // Below infinity: what sealing may make of vectors of up to kMaxNorm.
    for (const std::uint16_t norm : norms) require_range("a norm's FP16 bits", norm, 0, 0x7BFF);
  }
}

// Blocks whose tiles, from kTilesLast on, are still to be read.
TQAI_INLINE std::vector<SealedTokens> read_blocks(const Context& context, std::uint32_t version,
                                                  Reader& reader) {
  const auto count = reader.read<std::uint32_t>();
  reader.need(count, sizeof(std::int64_t) + context.block_bytes());
  const bool kept = version >= kTilesLast && reader.keeps(kLineBytes);
  std::vector<SealedTokens> blocks;
  for (std::uint32_t i = 0; i < count; ++i) {
    SealedShape shape = read_shape(context, version, reader);
    if (kept) {
      shape.owner = reader.owner();
      blocks.emplace_back(std::move(shape), 0);
      continue;
    }
    reader.need(1, context.block_bytes());
    blocks.push_back(make_block(std::move(shape), context.block_bytes(),
                                blocks.empty() ? nullptr : &blocks.back()));
    if (version < kTilesLast) {
      reader.read_into(blocks.back().payload(), context.block_bytes());
      check_norms(context, blocks.back());
    }
  }
  return blocks;
}

TQAI_INLINE void read_payloads(const Context& context, std::vector<SealedTokens>& blocks,
                               Reader& reader) {
  reader.align(kLineBytes);
  for (SealedTokens& block : blocks) {
    if (block.header().owner) {
      block.header().tiles = reader.keep(context.block_bytes());
    } else {
      reader.read_into(block.payload(), context.block_bytes());
    }
    check_norms(context, block);
  }
}

// A centre is a mean of keys that were sealed, turned or not: it is no longer than they were, and
// what it leaves of others fits FP16.
TQAI_INLINE void check_centre(const Context& context, const Centres& centres, int head, int pairs) {
  const Centering kind = centres.kind(head);
  const Centering wanted = context.options.centering;
  const bool fits =
      kind == Centering::none ||
      (kind == Centering::mean && (wanted == Centering::automatic || wanted == Centering::mean)) ||
      (kind == Centering::rope && context.uses_positions());
  if (!fits) {
    refuse("a head's centring = " + std::to_string(static_cast<int>(kind)) +
           " in a cache whose centring = " + std::to_string(static_cast<int>(wanted)) +
           (context.rope ? "" : ", without a rotary embedding"));
  }
  double squares = 0.0;
  const auto add = [&squares](const float* values, int count) {
    for (int i = 0; i < count; ++i) {
      squares += static_cast<double>(values[i]) * static_cast<double>(values[i]);
    }
  };
  add(centres.constant(head), context.options.head_dim);
  add(centres.means(head), 2 * pairs);
  constexpr double kRounding = 1.001;
  const double length = std::sqrt(squares);
  if (!(length <= kRounding * static_cast<double>(KvCache::kMaxNorm))) {
    refuse("a centre of length " + number_text(static_cast<float>(length)) + "; allowed: up to " +
           number_text(KvCache::kMaxNorm));
  }
  // Infinite where the keys were long.
  require(centres.left(head) >= 0.0F, "an energy that is negative or NaN");
}

TQAI_INLINE std::vector<Centres> read_centres(const Context& context, std::uint32_t version,
                                              Reader& reader) {
  const int pairs = context.rope ? context.rope->pair_count() : 0;
  const auto heads = static_cast<std::size_t>(context.options.kv_heads);
  const auto constants = static_cast<std::size_t>(context.options.head_dim);
  const std::size_t means = 2 * static_cast<std::size_t>(pairs);
  const std::size_t left = version != kFirstVersion ? 1 : 0;
  const std::size_t bytes =
      heads * ((constants + means + left) * sizeof(float) + sizeof(Centering));
  const auto count = reader.read<std::uint32_t>();
  reader.need(count, bytes);
  std::vector<Centres> all;
  for (std::uint32_t i = 0; i < count; ++i) {
    Centres centres(CentreShape{context.options.kv_heads, context.options.head_dim, pairs});
    // The payload is the only owner's, just made.
    reader.read_into(centres.constant(0), heads * constants);
    reader.read_into(centres.means(0), heads * means);
    reader.read_into(&centres.left(0), heads * left);
    reader.read_into(&centres.kind(0), heads);
    for (int head = 0; head < context.options.kv_heads; ++head) {
      check_centre(context, centres, head, pairs);
    }
    all.push_back(std::move(centres));
  }
  return all;
}

template <typename T>
T part_of(const std::vector<T>& parts, Reader& reader) {
  const auto index = reader.read<std::uint32_t>();
  if (index == kNothing) return {};
  require_index("a part's index", index, parts.size());
  return parts[index];
}

// What rows refer to.
struct Parts {
  std::vector<ExactTokens> exact;
  std::vector<SealedTokens> blocks;
  std::vector<Centres> centres;
};

TQAI_INLINE void read_centre_sets(const Parts& parts, std::uint32_t version, Row& row,
                                  Reader& reader) {
  std::uint32_t count = 1;
  if (version != kFirstVersion) {
    count = reader.read<std::uint32_t>();
    require_range("a row's number of centre sets", count, 0, std::int64_t{kMostCentreSets});
  }
  for (std::uint32_t i = 0; i < count; ++i) {
    Centres centres = part_of(parts.centres, reader);
    if (!centres && version == kFirstVersion) return;
    require(static_cast<bool>(centres), "a centre set that is nothing");
    row.centre_sets.push_back(std::move(centres));
  }
}

// Bytes of a row's numbers at least, and of one of its tiles.
constexpr std::size_t row_bytes(std::uint32_t version) {
  return version == kFirstVersion ? 24 : 64;
}
constexpr std::size_t view_bytes(std::uint32_t version) {
  return version == kFirstVersion ? 8 : 12;
}

TQAI_INLINE void read_tiles(const Parts& parts, std::uint32_t version, Row& row, Reader& reader) {
  const auto count = reader.read<std::uint32_t>();
  reader.need(count, view_bytes(version));
  require(count == 0 || !row.centre_sets.empty(), "tiles of a row without centres");
  row.sealed.reserve(count);
  for (std::uint32_t i = 0; i < count; ++i) {
    BlockView view;
    view.block = part_of(parts.blocks, reader);
    view.tokens = reader.read<std::int32_t>();
    if (version != kFirstVersion) view.set = reader.read<std::int32_t>();
    require(static_cast<bool>(view.block), "a tile that is nothing");
    require_range("a tile's tokens", view.tokens, 1, kTileTokens);
    require_index("a tile's centre set", view.set, row.centre_sets.size());
    const std::int64_t first = row.first + row.sink_tokens() + row.sealed_tokens;
    require_range("a tile's first token", view.block.header().first_token, first, first);
    row.sealed_tokens += view.tokens;
    row.sealed.push_back(std::move(view));
  }
}

TQAI_INLINE void read_gaps(Row& row, Reader& reader) {
  const auto count = reader.read<std::uint32_t>();
  reader.need(count, sizeof(TokenSpan));
  row.gaps.reserve(count);
  std::int64_t least = 0;
  for (std::uint32_t i = 0; i < count; ++i) {
    TokenSpan gap;
    gap.first = reader.read<std::int64_t>();
    gap.count = reader.read<std::int64_t>();
    require_range("the first of the tokens that a row left out", gap.first, least, kMostTokens);
    require_range("how many tokens a row left out", gap.count, 1, kMostTokens);
    least = gap.first + gap.count + 1;
    row.gaps.push_back(gap);
  }
}

TQAI_INLINE Row read_row(const Context& context, const Parts& parts, std::uint32_t version,
                         Reader& reader) {
  Row row;
  row.first = reader.read<std::int64_t>();
  require_range("a row's first token", row.first, 0, kMostTokens);
  if (version >= kWithGaps) read_gaps(row, reader);
  row.sinks = part_of(parts.exact, reader);
  row.tail = part_of(parts.exact, reader);
  const std::int64_t sinks = row.sink_tokens();
  require_range("a row's sink tokens", sinks, 0, context.options.sink_tokens);
  if (version == kFirstVersion) {
    row.sink_positions = consecutive(row.first, sinks);
  } else {
    row.next_position = reader.read<std::int64_t>();
    require_range("the position after a row's tokens", row.next_position, 1 - KvCache::kMaxPosition,
                  KvCache::kMaxPosition + 1);
    row.sink_positions = read_positions(context, sinks, reader);
    row.tail_positions = read_positions(context, row.tail_tokens(), reader);
  }
  read_centre_sets(parts, version, row, reader);
  require(!row.sinks || !row.centre_sets.empty(),
          "sink tokens of a row without centres, which is one where nothing was sealed yet");
  read_tiles(parts, version, row, reader);
  if (version == kFirstVersion) {
    const std::int64_t tail = row.first + sinks + row.sealed_tokens;
    row.tail_positions = consecutive(tail, row.tail_tokens());
    row.next_position = tail + row.tail_tokens();
    require_position(row.next_position);
  }
  // Where no positions are kept, the next token follows.
  if (!context.uses_positions() && row.held() > 0) row.next_position = position_after(row);
  return row;
}

}  // namespace TQAI_LOCAL

TQAI_INLINE Header read_header(Reader& reader,
                               std::span<const std::shared_ptr<const KeyBasis>> bases) {
  check_byte_order();
  require(reader.read<std::uint32_t>() == kMagic, "it does not begin as one");
  Header header;
  header.version = reader.read<std::uint32_t>();
  if (header.version < kFirstVersion || header.version > kVersion) {
    throw ValueError("the cache is of format version " + std::to_string(header.version) +
                     "; this tqai reads versions " + std::to_string(kFirstVersion) + "…" +
                     std::to_string(kVersion) + ": use the tqai that wrote it, or a newer one");
  }
  CacheOptions& options = header.options;
  for (int* number :
       {&options.kv_heads, &options.head_dim, &options.value_head_dim, &options.bits_k,
        &options.bits_v, &options.sink_tokens, &options.residual_window}) {
    *number = reader.read<std::int32_t>();
  }
  options.dtype = enumerator(reader, DType::bf16, "a dtype");
  options.rotation = enumerator(reader, RotationKind::haar, "a rotation");
  options.centering = enumerator(reader, Centering::rope, "a centring");
  const auto has_rope = reader.read<std::uint8_t>();
  require_range("a flag", has_rope, 0, 1);
  options.seed = reader.read<std::uint64_t>();
  if (has_rope != 0) {
    Rope rope;
    rope.rotary_dim = reader.read<std::int32_t>();
    rope.layout = enumerator(reader, Rope::Layout::interleaved, "a rotary layout");
    const auto count = reader.read<std::uint32_t>();
    reader.need(count, sizeof(float));
    rope.inv_freq.resize(count);
    reader.read_into(rope.inv_freq.data(), count);
    if (header.version != kFirstVersion) {
      const auto sections = reader.read<std::uint32_t>();
      reader.need(sections, sizeof(std::uint8_t));
      rope.sections.resize(sections);
      reader.read_into(rope.sections.data(), sections);
    }
    options.rope = std::move(rope);
  }
  bool has_basis = header.version == kWithBasis;
  if (header.version >= kWithTrellis) {
    options.value_codes = enumerator(reader, CodeKind::trellis, "a kind of codes");
    const auto flag = reader.read<std::uint8_t>();
    require_range("a flag", flag, 0, 1);
    has_basis = flag != 0;
  }
  if (header.version >= kWithKeyTrellis) {
    options.key_codes = enumerator(reader, CodeKind::trellis, "a kind of codes");
  }
  if (has_basis) options.key_basis = read_basis(bases, reader);
  return header;
}

TQAI_INLINE Contents read_contents(const Context& context, std::uint32_t version, Reader& reader) {
  if (version >= kTilesLast) check_codebooks(context.options, reader);
  Contents contents;
  contents.tokens = reader.read<std::int64_t>();
  require_range("a number of tokens", contents.tokens, 0, kMostTokens);
  Parts parts;
  parts.exact = read_exact(context, reader);
  parts.blocks = read_blocks(context, version, reader);
  parts.centres = read_centres(context, version, reader);
  const auto batch = reader.read<std::uint32_t>();
  require_range("a number of rows", batch, 1, std::numeric_limits<int>::max());
  reader.need(batch, row_bytes(version));
  contents.rows.reserve(batch);
  for (std::uint32_t i = 0; i < batch; ++i) {
    contents.rows.push_back(read_row(context, parts, version, reader));
    const Row& row = contents.rows.back();
    std::int64_t left_out = 0;
    for (const TokenSpan& gap : row.gaps) left_out += gap.count;
    require_range("a row's number of tokens", row.first + row.held() + left_out, contents.tokens,
                  contents.tokens);
    const std::int64_t end = row.gaps.empty() ? 0 : row.gaps.back().first + row.gaps.back().count;
    require_range("the end of what a row left out", end, 0, contents.tokens);
  }
  if (version >= kTilesLast) read_payloads(context, parts.blocks, reader);
  require(reader.at_end(), "more bytes follow");
  return contents;
}

}  // namespace tqai::detail
