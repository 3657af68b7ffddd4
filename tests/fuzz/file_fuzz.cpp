// Any bytes as a file of caches: its header, its tensors, and the caches in them.
//
// An input is the header's text up to the first zero byte, and the tensors' bytes; the length that
// a file begins with is put before them.
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <string>
#include <tqai/files.hpp>
#include <vector>

#include "small_caches.hpp"

namespace {

// A file in memory, whose path is the same for all inputs.
class File {
 public:
  File() : descriptor_(memfd_create("tqai", 0)) {
    if (descriptor_ < 0) std::abort();
  }
  void write(const std::vector<std::uint8_t>& bytes) const {
    if (ftruncate(descriptor_, 0) != 0) std::abort();
    if (pwrite(descriptor_, bytes.data(), bytes.size(), 0) != static_cast<ssize_t>(bytes.size())) {
      std::abort();
    }
  }
  std::string path() const { return "/proc/self/fd/" + std::to_string(descriptor_); }

 private:
  int descriptor_;
};

template <typename Call>
void refusing(const Call& call) {
  try {
    call();
  } catch (const tqai::Error&) {
  }
}

void use(const tqai::CacheFile& file) {
  for (const tqai::FileTensor& tensor : file.tensors()) {
    if (&file.tensor(tensor.name) != &tensor || !file.holds(tensor.name)) std::abort();
    refusing([&] { file.verify(tensor.name); });
    const auto count = static_cast<std::size_t>(std::min<std::uint64_t>(tensor.bytes, 100));
    std::vector<std::byte> bytes(count);
    file.read(tensor.name, tensor.bytes - count, bytes);
    file.read(tensor.name, 0, bytes);
    if (tqai::fuzz::takes_long(bytes)) continue;
    for (const bool mapped : {false, true}) {
      refusing([&] {
        tqai::KvCache cache = file.load(tensor.name, {{}, mapped, false});
        const tqai::KvCache copy = cache;
        cache.crop(cache.first_token());
      });
    }
  }
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  static const File file;
  const std::uint8_t* end = std::find(data, data + size, 0);
  std::uint64_t length = static_cast<std::uint64_t>(end - data);
  std::vector<std::uint8_t> bytes;
  for (int i = 0; i < 8; ++i, length >>= 8) bytes.push_back(static_cast<std::uint8_t>(length));
  bytes.insert(bytes.end(), data, end);
  if (end != data + size) bytes.insert(bytes.end(), end + 1, data + size);
  file.write(bytes);
  refusing([&] { use(tqai::CacheFile(file.path())); });
  return 0;
}
