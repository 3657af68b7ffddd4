// What all functions of <tqai/c_api.h> share: handles, how exceptions become statuses, and
// arguments that are checked.
#pragma once

#include <tqai/c_api.h>

#include <algorithm>
#include <cstring>
#include <memory>
#include <new>
#include <span>
#include <string>
#include <tqai/cache.hpp>
#include <tqai/error.hpp>
#include <tqai/files.hpp>
#include <tqai/key_basis.hpp>
#include <tqai/quantizer.hpp>
#include <tqai/resources.hpp>
#include <vector>

struct tqai_cache {
  tqai::KvCache held;
};
struct tqai_workspace {
  tqai::Workspace held;
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

namespace tqai::c_api {

// Keeps a thread's message for tqai_last_error.
void keep(const char* message) noexcept;

template <typename Call>
tqai_status guarded(const Call& call) noexcept {
  try {
    call();
    return TQAI_OK;
  } catch (const IndexError& error) {
    keep(error.what());
    return TQAI_INDEX_ERROR;
  } catch (const UnsupportedError& error) {
    keep(error.what());
    return TQAI_UNSUPPORTED;
  } catch (const FileError& error) {
    keep(error.what());
    return TQAI_FILE_ERROR;
  } catch (const MemoryLimitError& error) {
    keep(error.what());
    return TQAI_NO_MEMORY;
  } catch (const Error& error) {
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

// Bytes of a structure that the caller has room for.
template <typename T>
std::size_t room(const T* to, const char* name) {
  const std::size_t size = given(to, name).size;
  if (size < sizeof(std::size_t) || size > std::size_t{1} << 16) {
    throw ValueError(std::string(name) + "->size = " + std::to_string(size) +
                     "; fill the structure with its _init function first");
  }
  return size;
}

// Writes the members that the caller has room for.
template <typename T>
void give(T answer, T* to, const char* name) {
  const std::size_t size = room(to, name);
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

inline int checked(const char* name, std::int32_t value, int last) {
  if (value >= 0 && value <= last) return value;
  throw ValueError(std::string(name) + " = " + std::to_string(value) + "; allowed: 0 to " +
                   std::to_string(last));
}

inline DType dtype_of(std::int32_t dtype) {
  return static_cast<DType>(checked("dtype", dtype, TQAI_BF16));
}

inline RotationKind rotation_of(std::int32_t rotation) {
  return static_cast<RotationKind>(checked("rotation", rotation, TQAI_ROTATION_HAAR));
}

inline CodeKind codes_of(const char* name, std::int32_t codes) {
  return static_cast<CodeKind>(checked(name, codes, TQAI_CODES_TRELLIS));
}

inline std::optional<Level> level_of(const char* name) {
  if (name == nullptr) return std::nullopt;
  return level_from_name(name);
}

inline std::optional<Rope> rope_of(const tqai_cache_options& options) {
  if (options.rotary_dim == 0 && options.inv_freq == nullptr) return std::nullopt;
  if (options.rotary_dim < 2 || options.rotary_dim > options.head_dim) {
    throw ValueError("rotary_dim = " + std::to_string(options.rotary_dim) +
                     "; allowed: 2 to head_dim, or 0 and no inv_freq without an embedding");
  }
  const float* frequencies = &given(options.inv_freq, "inv_freq");
  const auto pairs = static_cast<std::size_t>(options.rotary_dim) / 2;
  Rope rope;
  rope.rotary_dim = options.rotary_dim;
  rope.layout =
      static_cast<Rope::Layout>(checked("rope_layout", options.rope_layout, TQAI_ROPE_INTERLEAVED));
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

inline Resources resources_of(const tqai_resources* given_ones) {
  Resources resources;
  if (given_ones == nullptr) return resources;
  const tqai_resources all = known(given_ones, "resources", tqai_resources_init);
  resources.threads = all.threads;
  if (all.parallel_for != nullptr) {
    resources.parallel_for = [run = all.parallel_for, user = all.user](
                                 std::int64_t count, const Resources::Work& work) {
      run(
          user, count,
          [](void* state, std::int64_t index) {
            (*static_cast<const Resources::Work*>(state))(index);
          },
          const_cast<Resources::Work*>(&work));
    };
  }
  if (all.workspace != nullptr) resources.workspace = &all.workspace->held;
  return resources;
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

inline Mask mask_of(const tqai_tensor& tensor) {
  Mask mask;
  mask.data = tensor.data;
  switch (checked("the mask's dtype", tensor.dtype, TQAI_BOOL)) {
    case TQAI_F32: mask.kind = Mask::Kind::f32; break;
    case TQAI_F16: mask.kind = Mask::Kind::f16; break;
    case TQAI_BF16: mask.kind = Mask::Kind::bf16; break;
    default: mask.kind = Mask::Kind::boolean; break;
  }
  std::copy_n(tensor.shape, 4, mask.shape.begin());
  std::copy_n(tensor.strides, 4, mask.strides.begin());
  return mask;
}

inline std::optional<PositionTensor> positions_of(const tqai_positions* positions) {
  if (positions == nullptr) return std::nullopt;
  PositionTensor places;
  // As of tensors: of nothing there may be no data.
  const bool any = std::ranges::find(positions->shape, 0) == std::end(positions->shape);
  places.data = any ? &given(positions->data, "positions->data") : positions->data;
  std::copy_n(positions->shape, 3, places.shape.begin());
  std::copy_n(positions->strides, 3, places.strides.begin());
  return places;
}

struct AttendSettings {
  AttendOptions options;
  Resources resources;
};

// options: NULL for the defaults.
inline AttendSettings attend_options_of(const tqai_attend_options* options) {
  AttendSettings settings;
  if (options == nullptr) return settings;
  const tqai_attend_options all = known(options, "options", tqai_attend_options_init);
  if (all.has_scale != 0) settings.options.scale = all.scale;
  settings.options.soft_cap = all.soft_cap;
  settings.options.causal = all.causal != 0;
  settings.options.window = all.window;
  settings.options.first_token = all.first_token;
  if (all.mask != nullptr) settings.options.mask = mask_of(*all.mask);
  settings.options.sink_scores = all.sink_scores;
  if (all.log_sum_exp != nullptr) {
    settings.options.log_sum_exp = tensor_of<Tensor>(all.log_sum_exp, "log_sum_exp");
  }
  settings.resources = resources_of(all.resources);
  return settings;
}

inline std::vector<std::shared_ptr<const KeyBasis>> bases_of(const tqai_key_basis* const* bases,
                                                             std::size_t count) {
  std::vector<std::shared_ptr<const KeyBasis>> held;
  for (const tqai_key_basis* basis : list_of(bases, count, "key_bases")) {
    held.push_back(given(basis, "a key basis").held);
  }
  return held;
}

inline BasisAs basis_as(std::int32_t basis) {
  return static_cast<BasisAs>(checked("basis", basis, TQAI_BASIS_MATRICES));
}

// Throws unless so many bytes can be written to `to`.
inline std::byte* room(void* to, std::size_t capacity, std::size_t needed, const char* function) {
  if (capacity < needed) {
    throw ValueError("capacity = " + std::to_string(capacity) +
                     " bytes; needed: " + std::to_string(needed) + ", as " + function + " says");
  }
  return &given(static_cast<std::byte*>(to), "to");
}

}  // namespace tqai::c_api
