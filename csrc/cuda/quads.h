// What four lanes side by side, which share rows of a matrix instruction's result, do together.
#pragma once

#include "device.h"

namespace gdfast::cuda {

// Each lane has a word for each of the four: these go to whom they are for.
GDFAST_DEVICE void exchange_in_quad(uint32_t (&words)[4]) {
#pragma unroll
  for (int distance = 1; distance <= 2; distance *= 2) {
    const bool upper = (warp_lane() & distance) != 0;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if ((i & distance) != 0) continue;
      uint32_t &low = words[i], &high = words[i + distance];
      const auto sent = static_cast<int>(upper ? low : high);
      const auto received = static_cast<uint32_t>(shuffle_xor(sent, distance));
      (upper ? low : high) = received;
    }
  }
}

}  // namespace gdfast::cuda
