// Picks the instruction set once, by what the processor and the operating system support.
#include <cstring>

#include "kernels.h"

namespace gdfast::cpu {
namespace {

#define GDFAST_TABLE(isa, others)              \
  {#isa,                                       \
   isa::conv2d,                                \
   isa::conv2d_grad_input,                     \
   isa::conv2d_grad_weight,                    \
   others::max_pool2d,                         \
   others::max_pool2d_grad,                    \
   others::conv2d_relu_max_pool2d,             \
   others::conv2d_relu_max_pool2d_grad_weight, \
   others::linear,                             \
   others::linear_backward,                    \
   others::sgd,                                \
   others::batch_norm,                         \
   others::batch_norm_backward,                \
   others::conv2d_norm_fits,                   \
   others::conv2d_norm,                        \
   others::conv2d_norm_backward,               \
   others::conv2d_adds}

constexpr KernelTable kTables[] = {
    GDFAST_TABLE(baseline, baseline),
#ifdef GDFAST_HAS_X86_KERNELS
    GDFAST_TABLE(avx2, avx2),
    GDFAST_TABLE(avx512, avx512),
#endif
#ifdef GDFAST_HAS_AVX512_BF16_KERNELS
    GDFAST_TABLE(avx512_bf16, avx512),
#endif
};
static_assert(sizeof(kTables) / sizeof(kTables[0]) <= kMostIsas);
constexpr KernelTable kEmulated = GDFAST_TABLE(emulated_bf16, baseline);

bool runs_here(const char* isa) {
#ifdef GDFAST_HAS_AVX512_BF16_KERNELS
  if (std::strcmp(isa, "avx512_bf16") == 0) {
    return __builtin_cpu_supports("avx512bf16") && runs_here("avx512");
  }
#endif
#ifdef GDFAST_HAS_X86_KERNELS
  if (std::strcmp(isa, "avx512") == 0) {
    return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") &&
           __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
  }
  if (std::strcmp(isa, "avx2") == 0) {
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
           __builtin_cpu_supports("f16c");
  }
#endif
  return std::strcmp(isa, "baseline") == 0;
}

const KernelTable* best() {
  const KernelTable* found = &kTables[0];
  for (const KernelTable& table : kTables) {
    if (runs_here(table.isa)) found = &table;
  }
  return found;
}

const KernelTable* in_force = best();

}  // namespace

const KernelTable& kernels() { return *in_force; }

int supported_isas(const char* names[kMostIsas]) {
  int count = 0;
  for (const KernelTable& table : kTables) {
    if (runs_here(table.isa)) names[count++] = table.isa;
  }
  return count;
}

bool select_isa(const char* name) {
  if (std::strcmp(name, kEmulated.isa) == 0) {
    in_force = &kEmulated;
    return true;
  }
  for (const KernelTable& table : kTables) {
    if (std::strcmp(table.isa, name) == 0 && runs_here(name)) {
      in_force = &table;
      return true;
    }
  }
  return false;
}

}  // namespace gdfast::cpu
