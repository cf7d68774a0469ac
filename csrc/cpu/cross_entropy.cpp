#include "cross_entropy.h"

#include <algorithm>
#include <cmath>

namespace gdfast::cpu {
namespace {

// What a row's loss is multiplied with in the result.
double share(const CrossEntropyProblem& p, const int64_t* classes) {
  if (!p.mean) return 1.0;
  return 1.0 / static_cast<double>(p.N - std::count(classes, classes + p.N, p.ignored));
}

}  // namespace

int64_t first_wrong_class(const CrossEntropyProblem& p, const int64_t* classes) {
  const auto is_wrong = [&](int64_t k) { return k != p.ignored && (k < 0 || k >= p.C); };
  return std::find_if(classes, classes + p.N, is_wrong) - classes;
}

void cross_entropy(const CrossEntropyProblem& p, const float* logits, const int64_t* classes,
                   float* loss, float* probabilities) {
  double total = 0.0;
  for (int64_t n = 0; n < p.N; ++n, logits += p.step) {
    const float largest = *std::max_element(logits, logits + p.C);
    // A row that is ignored has a gradient of none, whatever its probabilities are.
    if (classes[n] == p.ignored) {
      if (probabilities != nullptr) std::fill_n(probabilities + n * p.C, p.C, 0.0f);
      continue;
    }
    double sum = 0.0, all = 0.0;
    for (int64_t c = 0; c < p.C; ++c) {
      const float exponential = std::exp(logits[c] - largest);
      sum += exponential;
      if (probabilities != nullptr) probabilities[n * p.C + c] = exponential;
    }
    if (probabilities != nullptr) {
      const auto scale = static_cast<float>(1.0 / sum);
      for (int64_t c = 0; c < p.C; ++c) probabilities[n * p.C + c] *= scale;
    }
    total += std::log(sum) - (1.0 - p.smoothing) * (double(logits[classes[n]]) - largest);
    if (p.smoothing != 0.0) {
      for (int64_t c = 0; c < p.C; ++c) all += double(logits[c]) - largest;
      total -= p.smoothing / static_cast<double>(p.C) * all;
    }
  }
  *loss = static_cast<float>(total * share(p, classes));
}

void cross_entropy_backward(const CrossEntropyProblem& p, const float* grad_loss,
                            const float* probabilities, const int64_t* classes,
                            float* grad_logits) {
  const auto scale = static_cast<float>(*grad_loss * share(p, classes));
  const auto low = static_cast<float>(p.smoothing / static_cast<double>(p.C));
  const auto high = static_cast<float>(1.0 - p.smoothing);
  for (int64_t n = 0; n < p.N; ++n, probabilities += p.C, grad_logits += p.C) {
    if (classes[n] == p.ignored) {
      std::fill_n(grad_logits, p.C, 0.0f);
      continue;
    }
    for (int64_t c = 0; c < p.C; ++c) grad_logits[c] = (probabilities[c] - low) * scale;
    grad_logits[classes[n]] = (probabilities[classes[n]] - low - high) * scale;
  }
}

}  // namespace gdfast::cpu
