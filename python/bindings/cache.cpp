#include <pybind11/native_enum.h>
#include <pybind11/numpy.h>
#include <pybind11/stl.h>

#include <limits>
#include <memory>
#include <optional>
#include <tuple>
#include <variant>
#include <vector>

#include "bindings.hpp"
#include "locked.hpp"

namespace tqai::python {
namespace {

Centering centering_from_name(const std::string& name) {
  if (name == "auto") return Centering::automatic;
  if (name == "none") return Centering::none;
  if (name == "mean") return Centering::mean;
  if (name == "rope") return Centering::rope;
  throw ValueError("centering = \"" + name + "\"; allowed: auto, none, mean, rope");
}

const char* name_of(Centering centering) {
  switch (centering) {
    case Centering::none: return "none";
    case Centering::mean: return "mean";
    case Centering::rope: return "rope";
    default: return "auto";
  }
}

ElementType type_of(DType dtype) {
  return dtype == DType::f32   ? ElementType::float32
         : dtype == DType::f16 ? ElementType::float16
                               : ElementType::bfloat16;
}

using CachePointer = std::unique_ptr<LockedCache>;

CachePointer make_cache(int batch, int kv_heads, int head_dim, int value_head_dim,
                        ElementType dtype, int bits_k, int bits_v, int sink_tokens,
                        int residual_window, const std::string& rotation,
                        const std::string& centering, const std::optional<RopeArguments>& rope,
                        std::uint64_t seed, const std::optional<std::string>& level,
                        const std::optional<std::shared_ptr<KeyBasis>>& key_basis,
                        const std::string& value_codes, const std::string& key_codes) {
  CacheOptions options;
  options.key_codes = codes_from_name("key_codes", key_codes);
  options.value_codes = codes_from_name("value_codes", value_codes);
  if (key_basis) options.key_basis = *key_basis;
  options.kv_heads = kv_heads;
  options.head_dim = head_dim;
  options.value_head_dim = value_head_dim;
  if (dtype == ElementType::boolean) {
    throw ValueError("dtype = bool; allowed: float32, float16, bfloat16");
  }
  options.dtype = dtype == ElementType::float32   ? DType::f32
                  : dtype == ElementType::float16 ? DType::f16
                                                  : DType::bf16;
  options.bits_k = bits_k;
  options.bits_v = bits_v;
  options.sink_tokens = sink_tokens;
  options.residual_window = residual_window;
  options.rotation = rotation_from_name(rotation);
  options.centering = centering_from_name(centering);
  if (rope) options.rope = make_rope(*rope);
  options.seed = seed;
  if (level) options.level = level_from_name(*level);
  const py::gil_scoped_release release;  // codebooks and rotations take a while the first time
  return std::make_unique<LockedCache>(KvCache(options, batch));
}

// With at most so many of OpenMP's threads.
Resources on(int threads) {
  Resources resources;
  resources.threads = threads;
  return resources;
}

void attend(const LockedCache& cache, const py::tuple& queries, const py::tuple& output,
            std::optional<float> scale, float soft_cap, bool causal, std::int64_t window,
            std::int64_t first_token, const std::optional<py::tuple>& mask,
            std::uintptr_t sink_scores, const std::optional<py::tuple>& log_sum_exp, int threads) {
  AttendOptions options;
  options.scale = scale;
  options.soft_cap = soft_cap;
  options.causal = causal;
  options.window = window;
  options.first_token = first_token;
  if (mask) options.mask = reference_of(*mask, "mask").mask();
  options.sink_scores = reinterpret_cast<const float*>(sink_scores);
  if (log_sum_exp) {
    options.log_sum_exp = reference_of(*log_sum_exp, "log_sum_exp").writable("log_sum_exp");
  }
  const ConstTensor query = reference_of(queries, "queries").constant("queries");
  const Tensor out = reference_of(output, "output").writable("output");
  cache.read([&](const KvCache& held) { held.attend(query, out, options, on(threads)); });
}

py::dict memory(const LockedCache& cache) {
  const MemoryReport report = cache.read([](const KvCache& held) { return held.memory(); });
  py::dict result;
  result["tokens"] = report.tokens;
  result["packed_tokens"] = report.packed_tokens;
  result["packed_bytes"] = report.packed_bytes;
  result["exact_bytes"] = report.exact_bytes;
  result["overhead_bytes"] = report.overhead_bytes;
  result["mapped_bytes"] = report.mapped_bytes;
  result["basis_bytes"] = report.basis_bytes;
  result["total_bytes"] = report.total_bytes();
  result["uncompressed_bytes"] = report.uncompressed_bytes;
  return result;
}

// R [dim, dim], row-major, of y = R x.
py::array_t<float> matrix_of(const Rotation& rotation) {
  const py::ssize_t dim = rotation.head_dim();
  py::array_t<float> matrix({dim, dim});
  float* rows = matrix.mutable_data();
  for (py::ssize_t i = 0; i < dim * dim; ++i) rows[i] = i % (dim + 1) == 0 ? 1.0F : 0.0F;
  rotation.apply_transposed(rows, rows, dim);  // row i becomes R's row i
  return matrix;
}

py::bytes serialize(const LockedCache& cache, bool with_basis) {
  const BasisAs basis = with_basis ? BasisAs::matrices : BasisAs::id;
  const std::vector<std::byte> bytes =
      cache.read([basis](const KvCache& held) { return held.serialize(basis); });
  return {reinterpret_cast<const char*>(bytes.data()), bytes.size()};
}

CachePointer deserialize(const py::buffer& data, const std::optional<std::string>& level,
                         const std::vector<std::shared_ptr<KeyBasis>>& key_bases) {
  const py::buffer_info info = data.request();
  if (info.ndim != 1 || info.itemsize != 1 || (info.size > 1 && info.strides[0] != 1)) {
    throw ValueError("data is not a contiguous one-dimensional buffer of bytes");
  }
  const std::span<const std::byte> bytes(static_cast<const std::byte*>(info.ptr),
                                         static_cast<std::size_t>(info.size));
  std::optional<Level> chosen;
  if (level) chosen = level_from_name(*level);
  const py::gil_scoped_release release;
  return std::make_unique<LockedCache>(KvCache::deserialize(bytes, chosen, bases_of(key_bases)));
}

// At the level it had where this machine has it, else at the best one; results are the same.
CachePointer unpickle(const py::tuple& state) {
  if (state.size() != 2) throw ValueError("not the state of a pickled KvCache");
  const auto level = state[1].cast<std::string>();
  for (const Level available : available_levels()) {
    if (name_of(available) == level) return deserialize(state[0].cast<py::buffer>(), level, {});
  }
  return deserialize(state[0].cast<py::buffer>(), std::nullopt, {});
}

// An array over memory that `owner` keeps, not to be written.
template <typename T>
py::array_t<T> view_of(const T* data, std::vector<py::ssize_t> shape, const py::object& owner) {
  py::array_t<T> array(std::move(shape), data, owner);
  array.attr("setflags")(false);
  return array;
}

py::list sealed_blocks(const LockedCache& cache, int row) {
  // A copy shares the tiles, and keeps them while arrays look at them.
  auto kept = std::make_unique<KvCache>(cache.read([](const KvCache& held) { return held; }));
  const KvCache& held = *kept;
  const std::vector<SealedBlock> blocks = held.sealed_blocks(row);
  const py::capsule owner(kept.release(),
                          [](void* memory) { delete static_cast<KvCache*>(memory); });
  const py::ssize_t heads = held.options().kv_heads;
  py::list result;
  for (const SealedBlock& block : blocks) {
    py::dict entry;
    entry["first_token"] = block.first_token;
    entry["tokens"] = block.tokens;
    entry["first_position"] = block.first_position;
    entry["positions"] = py::none();
    if (!block.positions.empty()) {
      entry["positions"] = view_of(
          block.positions.data(),
          {static_cast<py::ssize_t>(block.positions.size()) / kTileTokens, kTileTokens}, owner);
    }
    entry["centre_set"] = block.centre_set;
    entry["tiles"] = view_of(reinterpret_cast<const std::uint8_t*>(block.tiles.data()),
                             {heads, static_cast<py::ssize_t>(block.layout->bytes())}, owner);
    result.append(entry);
  }
  return result;
}

py::dict tile_layout(const LockedCache& cache) {
  const TileLayout& layout = cache.tile_layout();
  py::dict result;
  result["bytes"] = layout.bytes();
  result["key_codes"] = layout.key_codes();
  result["value_codes"] = layout.value_codes();
  result["key_norms"] = layout.key_norms();
  result["value_norms"] = layout.value_norms();
  return result;
}

py::tuple centre(const LockedCache& cache, int row, int set, int head) {
  const auto copied = [](std::span<const float> numbers) {
    return std::vector<float>(numbers.begin(), numbers.end());
  };
  const auto [kind, constant, real, imaginary] = cache.peek([&](const KvCache& held) {
    const CentreView view = held.centre(row, set, head);
    return std::tuple(view.kind, copied(view.constant), copied(view.real), copied(view.imaginary));
  });
  return py::make_tuple(name_of(kind), py::array_t<float>(py::cast(constant)),
                        py::array_t<float>(py::cast(real)),
                        py::array_t<float>(py::cast(imaginary)));
}

CachePointer copy(const LockedCache& cache) {
  return std::make_unique<LockedCache>(cache.read([](const KvCache& held) { return held; }));
}

// A property or method that reads a number.
template <typename Result>
auto peek(Result (KvCache::*member)() const) {
  return [member](const LockedCache& cache) {
    return cache.peek([member](const KvCache& held) { return (held.*member)(); });
  };
}

}  // namespace

Rope make_rope(const RopeArguments& arguments) {
  const auto* whole = std::get_if<RopeOfSections>(&arguments);
  const auto& [inv_freq, layout, rotary_dim, sections] =
      whole != nullptr ? *whole
                       : std::tuple_cat(std::get<1>(arguments), std::tuple(std::vector<int>{}));
  if (layout != "half_split" && layout != "interleaved") {
    throw ValueError("rope layout = \"" + layout + "\"; allowed: half_split, interleaved");
  }
  Rope rope{inv_freq,
            layout == "interleaved" ? Rope::Layout::interleaved : Rope::Layout::half_split,
            rotary_dim};
  for (const int section : sections) {
    if (section < 0 || section >= Rope::kMaxSections) {
      throw ValueError("rope section = " + std::to_string(section) + "; allowed: 0…" +
                       std::to_string(Rope::kMaxSections - 1));
    }
    rope.sections.push_back(static_cast<std::uint8_t>(section));
  }
  return rope;
}

std::vector<std::shared_ptr<const KeyBasis>> bases_of(
    const std::vector<std::shared_ptr<KeyBasis>>& bases) {
  return {bases.begin(), bases.end()};
}

void bind_cache(py::module_& module) {
  py::native_enum<ElementType>(module, "DType", "enum.Enum",
                               "Element types of tensors; bool for masks alone.")
      .value("float32", ElementType::float32)
      .value("float16", ElementType::float16)
      .value("bfloat16", ElementType::bfloat16)
      .value("bool", ElementType::boolean)
      .finalize();

  module.def("allocated_bytes", &allocated_bytes, "Bytes now held by all caches of this process.");

  using py::arg;
  using py::kw_only;
  module.def(
      "limit_memory", &limit_memory, arg("bytes"),
      R"(From now on a call that would make allocated_bytes() more than this raises MemoryError, with
nothing changed; 0: no limit.)");
  module.def(
      "borrowed", &borrowed, arg("array"), arg("dtype") = py::none(),
      R"((address, DType, shape, strides in elements) of an array with the buffer protocol: numpy's,
or mlx's, which is evaluated for it; and True behind these where it is read-only, and so is no place
for results. The caller keeps it alive. dtype says what the elements are
where the buffer does not. ValueError for elements of another kind or size.)");

  py::class_<LockedCache>(module, "KvCache", R"(Compressed keys and values of one attention layer.

Tensors are passed as (address, DType, shape, strides in elements), 4-dimensional, the last stride
1; the caller keeps them alive during the call. The GIL is released while numbers are moved. Any
thread may call any method at any time: those that change the cache wait for the others. All or
nothing: a method that raises leaves the cache as it was. rope: (inv_freq, "half_split" or
"interleaved", rotary_dim) that the keys have gone through, and the section of each frequency.
key_basis: what keys are quantised in, in place of a rotation. value_codes: "scalar", or "trellis" for
1 to 4 bits. key_codes: the same of keys in a basis, for 2 to 4 bits. See include/tqai/cache.hpp.)")
      .def(py::init(&make_cache), kw_only(), arg("batch"), arg("kv_heads"), arg("head_dim"),
           arg("value_head_dim") = 0, arg("dtype") = ElementType::float32, arg("bits_k") = 4,
           arg("bits_v") = 2, arg("sink_tokens") = 4, arg("residual_window") = 128,
           arg("rotation") = "auto", arg("centering") = "auto", arg("rope") = py::none(),
           arg("seed") = CacheOptions{}.seed, arg("level") = py::none(),
           arg("key_basis") = py::none(), arg("value_codes") = "scalar",
           arg("key_codes") = "scalar")
      .def_property_readonly("batch", peek(&KvCache::batch))
      .def_property_readonly("kv_heads", [](const LockedCache& c) { return c.options().kv_heads; })
      .def_property_readonly("head_dim", [](const LockedCache& c) { return c.options().head_dim; })
      .def_property_readonly("value_head_dim",
                             [](const LockedCache& c) { return c.options().value_head_dim; })
      .def_property_readonly("dtype",
                             [](const LockedCache& c) { return type_of(c.options().dtype); })
      .def_property_readonly(
          "level", [](const LockedCache& c) { return std::string(name_of(*c.options().level)); })
      .def_property_readonly("tokens", peek(&KvCache::tokens),
                             "Tokens appended and not cropped, the same for each row.")
      .def_property_readonly("first_token", peek(&KvCache::first_token),
                             "First token that some row still holds.")
      .def(
          "packed_tokens",
          [](const LockedCache& cache, int row) {
            return cache.peek([row](const KvCache& held) { return held.packed_tokens(row); });
          },
          arg("row"), "Tokens of a row held as codes.")
      .def(
          "centering",
          [](const LockedCache& cache, int row, int head) -> std::optional<std::string> {
            const auto kind =
                cache.peek([&](const KvCache& held) { return held.centering(row, head); });
            return kind ? std::optional<std::string>(name_of(*kind)) : std::nullopt;
          },
          arg("row"), arg("head"),
          "What the keys sealed last are centred on; None before anything was sealed.")
      .def(
          "centre_sets",
          [](const LockedCache& cache, int row) {
            return cache.peek([row](const KvCache& held) { return held.centre_sets(row); });
          },
          arg("row"), "Sets of centres that the tiles of a row refer to.")
      .def(
          "append",
          [](LockedCache& cache, const py::tuple& keys, const py::tuple& values,
             const std::optional<py::tuple>& positions, int threads) {
            const ConstTensor k = reference_of(keys, "keys").constant("keys");
            const ConstTensor v = reference_of(values, "values").constant("values");
            std::optional<PositionTensor> p;
            if (positions) p = positions_of(*positions);
            cache.change([&](KvCache& held) { held.append(k, v, p, on(threads)); });
          },
          arg("keys"), arg("values"), arg("positions") = py::none(), arg("threads") = 0,
          R"(Adds tokens: keys [batch, kv_heads, n, head_dim], values [.., value_head_dim]. positions:
(address of int64, shape, strides) of [batch or 1, sections or 1, n], what the keys were turned by;
None: each token is one further than the one before. threads: at most so many, here and below; 0: as
many as OpenMP gives.)")
      .def(
          "seal",
          [](LockedCache& cache, int threads) {
            return cache.change([=](KvCache& held) { return held.seal(on(threads)); });
          },
          arg("threads") = 0,
          R"(Compresses what has left the residual window; returns how many tokens of a row cannot be,
because of a vector that is too long for a tile.)")
      .def("attend", &attend, arg("queries"), arg("output"), arg("scale") = py::none(),
           arg("soft_cap") = 0.0F, arg("causal") = true, arg("window") = 0, arg("first_token") = 0,
           arg("mask") = py::none(), arg("sink_scores") = 0, arg("log_sum_exp") = py::none(),
           arg("threads") = 0,
           R"(Softmax attention of the last n tokens' queries [batch, query_heads, n, head_dim] into
output [batch, n, query_heads, value_head_dim]. mask: [batch or 1, query_heads or 1, n,
tokens - first_token], bool or float; sink_scores: address of [query_heads] float32, or 0;
log_sum_exp: [batch, n, query_heads, 1] float32, written: log of the sum of exp(score) over what each
query saw, by which outputs over different tokens merge.)")
      .def(
          "gather",
          [](const LockedCache& cache, std::int64_t first, const py::tuple& keys,
             const py::tuple& values) {
            const Tensor k = reference_of(keys, "keys").writable("keys");
            const Tensor v = reference_of(values, "values").writable("values");
            cache.read([&](const KvCache& held) { held.gather(first, k, v); });
          },
          arg("first"), arg("keys"), arg("values"),
          "Decompresses the tokens from `first` on; padding and discarded ones become zeros.")
      .def(
          "crop",
          [](LockedCache& cache, std::int64_t tokens) {
            cache.change([tokens](KvCache& held) { held.crop(tokens); });
          },
          arg("tokens"), "Forgets all tokens from `tokens` on.")
      .def(
          "select",
          [](LockedCache& cache, const std::vector<std::int64_t>& rows) {
            cache.change([&](KvCache& held) { held.select(rows); });
          },
          arg("rows"), "Row i becomes a copy of row rows[i]; tiles are shared.")
      .def(
          "set_padding",
          [](LockedCache& cache, const std::vector<std::int64_t>& counts) {
            cache.change([&](KvCache& held) { held.set_padding(counts); });
          },
          arg("counts"), "The first counts[row] tokens of each row are padding.")
      .def(
          "leave_out",
          [](LockedCache& cache, const std::vector<std::uint8_t>& hidden) {
            cache.change([&](KvCache& held) { held.leave_out(hidden); });
          },
          arg("hidden"),
          R"(Takes those of the last n tokens out of the rows that no query will ever see. hidden:
[batch · n] bytes, not 0 for these.)")
      .def(
          "left_out",
          [](const LockedCache& cache, int row) {
            std::vector<std::pair<std::int64_t, std::int64_t>> spans;
            for (const TokenSpan& span :
                 cache.peek([&](const KvCache& held) { return held.left_out(row); })) {
              spans.emplace_back(span.first, span.count);
            }
            return spans;
          },
          arg("row"), "What leave_out() has taken out of a row: first token and count, each.")
      .def(
          "discard_before",
          [](LockedCache& cache, std::int64_t token) {
            cache.change([token](KvCache& held) { held.discard_before(token); });
          },
          arg("token"), "Frees what only tokens before `token` need.")
      .def(
          "reserve",
          [](LockedCache& cache, std::int64_t tokens) {
            cache.change([tokens](KvCache& held) { held.reserve(tokens); });
          },
          arg("tokens"),
          R"(Sets memory aside in each row for the tiles of `tokens` tokens in all: MemoryError comes now, and
not when they are sealed.)")
      .def(
          "sealed_blocks", &sealed_blocks, arg("row"),
          R"(What is sealed of a row, in order: dicts with first_token, tokens (the first ones of 64 that the
row has), first_position, positions ([sections, 64] int32, or None where they follow one another),
centre_set, and tiles [kv_heads, bytes] uint8. The arrays are views that cannot be written; they keep
the tiles, whatever becomes of the cache. What is in a tile: tile_layout, docs/format.md.)")
      .def_property_readonly("tile_layout", &tile_layout,
                             "Bytes of a head's tile, and the offsets of its four parts.")
      .def(
          "centre", &centre, arg("row"), arg("set"), arg("head"),
          R"(What keys of a row's blocks of a centre set are centred on: its kind, the constant [head_dim],
and real and imaginary parts of what turns with the position [pairs].)")
      .def("memory", &memory, "Bytes held, by part.")
      .def_property_readonly(
          "rotations",
          [](const LockedCache& c) {
            return py::make_tuple(matrix_of(c.key_rotation()), matrix_of(c.value_rotation()));
          },
          R"(Matrices R [dim, dim] float32 that keys and values are turned by: y = R x. ValueError where keys
are in a basis.)")
      .def_readonly_static("max_norm", &KvCache::kMaxNorm,
                           "Largest norm of a key or value that is compressed.")
      .def_property_readonly(
          "key_basis",
          [](const LockedCache& c) {
            const auto& basis = c.options().key_basis;
            return basis ? std::optional(std::const_pointer_cast<KeyBasis>(basis)) : std::nullopt;
          },
          "What keys are quantised in; None: the rotation.")
      .def_property_readonly(
          "value_codes",
          [](const LockedCache& c) { return std::string(name_of(c.options().value_codes)); },
          R"(What codes of values stand for: "scalar" or "trellis".)")
      .def_property_readonly(
          "key_codes",
          [](const LockedCache& c) { return std::string(name_of(c.options().key_codes)); },
          R"(What codes of keys stand for: "scalar" or "trellis".)")
      .def(
          "serialize", &serialize, arg("with_basis") = false,
          R"(The cache as bytes, for files and other processes. Of a basis that keys are in, its id is
written, and with with_basis all of it.)")
      .def_static(
          "deserialize", &deserialize, arg("data"), kw_only(), arg("level") = py::none(),
          arg("key_bases") = py::tuple(),
          R"(The cache that serialize() wrote; ValueError for bytes that it did not write. key_bases: those
that its keys may be in.)")
      .def(py::pickle(
          [](const LockedCache& cache) {
            return py::make_tuple(serialize(cache, true),
                                  std::string(name_of(*cache.options().level)));
          },
          &unpickle))
      .def("copy", &copy, "A copy that shares the tiles.")
      .def("__copy__", &copy)
      .def(
          "__deepcopy__", [](const LockedCache& cache, const py::dict&) { return copy(cache); },
          arg("memo"));
}

}  // namespace tqai::python
