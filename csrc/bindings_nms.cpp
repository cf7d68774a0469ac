// Binds non-maximum suppression.
#include <pybind11/pybind11.h>

#include "bindings.h"
#include "cpu/nms.h"

namespace py = pybind11;

namespace gdfast {

void bind_nms(py::module_& m) {
  m.def(
      "nms",
      [](uintptr_t boxes, uintptr_t scores, uintptr_t classes, int64_t M, double iou_threshold,
         int64_t max_detections, uintptr_t kept) {
        if (M < 0 || max_detections < 0) {
          throw py::value_error("nms: M, max_detections: expected both >= 0");
        }
        py::gil_scoped_release release;
        return cpu::nms(pointer<const double>(boxes), pointer<const double>(scores),
                        pointer<const int64_t>(classes), M, iou_threshold, max_detections,
                        pointer<int64_t>(kept));
      },
      py::arg("boxes"), py::arg("scores"), py::arg("classes"), py::arg("M"),
      py::arg("iou_threshold"), py::arg("max_detections"), py::arg("kept"),
      "Writes the indices of the boxes that stay and returns their number; the arrays are "
      "addresses "
      "of float64, float64, int64 and int64.");
}

}  // namespace gdfast
