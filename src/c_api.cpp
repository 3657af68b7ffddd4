#include <tqai/c_api.h>

#include <algorithm>
#include <cstring>
#include <memory>
#include <new>
#include <string>
#include <tqai/cache.hpp>
#include <tqai/codebook.hpp>
#include <tqai/files.hpp>
#include <tqai/quantizer.hpp>
#include <vector>

struct tqai_cache {
  tqai::KvCache held;
};
struct tqai_file {
  tqai::CacheFile held;
};
struct tqai_quantizer {
  std::unique_ptr<tqai::VectorQuantizer> held;
};

namespace {

using tqai::ValueError;

constexpr std::size_t kMessageBytes = 1024;
// Plain bytes, so that keeping a message can neither fail nor need a destructor at a thread's end.
thread_local char t_message[kMessageBytes];

void keep(const char* message) noexcept {
  std::size_t length = std::min(std::strlen(message), kMessageBytes - 1);
  // Not in the middle of a character.
  if (message[length] != 0) {
    while (length > 0 && (static_cast<unsigned char>(message[length]) & 0xC0U) == 0x80) --length;
  }
  std::memcpy(t_message, message, length);
  t_message[length] = 0;
}

template <typename Call>
tqai_status guarded(const Call& call) noexcept {
  try {
    call();
    return TQAI_OK;
  } catch (const tqai::IndexError& error) {
    keep(error.what());
    return TQAI_INDEX_ERROR;
  } catch (const tqai::UnsupportedError& error) {
    keep(error.what());
    return TQAI_UNSUPPORTED;
  } catch (const tqai::FileError& error) {
    keep(error.what());
    return TQAI_FILE_ERROR;
  } catch (const tqai::Error& error) {
    keep(error.what());
    return TQAI_VALUE_ERROR;
  } catch (const std::bad_alloc&) {
    keep("no memory left");
    return TQAI_NO_MEMORY;
  } catch (const std::exception& error) {
    keep(error.what());
    return TQAI_INTERNAL_ERROR;
  } catch (...) {
    keep("an error that is no std::exception");
    return TQAI_INTERNAL_ERROR;
  }
}

template <typename T>
T& given(T* pointer, const char* name) {
  if (pointer == nullptr) throw ValueError(std::string(name) + " is NULL; a pointer is needed");
  return *pointer;
}

// For what is filled once all is well.
template <typename Handle>
Handle*& fresh(Handle** handle, const char* name) {
  Handle*& held = given(handle, name);
  held = nullptr;
  return held;
}

// A copy of the members that the caller knows; the others at their defaults.
template <typename T>
T known(const T* structure, const char* name, void (*init)(T*)) {
  const std::size_t size = given(structure, name).size;
  constexpr std::size_t kLeast = sizeof(std::size_t) + sizeof(std::int32_t);
  if (size < kLeast || size > std::size_t{1} << 16) {
    throw ValueError(std::string(name) + "->size = " + std::to_string(size) +
                     "; fill the structure with its _init function first");
  }
  T copy;
  init(&copy);
  std::memcpy(&copy, structure, std::min(size, sizeof(T)));
  copy.size = sizeof(T);
  const auto* bytes = reinterpret_cast<const unsigned char*>(structure);
  for (std::size_t i = sizeof(T); i < size; ++i) {
    if (bytes[i] != 0) {
      throw ValueError(std::string(name) +
                       " sets what this version of tqai does not have; leave it at 0, or use a "
                       "newer library");
    }
  }
  return copy;
}

// Writes the members that the caller has room for.
template <typename T>
void give(T answer, T* to, const char* name) {
  const std::size_t size = given(to, name).size;
  if (size < sizeof(std::size_t) || size > std::size_t{1} << 16) {
    throw ValueError(std::string(name) + "->size = " + std::to_string(size) +
                     "; fill the structure with its _init function first");
  }
  answer.size = size;
  std::memcpy(to, &answer, std::min(size, sizeof(T)));
}

template <typename T>
void clear(T* structure) noexcept {
  if (structure == nullptr) return;
  std::memset(structure, 0, sizeof(T));
  structure->size = sizeof(T);
}

int checked(const char* name, std::int32_t value, int last) {
  if (value >= 0 && value <= last) return value;
  throw ValueError(std::string(name) + " = " + std::to_string(value) + "; allowed: 0 to " +
                   std::to_string(last));
}

tqai::DType dtype_of(std::int32_t dtype) {
  return static_cast<tqai::DType>(checked("dtype", dtype, TQAI_BF16));
}

tqai::RotationKind rotation_of(std::int32_t rotation) {
  return static_cast<tqai::RotationKind>(checked("rotation", rotation, TQAI_ROTATION_HAAR));
}

tqai::Grid grid_of(std::int32_t grid) {
  return static_cast<tqai::Grid>(checked("grid", grid, TQAI_GRID_INT8));
}

std::optional<tqai::Level> level_of(const char* name) {
  if (name == nullptr) return std::nullopt;
  return tqai::level_from_name(name);
}

std::filesystem::path path_of(const char* path) {
  const char* text = &given(path, "path");
  return std::u8string(text, text + std::strlen(text));
}

template <typename To, typename From>
To tensor_of(const From* from, const char* name) {
  const From& tensor = given(from, name);
  To to;
  to.data = tensor.data;
  to.dtype = dtype_of(tensor.dtype);
  std::copy_n(tensor.shape, 4, to.shape.begin());
  std::copy_n(tensor.strides, 4, to.strides.begin());
  return to;
}

tqai::Mask mask_of(const tqai_tensor& tensor) {
  tqai::Mask mask;
  mask.data = tensor.data;
  switch (checked("the mask's dtype", tensor.dtype, TQAI_BOOL)) {
    case TQAI_F32: mask.kind = tqai::Mask::Kind::f32; break;
    case TQAI_F16: mask.kind = tqai::Mask::Kind::f16; break;
    case TQAI_BF16: mask.kind = tqai::Mask::Kind::bf16; break;
    default: mask.kind = tqai::Mask::Kind::boolean; break;
  }
  std::copy_n(tensor.shape, 4, mask.shape.begin());
  std::copy_n(tensor.strides, 4, mask.strides.begin());
  return mask;
}

std::optional<tqai::Rope> rope_of(const tqai_cache_options& options) {
  if (options.rotary_dim == 0 && options.inv_freq == nullptr) return std::nullopt;
  if (options.rotary_dim < 2 || options.rotary_dim > options.head_dim) {
    throw ValueError("rotary_dim = " + std::to_string(options.rotary_dim) +
                     "; allowed: 2 to head_dim, or 0 and no inv_freq without an embedding");
  }
  const float* frequencies = &given(options.inv_freq, "inv_freq");
  const auto pairs = static_cast<std::size_t>(options.rotary_dim) / 2;
  tqai::Rope rope;
  rope.rotary_dim = options.rotary_dim;
  rope.layout = static_cast<tqai::Rope::Layout>(
      checked("rope_layout", options.rope_layout, TQAI_ROPE_INTERLEAVED));
  rope.inv_freq.assign(frequencies, frequencies + pairs);
  if (options.sections != nullptr) {
    rope.sections.assign(options.sections, options.sections + pairs);
  }
  return rope;
}

template <typename T>
std::span<const T> list_of(const T* items, std::size_t count, const char* name) {
  if (count > 0) (void)given(items, name);
  return {items, count};
}

// The process's own; C sees no more than its address.
const tqai::Codebook& book_of(const tqai_codebook* codebook) {
  return *reinterpret_cast<const tqai::Codebook*>(&given(codebook, "codebook"));
}

const tqai::VectorQuantizer& of(const tqai_quantizer* quantizer) {
  return *given(quantizer, "quantizer").held;
}

static_assert(TQAI_F16 == static_cast<int>(tqai::DType::f16) &&
              TQAI_BF16 == static_cast<int>(tqai::DType::bf16));
static_assert(TQAI_ROTATION_HAAR == static_cast<int>(tqai::RotationKind::haar));
static_assert(TQAI_CENTERING_ROPE == static_cast<int>(tqai::Centering::rope));
static_assert(TQAI_ROPE_INTERLEAVED == static_cast<int>(tqai::Rope::Layout::interleaved));
static_assert(TQAI_GRID_INT8 == static_cast<int>(tqai::Grid::int8));

}  // namespace

uint32_t tqai_abi_version(void) { return TQAI_ABI_VERSION; }
const char* tqai_version(void) { return TQAI_VERSION; }
const char* tqai_last_error(void) { return t_message; }

tqai_status tqai_default_level(const char** name) {
  return guarded([&] { given(name, "name") = tqai::name_of(tqai::default_level()).data(); });
}

void tqai_cache_options_init(tqai_cache_options* options) {
  if (options == nullptr) return;
  clear(options);
  const tqai::CacheOptions defaults;
  options->batch = 1;
  options->bits_k = defaults.bits_k;
  options->bits_v = defaults.bits_v;
  options->sink_tokens = defaults.sink_tokens;
  options->residual_window = defaults.residual_window;
  options->seed = defaults.seed;
}

void tqai_attend_options_init(tqai_attend_options* options) {
  if (options == nullptr) return;
  clear(options);
  options->causal = 1;
}

void tqai_cache_info_init(tqai_cache_info* info) { clear(info); }
void tqai_memory_init(tqai_memory* memory) { clear(memory); }

void tqai_load_options_init(tqai_load_options* options) {
  if (options == nullptr) return;
  clear(options);
  options->verify = 1;
}

void tqai_quantizer_options_init(tqai_quantizer_options* options) {
  if (options == nullptr) return;
  clear(options);
  const tqai::ProdQuantizerOptions defaults;
  options->bits = defaults.bits;
  options->norm_correction = 1;
  options->seed = defaults.seed;
  options->projection_seed = defaults.projection_seed;
}

tqai_status tqai_cache_create(const tqai_cache_options* options, tqai_cache** cache) {
  return guarded([&] {
    tqai_cache*& made = fresh(cache, "cache");
    const tqai_cache_options all = known(options, "options", tqai_cache_options_init);
    tqai::CacheOptions settings;
    settings.kv_heads = all.kv_heads;
    settings.head_dim = all.head_dim;
    settings.value_head_dim = all.value_head_dim;
    settings.dtype = dtype_of(all.dtype);
    settings.bits_k = all.bits_k;
    settings.bits_v = all.bits_v;
    settings.sink_tokens = all.sink_tokens;
    settings.residual_window = all.residual_window;
    settings.rotation = rotation_of(all.rotation);
    settings.centering =
        static_cast<tqai::Centering>(checked("centering", all.centering, TQAI_CENTERING_ROPE));
    settings.rope = rope_of(all);
    settings.seed = all.seed;
    settings.level = level_of(all.level);
    made = new tqai_cache{tqai::KvCache(settings, all.batch)};
  });
}

void tqai_cache_destroy(tqai_cache* cache) { delete cache; }

tqai_status tqai_cache_copy(const tqai_cache* cache, tqai_cache** copy) {
  return guarded([&] {
    tqai_cache*& made = fresh(copy, "copy");
    made = new tqai_cache(given(cache, "cache"));
  });
}

tqai_status tqai_cache_append(tqai_cache* cache, const tqai_tensor* keys, const tqai_tensor* values,
                              const tqai_positions* positions) {
  return guarded([&] {
    std::optional<tqai::PositionTensor> places;
    if (positions != nullptr) {
      places.emplace().data = &given(positions->data, "positions->data");
      std::copy_n(positions->shape, 3, places->shape.begin());
      std::copy_n(positions->strides, 3, places->strides.begin());
    }
    given(cache, "cache")
        .held.append(tensor_of<tqai::ConstTensor>(keys, "keys"),
                     tensor_of<tqai::ConstTensor>(values, "values"), places);
  });
}

tqai_status tqai_cache_seal(tqai_cache* cache, int64_t* held) {
  return guarded([&] {
    const std::int64_t exact = given(cache, "cache").held.seal();
    if (held != nullptr) *held = exact;
  });
}

tqai_status tqai_cache_attend(const tqai_cache* cache, const tqai_tensor* queries,
                              const tqai_output* output, const tqai_attend_options* options) {
  return guarded([&] {
    tqai::AttendOptions settings;
    if (options != nullptr) {
      const tqai_attend_options all = known(options, "options", tqai_attend_options_init);
      if (all.has_scale != 0) settings.scale = all.scale;
      settings.soft_cap = all.soft_cap;
      settings.causal = all.causal != 0;
      settings.window = all.window;
      settings.first_token = all.first_token;
      if (all.mask != nullptr) settings.mask = mask_of(*all.mask);
      settings.sink_scores = all.sink_scores;
    }
    given(cache, "cache")
        .held.attend(tensor_of<tqai::ConstTensor>(queries, "queries"),
                     tensor_of<tqai::Tensor>(output, "output"), settings);
  });
}

tqai_status tqai_cache_gather(const tqai_cache* cache, int64_t first, const tqai_output* keys,
                              const tqai_output* values) {
  return guarded([&] {
    given(cache, "cache")
        .held.gather(first, tensor_of<tqai::Tensor>(keys, "keys"),
                     tensor_of<tqai::Tensor>(values, "values"));
  });
}

tqai_status tqai_cache_crop(tqai_cache* cache, int64_t tokens) {
  return guarded([&] { given(cache, "cache").held.crop(tokens); });
}

tqai_status tqai_cache_select(tqai_cache* cache, const int64_t* rows, size_t count) {
  return guarded([&] { given(cache, "cache").held.select(list_of(rows, count, "rows")); });
}

tqai_status tqai_cache_set_padding(tqai_cache* cache, const int64_t* counts, size_t count) {
  return guarded([&] { given(cache, "cache").held.set_padding(list_of(counts, count, "counts")); });
}

tqai_status tqai_cache_discard_before(tqai_cache* cache, int64_t token) {
  return guarded([&] { given(cache, "cache").held.discard_before(token); });
}

tqai_status tqai_cache_packed_tokens(const tqai_cache* cache, int32_t row, int64_t* tokens) {
  return guarded([&] { given(tokens, "tokens") = given(cache, "cache").held.packed_tokens(row); });
}

tqai_status tqai_cache_get_info(const tqai_cache* cache, tqai_cache_info* info) {
  return guarded([&] {
    const tqai::KvCache& held = given(cache, "cache").held;
    const tqai::CacheOptions& options = held.options();
    tqai_cache_info answer{};
    answer.batch = held.batch();
    answer.kv_heads = options.kv_heads;
    answer.head_dim = options.head_dim;
    answer.value_head_dim = options.value_head_dim;
    answer.dtype = static_cast<std::int32_t>(options.dtype);
    answer.bits_k = options.bits_k;
    answer.bits_v = options.bits_v;
    answer.sink_tokens = options.sink_tokens;
    answer.residual_window = options.residual_window;
    answer.tokens = held.tokens();
    answer.first_token = held.first_token();
    answer.level = tqai::name_of(*options.level).data();
    give(answer, info, "info");
  });
}

tqai_status tqai_cache_get_memory(const tqai_cache* cache, tqai_memory* memory) {
  return guarded([&] {
    const tqai::MemoryReport report = given(cache, "cache").held.memory();
    tqai_memory answer{};
    answer.tokens = report.tokens;
    answer.packed_tokens = report.packed_tokens;
    answer.packed_bytes = report.packed_bytes;
    answer.exact_bytes = report.exact_bytes;
    answer.overhead_bytes = report.overhead_bytes;
    answer.total_bytes = report.total_bytes();
    answer.mapped_bytes = report.mapped_bytes;
    answer.uncompressed_bytes = report.uncompressed_bytes;
    give(answer, memory, "memory");
  });
}

size_t tqai_allocated_bytes(void) { return tqai::allocated_bytes(); }

tqai_status tqai_cache_serialized_bytes(const tqai_cache* cache, size_t* bytes) {
  return guarded([&] { given(bytes, "bytes") = given(cache, "cache").held.serialized_bytes(); });
}

tqai_status tqai_cache_serialize(const tqai_cache* cache, void* to, size_t capacity) {
  return guarded([&] {
    const tqai::KvCache& held = given(cache, "cache").held;
    auto* at = &given(static_cast<std::byte*>(to), "to");
    const std::size_t needed = held.serialized_bytes();
    if (capacity < needed) {
      throw ValueError("capacity = " + std::to_string(capacity) + " bytes; needed: " +
                       std::to_string(needed) + ", as tqai_cache_serialized_bytes says");
    }
    held.serialize([&at](std::span<const std::byte> bytes) {
      at = std::copy(bytes.begin(), bytes.end(), at);
    });
  });
}

tqai_status tqai_cache_deserialize(const void* bytes, size_t size, const char* level,
                                   tqai_cache** cache) {
  return guarded([&] {
    tqai_cache*& made = fresh(cache, "cache");
    const auto all = list_of(static_cast<const std::byte*>(bytes), size, "bytes");
    made = new tqai_cache{tqai::KvCache::deserialize(all, level_of(level))};
  });
}

tqai_status tqai_save(const char* path, const tqai_cache* const* layers, size_t count,
                      const char* header) {
  return guarded([&] {
    const std::filesystem::path to = path_of(path);
    std::vector<const tqai::KvCache*> caches;
    for (const tqai_cache* layer : list_of(layers, count, "layers")) {
      caches.push_back(&given(layer, "a layer").held);
    }
    tqai::save_caches(to, caches, header == nullptr ? "{}" : header);
  });
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
    }
    made = new tqai_cache{given(file, "file").held.load(tqai::layer_tensor(layer), settings)};
  });
}

tqai_status tqai_codebook_get(int32_t head_dim, int32_t bits, int32_t grid,
                              const tqai_codebook** codebook) {
  return guarded([&] {
    const tqai_codebook*& got = fresh(codebook, "codebook");
    const tqai::Codebook& held = tqai::codebook(head_dim, bits, grid_of(grid));
    got = reinterpret_cast<const tqai_codebook*>(&held);
  });
}

tqai_status tqai_codebook_centroids(const tqai_codebook* codebook, const float** centroids,
                                    size_t* count) {
  return guarded([&] {
    const auto held = book_of(codebook).centroids();
    (void)given(count, "count");
    given(centroids, "centroids") = held.data();
    *count = held.size();
  });
}

tqai_status tqai_codebook_boundaries(const tqai_codebook* codebook, const float** boundaries,
                                     size_t* count) {
  return guarded([&] {
    const auto held = book_of(codebook).boundaries();
    (void)given(count, "count");
    given(boundaries, "boundaries") = held.data();
    *count = held.size();
  });
}

tqai_status tqai_codebook_levels(const tqai_codebook* codebook, const int8_t** levels,
                                 size_t* count, float* step) {
  return guarded([&] {
    const tqai::Codebook& held = book_of(codebook);
    (void)given(count, "count");
    (void)given(step, "step");
    given(levels, "levels") = held.levels().data();
    *count = held.levels().size();
    *step = held.step();
  });
}

tqai_status tqai_codebook_distortion(const tqai_codebook* codebook, double* distortion) {
  return guarded([&] {
    const double held = book_of(codebook).distortion();
    given(distortion, "distortion") = held;
  });
}

tqai_status tqai_quantizer_create(const tqai_quantizer_options* options,
                                  tqai_quantizer** quantizer) {
  return guarded([&] {
    tqai_quantizer*& made = fresh(quantizer, "quantizer");
    const tqai_quantizer_options all = known(options, "options", tqai_quantizer_options_init);
    const tqai::RotationKind rotation = rotation_of(all.rotation);
    const tqai::Grid grid = grid_of(all.grid);
    std::unique_ptr<tqai::VectorQuantizer> held;
    if (all.unbiased != 0) {
      held = std::make_unique<tqai::ProdQuantizer>(tqai::ProdQuantizerOptions{
          all.head_dim, all.bits, rotation, all.seed, all.projection_seed, grid});
    } else {
      held = std::make_unique<tqai::Quantizer>(tqai::QuantizerOptions{
          all.head_dim, all.bits, rotation, all.seed, grid, all.norm_correction != 0});
    }
    made = new tqai_quantizer{std::move(held)};
  });
}

void tqai_quantizer_destroy(tqai_quantizer* quantizer) { delete quantizer; }

tqai_status tqai_quantizer_sizes(const tqai_quantizer* quantizer, size_t* code_bytes,
                                 int32_t* norms) {
  return guarded([&] {
    const tqai::VectorQuantizer& held = of(quantizer);
    (void)given(norms, "norms");
    given(code_bytes, "code_bytes") = held.code_bytes();
    *norms = held.norm_count();
  });
}

tqai_status tqai_quantizer_encode(const tqai_quantizer* quantizer, const float* vectors,
                                  int64_t rows, uint8_t* codes, uint16_t* norms) {
  return guarded([&] { of(quantizer).encode(vectors, rows, codes, norms); });
}

tqai_status tqai_quantizer_decode(const tqai_quantizer* quantizer, const uint8_t* codes,
                                  const uint16_t* norms, int64_t rows, float* vectors) {
  return guarded([&] { of(quantizer).decode(codes, norms, rows, vectors); });
}

tqai_status tqai_quantizer_inner_products(const tqai_quantizer* quantizer, const float* queries,
                                          int64_t query_rows, const uint8_t* codes,
                                          const uint16_t* norms, int64_t rows, float* products) {
  return guarded(
      [&] { of(quantizer).inner_products(queries, query_rows, codes, norms, rows, products); });
}
