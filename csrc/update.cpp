#include "update.h"

#include <exception>
#include <string>
#include <tuple>
#include <vector>

#include "sgd_arguments.h"
#include "sgd_launch.h"
#include "tensor_facts.h"

namespace gdfast {
namespace {

constexpr const char* kUpdateCapsule = "gdfast.update";

struct Update {
  PyObject* kept;  // what keeps the launch alive. Parameters, which may lead to whoever has this,
                   // are not kept: any that are like these will do
  const SgdLaunch* launch;
  DType dtype;
  Py_ssize_t count;  // of parameters
  bool has_momentum;
  std::vector<PyObject*> facts;  // bytes, of a parameter's gradient, momentum buffer and itself
  std::vector<int64_t> numels;
  int64_t element_size;

  ~Update() {
    for (PyObject* each : facts) Py_DECREF(each);
    Py_DECREF(kept);
  }
};

Update* update_of(PyObject* capsule) {
  return static_cast<Update*>(PyCapsule_GetPointer(capsule, kUpdateCapsule));
}

PyObject* make_update(PyObject*, PyObject* arguments) {
  PyObject *launch, *params, *grads, *momenta;
  const char* dtype;
  if (!PyArg_ParseTuple(arguments, "OsO!O!O!", &launch, &dtype, &PyTuple_Type, &params,
                        &PyTuple_Type, &grads, &PyTuple_Type, &momenta)) {
    return nullptr;
  }
  const auto* run = static_cast<const SgdLaunch*>(PyCapsule_GetPointer(launch, kSgdLaunchCapsule));
  if (run == nullptr) return nullptr;
  const Py_ssize_t count = PyTuple_GET_SIZE(params);
  const bool has_momentum = PyTuple_GET_SIZE(momenta) > 0;
  if (PyTuple_GET_SIZE(grads) != count || (has_momentum && PyTuple_GET_SIZE(momenta) != count)) {
    PyErr_SetString(PyExc_ValueError, "make_update: expected as many of each as params");
    return nullptr;
  }
  Py_INCREF(launch);
  Update* const update = new Update{launch, run, {}, count, has_momentum, {}, {}, 0};
  PyObject* const capsule =
      PyCapsule_New(update, kUpdateCapsule, [](PyObject* self) { delete update_of(self); });
  if (capsule == nullptr) {
    delete update;
    return nullptr;
  }
  try {
    std::tie(update->dtype, update->element_size) = sgd_dtype(dtype);
  } catch (const std::exception& error) {
    PyErr_SetString(PyExc_ValueError, error.what());
    Py_DECREF(capsule);
    return nullptr;
  }
  for (Py_ssize_t i = 0; i < count; ++i) {
    for (PyObject* tuple : {params, grads, momenta}) {
      if (tuple == momenta && !has_momentum) continue;
      PyObject* const facts = facts_of(PyTuple_GET_ITEM(tuple, i));
      if (facts == nullptr || facts == Py_None) {
        Py_XDECREF(facts);
        Py_DECREF(capsule);
        if (facts == Py_None) PyErr_SetString(PyExc_ValueError, "make_update: no facts");
        return nullptr;
      }
      update->facts.push_back(facts);
    }
    update->numels.push_back(numel_of(PyTuple_GET_ITEM(params, i)));
  }
  return capsule;
}

// 1 with its address where a tensor is as it was, 0 where not, -1 with an exception.
int find(PyObject* tensor, PyObject* facts, void** address) {
  const int same = have_facts(&tensor, 1, facts);
  if (same != 1) return same;
  return tensor_address(tensor, address) ? 1 : -1;
}

struct Found {
  std::vector<SgdTensor> tensors;
  std::vector<PyObject*> held;  // all of them, so that nothing that Python runs frees one
  std::vector<PyObject*> written;

  ~Found() {
    for (PyObject* each : held) Py_DECREF(each);
  }

  void hold(PyObject* each, bool is_written) {
    Py_INCREF(each);
    held.push_back(each);
    if (is_written) written.push_back(each);
  }
};

int find_all(const Update& update, PyObject* params, PyObject* state, bool zero_grad,
             Found* found) {
  static PyObject* const grad_name = PyUnicode_InternFromString("grad");
  static PyObject* const momentum_name = PyUnicode_InternFromString("momentum_buffer");
  auto facts = update.facts.begin();
  // Python that runs in here might change the list.
  for (Py_ssize_t i = 0; i < update.count; ++i) {
    if (PyList_GET_SIZE(params) != update.count) return 0;
    PyObject* const param = PyList_GET_ITEM(params, i);
    found->hold(param, true);
    SgdTensor tensor{nullptr, nullptr, nullptr, nullptr, update.numels[static_cast<size_t>(i)]};
    if (const int same = find(param, *facts++, &tensor.param); same != 1) return same;
    PyObject* const grad = PyObject_GetAttr(param, grad_name);
    if (grad == nullptr) return -1;
    found->hold(grad, zero_grad);
    Py_DECREF(grad);
    if (grad == Py_None) return 0;
    if (const int same = find(grad, *facts++, &tensor.grad); same != 1) return same;
    if (update.has_momentum) {
      PyObject* const own = PyDict_GetItemWithError(state, param);
      if (own == nullptr || !PyDict_Check(own)) return PyErr_Occurred() ? -1 : 0;
      PyObject* const buffer = PyDict_GetItemWithError(own, momentum_name);
      if (buffer == nullptr || buffer == Py_None) return PyErr_Occurred() ? -1 : 0;
      found->hold(buffer, true);
      if (const int same = find(buffer, *facts++, &tensor.momentum); same != 1) return same;
    }
    found->tensors.push_back(tensor);
  }
  return sgd_disjoint(found->tensors, update.element_size);
}

// Tells autograd what is written to; false with an exception.
bool tell(const std::vector<PyObject*>& changed) {
  const auto all = static_cast<Py_ssize_t>(changed.size());
  PyObject* const written = PyTuple_New(all);
  if (written == nullptr) return false;
  for (Py_ssize_t i = 0; i < all; ++i) {
    PyObject* const each = changed[static_cast<size_t>(i)];
    Py_INCREF(each);
    PyTuple_SET_ITEM(written, i, each);
  }
  const bool told = tell_versions(written);
  Py_DECREF(written);
  return told;
}

bool launch(const Update& update, const Found& found, const SgdHyper& hyper, const Call& call) {
  std::string error;
  Py_BEGIN_ALLOW_THREADS;
  try {
    (*update.launch)(found.tensors.data(), static_cast<int64_t>(found.tensors.size()), hyper, call);
  } catch (const std::exception& thrown) {
    error = thrown.what();
    if (error.empty()) error = "run_update: the kernel failed";
  }
  Py_END_ALLOW_THREADS;
  if (!error.empty()) PyErr_SetString(PyExc_RuntimeError, error.c_str());
  return error.empty();
}

PyObject* run_update(PyObject*, PyObject* arguments) {
  PyObject *capsule, *params, *state;
  double lr, momentum, dampening, weight_decay;
  int nesterov, maximize, zero_grad, where;
  unsigned long long stream;
  if (!PyArg_ParseTuple(arguments, "OO!O!ddddpppiK", &capsule, &PyList_Type, &params, &PyDict_Type,
                        &state, &lr, &momentum, &dampening, &weight_decay, &nesterov, &maximize,
                        &zero_grad, &where, &stream)) {
    return nullptr;
  }
  const Update* const update = update_of(capsule);
  if (update == nullptr) return nullptr;
  const int watches = is_anyone_watching();
  if (watches < 0) return nullptr;
  if (watches || PyList_GET_SIZE(params) != update->count ||
      (momentum != 0) != update->has_momentum) {
    Py_RETURN_FALSE;
  }
  Found found;
  const int same = find_all(*update, params, state, zero_grad != 0, &found);
  if (same < 0) return nullptr;
  if (same == 0) Py_RETURN_FALSE;
  const SgdHyper hyper{
      update->dtype, lr,    momentum,       dampening, weight_decay, 1.0, nesterov != 0,
      maximize != 0, false, zero_grad != 0, false};
  const Call call{0.0, where, static_cast<uintptr_t>(stream)};
  // Versions rise before the launch: one that fails may have written.
  if (!tell(found.written) || !launch(*update, found, hyper, call)) {
    return nullptr;
  }
  Py_RETURN_TRUE;
}

PyMethodDef methods[] = {
    {"make_update", make_update, METH_VARARGS, "What an update of tensors rests on, for reuse."},
    {"run_update", run_update, METH_VARARGS,
     "Updates parameters where all is as it was, else returns False."},
    {nullptr, nullptr, 0, nullptr}};

}  // namespace

bool add_update(PyObject* module) { return PyModule_AddFunctions(module, methods) == 0; }

}  // namespace gdfast
