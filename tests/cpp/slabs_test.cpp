#include "cache/slabs.hpp"

#include <cstdint>
#include <cstring>
#include <set>
#include <thread>

#include "reference.hpp"

namespace tqai {
namespace {

using detail::allocate_block;
using detail::deallocate_block;

bool holds(const void* block, std::size_t bytes, int byte) {
  const auto* data = static_cast<const unsigned char*>(block);
  for (std::size_t i = 0; i < bytes; ++i) {
    if (data[i] != byte) return false;
  }
  return true;
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

}  // namespace
}  // namespace tqai
