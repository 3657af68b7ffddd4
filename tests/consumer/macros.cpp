// An application whose platform's headers define names as macros (<windows.h>, <AssertMacros.h>),
// and that compiles the library with them: the sources do not see them, and they are there
// afterwards. Compiled alone (CMakeLists.txt).
#include <algorithm>
#include <array>
#include <atomic>
#include <bit>
#include <cmath>
#include <cstdint>
#include <filesystem>
#include <fstream>
#include <functional>
#include <limits>
#include <map>
#include <memory>
#include <mutex>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <vector>

// NOLINTBEGIN
#define far
#define near
#define small char
#define max(a, b) (((a) > (b)) ? (a) : (b))
#define min(a, b) (((a) < (b)) ? (a) : (b))
#define check(assertion) static_assert(assertion)
// NOLINTEND

#define TQAI_HEADER_ONLY
#include <tqai/files.hpp>

far near check(min(1, 2) == 1);
check(max(1, 2) == 2);
check(sizeof(small) == 1);

int main() { return tqai::available_levels().empty(); }
