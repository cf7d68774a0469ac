// Winograd's convolutions of bfloat16 and float16: by float32's kernels, some images at a time.
//
// What is read is widened, exactly, into memory that the caches hold; what comes out is rounded
// once, as the direct kernels' sums are. A copy costs little beside two or three multiplications
// out of four.
#pragma once

#include "convert.h"
#include "shares.h"

namespace gdfast::cpu {
namespace {

// Bytes of float32 that the images of a piece take, on both sides of the convolution: large pieces
// leave the caches, small ones transform the weights again and again.
constexpr int64_t kPieceBytes = 8 << 20;

// A tensor with its first axis first in `strides`.
struct Extent {
  int64_t sizes[4];
  Strides4 strides;

  static Extent of_input(const Conv2dProblem& p) { return {{p.N, p.C, p.H, p.W}, p.input}; }
  static Extent of_weight(const Conv2dProblem& p) {
    return {{p.K, p.C / p.groups, p.R, p.S}, p.weight};
  }
  static Extent of_output(const Conv2dProblem& p) { return {{p.N, p.K, p.P, p.Q}, p.output}; }

  int64_t elements() const { return sizes[0] * sizes[1] * sizes[2] * sizes[3]; }
  int64_t elements_each() const { return sizes[1] * sizes[2] * sizes[3]; }
  // Whether it has as many elements as the memory from the first to the last: then what lies there
  // may be converted as it is, in whatever order.
  bool is_dense() const {
    return elements() == 1 + (sizes[0] - 1) * strides.n + (sizes[1] - 1) * strides.c +
                             (sizes[2] - 1) * strides.h + (sizes[3] - 1) * strides.w;
  }
};

inline bool widened_fits(const Conv2dProblem& p) {
  return (p.dtype == DType::kBFloat16 || p.dtype == DType::kFloat16) &&
         p.algorithm == Algorithm::kWinograd && p.N > 0 && p.R == 3 && p.S == 3 &&
         p.stride_h == 1 && p.stride_w == 1 && p.dilation_h == 1 && p.dilation_w == 1 &&
         Extent::of_input(p).is_dense() && Extent::of_weight(p).is_dense() &&
         Extent::of_output(p).is_dense();
}

constexpr int64_t kTaskElements = 1 << 14;

template <typename T>
void widen_all(const void* from, int64_t count, float* to, int threads) {
  parallel_shares(ceil_div(count, kTaskElements), threads, [&](int64_t index, int) {
    const int64_t first = index * kTaskElements;
    widen_elements(static_cast<const T*>(from) + first, min_of(kTaskElements, count - first),
                   to + first);
  });
}

template <typename T>
void narrow_all(const float* from, int64_t count, void* to, int threads) {
  parallel_shares(ceil_div(count, kTaskElements), threads, [&](int64_t index, int) {
    const int64_t first = index * kTaskElements;
    narrow_elements(from + first, min_of(kTaskElements, count - first),
                    static_cast<T*>(to) + first);
  });
}

// A problem of T that widened_fits, in float32, and memory for a piece of its images and weights.
template <typename T>
class Widened {
 public:
  Widened(const Conv2dProblem& p, int threads)
      : problem_(p),
        input_(Extent::of_input(p)),
        weight_(Extent::of_weight(p)),
        output_(Extent::of_output(p)),
        images_(images_at_once()),
        threads_(threads),
        memory_(carve(Carver())) {
    carve(Carver(memory_.data()));
    problem_.dtype = DType::kFloat32;
  }

  // run(problem, input, weight, bias, output, threads)
  template <typename Run>
  void forward(const void* input, const void* weight, const void* bias, void* output,
               const Run& run) {
    widen_all<T>(weight, weight_.elements(), weights_, threads_);
    if (bias != nullptr) widen_all<T>(bias, problem_.K, biases_, threads_);
    for_each_piece([&](int64_t first) {
      widen_piece(input, input_, first, inputs_);
      run(problem_, inputs_, weights_, bias == nullptr ? nullptr : biases_, outputs_, threads_);
      narrow_piece(outputs_, output_, first, output);
    });
  }

  // run(problem, grad_output, weight, grad_input, threads)
  template <typename Run>
  void grad_input(const void* grad_output, const void* weight, void* grad_input, const Run& run) {
    widen_all<T>(weight, weight_.elements(), weights_, threads_);
    for_each_piece([&](int64_t first) {
      widen_piece(grad_output, output_, first, outputs_);
      run(problem_, outputs_, weights_, inputs_, threads_);
      narrow_piece(inputs_, input_, first, grad_input);
    });
  }

  // run(problem, grad_output, input, grad_weight, grad_bias, threads); grad_bias may be null.
  template <typename Run>
  void grad_weight(const void* grad_output, const void* input, void* grad_weight, void* grad_bias,
                   const Run& run) {
    const int64_t weights = weight_.elements(), biases = grad_bias == nullptr ? 0 : problem_.K;
    for_each_piece([&](int64_t first) {
      widen_piece(grad_output, output_, first, outputs_);
      widen_piece(input, input_, first, inputs_);
      float* const sums = first == 0 ? weights_ : more_weights_;
      float* const bias_sums = first == 0 ? biases_ : more_biases_;
      run(problem_, outputs_, inputs_, sums, biases > 0 ? bias_sums : nullptr, threads_);
      if (first == 0) return;
      for (int64_t x = 0; x < weights; ++x) weights_[x] += sums[x];
      for (int64_t k = 0; k < biases; ++k) biases_[k] += bias_sums[k];
    });
    narrow_all<T>(weights_, weights, grad_weight, threads_);
    narrow_all<T>(biases_, biases, grad_bias, threads_);
  }

 private:
  // All, unless those of both sides lie one after another.
  int64_t images_at_once() const {
    const int64_t N = problem_.N, input = input_.elements_each(), output = output_.elements_each();
    if (N == 1 || input_.strides.n != input || output_.strides.n != output) return N;
    const int64_t bytes = (input + output) * static_cast<int64_t>(sizeof(float));
    const int64_t most = max_of(1, min_of(kPieceBytes / bytes, N));
    return ceil_div(N, ceil_div(N, most));
  }

  int64_t carve(Carver carver) {
    inputs_ = carver.take<float>(images_ * input_.elements_each());
    outputs_ = carver.take<float>(images_ * output_.elements_each());
    weights_ = carver.take<float>(weight_.elements());
    biases_ = carver.take<float>(problem_.K);
    const bool pieces = images_ < problem_.N;
    more_weights_ = carver.take<float>(pieces ? weight_.elements() : 0);
    more_biases_ = carver.take<float>(pieces ? problem_.K : 0);
    return carver.used();
  }

  template <typename Use>
  void for_each_piece(const Use& use) {
    const int64_t N = input_.sizes[0];
    for (int64_t first = 0; first < N; first += images_) {
      problem_.N = min_of(images_, N - first);
      use(first);
    }
  }

  // The piece of problem_.N images from `first` on; one alone fills the memory it lies in too.
  void widen_piece(const void* from, const Extent& of, int64_t first, float* to) const {
    const T* const piece = static_cast<const T*>(from) + first * of.strides.n;
    widen_all<T>(piece, problem_.N * of.elements_each(), to, threads_);
  }
  void narrow_piece(const float* from, const Extent& of, int64_t first, void* to) const {
    T* const piece = static_cast<T*>(to) + first * of.strides.n;
    narrow_all<T>(from, problem_.N * of.elements_each(), piece, threads_);
  }

  Conv2dProblem problem_;
  const Extent input_, weight_, output_;
  const int64_t images_;
  const int threads_;
  float *inputs_, *outputs_, *weights_, *biases_, *more_weights_, *more_biases_;
  const Workspace memory_;
};

// Calls use(Widened of p) where that fits; gives whether it does.
template <typename Use>
bool with_widened(const Conv2dProblem& p, int threads, const Use& use) {
  if (!widened_fits(p)) return false;
  if (p.dtype == DType::kBFloat16) {
    use(Widened<BFloat16>(p, threads));
  } else {
    use(Widened<Float16>(p, threads));
  }
  return true;
}

}  // namespace
}  // namespace gdfast::cpu
