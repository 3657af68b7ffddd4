// Messages of errors, versions and levels.
#include "calls.hpp"

namespace {

constexpr std::size_t kMessageBytes = 1024;
// Plain bytes, so that keeping a message can neither fail nor need a destructor at a thread's end.
thread_local char t_message[kMessageBytes];

}  // namespace

void tqai::c_api::keep(const char* message) noexcept {
  std::size_t length = std::min(std::strlen(message), kMessageBytes - 1);
  // Not in the middle of a character.
  if (message[length] != 0) {
    while (length > 0 && (static_cast<unsigned char>(message[length]) & 0xC0U) == 0x80) --length;
  }
  std::memcpy(t_message, message, length);
  t_message[length] = 0;
}

uint32_t tqai_abi_version(void) { return TQAI_ABI_VERSION; }
const char* tqai_version(void) { return TQAI_VERSION; }
const char* tqai_last_error(void) { return t_message; }

tqai_status tqai_default_level(const char** name) {
  return tqai::c_api::guarded(
      [&] { tqai::c_api::given(name, "name") = tqai::name_of(tqai::default_level()).data(); });
}
