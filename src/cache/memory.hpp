// Memory whose bytes are counted: all that a cache holds comes from here.
#pragma once

#include <atomic>
#include <cstddef>
#include <limits>
#include <memory>
#include <new>
#include <utility>
#include <vector>

namespace tqai::detail {

/// 64-byte aligned memory, counted by allocated_bytes(). Throws std::bad_alloc.
void* allocate(std::size_t bytes);
void deallocate(void* memory, std::size_t bytes) noexcept;

/// The same for what a decoding step reads again and again (slabs.hpp); near: as there.
void* allocate_sealed(std::size_t bytes, const void* near);
void deallocate_sealed(void* memory, std::size_t bytes) noexcept;

/// Where a Shared lies.
struct Heap {
  static void* allocate(std::size_t bytes, const void* /*near*/) { return detail::allocate(bytes); }
  static void deallocate(void* memory, std::size_t bytes) noexcept {
    detail::deallocate(memory, bytes);
  }
};
struct Slabs {
  static void* allocate(std::size_t bytes, const void* near) {
    return allocate_sealed(bytes, near);
  }
  static void deallocate(void* memory, std::size_t bytes) noexcept {
    deallocate_sealed(memory, bytes);
  }
};

template <typename T>
struct CountedAllocator {
  using value_type = T;
  CountedAllocator() = default;
  template <typename U>
  CountedAllocator(const CountedAllocator<U>& /*other*/) noexcept {}  // NOLINT: a conversion
  T* allocate(std::size_t count) {
    if (count > std::numeric_limits<std::size_t>::max() / sizeof(T)) throw std::bad_alloc();
    return static_cast<T*>(detail::allocate(count * sizeof(T)));
  }
  void deallocate(T* memory, std::size_t count) noexcept {
    detail::deallocate(memory, count * sizeof(T));
  }
  friend bool operator==(const CountedAllocator&, const CountedAllocator&) noexcept { return true; }
};

template <typename T>
using CountedVector = std::vector<T, CountedAllocator<T>>;

/// A counted object whose copies share it. `bytes()` of payload follow the header in the same
/// allocation, 64-byte aligned. Reading is safe from any thread; writing only by a sole owner.
template <typename Header, typename Memory = Heap>
class Shared {
 public:
  Shared() = default;
  /// near: null, or the `id()` of one as large that it had best lie beside.
  Shared(Header header, std::size_t payload_bytes, const void* near = nullptr)
      : control_(new (Memory::allocate(kPrefix + payload_bytes, near))
                     Control{header, payload_bytes, {1}}) {}
  Shared(const Shared& other) noexcept : control_(other.control_) {
    if (control_ != nullptr) control_->owners.fetch_add(1, std::memory_order_relaxed);
  }
  Shared(Shared&& other) noexcept : control_(std::exchange(other.control_, nullptr)) {}
  Shared& operator=(Shared other) noexcept {
    std::swap(control_, other.control_);
    return *this;
  }
  ~Shared() {
    if (control_ == nullptr || control_->owners.fetch_sub(1, std::memory_order_acq_rel) != 1) {
      return;
    }
    const std::size_t bytes = kPrefix + control_->payload_bytes;
    control_->~Control();
    Memory::deallocate(control_, bytes);
  }

  explicit operator bool() const noexcept { return control_ != nullptr; }
  friend bool operator==(const Shared& a, const Shared& b) noexcept {
    return a.control_ == b.control_;
  }
  const Header& header() const noexcept { return control_->header; }
  Header& header() noexcept { return control_->header; }
  const std::byte* payload() const noexcept {
    return reinterpret_cast<const std::byte*>(control_) + kPrefix;
  }
  std::byte* payload() noexcept { return reinterpret_cast<std::byte*>(control_) + kPrefix; }
  std::size_t payload_bytes() const noexcept { return control_->payload_bytes; }
  /// Whether nobody else can read it.
  bool sole() const noexcept { return control_->owners.load(std::memory_order_acquire) == 1; }
  /// Identity, for counting shared objects once.
  const void* id() const noexcept { return control_; }

  /// Bytes of an allocation beside its payload.
  static constexpr std::size_t kPrefix = 64;

 private:
  struct Control {
    Header header;
    std::size_t payload_bytes;
    std::atomic<std::size_t> owners;
  };
  static_assert(sizeof(Control) <= kPrefix);

  Control* control_ = nullptr;
};

}  // namespace tqai::detail
