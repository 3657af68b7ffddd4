// What a call works with: threads, and memory that it leaves to the next call.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <memory>
#include <tqai/export.hpp>

namespace tqai {

namespace detail {
class WorkingMemory;
}

/// Working memory that calls leave to the next ones, for runtimes that make the same call at each
/// step: a call that needs no more than one before it allocates none. It grows to what the largest
/// call needed. For one call at a time: a second one at the same time throws ValueError.
class TQAI_API Workspace {
 public:
  /// Empty.
  Workspace() noexcept;
  /// Leaves `other` empty. Not while a call uses either.
  Workspace(Workspace&& other) noexcept;
  /// As the move.
  Workspace& operator=(Workspace&& other) noexcept;
  ~Workspace();

  /// Bytes held.
  std::size_t bytes() const noexcept;
  /// Holds at least so many bytes from now on. Throws std::bad_alloc.
  void reserve(std::size_t bytes);
  /// Gives the memory back. Not while a call uses it.
  void release() noexcept;

 private:
  friend class detail::WorkingMemory;
  struct State;
  std::unique_ptr<State> state_;
};

/// What a call works with. The defaults are OpenMP's threads, and memory of the call's own. Results
/// do not depend on any of it.
struct Resources {
  /// Largest `threads`.
  static constexpr int kMostThreads = 1024;
  /// Work that an executor is handed: to be called with each of 0 … count − 1 once, by any threads,
  /// at the same time or one after another. It does not throw.
  using Work = std::function<void(std::int64_t index)>;
  /// An application's own threads. Returns, or throws, when no `work` runs any more and none is
  /// still to come. Work that it leaves undone is done by the calling thread afterwards; what it
  /// throws comes out of the call, which then has changed no cache, but may have written a part of
  /// an output.
  using Executor = std::function<void(std::int64_t count, const Work& work)>;

  /// Threads that work at the same time at most, the calling one included, 0…kMostThreads. 0: as
  /// many as OpenMP gives a parallel region (omp_set_num_threads, OMP_NUM_THREADS). Without OpenMP,
  /// and without an executor, it is always one (openmp_threads() says so).
  int threads = 0;
  /// In place of OpenMP's threads, and then `threads` is needed: `count` is no more than that.
  /// Null: OpenMP.
  Executor parallel_for = nullptr;
  /// Memory that stays; not while another call uses it. Null: the call's own.
  Workspace* workspace = nullptr;
};

}  // namespace tqai

#if defined(TQAI_HEADER_ONLY) || defined(TQAI_IMPLEMENTATION)
#include <tqai/header_only.hpp>
#endif
