// Caches in files: what comes back, what is refused, and that nothing is left half done.
#include <cstring>
#include <filesystem>
#include <fstream>
#include <iterator>
#include <thread>
#include <tqai/files.hpp>

#include "cache_helpers.hpp"
#include "files/json_reader.hpp"

#ifndef _WIN32
#include <sys/stat.h>
#include <unistd.h>
#endif

namespace tqai {
namespace {

namespace fs = std::filesystem;
using test::contains;
using test::geometry;
using test::message_of;
using test::Tokens;

class Files : public testing::Test {
 protected:
  void SetUp() override {
    const auto* info = testing::UnitTest::GetInstance()->current_test_info();
    const char* level = std::getenv("TQAI_LEVEL");
    folder_ = fs::temp_directory_path() /
              ("tqai_files_" + std::string(info->name()) + (level != nullptr ? level : "") +
               std::to_string(std::random_device()()));
    fs::create_directory(folder_);
    path_ = folder_ / "cache.safetensors";
  }
  void TearDown() override { fs::remove_all(folder_); }

  KvCache filled(int dim, int bits, std::int64_t tokens = 300) {
    CacheOptions options = geometry(dim, bits, bits);
    options.dtype = DType::f32;
    KvCache cache(options, 2);
    const Tokens all(2, options.kv_heads, tokens, dim, engine_);
    all.append_to(cache, 0, tokens);
    cache.seal();
    cache.select(std::vector<std::int64_t>{1, 0, 1});
    return cache;
  }

  std::vector<char> bytes() const {
    std::ifstream file(path_, std::ios::binary);
    return {std::istreambuf_iterator<char>(file), {}};
  }
  void put(const std::string& text) const { std::ofstream(path_, std::ios::binary) << text; }
  // A file with this safetensors header and data.
  void put_file(const std::string& header, const std::string& data = {}) const {
    const auto length = static_cast<std::uint64_t>(header.size());
    std::string text(8, '\0');
    std::memcpy(text.data(), &length, 8);
    put(text + header + data);
  }
  std::size_t files_in_folder() const {
    return static_cast<std::size_t>(
        std::distance(fs::directory_iterator(folder_), fs::directory_iterator()));
  }

  fs::path folder_;
  fs::path path_;
  std::mt19937_64 engine_ = test::random_engine(50);
};

TEST_F(Files, GiveTheSameCachesCopiedAndMapped) {
  const KvCache first = filled(64, 4);
  const KvCache second = filled(48, 3);
  const KvCache* layers[] = {&first, &second};
  save_caches(path_, layers, R"({"model": "ours \" ü"})");
  for (const bool mapped : {false, true}) {
    LoadOptions options;
    options.mapped = mapped;
    const std::vector<KvCache> back = load_caches(path_, options);
    ASSERT_EQ(back.size(), 2U);
    for (std::size_t i = 0; i < 2; ++i) {
      EXPECT_EQ(back[i].serialize(), layers[i]->serialize());
      const MemoryReport memory = back[i].memory();
      EXPECT_EQ(memory.mapped_bytes, mapped ? layers[i]->memory().packed_bytes : 0U);
      EXPECT_EQ(memory.packed_bytes, mapped ? 0U : layers[i]->memory().packed_bytes);
    }
  }
  EXPECT_EQ(CacheFile(path_).header(), R"({"model": "ours \" ü"})");
  EXPECT_EQ(CacheFile(path_).version(), 3);
}

TEST_F(Files, MappedCachesGoOnAndOutliveTheFile) {
  const KvCache cache = filled(64, 4);
  const KvCache* layers[] = {&cache};
  save_caches(path_, layers);
  LoadOptions options;
  options.mapped = true;
  const std::size_t before = allocated_bytes();
  KvCache mapped = std::move(load_caches(path_, options).front());
  EXPECT_EQ(allocated_bytes() - before, mapped.memory().total_bytes());
  KvCache copied = std::move(load_caches(path_).front());
  save_caches(path_, layers);  // in its place, while it is mapped
  fs::remove(path_);
  const Tokens more(3, 2, 200, 64, engine_);
  for (KvCache* each : {&mapped, &copied}) {
    each->crop(250);
    more.append_to(*each, 0, 200);
    each->seal();
  }
  EXPECT_EQ(mapped.serialize(), copied.serialize());
  const test::Array queries({3, 4, 1, 64}, engine_);
  EXPECT_EQ(test::attend(mapped, queries).data, test::attend(copied, queries).data);
  mapped.crop(0);
  EXPECT_EQ(mapped.memory().mapped_bytes, 0U);
}

TEST_F(Files, ReadingAndWritingTakeNoSecondCopy) {
  const KvCache cache = filled(64, 8, 4000);
  const std::size_t held = cache.memory().total_bytes();
  std::size_t largest = 0;
  std::size_t all = 0;
  cache.serialize([&](std::span<const std::byte> bytes) {
    largest = std::max(largest, bytes.size());
    all += bytes.size();
  });
  EXPECT_EQ(all, cache.serialized_bytes());
  EXPECT_LT(largest, held / 10);
#if defined(__linux__) && !defined(__SANITIZE_ADDRESS__)
  // How much more was resident at most.
  const auto most = [] {
    std::ifstream status("/proc/self/status");
    for (std::string word; status >> word;) {
      if (word == "VmHWM:") {
        std::size_t kilobytes = 0;
        status >> kilobytes;
        return kilobytes * 1024;
      }
    }
    return std::size_t{0};
  };
  const KvCache* layers[] = {&cache};
  const std::size_t before = most();
  save_caches(path_, layers);
  EXPECT_LT(most(), before + held / 10 + (1U << 19));  // it may fall: the system rounds
#endif
}

TEST_F(Files, HoldOtherTensorsToo) {
  const KvCache cache = filled(64, 4);
  const float numbers[] = {1.0F, 2.0F, 3.0F};
  const FileEntry entries[] = {
      {"keys", "F32", std::vector<std::int64_t>{3, 1},
       [&](const ByteSink& sink) { sink(std::as_bytes(std::span(numbers))); }},
      {"nothing", "F16", std::vector<std::int64_t>{0, 4}, [](const ByteSink&) {}},
      {layer_tensor(3), "U8", std::nullopt, [&](const ByteSink& sink) { cache.serialize(sink); }},
  };
  write_file(path_, entries);
  const CacheFile file(path_);
  ASSERT_EQ(file.tensors().size(), 3U);
  EXPECT_EQ(file.tensors()[0].name, "layers.3.packed");
  EXPECT_EQ(file.tensors()[0].first % 64, 0U);
  EXPECT_EQ(file.tensor("keys").shape, (std::vector<std::int64_t>{3, 1}));
  float back = 0.0F;
  file.read("keys", 4, std::as_writable_bytes(std::span(&back, 1)));
  EXPECT_EQ(back, 2.0F);
  float all[3] = {};
  file.read("keys", std::as_writable_bytes(std::span(all)));
  EXPECT_EQ(all[1], 2.0F);
  EXPECT_THROW(file.read("keys", std::as_writable_bytes(std::span(all, 2))), IndexError);
  file.read("nothing", {});
  file.verify("keys");
  file.verify("nothing");
  EXPECT_TRUE(file.holds("nothing"));
  EXPECT_FALSE(file.holds("layers.0.packed"));
  EXPECT_EQ(load_caches(path_).size(), 1U);
  EXPECT_THROW((void)file.tensor("values"), IndexError);
  EXPECT_THROW((void)file.load("values"), IndexError);
  EXPECT_THROW(file.read("keys", 9, std::as_writable_bytes(std::span(&back, 1))), IndexError);
  EXPECT_THROW(file.read("keys", ~std::uint64_t{0}, {}), IndexError);
  EXPECT_TRUE(contains(message_of([&] { (void)file.load("keys"); }), "holds no cache"));
  EXPECT_TRUE(contains(message_of([&] { (void)file.load("nothing"); }), "holds no cache"));
}

TEST_F(Files, DamageIsFound) {
  const KvCache cache = filled(16, 4);
  const KvCache* layers[] = {&cache};
  save_caches(path_, layers);
  const std::vector<char> whole = bytes();
  for (std::size_t at = 0; at < whole.size(); at += at < 500 ? 3 : 1997) {
    std::vector<char> damaged = whole;
    damaged[at] = static_cast<char>(damaged[at] ^ 0x20);
    put({damaged.begin(), damaged.end()});
    for (const bool mapped : {false, true}) {
      LoadOptions options;
      options.mapped = mapped;
      try {
        // Damage may make another name of a tensor's: then there is none to be read.
        const std::vector<KvCache> back = load_caches(path_, options);
        if (!back.empty()) {
          EXPECT_EQ(back[0].serialize(), cache.serialize()) << at;
        }
      } catch (const ValueError& error) {
        EXPECT_TRUE(contains(error.what(), path_.string())) << error.what();
      }
    }
  }
  for (std::size_t size = 0; size < whole.size(); size += size < 500 ? 3 : 1997) {
    put({whole.begin(), whole.begin() + static_cast<std::ptrdiff_t>(size)});
    EXPECT_THROW((void)load_caches(path_), ValueError) << size;
  }
  std::vector<char> damaged = whole;
  damaged.back() ^= 1;
  put({damaged.begin(), damaged.end()});
  const std::string message = message_of([&] { (void)load_caches(path_); });
  EXPECT_TRUE(contains(message, "checksum of \"layers.0.packed\"")) << message;
  EXPECT_THROW(CacheFile(path_).verify("layers.0.packed"), ValueError);
  const CacheFile file(path_);
  std::vector<std::byte> read(file.tensor("layers.0.packed").bytes);
  EXPECT_THROW(file.read("layers.0.packed", read), ValueError);
  file.read("layers.0.packed", 0, read);  // whatever they are
  LoadOptions unverified;
  unverified.verify = false;
  (void)CacheFile(path_).load("layers.0.packed", unverified);  // codes and norms are any
}

TEST_F(Files, HeadersThatNoFileHasAreRefused) {
  const std::string meta = R"("__metadata__":{"format":"tqai-cache","version":"3","header":"{}",)"
                           R"("checksum":"2745614147","checksums":"00000000"})";
  const auto tensor = [&](const std::string& text) { return "{" + meta + ",\"a\":" + text + "}"; };
  put_file(tensor(R"({"dtype":"U8","shape":[1],"data_offsets":[0,1]})"), "x");
  EXPECT_EQ(CacheFile(path_).tensors().size(), 1U);
  const std::pair<std::string, const char*> cases[] = {
      {"", "not JSON"},
      {"[]", "not JSON: no {"},
      {"{}", "tensors end at"},
      {std::string(3000, '['), "not JSON"},
      {R"({"a":)" + std::string(3000, '[') + "}", "not JSON"},
      {tensor(R"({"dtype":"U8","shape":[2],"data_offsets":[0,1]})"), "do not fit"},
      {tensor(R"({"dtype":"F32","shape":[1],"data_offsets":[0,1]})"), "do not fit"},
      {tensor(R"({"dtype":"U7","shape":[1],"data_offsets":[0,1]})"), "described"},
      {tensor(R"({"dtype":"U8","shape":[1],"data_offsets":[1,0]})"), "described"},
      {tensor(R"({"dtype":"U8","shape":[1],"data_offsets":[0]})"), "described"},
      {tensor(R"({"dtype":"U8","shape":[1]})"), "described"},
      {tensor(R"({"dtype":"U8","shape":[1],"data_offsets":[0,1],"x":1})"), "has \"x\""},
      {tensor(R"({"dtype":"U8","shape":[1],"data_offsets":[1,2]})"), "does not lie"},
      {tensor(R"({"dtype":"U8","shape":[0],"data_offsets":[0,0]})"), "tensors end at"},
      {tensor(R"({"dtype":"U8","shape":[9223372036854775807,9223372036854775807],)"
              R"("data_offsets":[0,1]})"),
       "do not fit"},
      {tensor(R"({"dtype":"U8","shape":[1],"data_offsets":[0,9223372036854775808]})"), "too large"},
      {tensor(R"({"dtype":"U8","shape":[-1],"data_offsets":[0,1]})"), "no whole number"},
      {tensor(R"({"dtype":"U8","shape":[1.0],"data_offsets":[0,1]})"), "no whole number"},
      {tensor(R"({"dtype":"U8","dtype":"U8","shape":[1],"data_offsets":[0,1]})"), "before"},
  };
  for (const auto& [header, says] : cases) {
    put_file(header, "x");
    const std::string message = message_of([&] { CacheFile file(path_); });
    EXPECT_TRUE(contains(message, says)) << header.substr(0, 200) << "\n" << message;
    EXPECT_TRUE(contains(message, "save the cache again")) << message;
  }
  const auto with = [&](const std::string& from, const std::string& to) {
    std::string text = tensor(R"({"dtype":"U8","shape":[1],"data_offsets":[0,1]})");
    text.replace(text.find(from), from.size(), to);
    put_file(text, "x");
    return message_of([&] { CacheFile file(path_); });
  };
  EXPECT_TRUE(contains(with("tqai-cache", "other"), "holds no caches of tqai's"));
  EXPECT_TRUE(
      contains(with("\"3\"", "\"4\""), "format version 4; this tqai reads versions 1 to 3"));
  EXPECT_TRUE(contains(with("\"{}\"", "\"{} \""), "header's checksum"));
  EXPECT_TRUE(contains(with("\"00000000\"", "\"0000000g\""), "hexadecimal"));
  EXPECT_TRUE(contains(with("\"00000000\"", "\"0000000\""), "those of 1 tensors"));
  // A length beyond the file.
  put(std::string("\xff\xff\xff\xff\xff\xff\xff\x7f", 8) + "{}");
  EXPECT_TRUE(contains(message_of([&] { CacheFile file(path_); }), "its header would have"));
}

TEST_F(Files, TensorsThatCannotBeWrittenAreRefusedAndLeaveNothing) {
  const auto one = [](const ByteSink& sink) { sink(std::as_bytes(std::span("x", 1))); };
  const auto refused = [&](std::vector<FileEntry> entries, const char* says,
                           std::string_view header = "{}") {
    const std::string message = message_of([&] { write_file(path_, entries, header); });
    EXPECT_TRUE(contains(message, says)) << message;
    EXPECT_EQ(files_in_folder(), 0U);
  };
  using Shape = std::vector<std::int64_t>;
  refused({{"a", "U8", {}, one}, {"a", "U8", {}, one}}, "named \"a\"");
  refused({{"__metadata__", "U8", {}, one}}, "named \"__metadata__\"");
  refused({{"a", "U9", {}, one}}, "of dtype \"U9\"");
  refused({{"a", "F16", {}, one}}, "without a shape U8");
  refused({{"a", "F16", Shape{1}, one}}, "its dtype and shape need 2");
  refused({{"a", "F16", Shape{-1}, one}}, "a dimension of -1");
  refused({{"a", "F64", Shape{1LL << 62, 4}, one}}, "a dimension of");
  refused({}, "a JSON object", "[]");
  refused({}, "a JSON object", "{} {}");
  const KvCache* layers[] = {nullptr};
  EXPECT_THROW(save_caches(path_, layers), ValueError);
  struct Stop {};
  const FileEntry stopping[] = {{"a", "U8", {}, [&](const ByteSink& sink) {
                                   one(sink);
                                   throw Stop();
                                 }}};
  put("old");
  EXPECT_THROW(write_file(path_, stopping), Stop);
  EXPECT_EQ(bytes(), (std::vector<char>{'o', 'l', 'd'}));
  EXPECT_EQ(files_in_folder(), 1U);
}

TEST_F(Files, NamesThatAreNotUtf8AreRefusedAndTheFileStays) {
  const auto one = [](const ByteSink& sink) { sink(std::as_bytes(std::span("x", 1))); };
  const FileEntry named[] = {{"käse", "U8", {}, one}};
  write_file(path_, named);
  const std::vector<char> before = bytes();
  for (const char* name : {"\xff\xfe", "a\xc3", "\xed\xa0\x80"}) {
    const FileEntry entries[] = {{"a", "U8", {}, one}, {name, "U8", {}, one}};
    const std::string message = message_of([&] { write_file(path_, entries); });
    EXPECT_TRUE(contains(message, "name of tensor 1")) << message;
    EXPECT_EQ(bytes(), before);
    EXPECT_EQ(files_in_folder(), 1U);
  }
  EXPECT_EQ(CacheFile(path_).tensors().front().name, "käse");
}

TEST_F(Files, WhatTheSystemRefusesIsAFileError) {
  const KvCache* none[] = {nullptr};
  const std::span<const KvCache* const> no_layers(none, 0);
  const auto code_of = [](const auto& call) {
    try {
      call();
    } catch (const FileError& error) {
      EXPECT_TRUE(contains(error.what(), error.code().message()));
      return error.code();
    }
    ADD_FAILURE() << "no FileError";
    return std::error_code();
  };
  const auto missing = folder_ / "none" / "file";
  EXPECT_EQ(code_of([&] { CacheFile file(missing); }), std::errc::no_such_file_or_directory);
  EXPECT_EQ(code_of([&] { save_caches(missing, no_layers); }),
            std::errc::no_such_file_or_directory);
  EXPECT_EQ(code_of([&] { save_caches(folder_, no_layers); }), std::errc::is_a_directory);
#ifndef _WIN32
  EXPECT_EQ(code_of([&] { CacheFile file(folder_); }), std::errc::is_a_directory);
  const fs::path pipe = folder_ / "pipe";
  ASSERT_EQ(::mkfifo(pipe.c_str(), 0600), 0);
  EXPECT_EQ(code_of([&] { CacheFile file(pipe); }), std::errc::invalid_seek);
  EXPECT_EQ(code_of([&] { save_caches(pipe, no_layers); }), std::errc::file_exists);
  try {
    CacheFile file(pipe);
  } catch (const FileError& error) {
    EXPECT_TRUE(contains(error.what(), "as it is a pipe, a socket or a device")) << error.what();
  }
  fs::create_symlink("b", folder_ / "a");
  fs::create_symlink("a", folder_ / "b");
  EXPECT_EQ(code_of([&] { save_caches(folder_ / "a", no_layers); }),
            std::errc::too_many_symbolic_link_levels);
  EXPECT_EQ(files_in_folder(), 3U);
  // A link stays, and what it points to is replaced, with its permissions.
  fs::create_symlink("target", folder_ / "link");
  save_caches(folder_ / "link", no_layers);
  EXPECT_TRUE(fs::is_symlink(folder_ / "link"));
  fs::permissions(folder_ / "target", fs::perms(0640));
  save_caches(folder_ / "link", no_layers);
  EXPECT_EQ(fs::status(folder_ / "target").permissions(), fs::perms(0640));
  // Cut off while it is open.
  const KvCache cache = filled(16, 4);
  const KvCache* layers[] = {&cache};
  save_caches(path_, layers);
  const CacheFile open(path_);
  fs::resize_file(path_, 1000);
  EXPECT_EQ(code_of([&] { (void)open.load("layers.0.packed"); }), std::errc::io_error);
#endif
}

TEST_F(Files, ThreadsReadOneFile) {
  const KvCache cache = filled(16, 4);
  const KvCache* layers[] = {&cache, &cache, &cache};
  save_caches(path_, layers);
  const CacheFile file(path_);
  std::vector<std::vector<std::byte>> got(3);
  std::vector<std::thread> threads;
  for (std::size_t i = 0; i < 3; ++i) {
    threads.emplace_back([&, i] { got[i] = file.load(layer_tensor(i)).serialize(); });
  }
  for (std::thread& thread : threads) thread.join();
  for (const auto& bytes : got) EXPECT_EQ(bytes, cache.serialize());
}

TEST(Json, IsReadStrictly) {
  const auto read = [](std::string_view text) {
    detail::JsonReader reader(text);
    reader.skip();
    reader.end();
  };
  for (const char* text :
       {"{}", " [ ] ", "[1,-0.5e+10,true,false,null,\"\\u00e9\\ud83d\\ude00\\n\"]",
        "{\"a\":{\"b\":[[]]}}", "0", "\"\xc3\xbc\xe6\xbc\xa2\xf0\x9f\x98\x80\""}) {
    EXPECT_NO_THROW(read(text)) << text;
  }
  for (const char* text : {"",
                           "{",
                           "[1,]",
                           "{\"a\":1,}",
                           "{\"a\" 1}",
                           "{a:1}",
                           "01",
                           "-",
                           "1.",
                           ".5",
                           "1e",
                           "+1",
                           "nul",
                           "NaN",
                           "Infinity",
                           "\"\\x\"",
                           "\"\\u12g4\"",
                           "\"\\ud800\"",
                           "\"\\udc00\"",
                           "\"\\ud800\\u0041\"",
                           "\"\n\"",
                           "\"a",
                           "\"\xc0\xaf\"",
                           "\"\xed\xa0\x80\"",
                           "\"\xf4\x90\x80\x80\"",
                           "\"\xff\"",
                           "\"\xe6\xbc\"",
                           "1 2",
                           "{\"a\":1,\"a\":2}",
                           "'a'"}) {
    EXPECT_THROW(read(text), ValueError) << text;
  }
  detail::JsonReader reader("\"\\u00e9\\ud83d\\ude00\\/\\\"\"");
  EXPECT_EQ(reader.string(), "\xc3\xa9\xf0\x9f\x98\x80/\"");
  EXPECT_EQ(detail::json_string("a\"\\\n\x01\xc3\xbc"), "\"a\\\"\\\\\\u000a\\u0001\xc3\xbc\"");
  EXPECT_NO_THROW(read(std::string(64, '[') + std::string(64, ']')));
  EXPECT_THROW(read(std::string(65, '[') + std::string(65, ']')), ValueError);
}

}  // namespace
}  // namespace tqai
