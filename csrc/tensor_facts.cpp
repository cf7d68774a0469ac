// Asks tensors by the C interface of DLPack 1.2, which needs nothing of torch to compile: a call by
// Python's own methods takes a tenth of a microsecond for each fact.
#include "tensor_facts.h"

#include <cstdint>
#include <cstring>

namespace gdfast {
namespace {

// https://dmlc.github.io/dlpack/latest/c_api.html: structures and their meaning.
struct DLTensor {
  void* data;
  int32_t device_type, device_id;
  int32_t ndim;
  uint8_t code, bits;
  uint16_t lanes;
  int64_t* shape;
  int64_t* strides;
  uint64_t byte_offset;
};
struct DLPackExchangeApi {
  uint32_t major, minor;
  void* previous;
  void (*allocate)();
  void (*from_object)();
  void (*to_object)();
  int (*look_into)(void* object, DLTensor* tensor);  // null where it is not provided
  void (*current_stream)();
};
constexpr uint32_t kMajor = 1;
constexpr int32_t kCpu = 1;
constexpr uint8_t kInteger = 0;
constexpr int kMostDimensions = 4, kMostTypes = 4, kMostOddities = 4;
constexpr int kMostWatchers = 8;

const DLPackExchangeApi* api = nullptr;
PyObject* types[kMostTypes];
PyObject* oddities[kMostOddities];
Py_ssize_t number_of_types = 0, number_of_oddities = 0;
PyObject* raise_versions = nullptr;
PyObject* watchers[kMostWatchers];
Py_ssize_t number_of_watchers = 0;

// Copies a tuple's items, which then live as long as the process.
bool keep(PyObject* tuple, PyObject** items, Py_ssize_t most, Py_ssize_t* number) {
  const Py_ssize_t count = PyTuple_Check(tuple) ? PyTuple_GET_SIZE(tuple) : most + 1;
  if (count > most) {
    PyErr_SetString(PyExc_ValueError, "watch_tensors: expected short tuples");
    return false;
  }
  for (Py_ssize_t i = 0; i < count; ++i) Py_INCREF(items[i] = PyTuple_GET_ITEM(tuple, i));
  *number = count;
  return true;
}

PyObject* watch_tensors(PyObject*, PyObject* const* arguments, Py_ssize_t count) {
  if (count != 5) {
    PyErr_SetString(PyExc_TypeError,
                    "watch_tensors: expected exchange, types, oddities, written, watchers");
    return nullptr;
  }
  const auto* exchange = static_cast<const DLPackExchangeApi*>(
      PyCapsule_GetPointer(arguments[0], "dlpack_exchange_api"));
  if (exchange == nullptr) return nullptr;
  if (exchange->major != kMajor || exchange->look_into == nullptr) {
    PyErr_SetString(PyExc_ValueError,
                    "watch_tensors: exchange: expected DLPack 1, with non-owning "
                    "access to tensors");
    return nullptr;
  }
  if (!keep(arguments[1], types, kMostTypes, &number_of_types) ||
      !keep(arguments[2], oddities, kMostOddities, &number_of_oddities) ||
      !keep(arguments[4], watchers, kMostWatchers, &number_of_watchers)) {
    return nullptr;
  }
  Py_INCREF(raise_versions = arguments[3]);
  api = exchange;
  Py_RETURN_NONE;
}

bool is_watched(PyObject* object) {
  for (Py_ssize_t i = 0; i < number_of_types; ++i) {
    if (reinterpret_cast<PyObject*>(Py_TYPE(object)) == types[i]) return true;
  }
  return false;
}

// 1 for a tensor that one of the functions is true of, 0 for others, -1 with an exception.
int is_odd(PyObject* tensor) {
  for (Py_ssize_t i = 0; i < number_of_oddities; ++i) {
    PyObject* const answer = PyObject_Vectorcall(oddities[i], &tensor, 1, nullptr);
    if (answer == nullptr) return -1;
    const int odd = PyObject_IsTrue(answer);
    Py_DECREF(answer);
    if (odd != 0) return odd;
  }
  return 0;
}

struct Head {
  int16_t ndim;  // -1 for None
  int16_t device_type;
  int32_t device_id;
  uint8_t code, bits;
  uint16_t lanes;
  int32_t unused;
};
constexpr size_t kMostBytes = kMostTensors * (sizeof(Head) + 2 * kMostDimensions * sizeof(int64_t));

// Gives the number of bytes, -1 where a tensor has no facts, -2 with an exception set.
Py_ssize_t write_facts(PyObject* const* tensors, Py_ssize_t count, char* facts) {
  char* end = facts;
  if (api == nullptr || count > kMostTensors) return -1;
  for (Py_ssize_t i = 0; i < count; ++i) {
    Head head{-1, 0, 0, 0, 0, 0, 0};
    if (tensors[i] == Py_None) {
      std::memcpy(end, &head, sizeof head);
      end += sizeof head;
      continue;
    }
    if (!is_watched(tensors[i])) return -1;
    DLTensor tensor;
    // Fails for what has no memory: sparse tensors, wrappers, those on the meta device.
    if (api->look_into(tensors[i], &tensor) != 0) {
      PyErr_Clear();
      return -1;
    }
    // Zero tensors and those without elements.
    if (tensor.data == nullptr || tensor.ndim > kMostDimensions) return -1;
    head.ndim = static_cast<int16_t>(tensor.ndim);
    head.device_type = static_cast<int16_t>(tensor.device_type);
    head.device_id = tensor.device_id;
    head.code = tensor.code;
    head.bits = tensor.bits;
    head.lanes = tensor.lanes;
    std::memcpy(end, &head, sizeof head);
    end += sizeof head;
    const size_t bytes = tensor.ndim * sizeof(int64_t);
    std::memcpy(end, tensor.shape, bytes);
    std::memcpy(end + bytes, tensor.strides, bytes);
    end += 2 * bytes;
    // Last: Python may run in it, and change the tensor that sizes and strides belong to.
    const int odd = is_odd(tensors[i]);
    if (odd != 0) return odd < 0 ? -2 : -1;
  }
  return end - facts;
}

PyObject* tensor_facts(PyObject*, PyObject* const* tensors, Py_ssize_t count) {
  char facts[kMostBytes];
  const Py_ssize_t bytes = write_facts(tensors, count, facts);
  if (bytes == -2) return nullptr;
  if (bytes < 0) Py_RETURN_NONE;
  return PyBytes_FromStringAndSize(facts, bytes);
}

PyObject* unwatched_facts(PyObject* self, PyObject* const* tensors, Py_ssize_t count) {
  const int watches = is_anyone_watching();
  if (watches < 0) return nullptr;
  if (watches) Py_RETURN_NONE;
  return tensor_facts(self, tensors, count);
}

// A counter that torch adds one to costs as much as a small layer.
PyObject* add_one(PyObject*, PyObject* counter) {
  DLTensor tensor;
  if (api == nullptr || !is_watched(counter)) Py_RETURN_FALSE;
  if (api->look_into(counter, &tensor) != 0) {
    PyErr_Clear();
    Py_RETURN_FALSE;
  }
  const bool is_number = tensor.code == kInteger && tensor.bits == 64 && tensor.lanes == 1 &&
                         tensor.ndim == 0 && tensor.byte_offset == 0;
  if (tensor.device_type != kCpu || !is_number || tensor.data == nullptr) Py_RETURN_FALSE;
  ++*static_cast<int64_t*>(tensor.data);
  Py_RETURN_TRUE;
}

PyMethodDef methods[] = {
    {"watch_tensors", reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(watch_tensors)),
     METH_FASTCALL, "What tensors are asked by: an exchange API, types, functions."},
    {"tensor_facts", reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(tensor_facts)),
     METH_FASTCALL, "What decides which kernel runs on tensors, as bytes, or None."},
    {"unwatched_facts",
     reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(unwatched_facts)), METH_FASTCALL,
     "tensor_facts, or None where a watcher is true."},
    {"add_one", add_one, METH_O, "Adds 1 to an int64 without axes on the CPU; False for others."},
    {nullptr, nullptr, 0, nullptr}};

}  // namespace

int is_anyone_watching() {
  for (Py_ssize_t i = 0; i < number_of_watchers; ++i) {
    PyObject* const answer = PyObject_CallNoArgs(watchers[i]);
    if (answer == nullptr) return -1;
    const int watches = PyObject_IsTrue(answer);
    Py_DECREF(answer);
    if (watches != 0) return watches;
  }
  return 0;
}

int have_facts(PyObject* const* tensors, Py_ssize_t count, PyObject* facts) {
  char now[kMostBytes];
  const Py_ssize_t bytes = write_facts(tensors, count, now);
  if (bytes == -2) return -1;
  if (bytes < 0 || bytes != PyBytes_GET_SIZE(facts)) return 0;
  return std::memcmp(now, PyBytes_AS_STRING(facts), static_cast<size_t>(bytes)) == 0;
}

PyObject* facts_of(PyObject* tensor) { return tensor_facts(nullptr, &tensor, 1); }

int64_t numel_of(PyObject* tensor) {
  DLTensor found;
  if (api == nullptr || api->look_into(tensor, &found) != 0) return 0;
  int64_t count = 1;
  for (int i = 0; i < found.ndim; ++i) count *= found.shape[i];
  return count;
}

bool tensor_address(PyObject* tensor, void** address) {
  DLTensor found;
  if (api == nullptr || !is_watched(tensor)) {
    PyErr_SetString(PyExc_TypeError, "tensor_address: expected a tensor with memory of its own");
    return false;
  }
  if (api->look_into(tensor, &found) != 0) return false;
  *address = static_cast<char*>(found.data) + found.byte_offset;
  return true;
}

bool tell_versions(PyObject* tensors) {
  PyObject* const result = PyObject_CallOneArg(raise_versions, tensors);
  Py_XDECREF(result);
  return result != nullptr;
}

bool add_tensor_facts(PyObject* module) { return PyModule_AddFunctions(module, methods) == 0; }

}  // namespace gdfast
