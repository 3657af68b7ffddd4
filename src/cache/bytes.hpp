// Values to and from bytes, wherever these go to and come from.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <memory>
#include <span>

namespace tqai::detail {

/// Takes the bytes of a cache, in order; called with a few at a time.
using Sink = std::function<void(std::span<const std::byte>)>;

/// Fills the span with the next bytes.
using Source = std::function<void(std::span<std::byte>)>;

/// Writes values as they lie in memory.
class Writer {
 public:
  explicit Writer(const Sink& sink) : sink_(sink) {}

  template <typename T>
  void write(T value) {
    write_from(&value, 1);
  }
  template <typename T>
  void write_from(const T* from, std::size_t count) {
    if (count == 0) return;
    sink_(std::as_bytes(std::span(from, count)));
    written_ += count * sizeof(T);
  }
  /// Zeros, up to a multiple of `unit` bytes from the first one.
  void align(std::size_t unit);

 private:
  const Sink& sink_;
  std::size_t written_ = 0;
};

/// Reads values off the front of bytes; throws ValueError where they end too early.
class Reader {
 public:
  explicit Reader(std::span<const std::byte> bytes) : here_(bytes.data()), size_(bytes.size()) {}
  /// Bytes that live as long as `owner`, and never change.
  Reader(std::span<const std::byte> bytes, std::shared_ptr<const void> owner)
      : here_(bytes.data()), size_(bytes.size()), owner_(std::move(owner)) {}
  /// Of `size` bytes in all.
  Reader(Source source, std::size_t size) : source_(std::move(source)), size_(size) {}

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
    copy(std::as_writable_bytes(std::span(to, count)));
  }
  /// Throws unless `count` items of `bytes` each are left.
  void need(std::size_t count, std::size_t bytes) const;
  /// Skips zeros up to a multiple of `unit` bytes from the first one; throws for anything else.
  void align(std::size_t unit);
  bool at_end() const noexcept { return read_ == size_; }

  /// Whether what lies at a multiple of `unit` bytes from the first one can stay where it is.
  bool keeps(std::size_t unit) const noexcept;
  /// The next bytes, which live as long as owner(). Only where it keeps.
  const std::byte* keep(std::size_t bytes);
  const std::shared_ptr<const void>& owner() const noexcept { return owner_; }

 private:
  void copy(std::span<std::byte> to);

  const std::byte* here_ = nullptr;  // of the first byte; null where there is a source
  Source source_;
  std::size_t size_ = 0;
  std::size_t read_ = 0;
  std::shared_ptr<const void> owner_;
};

}  // namespace tqai::detail
