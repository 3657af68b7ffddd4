// The threads of a threadgroup, as fibers of one thread.
//
// One runs until it comes to an operation of its simdgroup or a barrier, then the next, in an order
// that the seed decides; when all have come, to the same operation or the program ends, they go on.
// So code that lacks a barrier gives different results in different orders, and code whose threads
// part ends with an error.
#include <ucontext.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <random>
#include <vector>

#if defined(__SANITIZE_ADDRESS__)
#define METAL_SHIM_ASAN
#elif defined(__has_feature)
#if __has_feature(address_sanitizer)
#define METAL_SHIM_ASAN
#endif
#endif
#ifdef METAL_SHIM_ASAN
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

#include <metal_stdlib>

namespace metal_shim {
namespace {

constexpr std::size_t kStackBytes = std::size_t{128} << 10;

struct Fiber {
  ucontext_t context;
  std::vector<char> stack;
  Wait wait = Wait::nothing;
  float4 given{0.0f};          // what it brings to an operation
  void* fake_stack = nullptr;  // AddressSanitizer's
};

struct Threadgroup {
  std::vector<Fiber> fibers;
  std::vector<std::vector<float4>> exchanged;  // what all of a simdgroup brought
  std::size_t running = 0;
  std::size_t number = 0;
  ucontext_t scheduler;
  void (*body)(const void*, const Thread&) = nullptr;
  const void* closure = nullptr;
  Thread first;  // attributes of its first thread
  const void* scheduler_stack = nullptr;
  std::size_t scheduler_stack_bytes = 0;
};

Threadgroup& state() {
  static Threadgroup state;
  return state;
}

[[noreturn]] void fail(const char* message) {
  std::fprintf(stderr, "metal_shim: %s\n", message);
  std::abort();
}

void before_switch(void** fake_stack, const void* stack, std::size_t bytes) {
#ifdef METAL_SHIM_ASAN
  __sanitizer_start_switch_fiber(fake_stack, stack, bytes);
#else
  (void)fake_stack, (void)stack, (void)bytes;
#endif
}

void after_switch(void* fake_stack, const void** stack, std::size_t* bytes) {
#ifdef METAL_SHIM_ASAN
  __sanitizer_finish_switch_fiber(fake_stack, stack, bytes);
#else
  (void)fake_stack, (void)stack, (void)bytes;
#endif
}

void begin() {
  Threadgroup& group = state();
  after_switch(nullptr, &group.scheduler_stack, &group.scheduler_stack_bytes);
  Thread at = group.first;
  const uint index = static_cast<uint>(group.running);
  at.thread_position_in_grid.x += index;
  at.simdgroup_index_in_threadgroup = index / kSimd;
  at.thread_index_in_simdgroup = index % kSimd;
  at.thread_index_in_threadgroup = index;
  group.body(group.closure, at);
  wait_for(Wait::end);
}

void start(std::size_t index) {
  Fiber& fiber = state().fibers[index];
  fiber.stack.resize(kStackBytes);
#ifdef METAL_SHIM_ASAN
  __asan_unpoison_memory_region(fiber.stack.data(), kStackBytes);  // of frames that did not return
#endif
  getcontext(&fiber.context);
  fiber.context.uc_stack.ss_sp = fiber.stack.data();
  fiber.context.uc_stack.ss_size = fiber.stack.size();
  fiber.context.uc_link = nullptr;
  makecontext(&fiber.context, begin, 0);
}

void resume(std::size_t index) {
  Threadgroup& group = state();
  Fiber& fiber = group.fibers[index];
  group.running = index;
  fiber.wait = Wait::nothing;
  void* fake_stack = nullptr;
  before_switch(&fake_stack, fiber.stack.data(), fiber.stack.size());
  swapcontext(&group.scheduler, &fiber.context);
  after_switch(fake_stack, nullptr, nullptr);
}

// Whether fibers first…end − 1 all wait for the same.
bool agree(std::size_t first, std::size_t end) {
  const std::vector<Fiber>& fibers = state().fibers;
  return std::all_of(fibers.begin() + static_cast<std::ptrdiff_t>(first),
                     fibers.begin() + static_cast<std::ptrdiff_t>(end),
                     [&](const Fiber& fiber) { return fiber.wait == fibers[first].wait; });
}

// The threads that can go on, of those of a threadgroup that have all come to something.
std::vector<std::size_t> ready_ones() {
  Threadgroup& group = state();
  const std::size_t threads = group.fibers.size();
  std::vector<std::size_t> ready;
  const bool barrier = agree(0, threads) && group.fibers[0].wait == Wait::threadgroup_barrier;
  bool ended = true;
  for (std::size_t first = 0; first < threads; first += kSimd) {
    const std::size_t end = std::min(first + kSimd, threads);
    if (!agree(first, end)) fail("the threads of a simdgroup have come to different operations");
    const Wait wait = group.fibers[first].wait;
    ended = ended && wait == Wait::end;
    if (wait == Wait::end || (wait == Wait::threadgroup_barrier && !barrier)) continue;
    std::vector<float4>& exchanged = group.exchanged[first / kSimd];
    exchanged.clear();
    for (std::size_t i = first; i < end; ++i) {
      exchanged.push_back(group.fibers[i].given);
      ready.push_back(i);
    }
  }
  if (ready.empty() && !ended) fail("a barrier that not all threads of the threadgroup come to");
  return ready;
}

void run_threadgroup(std::size_t threads, std::mt19937& random) {
  Threadgroup& group = state();
  ++group.number;
  group.fibers.resize(threads);
  group.exchanged.resize((threads + kSimd - 1) / kSimd);
  std::vector<std::size_t> ready;
  for (std::size_t i = 0; i < threads; ++i) {
    start(i);
    ready.push_back(i);
  }
  while (!ready.empty()) {
    std::shuffle(ready.begin(), ready.end(), random);
    for (const std::size_t index : ready) resume(index);
    ready = ready_ones();
  }
}

}  // namespace

Exchanged wait_for(Wait what, float4 given) {
  Threadgroup& group = state();
  Fiber& fiber = group.fibers[group.running];
  fiber.wait = what;
  fiber.given = given;
  const bool ends = what == Wait::end;
  before_switch(ends ? nullptr : &fiber.fake_stack, group.scheduler_stack,
                group.scheduler_stack_bytes);
  swapcontext(&fiber.context, &group.scheduler);
  after_switch(fiber.fake_stack, &group.scheduler_stack, &group.scheduler_stack_bytes);
  const std::vector<float4>& exchanged = group.exchanged[group.running / kSimd];
  return {exchanged.data(), static_cast<uint>(exchanged.size()),
          static_cast<uint>(group.running) % kSimd};
}

std::size_t threadgroup_number() { return state().number; }

void launch_threads(uint3 grid, uint3 size, unsigned seed, void (*body)(const void*, const Thread&),
                    const void* closure) {
  if (size.y != 1 || size.z != 1) fail("threadgroups of more than one dimension");
  Threadgroup& group = state();
  group.body = body;
  group.closure = closure;
  std::mt19937 random(seed);
  for (uint z = 0; z < grid.z; ++z) {
    for (uint y = 0; y < grid.y; ++y) {
      for (uint x = 0; x < grid.x; x += size.x) {
        group.first = {{x / size.x, y, z}, {x, y, z}, 0, 0, 0};
        run_threadgroup(std::min(size.x, grid.x - x), random);
      }
    }
  }
}

}  // namespace metal_shim
