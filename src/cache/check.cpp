#include "check.hpp"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <tqai/key_basis.hpp>
#include <vector>

#include "../ranges.hpp"
#include "pieces.hpp"

namespace tqai::detail {
namespace TQAI_LOCAL {

// Bytes from a tensor's first element to any other: no allocation is larger, and pointers to its
// elements can be computed.
constexpr std::uint64_t kMostReach = std::uint64_t{1} << 62;

// Also of the least number, whose negative does not exist.
TQAI_INLINE std::uint64_t magnitude(std::int64_t value) noexcept {
  const auto bits = static_cast<std::uint64_t>(value);
  return value < 0 ? 0 - bits : bits;
}

TQAI_INLINE bool is_empty(const std::array<std::int64_t, 4>& shape) noexcept {
  return std::find(shape.begin(), shape.end(), 0) != shape.end();
}

TQAI_INLINE ConstTensor to_be_read(const Tensor& tensor) noexcept {
  return {tensor.data, tensor.dtype, tensor.shape, tensor.strides};
}

// From the innermost dimension outwards.
TQAI_INLINE std::array<std::size_t, 4> order_of(const std::array<std::int64_t, 4>& strides) {
  std::array<std::size_t, 4> order = {0, 1, 2, 3};
  std::sort(order.begin(), order.end(), [&strides](std::size_t a, std::size_t b) {
    return magnitude(strides[a]) < magnitude(strides[b]);
  });
  return order;
}

// The memory of a tensor that is not empty. At both ends of it is an element.
struct Extent {
  std::uintptr_t first_element = 0;
  std::uintptr_t begin = 0;
  std::uintptr_t end = 0;
  bool is_full = true;  // each byte is one of the tensor's

  bool holds_an_end_of(const Extent& other) const noexcept {
    return (other.begin >= begin && other.begin < end) || (other.end > begin && other.end <= end);
  }
};

TQAI_INLINE Extent extent_of(const ConstTensor& tensor) {
  const std::size_t element = size_of(tensor.dtype);
  const auto first = reinterpret_cast<std::uintptr_t>(tensor.data);
  Extent extent{first, first, first + element, true};
  std::uint64_t inner = 1;  // elements
  for (const std::size_t axis : order_of(tensor.strides)) {
    const auto count = static_cast<std::uint64_t>(tensor.shape[axis]);
    if (count == 1) continue;
    const std::uint64_t stride = magnitude(tensor.strides[axis]);
    extent.is_full = extent.is_full && stride == inner;
    inner *= count;
    const std::uint64_t bytes = stride * (count - 1) * element;
    if (tensor.strides[axis] < 0) {
      extent.begin -= bytes;
    } else {
      extent.end += bytes;
    }
  }
  return extent;
}

TQAI_INLINE void check_basis(const KeyBasis& basis, const CacheOptions& options) {
  if (basis.kv_heads() == options.kv_heads && basis.head_dim() == options.head_dim &&
      basis.bits() == options.bits_k) {
    return;
  }
  throw ValueError("the key basis is for " + std::to_string(basis.kv_heads()) + " kv heads of " +
                   std::to_string(basis.head_dim()) + " coordinates at " +
                   std::to_string(basis.bits()) + " bits; this cache has " +
                   std::to_string(options.kv_heads) + ", " + std::to_string(options.head_dim) +
                   " and bits_k = " + std::to_string(options.bits_k) + ": learn one for these");
}

TQAI_INLINE void check_paths(const CacheOptions& options) {
  if (options.bits_k < kMinKeyTrellisBits || options.bits_k > kMaxTrellisBits) {
    throw ValueError("bits_k = " + std::to_string(options.bits_k) +
                     " where key_codes is trellis; allowed: " + std::to_string(kMinKeyTrellisBits) +
                     "…" + std::to_string(kMaxTrellisBits) + ", or scalar codes");
  }
  if (!options.key_basis) {
    throw ValueError(
        "key_codes is trellis, but there is no key_basis, in which these codes are found; give "
        "one, "
        "or use scalar codes");
  }
}

}  // namespace TQAI_LOCAL

TQAI_INLINE void check_rope(const Rope& rope, int head_dim) {
  check_enumerator("rope's layout", rope.layout, Rope::Layout::interleaved);
  check_range("rotary_dim", rope.rotary_dim, 2, head_dim);
  if (rope.rotary_dim % 2 != 0 ||
      rope.inv_freq.size() != static_cast<std::size_t>(rope.rotary_dim / 2)) {
    throw ValueError("rope has " + std::to_string(rope.inv_freq.size()) +
                     " frequencies for rotary_dim " + std::to_string(rope.rotary_dim) +
                     "; needed: an even rotary_dim and half as many frequencies");
  }
  if (!rope.sections.empty() && rope.sections.size() != rope.inv_freq.size()) {
    throw ValueError("rope has sections for " + std::to_string(rope.sections.size()) +
                     " frequencies of " + std::to_string(rope.inv_freq.size()) +
                     "; needed: one for each, or none at all");
  }
  check_range("rope's number of sections", rope.section_count(), 1, Rope::kMaxSections);
  for (const float frequency : rope.inv_freq) {
    if (!std::isfinite(frequency)) {
      throw ValueError("rope has a frequency that is NaN or infinite; finite ones are needed");
    }
  }
}

TQAI_INLINE CacheOptions checked(CacheOptions options) {
  constexpr int kMost = 1 << 30;
  check_enumerator("dtype", options.dtype, DType::bf16);
  check_enumerator("centering", options.centering, Centering::rope);
  check_range("kv_heads", options.kv_heads, 1, 1 << 16);
  checked_head_dim("head_dim", options.head_dim);
  if (options.value_head_dim == 0) options.value_head_dim = options.head_dim;
  checked_head_dim("value_head_dim", options.value_head_dim);
  checked_bits("bits_k", options.bits_k);
  checked_bits("bits_v", options.bits_v);
  check_enumerator("key_codes", options.key_codes, CodeKind::trellis);
  if (options.key_codes == CodeKind::trellis) check_paths(options);
  check_enumerator("value_codes", options.value_codes, CodeKind::trellis);
  if (options.value_codes == CodeKind::trellis && options.bits_v > kMaxTrellisBits) {
    throw ValueError("bits_v = " + std::to_string(options.bits_v) +
                     " where value_codes is trellis; "
                     "allowed: 1…" +
                     std::to_string(kMaxTrellisBits) + ", or scalar codes");
  }
  check_range("sink_tokens", options.sink_tokens, 0, kMost);
  check_range("residual_window", options.residual_window, 0, kMost);
  if (options.rope) check_rope(*options.rope, options.head_dim);
  if (options.key_basis) check_basis(*options.key_basis, options);
  if (options.centering == Centering::rope && !options.rope) {
    throw ValueError(
        "centering is rope, but no rope was given; say how keys are rotated, or let it "
        "be automatic, mean or none");
  }
  if (options.level) check_enumerator("level", *options.level, Level::avx512);
  if (!options.level) options.level = default_level();
  return options;
}

TQAI_INLINE std::string shape_text(const std::array<std::int64_t, 4>& shape, bool wanted) {
  std::string text = "[";
  for (std::size_t i = 0; i < shape.size(); ++i) {
    text += i == 0 ? "" : ", ";
    text += wanted && shape[i] < 0 ? std::string("any") : std::to_string(shape[i]);
  }
  return text + "]";
}

TQAI_INLINE void check_shape(const char* name, const std::array<std::int64_t, 4>& shape,
                             const std::array<std::int64_t, 4>& wanted, const char* axes) {
  for (std::size_t i = 0; i < shape.size(); ++i) {
    if (shape[i] < 0 || (wanted[i] >= 0 && shape[i] != wanted[i])) {
      throw ValueError(std::string(name) + " has shape " + shape_text(shape) +
                       "; needed: " + shape_text(wanted, true) + " = [" + axes + "]");
    }
  }
}

TQAI_INLINE void check_position(std::int64_t position) {
  check_range("a token's position", position, -KvCache::kMaxPosition, KvCache::kMaxPosition);
}

TQAI_INLINE void check_positions(const PositionTensor& positions, std::int64_t batch,
                                 std::int64_t tokens, int sections) {
  const auto [rows, given, count] = positions.shape;
  const auto& strides = positions.strides;
  if ((rows != 1 && rows != batch) || (given != 1 && given != sections) || count != tokens) {
    throw ValueError("positions have shape [" + std::to_string(rows) + ", " +
                     std::to_string(given) + ", " + std::to_string(count) + "]; needed: [1 or " +
                     std::to_string(batch) + ", 1 or " + std::to_string(sections) + ", " +
                     std::to_string(tokens) + "] = [batch, sections, tokens]");
  }
  check_memory("positions", positions.data, sizeof(std::int64_t), positions.shape.data(),
               positions.strides.data(), positions.shape.size());
  for (std::int64_t b = 0; b < rows; ++b) {
    for (std::int64_t s = 0; s < given; ++s) {
      const std::int64_t* from = positions.data + b * strides[0] + s * strides[1];
      for (std::int64_t t = 0; t < tokens; ++t) check_position(from[t * strides[2]]);
    }
  }
}

TQAI_INLINE void check_memory(const char* name, const void* data, std::size_t element,
                              const std::int64_t* shape, const std::int64_t* strides,
                              std::size_t dimensions) {
  const auto* const wrong =
      std::find_if(shape, shape + dimensions, [](std::int64_t size) { return size < 0; });
  if (wrong != shape + dimensions) {
    throw ValueError(std::string(name) + " has a dimension of " + std::to_string(*wrong) +
                     "; needed: 0 or more");
  }
  if (std::find(shape, shape + dimensions, 0) != shape + dimensions) return;
  if (data == nullptr) throw ValueError(std::string(name) + " has no data; a pointer is needed");
  if (reinterpret_cast<std::uintptr_t>(data) % element != 0) {
    throw ValueError(std::string(name) + " lies at an address that is no multiple of " +
                     std::to_string(element) + " bytes, its elements' size: copy it first");
  }
  std::uint64_t left = kMostReach / element;
  for (std::size_t axis = 0; axis < dimensions; ++axis) {
    if (shape[axis] == 1) continue;
    const auto steps = static_cast<std::uint64_t>(shape[axis] - 1);
    if (magnitude(strides[axis]) > left / steps) {
      throw ValueError(std::string(name) + " has " + std::to_string(shape[axis]) +
                       " elements with stride " + std::to_string(strides[axis]) +
                       ", which lead out of any memory");
    }
    left -= magnitude(strides[axis]) * steps;
  }
}

TQAI_INLINE void check_layout(const char* name, const ConstTensor& tensor) {
  check_enumerator("a tensor's dtype", tensor.dtype, DType::bf16);
  check_memory(name, tensor.data, size_of(tensor.dtype), tensor.shape.data(), tensor.strides.data(),
               tensor.shape.size());
  if (tensor.strides[3] != 1 && tensor.shape[3] > 1) {
    throw ValueError(std::string(name) + " has stride " + std::to_string(tensor.strides[3]) +
                     " in its last dimension; 1 is needed: make it contiguous");
  }
}

TQAI_INLINE void check_written(const char* name, const Tensor& tensor) {
  check_layout(name, to_be_read(tensor));
  if (is_empty(tensor.shape)) return;
  // Each step must lead beyond all that the inner ones reach.
  std::uint64_t reach = 0;
  for (const std::size_t axis : order_of(tensor.strides)) {
    if (tensor.shape[axis] == 1) continue;
    const std::uint64_t step = magnitude(tensor.strides[axis]);
    if (step <= reach) {
      throw ValueError(std::string(name) + " of shape " + shape_text(tensor.shape) +
                       " has strides " + shape_text(tensor.strides) +
                       ", by which several elements lie at one address; needed: memory of its own "
                       "for each");
    }
    reach += step * static_cast<std::uint64_t>(tensor.shape[axis] - 1);
  }
}

TQAI_INLINE void check_apart(const char* written_name, const Tensor& written, const char* name,
                             const ConstTensor& other) {
  if (is_empty(written.shape) || is_empty(other.shape)) return;
  const Extent a = extent_of(to_be_read(written));
  const Extent b = extent_of(other);
  if (a.first_element != b.first_element && !(a.is_full && a.holds_an_end_of(b)) &&
      !(b.is_full && b.holds_an_end_of(a))) {
    return;
  }
  throw ValueError(std::string(written_name) + " overlaps " + name +
                   "; needed: memory of its own, as it is written while the other is in use");
}

TQAI_INLINE std::string number_text(float value) {
  char text[32];
  std::snprintf(text, sizeof text, "%g", static_cast<double>(value));
  return text;
}

namespace TQAI_LOCAL {

[[noreturn]] TQAI_INLINE void refuse_vector(const char* name, DType dtype, std::int64_t row,
                                            std::int64_t head, std::int64_t token) {
  throw ValueError(std::string(name) + "[" + std::to_string(row) + ", " + std::to_string(head) +
                   ", " + std::to_string(token) +
                   "] holds NaN or infinity; only finite numbers can be cached" +
                   (dtype == DType::f16 ? ", and float16 ends at 65504: compute the "
                                          "model in bfloat16 or float32"
                                        : ""));
}

}  // namespace TQAI_LOCAL

TQAI_INLINE void check_vectors(const kernels::Kernels& kernels, const char* name,
                               const ConstTensor& tensor, const Resources& resources) {
  const std::int64_t batch = tensor.shape[0];
  const std::int64_t heads = tensor.shape[1];
  const std::int64_t tokens = tensor.shape[2];
  const auto element = static_cast<std::int64_t>(size_of(tensor.dtype));
  const auto finite = [&](std::int64_t b, std::int64_t h, std::int64_t t, std::int64_t count) {
    const std::int64_t at = b * tensor.strides[0] + h * tensor.strides[1] + t * tensor.strides[2];
    return kernels.acceptable(static_cast<const char*>(tensor.data) + at * element, tensor.dtype,
                              count, static_cast<int>(tensor.shape[3]), tensor.strides[2], 0.0F);
  };
  std::atomic<bool> all{true};
  const Pieces pieces{batch * heads, tokens, tensor.shape[3] * element};
  pieces.each(resources, [&](std::int64_t i, std::int64_t first, std::int64_t count) {
    if (!finite(i / heads, i % heads, first, count)) all.store(false, std::memory_order_relaxed);
  });
  if (all) return;
  // Only on the way to the error: find the first offender.
  for (std::int64_t b = 0; b < batch; ++b) {
    for (std::int64_t h = 0; h < heads; ++h) {
      for (std::int64_t t = 0; t < tokens; ++t) {
        if (!finite(b, h, t, 1)) refuse_vector(name, tensor.dtype, b, h, t);
      }
    }
  }
}

}  // namespace tqai::detail
