#include "serialize.hpp"

#include <algorithm>
#include <map>
#include <tqai/key_basis.hpp>
#include <vector>

#include "cache_format.hpp"

namespace tqai::detail {
namespace TQAI_LOCAL {

// Objects that several rows may share, numbered in the order of their first use.
template <typename Object>
class Numbered {
 public:
  std::uint32_t add(const Object& object) {
    if (!object) return kNothing;
    const auto [entry, is_new] =
        numbers_.emplace(object.id(), static_cast<std::uint32_t>(objects_.size()));
    if (is_new) objects_.push_back(&object);
    return entry->second;
  }
  const std::vector<const Object*>& objects() const noexcept { return objects_; }

 private:
  std::map<const void*, std::uint32_t> numbers_;
  std::vector<const Object*> objects_;
};

TQAI_INLINE void write_options(const CacheOptions& options, std::uint32_t version, Writer& writer) {
  writer.write(kMagic);
  writer.write(version);
  for (const int number :
       {options.kv_heads, options.head_dim, options.value_head_dim, options.bits_k, options.bits_v,
        options.sink_tokens, options.residual_window}) {
    writer.write(static_cast<std::int32_t>(number));
  }
  writer.write(static_cast<std::uint8_t>(options.dtype));
  writer.write(static_cast<std::uint8_t>(options.rotation));
  writer.write(static_cast<std::uint8_t>(options.centering));
  writer.write(static_cast<std::uint8_t>(options.rope ? 1 : 0));
  writer.write(options.seed);
  if (options.rope) {
    writer.write(static_cast<std::int32_t>(options.rope->rotary_dim));
    writer.write(static_cast<std::uint8_t>(options.rope->layout));
    writer.write(static_cast<std::uint32_t>(options.rope->inv_freq.size()));
    writer.write_from(options.rope->inv_freq.data(), options.rope->inv_freq.size());
    writer.write(static_cast<std::uint32_t>(options.rope->sections.size()));
    writer.write_from(options.rope->sections.data(), options.rope->sections.size());
  }
}

TQAI_INLINE void write_basis(const KeyBasis& basis, BasisAs as, Writer& writer) {
  writer.write(basis.id());
  writer.write(static_cast<std::uint8_t>(as));
  if (as == BasisAs::id) return;
  const std::vector<std::byte> bytes = basis.serialize();
  writer.write(static_cast<std::uint64_t>(bytes.size()));
  writer.write_from(bytes.data(), bytes.size());
}

TQAI_INLINE void write_codebooks(const CacheOptions& options, Writer& writer) {
  for (const CodebookMark& mark : marks_of(options)) {
    writer.write(mark.levels);
    writer.write(mark.step);
  }
}

// The first one, then how many numbers there are, then each token's.
TQAI_INLINE void write_positions(const Positions& positions, Writer& writer) {
  writer.write(positions.first());
  writer.write(static_cast<std::uint64_t>(positions.each().size()));
  writer.write_from(positions.each().data(), positions.each().size());
}

TQAI_INLINE void write_gaps(const Row& row, Writer& writer) {
  writer.write(static_cast<std::uint32_t>(row.gaps.size()));
  for (const TokenSpan& gap : row.gaps) {
    writer.write(gap.first);
    writer.write(gap.count);
  }
}

TQAI_INLINE void write_block(const SealedTokens& block, Writer& writer) {
  const auto& [first_token, first_position, places, tiles, owner] = block.header();
  writer.write(first_token);
  writer.write(first_position);
  writer.write(places ? static_cast<std::uint32_t>(places.header().sections) : 0U);
  if (places) writer.write_from(places.payload(), places.payload_bytes());
}

TQAI_INLINE void write_exact(const Context& context, const ExactTokens& exact, Writer& writer) {
  const auto tokens = static_cast<std::size_t>(exact.header().tokens);
  writer.write(exact.header().tokens);
  for (int head = 0; head < context.options.kv_heads; ++head) {
    writer.write_from(exact_keys(context, exact, head), tokens * context.key_bytes());
  }
  for (int head = 0; head < context.options.kv_heads; ++head) {
    writer.write_from(exact_values(context, exact, head), tokens * context.value_bytes());
  }
}

}  // namespace TQAI_LOCAL

TQAI_INLINE void write_cache(const Context& context, std::int64_t tokens,
                             const CountedVector<Row>& rows, BasisAs basis, const Sink& sink) {
  check_byte_order();
  Numbered<ExactTokens> exact;
  // Memory without tokens, as an append that failed leaves it, is nothing.
  const auto add_exact = [&exact](const ExactTokens& part) {
    return part && part.header().tokens > 0 ? exact.add(part) : kNothing;
  };
  Numbered<SealedTokens> blocks;
  Numbered<Shared<CentreShape>> centres;
  for (const Row& row : rows) {
    add_exact(row.sinks);
    add_exact(row.tail);
    for (const Centres& set : row.centre_sets) centres.add(set.memory());
    for (const BlockView& view : row.sealed) blocks.add(view.block);
  }
  Writer writer(sink);
  const bool have_gaps =
      std::any_of(rows.begin(), rows.end(), [](const Row& row) { return !row.gaps.empty(); });
  const bool have_basis = context.options.key_basis != nullptr;
  const std::uint32_t version = context.options.key_codes == CodeKind::trellis     ? kWithKeyTrellis
                                : context.options.value_codes == CodeKind::trellis ? kWithTrellis
                                : have_basis                                       ? kWithBasis
                                : have_gaps                                        ? kWithGaps
                                                                                   : kTilesLast;
  write_options(context.options, version, writer);
  if (version >= kWithTrellis) {
    writer.write(static_cast<std::uint8_t>(context.options.value_codes));
    writer.write(static_cast<std::uint8_t>(have_basis ? 1 : 0));
  }
  if (version >= kWithKeyTrellis) {
    writer.write(static_cast<std::uint8_t>(context.options.key_codes));
  }
  if (have_basis) write_basis(*context.options.key_basis, basis, writer);
  write_codebooks(context.options, writer);
  writer.write(tokens);
  writer.write(static_cast<std::uint32_t>(exact.objects().size()));
  for (const ExactTokens* part : exact.objects()) write_exact(context, *part, writer);
  writer.write(static_cast<std::uint32_t>(blocks.objects().size()));
  for (const SealedTokens* block : blocks.objects()) write_block(*block, writer);
  writer.write(static_cast<std::uint32_t>(centres.objects().size()));
  for (const Shared<CentreShape>* centre : centres.objects()) {
    writer.write_from(centre->payload(), centre->payload_bytes());
  }
  writer.write(static_cast<std::uint32_t>(rows.size()));
  for (const Row& row : rows) {
    writer.write(row.first);
    if (version >= kWithGaps) write_gaps(row, writer);
    writer.write(add_exact(row.sinks));
    writer.write(add_exact(row.tail));
    writer.write(row.next_position);
    write_positions(row.sink_positions, writer);
    write_positions(row.tail_positions, writer);
    writer.write(static_cast<std::uint32_t>(row.centre_sets.size()));
    for (const Centres& set : row.centre_sets) writer.write(centres.add(set.memory()));
    writer.write(static_cast<std::uint32_t>(row.sealed.size()));
    for (const BlockView& view : row.sealed) {
      writer.write(blocks.add(view.block));
      writer.write(view.tokens);
      writer.write(view.set);
    }
  }
  writer.align(kLineBytes);
  for (const SealedTokens* block : blocks.objects()) {
    writer.write_from(block->header().tiles, context.block_bytes());
  }
}

}  // namespace tqai::detail
