// Memory for large results, kept when they are freed, so that a training step finds again the pages
// that the step before it left.
#pragma once

#include <cstddef>

namespace gdfast::cpu {

// A block of at least `bytes`, aligned to 64 bytes; what it holds is left over from earlier use.
// Throws std::bad_alloc. Any thread may free what another one took.
void* pool_take(size_t bytes);
void pool_give(void* block);

struct PoolUse {
  size_t taken, kept;  // bytes in use, and bytes that wait for their next use
};
PoolUse pool_use();

// Returns all memory that waits for its next use to the operating system.
void pool_release();

}  // namespace gdfast::cpu
