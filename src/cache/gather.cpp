#include "gather.hpp"

#include <algorithm>
#include <cstring>

#include "../threads.hpp"

namespace tqai::detail {
namespace TQAI_LOCAL {

// Writes vectors of one batch row and head into a tensor, token by token.
class VectorWriter {
 public:
  VectorWriter(const Tensor& tensor, std::int64_t batch_row, std::int64_t head)
      : tensor_(tensor), element_(static_cast<std::int64_t>(size_of(tensor.dtype))) {
    base_ = static_cast<char*>(tensor.data) +
            (batch_row * tensor.strides[0] + head * tensor.strides[1]) * element_;
  }
  void write(std::int64_t token, const float* vector) const noexcept {
    convert_from_float(vector, dim(), tensor_.dtype, at(token));
  }
  void copy(std::int64_t token, const std::byte* vector, DType dtype,
            float* scratch) const noexcept {
    if (dtype == tensor_.dtype) {
      std::memcpy(at(token), vector, dim() * size_of(dtype));
    } else {
      convert_to_float(vector, dtype, dim(), scratch);
      write(token, scratch);
    }
  }
  void move(std::int64_t from, std::int64_t to) const noexcept {
    std::memmove(at(to), at(from), dim() * size_of(tensor_.dtype));
  }
  void clear(std::int64_t token) const noexcept {
    std::memset(at(token), 0, dim() * size_of(tensor_.dtype));
  }
  std::size_t dim() const noexcept { return static_cast<std::size_t>(tensor_.shape[3]); }

 private:
  char* at(std::int64_t token) const noexcept {
    return base_ + token * tensor_.strides[2] * element_;
  }
  const Tensor& tensor_;
  std::int64_t element_;
  char* base_;
};

// Token i of the tensors is the one at place first + i; both ends of a part are clipped to it.
struct Range {
  std::int64_t first;
  std::int64_t count;

  std::int64_t begin(std::int64_t part_start) const { return std::max(first, part_start); }
  std::int64_t end(std::int64_t part_end) const { return std::min(first + count, part_end); }
};

TQAI_INLINE void gather_exact(const Context& context, const ExactTokens& tokens, std::int64_t start,
                              int head, const Range& range, const VectorWriter& keys,
                              const VectorWriter& values) {
  if (!tokens) return;
  float scratch[kernels::kMaxDim];
  const std::byte* key = exact_keys(context, tokens, head);
  const std::byte* value = exact_values(context, tokens, head);
  const std::int64_t end = range.end(start + tokens.header().tokens);
  for (std::int64_t t = range.begin(start); t < end; ++t) {
    const auto from = static_cast<std::size_t>(t - start);
    keys.copy(t - range.first, key + from * context.key_bytes(), context.options.dtype, scratch);
    values.copy(t - range.first, value + from * context.value_bytes(), context.options.dtype,
                scratch);
  }
}

TQAI_INLINE void gather_head(const Context& context, const Row& row, int head, const Range& range,
                             const VectorWriter& keys, const VectorWriter& values,
                             std::byte* memory) noexcept {
  auto* vectors = reinterpret_cast<float*>(memory + context.coding_bytes());
  for (std::int64_t t = range.first; t < range.end(row.first); ++t) {
    keys.clear(t - range.first);
    values.clear(t - range.first);
  }
  std::int64_t start = row.first;
  gather_exact(context, row.sinks, start, head, range, keys, values);
  start += row.sink_tokens();
  for (const BlockView& view : row.sealed) {
    const std::int64_t begin = range.begin(start);
    const std::int64_t end = range.end(start + view.tokens);
    if (begin < end) {
      const auto* tile = reinterpret_cast<const std::uint8_t*>(view.block.header().tiles) +
                         static_cast<std::size_t>(head) * context.codec->layout().bytes();
      const int dim = context.options.head_dim;
      const kernels::SidePlan& side = context.codec->plan().keys;
      if (context.options.key_basis) {
        context.kernels->decode_in_basis(side, context.key_transform(head), tile, vectors, memory);
      } else {
        context.kernels->decode(side, true, tile, vectors, memory);
      }
      add_centre(context, row.centre_sets[static_cast<std::size_t>(view.set)], head,
                 positions_of(view), 1.0F, vectors);
      for (std::int64_t t = begin; t < end; ++t) {
        keys.write(t - range.first, vectors + (t - start) * dim);
      }
      context.kernels->decode(context.codec->plan().values, false, tile, vectors, memory);
      for (std::int64_t t = begin; t < end; ++t) {
        values.write(t - range.first, vectors + (t - start) * context.options.value_head_dim);
      }
    }
    start += view.tokens;
  }
  gather_exact(context, row.tail, start, head, range, keys, values);
}

// Tokens that were written by their places from place `first` on, to where they belong.
TQAI_INLINE void spread(const Row& row, const Range& tokens, std::int64_t first,
                        const VectorWriter& vectors) {
  for (std::int64_t i = tokens.count - 1; i >= 0; --i) {
    const std::int64_t place = place_of(row, tokens.first + i);
    if (token_at(row, place) == tokens.first + i) {
      vectors.move(place - first, i);
    } else {
      vectors.clear(i);
    }
  }
}

}  // namespace TQAI_LOCAL

TQAI_INLINE void gather(const Context& context, std::span<const Row> rows, std::int64_t first,
                        const Tensor& keys, const Tensor& values) {
  if (keys.shape[2] == 0) return;  // then there may be no memory either
  const Range range{first, keys.shape[2]};
  const int heads = context.options.kv_heads;
  // Of a tile. Before anything is written, after which nothing may throw.
  const ThreadMemory memory(
      1, context.coding_bytes() + std::size_t{kTileTokens} * kernels::kMaxDim * sizeof(float));
  for (std::size_t b = 0; b < rows.size(); ++b) {
    for (int head = 0; head < heads; ++head) {
      const VectorWriter to_keys(keys, static_cast<std::int64_t>(b), head);
      const VectorWriter to_values(values, static_cast<std::int64_t>(b), head);
      const std::int64_t place = place_of(rows[b], first);
      const std::int64_t end = place_of(rows[b], first + range.count);
      gather_head(context, rows[b], head, {place, end - place}, to_keys, to_values, memory.of(0));
      if (rows[b].gaps.empty()) continue;
      spread(rows[b], range, place, to_keys);
      spread(rows[b], range, place, to_values);
    }
  }
}

}  // namespace tqai::detail
