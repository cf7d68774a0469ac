// hopper.h's product by a warpgroup for few columns:
//
//   warpgroup_multiply_32<kColumnsB>(d, a, b, accumulate)
//                              as warpgroup_multiply<32, kColumnsB>, of a in registers, in bfloat16
#pragma once

#include "hopper.h"

namespace gdfast::cuda {

template <bool kColumnsB>
GDFAST_DEVICE void warpgroup_multiply_32(float (&d)[16], const uint32_t (&a)[4], uint64_t b,
                                         bool accumulate) {
#if defined(__CUDACC__)
  asm volatile(
      "{ .reg .pred accumulate;\n"
      "setp.ne.b32 accumulate, %21, 0;\n"
      "wgmma.mma_async.sync.aligned.m64n32k16.f32.bf16.bf16"
      " {%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15}, "
      "{%16, %17, %18, %19}, %20, accumulate, 1, 1, %22; }"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]), "+f"(d[4]), "+f"(d[5]), "+f"(d[6]),
        "+f"(d[7]), "+f"(d[8]), "+f"(d[9]), "+f"(d[10]), "+f"(d[11]), "+f"(d[12]), "+f"(d[13]),
        "+f"(d[14]), "+f"(d[15])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(static_cast<int>(accumulate)),
        "n"(kColumnsB ? 1 : 0));
#else
  warpgroup_multiply<32, kColumnsB>(d, a, b, accumulate);
#endif
}

}  // namespace gdfast::cuda
