#include "plan.h"

#include <algorithm>
#include <exception>
#include <new>
#include <stdexcept>
#include <vector>

#include "launch.h"
#include "tensor_facts.h"

namespace gdfast {
namespace {

constexpr const char* kPlanCapsule = "gdfast.plan";
constexpr Py_ssize_t kMostOfPlan = 96;
constexpr Py_ssize_t kMostOfLaunch = 24;
constexpr uintptr_t kAlignment = 16;

using Numbers = std::vector<Py_ssize_t>;

struct Step {
  const Launch* launch;
  Numbers tensors;
  // Fresh tensors that no step before needs, and those of them that none after does, nor a result.
  Numbers makes, drops;
};

struct Plan {
  Py_ssize_t given;
  std::vector<PyObject*> fresh, kept;
  std::vector<Step> steps;
  Numbers parts, results, aligned, written;
  // Whether fresh tensors are made when they are needed, and given back when they are not: the next
  // ones find memory that is warm.
  bool is_lazy = false;

  ~Plan() {
    for (PyObject* each : fresh) Py_DECREF(each);
    for (PyObject* each : kept) Py_DECREF(each);
  }
};

Plan* plan_of(PyObject* capsule) {
  return static_cast<Plan*>(PyCapsule_GetPointer(capsule, kPlanCapsule));
}

// What a call holds of Python's, given back when it ends.
struct Tensors {
  PyObject* objects[kMostOfPlan];
  void* addresses[kMostOfPlan];
  Py_ssize_t given, count;

  ~Tensors() {
    for (Py_ssize_t i = given; i < count; ++i) Py_XDECREF(objects[i]);
  }
};

// False with an exception set for what is no tuple of numbers from least to below most.
bool read(PyObject* tuple, Py_ssize_t least, Py_ssize_t most, Numbers* numbers) {
  if (!PyTuple_Check(tuple)) {
    PyErr_SetString(PyExc_TypeError, "make_plan: expected tuples of numbers");
    return false;
  }
  for (Py_ssize_t i = 0; i < PyTuple_GET_SIZE(tuple); ++i) {
    const Py_ssize_t number = PyLong_AsSsize_t(PyTuple_GET_ITEM(tuple, i));
    if (number == -1 && PyErr_Occurred()) return false;
    if (number < least || number >= most) {
      PyErr_SetString(PyExc_ValueError, "make_plan: expected numbers of tensors");
      return false;
    }
    numbers->push_back(number);
  }
  return true;
}

bool read_steps(PyObject* launches, Py_ssize_t count, Plan* plan) {
  for (Py_ssize_t i = 0; i < PyTuple_GET_SIZE(launches); ++i) {
    PyObject *capsule, *tensors;
    Step step;
    if (!PyArg_ParseTuple(PyTuple_GET_ITEM(launches, i), "OO", &capsule, &tensors)) return false;
    step.launch = static_cast<const Launch*>(PyCapsule_GetPointer(capsule, kLaunchCapsule));
    if (step.launch == nullptr || !read(tensors, -1, count, &step.tensors)) return false;
    if (static_cast<Py_ssize_t>(step.tensors.size()) > kMostOfLaunch) {
      PyErr_SetString(PyExc_ValueError, "make_plan: launches: expected at most 24 tensors");
      return false;
    }
    Py_INCREF(capsule);
    plan->kept.push_back(capsule);
    plan->steps.push_back(step);
  }
  return true;
}

bool has(const Numbers& numbers, Py_ssize_t number) {
  return std::find(numbers.begin(), numbers.end(), number) != numbers.end();
}

// Finds out which step makes which fresh tensors, and which drops them.
void plan_lives(Py_ssize_t count, Plan* plan) {
  plan->is_lazy = plan->steps.size() > 1 && plan->parts.empty();
  for (Py_ssize_t number = plan->given; plan->is_lazy && number < count; ++number) {
    Step *first = nullptr, *last = nullptr;
    for (Step& step : plan->steps) {
      if (!has(step.tensors, number)) continue;
      if (first == nullptr) first = &step;
      last = &step;
    }
    if (first == nullptr) first = last = &plan->steps.back();
    first->makes.push_back(number);
    if (!has(plan->results, number)) last->drops.push_back(number);
  }
}

PyObject* make_plan(PyObject*, PyObject* arguments) {
  Py_ssize_t given;
  PyObject *fresh, *parts, *launches, *results, *aligned, *written;
  if (!PyArg_ParseTuple(arguments, "nO!O!O!OOO", &given, &PyTuple_Type, &fresh, &PyTuple_Type,
                        &parts, &PyTuple_Type, &launches, &results, &aligned, &written)) {
    return nullptr;
  }
  if (given < 0 || given > kMostOfPlan) {
    PyErr_SetString(PyExc_ValueError, "make_plan: given: expected 0 to 96 tensors");
    return nullptr;
  }
  const Py_ssize_t count = given + PyTuple_GET_SIZE(fresh), all = count + PyTuple_GET_SIZE(parts);
  if (all > kMostOfPlan || (all > count && count == given)) {
    PyErr_SetString(PyExc_ValueError, "make_plan: given, fresh: expected at most 96 tensors");
    return nullptr;
  }
  Plan* plan = new Plan{given, {}, {}, {}, {}, {}, {}, {}};
  PyObject* capsule =
      PyCapsule_New(plan, kPlanCapsule, [](PyObject* self) { delete plan_of(self); });
  if (capsule == nullptr) {
    delete plan;
    return nullptr;
  }
  for (Py_ssize_t i = 0; i < PyTuple_GET_SIZE(fresh); ++i) {
    PyObject* const make = PyTuple_GET_ITEM(fresh, i);
    Py_INCREF(make);
    plan->fresh.push_back(make);
  }
  if (!read(parts, 0, PY_SSIZE_T_MAX, &plan->parts) || !read_steps(launches, all, plan) ||
      !read(results, -1, count, &plan->results) || !read(aligned, 0, given, &plan->aligned) ||
      !read(written, 0, given, &plan->written)) {
    Py_DECREF(capsule);
    return nullptr;
  }
  plan_lives(count, plan);
  return capsule;
}

bool make(const Plan& plan, Py_ssize_t number, Tensors* tensors) {
  PyObject* const made = PyObject_CallNoArgs(plan.fresh[number - plan.given]);
  tensors->objects[number] = made;
  return made != nullptr && tensor_address(made, &tensors->addresses[number]);
}

bool make_fresh(const Plan& plan, Tensors* tensors) {
  const Py_ssize_t count = plan.given + static_cast<Py_ssize_t>(plan.fresh.size());
  for (; tensors->count < count; ++tensors->count) tensors->objects[tensors->count] = nullptr;
  if (plan.is_lazy) return true;
  for (Py_ssize_t number = plan.given; number < count; ++number) {
    if (!make(plan, number, tensors)) return false;
  }
  Py_ssize_t number = tensors->count;
  for (Py_ssize_t offset : plan.parts) {
    tensors->addresses[number] =
        static_cast<char*>(tensors->addresses[tensors->count - 1]) + offset;
    ++number;
  }
  return true;
}

// As what a kernel throws is raised where Python calls it by itself.
void raise(const std::exception_ptr& error) {
  try {
    std::rethrow_exception(error);
  } catch (const std::bad_alloc&) {
    PyErr_NoMemory();
  } catch (const std::invalid_argument& thrown) {
    PyErr_SetString(PyExc_ValueError, thrown.what());
  } catch (const std::exception& thrown) {
    PyErr_SetString(PyExc_RuntimeError, thrown.what());
  } catch (...) {
    PyErr_SetString(PyExc_RuntimeError, "run_plan: a kernel failed");
  }
}

void launch(const Step& step, const Tensors& tensors, const Call& call) {
  void* addresses[kMostOfLaunch] = {};
  void** next = addresses;
  for (Py_ssize_t tensor : step.tensors) {
    *next++ = tensor < 0 ? nullptr : tensors.addresses[tensor];
  }
  (*step.launch)(addresses, call);
}

// Steps [first, end), without Python.
bool launch_steps(const Plan& plan, size_t first, size_t end, const Tensors& tensors,
                  const Call& call) {
  std::exception_ptr error;
  Py_BEGIN_ALLOW_THREADS;
  try {
    for (size_t i = first; i < end; ++i) launch(plan.steps[i], tensors, call);
  } catch (...) {
    error = std::current_exception();
  }
  Py_END_ALLOW_THREADS;
  if (error) raise(error);
  return !error;
}

bool launch_all(const Plan& plan, Tensors* tensors, const Call& call) {
  if (!plan.is_lazy) return launch_steps(plan, 0, plan.steps.size(), *tensors, call);
  for (size_t i = 0; i < plan.steps.size(); ++i) {
    for (Py_ssize_t number : plan.steps[i].makes) {
      if (!make(plan, number, tensors)) return false;
    }
    if (!launch_steps(plan, i, i + 1, *tensors, call)) return false;
    for (Py_ssize_t number : plan.steps[i].drops) Py_CLEAR(tensors->objects[number]);
  }
  return true;
}

PyObject* chosen(const Numbers& numbers, const Tensors& tensors) {
  PyObject* const tuple = PyTuple_New(static_cast<Py_ssize_t>(numbers.size()));
  if (tuple == nullptr) return nullptr;
  Py_ssize_t place = 0;
  for (Py_ssize_t number : numbers) {
    PyObject* const each = number < 0 ? Py_None : tensors.objects[number];
    Py_INCREF(each);
    PyTuple_SET_ITEM(tuple, place++, each);
  }
  return tuple;
}

PyObject* run_plan(PyObject*, PyObject* const* arguments, Py_ssize_t count) {
  if (count != 5 || !PyTuple_Check(arguments[1])) {
    PyErr_SetString(PyExc_TypeError,
                    "run_plan: expected plan, tensors (a tuple), momentum, where, stream");
    return nullptr;
  }
  const Plan* const plan = plan_of(arguments[0]);
  if (plan == nullptr) return nullptr;
  PyObject* const given = arguments[1];
  const Call call{PyFloat_AsDouble(arguments[2]), static_cast<int>(PyLong_AsLong(arguments[3])),
                  static_cast<uintptr_t>(PyLong_AsUnsignedLongLong(arguments[4]))};
  if (PyErr_Occurred()) return nullptr;
  if (PyTuple_GET_SIZE(given) != plan->given) {
    PyErr_SetString(PyExc_ValueError, "run_plan: tensors: expected as many as the plan has");
    return nullptr;
  }
  Tensors tensors;
  tensors.given = tensors.count = plan->given;
  for (Py_ssize_t i = 0; i < plan->given; ++i) {
    tensors.objects[i] = PyTuple_GET_ITEM(given, i);
    tensors.addresses[i] = nullptr;
    if (tensors.objects[i] == Py_None) continue;
    if (!tensor_address(tensors.objects[i], &tensors.addresses[i])) return nullptr;
  }
  for (Py_ssize_t number : plan->aligned) {
    if (reinterpret_cast<uintptr_t>(tensors.addresses[number]) % kAlignment) Py_RETURN_NONE;
  }
  PyObject* const changed = chosen(plan->written, tensors);
  if (changed == nullptr) return nullptr;
  PyObject* results = nullptr;
  // Versions rise before the launches: one that fails may have written.
  if (make_fresh(*plan, &tensors) && (plan->written.empty() || tell_versions(changed)) &&
      launch_all(*plan, &tensors, call)) {
    results = chosen(plan->results, tensors);
  }
  Py_DECREF(changed);
  return results;
}

PyMethodDef methods[] = {
    {"make_plan", make_plan, METH_VARARGS, "Launches on tensors that run_plan runs in one call."},
    {"run_plan", reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(run_plan)),
     METH_FASTCALL, "Makes fresh tensors, runs the launches of a plan, and returns its results."},
    {nullptr, nullptr, 0, nullptr}};

}  // namespace

bool add_plan(PyObject* module) { return PyModule_AddFunctions(module, methods) == 0; }

}  // namespace gdfast
