#include <algorithm>
#include <bit>
#include <cstring>
#include <limits>
#include <set>
#include <string>
#include <tqai/files.hpp>
#include <vector>

#include "../crc32.hpp"
#include "file_format.hpp"
#include "json_reader.hpp"
#include "os_file.hpp"

namespace tqai {
namespace TQAI_LOCAL {

using detail::json_string;

constexpr std::uint64_t kMostBytes = std::numeric_limits<std::int64_t>::max();

struct Part {
  const FileEntry* entry;
  std::uint64_t first = kMostBytes;  // the largest numbers, until the true ones are known
  std::uint64_t bytes = kMostBytes;
  std::uint32_t checksum = 0;
};

// What `write` is to give; nothing where that is open.
TQAI_INLINE std::optional<std::uint64_t> bytes_of(const FileEntry& entry) {
  std::uint64_t bytes = detail::element_bytes(entry.dtype);
  if (bytes == 0 || (!entry.shape && entry.dtype != "U8")) {
    throw ValueError("tensor \"" + entry.name + "\" is of dtype \"" + entry.dtype +
                     "\"; allowed: those of safetensors, and without a shape U8");
  }
  if (!entry.shape) return std::nullopt;
  for (const std::int64_t size : *entry.shape) {
    if (size < 0 || (size > 0 && bytes > kMostBytes / static_cast<std::uint64_t>(size))) {
      throw ValueError("tensor \"" + entry.name + "\" has a dimension of " + std::to_string(size) +
                       "; allowed: 0 or more, and less than 2^63 bytes in all");
    }
    bytes *= static_cast<std::uint64_t>(size);
  }
  return bytes;
}

TQAI_INLINE void check_name(const std::string& name, std::size_t place) {
  try {
    const std::string text = json_string(name);
    (void)detail::JsonReader(text).string();
  } catch (const ValueError& error) {
    throw ValueError("the name of tensor " + std::to_string(place) + " is " + error.what() +
                     "; allowed: UTF-8");
  }
}

TQAI_INLINE std::vector<Part> parts_of(std::span<const FileEntry> entries) {
  std::vector<Part> parts;
  std::set<std::string> names;
  for (const FileEntry& entry : entries) {
    if (entry.name == "__metadata__" || !names.insert(entry.name).second) {
      throw ValueError("a tensor is named \"" + entry.name +
                       "\"; allowed is what no other tensor nor safetensors itself uses");
    }
    check_name(entry.name, parts.size());
    (void)bytes_of(entry);
    parts.push_back({&entry});
  }
  std::stable_partition(parts.begin(), parts.end(),
                        [](const Part& part) { return !part.entry->shape; });
  return parts;
}

TQAI_INLINE std::string hexadecimal(std::uint32_t value) {
  constexpr char kDigits[] = "0123456789abcdef";
  std::string text;
  for (int shift = 28; shift >= 0; shift -= 4) text += kDigits[value >> shift & 0xFU];
  return text;
}

TQAI_INLINE std::string header_text(const std::vector<Part>& parts, std::string_view header) {
  std::string checksums;
  for (const Part& part : parts) {
    if (!checksums.empty()) checksums += ' ';
    checksums += hexadecimal(part.checksum);
  }
  const std::uint32_t checksum = detail::crc32(std::as_bytes(std::span(header)));
  std::string text = "{\"__metadata__\":{\"format\":" + json_string(detail::kFileFormat) +
                     ",\"version\":\"" + std::to_string(detail::kFileVersion) +
                     "\",\"header\":" + json_string(header) + ",\"checksum\":\"" +
                     std::to_string(checksum) + "\",\"checksums\":\"" + checksums + "\"}";
  for (const Part& part : parts) {
    text.append(",").append(json_string(part.entry->name)).append(":{\"dtype\":\"");
    text.append(part.entry->dtype).append("\",\"shape\":[");
    if (!part.entry->shape) {
      text.append(std::to_string(part.bytes));
    } else {
      for (std::size_t i = 0; i < part.entry->shape->size(); ++i) {
        text.append(i > 0 ? "," : "").append(std::to_string((*part.entry->shape)[i]));
      }
    }
    text.append("],\"data_offsets\":[").append(std::to_string(part.first)).append(",");
    text.append(std::to_string(part.first + part.bytes)).append("]}");
  }
  return text + "}";
}

// Collects small pieces, and writes many at a time.
class Output {
 public:
  explicit Output(detail::Replacement& file) : file_(file) { buffer_.reserve(kBuffer); }

  void write(std::span<const std::byte> bytes) {
    if (buffer_.size() + bytes.size() > kBuffer) flush();
    if (bytes.size() >= kBuffer) {
      file_.write(bytes);
    } else {
      buffer_.insert(buffer_.end(), bytes.begin(), bytes.end());
    }
  }
  void flush() {
    file_.write(buffer_);
    buffer_.clear();
  }

 private:
  static constexpr std::size_t kBuffer = std::size_t{1} << 18;
  detail::Replacement& file_;
  std::vector<std::byte> buffer_;
};

TQAI_INLINE void write_part(Part& part, std::uint64_t first, Output& output) {
  part.first = first;
  part.bytes = 0;
  const std::optional<std::uint64_t> wanted = bytes_of(*part.entry);
  part.entry->write([&](std::span<const std::byte> bytes) {
    part.bytes += bytes.size();
    part.checksum = detail::crc32(bytes, part.checksum);
    output.write(bytes);
  });
  if (wanted && *wanted != part.bytes) {
    throw ValueError("tensor \"" + part.entry->name + "\" has " + std::to_string(part.bytes) +
                     " bytes; its dtype and shape need " + std::to_string(*wanted));
  }
}

TQAI_INLINE void check_header(std::string_view header) {
  try {
    detail::JsonReader reader(header);
    reader.object([&reader](const std::string&) { reader.skip(); });
    reader.end();
  } catch (const ValueError& error) {
    throw ValueError(std::string("the header is to be a JSON object, and is ") + error.what());
  }
}

}  // namespace TQAI_LOCAL

TQAI_INLINE void write_file(const std::filesystem::path& path, std::span<const FileEntry> entries,
                            std::string_view header) {
  if constexpr (std::endian::native != std::endian::little) {
    throw UnsupportedError("caches are written and read on little-endian processors only");
  }
  check_header(header);
  std::vector<Part> parts = parts_of(entries);
  // Offsets and checksums are known at the end; the header's length must be at the beginning. It
  // is that of the longest numbers, so that the true ones fit, and leaves tensors at a multiple of
  // 64 bytes. safetensors lets spaces follow.
  for (Part& part : parts) part.first = kMostBytes;
  std::size_t length = header_text(parts, header).size();
  length = (detail::kLengthBytes + length + kLineBytes - 1) / kLineBytes * kLineBytes -
           detail::kLengthBytes;
  if (length > detail::kMostHeaderBytes) {
    throw ValueError("the header takes " + std::to_string(length) + " bytes; allowed: up to " +
                     std::to_string(detail::kMostHeaderBytes));
  }
  detail::Replacement file(path);
  Output output(file);
  const auto bytes = static_cast<std::uint64_t>(length);
  const std::string blank(length, ' ');
  output.write(std::as_bytes(std::span(&bytes, 1)));
  output.write(std::as_bytes(std::span(blank)));
  std::uint64_t first = 0;
  for (Part& part : parts) {
    write_part(part, first, output);
    first += part.bytes;
  }
  output.flush();
  std::string text = header_text(parts, header);
  text.resize(length, ' ');
  file.rewrite(detail::kLengthBytes, std::as_bytes(std::span(text)));
  file.commit();
}

TQAI_INLINE std::string layer_tensor(std::size_t layer) {
  return "layers." + std::to_string(layer) + ".packed";
}

TQAI_INLINE void save_caches(const std::filesystem::path& path,
                             std::span<const KvCache* const> layers, std::string_view header,
                             BasisAs basis) {
  std::vector<FileEntry> entries;
  for (std::size_t layer = 0; layer < layers.size(); ++layer) {
    const KvCache* cache = layers[layer];
    if (cache == nullptr) throw ValueError("layer " + std::to_string(layer) + " is null");
    entries.push_back({layer_tensor(layer), "U8", std::nullopt,
                       [=](const ByteSink& sink) { cache->serialize(sink, basis); }});
  }
  write_file(path, entries, header);
}

}  // namespace tqai
