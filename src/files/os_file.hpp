// What files need of the operating system: POSIX's or Windows'.
#pragma once

#include <cstddef>
#include <cstdint>
#include <filesystem>
#include <memory>
#include <span>

namespace tqai::detail {

/// A file open for reading. Const members may run concurrently.
class InputFile {
 public:
  /// Throws FileError where `path` is no file that can be read.
  explicit InputFile(const std::filesystem::path& path);
  InputFile(InputFile&& other) noexcept;
  InputFile& operator=(InputFile&& other) noexcept;
  ~InputFile();

  const std::filesystem::path& path() const noexcept { return path_; }
  std::uint64_t size() const noexcept { return size_; }
  /// Bytes [at, at + to.size()). Throws FileError, also where the file has become shorter.
  void read(std::uint64_t at, std::span<std::byte> to) const;
  /// The pages that bytes [at, at + bytes) lie in, mapped into memory for reading. Points to the
  /// first of these bytes; lives on without this. Throws FileError.
  std::shared_ptr<const std::byte> map(std::uint64_t at, std::size_t bytes) const;

 private:
  std::filesystem::path path_;
  std::intptr_t handle_;
  std::uint64_t size_ = 0;
};

/// A file that takes another's place when it is complete, or never existed.
class Replacement {
 public:
  /// Makes an empty file beside `path`: with the permissions of the file that is there, or those
  /// that the process gives new ones. Where `path` is a link, it is what that points to that is
  /// replaced. Throws FileError where `path` is no file, or the folder takes none.
  explicit Replacement(const std::filesystem::path& path);
  Replacement(const Replacement&) = delete;
  Replacement& operator=(const Replacement&) = delete;
  /// Removes the new file unless it has taken its place.
  ~Replacement();

  /// At the end. Throws FileError.
  void write(std::span<const std::byte> bytes);
  /// At `at`, where something was written before. Throws FileError.
  void rewrite(std::uint64_t at, std::span<const std::byte> bytes);
  /// Puts the file on the disk, and then in its place. Throws FileError.
  void commit();

 private:
  [[noreturn]] void fail() const;
  void close() noexcept;

  std::filesystem::path path_;     // as given
  std::filesystem::path target_;   // links followed
  std::filesystem::path partial_;  // empty where there is none any more
  std::intptr_t handle_ = -1;
};

}  // namespace tqai::detail
