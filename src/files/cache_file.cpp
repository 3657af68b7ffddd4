#include <algorithm>
#include <bit>
#include <cstring>
#include <map>
#include <string>
#include <tqai/files.hpp>
#include <vector>

#include "../cache/bytes.hpp"
#include "../crc32.hpp"
#include "file_format.hpp"
#include "json_reader.hpp"
#include "os_file.hpp"

namespace tqai {

struct CacheFile::State {
  detail::InputFile file;
  int version = 0;
  std::string header;
  std::vector<FileTensor> tensors;

  [[noreturn]] void refuse(const std::string& what) const {
    throw ValueError(file.path().string() + what);
  }
  [[noreturn]] void refuse_damaged(const std::string& name) const {
    refuse(" is damaged: the checksum of \"" + name + "\" does not fit; save the cache again");
  }
};

namespace TQAI_LOCAL {

using detail::JsonReader;

using Metadata = std::map<std::string, std::string>;

// A file's first part: the text between its length and the tensors.
TQAI_INLINE std::string read_text(const detail::InputFile& file) {
  std::uint64_t length = 0;
  if (file.size() < detail::kLengthBytes) throw ValueError("it has no header");
  file.read(0, std::as_writable_bytes(std::span(&length, 1)));
  if (length > detail::kMostHeaderBytes || length > file.size() - detail::kLengthBytes) {
    throw ValueError("its header would have " + std::to_string(length) + " bytes");
  }
  std::string text(static_cast<std::size_t>(length), ' ');
  file.read(detail::kLengthBytes, std::as_writable_bytes(std::span(text)));
  return text;
}

// `base`: where tensors begin in the file.
TQAI_INLINE FileTensor read_tensor(const std::string& name, std::uint64_t base,
                                   JsonReader& reader) {
  FileTensor tensor;
  tensor.name = name;
  std::vector<std::int64_t> offsets;
  int parts = 0;
  reader.object([&](const std::string& key) {
    ++parts;
    if (key == "dtype") {
      tensor.dtype = reader.string();
    } else if (key == "shape") {
      reader.array([&] { tensor.shape.push_back(reader.count()); });
    } else if (key == "data_offsets") {
      reader.array([&] { offsets.push_back(reader.count()); });
    } else {
      throw ValueError("tensor \"" + name + "\" has \"" + key + "\"");
    }
  });
  std::uint64_t bytes = detail::element_bytes(tensor.dtype);
  if (parts != 3 || bytes == 0 || offsets.size() != 2 || offsets[1] < offsets[0]) {
    throw ValueError("tensor \"" + name + "\" is not described as safetensors does");
  }
  const auto given = static_cast<std::uint64_t>(offsets[1] - offsets[0]);
  for (const std::int64_t size : tensor.shape) {
    // Beyond what is there it would not fit either.
    bytes = size > 0 && bytes > given / static_cast<std::uint64_t>(size)
                ? given + 1
                : bytes * static_cast<std::uint64_t>(size);
  }
  if (bytes != given) {
    throw ValueError("tensor \"" + name + "\" has " + std::to_string(given) +
                     " bytes, which do not fit its dtype and shape");
  }
  tensor.bytes = given;
  tensor.first = base + static_cast<std::uint64_t>(offsets[0]);
  return tensor;
}

// One after another, from `base` to the file's end.
TQAI_INLINE void sort_and_check(std::uint64_t base, std::uint64_t size,
                                std::vector<FileTensor>& tensors) {
  std::sort(tensors.begin(), tensors.end(), [](const FileTensor& a, const FileTensor& b) {
    return a.first != b.first ? a.first < b.first : a.bytes < b.bytes;
  });
  std::uint64_t at = base;
  for (const FileTensor& tensor : tensors) {
    if (tensor.first != at || tensor.bytes > size - at) {
      throw ValueError("tensor \"" + tensor.name + "\" does not lie where the one before it ends");
    }
    at += tensor.bytes;
  }
  if (at != size) {
    throw ValueError("its tensors end at byte " + std::to_string(at) + " of " +
                     std::to_string(size));
  }
}

TQAI_INLINE const std::string& entry_of(const Metadata& metadata, const std::string& name) {
  static const std::string kNone;
  const auto found = metadata.find(name);
  return found == metadata.end() ? kNone : found->second;
}

// Eight hexadecimal digits for each tensor, in order.
TQAI_INLINE void take_checksums(const std::string& text, std::vector<FileTensor>& tensors) {
  constexpr std::size_t kDigits = 8;
  const auto digit = [&](std::size_t at) {
    const char c = text[at];
    if (c >= '0' && c <= '9') return static_cast<std::uint32_t>(c - '0');
    if (c >= 'a' && c <= 'f') return static_cast<std::uint32_t>(c - 'a' + 10);
    throw ValueError("its checksums are no hexadecimal numbers");
  };
  const std::size_t needed = tensors.empty() ? 0 : tensors.size() * (kDigits + 1) - 1;
  if (text.size() != needed) {
    throw ValueError("its checksums are not those of " + std::to_string(tensors.size()) +
                     " tensors");
  }
  std::size_t at = 0;
  for (FileTensor& tensor : tensors) {
    if (at > 0 && text[at++] != ' ') throw ValueError("its checksums run together");
    std::uint32_t value = 0;
    for (std::size_t i = 0; i < kDigits; ++i) value = value << 4 | digit(at++);
    tensor.checksum = value;
  }
}

// Until version 2 they were in the header, as numbers.
TQAI_INLINE void take_old_checksums(const std::string& header, std::vector<FileTensor>& tensors) {
  std::map<std::string, std::int64_t> checksums;
  JsonReader reader(header);
  reader.object([&](const std::string& key) {
    if (key != "checksums") return reader.skip();
    reader.object([&](const std::string& name) { checksums[name] = reader.count(); });
  });
  reader.end();
  for (FileTensor& tensor : tensors) {
    const auto found = checksums.find(tensor.name);
    if (found == checksums.end() || found->second > 0xFFFF'FFFF) {
      throw ValueError("its header has no checksum of \"" + tensor.name + "\"");
    }
    tensor.checksum = static_cast<std::uint32_t>(found->second);
  }
}

TQAI_INLINE std::uint32_t checksum_of(const std::string& text) {
  return detail::crc32(std::as_bytes(std::span(text)));
}

// A tensor's bytes as they come from the file, and their checksum so far.
class Stream {
 public:
  Stream(const detail::InputFile& file, const FileTensor& tensor)
      : file_(file), at_(tensor.first), left_(tensor.bytes), buffer_(kBuffer) {}

  void read(std::span<std::byte> to) {
    if (to.size() >= kBuffer && held_.empty()) {
      fetch(to);
      return;
    }
    while (!to.empty()) {
      if (held_.empty()) refill();
      const std::size_t count = std::min(to.size(), held_.size());
      std::memcpy(to.data(), held_.data(), count);
      held_ = held_.subspan(count);
      to = to.subspan(count);
    }
  }
  /// Of the whole tensor; reads what is left.
  std::uint32_t checksum() {
    while (left_ > 0) refill();
    return checksum_;
  }

 private:
  static constexpr std::size_t kBuffer = std::size_t{1} << 16;

  void refill() {
    const auto count = static_cast<std::size_t>(std::min<std::uint64_t>(left_, kBuffer));
    fetch(std::span(buffer_).first(count));
    held_ = std::span(buffer_).first(count);
  }
  void fetch(std::span<std::byte> to) {
    file_.read(at_, to);
    checksum_ = detail::crc32(to, checksum_);
    at_ += to.size();
    left_ -= to.size();
  }

  const detail::InputFile& file_;
  std::uint64_t at_;
  std::uint64_t left_;
  std::vector<std::byte> buffer_;
  std::span<const std::byte> held_;
  std::uint32_t checksum_ = 0;
};

}  // namespace TQAI_LOCAL

TQAI_INLINE CacheFile::CacheFile(const std::filesystem::path& path)
    : state_(new State{detail::InputFile(path), 0, {}, {}}) {
  if constexpr (std::endian::native != std::endian::little) {
    throw UnsupportedError("caches are written and read on little-endian processors only");
  }
  State& state = *state_;
  Metadata metadata;
  try {
    const std::string text = read_text(state.file);
    const std::uint64_t base = detail::kLengthBytes + text.size();
    JsonReader reader(text);
    reader.object([&](const std::string& key) {
      if (key == "__metadata__") {
        reader.object([&](const std::string& name) { metadata[name] = reader.string(); });
      } else {
        state.tensors.push_back(read_tensor(key, base, reader));
      }
    });
    reader.end();
    sort_and_check(base, state.file.size(), state.tensors);
  } catch (const ValueError& error) {
    state.refuse(std::string(" is no safetensors file, or damaged (") + error.what() +
                 "); save the cache again");
  }
  if (entry_of(metadata, "format") != detail::kFileFormat) {
    state.refuse(" is a safetensors file, but holds no caches of tqai's");
  }
  const std::string& version = entry_of(metadata, "version");
  if (version.size() != 1 || version[0] < '1' || version[0] > '0' + detail::kFileVersion) {
    state.refuse(" is of format version " + version + "; this tqai reads versions 1 to " +
                 std::to_string(detail::kFileVersion) +
                 ": save the cache again, or use the tqai that wrote it");
  }
  state.version = version[0] - '0';
  state.header = entry_of(metadata, "header");
  if (entry_of(metadata, "checksum") != std::to_string(checksum_of(state.header))) {
    state.refuse(" is damaged: its header's checksum does not fit; save it again");
  }
  try {
    if (state.version < 3) {
      take_old_checksums(state.header, state.tensors);
    } else {
      take_checksums(entry_of(metadata, "checksums"), state.tensors);
    }
  } catch (const ValueError& error) {
    state.refuse(std::string(" is damaged: ") + error.what() + "; save it again");
  }
}

TQAI_INLINE CacheFile::CacheFile(CacheFile&& other) noexcept = default;
TQAI_INLINE CacheFile& CacheFile::operator=(CacheFile&& other) noexcept = default;
TQAI_INLINE CacheFile::~CacheFile() = default;

TQAI_INLINE int CacheFile::version() const noexcept { return state_->version; }
TQAI_INLINE const std::string& CacheFile::header() const noexcept { return state_->header; }
TQAI_INLINE const std::vector<FileTensor>& CacheFile::tensors() const noexcept {
  return state_->tensors;
}

TQAI_INLINE bool CacheFile::holds(std::string_view name) const noexcept {
  return std::any_of(state_->tensors.begin(), state_->tensors.end(),
                     [&](const FileTensor& tensor) { return tensor.name == name; });
}

TQAI_INLINE const FileTensor& CacheFile::tensor(std::string_view name) const {
  for (const FileTensor& tensor : state_->tensors) {
    if (tensor.name == name) return tensor;
  }
  throw IndexError(state_->file.path().string() + " has no tensor \"" + std::string(name) + "\"");
}

TQAI_INLINE void CacheFile::read(std::string_view name, std::uint64_t first,
                                 std::span<std::byte> to) const {
  const FileTensor& held = tensor(name);
  if (first > held.bytes || to.size() > held.bytes - first) {
    throw IndexError("bytes " + std::to_string(first) + "…" + std::to_string(first + to.size()) +
                     " of tensor \"" + held.name + "\", which has " + std::to_string(held.bytes));
  }
  state_->file.read(held.first + first, to);
}

TQAI_INLINE void CacheFile::read(std::string_view name, std::span<std::byte> to) const {
  const FileTensor& held = tensor(name);
  if (to.size() != held.bytes) {
    throw IndexError("tensor \"" + held.name + "\" has " + std::to_string(held.bytes) +
                     " bytes; there is room for " + std::to_string(to.size()));
  }
  state_->file.read(held.first, to);
  if (detail::crc32(to) != held.checksum) state_->refuse_damaged(held.name);
}

TQAI_INLINE void CacheFile::verify(std::string_view name) const {
  const FileTensor& held = tensor(name);
  if (Stream(state_->file, held).checksum() != held.checksum) {
    state_->refuse_damaged(held.name);
  }
}

TQAI_INLINE KvCache CacheFile::load(std::string_view name, const LoadOptions& options) const {
  const State& state = *state_;
  const FileTensor& held = tensor(name);
  if (held.dtype != "U8" || held.shape.size() != 1 || held.bytes == 0) {
    state.refuse(": tensor \"" + held.name + "\" holds no cache");
  }
  const auto bytes = static_cast<std::size_t>(held.bytes);
  const auto named = [&](const ValueError& error) {
    return ValueError(state.file.path().string() + ": " + held.name + ": " + error.what());
  };
  if (options.mapped) {
    const std::shared_ptr<const std::byte> pages = state.file.map(held.first, bytes);
    const std::span<const std::byte> all(pages.get(), bytes);
    if (options.verify && detail::crc32(all) != held.checksum) state.refuse_damaged(held.name);
    detail::Reader reader(all, pages);
    try {
      return KvCache::read(reader, options.level, options.key_bases);
    } catch (const ValueError& error) {
      throw named(error);
    }
  }
  Stream stream(state.file, held);
  detail::Reader reader([&stream](std::span<std::byte> to) { stream.read(to); }, bytes);
  std::optional<KvCache> cache;
  std::optional<ValueError> problem;
  try {
    cache.emplace(KvCache::read(reader, options.level, options.key_bases));
  } catch (const ValueError& error) {
    problem = error;
  }
  // First: that the file is damaged says more than what has become of it.
  if (options.verify && stream.checksum() != held.checksum) state.refuse_damaged(held.name);
  if (problem) throw named(*problem);
  return *std::move(cache);
}

TQAI_INLINE std::vector<KvCache> load_caches(const std::filesystem::path& path,
                                             const LoadOptions& options) {
  const CacheFile file(path);
  // Names are in the order of layers up to the number of their digits.
  constexpr std::string_view kBefore = "layers.";
  constexpr std::string_view kAfter = ".packed";
  std::map<std::size_t, const FileTensor*> layers;
  for (const FileTensor& tensor : file.tensors()) {
    const std::string_view name = tensor.name;
    if (name.size() <= kBefore.size() + kAfter.size()) continue;
    const std::string_view digits =
        name.substr(kBefore.size(), name.size() - kBefore.size() - kAfter.size());
    if (digits.size() > 6 || digits.find_first_not_of("0123456789") != std::string_view::npos) {
      continue;
    }
    const std::size_t layer = std::stoul(std::string(digits));
    if (layer_tensor(layer) == name) layers[layer] = &tensor;
  }
  std::vector<KvCache> caches;
  caches.reserve(layers.size());
  for (const auto& [layer, tensor] : layers) caches.push_back(file.load(tensor->name, options));
  return caches;
}

}  // namespace tqai
