#include <array>
#include <cstddef>
#include <cstdlib>
#include <tqai/cpu.hpp>
#include <tqai/error.hpp>

#ifdef _OPENMP
#include <omp.h>
#endif

#if defined(_MSC_VER) && defined(_M_X64)
#include <immintrin.h>
#include <intrin.h>
#elif defined(__x86_64__) && defined(__GNUC__)
#include <cpuid.h>
#elif defined(__aarch64__) && defined(__linux__)
#include <asm/hwcap.h>
#include <sys/auxv.h>
#elif defined(__aarch64__) && defined(__APPLE__)
#include <sys/sysctl.h>
#endif

namespace tqai {
namespace TQAI_LOCAL {

constexpr std::array kLevels = {Level::scalar,   Level::neon,        Level::avx2,
                                Level::avx_vnni, Level::avx512_vnni, Level::avx512};

#if defined(__x86_64__) && defined(__GNUC__)

// Compilers' own question knows these only in later versions.
TQAI_INLINE bool converts_halves() {
  unsigned a = 0;
  unsigned b = 0;
  unsigned c = 0;
  unsigned d = 0;
  return __get_cpuid(1, &a, &b, &c, &d) != 0 && (c & bit_F16C) != 0;
}

TQAI_INLINE bool has_avx_vnni() {
  unsigned a = 0;
  unsigned b = 0;
  unsigned c = 0;
  unsigned d = 0;
  if (__get_cpuid_count(7, 0, &a, &b, &c, &d) == 0 || a < 1) return false;  // a: the last subleaf
  return __get_cpuid_count(7, 1, &a, &b, &c, &d) != 0 && (a >> 4 & 1U) != 0;
}

TQAI_INLINE bool runs(Level level) {
  __builtin_cpu_init();
  if (level == Level::neon) return false;
  const bool avx2 = __builtin_cpu_supports("avx2") != 0 && __builtin_cpu_supports("fma") != 0 &&
                    converts_halves();
  if (level == Level::avx2) return avx2;
  if (level == Level::avx_vnni) return avx2 && has_avx_vnni();
  return __builtin_cpu_supports("avx512f") != 0 && __builtin_cpu_supports("avx512bw") != 0 &&
         __builtin_cpu_supports("avx512dq") != 0 && __builtin_cpu_supports("avx512vl") != 0 &&
         __builtin_cpu_supports("avx512vnni") != 0 &&
         (level == Level::avx512_vnni || __builtin_cpu_supports("avx512vbmi") != 0);
}

#elif defined(_MSC_VER) && defined(_M_X64)

TQAI_INLINE bool runs(Level level) {
  if (level == Level::neon) return false;
  std::array<int, 4> leaf{};
  __cpuid(leaf.data(), 1);
  constexpr int kOsXsave = 1 << 27;
  if ((leaf[2] & kOsXsave) == 0) return false;
  const bool fma_and_f16c = (leaf[2] >> 12 & 1) != 0 && (leaf[2] >> 29 & 1) != 0;
  const auto saved = _xgetbv(0);  // register state that the system keeps
  __cpuidex(leaf.data(), 7, 0);
  const auto has = [](int word, int bit) { return (word >> bit & 1) != 0; };
  const bool avx2 = fma_and_f16c && (saved & 0x6U) == 0x6U && has(leaf[1], 5);
  if (level == Level::avx2) return avx2;
  if (level == Level::avx_vnni) {
    if (!avx2 || leaf[0] < 1) return false;  // the last subleaf
    __cpuidex(leaf.data(), 7, 1);
    return has(leaf[0], 4);
  }
  return (saved & 0xE6U) == 0xE6U && has(leaf[1], 16) && has(leaf[1], 17) && has(leaf[1], 30) &&
         has(leaf[1], 31) && has(leaf[2], 11) && (level == Level::avx512_vnni || has(leaf[2], 1));
}

#elif defined(__aarch64__) && defined(__linux__)

TQAI_INLINE bool runs(Level level) {
  return level == Level::neon && (getauxval(AT_HWCAP) & HWCAP_ASIMDDP) != 0;
}

#elif defined(__aarch64__) && defined(__APPLE__)

TQAI_INLINE bool runs(Level level) {
  int has = 0;
  std::size_t size = sizeof has;
  return level == Level::neon &&
         sysctlbyname("hw.optional.arm.FEAT_DotProd", &has, &size, nullptr, 0) == 0 && has != 0;
}

#else

TQAI_INLINE bool runs(Level) { return false; }

#endif

TQAI_INLINE std::string joined_names(const std::vector<Level>& levels) {
  std::string names;
  for (const Level level : levels) {
    names += (names.empty() ? "" : ", ") + std::string(name_of(level));
  }
  return names;
}

}  // namespace TQAI_LOCAL

TQAI_INLINE std::string_view name_of(Level level) noexcept {
  switch (level) {
    case Level::neon: return "neon";
    case Level::avx2: return "avx2";
    case Level::avx_vnni: return "avx_vnni";
    case Level::avx512_vnni: return "avx512_vnni";
    case Level::avx512: return "avx512";
    default: return "scalar";
  }
}

TQAI_INLINE Level level_from_name(std::string_view name) {
  for (const Level level : kLevels) {
    if (name == name_of(level)) return level;
  }
  throw ValueError("unknown kernel level \"" + std::string(name) +
                   "\"; allowed: " + joined_names({kLevels.begin(), kLevels.end()}));
}

TQAI_INLINE std::vector<Level> available_levels() {
  // Asked once: a virtual machine takes microseconds to answer. Never destroyed: caches in static
  // storage may outlive any order of destruction.
  static const auto& levels = *new const std::vector<Level>([] {
    std::vector<Level> found = {Level::scalar};
    for (const Level level : kLevels) {
      if (level != Level::scalar && runs(level)) found.push_back(level);
    }
    return found;
  }());
  return levels;
}

TQAI_INLINE Level default_level() {
  const std::vector<Level> levels = available_levels();
  const char* name = std::getenv("TQAI_LEVEL");
  if (name == nullptr || *name == '\0') return levels.back();
  const Level wanted = level_from_name(name);
  for (const Level level : levels) {
    if (level == wanted) return level;
  }
  throw UnsupportedError("TQAI_LEVEL=" + std::string(name) +
                         " is not available on this machine; available: " + joined_names(levels));
}

TQAI_INLINE int openmp_threads() noexcept {
#ifdef _OPENMP
  return omp_get_max_threads();
#else
  return 0;
#endif
}

}  // namespace tqai
