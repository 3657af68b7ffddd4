// Generation with a model: ggml for the weights, and a cache of one's choice.
#pragma once

#include <cstddef>
#include <cstdint>
#include <exception>
#include <memory>
#include <mutex>
#include <span>
#include <string>
#include <tqai/cache.hpp>
#include <vector>

#include "model.hpp"

namespace ggml_runtime {

enum class CacheKind : std::uint8_t { f16, tqai };

struct Settings {
  CacheKind cache = CacheKind::tqai;
  int context = 4096;  // tokens at most
  int threads = 1;
  int batch = 512;  // tokens that are read at once at most
  // Of tqai::CacheOptions.
  int bits_k = 4;
  int bits_v = 2;
  int sink_tokens = 4;
  int residual_window = 128;
};

/// One sequence of tokens. Not for several threads at once.
class Runtime {
 public:
  /// `model` must outlive it.
  Runtime(const Model& model, const Settings& settings);
  Runtime(const Runtime&) = delete;
  Runtime& operator=(const Runtime&) = delete;
  ~Runtime();

  /// Adds tokens to the sequence. Returns the logits after the last, [1, vocabulary], or after each
  /// of them, [tokens, vocabulary]. Throws std::runtime_error for more tokens than the context has
  /// room for and for tokens that the vocabulary lacks; the sequence then is what it was.
  std::vector<float> decode(std::span<const std::int32_t> tokens, bool all_logits = false);

  /// Tokens of the sequence.
  int tokens() const { return tokens_; }
  /// Forgets all tokens from `tokens` on: those that a speculation got wrong, or the last question.
  void crop(int tokens);
  /// Adds what the cache holds over and over, keys turned to their new positions, until there are
  /// `tokens`. For timings of long contexts alone.
  void repeat_until(int tokens);
  /// Bytes that keys and values take.
  std::size_t cache_bytes() const;

 private:
  struct Step;
  // A layer's attention, as the operation in the graph finds it.
  struct Attention {
    Runtime* runtime = nullptr;
    std::size_t layer = 0;
  };

  void run(std::span<const std::int32_t> tokens, bool all_logits, std::vector<float>& logits);
  void prepare(int tokens, int outputs);
  ggml_tensor* packed_attention(ggml_context* context, std::size_t layer, ggml_tensor* queries,
                                ggml_tensor* keys, ggml_tensor* values);
  ggml_tensor* f16_attention(ggml_context* context, std::size_t layer, ggml_tensor* queries,
                             ggml_tensor* keys, ggml_tensor* values);
  static void attend(ggml_tensor* output, int thread, int threads, void* attention);

  const Model& model_;
  Settings settings_;
  int tokens_ = 0;
  ggml_backend_ptr backend_;
  std::unique_ptr<Step> step_;

  // CacheKind::tqai: [layers · kv_heads], a cache for each head, so that threads share the heads.
  std::vector<tqai::KvCache> caches_;
  std::vector<Attention> attentions_;
  std::mutex error_mutex_;
  std::exception_ptr error_;

  // CacheKind::f16.
  ggml_context_ptr f16_context_;
  ggml_backend_buffer_ptr f16_buffer_;
  std::vector<ggml_tensor*> f16_keys_;    // [layers], each [context, kv_heads · head_dim]
  std::vector<ggml_tensor*> f16_values_;  // [layers], each [kv_heads · head_dim, context]
};

}  // namespace ggml_runtime
