#include "model.hpp"

#include <ggml-cpu.h>

#include <cmath>
#include <fstream>
#include <map>
#include <optional>
#include <set>
#include <stdexcept>
#include <utility>

namespace ggml_runtime {
namespace {

// The metadata of a file, by name.
class Metadata {
 public:
  explicit Metadata(const gguf_context* file) : file_(file) {}

  bool has(const std::string& key) const { return find(key) >= 0; }

  std::string text(const std::string& key) const {
    return gguf_get_val_str(file_, require(key, GGUF_TYPE_STRING));
  }
  int number(const std::string& key) const {
    return static_cast<int>(gguf_get_val_u32(file_, require(key, GGUF_TYPE_UINT32)));
  }
  int number(const std::string& key, int otherwise) const {
    return has(key) ? number(key) : otherwise;
  }
  float real(const std::string& key) const {
    return gguf_get_val_f32(file_, require(key, GGUF_TYPE_FLOAT32));
  }
  float real(const std::string& key, float otherwise) const {
    return has(key) ? real(key) : otherwise;
  }

 private:
  std::int64_t find(const std::string& key) const { return gguf_find_key(file_, key.c_str()); }

  std::int64_t require(const std::string& key, gguf_type type) const {
    const std::int64_t id = find(key);
    if (id < 0) throw std::runtime_error("the file says nothing of " + key);
    if (gguf_get_kv_type(file_, id) != type) {
      throw std::runtime_error(key + " is of type " + gguf_type_name(gguf_get_kv_type(file_, id)) +
                               "; expected " + gguf_type_name(type));
    }
    return id;
  }

  const gguf_context* file_;
};

// Where a matrix that products are made with lies: in the first of the CPU's extra buffers, which
// keep weights interleaved for its kernels, that takes it.
ggml_backend_buffer_type_t buffer_for_products(ggml_tensor* like) {
  const ggml_backend_dev_t device = ggml_backend_dev_by_type(GGML_BACKEND_DEVICE_TYPE_CPU);
  const auto extra_types =
      reinterpret_cast<ggml_backend_dev_get_extra_bufts_t>(ggml_backend_reg_get_proc_address(
          ggml_backend_dev_backend_reg(device), "ggml_backend_dev_get_extra_bufts"));
  ggml_backend_buffer_type_t* types = extra_types != nullptr ? extra_types(device) : nullptr;
  for (; types != nullptr && *types != nullptr; ++types) {
    // As the product would be: what a buffer takes depends on the whole operation.
    const ggml_context_ptr context(ggml_init({8 * ggml_tensor_overhead(), nullptr, true}));
    ggml_tensor* matrix = ggml_dup_tensor(context.get(), like);
    const ggml_backend_buffer_ptr empty(ggml_backend_buft_alloc_buffer(*types, 0));
    matrix->buffer = empty.get();
    ggml_tensor* rows = ggml_new_tensor_2d(context.get(), GGML_TYPE_F32, like->ne[0], 512);
    if (ggml_backend_dev_supports_op(device, ggml_mul_mat(context.get(), matrix, rows))) {
      return *types;
    }
  }
  return ggml_backend_cpu_buffer_type();
}

// The tensors of a file, each read into the memory where it is computed with.
class Weights {
 public:
  Weights(std::string path, const gguf_context* file, ggml_context* shapes)
      : path_(std::move(path)), file_(file), shapes_(shapes) {}

  // As it lies in the file; null where there is none.
  ggml_tensor* find(const std::string& name) {
    return place(name, [](ggml_tensor*) { return ggml_backend_cpu_buffer_type(); });
  }
  ggml_tensor* get(const std::string& name) { return required(find(name), name); }
  // A matrix that products are made with.
  ggml_tensor* matrix(const std::string& name) {
    return required(place(name, buffer_for_products), name);
  }

  // Throws where the file has tensors that nobody asked for: the model is another then.
  void check_all_used() const {
    for (std::int64_t i = 0; i < gguf_get_n_tensors(file_); ++i) {
      const std::string name = gguf_get_tensor_name(file_, i);
      if (!used_.contains(name)) {
        throw std::runtime_error("the model has " + name + ", which this program does not compute");
      }
    }
  }

  void read(std::vector<ggml_context_ptr>& contexts,
            std::vector<ggml_backend_buffer_ptr>& buffers) {
    std::ifstream stream(path_, std::ios::binary);
    for (auto& [type, context] : contexts_) {
      buffers.emplace_back(ggml_backend_alloc_ctx_tensors_from_buft(context.get(), type));
      if (buffers.back() == nullptr) throw std::runtime_error("no memory for the weights");
      ggml_backend_buffer_set_usage(buffers.back().get(), GGML_BACKEND_BUFFER_USAGE_WEIGHTS);
      contexts.push_back(std::move(context));
    }
    std::vector<char> bytes;
    for (const auto& [tensor, id] : ids_) {
      bytes.resize(ggml_nbytes(tensor));
      stream.seekg(static_cast<std::streamoff>(gguf_get_data_offset(file_) +
                                               gguf_get_tensor_offset(file_, id)));
      stream.read(bytes.data(), static_cast<std::streamsize>(bytes.size()));
      if (!stream) throw std::runtime_error(path_ + " ends within " + tensor->name);
      ggml_backend_tensor_set(tensor, bytes.data(), 0, bytes.size());
    }
  }

 private:
  template <typename ChooseBuffer>
  ggml_tensor* place(const std::string& name, ChooseBuffer choose) {
    const std::int64_t id = gguf_find_tensor(file_, name.c_str());
    if (id < 0) return nullptr;
    ggml_tensor* like = ggml_get_tensor(shapes_, name.c_str());
    ggml_context_ptr& context = contexts_[choose(like)];
    if (context == nullptr) {
      // One more than there are: the embedding can also be the output.
      const auto count = static_cast<std::size_t>(gguf_get_n_tensors(file_) + 1);
      context.reset(ggml_init({count * ggml_tensor_overhead(), nullptr, true}));
    }
    ggml_tensor* tensor = ggml_dup_tensor(context.get(), like);
    ggml_set_name(tensor, name.c_str());
    ids_.emplace_back(tensor, id);
    used_.insert(name);
    return tensor;
  }

  ggml_tensor* required(ggml_tensor* tensor, const std::string& name) const {
    if (tensor == nullptr) throw std::runtime_error(path_ + " has no tensor " + name);
    return tensor;
  }

  std::string path_;
  const gguf_context* file_;
  ggml_context* shapes_;
  std::map<ggml_backend_buffer_type_t, ggml_context_ptr> contexts_;
  std::vector<std::pair<ggml_tensor*, std::int64_t>> ids_;
  std::set<std::string> used_;
};

void read_sizes(const Metadata& metadata, Model& model) {
  model.architecture = metadata.text("general.architecture");
  if (model.architecture == "llama") {
    model.rope_type = GGML_ROPE_TYPE_NORMAL;
  } else if (model.architecture == "qwen2" || model.architecture == "qwen3") {
    model.rope_type = GGML_ROPE_TYPE_NEOX;
  } else {
    throw std::runtime_error("the model is of the kind " + model.architecture +
                             "; this program computes llama, qwen2 and qwen3");
  }
  const std::string prefix = model.architecture + ".";
  for (const char* key : {"attention.sliding_window", "expert_count", "attention.scale"}) {
    if (metadata.has(prefix + key)) {
      throw std::runtime_error("the model has " + prefix + key +
                               ", which this program does not compute");
    }
  }
  model.width = metadata.number(prefix + "embedding_length");
  model.query_heads = metadata.number(prefix + "attention.head_count");
  model.kv_heads = metadata.number(prefix + "attention.head_count_kv", model.query_heads);
  model.head_dim =
      metadata.number(prefix + "attention.key_length", model.width / model.query_heads);
  if (metadata.number(prefix + "attention.value_length", model.head_dim) != model.head_dim) {
    throw std::runtime_error("keys and values of different lengths are not computed here");
  }
  model.trained_context = metadata.number(prefix + "context_length");
  model.norm_epsilon = metadata.real(prefix + "attention.layer_norm_rms_epsilon");
  model.rotary_dim = metadata.number(prefix + "rope.dimension_count", model.head_dim);
  model.rope_base = metadata.real(prefix + "rope.freq_base", 10000.0F);
  if (metadata.has(prefix + "rope.scaling.type")) {
    const std::string scaling = metadata.text(prefix + "rope.scaling.type");
    if (scaling == "linear") {
      model.rope_scale = 1.0F / metadata.real(prefix + "rope.scaling.factor");
    } else if (scaling != "none") {
      throw std::runtime_error("positions are scaled by " + scaling +
                               "; this program computes linear and none");
    }
  }
}

}  // namespace

Model::Model(const std::string& path) {
  ggml_context* shapes = nullptr;
  const gguf_context_ptr file(gguf_init_from_file(path.c_str(), {true, &shapes}));
  if (file == nullptr) throw std::runtime_error(path + " is no GGUF file that can be read");
  const ggml_context_ptr shapes_owner(shapes);
  const Metadata metadata(file.get());
  read_sizes(metadata, *this);

  Weights weights(path, file.get(), shapes);
  token_embd = weights.get("token_embd.weight");
  vocabulary = static_cast<int>(token_embd->ne[1]);
  output_norm = weights.get("output_norm.weight");
  const bool tied = gguf_find_tensor(file.get(), "output.weight") < 0;
  output = weights.matrix(tied ? "token_embd.weight" : "output.weight");
  rope_freqs = weights.find("rope_freqs.weight");
  layers.resize(static_cast<std::size_t>(metadata.number(architecture + ".block_count")));
  for (std::size_t i = 0; i < layers.size(); ++i) {
    const std::string block = "blk." + std::to_string(i) + ".";
    layers[i] = {.attn_norm = weights.get(block + "attn_norm.weight"),
                 .attn_q = weights.matrix(block + "attn_q.weight"),
                 .attn_k = weights.matrix(block + "attn_k.weight"),
                 .attn_v = weights.matrix(block + "attn_v.weight"),
                 .attn_q_bias = weights.find(block + "attn_q.bias"),
                 .attn_k_bias = weights.find(block + "attn_k.bias"),
                 .attn_v_bias = weights.find(block + "attn_v.bias"),
                 .attn_q_norm = weights.find(block + "attn_q_norm.weight"),
                 .attn_k_norm = weights.find(block + "attn_k_norm.weight"),
                 .attn_output = weights.matrix(block + "attn_output.weight"),
                 .ffn_norm = weights.get(block + "ffn_norm.weight"),
                 .ffn_gate = weights.matrix(block + "ffn_gate.weight"),
                 .ffn_up = weights.matrix(block + "ffn_up.weight"),
                 .ffn_down = weights.matrix(block + "ffn_down.weight")};
  }
  weights.check_all_used();
  weights.read(contexts_, buffers_);

  const auto* factors =
      rope_freqs != nullptr ? static_cast<const float*>(rope_freqs->data) : nullptr;
  for (int f = 0; f < rotary_dim / 2; ++f) {
    const double exponent = -2.0 * f / rotary_dim;
    const double factor = factors != nullptr ? static_cast<double>(factors[f]) : 1.0;
    inv_freq.push_back(static_cast<float>(static_cast<double>(rope_scale) *
                                          std::pow(static_cast<double>(rope_base), exponent) /
                                          factor));
  }
}

}  // namespace ggml_runtime
