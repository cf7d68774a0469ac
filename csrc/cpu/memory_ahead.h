// Memory that the caches fetch bit by bit, in between the calls of a micro-kernel, while products
// keep the processor busy.
#pragma once

#include "parallel.h"
#include "simd.h"

namespace gdfast::cpu {
namespace {

class MemoryAhead {
 public:
  // A stretch of memory, in cache lines.
  struct Stretch {
    const char* at;
    int32_t lines;
    bool written;  // rather than read
  };

  // `room` is for all stretches that are added.
  explicit MemoryAhead(Stretch* room) : end_(room), next_(room) {}

  void add(const float* from, int64_t size, bool written) {
    if (size <= 0) return;
    const uintptr_t first = reinterpret_cast<uintptr_t>(from) / kLine;
    const uintptr_t last = reinterpret_cast<uintptr_t>(from + size - 1) / kLine;
    const int32_t lines = static_cast<int32_t>(last - first + 1);
    *end_++ = {reinterpret_cast<const char*>(first * kLine), lines, written};
    lines_ += lines;
  }

  // What has been added is fetched within so many calls of fetch().
  void spread(int64_t calls) { at_once_ = ceil_div(lines_, max_of(1, calls)); }

  GDFAST_INLINE void fetch() {
    for (int64_t left = at_once_; left > 0 && next_ != end_;) {
      const int64_t lines = min_of(left, next_->lines);
      const char* at = next_->at;
      if (next_->written) {
        for (int64_t i = 0; i < lines; ++i) __builtin_prefetch(at + i * kLine, 1);
      } else {
        for (int64_t i = 0; i < lines; ++i) __builtin_prefetch(at + i * kLine, 0, 2);
      }
      next_->at += lines * kLine;
      next_->lines -= static_cast<int32_t>(lines);
      left -= lines;
      if (next_->lines == 0) ++next_;
    }
  }

 private:
  static constexpr int64_t kLine = 64;
  Stretch *end_, *next_;
  int64_t lines_ = 0, at_once_ = 0;
};

}  // namespace
}  // namespace gdfast::cpu
