// Kernels that run one after the other on the same tensors, in one call from Python.
#pragma once

#include <Python.h>

namespace gdfast {

// Adds to a module, which has tensor_facts' functions already,
//   make_plan(given, fresh, parts, launches, results, aligned, written)
//       a plan for `run_plan`. Tensors are counted, those that are given first, then those that are
//       made: `fresh` are functions without arguments that make them. Behind these come parts of
//       the last of them, which begin so many bytes from its beginning. `launches` are pairs of a
//       launch (see launch.h) and the numbers of its tensors, -1 for none; `results` the numbers
//       of what a call returns, -1 for None; `aligned` those of given tensors whose addresses 16
//       must divide; `written` those of given tensors that kernels write to, for autograd
//   run_plan(plan, tensors, momentum, where, stream)
//       runs all launches on a tuple of tensors (or None); returns a tuple, or None with nothing
//       done where an address is not aligned
// False with a Python exception set where that fails.
bool add_plan(PyObject* module);

}  // namespace gdfast
