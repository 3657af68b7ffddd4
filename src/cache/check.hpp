// Checks of what callers hand in. Each throws the error that its header promises.
#pragma once

#include <cstdint>
#include <string>
#include <tqai/cache.hpp>

#include "../kernels/kernels.hpp"

namespace tqai::detail {

/// That a cache takes or reads from bytes.
inline constexpr std::int64_t kMostTokens = std::int64_t{1} << 40;
/// Queries over a smaller one could be too large.
inline constexpr float kLeastSoftCap = 1e-10F;
/// Over the least soft cap it is finite.
inline constexpr float kLargestScale = 1e28F;

/// The options with their defaults filled in.
CacheOptions checked(CacheOptions options);

/// Throws ValueError for an embedding that heads of so many coordinates cannot have gone through.
void check_rope(const Rope& rope, int head_dim);

/// wanted: whether what is negative stands for any size.
std::string shape_text(const std::array<std::int64_t, 4>& shape, bool wanted = false);

/// `name` must have this shape; −1 stands for any size ≥ 0. `axes` names them for the message.
void check_shape(const char* name, const std::array<std::int64_t, 4>& shape,
                 const std::array<std::int64_t, 4>& wanted, const char* axes);

/// Of so many rows and tokens, in one section or `sections`, each within ± KvCache::kMaxPosition.
void check_positions(const PositionTensor& positions, std::int64_t batch, std::int64_t tokens,
                     int sections);
void check_position(std::int64_t position);

/// The last dimension must be contiguous; the data as check_memory says.
void check_layout(const char* name, const ConstTensor& tensor);

/// As check_layout, and no two elements at one address: threads may write any of them.
void check_written(const char* name, const Tensor& tensor);

/// Of a shape with `dimensions` dimensions. Unless it is empty there must be data, at a multiple of
/// its elements' size, and the strides must not lead out of what a processor can address.
void check_memory(const char* name, const void* data, std::size_t element,
                  const std::int64_t* shape, const std::int64_t* strides, std::size_t dimensions);

/// Throws where two tensors, the first one to be written, are sure to have bytes in common: one of
/// them leaves no gaps and the other has an element there, or both begin at one address. Others may
/// lie in each other's gaps.
void check_apart(const char* written_name, const Tensor& written, const char* name,
                 const ConstTensor& other);

/// Also of what std::to_string would print as 0.000000.
std::string number_text(float value);

/// Every vector finite.
void check_vectors(const kernels::Kernels& kernels, const char* name, const ConstTensor& tensor,
                   const Resources& resources);

}  // namespace tqai::detail
