// Visibility of the compiled library's symbols.
#pragma once

#if defined(TQAI_SHARED) && defined(_WIN32)
#ifdef TQAI_BUILDING
#define TQAI_API __declspec(dllexport)
#else
#define TQAI_API __declspec(dllimport)
#endif
#elif defined(TQAI_SHARED) && defined(__GNUC__)
#define TQAI_API __attribute__((visibility("default")))
#else
#define TQAI_API
#endif
