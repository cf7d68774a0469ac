// The Python module gdfast._cuda, or gdfast._cuda_simulated: pointers, sizes and a stream in,
// nothing of torch. Importing it needs no driver.
#include "bindings.h"

#include <pybind11/pybind11.h>

#include <string>
#include <vector>

#include "../sgd_arguments.h"
#include "../sgd_launch.h"
#include "kernels.h"

namespace py = pybind11;

namespace gdfast {
namespace {

template <typename T>
const T* pointer(uintptr_t address) {
  return reinterpret_cast<const T*>(address);
}

struct Update {
  const std::string& dtype;
  const std::vector<SgdTensor>& tensors;
};

std::string told(const Update& update) {
  int64_t elements = 0;
  for (const SgdTensor& tensor : update.tensors) elements += tensor.numel;
  return update.dtype + ", " + std::to_string(update.tensors.size()) + " params of " +
         std::to_string(elements) + " elements in all";
}

bool sgd(const py::list& params, const py::list& grads, const py::list& momenta,
         const py::list& masters, const py::list& numels, const std::string& dtype, double lr,
         double momentum, double dampening, double weight_decay, bool nesterov, bool maximize,
         bool first_step, bool zero_grad, uintptr_t lr_address, uintptr_t grad_scale,
         uintptr_t found_inf, int device, uintptr_t stream) {
  const auto [type, element_size] = sgd_dtype(dtype);
  const SgdHyper hyper{type,     lr,       momentum,   dampening, weight_decay,    1.0,
                       nesterov, maximize, first_step, zero_grad, !masters.empty()};
  const std::vector<SgdTensor> tensors =
      sgd_tensors(params, grads, momenta, masters, numels, hyper);
  if (!sgd_disjoint(tensors, element_size)) return false;
  const cuda::SgdScalars scalars{pointer<double>(lr_address), pointer<float>(grad_scale),
                                 pointer<float>(found_inf)};
  cuda::launching(Update{dtype, tensors}, [&] {
    cuda::sgd(tensors.data(), static_cast<int64_t>(tensors.size()), hyper, scalars, device, stream);
  });
  return true;
}

}  // namespace
}  // namespace gdfast

PYBIND11_MODULE(GDFAST_CUDA_MODULE, m) {
  m.doc() = "gdfast's CUDA kernels. They take raw pointers: call them through gdfast.ops.";
  gdfast::cuda::bind_conv2d(m);
  gdfast::cuda::bind_batch_norm(m);
  gdfast::cuda::bind_depthwise(m);
  gdfast::cuda::bind_max_pool2d(m);
  gdfast::cuda::bind_grouped(m);
  gdfast::cuda::bind_hopper_float32(m);
  gdfast::cuda::bind_launches(m);
  gdfast::cuda::bind_linear(m);
  gdfast::cuda::bind_stem(m);
  gdfast::cuda::bind_transpose(m);
  m.def("why_not_device", &gdfast::cuda::why_not_device, py::arg("device"),
        "Why the kernels do not run on a device, or an empty string.");
  m.def("sgd", &gdfast::sgd, py::arg("params"), py::arg("grads"), py::arg("momenta"),
        py::arg("masters"), py::arg("numels"), py::arg("dtype"), py::arg("lr"), py::arg("momentum"),
        py::arg("dampening"), py::arg("weight_decay"), py::arg("nesterov"), py::arg("maximize"),
        py::arg("first_step"), py::arg("zero_grad"), py::arg("lr_address"), py::arg("grad_scale"),
        py::arg("found_inf"), py::arg("device"), py::arg("stream"),
        "Updates all params in one pass. They, grads, momenta (none where momentum is 0) and "
        "masters (none but for half types: then they and momenta are float32) are lists of "
        "addresses on the device; lr_address (float64, instead of lr), grad_scale and "
        "found_inf (float32) addresses there, 0 for none. False, with nothing done, where two "
        "params share memory.");
  m.def(
      "sgd_launch",
      [] {
        PyObject* const capsule =
            gdfast::sgd_launch_capsule([](const gdfast::SgdTensor* tensors, int64_t count,
                                          const gdfast::SgdHyper& hyper, const gdfast::Call& call) {
              gdfast::cuda::sgd(tensors, count, hyper, {nullptr, nullptr, nullptr}, call.where,
                                call.stream);
            });
        if (capsule == nullptr) throw py::error_already_set();
        return py::reinterpret_steal<py::object>(capsule);
      },
      "The kernel for make_update of gdfast._cpu.");
}
