// Scratch memory for one kernel call, kept by the calling thread for its next call.
#pragma once

#include <cstddef>

namespace gdfast::cpu {

// Memory aligned to 64 bytes. Large enough memory from an earlier call on the same thread is used
// again, so that its pages are not faulted anew on every call. Throws std::bad_alloc.
class Workspace {
 public:
  explicit Workspace(size_t bytes);
  ~Workspace();
  Workspace(const Workspace&) = delete;
  Workspace& operator=(const Workspace&) = delete;
  char* data() const;

 private:
  char* data_;
};

// Whether this process is a fork of one that had loaded the module. The OpenMP threads of the
// parent do not exist in the child, and waiting for them would hang.
bool is_forked_child();

}  // namespace gdfast::cpu
