// Memory for sealed blocks, on huge pages where the system has them.
#pragma once

#include <cstddef>

namespace tqai::detail {

/// 64-byte aligned memory from slabs that hold many blocks of one size. A decoding step reads every
/// block once, in strides: on pages of 4 KB that is a miss of the page tables for each line or two,
/// a fifth of the time at 32K tokens. A slab is given back when its last block is. Thread-safe;
/// throws std::bad_alloc. Not counted: the callers do that.
void* allocate_block(std::size_t bytes);
/// `bytes` as allocated.
void deallocate_block(void* block, std::size_t bytes) noexcept;

}  // namespace tqai::detail
