// Cross entropy of few classes. Compiled once: its time goes into exponentials, of which a small
// classifier has some hundreds.
#pragma once

#include <cstdint>

namespace gdfast::cpu {

// N rows of C logits, each `step` elements behind the one before, and the class of each row. Rows
// of class `ignored` count for nothing. Targets are (1 - smoothing) for the class plus smoothing /
// C for every class. The mean is over the rows that count, else the sum is taken.
struct CrossEntropyProblem {
  int64_t N, C, step;
  int64_t ignored;
  double smoothing;
  bool mean;
};

// The first row whose class is neither of 0 to C - 1 nor ignored; N where there is none.
int64_t first_wrong_class(const CrossEntropyProblem& problem, const int64_t* classes);

// Writes the loss; probabilities [N, C] too, unless null.
void cross_entropy(const CrossEntropyProblem& problem, const float* logits, const int64_t* classes,
                   float* loss, float* probabilities);

// grad_logits [N, C] for a gradient of the loss.
void cross_entropy_backward(const CrossEntropyProblem& problem, const float* grad_loss,
                            const float* probabilities, const int64_t* classes, float* grad_logits);

}  // namespace gdfast::cpu
