#include <string>
#include <tqai/error.hpp>

#include "kernels.hpp"
#include "parts.hpp"

namespace tqai::kernels {
namespace TQAI_LOCAL {

TQAI_INLINE void check_available(Level level) {
  bool available = false;
  std::string names;
  for (const Level candidate : available_levels()) {
    available = available || candidate == level;
    names += (names.empty() ? "" : ", ") + std::string(name_of(candidate));
  }
  if (!available) {
    throw UnsupportedError("kernel level " + std::string(name_of(level)) +
                           " is not available on this machine; available: " + names);
  }
}

}  // namespace TQAI_LOCAL

TQAI_INLINE const Kernels& kernels(Level level) {
  check_available(level);
  switch (level) {
#ifdef TQAI_X86
    case Level::avx512: return kAvx512Kernels;
    case Level::avx512_vnni: return kAvx512VnniKernels;
    case Level::avx_vnni: return kAvxVnniKernels;
    case Level::avx2: return kAvx2Kernels;
#elif defined(TQAI_ARM64)
    case Level::neon: return kNeonKernels;
#endif
    default: return kScalarKernels;
  }
}

TQAI_INLINE const Parts& parts(Level level) {
  check_available(level);
  switch (level) {
#ifdef TQAI_X86
    case Level::avx512: return kAvx512Parts;
    case Level::avx512_vnni: return kAvx512VnniParts;
    case Level::avx_vnni: return kAvxVnniParts;
    case Level::avx2: return kAvx2Parts;
#elif defined(TQAI_ARM64)
    case Level::neon: return kNeonParts;
#endif
    default: return kScalarParts;
  }
}

}  // namespace tqai::kernels
