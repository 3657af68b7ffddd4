// Bases for keys.
#include "calls.hpp"

using namespace tqai::c_api;
using tqai::ValueError;

namespace {

std::size_t numbers(std::size_t rows, std::size_t columns) {
  if (columns > 0 && rows > PTRDIFF_MAX / sizeof(double) / columns) {
    throw ValueError("tokens = " + std::to_string(rows) + "; they fit into no memory");
  }
  return rows * columns;
}

std::size_t columns_of(const tqai_key_moments* moments) {
  return static_cast<std::size_t>(given(moments, "moments").held.head_dim());
}

}  // namespace

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
