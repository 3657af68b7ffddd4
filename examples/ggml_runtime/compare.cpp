// llama.cpp and ggml_runtime beside each other: the same file, text and threads, in turns.
#include <ggml-cpp.h>
#include <llama-cpp.h>

#include <algorithm>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <ctime>
#include <fstream>
#include <functional>
#include <iterator>
#include <limits>
#include <memory>
#include <stdexcept>
#include <string>
#include <vector>

#include "runtime.hpp"

namespace {

using Tokens = std::vector<std::int32_t>;

// The most likely token, and how far its logit is above the next one's.
struct Prediction {
  std::int32_t token = 0;
  float lead = 0.0F;
};

Prediction most_likely(const float* logits, int count) {
  const float* first = std::max_element(logits, logits + count);
  float second = -std::numeric_limits<float>::infinity();
  for (const float* other = logits; other != logits + count; ++other) {
    if (other != first) second = std::max(second, *other);
  }
  return {static_cast<std::int32_t>(first - logits), *first - second};
}

// Something that keeps a sequence and predicts its next token.
class Engine {
 public:
  explicit Engine(std::string name) : name_(std::move(name)) {}
  Engine(const Engine&) = delete;
  Engine& operator=(const Engine&) = delete;
  virtual ~Engine() = default;

  // Adds tokens; says what comes next.
  virtual Prediction decode(const Tokens& tokens) = 0;
  virtual void repeat_until(int tokens) = 0;
  virtual double megabytes() const = 0;

  const std::string& name() const { return name_; }

  // Of single steps, by the clock and of processor time of all threads, which other processes on
  // the machine lengthen less.
  std::vector<double> milliseconds;
  std::vector<double> cpu_milliseconds;
  Tokens generated;
  std::vector<float> leads;  // of these

 private:
  std::string name_;
};

class Llama : public Engine {
 public:
  Llama(const std::string& name, llama_model* model, ggml_type type, bool flash, int context,
        int threads)
      : Engine(name), vocabulary_(llama_vocab_n_tokens(llama_model_get_vocab(model))) {
    llama_context_params parameters = llama_context_default_params();
    parameters.n_ctx = static_cast<std::uint32_t>(context);
    parameters.n_batch = parameters.n_ubatch = 512;
    parameters.n_seq_max = 2;
    parameters.kv_unified = true;
    parameters.n_threads = parameters.n_threads_batch = threads;
    parameters.type_k = parameters.type_v = type;
    parameters.flash_attn_type =
        flash ? LLAMA_FLASH_ATTN_TYPE_ENABLED : LLAMA_FLASH_ATTN_TYPE_DISABLED;
    context_.reset(llama_init_from_model(model, parameters));
    if (context_ == nullptr) throw std::runtime_error("llama.cpp makes no context: " + name);
    cells_ = static_cast<int>(llama_n_ctx(context_.get()));
    // One layer's row of keys and one of values a token.
    const int width =
        llama_model_n_embd(model) / llama_model_n_head(model) * llama_model_n_head_kv(model);
    bytes_ =
        2.0 * static_cast<double>(ggml_row_size(type, width)) * llama_model_n_layer(model) * cells_;
  }

  Prediction decode(const Tokens& tokens) override {
    for (std::size_t first = 0; first < tokens.size(); first += 512) {
      const std::size_t count = std::min<std::size_t>(512, tokens.size() - first);
      Tokens batch(tokens.begin() + static_cast<std::ptrdiff_t>(first),
                   tokens.begin() + static_cast<std::ptrdiff_t>(first + count));
      if (llama_decode(context_.get(),
                       llama_batch_get_one(batch.data(), static_cast<int>(count))) != 0) {
        throw std::runtime_error("llama.cpp cannot decode: " + name());
      }
    }
    return most_likely(llama_get_logits_ith(context_.get(), -1), vocabulary_);
  }

  void repeat_until(int tokens) override {
    const llama_memory_t memory = llama_get_memory(context_.get());
    std::vector<std::uint8_t> state(llama_state_seq_get_size(context_.get(), 0));
    llama_state_seq_get_data(context_.get(), state.data(), state.size(), 0);
    while (true) {
      const int held = llama_memory_seq_pos_max(memory, 0) + 1;
      if (held >= tokens) break;
      if (llama_state_seq_set_data(context_.get(), state.data(), state.size(), 1) == 0) {
        throw std::runtime_error("llama.cpp takes no state: " + name());
      }
      const int added = std::min(llama_memory_seq_pos_max(memory, 1) + 1, tokens - held);
      llama_memory_seq_rm(memory, 1, added, -1);
      llama_memory_seq_add(memory, 1, 0, -1, held);
      llama_memory_seq_cp(memory, 1, 0, -1, -1);
      llama_memory_seq_rm(memory, 1, -1, -1);
    }
  }

  double megabytes() const override { return bytes_ / 1e6; }

 private:
  llama_context_ptr context_;
  int vocabulary_;
  int cells_ = 0;
  double bytes_ = 0.0;
};

class Ours : public Engine {
 public:
  Ours(const std::string& name, const ggml_runtime::Model& model,
       const ggml_runtime::Settings& settings)
      : Engine(name), runtime_(model, settings) {}

  Prediction decode(const Tokens& tokens) override {
    const std::vector<float> logits = runtime_.decode(tokens);
    return most_likely(logits.data(), static_cast<int>(logits.size()));
  }
  void repeat_until(int tokens) override { runtime_.repeat_until(tokens); }
  double megabytes() const override { return static_cast<double>(runtime_.cache_bytes()) / 1e6; }

 private:
  ggml_runtime::Runtime runtime_;
};

double median(std::vector<double> values) {
  const auto middle = values.begin() + static_cast<std::ptrdiff_t>(values.size() / 2);
  std::nth_element(values.begin(), middle, values.end());
  return *middle;
}

double least(const std::vector<double>& values) {
  return *std::min_element(values.begin(), values.end());
}

Tokens read_tokens(const llama_model* model, const std::string& path) {
  std::ifstream stream(path, std::ios::binary);
  const std::string text{std::istreambuf_iterator<char>(stream), {}};
  if (text.empty()) throw std::runtime_error("cannot read " + path);
  Tokens tokens(text.size() + 2);
  tokens.resize(static_cast<std::size_t>(
      llama_tokenize(llama_model_get_vocab(model), text.c_str(), static_cast<int>(text.size()),
                     tokens.data(), static_cast<int>(tokens.size()), true, false)));
  return tokens;
}

std::size_t same_at_start(const Tokens& a, const Tokens& b) {
  return static_cast<std::size_t>(std::mismatch(a.begin(), a.end(), b.begin(), b.end()).first -
                                  a.begin());
}

// read: tokens of the text at most; a longer context is these over and over.
void compare(int context, int read, int steps, int threads, const Tokens& text, llama_model* llama,
             const ggml_runtime::Model& model) {
  ggml_runtime::Settings settings;
  settings.context = context + steps + 64;
  settings.threads = threads;
  const int room = settings.context;
  std::vector<std::unique_ptr<Engine>> engines;
  engines.push_back(
      std::make_unique<Llama>("llama.cpp f16", llama, GGML_TYPE_F16, false, room, threads));
  engines.push_back(
      std::make_unique<Llama>("llama.cpp f16, flash", llama, GGML_TYPE_F16, true, room, threads));
  // Quantised values need flash attention there.
  engines.push_back(
      std::make_unique<Llama>("llama.cpp q4_0, flash", llama, GGML_TYPE_Q4_0, true, room, threads));
  engines.push_back(std::make_unique<Ours>("tqai K4/V2", model, settings));
  if (text.size() < static_cast<std::size_t>(std::min(context, read))) {
    throw std::runtime_error("the text has only " + std::to_string(text.size()) + " tokens");
  }
  const Tokens prompt(text.begin(), text.begin() + std::min(context, read));
  std::printf("%d tokens in the cache, %zu read%s; %d threads\n", context, prompt.size(),
              context > read ? ", whose keys and values are repeated" : "", threads);
  std::vector<Prediction> next;
  for (const auto& engine : engines) {
    const auto start = std::chrono::steady_clock::now();
    next.push_back(engine->decode(prompt));
    const std::chrono::duration<double> seconds = std::chrono::steady_clock::now() - start;
    std::fprintf(stderr, "  %s has read %zu tokens in %.1f s\n", engine->name().c_str(),
                 prompt.size(), seconds.count());
    engine->repeat_until(context);
    next.back() =
        engine->decode({next.back().token});  // what positions still have to be moved, here
  }
  for (int step = 0; step < steps; ++step) {
    for (std::size_t i = 0; i < engines.size(); ++i) {
      Engine& engine = *engines[i];
      engine.generated.push_back(next[i].token);
      engine.leads.push_back(next[i].lead);
      const std::clock_t cpu_start = std::clock();
      const auto start = std::chrono::steady_clock::now();
      next[i] = engine.decode({next[i].token});
      const std::chrono::duration<double, std::milli> time =
          std::chrono::steady_clock::now() - start;
      engine.milliseconds.push_back(time.count());
      engine.cpu_milliseconds.push_back(1e3 * static_cast<double>(std::clock() - cpu_start) /
                                        CLOCKS_PER_SEC);
    }
  }
  const Engine& ours = *engines.back();
  for (const auto& engine : engines) {
    std::printf(
        "  %-21s a token: %7.2f ms (least %7.2f), %7.2f ms of processors (least %7.2f); "
        "cache %7.2f MB\n",
        engine->name().c_str(), median(engine->milliseconds), least(engine->milliseconds),
        median(engine->cpu_milliseconds), least(engine->cpu_milliseconds), engine->megabytes());
    if (engine.get() == &ours) continue;
    std::printf("  %-21s tqai: %.2f times its speed (by processor time %.2f), %.3f of its bytes; ",
                "", median(engine->milliseconds) / median(ours.milliseconds),
                median(engine->cpu_milliseconds) / median(ours.cpu_milliseconds),
                ours.megabytes() / engine->megabytes());
    const std::size_t same = same_at_start(ours.generated, engine->generated);
    std::printf("first %zu of %d tokens the same", same, steps);
    if (same < engine->leads.size()) {
      std::printf(", then two whose logits are %.3f apart there",
                  static_cast<double>(engine->leads[same]));
    }
    std::printf("\n");
  }
  std::fflush(stdout);
}

void quiet(ggml_log_level level, const char* text, void*) {
  if (level == GGML_LOG_LEVEL_ERROR) std::fputs(text, stderr);
}

}  // namespace

int main(int argc, char** argv) {
  if (argc < 7) {
    std::fputs("ggml_compare MODEL TEXT_FILE THREADS STEPS READ TOKENS...\n", stderr);
    return 2;
  }
  llama_log_set(quiet, nullptr);
  try {
    const llama_model_ptr llama(llama_model_load_from_file(argv[1], llama_model_default_params()));
    if (llama == nullptr) throw std::runtime_error("llama.cpp does not read the model");
    const ggml_runtime::Model model(argv[1]);
    const Tokens text = read_tokens(llama.get(), argv[2]);
    for (int i = 6; i < argc; ++i) {
      compare(std::atoi(argv[i]), std::atoi(argv[5]), std::atoi(argv[4]), std::atoi(argv[3]), text,
              llama.get(), model);
    }
  } catch (const std::exception& error) {
    std::fprintf(stderr, "ggml_compare: %s\n", error.what());
    return 1;
  }
  return 0;
}
