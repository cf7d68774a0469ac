// Scratch at the same places in all kernels of a step: a thread then finds its own where it had
// that of the kernel before, and in the cache of its core. A line that another core has written
// takes 30 to 200 ns to come from there.
#pragma once

#include "parallel.h"

namespace gdfast::cpu {
namespace {

// Ends what is carved of the scratch that all threads share.
inline void end_shared(Carver& carver) {
  carver.take<char>(round_up(carver.used(), 32 * 1024) - carver.used());
}

// Ends what is carved of a thread's own scratch.
inline void end_own(Carver& carver) {
  carver.take<char>(round_up(carver.used(), 256 * 1024) - carver.used());
}

}  // namespace
}  // namespace gdfast::cpu
