// Generates text with a GGUF model: ggml computes the weights' products, tqai attention.
#include <ggml-cpp.h>
#include <llama-cpp.h>

#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <iterator>
#include <optional>
#include <sstream>
#include <stdexcept>
#include <string>
#include <string_view>
#include <vector>

#include "runtime.hpp"

namespace {

using ggml_runtime::CacheKind;
using ggml_runtime::Runtime;

constexpr int kMostThreads = 512;  // as ggml has

constexpr const char* kHelp = R"(ggml_runtime --model FILE [options]

  --model FILE      a GGUF file of a Llama, Qwen2 or Qwen3
  --prompt TEXT     what to go on from
  --file FILE       the same, from a file
  --tokens "1 2 3"  the same, as numbers of tokens; the vocabulary is not read, numbers are printed
  --predict N       tokens to generate at most (default: 64)
  --cache KIND      tqai, or f16 as llama.cpp has it (default: tqai)
  --bits-k N        bits a coordinate of a key, 1 to 8 (default: 4)
  --bits-v N        bits a coordinate of a value, 1 to 8 (default: 2)
  --sinks N         first tokens that stay exact (default: 4)
  --window N        last tokens that stay exact (default: 128)
  --ctx N           tokens at most (default: 4096)
  --threads N       (default: 1)
  --batch N         tokens of the prompt that are read at once (default: 512)
  --kl N            in place of generating: reads all but the last N tokens of the prompt, then these
                    one by one with either cache, and prints how far the packed one's predictions
                    are from the f16 one's
  --logits FILE     in place of generating: reads the prompt and writes the logits after each of its
                    tokens, as fp32 numbers
)";

struct Arguments {
  std::string model;
  std::string prompt;
  std::string logits;
  std::optional<std::vector<std::int32_t>> tokens;
  int predict = 64;
  int kl = 0;
  ggml_runtime::Settings settings;
};

[[noreturn]] void wrong(const std::string& what) {
  std::fprintf(stderr, "ggml_runtime: %s\n", what.c_str());
  std::exit(2);
}

int whole(const std::string& name, const std::string& text, int smallest, int largest = 1 << 30) {
  char* end = nullptr;
  const long value = std::strtol(text.c_str(), &end, 10);
  if (text.empty() || *end != '\0' || value < smallest || value > largest) {
    wrong(name + " is " + text + "; expected a number from " + std::to_string(smallest) + " to " +
          std::to_string(largest));
  }
  return static_cast<int>(value);
}

std::string contents(const std::string& path) {
  std::ifstream stream(path, std::ios::binary);
  std::ostringstream text;
  if (stream) text << stream.rdbuf();  // of a folder, whose reading fails, nothing
  if (!stream || std::filesystem::is_directory(path)) wrong("cannot read " + path);
  return text.str();
}

Arguments parse(int argc, char** argv) {
  Arguments arguments;
  for (int i = 1; i < argc; ++i) {
    const std::string name = argv[i];
    if (name == "--help") {
      std::fputs(kHelp, stdout);
      std::exit(0);
    }
    if (i + 1 == argc) wrong(name + " needs a value, or is not an option; --help lists them");
    const std::string value = argv[++i];
    ggml_runtime::Settings& settings = arguments.settings;
    if (name == "--model") {
      arguments.model = value;
    } else if (name == "--prompt") {
      arguments.prompt = value;
    } else if (name == "--file") {
      arguments.prompt = contents(value);
    } else if (name == "--tokens") {
      std::istringstream stream(value);
      arguments.tokens.emplace(std::istream_iterator<std::int32_t>(stream),
                               std::istream_iterator<std::int32_t>());
      if (!stream.eof()) wrong("--tokens has something that is not a number");
    } else if (name == "--predict") {
      arguments.predict = whole(name, value, 0);
    } else if (name == "--cache") {
      if (value != "tqai" && value != "f16") wrong("--cache is " + value + "; it is tqai or f16");
      settings.cache = value == "tqai" ? CacheKind::tqai : CacheKind::f16;
    } else if (name == "--bits-k") {
      settings.bits_k = whole(name, value, 1);
    } else if (name == "--bits-v") {
      settings.bits_v = whole(name, value, 1);
    } else if (name == "--sinks") {
      settings.sink_tokens = whole(name, value, 0);
    } else if (name == "--window") {
      settings.residual_window = whole(name, value, 0);
    } else if (name == "--ctx") {
      settings.context = whole(name, value, 1);
    } else if (name == "--threads") {
      settings.threads = whole(name, value, 1, kMostThreads);
    } else if (name == "--batch") {
      settings.batch = whole(name, value, 1);
    } else if (name == "--kl") {
      arguments.kl = whole(name, value, 1);
    } else if (name == "--logits") {
      arguments.logits = value;
    } else {
      wrong(name + " is not an option; --help lists them");
    }
  }
  if (arguments.tokens && !arguments.prompt.empty()) wrong("--tokens goes without another prompt");
  if (arguments.model.empty()) wrong("--model is needed; --help tells more");
  return arguments;
}

// The model's vocabulary, by llama.cpp: a tokenizer is no part of what this program shows.
class Vocabulary {
 public:
  explicit Vocabulary(const std::string& path) {
    llama_model_params parameters = llama_model_default_params();
    parameters.vocab_only = true;
    model_.reset(llama_model_load_from_file(path.c_str(), parameters));
    if (model_ == nullptr) throw std::runtime_error("llama.cpp reads no vocabulary in " + path);
    vocab_ = llama_model_get_vocab(model_.get());
  }

  std::vector<std::int32_t> tokens_of(const std::string& text) const {
    const auto length = static_cast<int>(text.size());
    std::vector<std::int32_t> tokens(text.size() + 2);
    const int count = llama_tokenize(vocab_, text.c_str(), length, tokens.data(),
                                     static_cast<int>(tokens.size()), true, true);
    if (count < 0) throw std::runtime_error("the prompt has too many tokens");
    tokens.resize(static_cast<std::size_t>(count));
    return tokens;
  }
  std::string text_of(std::int32_t token) const {
    std::string text(256, '\0');
    const int length =
        llama_token_to_piece(vocab_, token, text.data(), static_cast<int>(text.size()), 0, false);
    text.resize(static_cast<std::size_t>(std::max(length, 0)));
    return text;
  }
  bool ends(std::int32_t token) const { return llama_vocab_is_eog(vocab_, token); }

 private:
  llama_model_ptr model_;
  const llama_vocab* vocab_ = nullptr;
};

double seconds_since(std::chrono::steady_clock::time_point start) {
  return std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
}

std::int32_t most_likely(const std::vector<float>& logits) {
  return static_cast<std::int32_t>(std::max_element(logits.begin(), logits.end()) - logits.begin());
}

std::vector<double> log_probabilities(const std::vector<float>& logits) {
  const double largest = static_cast<double>(*std::max_element(logits.begin(), logits.end()));
  double sum = 0.0;
  for (const float logit : logits) sum += std::exp(static_cast<double>(logit) - largest);
  std::vector<double> result(logits.begin(), logits.end());
  for (double& value : result) value -= largest + std::log(sum);
  return result;
}

// Of single steps over a growing cache, so that every prediction comes from what the cache holds.
void compare_predictions(const ggml_runtime::Model& model, const Arguments& arguments,
                         const std::vector<std::int32_t>& tokens) {
  const auto last = static_cast<std::size_t>(arguments.kl);
  if (tokens.size() <= last) wrong("the prompt has no more than --kl tokens");
  ggml_runtime::Settings settings = arguments.settings;
  settings.cache = CacheKind::tqai;
  Runtime packed(model, settings);
  settings.cache = CacheKind::f16;
  Runtime exact(model, settings);
  const std::span all(tokens);
  std::vector<float> packed_logits = packed.decode(all.first(tokens.size() - last));
  std::vector<float> exact_logits = exact.decode(all.first(tokens.size() - last));
  double kl = 0.0;
  double packed_loss = 0.0;
  double exact_loss = 0.0;
  int same = 0;
  for (const std::int32_t& token : all.last(last)) {
    // Those after the prompt come from reading it in batches.
    packed_logits = packed.decode({&token, 1});
    exact_logits = exact.decode({&token, 1});
    const std::vector<double> p = log_probabilities(exact_logits);
    const std::vector<double> q = log_probabilities(packed_logits);
    for (std::size_t i = 0; i < p.size(); ++i) kl += std::exp(p[i]) * (p[i] - q[i]);
    same += most_likely(exact_logits) == most_likely(packed_logits) ? 1 : 0;
    const std::size_t next = static_cast<std::size_t>(&token - tokens.data()) + 1;
    if (next < tokens.size()) {
      packed_loss -= q[static_cast<std::size_t>(tokens[next])];
      exact_loss -= p[static_cast<std::size_t>(tokens[next])];
    }
  }
  const double steps = arguments.kl;
  std::printf(
      "%d steps after %zu tokens: mean KL %.5f; perplexity f16 %.3f, tqai %.3f; same most "
      "likely token %.1f %%\n",
      arguments.kl, tokens.size() - last, kl / steps,
      std::exp(exact_loss / std::max(steps - 1.0, 1.0)),
      std::exp(packed_loss / std::max(steps - 1.0, 1.0)), 100.0 * same / steps);
  std::printf("cache: f16 %.1f MB, tqai %.1f MB\n", static_cast<double>(exact.cache_bytes()) / 1e6,
              static_cast<double>(packed.cache_bytes()) / 1e6);
}

void write_logits(Runtime& runtime, const Arguments& arguments,
                  const std::vector<std::int32_t>& tokens) {
  const std::vector<float> logits = runtime.decode(tokens, true);
  std::ofstream stream(arguments.logits, std::ios::binary);
  stream.write(reinterpret_cast<const char*>(logits.data()),
               static_cast<std::streamsize>(logits.size() * sizeof(float)));
  if (!stream.flush()) throw std::runtime_error("cannot write " + arguments.logits);
}

void generate(Runtime& runtime, const Arguments& arguments, const std::vector<std::int32_t>& prompt,
              const std::optional<Vocabulary>& vocabulary) {
  auto start = std::chrono::steady_clock::now();
  std::vector<float> logits = runtime.decode(prompt);
  const double reading = seconds_since(start);

  start = std::chrono::steady_clock::now();
  int generated = 0;
  int steps = 0;
  while (generated < arguments.predict) {
    const std::int32_t token = most_likely(logits);
    if (vocabulary && vocabulary->ends(token)) break;
    const std::string text = vocabulary ? vocabulary->text_of(token) : std::to_string(token) + " ";
    std::fwrite(text.data(), 1, text.size(), stdout);
    std::fflush(stdout);
    if (++generated == arguments.predict) break;
    logits = runtime.decode({&token, 1});
    ++steps;
  }
  const double writing = seconds_since(start);
  std::printf("\n");
  std::fprintf(
      stderr,
      "prompt: %zu tokens, %.1f a second; generated: %d tokens, %.1f a second; cache: %.2f "
      "MB for %d tokens, %zu bytes each\n",
      prompt.size(), static_cast<double>(prompt.size()) / reading, generated,
      steps / std::max(writing, 1e-9), static_cast<double>(runtime.cache_bytes()) / 1e6,
      runtime.tokens(), runtime.cache_bytes() / static_cast<std::size_t>(runtime.tokens()));
}

void quiet(ggml_log_level level, const char* text, void*) {
  if (level == GGML_LOG_LEVEL_ERROR) std::fputs(text, stderr);
}

int run(const Arguments& arguments) {
  const ggml_runtime::Model model(arguments.model);
  std::optional<Vocabulary> vocabulary;
  if (!arguments.tokens) vocabulary.emplace(arguments.model);
  const std::vector<std::int32_t> prompt =
      arguments.tokens ? *arguments.tokens : vocabulary->tokens_of(arguments.prompt);
  if (prompt.empty()) wrong("there is no prompt: --prompt, --file or --tokens");
  if (arguments.kl > 0) {
    compare_predictions(model, arguments, prompt);
    return 0;
  }
  Runtime runtime(model, arguments.settings);
  if (!arguments.logits.empty()) {
    write_logits(runtime, arguments, prompt);
  } else {
    generate(runtime, arguments, prompt, vocabulary);
  }
  return 0;
}

}  // namespace

int main(int argc, char** argv) {
  llama_log_set(quiet, nullptr);
  try {
    const int code = run(parse(argc, argv));
    if (std::fflush(stdout) != 0 || std::ferror(stdout) != 0) wrong("cannot write the text");
    return code;
  } catch (const std::exception& error) {
    wrong(error.what());
  }
}
