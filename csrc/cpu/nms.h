// Non-maximum suppression. Compiled once: its time goes into comparisons, not into arithmetic.
#pragma once

#include <cstdint>

namespace gdfast::cpu {

// Of M boxes (left, top, right, bottom) writes the indices of those that stay to kept, best first,
// at most max_detections; returns how many. Boxes that are not finite and scores that are NaN go.
int64_t nms(const double* boxes, const double* scores, const int64_t* classes, int64_t M,
            double iou_threshold, int64_t max_detections, int64_t* kept);

}  // namespace gdfast::cpu
