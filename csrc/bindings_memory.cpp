// Binds the memory pool: blocks as DLPack capsules, which any array library turns into its own.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstdlib>
#include <string>
#include <vector>

#include "bindings.h"
#include "cpu/memory_pool.h"

namespace py = pybind11;

namespace gdfast {
namespace {

// The interface of DLPack 0.8, https://dmlc.github.io/dlpack: structures and their meaning.
struct DLDataType {
  uint8_t code, bits;
  uint16_t lanes;
};
struct DLTensor {
  void* data;
  int32_t device_type, device_id;
  int32_t ndim;
  DLDataType dtype;
  int64_t* shape;
  int64_t* strides;
  uint64_t byte_offset;
};
struct DLManagedTensor {
  DLTensor tensor;
  void* context;
  void (*deleter)(DLManagedTensor*);
};
constexpr int32_t kCpu = 1;
constexpr uint8_t kFloat = 2, kBfloat = 4, kUInt = 1;
constexpr int kMostDimensions = 4;

struct Block {
  DLManagedTensor managed;
  int64_t shape[kMostDimensions], strides[kMostDimensions];
};

DLDataType dtype_named(const std::string& name) {
  if (name == "float32") return {kFloat, 32, 1};
  if (name == "float64") return {kFloat, 64, 1};
  if (name == "float16") return {kFloat, 16, 1};
  if (name == "bfloat16") return {kBfloat, 16, 1};
  if (name == "uint8") return {kUInt, 8, 1};
  throw py::value_error("take_memory: dtype: expected a float type or uint8, got " + name);
}

void destroy(DLManagedTensor* managed) {
  cpu::pool_give(managed->tensor.data);
  delete static_cast<Block*>(managed->context);
}

// Until a library renames the capsule, the memory is still its own to free.
void destroy_capsule(PyObject* capsule) {
  if (!PyCapsule_IsValid(capsule, "dltensor")) return;
  auto* managed = static_cast<DLManagedTensor*>(PyCapsule_GetPointer(capsule, "dltensor"));
  managed->deleter(managed);
}

py::object take_memory(const std::vector<int64_t>& shape, const std::vector<int64_t>& strides,
                       const std::string& dtype) {
  if (shape.size() != strides.size() || shape.size() > kMostDimensions) {
    throw py::value_error("take_memory: shape, strides: expected up to 4 numbers, as many of each");
  }
  const DLDataType type = dtype_named(dtype);
  int64_t elements = 1;
  for (size_t i = 0; i < shape.size(); ++i) {
    if (shape[i] < 1 || strides[i] < 0) {
      throw py::value_error("take_memory: expected sizes >= 1 and strides >= 0");
    }
    elements += (shape[i] - 1) * strides[i];
  }
  Block* block = new Block;
  try {
    block->managed.tensor.data = cpu::pool_take(elements * (type.bits / 8));
  } catch (...) {
    delete block;
    throw;
  }
  for (size_t i = 0; i < shape.size(); ++i) {
    block->shape[i] = shape[i];
    block->strides[i] = strides[i];
  }
  block->managed.tensor.device_type = kCpu;
  block->managed.tensor.device_id = 0;
  block->managed.tensor.ndim = static_cast<int32_t>(shape.size());
  block->managed.tensor.dtype = type;
  block->managed.tensor.shape = block->shape;
  block->managed.tensor.strides = block->strides;
  block->managed.tensor.byte_offset = 0;
  block->managed.context = block;
  block->managed.deleter = destroy;
  PyObject* capsule = PyCapsule_New(&block->managed, "dltensor", destroy_capsule);
  if (capsule == nullptr) {
    destroy(&block->managed);
    throw py::error_already_set();
  }
  return py::reinterpret_steal<py::object>(capsule);
}

}  // namespace

void bind_memory(py::module_& m) {
  m.def("take_memory", &take_memory, py::arg("shape"), py::arg("strides"), py::arg("dtype"),
        "Memory of the pool as a DLPack capsule; freed with the tensor that is made of it.");
  m.def(
      "memory_use",
      [] {
        const cpu::PoolUse use = cpu::pool_use();
        return py::make_tuple(use.taken, use.kept);
      },
      "Bytes of the pool that are in use, and bytes that wait for their next use.");
  m.def("release_memory", &cpu::pool_release,
        "Returns what waits for its next use to the operating system.");
}

}  // namespace gdfast
