// The source files behind <tqai/files.hpp>, as header_only_sources.hpp has all others.
#pragma once

#include "header_only_sources.hpp"
#include "hide_macros.hpp"

#if defined(__clang__)
#pragma clang diagnostic push
#pragma clang diagnostic ignored "-Winline-namespace-reopened-noninline"
#endif

#include "files/cache_file.cpp"
#include "files/json_reader.cpp"
#include "files/os_file.cpp"
#include "files/write_file.cpp"

#if defined(__clang__)
#pragma clang diagnostic pop
#endif

#include "restore_macros.hpp"
