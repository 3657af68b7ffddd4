// A cache as bytes, for files and other processes: little-endian, no pointers, every length checked
// when they are read.
#pragma once

#include <cstdint>
#include <memory>
#include <span>
#include <tqai/cache.hpp>

#include "bytes.hpp"
#include "row.hpp"

namespace tqai::detail {

/// What a cache holds beside its options.
struct Contents {
  std::int64_t tokens = 0;
  CountedVector<Row> rows;
};

/// Options and contents. What rows share is written once.
void write_cache(const Context& context, std::int64_t tokens, const CountedVector<Row>& rows,
                 BasisAs basis, const Sink& sink);

/// What bytes of `write_cache`, or of an older tqai's, begin with; the options' level is left open.
struct Header {
  std::uint32_t version = 0;
  CacheOptions options;
};

/// bases: those that keys may be in. Throws ValueError.
Header read_header(Reader& reader, std::span<const std::shared_ptr<const KeyBasis>> bases);

/// What follows it, for a context of those options. Throws ValueError for anything that write_cache
/// of that version does not write.
Contents read_contents(const Context& context, std::uint32_t version, Reader& reader);

}  // namespace tqai::detail
