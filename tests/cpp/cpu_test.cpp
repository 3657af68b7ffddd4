// Names of kernel levels, and which this machine has.
#include <algorithm>
#include <tqai/cpu.hpp>

#include "cache_helpers.hpp"

namespace tqai {
namespace {

constexpr std::array kAll = {Level::scalar,   Level::neon,        Level::avx2,
                             Level::avx_vnni, Level::avx512_vnni, Level::avx512};

TEST(Levels, NamesLeadBack) {
  for (const Level level : kAll) EXPECT_EQ(level_from_name(name_of(level)), level);
  EXPECT_EQ(
      test::message_of([] { (void)level_from_name("sse2"); }),
      "unknown kernel level \"sse2\"; allowed: scalar, neon, avx2, avx_vnni, avx512_vnni, avx512");
  EXPECT_EQ(
      test::message_of([] { (void)level_from_name(""); }),
      "unknown kernel level \"\"; allowed: scalar, neon, avx2, avx_vnni, avx512_vnni, avx512");
}

TEST(Levels, ACacheHasTheOneAskedForOrNone) {
  const std::vector<Level> here = available_levels();
  EXPECT_EQ(here.front(), Level::scalar);
  EXPECT_LT(here.size(), kAll.size());  // no machine has those of two kinds of processor
  CacheOptions options = test::geometry(64);
  for (const Level level : kAll) {
    options.level = level;
    if (std::find(here.begin(), here.end(), level) != here.end()) {
      EXPECT_EQ(KvCache(options).options().level, level);
      continue;
    }
    try {
      const KvCache cache(options);
      ADD_FAILURE() << name_of(level);
    } catch (const UnsupportedError& error) {
      EXPECT_TRUE(test::contains(error.what(), "kernel level " + std::string(name_of(level)) +
                                                   " is not available on this machine"))
          << error.what();
    }
  }
}

}  // namespace
}  // namespace tqai
