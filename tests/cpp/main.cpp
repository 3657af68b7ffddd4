// gtest's main, which skips where TQAI_LEVEL asks for a level that this machine lacks.
#include <gtest/gtest.h>

#include <cstdio>
#include <tqai/cpu.hpp>
#include <tqai/error.hpp>

int main(int argc, char** argv) {
  testing::InitGoogleTest(&argc, argv);
  if (!testing::GTEST_FLAG(list_tests)) {
    try {
      tqai::default_level();
    } catch (const tqai::UnsupportedError& error) {
      constexpr int kSkipReturnCode = 77;  // tests/cpp/CMakeLists.txt
      std::printf("skipped: %s\n", error.what());
      return kSkipReturnCode;
    }
  }
  return RUN_ALL_TESTS();
}
