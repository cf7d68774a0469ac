// What decides which kernel runs on some tensors, as bytes to look it up by.
#pragma once

#include <Python.h>

#include <cstdint>

namespace gdfast {

// Adds to a module
//   watch_tensors(exchange, types, oddities, written, watchers)   what tensors are asked by: the
//       capsule __dlpack_c_exchange_api__ of a class of tensors, the types that are looked into,
//       functions, each of which is true of tensors that are not, one that tells autograd of a
//       tuple of tensors that they have changed, and functions without arguments, each of which is
//       true while somebody looks at operations
//   tensor_facts(*tensors)                     sizes, strides, dtypes and devices of tensors (or
//       None) as bytes; None where one of them is another object or has no memory of its own
//   unwatched_facts(*tensors)                  the same; None too where a watcher is true
//   add_one(tensor)                            adds 1 to an int64 on the CPU; False for others,
//       which stay as they are
// False with a Python exception set where that fails.
bool add_tensor_facts(PyObject* module);

// The most tensors that have facts together.
constexpr Py_ssize_t kMostTensors = 48;

// Whether tensors have these facts, as bytes: 1 or 0, and -1 with a Python exception set.
int have_facts(PyObject* const* tensors, Py_ssize_t count, PyObject* facts);

// Whether a watcher is true: 1 or 0, and -1 with a Python exception set.
int is_anyone_watching();

// The facts of one tensor as bytes, None where it has none; null with a Python exception set.
PyObject* facts_of(PyObject* tensor);

// How many elements a tensor that has facts has.
int64_t numel_of(PyObject* tensor);

// Where a tensor's elements begin; false with a Python exception set for what has no memory.
bool tensor_address(PyObject* tensor, void** address);

// Tells autograd of a tuple of tensors that they have changed; false with an exception set.
bool tell_versions(PyObject* tensors);

}  // namespace gdfast
