// rotate-inl.hpp outside the kernels.
#pragma once

#include <tqai/export.hpp>

namespace tqai {
namespace TQAI_LOCAL {

#include "rotate-inl.hpp"

}  // namespace TQAI_LOCAL
}  // namespace tqai
