// The library as the one file of an application that compiles it.
#define TQAI_IMPLEMENTATION
#include <tqai/files.hpp>
