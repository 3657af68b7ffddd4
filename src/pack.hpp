// pack-inl.hpp outside the kernels.
#pragma once

#include <cstdint>
#include <cstring>
#include <tqai/packing.hpp>

namespace tqai {
namespace TQAI_LOCAL {

#include "pack-inl.hpp"

}  // namespace TQAI_LOCAL
}  // namespace tqai
