// Writes inputs to start from into a folder: caches of each kind, those of tests/golden that older
// versions wrote, with operations after them, and codes.
//
// fuzz_seeds FOLDER GOLDEN
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <iterator>
#include <random>
#include <string>
#include <tqai/cache.hpp>
#include <tqai/files.hpp>
#include <tqai/key_basis.hpp>
#include <vector>

namespace {

using namespace tqai;

constexpr int kDim = 8;

class Folder {
 public:
  explicit Folder(const std::filesystem::path& path) : path_(path) {
    std::filesystem::create_directories(path);
  }
  void write(const std::string& name, const std::vector<std::uint8_t>& bytes) const {
    std::ofstream file(path_ / name, std::ios::binary);
    file.write(reinterpret_cast<const char*>(bytes.data()),
               static_cast<std::streamsize>(bytes.size()));
    if (!file) std::exit((std::fprintf(stderr, "cannot write %s\n", name.c_str()), 1));
  }

 private:
  std::filesystem::path path_;
};

struct Kind {
  const char* name;
  Centering centering;
  int sections;  // of the rotary embedding; 0: none
  DType dtype;
  int bits;
  int tokens;
  int rows;
  bool in_basis = false;
  CodeKind value_codes = CodeKind::scalar;
  CodeKind key_codes = CodeKind::scalar;
};

std::shared_ptr<const KeyBasis> basis_for(int bits) {
  KeyMoments moments(1, kDim);
  std::vector<float> keys(4 * kDim);
  for (std::size_t i = 0; i < keys.size(); ++i) keys[i] = static_cast<float>(i * i % 7);
  moments.add_keys(0, keys);
  moments.add_queries(0, keys);
  return std::make_shared<const KeyBasis>(KeyBasis::learn(moments, bits));
}

KvCache cache_of(const Kind& kind) {
  CacheOptions options;
  options.kv_heads = 1;
  options.head_dim = kDim;
  options.dtype = kind.dtype;
  options.bits_k = options.bits_v = kind.bits;
  options.sink_tokens = 2;
  options.residual_window = 4;
  options.centering = kind.centering;
  options.value_codes = kind.value_codes;
  options.key_codes = kind.key_codes;
  if (kind.in_basis) options.key_basis = basis_for(kind.bits);
  if (kind.sections > 0) {
    Rope rope;
    rope.rotary_dim = kDim;
    for (int f = 0; f < kDim / 2; ++f) {
      rope.inv_freq.push_back(std::pow(0.1F, static_cast<float>(f)));
      if (kind.sections > 1) {
        rope.sections.push_back(static_cast<std::uint8_t>(f % kind.sections));
      }
    }
    options.rope = rope;
  }
  KvCache cache(options);
  std::mt19937_64 random(static_cast<std::uint64_t>(kind.bits));
  const auto tokens = static_cast<std::size_t>(kind.tokens);
  std::vector<float> numbers(tokens * kDim);
  for (float& x : numbers) x = 1.0F + static_cast<float>(random() >> 40) / 16777216.0F;
  std::vector<std::uint32_t> data(numbers.size());
  convert_from_float(numbers.data(), numbers.size(), kind.dtype, data.data());
  const ConstTensor tensor{data.data(), kind.dtype, {1, 1, kind.tokens, kDim}, {0, 0, kDim, 1}};
  std::vector<std::int64_t> positions(tokens * static_cast<std::size_t>(kind.sections));
  for (std::size_t i = 0; i < positions.size(); ++i) {
    positions[i] = static_cast<std::int64_t>(i % tokens / (1 + i / tokens));
  }
  if (kind.sections > 1) {
    cache.append(
        tensor, tensor,
        PositionTensor{positions.data(), {1, kind.sections, kind.tokens}, {0, kind.tokens, 1}});
  } else {
    cache.append(tensor, tensor);
  }
  cache.seal();
  if (kind.rows > 1) cache.select(std::vector<std::int64_t>(static_cast<std::size_t>(kind.rows)));
  return cache;
}

// An append that seals, one at positions, attention, a copy, less, gathering, beams, a window.
void write_with_choices(const Folder& folder, const std::string& name,
                        std::vector<std::uint8_t> bytes) {
  constexpr std::uint8_t kChoices[] = {0, 90, 1, 1,   70, 2, 1, 1, 7, 2, 9, 9, 5,
                                       3, 1,  3, 200, 6,  9, 4, 1, 0, 1, 8, 40};
  bytes.insert(bytes.end(), std::begin(kChoices), std::end(kChoices));
  bytes.push_back(sizeof(kChoices));
  folder.write(name, bytes);
}

void write_golden(const Folder& folder, const std::filesystem::path& golden) {
  for (const auto& entry : std::filesystem::directory_iterator(golden)) {
    if (entry.path().extension() != ".bin") continue;
    std::ifstream file(entry.path(), std::ios::binary);
    const std::istreambuf_iterator<char> begin(file);
    write_with_choices(folder, entry.path().stem().string(),
                       std::vector<std::uint8_t>(begin, std::istreambuf_iterator<char>()));
  }
}

void write_caches(const Folder& folder) {
  const Kind kinds[] = {
      {"empty", Centering::automatic, 0, DType::f32, 4, 0, 1},
      {"exact", Centering::automatic, 0, DType::f16, 4, 5, 1},
      {"plain", Centering::none, 0, DType::bf16, 1, 72, 1},
      {"mean", Centering::mean, 0, DType::bf16, 3, 72, 2},
      {"rope", Centering::rope, 1, DType::f16, 4, 136, 1},
      {"sections", Centering::rope, 3, DType::bf16, 2, 72, 1},
      {"wide", Centering::automatic, 1, DType::f32, 8, 71, 1},
      {"basis", Centering::rope, 1, DType::f16, 3, 72, 2, true},
      {"trellis", Centering::mean, 0, DType::f16, 3, 72, 1, false, CodeKind::trellis},
      {"key trellis", Centering::rope, 1, DType::f16, 2, 72, 1, true, CodeKind::trellis,
       CodeKind::trellis},
  };
  for (const Kind& kind : kinds) {
    KvCache cache = cache_of(kind);
    std::vector<std::uint8_t> bytes;
    for (const std::byte byte : cache.serialize(BasisAs::matrices))
      bytes.push_back(static_cast<std::uint8_t>(byte));
    write_with_choices(folder, kind.name, std::move(bytes));
  }
}

// A file of two layers, and an application's header.
void write_file(const Folder& folder, const std::filesystem::path& path) {
  const KvCache first = cache_of({"", Centering::mean, 0, DType::bf16, 2, 72, 1});
  const KvCache second = cache_of({"", Centering::automatic, 0, DType::f32, 4, 3, 2});
  const KvCache* const layers[] = {&first, &second};
  save_caches(path, layers, R"({"model": "a\u00e9\n", "more": [1, -2.5e3, null, {"x": true}]})");
  std::ifstream file(path, std::ios::binary);
  std::vector<char> bytes{std::istreambuf_iterator<char>(file), {}};
  std::filesystem::remove(path);
  std::uint64_t length = 0;
  std::memcpy(&length, bytes.data(), sizeof(length));
  const auto header = static_cast<std::ptrdiff_t>(sizeof(length) + length);
  std::vector<std::uint8_t> input(bytes.begin() + sizeof(length), bytes.begin() + header);
  input.push_back(0);
  input.insert(input.end(), bytes.begin() + header, bytes.end());
  folder.write("layers", input);
}

void write_calls(const Folder& folder) {
  for (std::uint8_t kind = 0; kind < 8; ++kind) {
    // Settings, and each call in turn with arguments that are right.
    std::vector<std::uint8_t> bytes(24, kind);
    for (std::uint8_t call = 0; call < 24; ++call) {
      bytes.push_back(call);
      bytes.insert(bytes.end(), 11, static_cast<std::uint8_t>(7 * kind + 5 * call));
    }
    folder.write("calls" + std::to_string(kind), bytes);
  }
}

void write_codes(const Folder& folder) {
  std::mt19937_64 random(5);
  for (std::uint8_t bits = 0; bits < 8; ++bits) {
    for (std::uint8_t side = 0; side < 2; ++side) {
      std::vector<std::uint8_t> bytes = {bits, 0, side};
      for (int i = 0; i < 64; ++i) bytes.push_back(static_cast<std::uint8_t>(random()));
      folder.write("bits" + std::to_string(bits + 1) + (side == 0 ? "_keys" : "_values"), bytes);
    }
  }
}

}  // namespace

int main(int argc, char** argv) {
  if (argc != 3) {
    std::fprintf(stderr, "usage: fuzz_seeds FOLDER GOLDEN\n");
    return 2;
  }
  const std::filesystem::path folder = argv[1];
  write_caches(Folder(folder / "cache"));
  write_golden(Folder(folder / "cache"), argv[2]);
  write_calls(Folder(folder / "c_api"));
  write_file(Folder(folder / "file"), folder / "file.safetensors");
  write_codes(Folder(folder / "packing"));
  return 0;
}
