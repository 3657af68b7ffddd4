#include <pybind11/pybind11.h>
#include <pybind11/stl.h>
#include <pybind11/stl/filesystem.h>

#include <memory>
#include <tqai/files.hpp>
#include <tuple>
#include <vector>

#include "bindings.hpp"
#include "locked.hpp"

namespace tqai::python {
namespace {

using Shape = std::optional<std::vector<std::int64_t>>;
using Entry = std::tuple<std::string, std::string, Shape, py::object>;

std::span<std::byte> bytes_of(const py::buffer_info& info) {
  const bool contiguous =
      info.ndim == 1 && info.itemsize == 1 && (info.size <= 1 || info.strides[0] == 1);
  if (!contiguous) throw ValueError("a contiguous one-dimensional buffer of bytes is needed");
  return {static_cast<std::byte*>(info.ptr), static_cast<std::size_t>(info.size)};
}

void write(const std::filesystem::path& path, const std::vector<Entry>& tensors,
           const std::string& header) {
  std::vector<FileEntry> entries;
  for (const auto& [name, dtype, shape, source] : tensors) {
    const py::object& from = source;  // lives in `tensors`
    entries.push_back({name, dtype, shape, [&from](const ByteSink& sink) {
                         const py::gil_scoped_acquire acquire;
                         if (py::isinstance<LockedCache>(from)) {
                           from.cast<const LockedCache&>().read(
                               [&sink](const KvCache& held) { held.serialize(sink); });
                           return;
                         }
                         const py::buffer_info info = py::buffer(from()).request();
                         const std::span<const std::byte> bytes = bytes_of(info);
                         const py::gil_scoped_release release;
                         sink(bytes);
                       }});
  }
  const py::gil_scoped_release release;
  write_file(path, entries, header);
}

std::unique_ptr<LockedCache> load(const CacheFile& file, const std::string& name,
                                  const std::optional<std::string>& level, bool mapped,
                                  const std::vector<std::shared_ptr<KeyBasis>>& key_bases) {
  LoadOptions options;
  options.key_bases = bases_of(key_bases);
  if (level) options.level = level_from_name(*level);
  options.mapped = mapped;
  const py::gil_scoped_release release;
  return std::make_unique<LockedCache>(file.load(name, options));
}

py::dict tensors_of(const CacheFile& file) {
  py::dict all;
  for (const FileTensor& tensor : file.tensors()) {
    all[py::str(tensor.name)] =
        py::make_tuple(tensor.dtype, py::tuple(py::cast(tensor.shape)), tensor.bytes);
  }
  return all;
}

}  // namespace

void bind_files(py::module_& module) {
  using py::arg;
  using py::kw_only;
  module.def(
      "write_file", &write, arg("path"), arg("tensors"), arg("header") = "{}",
      R"(Writes a file of caches, whole or not at all; see include/tqai/files.hpp. tensors: each
(name, dtype as safetensors has it, shape, source), source being a KvCache or what gives a buffer of
bytes when it is called, at its turn; shape None: one dimension of bytes, as many as come. header: a
JSON object.)");
  py::class_<CacheFile>(module, "CacheFile", R"(A file of caches, open for reading.

ValueError for one that is none, or damaged; OSError where it cannot be read.)")
      .def(py::init([](const std::filesystem::path& path) {
             const py::gil_scoped_release release;
             return CacheFile(path);
           }),
           arg("path"))
      .def_property_readonly("version", &CacheFile::version)
      .def_property_readonly("header", &CacheFile::header, "The JSON object that was written.")
      .def_property_readonly("tensors", &tensors_of,
                             "(dtype, shape, bytes) of each tensor by its name, in their order.")
      .def(
          "read_into",
          [](const CacheFile& file, const std::string& name, py::buffer to, std::uint64_t first) {
            const py::buffer_info info = to.request(true);
            const std::span<std::byte> bytes = bytes_of(info);
            const py::gil_scoped_release release;
            file.read(name, first, bytes);
          },
          arg("name"), arg("to"), arg("first") = 0,
          "Fills a buffer with a tensor's bytes from `first` on, without looking at its checksum.")
      .def(
          "read_all",
          [](const CacheFile& file, const std::string& name, py::buffer to) {
            const py::buffer_info info = to.request(true);
            const std::span<std::byte> bytes = bytes_of(info);
            const py::gil_scoped_release release;
            file.read(name, bytes);
          },
          arg("name"), arg("to"),
          "Fills a buffer with all of a tensor's bytes; ValueError where their checksum does not "
          "fit.")
      .def(
          "verify",
          [](const CacheFile& file, const std::string& name) {
            const py::gil_scoped_release release;
            file.verify(name);
          },
          arg("name"), "ValueError where a tensor's checksum does not fit.")
      .def(
          "load", &load, arg("name"), kw_only(), arg("level") = py::none(), arg("mapped") = false,
          arg("key_bases") = py::tuple(),
          R"(The cache that a tensor holds. mapped: tiles stay in the file's pages; nobody may shorten the
file, or change it in place, while any such cache lives. key_bases: as KvCache.deserialize.)");
}

}  // namespace tqai::python
