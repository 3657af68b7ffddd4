// Weights and sizes of a model in a GGUF file, as ggml tensors.
#pragma once

#include <ggml-cpp.h>

#include <cstdint>
#include <string>
#include <vector>

namespace ggml_runtime {

/// The weights of one transformer block. Null: the model has none.
struct Layer {
  ggml_tensor* attn_norm = nullptr;
  ggml_tensor* attn_q = nullptr;
  ggml_tensor* attn_k = nullptr;
  ggml_tensor* attn_v = nullptr;
  ggml_tensor* attn_q_bias = nullptr;
  ggml_tensor* attn_k_bias = nullptr;
  ggml_tensor* attn_v_bias = nullptr;
  ggml_tensor* attn_q_norm = nullptr;  // of each head (Qwen3)
  ggml_tensor* attn_k_norm = nullptr;
  ggml_tensor* attn_output = nullptr;
  ggml_tensor* ffn_norm = nullptr;
  ggml_tensor* ffn_gate = nullptr;
  ggml_tensor* ffn_up = nullptr;
  ggml_tensor* ffn_down = nullptr;
};

/// A decoder of llama's kind: RMS norms, rotary attention with grouped heads, a gated network.
class Model {
 public:
  /// Reads `path`. Throws std::runtime_error for what is no GGUF file, and for a model that needs
  /// anything which this program does not compute.
  explicit Model(const std::string& path);

  std::string architecture;  // llama, qwen2 or qwen3
  int width = 0;             // of the residual stream
  int query_heads = 0;
  int kv_heads = 0;
  int head_dim = 0;
  int trained_context = 0;  // tokens
  int vocabulary = 0;
  float norm_epsilon = 0.0F;
  int rotary_dim = 0;  // coordinates of a head that positions turn
  float rope_base = 0.0F;
  float rope_scale = 1.0F;            // multiplies positions
  int rope_type = 0;                  // which coordinates make a pair, GGML_ROPE_TYPE_*
  std::vector<float> inv_freq;        // [rotary_dim / 2], radians per token
  ggml_tensor* rope_freqs = nullptr;  // [rotary_dim / 2], divide the frequencies (Llama 3.1)

  ggml_tensor* token_embd = nullptr;
  ggml_tensor* output_norm = nullptr;
  ggml_tensor* output = nullptr;
  std::vector<Layer> layers;

 private:
  std::vector<ggml_context_ptr> contexts_;
  std::vector<ggml_backend_buffer_ptr> buffers_;
};

}  // namespace ggml_runtime
