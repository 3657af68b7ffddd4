#include <pybind11/stl.h>

#include <tqai/sequences.hpp>

#include "bindings.hpp"
#include "locked.hpp"

namespace tqai::python {
namespace {

Resources on(int threads) {
  Resources resources;
  resources.threads = threads;
  return resources;
}

void append_sequences(const std::vector<LockedCache*>& caches,
                      const std::vector<std::int64_t>& counts, const py::tuple& keys,
                      const py::tuple& values, const std::optional<py::tuple>& positions,
                      int threads) {
  const ConstTensor k = reference_of(keys, "keys").constant("keys");
  const ConstTensor v = reference_of(values, "values").constant("values");
  std::optional<PositionTensor> p;
  if (positions) p = positions_of(*positions);
  LockedCaches(caches).change(
      [&](const std::vector<KvCache*>& held) { tqai::append(held, counts, k, v, p, on(threads)); });
}

void attend_sequences(const std::vector<LockedCache*>& caches,
                      const std::vector<std::int64_t>& counts, const py::tuple& queries,
                      const py::tuple& output, std::optional<float> scale, float soft_cap,
                      bool causal, std::int64_t window, std::uintptr_t sink_scores,
                      const std::optional<py::tuple>& log_sum_exp, int threads) {
  AttendOptions options;
  options.scale = scale;
  options.soft_cap = soft_cap;
  options.causal = causal;
  options.window = window;
  options.sink_scores = reinterpret_cast<const float*>(sink_scores);
  if (log_sum_exp) {
    options.log_sum_exp = reference_of(*log_sum_exp, "log_sum_exp").writable("log_sum_exp");
  }
  const ConstTensor query = reference_of(queries, "queries").constant("queries");
  const Tensor out = reference_of(output, "output").writable("output");
  LockedCaches(caches).read([&](const std::vector<const KvCache*>& held) {
    tqai::attend(held, counts, query, out, options, on(threads));
  });
}

}  // namespace

void bind_sequences(py::module_& module) {
  using py::arg;
  module.def(
      "append_sequences", &append_sequences, arg("caches"), arg("counts"), arg("keys"),
      arg("values"), arg("positions") = py::none(), arg("threads") = 0,
      R"(KvCache.append of many caches of one row and one geometry in one parallel region: the next
counts[i] tokens of keys [1, kv_heads, sum of counts, head_dim] and values [.., value_head_dim] go to
caches[i]; positions: [1, sections, sum of counts]. All or nothing, for all of them. A cache may come
once.)");
  module.def("attend_sequences", &attend_sequences, arg("caches"), arg("counts"), arg("queries"),
             arg("output"), arg("scale") = py::none(), arg("soft_cap") = 0.0F, arg("causal") = true,
             arg("window") = 0, arg("sink_scores") = 0, arg("log_sum_exp") = py::none(),
             arg("threads") = 0,
             R"(KvCache.attend of many caches in one parallel region: the next counts[i] of queries
[1, query_heads, sum of counts, head_dim] read caches[i], into output [1, sum of counts, query_heads,
value_head_dim]; log_sum_exp: [1, sum of counts, query_heads, 1].)");
  module.def(
      "seal_sequences",
      [](const std::vector<LockedCache*>& caches, int threads) {
        return LockedCaches(caches).change(
            [&](const std::vector<KvCache*>& held) { return tqai::seal(held, on(threads)); });
      },
      arg("caches"), arg("threads") = 0,
      "KvCache.seal of many caches in one parallel region; returns the most that one of them "
      "does.");
  module.def(
      "crop_sequences",
      [](const std::vector<LockedCache*>& caches, const std::vector<std::int64_t>& tokens) {
        if (tokens.size() != caches.size()) {
          throw ValueError(std::to_string(tokens.size()) + " lengths for " +
                           std::to_string(caches.size()) + " caches; one each is needed");
        }
        LockedCaches(caches).change([&](const std::vector<KvCache*>& held) {
          std::vector<SequenceLength> lengths;
          for (std::size_t i = 0; i < held.size(); ++i) lengths.push_back({held[i], tokens[i]});
          tqai::crop(lengths);
        });
      },
      arg("caches"), arg("tokens"), "KvCache.crop of many caches, each to its own length.");
}

}  // namespace tqai::python
