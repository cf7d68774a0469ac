// Binds the kernel that changes layouts.
#include <pybind11/pybind11.h>

#include <string>

#include "../bindings.h"
#include "bindings.h"
#include "transpose.h"

namespace gdfast::cuda {

namespace py = pybind11;

namespace {

struct Matrices {
  int64_t count, rows, columns;
  int element_bytes;
};

std::string told(const Matrices& m) {
  return listed(m.count, m.rows, m.columns) + " of " + std::to_string(m.element_bytes) + " bytes";
}

}  // namespace

void bind_transpose(py::module_& m) {
  m.def(
      "transpose",
      [](uintptr_t from, uintptr_t to, int64_t count, int64_t rows, int64_t columns,
         int element_bytes, int device, uintptr_t stream) {
        launching(Matrices{count, rows, columns, element_bytes}, [&] {
          transpose(pointer(from), pointer(to), count, rows, columns, element_bytes,
                    {device, stream});
        });
      },
      py::arg("from"), py::arg("to"), py::arg("count"), py::arg("rows"), py::arg("columns"),
      py::arg("element_bytes"), py::arg("device"), py::arg("stream"),
      "Writes `count` dense matrices [rows, columns] from one address to another as [columns, "
      "rows].");
}

}  // namespace gdfast::cuda
