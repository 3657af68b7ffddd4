// Files of caches.
#include <filesystem>

#include "calls.hpp"

using namespace tqai::c_api;

namespace {

std::filesystem::path path_of(const char* path) {
  const char* text = &given(path, "path");
  return std::u8string(text, text + std::strlen(text));
}

}  // namespace

tqai_status tqai_save(const char* path, const tqai_cache* const* layers, size_t count,
                      const char* header) {
  return tqai_save_as(path, layers, count, header, TQAI_BASIS_ID);
}

tqai_status tqai_save_as(const char* path, const tqai_cache* const* layers, size_t count,
                         const char* header, int32_t basis) {
  return guarded([&] {
    const std::filesystem::path to = path_of(path);
    std::vector<const tqai::KvCache*> caches;
    for (const tqai_cache* layer : list_of(layers, count, "layers")) {
      caches.push_back(&given(layer, "a layer").held);
    }
    tqai::save_caches(to, caches, header == nullptr ? "{}" : header, basis_as(basis));
  });
}

void tqai_load_options_init(tqai_load_options* options, size_t size) {
  tqai_load_options all{};
  all.verify = 1;
  fill(options, size, all);
}

tqai_status tqai_file_open(const char* path, tqai_file** file) {
  return guarded([&] {
    tqai_file*& made = fresh(file, "file");
    made = new tqai_file{tqai::CacheFile(path_of(path))};
  });
}

void tqai_file_destroy(tqai_file* file) { delete file; }

tqai_status tqai_file_header(const tqai_file* file, const char** header) {
  return guarded([&] { given(header, "header") = given(file, "file").held.header().c_str(); });
}

tqai_status tqai_file_holds(const tqai_file* file, size_t layer, int32_t* holds) {
  return guarded([&] {
    given(holds, "holds") = given(file, "file").held.holds(tqai::layer_tensor(layer)) ? 1 : 0;
  });
}

tqai_status tqai_file_load(const tqai_file* file, size_t layer, const tqai_load_options* options,
                           tqai_cache** cache) {
  return guarded([&] {
    tqai_cache*& made = fresh(cache, "cache");
    tqai::LoadOptions settings;
    if (options != nullptr) {
      const tqai_load_options all = known(options, "options", tqai_load_options_init);
      settings.mapped = all.mapped != 0;
      settings.verify = all.verify != 0;
      settings.level = level_of(all.level);
      settings.key_bases = bases_of(all.key_bases, all.key_basis_count);
    }
    made = new tqai_cache{given(file, "file").held.load(tqai::layer_tensor(layer), settings)};
  });
}
