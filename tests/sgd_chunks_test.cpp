// Runs the CUDA kernel's blocks and threads one after the other on the CPU. tests/test_sgd_cuda.py
// compiles it with the sanitizers; it prints what differs and returns 1.
#include "../csrc/cuda/sgd_chunks.h"

#include <cstdio>
#include <random>
#include <vector>

using namespace gdfast;
using namespace gdfast::cuda;

namespace {

int failures = 0;

void expect(bool holds, const char* what) {
  if (!holds) {
    std::printf("FAILED: %s\n", what);
    ++failures;
  }
}

template <SgdMomentum kMomentum, SgdGrad kGrad, typename T>
void check_update(int offset) {
  // More tensors than one launch takes, around the sizes of a pack and of a chunk.
  std::vector<int64_t> sizes;
  for (int i = 0; i < kMaxTensors - 3; ++i) sizes.push_back(1 + i % 9);
  for (const int64_t size : {kChunk - 1, kChunk, kChunk + 1, 3 * kChunk + 5, int64_t{1}}) {
    sizes.push_back(size);
  }
  constexpr int kGuard = 8;
  std::mt19937 random(0);
  std::normal_distribution<double> normal;
  std::vector<std::vector<T>> memory;
  for (const int64_t size : sizes) {
    for (int role = 0; role < 3; ++role) {
      std::vector<T> values(size + 2 * kGuard);
      for (T& value : values) value = static_cast<T>(normal(random));
      memory.push_back(values);
    }
  }
  auto expected = memory;

  SgdHyper hyper{};
  hyper.lr = 0.1;
  hyper.momentum = 0.9;
  hyper.dampening = 0.25;
  hyper.weight_decay = 0.05;
  hyper.grad_scale = 4;
  hyper.maximize = true;
  const auto factors = sgd_factors<T>(hyper);
  std::vector<SgdTensor> tensors;
  for (size_t i = 0; i < sizes.size(); ++i) {
    T* const roles[3] = {memory[3 * i].data() + offset, memory[3 * i + 1].data() + offset,
                         memory[3 * i + 2].data() + offset};
    tensors.push_back({roles[0], roles[1], roles[2], sizes[i]});
    for (int64_t j = offset; j < offset + sizes[i]; ++j) {
      T unused = 0;
      sgd_update<kMomentum, kGrad>(
          factors, expected[3 * i][j], expected[3 * i + 1][j],
          kMomentum == SgdMomentum::kNone ? unused : expected[3 * i + 2][j]);
    }
  }

  SgdBatch batch;
  const int64_t count = static_cast<int64_t>(tensors.size());
  for (int64_t done = 0; done < count;) {
    done += sgd_fill(tensors.data() + done, count - done, batch);
    for (int64_t chunk = 0; chunk < batch.first_chunk[batch.count]; ++chunk) {
      for (int thread = 0; thread < kThreads; ++thread) {
        sgd_chunk<kMomentum, kGrad, T>(batch, chunk, factors, thread);
      }
    }
  }
  expect(memory == expected, "every element is updated once, and nothing around the tensors");

  for (int64_t done = 0; done < count;) {
    done += sgd_fill(tensors.data() + done, count - done, batch);
    for (int64_t chunk = 0; chunk < batch.first_chunk[batch.count]; ++chunk) {
      for (int thread = 0; thread < kThreads; ++thread) sgd_zero_chunk<T>(batch, chunk, thread);
    }
  }
  for (size_t i = 0; i < sizes.size(); ++i) {
    for (int64_t j = offset; j < offset + sizes[i]; ++j) expected[3 * i + 1][j] = 0;
  }
  expect(memory == expected, "a skipped step zeroes every gradient and nothing else");
}

template <typename T>
void check_kinds(int offset) {
  check_update<SgdMomentum::kNone, SgdGrad::kRead, T>(offset);
  check_update<SgdMomentum::kFirst, SgdGrad::kZero, T>(offset);
  check_update<SgdMomentum::kRunning, SgdGrad::kUnscale, T>(offset);
  check_update<SgdMomentum::kRunning, SgdGrad::kRead, T>(offset);
}

void check_large_tensors() {
  const int64_t huge = (int64_t{1} << 33) + 3;
  const SgdTensor tensors[] = {{nullptr, nullptr, nullptr, huge},
                               {nullptr, nullptr, nullptr, 1},
                               {nullptr, nullptr, nullptr, huge}};
  SgdBatch batch;
  expect(sgd_fill(tensors, 3, batch) == 3, "all three fit into a launch");
  const int64_t chunks = huge / kChunk + 1;
  expect(batch.first_chunk[3] == 2 * chunks + 1, "chunks are counted past 2^31 elements");
  expect(sgd_tensor_of(batch, chunks - 1) == 0, "the last chunk of the first tensor");
  expect(sgd_tensor_of(batch, chunks) == 1, "the only chunk of the second");
  expect(sgd_tensor_of(batch, chunks + 1) == 2, "the first chunk of the third");
  expect(sgd_tensor_of(batch, 2 * chunks) == 2, "its last");
}

}  // namespace

int main() {
  for (const int offset : {0, 1, 4}) {
    check_kinds<float>(offset);
    check_kinds<double>(offset);
  }
  check_large_tensors();
  return failures == 0 ? 0 : 1;
}
