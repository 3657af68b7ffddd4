// Memory for sealed blocks, on huge pages where the system has them.
#pragma once

#include <cstddef>

namespace tqai::detail {

/// 64-byte aligned memory from slabs that hold many blocks of one size. A decoding step reads every
/// block once, in strides: on pages of 4 KB that is a miss of the page tables for each line or two,
/// a fifth of the time at 32K tokens. near: null, or a block of the same size that is held, beside
/// which this one had best lie: what is given back together lies together then. Thread-safe; throws
/// std::bad_alloc. Not counted: the callers do that.
///
/// A slab is given back when its last block is; before that, what pages lie between blocks that are
/// used, at latest when a sixteenth of a slab's has been dropped.
void* allocate_block(std::size_t bytes, const void* near = nullptr);
/// `bytes` as allocated.
void deallocate_block(void* block, std::size_t bytes) noexcept;

/// Memory as large as a prompt, by itself and 64-byte aligned. Pages of 4 KB would take as long to
/// come as a prompt takes to be copied there. Thread-safe; throws std::bad_alloc. Not counted.
void* allocate_large(std::size_t bytes);
/// `bytes` as allocated.
void deallocate_large(void* memory, std::size_t bytes) noexcept;

}  // namespace tqai::detail
