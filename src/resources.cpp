#include <algorithm>
#include <atomic>
#include <new>
#include <string>
#include <tqai/error.hpp>
#include <tqai/resources.hpp>
#include <utility>

#include "threads.hpp"

namespace tqai {

struct Workspace::State {
  struct alignas(64) Line {
    std::byte bytes[64];
  };
  std::unique_ptr<Line[]> lines;
  std::size_t bytes = 0;
  std::atomic<bool> used{false};

  // At least so many bytes; what they hold is undefined.
  std::byte* of(std::size_t needed) {
    if (needed > bytes) {
      // The old ones go first: of no use, and the two would be more than what is needed.
      lines.reset();
      bytes = 0;
      const std::size_t count = (needed + sizeof(Line) - 1) / sizeof(Line);
      lines.reset(new Line[count]);
      bytes = count * sizeof(Line);
    }
    return reinterpret_cast<std::byte*>(lines.get());
  }
};

TQAI_INLINE Workspace::Workspace() noexcept = default;
TQAI_INLINE Workspace::Workspace(Workspace&& other) noexcept = default;
TQAI_INLINE Workspace& Workspace::operator=(Workspace&& other) noexcept = default;
TQAI_INLINE Workspace::~Workspace() = default;

TQAI_INLINE std::size_t Workspace::bytes() const noexcept { return state_ ? state_->bytes : 0; }

TQAI_INLINE void Workspace::reserve(std::size_t bytes) {
  if (!state_) state_ = std::make_unique<State>();
  state_->of(bytes);
}

TQAI_INLINE void Workspace::release() noexcept { state_.reset(); }

namespace detail {

TQAI_INLINE WorkingMemory::WorkingMemory(const Resources& resources, std::size_t bytes) {
  if (bytes == 0) return;
  Workspace* workspace = resources.workspace;
  if (workspace == nullptr) {
    own_ = Workspace();
    own_.reserve(bytes);
    data_ = own_.state_->of(bytes);
    return;
  }
  if (!workspace->state_) workspace->state_ = std::make_unique<Workspace::State>();
  if (workspace->state_->used.exchange(true, std::memory_order_acquire)) {
    throw ValueError(
        "the workspace is in use by another call; each call that runs at the same time needs one "
        "of its own");
  }
  used_ = workspace;
  try {
    data_ = workspace->state_->of(bytes);
  } catch (...) {
    workspace->state_->used.store(false, std::memory_order_release);
    throw;
  }
}

TQAI_INLINE WorkingMemory::~WorkingMemory() {
  if (used_ != nullptr) used_->state_->used.store(false, std::memory_order_release);
}

}  // namespace detail

TQAI_INLINE int usable_threads(const Resources& resources) {
  if (resources.threads < 0 || resources.threads > Resources::kMostThreads) {
    throw ValueError("threads = " + std::to_string(resources.threads) + "; allowed: 1…" +
                     std::to_string(Resources::kMostThreads) +
                     ", or 0 for as many as OpenMP gives");
  }
  if (resources.parallel_for) {
    if (resources.threads > 0) return resources.threads;
    throw ValueError("threads = 0 with an executor; say how many of its threads a call may take");
  }
  return usable_threads(resources.threads);
}

}  // namespace tqai
