// The library's sources, for TQAI_HEADER_ONLY and TQAI_IMPLEMENTATION; there the other headers end
// with this one. They include one another, so it comes several times, and counts once all are read.
// The sources lie below this folder where tqai is installed, beside include/ where it is not.
#include <tqai/cache.hpp>
#include <tqai/quantizer.hpp>

#if defined(TQAI_HEADER_ONLY) || defined(TQAI_IMPLEMENTATION)
#ifdef TQAI_CACHE_READ  // whose names it uses
#include <tqai/sequences.hpp>
#endif
#if defined(TQAI_CACHE_READ) && defined(TQAI_QUANTIZER_READ) && defined(TQAI_SEQUENCES_READ)
#if __has_include("../tqai/src/header_only_sources.hpp")
#include "../tqai/src/header_only_sources.hpp"
#else
#include "../../src/header_only_sources.hpp"
#endif
#endif
// Those that need a file system, for who asks for them.
#ifdef TQAI_FILES_READ
#if __has_include("../tqai/src/header_only_files.hpp")
#include "../tqai/src/header_only_files.hpp"
#else
#include "../../src/header_only_files.hpp"
#endif
#endif
#endif
