#include <tqai/c_api.h>

#include <algorithm>
#include <cstring>
#include <memory>
#include <new>
#include <string>
#include <tqai/cache.hpp>
#include <tqai/codebook.hpp>
#include <tqai/files.hpp>
#include <tqai/key_basis.hpp>
#include <tqai/quantizer.hpp>
#include <vector>

struct tqai_cache {
  tqai::KvCache held;
};
struct tqai_key_moments {
  tqai::KeyMoments held;
};
struct tqai_key_basis {
  std::shared_ptr<const tqai::KeyBasis> held;
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
T known(const T* structure, const char* name, void (*init)(T*, std::size_t)) {
  const std::size_t size = given(structure, name).size;
  constexpr std::size_t kLeast = sizeof(std::size_t) + sizeof(std::int32_t);
  if (size < kLeast || size > std::size_t{1} << 16) {
    throw ValueError(std::string(name) + "->size = " + std::to_string(size) +
                     "; fill the structure with its _init function first");
  }
  T copy;
  init(&copy, sizeof(T));
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

// Fills a structure of which the caller knows `size` bytes: with `defaults`, and 0 beyond them.
template <typename T>
void fill(T* structure, std::size_t size, T defaults) noexcept {
  if (structure == nullptr || size < sizeof(std::size_t)) return;
  std::memset(structure, 0, size);
  defaults.size = size;
  std::memcpy(structure, &defaults, std::min(size, sizeof(T)));
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

tqai::CodeKind codes_of(const char* name, std::int32_t codes) {
  return static_cast<tqai::CodeKind>(checked(name, codes, TQAI_CODES_TRELLIS));
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

std::vector<std::shared_ptr<const tqai::KeyBasis>> bases_of(const tqai_key_basis* const* bases,
                                                            std::size_t count) {
  std::vector<std::shared_ptr<const tqai::KeyBasis>> held;
  for (const tqai_key_basis* basis : list_of(bases, count, "key_bases")) {
    held.push_back(given(basis, "a key basis").held);
  }
  return held;
}

tqai::BasisAs basis_as(std::int32_t basis) {
  return static_cast<tqai::BasisAs>(checked("basis", basis, TQAI_BASIS_MATRICES));
}

// Throws unless so many bytes can be written to `to`.
std::byte* room(void* to, std::size_t capacity, std::size_t needed, const char* function) {
  if (capacity < needed) {
    throw ValueError("capacity = " + std::to_string(capacity) +
                     " bytes; needed: " + std::to_string(needed) + ", as " + function + " says");
  }
  return &given(static_cast<std::byte*>(to), "to");
}

std::size_t numbers(std::size_t rows, std::size_t columns) {
  if (columns > 0 && rows > PTRDIFF_MAX / sizeof(double) / columns) {
    throw ValueError("tokens = " + std::to_string(rows) + "; they fit into no memory");
  }
  return rows * columns;
}

std::size_t columns_of(const tqai_key_moments* moments) {
  return static_cast<std::size_t>(given(moments, "moments").held.head_dim());
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
static_assert(TQAI_BASIS_MATRICES == static_cast<int>(tqai::BasisAs::matrices));
static_assert(TQAI_GRID_INT8 == static_cast<int>(tqai::Grid::int8));

}  // namespace

uint32_t tqai_abi_version(void) { return TQAI_ABI_VERSION; }
const char* tqai_version(void) { return TQAI_VERSION; }
const char* tqai_last_error(void) { return t_message; }

tqai_status tqai_default_level(const char** name) {
  return guarded([&] { given(name, "name") = tqai::name_of(tqai::default_level()).data(); });
}

void tqai_cache_options_init(tqai_cache_options* options, size_t size) {
  const tqai::CacheOptions defaults;
  tqai_cache_options all{};
  all.batch = 1;
  all.bits_k = defaults.bits_k;
  all.bits_v = defaults.bits_v;
  all.sink_tokens = defaults.sink_tokens;
  all.residual_window = defaults.residual_window;
  all.seed = defaults.seed;
  fill(options, size, all);
}

void tqai_attend_options_init(tqai_attend_options* options, size_t size) {
  tqai_attend_options all{};
  all.causal = 1;
  fill(options, size, all);
}

void tqai_cache_info_init(tqai_cache_info* info, size_t size) { fill(info, size, {}); }
void tqai_memory_init(tqai_memory* memory, size_t size) { fill(memory, size, {}); }

void tqai_load_options_init(tqai_load_options* options, size_t size) {
  tqai_load_options all{};
  all.verify = 1;
  fill(options, size, all);
}

void tqai_quantizer_options_init(tqai_quantizer_options* options, size_t size) {
  const tqai::ProdQuantizerOptions defaults;
  tqai_quantizer_options all{};
  all.bits = defaults.bits;
  all.norm_correction = 1;
  all.seed = defaults.seed;
  all.projection_seed = defaults.projection_seed;
  fill(options, size, all);
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
    if (all.key_basis != nullptr) settings.key_basis = all.key_basis->held;
    settings.value_codes = codes_of("value_codes", all.value_codes);
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

tqai_status tqai_cache_leave_out(tqai_cache* cache, const uint8_t* hidden, size_t count) {
  return guarded([&] { given(cache, "cache").held.leave_out(list_of(hidden, count, "hidden")); });
}

tqai_status tqai_cache_left_out(const tqai_cache* cache, int32_t row, tqai_token_span* spans,
                                size_t capacity, size_t* count) {
  return guarded([&] {
    const std::vector<tqai::TokenSpan> held = given(cache, "cache").held.left_out(row);
    (void)given(count, "count");
    if (capacity > 0) (void)given(spans, "spans");
    for (std::size_t i = 0; i < std::min(capacity, held.size()); ++i) {
      spans[i] = {held[i].first, held[i].count};
    }
    *count = held.size();
  });
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
    answer.value_codes = static_cast<std::int32_t>(options.value_codes);
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
    answer.basis_bytes = report.basis_bytes;
    give(answer, memory, "memory");
  });
}

size_t tqai_allocated_bytes(void) { return tqai::allocated_bytes(); }

tqai_status tqai_cache_serialized_bytes(const tqai_cache* cache, size_t* bytes) {
  return tqai_cache_serialized_bytes_as(cache, TQAI_BASIS_ID, bytes);
}

tqai_status tqai_cache_serialized_bytes_as(const tqai_cache* cache, int32_t basis, size_t* bytes) {
  return guarded([&] {
    const tqai::KvCache& held = given(cache, "cache").held;
    given(bytes, "bytes") = held.serialized_bytes(basis_as(basis));
  });
}

tqai_status tqai_cache_serialize(const tqai_cache* cache, void* to, size_t capacity) {
  return tqai_cache_serialize_as(cache, TQAI_BASIS_ID, to, capacity);
}

tqai_status tqai_cache_serialize_as(const tqai_cache* cache, int32_t basis, void* to,
                                    size_t capacity) {
  return guarded([&] {
    const tqai::KvCache& held = given(cache, "cache").held;
    const tqai::BasisAs as = basis_as(basis);
    std::byte* at = room(to, capacity, held.serialized_bytes(as), "tqai_cache_serialized_bytes");
    held.serialize(
        [&at](std::span<const std::byte> bytes) { at = std::copy(bytes.begin(), bytes.end(), at); },
        as);
  });
}

tqai_status tqai_cache_deserialize(const void* bytes, size_t size, const char* level,
                                   tqai_cache** cache) {
  return tqai_cache_deserialize_with(bytes, size, level, nullptr, 0, cache);
}

tqai_status tqai_cache_deserialize_with(const void* bytes, size_t size, const char* level,
                                        const tqai_key_basis* const* bases, size_t count,
                                        tqai_cache** cache) {
  return guarded([&] {
    tqai_cache*& made = fresh(cache, "cache");
    const auto all = list_of(static_cast<const std::byte*>(bytes), size, "bytes");
    const auto known_bases = bases_of(bases, count);
    made = new tqai_cache{tqai::KvCache::deserialize(all, level_of(level), known_bases)};
  });
}

tqai_status tqai_key_moments_create(const tqai_cache_options* options, tqai_key_moments** moments) {
  return guarded([&] {
    tqai_key_moments*& made = fresh(moments, "moments");
    const tqai_cache_options all = known(options, "options", tqai_cache_options_init);
    made = new tqai_key_moments{tqai::KeyMoments(all.kv_heads, all.head_dim, rope_of(all))};
  });
}

void tqai_key_moments_destroy(tqai_key_moments* moments) { delete moments; }

tqai_status tqai_key_moments_add_keys(tqai_key_moments* moments, int32_t head, const float* keys,
                                      size_t tokens, const int64_t* positions, size_t count) {
  return guarded([&] {
    const std::size_t all = numbers(tokens, columns_of(moments));
    moments->held.add_keys(head, list_of(keys, all, "keys"),
                           list_of(positions, count, "positions"));
  });
}

tqai_status tqai_key_moments_add_queries(tqai_key_moments* moments, int32_t head,
                                         const float* queries, size_t tokens,
                                         const int64_t* positions, size_t count) {
  return guarded([&] {
    const std::size_t all = numbers(tokens, columns_of(moments));
    moments->held.add_queries(head, list_of(queries, all, "queries"),
                              list_of(positions, count, "positions"));
  });
}

tqai_status tqai_key_moments_add_prior(tqai_key_moments* moments, int32_t head, const double* keys,
                                       const double* queries, double tokens) {
  return guarded([&] {
    const std::size_t all = columns_of(moments) * columns_of(moments);
    moments->held.add_prior(head, list_of(keys, all, "keys"), list_of(queries, all, "queries"),
                            tokens);
  });
}

tqai_status tqai_key_basis_learn(const tqai_key_moments* moments, int32_t bits,
                                 int64_t last_position, tqai_key_basis** basis) {
  return guarded([&] {
    tqai_key_basis*& made = fresh(basis, "basis");
    const tqai::KeyMoments& seen = given(moments, "moments").held;
    made = new tqai_key_basis{
        std::make_shared<const tqai::KeyBasis>(tqai::KeyBasis::learn(seen, bits, last_position))};
  });
}

void tqai_key_basis_destroy(tqai_key_basis* basis) { delete basis; }

tqai_status tqai_key_basis_id(const tqai_key_basis* basis, uint64_t* id) {
  return guarded([&] { given(id, "id") = given(basis, "basis").held->id(); });
}

tqai_status tqai_key_basis_serialized_bytes(const tqai_key_basis* basis, size_t* bytes) {
  return guarded([&] { given(bytes, "bytes") = given(basis, "basis").held->serialize().size(); });
}

tqai_status tqai_key_basis_serialize(const tqai_key_basis* basis, void* to, size_t capacity) {
  return guarded([&] {
    const std::vector<std::byte> bytes = given(basis, "basis").held->serialize();
    std::copy(bytes.begin(), bytes.end(),
              room(to, capacity, bytes.size(), "tqai_key_basis_serialized_bytes"));
  });
}

tqai_status tqai_key_basis_deserialize(const void* bytes, size_t size, tqai_key_basis** basis) {
  return guarded([&] {
    tqai_key_basis*& made = fresh(basis, "basis");
    const auto all = list_of(static_cast<const std::byte*>(bytes), size, "bytes");
    made = new tqai_key_basis{
        std::make_shared<const tqai::KeyBasis>(tqai::KeyBasis::deserialize(all))};
  });
}

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
    const tqai::CodeKind codes = codes_of("codes", all.codes);
    std::unique_ptr<tqai::VectorQuantizer> held;
    if (all.unbiased != 0) {
      if (codes != tqai::CodeKind::scalar) {
        throw ValueError("codes = " + std::to_string(all.codes) +
                         " for an unbiased quantiser; allowed: TQAI_CODES_SCALAR, 0");
      }
      held = std::make_unique<tqai::ProdQuantizer>(tqai::ProdQuantizerOptions{
          all.head_dim, all.bits, rotation, all.seed, all.projection_seed, grid});
    } else {
      held = std::make_unique<tqai::Quantizer>(tqai::QuantizerOptions{
          all.head_dim, all.bits, rotation, all.seed, grid, all.norm_correction != 0, codes});
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
