// Caches and their bytes.
#include "calls.hpp"

using namespace tqai::c_api;
using tqai::ValueError;

namespace {

static_assert(TQAI_F16 == static_cast<int>(tqai::DType::f16) &&
              TQAI_BF16 == static_cast<int>(tqai::DType::bf16));
static_assert(TQAI_ROTATION_HAAR == static_cast<int>(tqai::RotationKind::haar));
static_assert(TQAI_CENTERING_ROPE == static_cast<int>(tqai::Centering::rope));
static_assert(TQAI_ROPE_INTERLEAVED == static_cast<int>(tqai::Rope::Layout::interleaved));
static_assert(TQAI_BASIS_MATRICES == static_cast<int>(tqai::BasisAs::matrices));
static_assert(TQAI_CODES_TRELLIS == static_cast<int>(tqai::CodeKind::trellis));

}  // namespace

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

void tqai_resources_init(tqai_resources* resources, size_t size) { fill(resources, size, {}); }
void tqai_cache_info_init(tqai_cache_info* info, size_t size) { fill(info, size, {}); }
void tqai_memory_init(tqai_memory* memory, size_t size) { fill(memory, size, {}); }
void tqai_block_init(tqai_block* block, size_t size) { fill(block, size, {}); }
void tqai_centre_init(tqai_centre* centre, size_t size) { fill(centre, size, {}); }

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
    settings.key_codes = codes_of("key_codes", all.key_codes);
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

tqai_status tqai_workspace_create(tqai_workspace** workspace) {
  return guarded([&] {
    tqai_workspace*& made = fresh(workspace, "workspace");
    made = new tqai_workspace;
  });
}

void tqai_workspace_destroy(tqai_workspace* workspace) { delete workspace; }

size_t tqai_workspace_bytes(const tqai_workspace* workspace) {
  return workspace == nullptr ? 0 : workspace->held.bytes();
}

tqai_status tqai_cache_append(tqai_cache* cache, const tqai_tensor* keys, const tqai_tensor* values,
                              const tqai_positions* positions) {
  return tqai_cache_append_with(cache, keys, values, positions, nullptr);
}

tqai_status tqai_cache_append_with(tqai_cache* cache, const tqai_tensor* keys,
                                   const tqai_tensor* values, const tqai_positions* positions,
                                   const tqai_resources* resources) {
  return guarded([&] {
    const auto places = positions_of(positions);
    given(cache, "cache")
        .held.append(tensor_of<tqai::ConstTensor>(keys, "keys"),
                     tensor_of<tqai::ConstTensor>(values, "values"), places,
                     resources_of(resources));
  });
}

tqai_status tqai_cache_seal(tqai_cache* cache, int64_t* held) {
  return tqai_cache_seal_with(cache, held, nullptr);
}

tqai_status tqai_cache_seal_with(tqai_cache* cache, int64_t* held,
                                 const tqai_resources* resources) {
  return guarded([&] {
    const std::int64_t exact = given(cache, "cache").held.seal(resources_of(resources));
    if (held != nullptr) *held = exact;
  });
}

tqai_status tqai_cache_attend(const tqai_cache* cache, const tqai_tensor* queries,
                              const tqai_output* output, const tqai_attend_options* options) {
  return guarded([&] {
    const auto [settings, resources] = attend_options_of(options);
    given(cache, "cache")
        .held.attend(tensor_of<tqai::ConstTensor>(queries, "queries"),
                     tensor_of<tqai::Tensor>(output, "output"), settings, resources);
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
    answer.key_codes = static_cast<std::int32_t>(options.key_codes);
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

tqai_status tqai_cache_reserve(tqai_cache* cache, int64_t tokens) {
  return guarded([&] { given(cache, "cache").held.reserve(tokens); });
}

tqai_status tqai_cache_sealed_blocks(const tqai_cache* cache, int32_t row, tqai_block* blocks,
                                     size_t capacity, size_t* count) {
  return guarded([&] {
    const std::vector<tqai::SealedBlock> held = given(cache, "cache").held.sealed_blocks(row);
    (void)given(count, "count");
    if (capacity > 0) (void)given(blocks, "blocks");
    const std::size_t step = capacity > 0 ? blocks->size : 0;
    // A caller's array has elements of the caller's size.
    const auto place = [&](std::size_t i) {
      return reinterpret_cast<tqai_block*>(reinterpret_cast<char*>(blocks) + i * step);
    };
    const std::size_t answers = std::min(capacity, held.size());
    for (std::size_t i = 0; i < answers; ++i) (void)room(place(i), "blocks[…]");
    for (std::size_t i = 0; i < answers; ++i) {
      const tqai::SealedBlock& block = held[i];
      tqai_block answer{};
      answer.first_token = block.first_token;
      answer.tokens = block.tokens;
      answer.centre_set = block.centre_set;
      answer.first_position = block.first_position;
      if (!block.positions.empty()) {
        answer.positions = block.positions.data();
        answer.sections = static_cast<std::int32_t>(block.positions.size() / tqai::kTileTokens);
      }
      answer.tiles = block.tiles.data();
      answer.tile_bytes = block.layout->bytes();
      answer.value_codes = block.layout->value_codes();
      answer.key_norms = block.layout->key_norms();
      answer.value_norms = block.layout->value_norms();
      give(answer, place(i), "blocks[…]");
    }
    *count = held.size();
  });
}

tqai_status tqai_cache_centre(const tqai_cache* cache, int32_t row, int32_t set, int32_t head,
                              tqai_centre* centre) {
  return guarded([&] {
    const tqai::CentreView view = given(cache, "cache").held.centre(row, set, head);
    tqai_centre answer{};
    answer.kind = static_cast<std::int32_t>(view.kind);
    answer.pairs = static_cast<std::int32_t>(view.real.size());
    answer.constant = view.constant.data();
    if (answer.pairs > 0) {
      answer.real = view.real.data();
      answer.imaginary = view.imaginary.data();
    }
    give(answer, centre, "centre");
  });
}

size_t tqai_allocated_bytes(void) { return tqai::allocated_bytes(); }
void tqai_limit_memory(size_t bytes) { tqai::limit_memory(bytes); }

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
