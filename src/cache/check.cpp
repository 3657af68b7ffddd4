#include "check.hpp"

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <vector>

#include "../ranges.hpp"

namespace tqai::detail {
namespace TQAI_LOCAL {

TQAI_INLINE void check_rope(const Rope& rope, int head_dim) {
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

}  // namespace TQAI_LOCAL

TQAI_INLINE CacheOptions checked(CacheOptions options) {
  constexpr int kMost = 1 << 30;
  check_range("kv_heads", options.kv_heads, 1, 1 << 16);
  checked_head_dim("head_dim", options.head_dim);
  if (options.value_head_dim == 0) options.value_head_dim = options.head_dim;
  checked_head_dim("value_head_dim", options.value_head_dim);
  checked_bits("bits_k", options.bits_k);
  checked_bits("bits_v", options.bits_v);
  check_range("sink_tokens", options.sink_tokens, 0, kMost);
  check_range("residual_window", options.residual_window, 0, kMost);
  if (options.rope) check_rope(*options.rope, options.head_dim);
  if (options.centering == Centering::rope && !options.rope) {
    throw ValueError(
        "centering is rope, but no rope was given; say how keys are rotated, or let it "
        "be automatic, mean or none");
  }
  if (!options.level) options.level = default_level();
  return options;
}

TQAI_INLINE std::string shape_text(const std::array<std::int64_t, 4>& shape) {
  std::string text = "[";
  for (std::size_t i = 0; i < shape.size(); ++i) {
    text += (i == 0 ? "" : ", ") + (shape[i] < 0 ? std::string("any") : std::to_string(shape[i]));
  }
  return text + "]";
}

TQAI_INLINE void check_shape(const char* name, const std::array<std::int64_t, 4>& shape,
                             const std::array<std::int64_t, 4>& wanted, const char* axes) {
  for (std::size_t i = 0; i < shape.size(); ++i) {
    if (shape[i] < 0 || (wanted[i] >= 0 && shape[i] != wanted[i])) {
      throw ValueError(std::string(name) + " has shape " + shape_text(shape) +
                       "; needed: " + shape_text(wanted) + " = [" + axes + "]");
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
  if (positions.data == nullptr && tokens > 0) throw ValueError("positions have no data");
  for (std::int64_t b = 0; b < rows; ++b) {
    for (std::int64_t s = 0; s < given; ++s) {
      const std::int64_t* from = positions.data + b * strides[0] + s * strides[1];
      for (std::int64_t t = 0; t < tokens; ++t) check_position(from[t * strides[2]]);
    }
  }
}

TQAI_INLINE void check_layout(const char* name, const void* data,
                              const std::array<std::int64_t, 4>& shape,
                              const std::array<std::int64_t, 4>& strides) {
  const bool empty = shape[0] == 0 || shape[1] == 0 || shape[2] == 0 || shape[3] == 0;
  if (data == nullptr && !empty) {
    throw ValueError(std::string(name) + " has no data; a pointer to " + shape_text(shape) +
                     " elements is needed");
  }
  if (strides[3] != 1 && shape[3] > 1) {
    throw ValueError(std::string(name) + " has stride " + std::to_string(strides[3]) +
                     " in its last dimension; 1 is needed: make it contiguous");
  }
}

TQAI_INLINE void check_written(const char* name, const Tensor& tensor) {
  check_layout(name, tensor.data, tensor.shape, tensor.strides);
  // From the innermost dimension outwards, each step must lead beyond all that the inner ones
  // reach.
  std::array<std::size_t, 4> order = {0, 1, 2, 3};
  std::sort(order.begin(), order.end(), [&](std::size_t a, std::size_t b) {
    return std::abs(tensor.strides[a]) < std::abs(tensor.strides[b]);
  });
  if (std::find(tensor.shape.begin(), tensor.shape.end(), 0) != tensor.shape.end()) return;
  std::int64_t reach = 0;
  for (const std::size_t axis : order) {
    if (tensor.shape[axis] == 1) continue;
    const std::int64_t step = std::abs(tensor.strides[axis]);
    if (step <= reach) {
      throw ValueError(std::string(name) + " of shape " + shape_text(tensor.shape) +
                       " has strides " + shape_text(tensor.strides) +
                       ", by which several elements lie at one address; needed: memory of its own "
                       "for each");
    }
    reach += step * (tensor.shape[axis] - 1);
  }
}

TQAI_INLINE std::string number_text(float value) {
  char text[32];
  std::snprintf(text, sizeof text, "%g", static_cast<double>(value));
  return text;
}

TQAI_INLINE void check_vectors(const kernels::Kernels& kernels, const char* name,
                               const ConstTensor& tensor) {
  const auto [batch, heads, tokens, dim] = tensor.shape;
  const auto element = static_cast<std::int64_t>(size_of(tensor.dtype));
  for (std::int64_t b = 0; b < batch; ++b) {
    for (std::int64_t h = 0; h < heads; ++h) {
      const char* rows = static_cast<const char*>(tensor.data) +
                         (b * tensor.strides[0] + h * tensor.strides[1]) * element;
      if (kernels.acceptable(rows, tensor.dtype, tokens, static_cast<int>(dim), tensor.strides[2],
                             0.0F)) {
        continue;
      }
      // Only on the way to the error: find the first offender.
      std::int64_t t = 0;
      while (kernels.acceptable(rows + t * tensor.strides[2] * element, tensor.dtype, 1,
                                static_cast<int>(dim), tensor.strides[2], 0.0F)) {
        ++t;
      }
      throw ValueError(std::string(name) + "[" + std::to_string(b) + ", " + std::to_string(h) +
                       ", " + std::to_string(t) +
                       "] holds NaN or infinity; only finite numbers can be cached" +
                       (tensor.dtype == DType::f16 ? ", and float16 ends at 65504: compute the "
                                                     "model in bfloat16 or float32"
                                                   : ""));
    }
  }
}

}  // namespace tqai::detail
