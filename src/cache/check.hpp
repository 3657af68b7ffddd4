// Checks of what callers hand in. Each throws the error that its header promises.
#pragma once

#include <cstdint>
#include <string>
#include <tqai/cache.hpp>

#include "../kernels/kernels.hpp"

namespace tqai::detail {

/// The options with their defaults filled in.
CacheOptions checked(CacheOptions options);

std::string shape_text(const std::array<std::int64_t, 4>& shape);

/// `name` must have this shape; −1 stands for any size ≥ 0. `axes` names them for the message.
void check_shape(const char* name, const std::array<std::int64_t, 4>& shape,
                 const std::array<std::int64_t, 4>& wanted, const char* axes);

/// Of so many rows and tokens, in one section or `sections`, each within ± KvCache::kMaxPosition.
void check_positions(const PositionTensor& positions, std::int64_t batch, std::int64_t tokens,
                     int sections);
void check_position(std::int64_t position);

/// The last dimension must be contiguous, and the data not null unless the tensor is empty.
void check_layout(const char* name, const void* data, const std::array<std::int64_t, 4>& shape,
                  const std::array<std::int64_t, 4>& strides);

/// As check_layout, and no two elements at one address: threads may write any of them.
void check_written(const char* name, const Tensor& tensor);

/// Also of what std::to_string would print as 0.000000.
std::string number_text(float value);

/// Every vector finite.
void check_vectors(const kernels::Kernels& kernels, const char* name, const ConstTensor& tensor);

}  // namespace tqai::detail
