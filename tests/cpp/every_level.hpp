// Tests with the level as their parameter.
#pragma once

#include <gtest/gtest.h>

#include <algorithm>
#include <string>
#include <tqai/cpu.hpp>

namespace tqai::test {

// The parameter is the level, or nothing runs: a level that this machine lacks is skipped.
class EveryLevel : public testing::TestWithParam<Level> {
 protected:
  void SetUp() override {
    const auto levels = available_levels();
    if (std::find(levels.begin(), levels.end(), GetParam()) == levels.end()) {
      GTEST_SKIP() << "this processor has no " << name_of(GetParam());
    }
  }
};

// All of a file's tests of this fixture, at each level.
#define TQAI_AT_EVERY_LEVEL(Suite)                                                              \
  INSTANTIATE_TEST_SUITE_P(All, Suite,                                                          \
                           testing::Values(Level::scalar, Level::neon, Level::avx2,             \
                                           Level::avx_vnni, Level::avx512_vnni, Level::avx512), \
                           [](const auto& param) { return std::string(name_of(param.param)); })

}  // namespace tqai::test
