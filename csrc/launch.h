// A kernel that has been told everything but where its tensors are, for plans to run.
#pragma once

#include <Python.h>

#include <cstdint>
#include <functional>
#include <utility>

namespace gdfast {

// What changes from one call to the next beside the tensors. `where` is the number of threads on
// the CPU, the device on a GPU.
struct Call {
  double momentum;
  int where;
  uintptr_t stream;
};

// Runs on the addresses of its tensors, null for none; it needs no lock of Python's, and throws
// std::exception.
using Launch = std::function<void(void* const* addresses, const Call& call)>;

// gdfast._cuda makes launches too, and gdfast._cpu runs all of them.
constexpr const char* kLaunchCapsule = "gdfast.launch";

inline PyObject* launch_capsule(Launch launch) {
  return PyCapsule_New(new Launch(std::move(launch)), kLaunchCapsule, [](PyObject* capsule) {
    delete static_cast<Launch*>(PyCapsule_GetPointer(capsule, kLaunchCapsule));
  });
}

}  // namespace gdfast
