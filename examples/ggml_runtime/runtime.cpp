#include "runtime.hpp"

#include <ggml-cpu.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <limits>
#include <stdexcept>
#include <utility>

namespace ggml_runtime {
namespace {

// Of attention over the f16 cache: a graph serves until another so many tokens have come.
constexpr int kColumns = 256;

// ggml's threads call the cache, each for other heads: none of them is to start threads of its own.
const tqai::Resources kThisThread{.threads = 1};

int columns_for(int tokens) { return (tokens + kColumns - 1) / kColumns * kColumns; }

// Heads [head, token, dim] as the cache takes them, of a tensor that has [token, head, dim].
tqai::ConstTensor heads_of(const ggml_tensor* tensor, std::int64_t head, std::int64_t count) {
  const bool half = tensor->type == GGML_TYPE_F16;
  const auto size = static_cast<std::int64_t>(ggml_type_size(tensor->type));
  const auto head_stride = static_cast<std::int64_t>(tensor->nb[1]);
  const auto token_stride = static_cast<std::int64_t>(tensor->nb[2]);
  return {.data = static_cast<const char*>(tensor->data) + head * head_stride,
          .dtype = half ? tqai::DType::f16 : tqai::DType::f32,
          .shape = {1, count, tensor->ne[2], tensor->ne[0]},
          .strides = {0, head_stride / size, token_stride / size, 1}};
}

ggml_tensor* product(ggml_context* context, ggml_tensor* matrix, ggml_tensor* x,
                     ggml_tensor* bias = nullptr) {
  x = ggml_mul_mat(context, matrix, x);
  return bias != nullptr ? ggml_add(context, x, bias) : x;
}

// Keys [tokens, head_dim] as they would be `tokens` positions later.
void turn_further(const Model& model, float tokens, std::vector<float>& keys) {
  const auto pairs = model.inv_freq.size();
  const bool halves = model.rope_type == GGML_ROPE_TYPE_NEOX;
  const auto dim = static_cast<std::size_t>(model.head_dim);
  for (std::size_t f = 0; f < pairs; ++f) {
    const float cosine = std::cos(tokens * model.inv_freq[f]);
    const float sine = std::sin(tokens * model.inv_freq[f]);
    for (std::size_t t = 0; t < keys.size(); t += dim) {
      float& a = keys[t + (halves ? f : 2 * f)];
      float& b = keys[t + (halves ? f + pairs : 2 * f + 1)];
      const float turned = a * cosine - b * sine;
      b = a * sine + b * cosine;
      a = turned;
    }
  }
}

}  // namespace

// A graph for so many tokens and outputs; kept while the next call is of the same sizes.
struct Runtime::Step {
  int tokens = 0;
  int outputs = 0;
  int columns = 0;  // of the f16 cache that attention sees
  ggml_context_ptr context;
  ggml_gallocr_ptr memory;
  ggml_cgraph* graph = nullptr;

  ggml_tensor* ids = nullptr;             // [tokens]
  ggml_tensor* positions = nullptr;       // [tokens]
  ggml_tensor* output_rows = nullptr;     // [outputs]: whose logits are wanted
  ggml_tensor* mask = nullptr;            // [tokens, columns]
  ggml_tensor* key_rows = nullptr;        // [tokens]
  ggml_tensor* value_elements = nullptr;  // [tokens · kv_heads · head_dim]
  ggml_tensor* logits = nullptr;          // [outputs, vocabulary]
};

Runtime::Runtime(const Model& model, const Settings& settings)
    : model_(model), settings_(settings), backend_(ggml_backend_cpu_init()) {
  ggml_backend_cpu_set_n_threads(backend_.get(), settings_.threads);
  const std::size_t layers = model_.layers.size();
  if (settings_.cache == CacheKind::tqai) {
    tqai::CacheOptions options;
    options.kv_heads = 1;
    options.head_dim = model_.head_dim;
    options.dtype = tqai::DType::f16;
    options.bits_k = settings_.bits_k;
    options.bits_v = settings_.bits_v;
    options.sink_tokens = settings_.sink_tokens;
    options.residual_window = settings_.residual_window;
    options.rope = tqai::Rope{.inv_freq = model_.inv_freq,
                              .layout = model_.rope_type == GGML_ROPE_TYPE_NEOX
                                            ? tqai::Rope::Layout::half_split
                                            : tqai::Rope::Layout::interleaved,
                              .rotary_dim = model_.rotary_dim};
    caches_.assign(layers * static_cast<std::size_t>(model_.kv_heads), tqai::KvCache(options));
    for (std::size_t i = 0; i < layers; ++i) attentions_.push_back({this, i});
    return;
  }
  f16_context_.reset(ggml_init({2 * layers * ggml_tensor_overhead(), nullptr, true}));
  const std::int64_t width = std::int64_t{model_.kv_heads} * model_.head_dim;
  const std::int64_t columns = columns_for(settings_.context);
  for (std::size_t i = 0; i < layers; ++i) {
    f16_keys_.push_back(ggml_new_tensor_2d(f16_context_.get(), GGML_TYPE_F16, width, columns));
    f16_values_.push_back(ggml_new_tensor_2d(f16_context_.get(), GGML_TYPE_F16, columns, width));
  }
  f16_buffer_.reset(
      ggml_backend_alloc_ctx_tensors_from_buft(f16_context_.get(), ggml_backend_cpu_buffer_type()));
  if (f16_buffer_ == nullptr) throw std::runtime_error("no memory for the cache");
  // What is masked is multiplied by 0, and must not be NaN.
  ggml_backend_buffer_clear(f16_buffer_.get(), 0);
}

Runtime::~Runtime() = default;

// The graph's operation, run by all of ggml's threads at once: each has heads of its own.
void Runtime::attend(ggml_tensor* output, int thread, int threads, void* attention) {
  const auto& [runtime, layer] = *static_cast<const Attention*>(attention);
  const ggml_tensor* queries = output->src[0];  // [token, query head, dim]
  const int kv_heads = runtime->model_.kv_heads;
  const std::int64_t group = queries->ne[1] / kv_heads;
  const std::int64_t dim = queries->ne[0];
  try {
    for (int head = thread; head < kv_heads; head += threads) {
      tqai::KvCache& cache = runtime->caches_[layer * static_cast<std::size_t>(kv_heads) +
                                              static_cast<std::size_t>(head)];
      cache.append(heads_of(output->src[1], head, 1), heads_of(output->src[2], head, 1), {},
                   kThisThread);
      const tqai::Tensor out{.data = static_cast<float*>(output->data) + head * group * dim,
                             .dtype = tqai::DType::f32,
                             .shape = {1, queries->ne[2], group, dim},
                             .strides = {0, queries->ne[1] * dim, dim, 1}};
      cache.attend(heads_of(queries, head * group, group), out, {}, kThisThread);
    }
  } catch (...) {
    // ggml is C: nothing may be thrown through it.
    const std::lock_guard lock(runtime->error_mutex_);
    runtime->error_ = std::current_exception();
  }
}

ggml_tensor* Runtime::packed_attention(ggml_context* context, std::size_t layer,
                                       ggml_tensor* queries, ggml_tensor* keys,
                                       ggml_tensor* values) {
  // The same rounding as in an f16 cache, so that the window holds the same numbers.
  std::array inputs{queries, ggml_cast(context, keys, GGML_TYPE_F16),
                    ggml_cast(context, values, GGML_TYPE_F16)};
  return ggml_custom_4d(context, GGML_TYPE_F32, queries->ne[0] * queries->ne[1], queries->ne[2], 1,
                        1, inputs.data(), static_cast<int>(inputs.size()), attend, GGML_N_TASKS_MAX,
                        &attentions_[layer]);
}

// As llama.cpp has it without flash attention, its faster way on CPUs: values are transposed.
ggml_tensor* Runtime::f16_attention(ggml_context* context, std::size_t layer, ggml_tensor* queries,
                                    ggml_tensor* keys, ggml_tensor* values) {
  const Step& step = *step_;
  const std::int64_t dim = model_.head_dim;
  const std::int64_t width = dim * model_.kv_heads;
  const std::size_t half = sizeof(ggml_fp16_t);
  ggml_tensor* all_keys = f16_keys_[layer];
  ggml_tensor* all_values = f16_values_[layer];
  const auto columns = static_cast<std::size_t>(all_values->ne[0]);

  keys = ggml_reshape_2d(context, keys, width, step.tokens);
  ggml_build_forward_expand(step.graph, ggml_set_rows(context, all_keys, keys, step.key_rows));
  values = ggml_reshape_2d(context, values, 1, width * step.tokens);
  ggml_tensor* elements = ggml_reshape_2d(context, all_values, 1, ggml_nelements(all_values));
  ggml_build_forward_expand(step.graph,
                            ggml_set_rows(context, elements, values, step.value_elements));

  ggml_tensor* k =
      ggml_view_3d(context, all_keys, dim, step.columns, model_.kv_heads,
                   half * static_cast<std::size_t>(width), half * static_cast<std::size_t>(dim), 0);
  ggml_tensor* v = ggml_view_3d(context, all_values, step.columns, dim, model_.kv_heads,
                                half * columns, half * columns * static_cast<std::size_t>(dim), 0);
  ggml_tensor* scores = ggml_mul_mat(context, k, ggml_permute(context, queries, 0, 2, 1, 3));
  scores = ggml_soft_max_ext(context, scores, step.mask,
                             1.0F / std::sqrt(static_cast<float>(model_.head_dim)), 0.0F);
  ggml_tensor* output = ggml_permute(context, ggml_mul_mat(context, v, scores), 0, 2, 1, 3);
  return ggml_cont_2d(context, output, dim * model_.query_heads, step.tokens);
}

// Makes `step_` a graph for these sizes.
void Runtime::prepare(int tokens, int outputs) {
  const int columns = settings_.cache == CacheKind::f16 ? columns_for(tokens_ + tokens) : 0;
  if (step_ != nullptr && step_->tokens == tokens && step_->outputs == outputs &&
      step_->columns == columns) {
    return;
  }
  step_ = std::make_unique<Step>();
  Step& step = *step_;
  step.tokens = tokens;
  step.outputs = outputs;
  step.columns = columns;
  const std::size_t nodes = 64 * (model_.layers.size() + 1);
  step.context.reset(ggml_init(
      {nodes * ggml_tensor_overhead() + ggml_graph_overhead_custom(nodes, false), nullptr, true}));
  ggml_context* context = step.context.get();
  step.graph = ggml_new_graph_custom(context, nodes, false);

  const auto input = [&](ggml_type type, std::int64_t columns_of, std::int64_t rows = 1) {
    ggml_tensor* tensor = ggml_new_tensor_2d(context, type, columns_of, rows);
    ggml_set_input(tensor);
    return tensor;
  };
  step.ids = input(GGML_TYPE_I32, tokens);
  step.positions = input(GGML_TYPE_I32, tokens);
  step.output_rows = input(GGML_TYPE_I32, outputs);
  if (settings_.cache == CacheKind::f16) {
    step.mask = input(GGML_TYPE_F32, columns, tokens);
    step.key_rows = input(GGML_TYPE_I64, tokens);
    step.value_elements =
        input(GGML_TYPE_I64, std::int64_t{tokens} * model_.kv_heads * model_.head_dim);
  }

  const auto norm = [&](ggml_tensor* x, ggml_tensor* weight) {
    return ggml_mul(context, ggml_rms_norm(context, x, model_.norm_epsilon), weight);
  };
  const auto heads = [&](ggml_tensor* x, int count) {
    return ggml_reshape_3d(context, x, model_.head_dim, count, tokens);
  };
  const auto turn = [&](ggml_tensor* x) {
    return ggml_rope_ext(context, x, step.positions, model_.rope_freqs, model_.rotary_dim,
                         model_.rope_type, model_.trained_context, model_.rope_base,
                         model_.rope_scale, 0.0F, 1.0F, 32.0F, 1.0F);
  };

  ggml_tensor* x = ggml_get_rows(context, model_.token_embd, step.ids);
  for (std::size_t i = 0; i < model_.layers.size(); ++i) {
    const Layer& layer = model_.layers[i];
    ggml_tensor* normed = norm(x, layer.attn_norm);
    ggml_tensor* queries =
        heads(product(context, layer.attn_q, normed, layer.attn_q_bias), model_.query_heads);
    ggml_tensor* keys =
        heads(product(context, layer.attn_k, normed, layer.attn_k_bias), model_.kv_heads);
    ggml_tensor* values =
        heads(product(context, layer.attn_v, normed, layer.attn_v_bias), model_.kv_heads);
    if (layer.attn_q_norm != nullptr) queries = norm(queries, layer.attn_q_norm);
    if (layer.attn_k_norm != nullptr) keys = norm(keys, layer.attn_k_norm);
    queries = turn(queries);
    keys = turn(keys);
    ggml_tensor* attended = settings_.cache == CacheKind::tqai
                                ? packed_attention(context, i, queries, keys, values)
                                : f16_attention(context, i, queries, keys, values);
    attended = product(context, layer.attn_output, attended);
    if (i + 1 == model_.layers.size() && outputs < tokens) {
      attended = ggml_get_rows(context, attended, step.output_rows);
      x = ggml_get_rows(context, x, step.output_rows);
    }
    x = ggml_add(context, attended, x);
    normed = norm(x, layer.ffn_norm);
    ggml_tensor* up = product(context, layer.ffn_up, normed);
    ggml_tensor* gate = product(context, layer.ffn_gate, normed);
    x = ggml_add(context, product(context, layer.ffn_down, ggml_swiglu_split(context, gate, up)),
                 x);
  }
  step.logits = product(context, model_.output, norm(x, model_.output_norm));
  ggml_set_output(step.logits);
  ggml_build_forward_expand(step.graph, step.logits);
  step.memory.reset(ggml_gallocr_new(ggml_backend_cpu_buffer_type()));
  if (!ggml_gallocr_alloc_graph(step.memory.get(), step.graph)) {
    throw std::runtime_error("no memory for the graph");
  }
}

// One batch; tokens_ is advanced by the caller.
void Runtime::run(std::span<const std::int32_t> tokens, bool all_logits,
                  std::vector<float>& logits) {
  const auto count = static_cast<int>(tokens.size());
  prepare(count, all_logits ? count : 1);
  const Step& step = *step_;
  std::copy(tokens.begin(), tokens.end(), static_cast<std::int32_t*>(step.ids->data));
  for (int i = 0; i < count; ++i) static_cast<std::int32_t*>(step.positions->data)[i] = tokens_ + i;
  if (!all_logits && count > 1) static_cast<std::int32_t*>(step.output_rows->data)[0] = count - 1;
  if (settings_.cache == CacheKind::f16) {
    auto* mask = static_cast<float*>(step.mask->data);
    auto* element = static_cast<std::int64_t*>(step.value_elements->data);
    const int width = model_.kv_heads * model_.head_dim;
    for (int i = 0; i < count; ++i) {
      static_cast<std::int64_t*>(step.key_rows->data)[i] = tokens_ + i;
      for (int c = 0; c < width; ++c) *element++ = c * f16_values_[0]->ne[0] + tokens_ + i;
      for (int j = 0; j < step.columns; ++j) {
        *mask++ = j <= tokens_ + i ? 0.0F : -std::numeric_limits<float>::infinity();
      }
    }
  }

  error_ = nullptr;
  const ggml_status status = ggml_backend_graph_compute(backend_.get(), step.graph);
  if (error_ != nullptr) std::rethrow_exception(error_);
  if (status != GGML_STATUS_SUCCESS) throw std::runtime_error(ggml_status_to_string(status));
  const auto* first = static_cast<const float*>(step.logits->data);
  if (!all_logits) logits.clear();
  logits.insert(logits.end(), first, first + ggml_nelements(step.logits));
}

std::vector<float> Runtime::decode(std::span<const std::int32_t> tokens, bool all_logits) {
  if (tokens.empty()) throw std::runtime_error("no tokens to read");
  if (tokens.size() > static_cast<std::size_t>(settings_.context - tokens_)) {
    throw std::runtime_error("the context is of " + std::to_string(settings_.context) +
                             " tokens, of which " + std::to_string(tokens_) +
                             " are taken; no room for " + std::to_string(tokens.size()) + " more");
  }
  for (const std::int32_t token : tokens) {
    if (token < 0 || token >= model_.vocabulary) {
      throw std::runtime_error("token " + std::to_string(token) + " is not one of 0 … " +
                               std::to_string(model_.vocabulary - 1));
    }
  }
  const int before = tokens_;
  std::vector<float> logits;
  try {
    while (!tokens.empty()) {
      const std::size_t count = std::min(tokens.size(), static_cast<std::size_t>(settings_.batch));
      run(tokens.first(count), all_logits, logits);
      tokens_ += static_cast<int>(count);
      tokens = tokens.subspan(count);
    }
  } catch (...) {
    // Some layers have tokens that others lack.
    crop(before);
    throw;
  }
  return logits;
}

void Runtime::crop(int tokens) {
  for (tqai::KvCache& cache : caches_) cache.crop(std::min<std::int64_t>(cache.tokens(), tokens));
  tokens_ = tokens;
}

void Runtime::repeat_until(int tokens) {
  if (tokens > settings_.context) {
    throw std::runtime_error("the context is of " + std::to_string(settings_.context) + " tokens");
  }
  if (settings_.cache != CacheKind::tqai) {
    throw std::runtime_error("only a packed cache is filled by repetition");
  }
  const std::int64_t held = tokens_;
  const std::int64_t dim = model_.head_dim;
  std::vector<float> keys(static_cast<std::size_t>(held * dim));
  std::vector<float> values(keys.size());
  std::vector<ggml_fp16_t> half_keys(keys.size());
  std::vector<ggml_fp16_t> half_values(keys.size());
  const auto whole = [&](std::vector<float>& data) {
    return tqai::Tensor{.data = data.data(),
                        .dtype = tqai::DType::f32,
                        .shape = {1, 1, held, dim},
                        .strides = {0, 0, dim, 1}};
  };
  for (tqai::KvCache& cache : caches_) {
    cache.gather(0, whole(keys), whole(values));
    ggml_fp32_to_fp16_row(values.data(), half_values.data(), held * dim);
    while (cache.tokens() < tokens) {
      turn_further(model_, static_cast<float>(held), keys);
      ggml_fp32_to_fp16_row(keys.data(), half_keys.data(), held * dim);
      const std::int64_t count = std::min(held, tokens - cache.tokens());
      const auto first = [&](const std::vector<ggml_fp16_t>& data) {
        return tqai::ConstTensor{.data = data.data(),
                                 .dtype = tqai::DType::f16,
                                 .shape = {1, 1, count, dim},
                                 .strides = {0, 0, dim, 1}};
      };
      cache.append(first(half_keys), first(half_values), {}, kThisThread);
    }
    cache.seal(kThisThread);
  }
  tokens_ = tokens;
}

std::size_t Runtime::cache_bytes() const {
  if (f16_buffer_ != nullptr) return ggml_backend_buffer_get_size(f16_buffer_.get());
  std::size_t bytes = 0;
  for (const tqai::KvCache& cache : caches_) bytes += cache.memory().total_bytes();
  return bytes;
}

}  // namespace ggml_runtime
