// Which SIMD level the kernels run at.
#pragma once

#include <cstdint>
#include <string>
#include <string_view>
#include <tqai/export.hpp>
#include <vector>

namespace tqai {

/// Kernel levels. `scalar` is the specification; the others must agree with it (docs/kernels.md).
/// `neon` needs the dot product instructions of ARMv8.2; `avx_vnni` AVX2 and AVX-VNNI, as Intel's
/// since Alder Lake; `avx512_vnni` AVX-512 F, BW, DQ, VL, VNNI, as Cascade Lake; `avx512` VBMI too.
enum class Level : std::uint8_t { scalar, neon, avx2, avx_vnni, avx512_vnni, avx512 };

/// Its name in this list, as "avx2".
TQAI_API std::string_view name_of(Level level) noexcept;

/// The level of that name. Throws ValueError naming the allowed ones.
TQAI_API Level level_from_name(std::string_view name);

/// Levels that this build has and this processor runs, slowest first; never empty.
TQAI_API std::vector<Level> available_levels();

/// The fastest available level, or the one named by the environment variable `TQAI_LEVEL`, read at
/// each call. Throws ValueError for an unknown name, UnsupportedError for one not available here.
TQAI_API Level default_level();

/// Threads that a call takes at most; 0: this build has no OpenMP, and a call stays in its thread.
TQAI_API int openmp_threads() noexcept;

}  // namespace tqai

#if defined(TQAI_HEADER_ONLY) || defined(TQAI_IMPLEMENTATION)
#include <tqai/header_only.hpp>
#endif
