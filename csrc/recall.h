// Whether a call is like one before, all of whose checks then hold again.
#pragma once

#include <Python.h>

namespace gdfast {

// Adds to a module, which has tensor_facts' functions already,
//   make_memo(kept, asked, tensors, facts, needs)
//       what a call rested on. `kept` are triples of a dict, or of a weak reference to an object
//       with one, a key and what it has there: that very object, NotImplemented for nothing,
//       Ellipsis for anything that is false. `asked` are pairs of a function without arguments and
//       its answer; `tensors` those of the call: numbers of arguments, or a weak reference to an
//       object, the name of a dict that it has and a key; `facts` their tensor_facts, and `needs`
//       which of the first of them require gradients
//   recall(memo, *arguments)
//       the tensors as a tuple, where all of that is so again and no watcher is true; else None
// False with a Python exception set where that fails.
bool add_recall(PyObject* module);

}  // namespace gdfast
