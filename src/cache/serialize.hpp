// A cache as bytes, for files and other processes: little-endian, no pointers, every length checked
// when they are read.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <string>
#include <tqai/cache.hpp>
#include <vector>

#include "row.hpp"

namespace tqai::detail {

/// What a cache holds beside its options.
struct Contents {
  std::int64_t tokens = 0;
  CountedVector<Row> rows;
};

/// Reads values off the front of bytes; throws ValueError where they end too early.
class Reader {
 public:
  explicit Reader(std::span<const std::byte> bytes) : rest_(bytes) {}

  template <typename T>
  T read() {
    T value;
    read_into(&value, 1);
    return value;
  }
  /// Into `count` elements at `to`.
  template <typename T>
  void read_into(T* to, std::size_t count) {
    need(count, sizeof(T));
    copy(to, count * sizeof(T));
  }
  /// Throws unless `count` items of `bytes` each are left.
  void need(std::size_t count, std::size_t bytes) const;
  bool at_end() const noexcept { return rest_.empty(); }

 private:
  void copy(void* to, std::size_t bytes) noexcept;

  std::span<const std::byte> rest_;
};

/// Options and contents. What rows share is written once.
std::vector<std::byte> write_cache(const Context& context, std::int64_t tokens,
                                   const CountedVector<Row>& rows);

/// What bytes of `write_cache`, or of an older tqai's, begin with; the options' level is left open.
struct Header {
  std::uint32_t version = 0;
  CacheOptions options;
};

/// Throws ValueError.
Header read_header(Reader& reader);

/// What follows it, for a context of those options. Throws ValueError for anything that write_cache
/// of that version does not write.
Contents read_contents(const Context& context, std::uint32_t version, Reader& reader);

}  // namespace tqai::detail
