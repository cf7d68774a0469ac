// An SGD step of parameters that have been updated before, whose checks then hold again.
#pragma once

#include <Python.h>

namespace gdfast {

// Adds to a module, which has tensor_facts' functions already,
//   make_update(launch, dtype, params, grads, momenta)
//       what an update of these tuples of tensors rests on; momenta are empty where there is no
//       momentum. `launch` is a capsule of sgd_launch.h
//   run_update(update, params, state, lr, momentum, dampening, weight_decay, nesterov, maximize,
//              zero_grad, where, stream)
//       updates a list of parameters by their `grad`, with the "momentum_buffer" that the dict
//       state has for each, and tells autograd; False, with nothing done, where one of them is not
//       as it was, or somebody looks on
// False with a Python exception set where that fails.
bool add_update(PyObject* module);

}  // namespace gdfast
