// The Python module gdfast._cpu: pointers, sizes and strides in, nothing of torch.
#include "bindings.h"

#include <pybind11/stl.h>

#include <string>
#include <vector>

#include "cpu/kernels.h"
#include "plan.h"
#include "recall.h"
#include "tensor_facts.h"
#include "update.h"

PYBIND11_MODULE(_cpu, m) {
  using namespace gdfast;

  m.doc() = "gdfast's CPU kernels. They take raw pointers: call them through gdfast.ops.";

  m.def(
      "isa", [] { return std::string(cpu::kernels().isa); },
      "Name of the instruction set in force.");
  m.def(
      "supported_isas",
      [] {
        const char* names[cpu::kMostIsas];
        const int count = cpu::supported_isas(names);
        return std::vector<std::string>(names, names + count);
      },
      "Names of the compiled instruction sets that this processor runs, lowest first.");
  m.def(
      "select_isa", [](const std::string& name) { return cpu::select_isa(name.c_str()); },
      pybind11::arg("name"),
      "Chooses an instruction set, or emulated_bf16 for tests; False where it cannot run here.");

  m.attr("why_no_cuda") = GDFAST_WHY_NO_CUDA;

  bind_batch_norm(m);
  bind_conv2d(m);
  bind_cross_entropy(m);
  bind_linear(m);
  bind_max_pool2d(m);
  bind_memory(m);
  bind_nms(m);
  bind_sgd(m);
  if (!add_tensor_facts(m.ptr()) || !add_plan(m.ptr()) || !add_recall(m.ptr()) ||
      !add_update(m.ptr()))
    throw pybind11::error_already_set();
}
