// Runs the CUDA kernel's blocks and threads one after the other on the CPU. tests/test_sgd_cuda.py
// compiles it with the sanitizers; it prints what differs and returns 1.
#include "../csrc/cuda/sgd_chunks.h"

#include <cstdio>
#include <cstring>
#include <random>
#include <vector>

#include "../csrc/cpu/numeric.h"

using namespace gdfast;
using namespace gdfast::cuda;
using cpu::BFloat16;

template <>
struct gdfast::cuda::SgdElement<BFloat16> {
  using Math = float;
  GDFAST_SGD_FUNCTION float widen(BFloat16 value) { return cpu::widen(value); }
  GDFAST_SGD_FUNCTION BFloat16 narrow(float value) { return cpu::narrow<BFloat16>(value); }
};

namespace {

int failures = 0;

void expect(bool holds, const char* what) {
  if (!holds) {
    std::printf("FAILED: %s\n", what);
    ++failures;
  }
}

constexpr int kGuard = 8;

template <typename T>
std::vector<T> randoms(int64_t size) {
  static std::mt19937 random(0);
  std::normal_distribution<float> normal;
  std::vector<T> values(size + 2 * kGuard);
  for (T& value : values) {
    value = SgdElement<T>::narrow(static_cast<typename SgdElement<T>::Math>(normal(random)));
  }
  return values;
}

template <typename T>
bool same(const std::vector<T>& left, const std::vector<T>& right) {
  return std::memcmp(left.data(), right.data(), left.size() * sizeof(T)) == 0;
}

// A parameter with what belongs to it, each between guards; elements begin `offset` further on.
template <typename T, typename State>
struct Memory {
  std::vector<T> param, grad;
  std::vector<State> momentum, master;

  explicit Memory(int64_t size)
      : param(randoms<T>(size)),
        grad(randoms<T>(size)),
        momentum(randoms<State>(size)),
        master(randoms<State>(size)) {
    // Every third parameter is not what its master rounds to.
    for (size_t i = 0; i < param.size(); ++i) {
      const auto kept = SgdElement<State>::widen(master[i]);
      param[i] = SgdElement<T>::narrow(i % 3 == 0 ? kept + 8 : kept);
    }
  }

  bool operator==(const Memory& other) const {
    return same(param, other.param) && same(grad, other.grad) && same(momentum, other.momentum) &&
           same(master, other.master);
  }
};

// What one element becomes, written down without packs, chunks and templates for the storage.
template <SgdMomentum kMomentum, SgdGrad kGrad, bool kMaster, typename T, typename State,
          typename Math>
void update_one(const SgdFactors<Math>& factors, Memory<T, State>& memory, int64_t i) {
  Math param = SgdElement<T>::widen(memory.param[i]), grad = SgdElement<T>::widen(memory.grad[i]);
  Math momentum = SgdElement<State>::widen(memory.momentum[i]);
  if (kMaster && i % 3 != 0) param = SgdElement<State>::widen(memory.master[i]);
  sgd_update<kMomentum, kGrad>(factors, param, grad, momentum);
  memory.param[i] = SgdElement<T>::narrow(param);
  if (kMaster) memory.master[i] = SgdElement<State>::narrow(param);
  memory.grad[i] = SgdElement<T>::narrow(grad);
  if (kMomentum != SgdMomentum::kNone) {
    memory.momentum[i] = SgdElement<State>::narrow(momentum);
  }
}

template <SgdMomentum kMomentum, SgdGrad kGrad, bool kMaster, typename T>
void check_update(int offset) {
  using State = SgdState<T, kMaster>;
  // More tensors than one launch takes, around the sizes of a pack and of a chunk.
  std::vector<int64_t> sizes;
  for (int i = 0; i < kMaxTensors - 3; ++i) sizes.push_back(1 + i % 9);
  for (const int64_t size : {kChunk - 1, kChunk, kChunk + 1, 3 * kChunk + 5, int64_t{1}}) {
    sizes.push_back(size);
  }
  std::vector<Memory<T, State>> memory;
  for (const int64_t size : sizes) memory.emplace_back(size);
  auto expected = memory;

  SgdHyper hyper{};
  hyper.lr = 0.1;
  hyper.momentum = 0.9;
  hyper.dampening = 0.25;
  hyper.weight_decay = 0.05;
  hyper.grad_scale = 4;
  hyper.maximize = true;
  const auto factors = sgd_factors<typename SgdElement<T>::Math>(hyper);
  std::vector<SgdTensor> tensors;
  for (size_t i = 0; i < sizes.size(); ++i) {
    Memory<T, State>& of = memory[i];
    tensors.push_back({of.param.data() + offset, of.grad.data() + offset,
                       of.momentum.data() + offset, kMaster ? of.master.data() + offset : nullptr,
                       sizes[i]});
    for (int64_t j = offset; j < offset + sizes[i]; ++j) {
      update_one<kMomentum, kGrad, kMaster>(factors, expected[i], j);
    }
  }

  SgdBatch batch;
  const int64_t count = static_cast<int64_t>(tensors.size());
  for (int64_t done = 0; done < count;) {
    done += sgd_fill(tensors.data() + done, count - done, batch);
    for (int64_t chunk = 0; chunk < batch.first_chunk[batch.count]; ++chunk) {
      for (int thread = 0; thread < kThreads; ++thread) {
        sgd_chunk<kMomentum, kGrad, kMaster, T>(batch, chunk, factors, thread);
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
    for (int64_t j = offset; j < offset + sizes[i]; ++j) {
      expected[i].grad[j] = SgdElement<T>::narrow(0);
    }
  }
  expect(memory == expected, "a skipped step zeroes every gradient and nothing else");
}

template <bool kMaster, typename T>
void check_kinds(int offset) {
  check_update<SgdMomentum::kNone, SgdGrad::kRead, kMaster, T>(offset);
  check_update<SgdMomentum::kFirst, SgdGrad::kZero, kMaster, T>(offset);
  check_update<SgdMomentum::kRunning, SgdGrad::kUnscale, kMaster, T>(offset);
  check_update<SgdMomentum::kRunning, SgdGrad::kRead, kMaster, T>(offset);
}

void check_large_tensors() {
  const int64_t huge = (int64_t{1} << 33) + 3;
  const SgdTensor tensors[] = {{nullptr, nullptr, nullptr, nullptr, huge},
                               {nullptr, nullptr, nullptr, nullptr, 1},
                               {nullptr, nullptr, nullptr, nullptr, huge}};
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
    check_kinds<false, float>(offset);
    check_kinds<false, double>(offset);
    check_update<SgdMomentum::kRunning, SgdGrad::kUnscale, false, BFloat16>(offset);
    check_kinds<true, BFloat16>(offset);
  }
  check_large_tensors();
  return failures == 0 ? 0 : 1;
}
