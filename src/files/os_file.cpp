#include "os_file.hpp"

#include <cerrno>
#include <random>
#include <string>
#include <system_error>
#include <tqai/error.hpp>
#include <utility>

#ifdef _WIN32
#define NOMINMAX
#define WIN32_LEAN_AND_MEAN
#include <windows.h>
#else
#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>
#endif

namespace tqai::detail {
namespace TQAI_LOCAL {

constexpr std::intptr_t kClosed = -1;
// Of one call to the system, some of which take no more than 31 bits.
constexpr std::size_t kMostAtOnce = std::size_t{1} << 30;

TQAI_INLINE std::error_code last_error() {
#ifdef _WIN32
  return {static_cast<int>(GetLastError()), std::system_category()};
#else
  return {errno, std::generic_category()};
#endif
}

[[noreturn]] TQAI_INLINE void cannot(const char* be_done, const std::filesystem::path& path,
                                     std::error_code reason = last_error()) {
  throw FileError(path.string() + " could not be " + be_done, reason);
}

// A name that no other process thinks of. Names may have no more than 255 bytes, so it does not
// contain the file's own.
TQAI_INLINE std::string partial_name() {
  constexpr char kDigits[] = "0123456789abcdef";
  std::random_device random;
  std::string name = ".";
  for (int i = 0; i < 16; ++i) name += kDigits[random() % 16];
  return name + ".partial";
}

// What `path` stands for: links are followed, also to what does not exist yet.
TQAI_INLINE std::filesystem::path resolved(const std::filesystem::path& path) {
  constexpr int kMostLinks = 40;
  std::filesystem::path target = path;
  for (int links = 0;; ++links) {
    std::error_code error;
    if (!std::filesystem::is_symlink(std::filesystem::symlink_status(target, error))) return target;
    if (links == kMostLinks) {
      cannot("written", path, make_error_code(std::errc::too_many_symbolic_link_levels));
    }
    const std::filesystem::path to = std::filesystem::read_symlink(target, error);
    if (error) cannot("written", path, error);
    target = target.parent_path() / to;  // `to` alone where it is absolute
  }
}

#ifdef _WIN32
TQAI_INLINE HANDLE handle_of(std::intptr_t handle) { return reinterpret_cast<HANDLE>(handle); }

TQAI_INLINE OVERLAPPED at_offset(std::uint64_t at) {
  OVERLAPPED place{};
  place.Offset = static_cast<DWORD>(at);
  place.OffsetHigh = static_cast<DWORD>(at >> 32);
  return place;
}
#endif

}  // namespace TQAI_LOCAL

TQAI_INLINE InputFile::InputFile(const std::filesystem::path& path)
    : path_(path), handle_(kClosed) {
#ifdef _WIN32
  const HANDLE file = CreateFileW(path.c_str(), GENERIC_READ,
                                  FILE_SHARE_READ | FILE_SHARE_WRITE | FILE_SHARE_DELETE, nullptr,
                                  OPEN_EXISTING, FILE_ATTRIBUTE_NORMAL, nullptr);
  if (file == INVALID_HANDLE_VALUE) cannot("read", path_);
  handle_ = reinterpret_cast<std::intptr_t>(file);
  LARGE_INTEGER size;
  if (!GetFileSizeEx(file, &size)) {
    const std::error_code reason = last_error();
    CloseHandle(file);
    cannot("read", path_, reason);
  }
  size_ = static_cast<std::uint64_t>(size.QuadPart);
#else
  // Without waiting for somebody to write, where it is a pipe.
  const int file = ::open(path.c_str(), O_RDONLY | O_CLOEXEC | O_NONBLOCK);
  if (file < 0) cannot("read", path_);
  struct stat status{};
  const char* be_done = "read";
  std::error_code reason;
  if (::fstat(file, &status) != 0) {
    reason = last_error();
  } else if (S_ISDIR(status.st_mode)) {
    reason = make_error_code(std::errc::is_a_directory);
  } else if (!S_ISREG(status.st_mode)) {
    be_done = "read, as it is a pipe, a socket or a device";
    reason = make_error_code(std::errc::invalid_seek);
  }
  if (reason) {
    ::close(file);
    cannot(be_done, path_, reason);
  }
  handle_ = file;
  size_ = static_cast<std::uint64_t>(status.st_size);
#endif
}

TQAI_INLINE InputFile::InputFile(InputFile&& other) noexcept
    : path_(std::move(other.path_)),
      handle_(std::exchange(other.handle_, kClosed)),
      size_(other.size_) {}

TQAI_INLINE InputFile& InputFile::operator=(InputFile&& other) noexcept {
  std::swap(path_, other.path_);
  std::swap(handle_, other.handle_);
  std::swap(size_, other.size_);
  return *this;
}

TQAI_INLINE InputFile::~InputFile() {
  if (handle_ == kClosed) return;
#ifdef _WIN32
  CloseHandle(handle_of(handle_));
#else
  ::close(static_cast<int>(handle_));
#endif
}

TQAI_INLINE void InputFile::read(std::uint64_t at, std::span<std::byte> to) const {
  while (!to.empty()) {
    const std::size_t wanted = std::min(to.size(), kMostAtOnce);
#ifdef _WIN32
    OVERLAPPED place = at_offset(at);
    DWORD got = 0;
    if (!ReadFile(handle_of(handle_), to.data(), static_cast<DWORD>(wanted), &got, &place) &&
        GetLastError() != ERROR_HANDLE_EOF) {
      cannot("read", path_);
    }
#else
    const ssize_t got =
        ::pread(static_cast<int>(handle_), to.data(), wanted, static_cast<off_t>(at));
    if (got < 0 && errno == EINTR) continue;
    if (got < 0) cannot("read", path_);
#endif
    if (got == 0) {  // cut off since it was opened
      cannot("read", path_, make_error_code(std::errc::io_error));
    }
    at += static_cast<std::uint64_t>(got);
    to = to.subspan(static_cast<std::size_t>(got));
  }
}

TQAI_INLINE std::shared_ptr<const std::byte> InputFile::map(std::uint64_t at,
                                                            std::size_t bytes) const {
#ifdef _WIN32
  SYSTEM_INFO system;
  GetSystemInfo(&system);
  const std::uint64_t page = system.dwAllocationGranularity;
#else
  const auto page = static_cast<std::uint64_t>(::sysconf(_SC_PAGESIZE));
#endif
  const std::uint64_t first = at / page * page;
  const auto before = static_cast<std::size_t>(at - first);
  const std::size_t length = before + bytes;
#ifdef _WIN32
  const HANDLE mapping =
      CreateFileMappingW(handle_of(handle_), nullptr, PAGE_READONLY, 0, 0, nullptr);
  if (mapping == nullptr) cannot("mapped", path_);
  const OVERLAPPED place = at_offset(first);
  void* memory = MapViewOfFile(mapping, FILE_MAP_READ, place.OffsetHigh, place.Offset, length);
  const std::error_code reason = last_error();
  CloseHandle(mapping);  // the view keeps it
  if (memory == nullptr) cannot("mapped", path_, reason);
  const auto unmap = [](void* pages) { UnmapViewOfFile(pages); };
#else
  void* memory = ::mmap(nullptr, length, PROT_READ, MAP_PRIVATE, static_cast<int>(handle_),
                        static_cast<off_t>(first));
  if (memory == MAP_FAILED) cannot("mapped", path_);
  const auto unmap = [length](void* pages) { ::munmap(pages, length); };
#endif
  const std::shared_ptr<void> pages(memory, unmap);
  return {pages, static_cast<const std::byte*>(memory) + before};
}

TQAI_INLINE Replacement::Replacement(const std::filesystem::path& path)
    : path_(path), target_(resolved(path)), partial_(target_.parent_path() / partial_name()) {
  // Once the file is open nothing may throw without closing and removing it.
#ifdef _WIN32
  const DWORD held = GetFileAttributesW(target_.c_str());
  if (held != INVALID_FILE_ATTRIBUTES && (held & FILE_ATTRIBUTE_DIRECTORY) != 0) {
    cannot("written", path_, make_error_code(std::errc::is_a_directory));
  }
  const HANDLE file = CreateFileW(partial_.c_str(), GENERIC_WRITE, 0, nullptr, CREATE_NEW,
                                  FILE_ATTRIBUTE_NORMAL, nullptr);
  if (file == INVALID_HANDLE_VALUE) fail();
  handle_ = reinterpret_cast<std::intptr_t>(file);
#else
  const int file = ::open(partial_.c_str(), O_CREAT | O_EXCL | O_WRONLY | O_CLOEXEC, 0666);
  if (file < 0) fail();
  handle_ = file;
  struct stat held{};
  const char* be_done = "written";
  std::error_code reason;
  if (::stat(target_.c_str(), &held) != 0) {
    if (errno != ENOENT) reason = last_error();
  } else if (S_ISDIR(held.st_mode)) {
    reason = make_error_code(std::errc::is_a_directory);
  } else if (!S_ISREG(held.st_mode)) {
    be_done = "written, as it is a pipe, a socket or a device";
    reason = make_error_code(std::errc::file_exists);
  } else if (::fchmod(file, held.st_mode & 07777) != 0) {
    reason = last_error();
  }
  if (reason) {
    close();
    ::unlink(partial_.c_str());
    cannot(be_done, path_, reason);
  }
#endif
}

TQAI_INLINE Replacement::~Replacement() {
  close();
  if (partial_.empty()) return;
  std::error_code ignored;
  std::filesystem::remove(partial_, ignored);
}

TQAI_INLINE void Replacement::fail() const { cannot("written", path_); }

TQAI_INLINE void Replacement::close() noexcept {
  if (handle_ == kClosed) return;
#ifdef _WIN32
  CloseHandle(handle_of(handle_));
#else
  ::close(static_cast<int>(handle_));
#endif
  handle_ = kClosed;
}

TQAI_INLINE void Replacement::write(std::span<const std::byte> bytes) {
  while (!bytes.empty()) {
    const std::size_t wanted = std::min(bytes.size(), kMostAtOnce);
#ifdef _WIN32
    DWORD written = 0;
    if (!WriteFile(handle_of(handle_), bytes.data(), static_cast<DWORD>(wanted), &written,
                   nullptr)) {
      fail();
    }
#else
    const ssize_t written = ::write(static_cast<int>(handle_), bytes.data(), wanted);
    if (written < 0 && errno == EINTR) continue;
    if (written < 0) fail();
#endif
    bytes = bytes.subspan(static_cast<std::size_t>(written));
  }
}

TQAI_INLINE void Replacement::rewrite(std::uint64_t at, std::span<const std::byte> bytes) {
#ifdef _WIN32
  LARGE_INTEGER place;
  place.QuadPart = static_cast<LONGLONG>(at);
  if (!SetFilePointerEx(handle_of(handle_), place, nullptr, FILE_BEGIN)) fail();
#else
  if (::lseek(static_cast<int>(handle_), static_cast<off_t>(at), SEEK_SET) < 0) fail();
#endif
  write(bytes);
}

TQAI_INLINE void Replacement::commit() {
#ifdef _WIN32
  if (!FlushFileBuffers(handle_of(handle_))) fail();
  close();
  if (!MoveFileExW(partial_.c_str(), target_.c_str(),
                   MOVEFILE_REPLACE_EXISTING | MOVEFILE_WRITE_THROUGH)) {
    fail();
  }
  partial_.clear();
#else
  const std::filesystem::path folder = target_.has_parent_path() ? target_.parent_path() : ".";
  if (::fsync(static_cast<int>(handle_)) != 0) fail();
  close();
  if (::rename(partial_.c_str(), target_.c_str()) != 0) fail();
  // From here on nothing may throw. That the folder has the name is on the disk too, where the
  // system can promise that.
  partial_.clear();
  const int opened = ::open(folder.c_str(), O_RDONLY | O_CLOEXEC);
  if (opened >= 0) {
    ::fsync(opened);
    ::close(opened);
  }
#endif
}

}  // namespace tqai::detail
