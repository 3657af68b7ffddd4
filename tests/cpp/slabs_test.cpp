#include "cache/slabs.hpp"

#include <cstdint>
#include <cstring>
#include <limits>
#include <new>
#include <set>
#include <thread>
#include <vector>

#include "cache_helpers.hpp"
#include "reference.hpp"

#if defined(__linux__) && !defined(__SANITIZE_ADDRESS__) && !defined(__SANITIZE_THREAD__)
#define TQAI_LIMITS_MEMORY 1
#include <sys/resource.h>
#include <sys/wait.h>
#include <unistd.h>

#include <fstream>
#endif

namespace tqai {
namespace {

using detail::allocate_block;
using detail::allocate_large;
using detail::deallocate_block;
using detail::deallocate_large;

bool holds(const void* block, std::size_t bytes, int byte) {
  const auto* data = static_cast<const unsigned char*>(block);
  for (std::size_t i = 0; i < bytes; ++i) {
    if (data[i] != byte) return false;
  }
  return true;
}

TEST(Slabs, LargeMemoryIsByItself) {
  for (const std::size_t bytes : {1U, 64U, 4'194'304U, 5'000'001U}) {
    void* const first = allocate_large(bytes);
    void* const second = allocate_large(bytes);
    for (void* memory : {first, second}) {
      EXPECT_EQ(reinterpret_cast<std::uintptr_t>(memory) % 64, 0U);
    }
    std::memset(first, 1, bytes);
    std::memset(second, 2, bytes);
    EXPECT_TRUE(holds(first, bytes, 1));
    deallocate_large(first, bytes);
    EXPECT_TRUE(holds(second, bytes, 2));
    deallocate_large(second, bytes);
  }
#ifndef __SANITIZE_ADDRESS__  // which ends the program there
  EXPECT_THROW(allocate_large(std::numeric_limits<std::size_t>::max() - 4096), std::bad_alloc);
#endif
}

TEST(Slabs, BlocksAreAlignedAndApart) {
  for (const std::size_t bytes : {64U, 1000U, 3392U, 67648U, 1048576U, 1048640U, 20'000'000U}) {
    std::vector<void*> blocks;
    const int count = bytes > 4'000'000 ? 3 : 40;
    for (int i = 0; i < count; ++i) {
      blocks.push_back(allocate_block(bytes));
      ASSERT_EQ(reinterpret_cast<std::uintptr_t>(blocks.back()) % 64, 0U);
      std::memset(blocks.back(), i, bytes);
    }
    for (int i = 0; i < count; ++i) {
      ASSERT_TRUE(holds(blocks[static_cast<std::size_t>(i)], bytes, i)) << bytes << ", " << i;
    }
    EXPECT_EQ(std::set<void*>(blocks.begin(), blocks.end()).size(), blocks.size());
    for (void* block : blocks) deallocate_block(block, bytes);
  }
}

// Random orders, in several threads, over enough blocks for slabs to come and go.
TEST(Slabs, BlocksComeAndGoInAnyOrder) {
  const auto work = [](std::uint64_t seed) {
    auto engine = test::random_engine(seed);
    constexpr std::size_t kSizes[] = {700, 67648, 600'000};
    struct Held {
      void* block;
      std::size_t bytes;
      int byte;
    };
    std::vector<Held> held;
    int wrong = 0;
    const auto drop = [&](std::size_t i) {
      wrong += holds(held[i].block, held[i].bytes, held[i].byte) ? 0 : 1;
      deallocate_block(held[i].block, held[i].bytes);
      held[i] = held.back();
      held.pop_back();
    };
    for (int step = 0; step < 1500; ++step) {
      // Waves, from nothing to much and back.
      const bool grow = engine() % 100 < (step / 250 % 2 == 0 ? 70U : 25U);
      if (grow || held.empty()) {
        const std::size_t bytes = kSizes[engine() % 3];
        held.push_back({allocate_block(bytes), bytes, static_cast<int>(engine() % 256)});
        std::memset(held.back().block, held.back().byte, bytes);
      } else {
        drop(engine() % held.size());
      }
    }
    while (!held.empty()) drop(held.size() - 1);
    return wrong;
  };
  std::array<int, 3> wrong{};
  std::vector<std::thread> threads;
  for (std::size_t i = 0; i < wrong.size(); ++i) {
    threads.emplace_back([&, i] { wrong[i] = work(i); });
  }
  for (std::thread& thread : threads) thread.join();
  EXPECT_EQ(wrong, (std::array<int, 3>{}));
}

#ifdef TQAI_LIMITS_MEMORY

// In a child: 0 where the system refuses pages, and later allocations work as if nothing had been.
int run_out_of_memory() {
  std::size_t pages = 0;
  std::ifstream("/proc/self/statm") >> pages;
  rlimit before{};
  getrlimit(RLIMIT_AS, &before);
  rlimit tight = before;
  tight.rlim_cur =
      pages * static_cast<std::size_t>(sysconf(_SC_PAGESIZE)) + (std::size_t{64} << 20);
  setrlimit(RLIMIT_AS, &tight);
  constexpr std::size_t kBytes = 700'000;
  std::vector<void*> blocks;
  blocks.reserve(1000);
  bool refused = false;
  for (int i = 0; i < 1000 && !refused; ++i) {
    try {
      blocks.push_back(allocate_block(kBytes));
      std::memset(blocks.back(), i, kBytes);
    } catch (const std::bad_alloc&) {
      refused = true;
    }
  }
  setrlimit(RLIMIT_AS, &before);
  if (!refused || blocks.empty()) return 1;
  for (int i = 0; i < 50; ++i) {
    blocks.push_back(allocate_block(kBytes));
    std::memset(blocks.back(), static_cast<int>(blocks.size()) - 1, kBytes);
  }
  for (std::size_t i = 0; i < blocks.size(); ++i) {
    if (!holds(blocks[i], kBytes, static_cast<int>(i % 256))) return 2;
    deallocate_block(blocks[i], kBytes);
  }
  return 0;
}

std::int64_t resident_bytes() {
  std::int64_t pages = 0;
  std::int64_t resident = 0;
  std::ifstream("/proc/self/statm") >> pages >> resident;
  return resident * sysconf(_SC_PAGESIZE);
}

// Blocks of several rows, each added where the row's last one is.
struct Rows {
  std::size_t bytes;
  std::vector<std::vector<void*>> rows;

  void add(std::size_t row) {
    std::vector<void*>& blocks = rows[row];
    blocks.push_back(allocate_block(bytes, blocks.empty() ? nullptr : blocks.back()));
    std::memset(blocks.back(), static_cast<int>(blocks.size() % 256), bytes);
  }
  void drop(std::size_t row) {
    for (void* block : rows[row]) deallocate_block(block, bytes);
    rows[row].clear();
  }
  bool whole(std::size_t row) const {
    for (std::size_t i = 0; i < rows[row].size(); ++i) {
      if (!holds(rows[row][i], bytes, static_cast<int>((i + 1) % 256))) return false;
    }
    return true;
  }
};

// Rows of two conversations, each a block longer in turn.
TEST(Slabs, PagesGoWithTheConversationThatEnds) {
  constexpr std::int64_t kBytes = 24'000'000;
  for (const std::size_t bytes : {2112U, 6784U, 51264U, 700'000U}) {
    constexpr std::size_t kLayers = 8;
    Rows of{bytes, std::vector<std::vector<void*>>(2 * kLayers)};
    const auto each = static_cast<std::size_t>(kBytes) / kLayers / bytes;
    for (std::size_t i = 0; i < each; ++i) {
      for (std::size_t row = 0; row < 2 * kLayers; ++row) of.add(row);
    }
    const std::int64_t both = resident_bytes();
    for (std::size_t row = 0; row < 2 * kLayers; row += 2) of.drop(row);
    const std::int64_t one = resident_bytes();
    EXPECT_GT(both - one, kBytes * 8 / 10) << bytes << ": " << both << " to " << one;
    for (std::size_t row = 1; row < 2 * kLayers; row += 2) EXPECT_TRUE(of.whole(row)) << bytes;
    // What has been given back is used again before more is asked for.
    for (std::size_t i = 0; i < each; ++i) {
      for (std::size_t row = 0; row < 2 * kLayers; row += 2) of.add(row);
    }
    EXPECT_LT(resident_bytes(), both + kBytes / 8) << bytes;
    for (std::size_t row = 0; row < 2 * kLayers; ++row) {
      EXPECT_TRUE(of.whole(row)) << bytes;
      of.drop(row);
    }
    EXPECT_LT(resident_bytes(), both - 2 * kBytes + kBytes / 8) << bytes;
  }
}

// Many rows of a block or two take no more than their bytes, and a quarter.
TEST(Slabs, ShortRowsShareThem) {
  constexpr std::size_t kBytes = 6784;
  const std::int64_t before = resident_bytes();
  Rows of{kBytes, std::vector<std::vector<void*>>(4000)};
  for (std::size_t row = 0; row < of.rows.size(); ++row) of.add(row);
  const auto held = static_cast<std::int64_t>(of.rows.size() * kBytes);
  EXPECT_LT(resident_bytes() - before, held + held / 4 + 8'000'000);
  for (std::size_t row = 0; row < of.rows.size(); ++row) {
    EXPECT_TRUE(of.whole(row));
    of.drop(row);
  }
}

// Two conversations that are served together, through caches.
TEST(Slabs, ACacheThatEndsGivesItsMemoryBack) {
  auto engine = test::random_engine(340);
  constexpr std::size_t kLayers = 4;
  constexpr std::int64_t kTokens = 64;
  const test::Tokens tokens(1, 2, kTokens, 64, engine);
  std::vector<KvCache> first(kLayers, KvCache(test::geometry(64)));
  std::vector<KvCache> second = first;
  for (int step = 0; step < 300; ++step) {
    for (std::size_t layer = 0; layer < kLayers; ++layer) {
      for (KvCache* cache : {&first[layer], &second[layer]}) {
        tokens.append_to(*cache, 0, kTokens);
      }
    }
  }
  std::int64_t packed = 0;
  for (const KvCache& cache : first) {
    packed += static_cast<std::int64_t>(cache.memory().packed_bytes);
  }
  const std::vector<std::byte> kept = second[0].serialize();
  const std::int64_t both = resident_bytes();
  first.clear();
  EXPECT_GT(both - resident_bytes(), packed * 8 / 10) << packed;
  EXPECT_EQ(second[0].serialize(), kept);
}

TEST(Slabs, SurviveThatTheSystemHasNoPages) {
  const pid_t child = fork();
  ASSERT_GE(child, 0);
  if (child == 0) _exit(run_out_of_memory());
  int status = 0;
  ASSERT_EQ(waitpid(child, &status, 0), child);
  ASSERT_TRUE(WIFEXITED(status)) << "signal " << WTERMSIG(status);
  EXPECT_EQ(WEXITSTATUS(status), 0);
}

#endif

}  // namespace
}  // namespace tqai
