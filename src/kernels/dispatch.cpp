#include <string>
#include <tqai/error.hpp>

#include "kernels.hpp"

namespace tqai::kernels {

const Kernels& kernels(Level level) {
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
  switch (level) {
#ifdef TQAI_X86
    case Level::avx512: return kAvx512Kernels;
    case Level::avx2: return kAvx2Kernels;
#elif defined(TQAI_ARM64)
    case Level::neon: return kNeonKernels;
#endif
    default: return kScalarKernels;
  }
}

}  // namespace tqai::kernels
