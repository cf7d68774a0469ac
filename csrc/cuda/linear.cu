// Both passes read every operand once but for the weight, or grad_output, which stay in caches:
//
//   forward: a block has one row of the input, whose threads divide its columns.
//   backward: a thread has a column of the input and of the weight, and goes through all rows. In
//     each it writes its element of grad_input, and adds to its column of grad_weight.
#include <string>

#include "linear.h"
#include "vectors.h"

namespace gdfast::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / kWarp;
constexpr int kLanes = 4;           // neighbours of a row that a thread reads at once, where it can
constexpr int kColumnThreads = 64;  // of a block of backward: as many blocks as may be
constexpr int kRows = 8;            // of which a thread's reads are under way together

template <typename T, int kCount>
GDFAST_DEVICE void load(const T* from, float (&values)[kCount]) {
  if constexpr (kCount == 1) {
    values[0] = to_float(*from);
  } else {
    unpack<T, kCount>(load_pack<kCount>(from), values);
  }
}

template <typename T, int kOutputs, int kCount>
GDFAST_KERNEL(kThreads, 2)
linear_kernel(int columns, int outputs, const T* input, const T* weight, const T* bias, T* output) {
  float* const parts = reinterpret_cast<float*>(shared_memory());
  const int64_t row = blockIdx.x;
  input += row * columns;
  float sums[kOutputs] = {};
  for (int column = static_cast<int>(threadIdx.x) * kCount; column < columns;
       column += kThreads * kCount) {
    float values[kCount];
    load(input + column, values);
#pragma unroll
    for (int k = 0; k < kOutputs; ++k) {
      if (k >= outputs) break;
      float factors[kCount];
      load(weight + int64_t{k} * columns + column, factors);
#pragma unroll
      for (int i = 0; i < kCount; ++i) sums[k] += values[i] * factors[i];
    }
  }
#pragma unroll
  for (int k = 0; k < kOutputs; ++k) {
#pragma unroll
    for (int lane = kWarp / 2; lane > 0; lane /= 2) sums[k] += shuffle_xor(sums[k], lane);
    if (warp_lane() == 0) parts[warp_index() * kOutputs + k] = sums[k];
  }
  sync_block();
  const auto k = static_cast<int>(threadIdx.x);
  if (k >= outputs) return;
  float sum = bias == nullptr ? 0.0F : to_float(bias[k]);
#pragma unroll
  for (int warp = 0; warp < kWarps; ++warp) sum += parts[warp * kOutputs + k];
  output[row * outputs + k] = from_float<T>(sum);
}

template <typename T, int kOutputs>
GDFAST_KERNEL(kColumnThreads, 4)
linear_backward_kernel(int rows, int columns, int outputs, const T* grad_output, const T* input,
                       const T* weight, T* grad_input, T* grad_weight, T* grad_bias) {
  // grad_output, with zeros for the outputs that there are not.
  float* const grads = reinterpret_cast<float*>(shared_memory());
  for (int i = static_cast<int>(threadIdx.x); i < rows * kOutputs; i += kColumnThreads) {
    const int k = i % kOutputs;
    grads[i] = k < outputs ? to_float(grad_output[i / kOutputs * outputs + k]) : 0.0F;
  }
  sync_block();
  const auto thread = static_cast<int>(threadIdx.x);
  if (grad_bias != nullptr && blockIdx.x == 0 && thread < outputs) {
    float sum = 0.0F;
    for (int row = 0; row < rows; ++row) sum += grads[row * kOutputs + thread];
    grad_bias[thread] = from_float<T>(sum);
  }
  const int column = static_cast<int>(blockIdx.x) * kColumnThreads + thread;
  if (column >= columns) return;
  float sums[kOutputs] = {}, factors[kOutputs] = {};
  if (grad_input != nullptr) {
#pragma unroll
    for (int k = 0; k < kOutputs; ++k) {
      if (k < outputs) factors[k] = to_float(weight[int64_t{k} * columns + column]);
    }
  }
  for (int first = 0; first < rows; first += kRows) {
    float values[kRows] = {};
    if (grad_weight != nullptr) {
#pragma unroll
      for (int i = 0; i < kRows; ++i) {
        if (first + i < rows) values[i] = to_float(input[int64_t{first + i} * columns + column]);
      }
    }
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
      if (first + i >= rows) break;
      const float* const of_row = grads + (first + i) * kOutputs;
      float product = 0.0F;
#pragma unroll
      for (int k = 0; k < kOutputs; ++k) {
        sums[k] += of_row[k] * values[i];
        product += of_row[k] * factors[k];
      }
      if (grad_input != nullptr) {
        grad_input[int64_t{first + i} * columns + column] = from_float<T>(product);
      }
    }
  }
  if (grad_weight == nullptr) return;
#pragma unroll
  for (int k = 0; k < kOutputs; ++k) {
    if (k < outputs) grad_weight[int64_t{k} * columns + column] = from_float<T>(sums[k]);
  }
}

struct Operands {
  const void *grad_output, *input, *weight, *bias;
  void *output, *grad_input, *grad_weight, *grad_bias;
};

template <typename T, int kOutputs>
void run_forward(const LinearProblem& p, const Operands& at, uintptr_t stream) {
  const auto kernel =
      p.C % kLanes == 0 ? linear_kernel<T, kOutputs, kLanes> : linear_kernel<T, kOutputs, 1>;
  launch("linear", kernel, dim3(static_cast<unsigned>(p.N)), kThreads,
         kWarps * kOutputs * sizeof(float), stream, static_cast<int>(p.C), static_cast<int>(p.K),
         static_cast<const T*>(at.input), static_cast<const T*>(at.weight),
         static_cast<const T*>(at.bias), static_cast<T*>(at.output));
}

template <typename T, int kOutputs>
void run_backward(const LinearProblem& p, const Operands& at, uintptr_t stream) {
  const auto blocks = static_cast<unsigned>((p.C - 1) / kColumnThreads + 1);
  launch("linear_backward", linear_backward_kernel<T, kOutputs>, dim3(blocks), kColumnThreads,
         p.N * kOutputs * sizeof(float), stream, static_cast<int>(p.N), static_cast<int>(p.C),
         static_cast<int>(p.K), static_cast<const T*>(at.grad_output),
         static_cast<const T*>(at.input), static_cast<const T*>(at.weight),
         static_cast<T*>(at.grad_input), static_cast<T*>(at.grad_weight),
         static_cast<T*>(at.grad_bias));
}

template <typename T, int kOutputs>
void run_either(bool backward, const LinearProblem& p, const Operands& at, uintptr_t stream) {
  backward ? run_backward<T, kOutputs>(p, at, stream) : run_forward<T, kOutputs>(p, at, stream);
}

template <typename T>
void run(bool backward, const LinearProblem& p, const Operands& at, uintptr_t stream) {
  if (p.K <= 4) return run_either<T, 4>(backward, p, at, stream);
  if (p.K <= 12) return run_either<T, 12>(backward, p, at, stream);
  run_either<T, kMostLinearOutputs>(backward, p, at, stream);
}

void run_any(bool backward, const LinearProblem& p, const Operands& at, const Where& where) {
  const char* const op = backward ? "linear_backward" : "linear";
  if (p.K > kMostLinearOutputs || p.C > INT32_MAX / 2 || p.N > INT32_MAX ||
      (backward && p.N > kMostLinearRows)) {
    throw std::runtime_error(std::string(op) + ": expected fewer rows, columns or outputs");
  }
  const DeviceGuard guard(op, where.device);
  switch (p.dtype) {
    case DType::kFloat32:
      return run<float>(backward, p, at, where.stream);
    case DType::kBFloat16:
      return run<BFloat16>(backward, p, at, where.stream);
    case DType::kFloat16:
      return run<Half>(backward, p, at, where.stream);
    case DType::kFloat64:
      break;
  }
  throw std::runtime_error(std::string(op) + ": expected float32 or a half type");
}

}  // namespace

void linear(const LinearProblem& problem, const void* input, const void* weight, const void* bias,
            void* output, const Where& where) {
  run_any(false, problem, {nullptr, input, weight, bias, output, nullptr, nullptr, nullptr}, where);
}

void linear_backward(const LinearProblem& problem, const void* grad_output, const void* input,
                     const void* weight, void* grad_input, void* grad_weight, void* grad_bias,
                     const Where& where) {
  run_any(true, problem,
          {grad_output, input, weight, nullptr, nullptr, grad_input, grad_weight, grad_bias},
          where);
}

}  // namespace gdfast::cuda
