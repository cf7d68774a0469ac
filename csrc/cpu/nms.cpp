#include "nms.h"

#include <algorithm>
#include <cmath>
#include <vector>

namespace gdfast::cpu {
namespace {

struct Box {
  double left, top, right, bottom;

  double area() const { return std::max(right - left, 0.0) * std::max(bottom - top, 0.0); }
  bool is_finite() const {
    return std::isfinite(left) && std::isfinite(top) && std::isfinite(right) &&
           std::isfinite(bottom);
  }
};

double intersection(const Box& a, const Box& b) {
  const double width = std::min(a.right, b.right) - std::max(a.left, b.left);
  const double height = std::min(a.bottom, b.bottom) - std::max(a.top, b.top);
  return std::max(width, 0.0) * std::max(height, 0.0);
}

bool overlap(const Box& a, const Box& b, double threshold) {
  const double shared = intersection(a, b);
  const double both = a.area() + b.area() - shared;
  return both > 0 && shared / both > threshold;
}

}  // namespace

int64_t nms(const double* boxes, const double* scores, const int64_t* classes, int64_t M,
            double iou_threshold, int64_t max_detections, int64_t* kept) {
  const auto box = [boxes](int64_t i) {
    return Box{boxes[4 * i], boxes[4 * i + 1], boxes[4 * i + 2], boxes[4 * i + 3]};
  };
  std::vector<int64_t> order;
  order.reserve(M);
  for (int64_t i = 0; i < M; ++i) {
    if (box(i).is_finite() && !std::isnan(scores[i])) order.push_back(i);
  }
  // A total order, whatever the scores: no sort may then do as it likes.
  std::sort(order.begin(), order.end(), [scores](int64_t a, int64_t b) {
    return scores[a] != scores[b] ? scores[a] > scores[b] : a < b;
  });

  // Each box is compared with those that stay, so that max_detections bounds the time:
  // M * max_detections instead of M * M.
  int64_t count = 0;
  for (const int64_t i : order) {
    if (count == max_detections) break;
    const Box candidate = box(i);
    const bool suppressed = std::any_of(kept, kept + count, [&](int64_t k) {
      return classes[k] == classes[i] && overlap(box(k), candidate, iou_threshold);
    });
    if (!suppressed) kept[count++] = i;
  }
  return count;
}

}  // namespace gdfast::cpu
