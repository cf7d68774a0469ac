// output = input weight^T + bias, and all gradients of it in one pass, for few outputs or few rows:
// matrices so narrow that a general product spends its time on packing them.
//
// Forward: vectors run along the rows that are multiplied, a stretch of columns at a time, so that
// the weight's part stays in the first-level cache while the input streams by.
// Backward: both gradients are sums of whole rows, each times a number of grad_output. A task has
// some columns of all of them, which it reads and writes once.
// Threads divide the columns between them in both, and need none of each other's: sums of a few
// numbers alone go from one core to another.
#include <type_traits>

#include "../linear_problem.h"
#include "kernels.h"
#include "lane_sums.h"
#include "numeric.h"
#include "scratch_places.h"
#include "shares.h"
#include "simd.h"

namespace gdfast::cpu::GDFAST_ISA {
namespace {

constexpr int64_t kForwardColumns = 256;
constexpr int64_t kForwardRows = 16;  // of a task
constexpr int64_t kForwardParts = 4;  // of the columns, each with sums of its own
constexpr int64_t kBackwardColumns = 64;
constexpr int64_t kStreamSize = 256 * 1024;  // elements

// A tile of sums: rows times vectors of columns in backward, rows times outputs in forward. Outputs
// are often 10: two tiles of 5.
constexpr int kTileRows = 5;
constexpr int kTileColumns = kVectorRegisters == 32 ? 4 : 2;

// Calls f with the constant `count`, which is at most kMost.
template <int kMost, typename F>
GDFAST_INLINE void with_count(int64_t count, F&& f) {
  if constexpr (kMost > 1) {
    if (count < kMost) return with_count<kMost - 1>(count, f);
  }
  f(std::integral_constant<int, kMost>{});
}

// Calls f with the first of some rows and the constant number of them, tile by tile: of equal size,
// because a tile of one row makes poor use of the registers.
template <typename F>
GDFAST_INLINE void for_tiles(int64_t begin, int64_t end, F&& f) {
  const int64_t tiles = ceil_div(end - begin, kTileRows);
  for (int64_t tile = 0; tile < tiles; ++tile) {
    const int64_t from = begin + tile * (end - begin) / tiles;
    const int64_t to = begin + (tile + 1) * (end - begin) / tiles;
    with_count<kTileRows>(to - from, [&](auto rows) { f(from, rows); });
  }
}

// Elements [0, columns) of two rows each, multiplied and added up lane by lane.
template <int kRows, int kOutputs, typename T>
GDFAST_INLINE void add_products(const T* input, int64_t input_step, const T* weight,
                                int64_t weight_step, int64_t columns, Vec<T>* sums,
                                int64_t sums_step) {
  Vec<T> sum[kRows][kOutputs];
#pragma GCC unroll 8
  for (int i = 0; i < kRows; ++i) {
#pragma GCC unroll 8
    for (int k = 0; k < kOutputs; ++k) sum[i][k] = sums[i * sums_step + k];
  }
  const auto add = [&](auto&& read) __attribute__((always_inline)) {
    Vec<T> right[kOutputs];
#pragma GCC unroll 8
    for (int k = 0; k < kOutputs; ++k) right[k] = read(weight + k * weight_step);
#pragma GCC unroll 8
    for (int i = 0; i < kRows; ++i) {
      const Vec<T> left = read(input + i * input_step);
#pragma GCC unroll 8
      for (int k = 0; k < kOutputs; ++k) sum[i][k] += left * right[k];
    }
  };
  int64_t c = 0;
  for (; c + kLanes<T> <= columns; c += kLanes<T>) {
    add([&](const T* row) __attribute__((always_inline)) { return load(row + c); });
  }
  if (c < columns) {
    add([&](const T* row) __attribute__((always_inline)) {
      T lanes[kLanes<T>] = {};
      std::memcpy(lanes, row + c, (columns - c) * sizeof(T));
      return load(lanes);
    });
  }
#pragma GCC unroll 8
  for (int i = 0; i < kRows; ++i) {
#pragma GCC unroll 8
    for (int k = 0; k < kOutputs; ++k) sums[i * sums_step + k] = sum[i][k];
  }
}

template <typename T>
struct Lines {
  const T* at;
  int64_t step, count;
};

template <typename T>
void run_forward(const LinearProblem& p, const T* input, const T* weight, const T* bias, T* output,
                 int threads) {
  const Lines<T> inputs{input, p.input_step, p.N}, weights{weight, p.C, p.K};
  // The many are read once, the few stay in a cache; rows of many weights as they lie in memory.
  const bool few_inputs = p.N < p.K && p.K > kForwardRows;
  const Lines<T> many = few_inputs ? weights : inputs, few = few_inputs ? inputs : weights;
  const int64_t parts = !few_inputs && p.C >= kForwardParts * kForwardColumns ? kForwardParts : 1;
  const int64_t stretch = few_inputs ? p.C : kForwardColumns;
  const int64_t blocks = ceil_div(many.count, kForwardRows), size = p.N * p.K;
  T* totals;  // [parts][many][few]
  const ThreadScratch memory(
      threads,
      [&](Carver& carver) {
        totals = carver.template take<T>(parts * size);
        end_shared(carver);
      },
      [&](Carver& carver) {
        carver.template take<Vec<T>>(kForwardRows * few.count);
        end_own(carver);
      });
  parallel_shares(parts * blocks, threads, [&](int64_t task, int thread) {
    const int64_t part = task / blocks, begin = task % blocks * kForwardRows;
    const int64_t end = min_of(many.count, begin + kForwardRows);
    const int64_t last = column_begin(part + 1, parts, p.C);
    Carver own = memory.of(thread);
    auto* sums = own.template take<Vec<T>>(kForwardRows * few.count);
    std::memset(sums, 0, (end - begin) * few.count * sizeof(Vec<T>));
    for (int64_t c = column_begin(part, parts, p.C); c < last; c += stretch) {
      const int64_t columns = min_of(stretch, last - c);
      for_tiles(begin, end, [&](int64_t n, auto rows) {
        for (int64_t k = 0; k < few.count; k += kTileColumns) {
          with_count<kTileColumns>(few.count - k, [&](auto outputs) {
            add_products<rows, outputs>(many.at + n * many.step + c, many.step,
                                        few.at + k * few.step + c, few.step, columns,
                                        sums + (n - begin) * few.count + k, few.count);
          });
        }
      });
    }
    T* to = totals + (part * many.count + begin) * few.count;
    for (int64_t i = 0; i < (end - begin) * few.count; ++i) to[i] = sum_lanes<T>(sums[i]);
  });
  for (int64_t n = 0; n < p.N; ++n) {
    for (int64_t k = 0; k < p.K; ++k) {
      T total = bias == nullptr ? T(0) : bias[k];
      const T* from = totals + (few_inputs ? k * p.N + n : n * p.K + k);
      for (int64_t part = 0; part < parts; ++part) total += from[part * size];
      output[n * p.K + k] = total;
    }
  }
}

// Columns [0, width) of kRows sums: to[i] = sum over j of factors[i * factor_i + j * factor_j] *
// rows[j], each row `step` after the one before. width is at least kLanes; with `stream`, which
// writes past the caches, whole vectors of them lie at whole vectors.
template <int kRows, typename T>
GDFAST_INLINE void combine_rows(const T* factors, int64_t factor_i, int64_t factor_j, int64_t count,
                                const T* rows, int64_t step, T* to, int64_t to_step, int64_t width,
                                bool stream = false) {
  const auto block = [&](int64_t x, auto vectors) __attribute__((always_inline)) {
    constexpr int kVectors = vectors;
    Vec<T> sum[kRows][kVectors] = {};
    for (int64_t j = 0; j < count; ++j) {
      Vec<T> row[kVectors];
#pragma GCC unroll 8
      for (int v = 0; v < kVectors; ++v) row[v] = load(rows + j * step + x + v * kLanes<T>);
#pragma GCC unroll 8
      for (int i = 0; i < kRows; ++i) {
        const Vec<T> factor = broadcast(factors[i * factor_i + j * factor_j]);
#pragma GCC unroll 8
        for (int v = 0; v < kVectors; ++v) sum[i][v] += factor * row[v];
      }
    }
#pragma GCC unroll 8
    for (int i = 0; i < kRows; ++i) {
#pragma GCC unroll 8
      for (int v = 0; v < kVectors; ++v) {
        T* const at = to + i * to_step + x + v * kLanes<T>;
        stream ? store_streaming<T>(at, sum[i][v]) : store<T>(at, sum[i][v]);
      }
    }
  };
  constexpr int64_t kWide = kTileColumns * kLanes<T>;
  int64_t x = 0;
  for (; x + kWide <= width; x += kWide) block(x, std::integral_constant<int, kTileColumns>{});
  for (; x < width; x += kLanes<T>) {
    // The last vector ends at the last column, and computes some columns again.
    block(min_of(x, width - kLanes<T>), std::integral_constant<int, 1>{});
  }
}

// In double: a batch may have many rows, and they are all added up in one sum.
template <typename T>
void sum_rows(const LinearProblem& p, const T* rows, T* sums) {
  constexpr int64_t kAtOnce = 16;
  for (int64_t k0 = 0; k0 < p.K; k0 += kAtOnce) {
    const int64_t count = min_of(kAtOnce, p.K - k0);
    double totals[kAtOnce] = {};
    for (int64_t n = 0; n < p.N; ++n) {
      for (int64_t k = 0; k < count; ++k) totals[k] += rows[n * p.K + k0 + k];
    }
    for (int64_t k = 0; k < count; ++k) sums[k0 + k] = static_cast<T>(totals[k]);
  }
}

template <typename T>
void run_backward(const LinearProblem& p, const T* grad_output, const T* input, const T* weight,
                  T* grad_input, T* grad_weight, T* grad_bias, int threads) {
  const int64_t tasks = max_of(1, p.C / kBackwardColumns);
  // Many weights are driven out of the caches before the optimizer comes to read their gradient.
  const bool stream = kVectorBytes == 64 && p.K * p.C >= kStreamSize && p.C % kLanes<T> == 0 &&
                      reinterpret_cast<uintptr_t>(grad_weight) % kVectorBytes == 0;
  parallel_shares(tasks, threads, [&](int64_t task, int) {
    const int64_t c = column_begin(task, tasks, p.C);
    const int64_t width = column_begin(task + 1, tasks, p.C) - c;
    if (grad_weight != nullptr) {
      for_tiles(0, p.K, [&](int64_t k, auto rows) {
        combine_rows<rows>(grad_output + k, 1, p.K, p.N, input + c, p.input_step,
                           grad_weight + k * p.C + c, p.C, width, stream);
      });
      if (stream) stream_fence();
    }
    if (grad_input != nullptr) {
      for_tiles(0, p.N, [&](int64_t n, auto rows) {
        combine_rows<rows>(grad_output + n * p.K, p.K, 1, p.K, weight + c, p.C,
                           grad_input + n * p.C + c, p.C, width);
      });
    }
  });
  if (grad_bias != nullptr) sum_rows(p, grad_output, grad_bias);
}

template <typename F>
void with_type(DType dtype, F&& f) {
  if (dtype == DType::kFloat64) {
    f(double{});
  } else {
    f(float{});
  }
}

}  // namespace

void linear(const LinearProblem& problem, const void* input, const void* weight, const void* bias,
            void* output, int threads) {
  with_type(problem.dtype, [&](auto element) {
    using T = decltype(element);
    run_forward(problem, static_cast<const T*>(input), static_cast<const T*>(weight),
                static_cast<const T*>(bias), static_cast<T*>(output), threads);
  });
}

void linear_backward(const LinearProblem& problem, const void* grad_output, const void* input,
                     const void* weight, void* grad_input, void* grad_weight, void* grad_bias,
                     int threads) {
  with_type(problem.dtype, [&](auto element) {
    using T = decltype(element);
    run_backward(problem, static_cast<const T*>(grad_output), static_cast<const T*>(input),
                 static_cast<const T*>(weight), static_cast<T*>(grad_input),
                 static_cast<T*>(grad_weight), static_cast<T*>(grad_bias), threads);
  });
}

}  // namespace gdfast::cpu::GDFAST_ISA
