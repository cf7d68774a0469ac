#include "workspace.h"

#include <cstdlib>
#include <new>

#ifndef _WIN32
#include <pthread.h>
#endif
#ifdef __linux__
#include <sys/mman.h>
#endif

namespace gdfast::cpu {
namespace {

constexpr size_t kAlignment = 64;
constexpr size_t kHugePage = 2 << 20;

char* allocate(size_t bytes) {
  const size_t alignment = bytes >= kHugePage ? kHugePage : kAlignment;
  const size_t rounded = (bytes / alignment + 1) * alignment;
  void* memory = std::aligned_alloc(alignment, rounded);
  if (memory == nullptr) throw std::bad_alloc();
#ifdef __linux__
  // Kernels walk large scratch in strides of kilobytes, which ordinary pages would make a TLB miss
  // each. Only advice: it may fail where huge pages are switched off.
  if (alignment == kHugePage) madvise(memory, rounded, MADV_HUGEPAGE);
#endif
  return static_cast<char*>(memory);
}

// What a thread keeps between calls, a block for each level of nested workspaces; freed when the
// thread ends. Deeper workspaces than kLevels are plain allocations.
constexpr int kLevels = 4;
struct Kept {
  char* data[kLevels] = {};
  size_t bytes[kLevels] = {};
  int level = 0;
  ~Kept() {
    for (char* block : data) std::free(block);
  }
};
thread_local Kept kept;

bool forked_child = false;

#ifndef _WIN32
const int fork_handler = pthread_atfork(nullptr, nullptr, [] { forked_child = true; });
#endif

}  // namespace

Workspace::Workspace(size_t bytes) {
  const int level = kept.level;
  if (level >= kLevels) {
    data_ = allocate(bytes);
  } else {
    if (kept.bytes[level] < bytes || kept.data[level] == nullptr) {
      std::free(kept.data[level]);
      kept.data[level] = nullptr;
      kept.bytes[level] = 0;
      kept.data[level] = allocate(bytes);
      kept.bytes[level] = bytes;
    }
    data_ = kept.data[level];
  }
  ++kept.level;
}

Workspace::~Workspace() {
  if (--kept.level >= kLevels) std::free(data_);
}

char* Workspace::data() const { return data_; }

bool is_forked_child() { return forked_child; }

}  // namespace gdfast::cpu
