// The SGD kernel of a module, for updates to run (see update.h).
#pragma once

#include <Python.h>

#include <functional>
#include <utility>

#include "launch.h"
#include "sgd_math.h"

namespace gdfast {

// Updates so many tensors; it needs no lock of Python's, and throws std::exception.
using SgdLaunch = std::function<void(const SgdTensor*, int64_t, const SgdHyper&, const Call&)>;

constexpr const char* kSgdLaunchCapsule = "gdfast.sgd_launch";

inline PyObject* sgd_launch_capsule(SgdLaunch launch) {
  return PyCapsule_New(new SgdLaunch(std::move(launch)), kSgdLaunchCapsule, [](PyObject* capsule) {
    delete static_cast<SgdLaunch*>(PyCapsule_GetPointer(capsule, kSgdLaunchCapsule));
  });
}

}  // namespace gdfast
