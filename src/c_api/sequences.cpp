// Calls on many caches.
#include <tqai/sequences.hpp>

#include "calls.hpp"

using namespace tqai::c_api;

namespace {

template <typename Cache, typename Handle>
std::vector<Cache*> caches_of(Handle* const* handles, std::size_t count) {
  std::vector<Cache*> caches;
  for (Handle* handle : list_of(handles, count, "caches")) {
    caches.push_back(&given(handle, "one of the caches").held);
  }
  return caches;
}

}  // namespace

tqai_status tqai_caches_append(tqai_cache* const* caches, size_t count, const tqai_tensor* keys,
                               const tqai_tensor* values, const tqai_positions* positions,
                               const tqai_resources* resources) {
  return guarded([&] {
    const auto all = caches_of<tqai::KvCache>(caches, count);
    const auto given_keys = list_of(keys, count, "keys");
    const auto given_values = list_of(values, count, "values");
    std::vector<tqai::SequenceTokens> sequences;
    for (std::size_t i = 0; i < count; ++i) {
      sequences.push_back({all[i], tensor_of<tqai::ConstTensor>(&given_keys[i], "keys"),
                           tensor_of<tqai::ConstTensor>(&given_values[i], "values"),
                           positions_of(positions == nullptr ? nullptr : positions + i)});
    }
    tqai::append(sequences, resources_of(resources));
  });
}

tqai_status tqai_caches_append_packed(tqai_cache* const* caches, size_t count,
                                      const int64_t* tokens, const tqai_tensor* keys,
                                      const tqai_tensor* values, const tqai_positions* positions,
                                      const tqai_resources* resources) {
  return guarded([&] {
    tqai::append(caches_of<tqai::KvCache>(caches, count), list_of(tokens, count, "tokens"),
                 tensor_of<tqai::ConstTensor>(keys, "keys"),
                 tensor_of<tqai::ConstTensor>(values, "values"), positions_of(positions),
                 resources_of(resources));
  });
}

tqai_status tqai_caches_seal(tqai_cache* const* caches, size_t count, int64_t* held,
                             const tqai_resources* resources) {
  return guarded([&] {
    const std::int64_t exact =
        tqai::seal(caches_of<tqai::KvCache>(caches, count), resources_of(resources));
    if (held != nullptr) *held = exact;
  });
}

tqai_status tqai_caches_attend(const tqai_cache* const* caches, size_t count,
                               const tqai_tensor* queries, const tqai_output* outputs,
                               const tqai_attend_options* const* options,
                               const tqai_resources* resources) {
  return guarded([&] {
    const auto all = caches_of<const tqai::KvCache>(caches, count);
    const auto given_queries = list_of(queries, count, "queries");
    const auto given_outputs = list_of(outputs, count, "outputs");
    std::vector<tqai::SequenceQueries> sequences;
    for (std::size_t i = 0; i < count; ++i) {
      const tqai_attend_options* own = options == nullptr ? nullptr : options[i];
      sequences.push_back({all[i], tensor_of<tqai::ConstTensor>(&given_queries[i], "queries"),
                           tensor_of<tqai::Tensor>(&given_outputs[i], "outputs"),
                           attend_options_of(own).options});
      if (own != nullptr && own->size > offsetof(tqai_attend_options, resources) &&
          own->resources != nullptr) {
        throw tqai::ValueError("options[" + std::to_string(i) +
                               "]->resources is set; a call has one, its last argument");
      }
    }
    tqai::attend(sequences, resources_of(resources));
  });
}

tqai_status tqai_caches_attend_packed(const tqai_cache* const* caches, size_t count,
                                      const int64_t* tokens, const tqai_tensor* queries,
                                      const tqai_output* output,
                                      const tqai_attend_options* options) {
  return guarded([&] {
    const auto [settings, resources] = attend_options_of(options);
    tqai::attend(caches_of<const tqai::KvCache>(caches, count), list_of(tokens, count, "tokens"),
                 tensor_of<tqai::ConstTensor>(queries, "queries"),
                 tensor_of<tqai::Tensor>(output, "output"), settings, resources);
  });
}

tqai_status tqai_caches_crop(tqai_cache* const* caches, size_t count, const int64_t* tokens) {
  return guarded([&] {
    const auto all = caches_of<tqai::KvCache>(caches, count);
    const auto kept = list_of(tokens, count, "tokens");
    std::vector<tqai::SequenceLength> lengths;
    for (std::size_t i = 0; i < count; ++i) lengths.push_back({all[i], kept[i]});
    tqai::crop(lengths);
  });
}
