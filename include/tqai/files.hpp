// Caches in files: one safetensors file for all layers of a model, as docs/format.md describes it
// and the Python package reads and writes it too.
#pragma once

#include <cstddef>
#include <cstdint>
#include <filesystem>
#include <functional>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <tqai/cache.hpp>
#include <tqai/export.hpp>
#include <vector>

namespace tqai {

/// Takes the next bytes of a tensor.
using ByteSink = std::function<void(std::span<const std::byte>)>;

/// A tensor to be written.
struct FileEntry {
  std::string name;          ///< no other's
  std::string dtype = "U8";  ///< as safetensors has it: U8, F16, BF16, F32, …
  /// Nothing: one dimension, as many as `write` gives; U8 only.
  std::optional<std::vector<std::int64_t>> shape;
  /// Hands all bytes to the sink, in order, row-major and little-endian. Called once.
  std::function<void(const ByteSink&)> write;
};

/// Writes a file, whole or not at all: beside its place, onto the disk, then into its place. What
/// is there is replaced and its permissions stay; a link stays, and what it points to is replaced.
/// Tensors lie in the order of `entries`, but that those without a shape come first, which leaves
/// the tiles of caches at multiples of 64 bytes. Takes memory for the header alone.
///
/// header: a JSON object of the application's own, which comes back from `CacheFile::header`.
///
/// Throws FileError where the file cannot be written; ValueError for a header that is no JSON
/// object, for two tensors of one name, and for bytes that do not fit a dtype and shape; what
/// `write` throws.
TQAI_API void write_file(const std::filesystem::path& path, std::span<const FileEntry> entries,
                         std::string_view header = "{}");

/// Writes the caches of a model's layers; that of layer N is the tensor `layer_tensor(N)`. As
/// `write_file`; basis: as KvCache::serialize.
TQAI_API void save_caches(const std::filesystem::path& path, std::span<const KvCache* const> layers,
                          std::string_view header = "{}", BasisAs basis = BasisAs::id);

/// "layers.N.packed".
TQAI_API std::string layer_tensor(std::size_t layer);

/// A tensor in a file.
struct FileTensor {
  std::string name;                 ///< as in the file
  std::string dtype;                ///< as safetensors has it
  std::vector<std::int64_t> shape;  ///< elements along each dimension
  std::uint64_t first = 0;          ///< its first byte in the file
  std::uint64_t bytes = 0;          ///< of all its elements
  std::uint32_t checksum = 0;       ///< CRC-32
};

/// How caches come out of files.
struct LoadOptions {
  std::optional<Level> level;  ///< default: default_level()
  /// Tiles stay in the file's pages, which the system reads when they are used and may drop when
  /// memory is short; everything else is copied. Nothing is ever written to the file. As long as
  /// any such cache lives, nobody may shorten the file (on POSIX systems the process ends with
  /// SIGBUS where it reads beyond its end), or change it in place; replacing it is fine. Files of
  /// before format 3 are copied all the same.
  bool mapped = false;
  /// Compares checksums, which reads all bytes.
  bool verify = true;
  /// As KvCache::deserialize.
  std::vector<std::shared_ptr<const KeyBasis>> key_bases = {};
};

/// A file of `write_file`, or of the Python package, open for reading. Everything in it is checked
/// before it is used. Const members may run concurrently.
class TQAI_API CacheFile {
 public:
  /// Reads the header. Throws FileError where the file cannot be read, ValueError for one that is
  /// no file of caches, of a version that is not known, or damaged.
  explicit CacheFile(const std::filesystem::path& path);
  /// Leaves `other` fit for nothing but to be assigned to or destroyed.
  CacheFile(CacheFile&& other) noexcept;
  /// As the move; the file that was open here is closed.
  CacheFile& operator=(CacheFile&& other) noexcept;
  ~CacheFile();

  /// Of the file's format: 1…3.
  int version() const noexcept;
  /// The application's JSON object.
  const std::string& header() const noexcept;
  /// In the order of their bytes.
  const std::vector<FileTensor>& tensors() const noexcept;
  /// Throws IndexError where there is none of this name.
  const FileTensor& tensor(std::string_view name) const;
  /// Whether there is a tensor of this name.
  bool holds(std::string_view name) const noexcept;

  /// Bytes [first, first + to.size()) of a tensor, whatever they are. Throws IndexError for what
  /// does not exist.
  void read(std::string_view name, std::uint64_t first, std::span<std::byte> to) const;
  /// All bytes of a tensor, and compares the checksum of these very bytes, whoever changes the file
  /// meanwhile. Throws IndexError for a span of another size, ValueError for a damaged tensor.
  void read(std::string_view name, std::span<std::byte> to) const;
  /// Throws ValueError where a tensor's checksum does not fit.
  void verify(std::string_view name) const;
  /// The cache that a tensor holds. Takes memory for that alone. Throws IndexError, ValueError for
  /// a tensor that holds none or a damaged one, UnsupportedError for a level this machine lacks.
  KvCache load(std::string_view name, const LoadOptions& options = {}) const;

 private:
  struct State;
  std::unique_ptr<State> state_;
};

/// The caches that `save_caches` wrote, in order of their layers; of a file of the Python package,
/// those of the layers that are compressed. As `CacheFile`.
TQAI_API std::vector<KvCache> load_caches(const std::filesystem::path& path,
                                          const LoadOptions& options = {});

}  // namespace tqai

#if defined(TQAI_HEADER_ONLY) || defined(TQAI_IMPLEMENTATION)
#define TQAI_FILES_READ
#include <tqai/header_only.hpp>
#endif
