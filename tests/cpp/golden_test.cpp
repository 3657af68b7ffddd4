// Bytes written once and for all (tests/golden): what they mean must never change, on any
// processor.
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <iterator>
#include <sstream>
#include <tqai/codebook.hpp>
#include <tqai/files.hpp>
#include <tqai/quantizer.hpp>
#include <tqai/rotation.hpp>

#include "cache_helpers.hpp"

namespace tqai {
namespace {

using test::gather;
using test::Gathered;

std::filesystem::path golden_path(const std::string& name) {
  return std::filesystem::path(TQAI_GOLDEN) / name;
}

std::vector<std::byte> file_bytes(const std::filesystem::path& path) {
  std::ifstream file(path, std::ios::binary);
  EXPECT_TRUE(file.is_open()) << path;
  std::vector<char> bytes{std::istreambuf_iterator<char>(file), {}};
  const auto all = std::as_bytes(std::span(bytes));
  return {all.begin(), all.end()};
}

std::vector<std::byte> golden(const std::string& name) { return file_bytes(golden_path(name)); }

template <typename T>
std::vector<T> golden_numbers(const std::string& name) {
  const std::vector<std::byte> bytes = golden(name);
  std::vector<T> numbers(bytes.size() / sizeof(T));
  std::memcpy(numbers.data(), bytes.data(), numbers.size() * sizeof(T));
  return numbers;
}

// `tokens`: keys [batch, kv_heads, tokens, head_dim], then values, as FP16.
void expect_tokens(const KvCache& cache, const std::vector<std::uint16_t>& tokens) {
  const Gathered all = gather(cache, 0, cache.tokens());
  ASSERT_EQ(tokens.size(), all.keys.data.size() + all.values.data.size());
  std::size_t i = 0;
  for (const auto* array : {&all.keys, &all.values}) {
    for (const float value : array->data) {
      ASSERT_NEAR(value, from_half(tokens[i]), 2e-3F * (1.0F + std::abs(value))) << i;
      ++i;
    }
  }
}

class GoldenCache : public testing::TestWithParam<int> {};

TEST_P(GoldenCache, MeansWhatItMeant) {
  const int version = GetParam();
  // The third is the second, written anew.
  const std::string same = "cache_" + std::to_string(version == 3 ? 2 : version);
  const auto tokens = golden_numbers<std::uint16_t>(same + ".tokens");
  const KvCache cache = KvCache::deserialize(golden("cache_" + std::to_string(version) + ".bin"));
  ASSERT_GT(cache.packed_tokens(0), 0);
  expect_tokens(cache, tokens);
  expect_tokens(KvCache::deserialize(cache.serialize(BasisAs::matrices)), tokens);
}

INSTANTIATE_TEST_SUITE_P(Versions, GoldenCache, testing::Values(1, 2, 3, 4, 5, 6, 7));

TEST(Golden, TheNewestCachesAreWrittenAlike) {
  for (const std::string name :
       {"cache_3.bin", "cache_4.bin", "cache_5.bin", "cache_6.bin", "cache_7.bin"}) {
    const auto bytes = golden(name);
    EXPECT_EQ(KvCache::deserialize(bytes).serialize(BasisAs::matrices), bytes) << name;
  }
}

// Version 4 says what rows have left out, among exact tokens and inside a tile; what later tokens
// of theirs are called goes by it.
TEST(Golden, GapsAreWhereTheyWere) {
  KvCache cache = KvCache::deserialize(golden("cache_4.bin"));
  ASSERT_EQ(cache.batch(), 2);
  EXPECT_EQ(cache.tokens(), 90);
  const auto gaps = cache.left_out(0);
  constexpr TokenSpan kGaps[] = {{22, 5}, {35, 1}, {73, 1}};
  ASSERT_EQ(gaps.size(), std::size(kGaps));
  for (std::size_t i = 0; i < gaps.size(); ++i) {
    EXPECT_EQ(gaps[i].first, kGaps[i].first);
    EXPECT_EQ(gaps[i].count, kGaps[i].count);
  }
  EXPECT_TRUE(cache.left_out(1).empty());
  EXPECT_EQ(cache.memory().tokens, 2 * 90 - 7 - 3);  // three of row 1 are padding
  cache.crop(30);
  EXPECT_EQ(cache.memory().tokens, 2 * 30 - 5 - 3);
}

// The lines of a text file, each split at its spaces, without its comments.
std::vector<std::vector<std::string>> golden_lines(const std::string& name) {
  std::ifstream file(golden_path(name));
  EXPECT_TRUE(file.is_open()) << name;
  std::vector<std::vector<std::string>> lines;
  for (std::string line; std::getline(file, line);) {
    if (line.starts_with('#')) continue;
    std::istringstream words(line);
    lines.emplace_back(std::istream_iterator<std::string>(words),
                       std::istream_iterator<std::string>());
  }
  return lines;
}

float hex_float(const std::string& word) { return std::strtof(word.c_str(), nullptr); }

// Numbers that look random, with no library's generator: tests/python/test_container.py has them
// too. All are exact in FP16.
std::vector<float> fixed_numbers(std::int64_t count, std::int64_t salt) {
  std::vector<float> numbers;
  for (std::int64_t i = 0; i < count; ++i) {
    const std::int64_t number = (i * i * 40503 + i * salt) % 65521 % 257 - 128;
    numbers.push_back(static_cast<float>(number) / 64.0F);
  }
  return numbers;
}

test::Array fixed_keys() {
  test::Array keys({1, 1, 72, 16});
  keys.data = fixed_numbers(72 * 16, 7);
  for (std::size_t i = 0; i < keys.data.size(); ++i) keys.data[i] += static_cast<float>(i % 4);
  return keys;
}

// The layers of file_2 and file_3: every width but one bit.
KvCache fixed_cache(std::size_t layer) {
  const int bits[][2] = {{2, 3}, {4, 5}, {6, 7}, {8, 2}};
  CacheOptions options = test::geometry(16, bits[layer][0], bits[layer][1], 1);
  options.dtype = DType::f32;
  options.sink_tokens = 2;
  options.residual_window = 4;
  KvCache cache(options, 1);
  test::Array values({1, 1, 72, 16});
  values.data = fixed_numbers(72 * 16, 11);
  cache.append(fixed_keys(), values);
  cache.seal();
  return cache;
}

// What cache_6.bin holds: a row with a token left out, 3 bits a coordinate of values.
KvCache ring_cache() {
  CacheOptions options = test::geometry(32, 2, 3, 1);
  options.value_codes = CodeKind::trellis;
  options.sink_tokens = 2;
  options.residual_window = 4;
  KvCache cache(options, 1);
  test::Array keys({1, 1, 80, 32});
  keys.data = fixed_numbers(80 * 32, 7);
  test::Array values({1, 1, 80, 32});
  values.data = fixed_numbers(80 * 32, 11);
  cache.append(keys, values);
  std::vector<std::uint8_t> hidden(80, 0);
  hidden[30] = 1;
  cache.leave_out(hidden);
  cache.seal();
  return cache;
}

// Version 6 says that codes of values are a trellis's, which encoders of later versions may find
// others of; this one finds those.
TEST(Golden, ValuesInTrellisCodesAreSealedAlike) {
  const KvCache golden_cache = KvCache::deserialize(golden("cache_6.bin"));
  ASSERT_EQ(golden_cache.options().value_codes, CodeKind::trellis);
  EXPECT_EQ(ring_cache().serialize(), golden("cache_6.bin"));
}

// The tokens that cache_7.bin holds, whose keys are in trellis codes and in the basis that it
// carries. Its codes are those of an earlier search; resealed_7.bin has what is found today.
TEST(Golden, KeysInTrellisCodesAreSealedAlike) {
  const KvCache golden_cache = KvCache::deserialize(golden("cache_7.bin"));
  ASSERT_EQ(golden_cache.options().key_codes, CodeKind::trellis);
  CacheOptions options = test::geometry(16, 2, 3, 1);
  options.key_basis = golden_cache.options().key_basis;
  options.key_codes = CodeKind::trellis;
  options.sink_tokens = 2;
  options.residual_window = 4;
  KvCache cache(options, 1);
  test::Array values({1, 1, 72, 16});
  values.data = fixed_numbers(72 * 16, 11);
  cache.append(fixed_keys(), values);
  cache.seal();
  EXPECT_EQ(cache.serialize(BasisAs::matrices), golden("resealed_7.bin"));
}

constexpr std::size_t kFixedLayers = 4;

std::vector<std::byte> tensor_bytes(const CacheFile& file, const std::string& name) {
  std::vector<std::byte> bytes(file.tensor(name).bytes);
  file.read(name, 0, bytes);
  return bytes;
}

class GoldenFile : public testing::TestWithParam<int> {};

// Written by the Python package; the same tokens give the same bytes today.
TEST_P(GoldenFile, HoldsWhatItHeld) {
  const auto path = golden_path("file_" + std::to_string(GetParam()) + ".safetensors");
  const CacheFile file(path);
  EXPECT_EQ(file.version(), GetParam());
  EXPECT_TRUE(test::contains(file.header(), R"("model": "none \u00fc")"));
  for (const bool mapped : {false, true}) {
    LoadOptions options;
    options.mapped = mapped;
    const std::vector<KvCache> layers = load_caches(path, options);
    ASSERT_EQ(layers.size(), kFixedLayers);
    for (std::size_t i = 0; i < kFixedLayers; ++i) {
      EXPECT_EQ(layers[i].packed_tokens(0), 64);
      EXPECT_EQ(layers[i].serialize(), fixed_cache(i).serialize()) << i;
    }
  }
  const std::string exact = "layers.4.keys";
  EXPECT_EQ(file.tensor(exact).dtype, "F16");
  EXPECT_EQ(file.tensor(exact).shape, (std::vector<std::int64_t>{1, 1, 4, 16}));
  EXPECT_NO_THROW(file.verify(exact));
  const std::vector<std::byte> bytes = tensor_bytes(file, exact);
  std::vector<std::uint16_t> halves(bytes.size() / 2);
  std::memcpy(halves.data(), bytes.data(), bytes.size());
  const test::Array keys = fixed_keys();
  ASSERT_EQ(halves.size(), 64U);
  for (std::size_t i = 0; i < 64; ++i) EXPECT_EQ(from_half(halves[i]), keys.data[i]) << i;
}

INSTANTIATE_TEST_SUITE_P(Versions, GoldenFile, testing::Values(2, 3));

// By the first version of tqai.save_cache, for the model that test_save_load.py makes anew: a
// compressed layer, and one that is kept as it is.
TEST(Golden, TheFirstVersionOfFilesHoldsWhatItHeld) {
  const auto path = golden_path("file_1.safetensors");
  const CacheFile file(path);
  EXPECT_EQ(file.version(), 1);
  EXPECT_TRUE(test::contains(file.header(), R"("weights": "83f0e9365192eb70")"));
  const auto tokens = golden_numbers<std::uint16_t>("file_1.tokens");
  for (const bool mapped : {false, true}) {  // the same: its tiles cannot stay where they are
    LoadOptions options;
    options.mapped = mapped;
    const std::vector<KvCache> layers = load_caches(path, options);
    ASSERT_EQ(layers.size(), 1U);
    EXPECT_EQ(layers[0].tokens(), 73);
    EXPECT_EQ(layers[0].packed_tokens(0), 64);
    EXPECT_EQ(layers[0].memory().mapped_bytes, 0U);
    EXPECT_EQ(layers[0].options().dtype, DType::bf16);
    expect_tokens(layers[0], tokens);
  }
  for (const std::string exact : {"layers.1.keys", "layers.1.values"}) {
    EXPECT_EQ(file.tensor(exact).dtype, "BF16");
    EXPECT_EQ(file.tensor(exact).shape, (std::vector<std::int64_t>{1, 1, 73, 16}));
    EXPECT_NO_THROW(file.verify(exact));
  }
}

TEST(Golden, TheNewestFileIsWrittenAlike) {
  const auto path = golden_path("file_3.safetensors");
  const CacheFile file(path);
  std::vector<FileEntry> entries;
  for (const FileTensor& tensor : file.tensors()) {
    FileEntry entry;
    entry.name = tensor.name;
    entry.dtype = tensor.dtype;
    if (tensor.dtype != "U8") entry.shape = tensor.shape;
    entry.write = [&](const ByteSink& sink) { sink(tensor_bytes(file, tensor.name)); };
    entries.push_back(entry);
  }
  const auto written = std::filesystem::temp_directory_path() /
                       ("tqai_golden_" + std::to_string(std::random_device()()));
  write_file(written, entries, file.header());
  EXPECT_EQ(file_bytes(written), file_bytes(path));
  std::filesystem::remove(written);
}

TEST(Golden, CodebooksAreWhatTheyWere) {
  const auto lines = golden_lines("codebooks.txt");
  ASSERT_EQ(lines.size(), 21U);
  for (const auto& line : lines) {
    const bool exact = line[2] == "exact";
    const Codebook& now =
        codebook(std::stoi(line[0]), std::stoi(line[1]), exact ? Grid::exact : Grid::int8);
    const std::string where = line[0] + ' ' + line[1] + ' ' + line[2];
    const std::span values(line.begin() + (exact ? 3 : 4), line.end());
    ASSERT_EQ(now.centroids().size(), values.size()) << where;
    for (std::size_t i = 0; i < values.size(); ++i) {
      if (exact) {
        EXPECT_EQ(now.centroids()[i], hex_float(values[i])) << where << ", " << i;
      } else {
        EXPECT_EQ(now.levels()[i], std::stoi(values[i])) << where << ", " << i;
      }
    }
    // The best step is found by sums that processors round differently: docs/format.md.
    if (!exact) {
      EXPECT_NEAR(now.step() / hex_float(line[3]), 1.0F, 1e-5F) << where;
    }
  }
}

std::string hex_of(const std::vector<std::uint8_t>& bytes) {
  std::string hex;
  for (const std::uint8_t byte : bytes) {
    hex += "0123456789abcdef"[byte / 16];
    hex += "0123456789abcdef"[byte % 16];
  }
  return hex;
}

TEST(Golden, CodesAreWhatTheyWere) {
  const auto lines = golden_lines("codes.txt");
  ASSERT_EQ(lines.size(), 21U);
  for (const auto& line : lines) {
    QuantizerOptions options;
    options.head_dim = std::stoi(line[0]);
    options.bits = std::stoi(line[1]);
    options.grid = line[2] == "exact" ? Grid::exact : Grid::int8;
    options.rotation = line[3] == "haar" ? RotationKind::haar : RotationKind::hadamard;
    options.seed = std::stoull(line[4]);
    const Quantizer quantizer(options);
    std::vector<std::uint8_t> codes(quantizer.code_bytes());
    std::uint16_t norm = 0;
    quantizer.encode(fixed_numbers(options.head_dim, 7).data(), 1, codes.data(), &norm);
    EXPECT_EQ(norm, std::stoi(line[5], nullptr, 16)) << line[0] << ' ' << line[1];
    EXPECT_EQ(hex_of(codes), line[6]) << line[0] << ' ' << line[1];
  }
}

// Tables, and the codes of one vector.
TEST(Golden, TrellisesAreWhatTheyWere) {
  const auto lines = golden_lines("trellises.txt");
  ASSERT_EQ(lines.size(), static_cast<std::size_t>(kMaxTrellisBits));
  for (const auto& line : lines) {
    const Trellis& now = trellis(std::stoi(line[0]));
    EXPECT_EQ(now.step(1), hex_float(line[1])) << line[0];
    ASSERT_EQ(line.size(), 36U);
    for (std::size_t i = 0; i < 16; ++i) {
      EXPECT_EQ(now.older[i], std::stoi(line[2 + i])) << line[0] << ' ' << i;
      EXPECT_EQ(now.recent[i], std::stoi(line[18 + i])) << line[0] << ' ' << i;
    }
    QuantizerOptions options{64, now.bits};
    options.codes = CodeKind::trellis;
    const Quantizer quantizer(options);
    std::vector<std::uint8_t> codes(quantizer.code_bytes());
    std::uint16_t norm = 0;
    quantizer.encode(fixed_numbers(64, 7).data(), 1, codes.data(), &norm);
    EXPECT_EQ(norm, std::stoi(line[34], nullptr, 16)) << line[0];
    EXPECT_EQ(hex_of(codes), line[35]) << line[0];
  }
}

TEST(Golden, KeyTrellisesAreWhatTheyWere) {
  const auto lines = golden_lines("key_trellises.txt");
  ASSERT_EQ(lines.size(), static_cast<std::size_t>(kMaxTrellisBits - kMinKeyTrellisBits + 1));
  for (const auto& line : lines) {
    const KeyTrellis& now = key_trellis(std::stoi(line[0]));
    EXPECT_EQ(now.step(1), hex_float(line[1])) << line[0];
    EXPECT_EQ(now.start, static_cast<unsigned>(std::stoi(line[2]))) << line[0];
    ASSERT_EQ(line.size(), 3U + KeyTrellis::kWindows);
    for (std::size_t i = 0; i < KeyTrellis::kWindows; ++i) {
      EXPECT_EQ(now.levels[i], std::stoi(line[3 + i])) << line[0] << ' ' << i;
    }
  }
}

// Files keep only the seeds. rotation_test has more of Haar's.
TEST(Golden, RotationsAreWhatTheyWere) {
  const auto lines = golden_lines("rotations.txt");
  ASSERT_EQ(lines.size(), 16U);
  for (const auto& line : lines) {
    const bool haar = line[0] == "haar";
    const Rotation rotation(std::stoi(line[1]), haar ? RotationKind::haar : RotationKind::hadamard,
                            std::stoull(line[2]));
    if (haar) {
      ASSERT_EQ(line.size() - 3, rotation.matrix().size());
      for (std::size_t i = 0; i < rotation.matrix().size(); ++i) {
        EXPECT_EQ(rotation.matrix()[i], hex_float(line[3 + i])) << line[2] << ", " << i;
      }
    } else {
      const auto signs = rotation.signs();
      std::string digits;
      for (std::size_t i = 0; i < signs.size(); i += 4) {
        unsigned digit = 0;
        for (std::size_t k = 0; k < 4; ++k) digit |= (signs[i + k] < 0.0F ? 1U : 0U) << k;
        digits += "0123456789abcdef"[digit];
      }
      EXPECT_EQ(digits, line[3]) << line[1] << ' ' << line[2];
    }
  }
}

}  // namespace
}  // namespace tqai
