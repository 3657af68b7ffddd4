// Two conversations served together, and what the process holds before and after one of them ends.
#include <array>
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <fstream>
#include <iterator>
#include <random>
#include <string>
#include <tqai/cache.hpp>
#include <tqai/sequences.hpp>
#include <vector>

namespace {

// Of a model.
constexpr int kLayers = 16;
constexpr int kKvHeads = 2;
constexpr int kHeadDim = 64;

constexpr std::int64_t kPrompt = 12000;
constexpr std::int64_t kGenerated = 4000;

using Conversation = std::vector<tqai::KvCache>;  // [kLayers]

Conversation new_conversation() {
  tqai::CacheOptions options;
  options.kv_heads = kKvHeads;
  options.head_dim = kHeadDim;
  options.dtype = tqai::DType::f32;
  Conversation layers;
  for (int layer = 0; layer < kLayers; ++layer) layers.emplace_back(options);
  return layers;
}

// Keys or values, [1, kKvHeads, tokens, kHeadDim], from anywhere among `numbers`.
tqai::ConstTensor some_tokens(const std::vector<float>& numbers, std::int64_t tokens,
                              std::mt19937& random) {
  const auto room = numbers.size() - static_cast<std::size_t>(kKvHeads * tokens * kHeadDim);
  return {numbers.data() + random() % room,
          tqai::DType::f32,
          {1, kKvHeads, tokens, kHeadDim},
          {kKvHeads * tokens * kHeadDim, tokens * kHeadDim, kHeadDim, 1}};
}

// Bytes of memory that the process has; 0 where only Linux would say it.
double resident_megabytes() {
  std::ifstream statm("/proc/self/statm");
  std::size_t pages = 0;
  std::size_t resident = 0;
  statm >> pages >> resident;
  return static_cast<double>(resident) * 4096 / 1e6;
}

void print_held(const char* when) {
  std::printf("%-24s caches %6.1f MB, process %6.1f MB\n", when,
              static_cast<double>(tqai::allocated_bytes()) / 1e6, resident_megabytes());
}

}  // namespace

int main() {
  std::mt19937 random(7);
  std::normal_distribution<float> normal;
  std::vector<float> numbers(std::size_t{1} << 21);
  for (float& number : numbers) number = normal(random);
  tqai::Resources one_thread;
  one_thread.threads = 1;

  print_held("before");
  std::vector<Conversation> conversations;
  for (int i = 0; i < 2; ++i) {
    conversations.push_back(new_conversation());
    for (tqai::KvCache& layer : conversations.back()) {
      layer.append(some_tokens(numbers, kPrompt, random), some_tokens(numbers, kPrompt, random), {},
                   one_thread);
    }
  }
  for (std::int64_t token = 0; token < kGenerated; ++token) {
    for (int layer = 0; layer < kLayers; ++layer) {
      std::vector<tqai::SequenceTokens> step;
      for (Conversation& each : conversations) {
        step.push_back({&each[static_cast<std::size_t>(layer)],
                        some_tokens(numbers, 1, random),
                        some_tokens(numbers, 1, random),
                        {}});
      }
      tqai::append(step, one_thread);
    }
  }
  print_held("two conversations");
  conversations.pop_back();
  print_held("one has ended");
  conversations.clear();
  print_held("both have");
  return 0;
}
