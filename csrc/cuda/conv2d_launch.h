// From dtypes, precisions and tiles to the instances of a kernel.
#pragma once

#include <type_traits>

#include "conv2d.h"
#include "conv2d_tile.h"

namespace gdfast::cuda {

using Block128x128 = BlockShape<128, 128, 2, 2, 4>;
using Block128x64 = BlockShape<128, 64, 2, 2, 4>;
using Block64x64 = BlockShape<64, 64, 2, 2, 4>;

template <typename MathType, bool kInChunks>
struct Instance {
  using Math = MathType;
  static constexpr bool kChunked = kInChunks;
};

// Calls launch(Instance) with the one that a problem runs on. Few instances, since each takes the
// compiler seconds: operands that are read one by one are bound by that, whatever the tile, and
// sums in the largest one leave no registers where each product takes three instructions.
template <typename Operands, typename Launch>
void with_tile(BlockTile tile, bool chunked, Launch&& launch) {
  if (!chunked) return launch(Instance<TensorCores<Operands, Block64x64>, false>{});
  if constexpr (Operands::kTerms == 1) {
    if (tile == BlockTile::k128x128) {
      return launch(Instance<TensorCores<Operands, Block128x128>, true>{});
    }
  }
  if (tile != BlockTile::k64x64) {
    return launch(Instance<TensorCores<Operands, Block128x64>, true>{});
  }
  launch(Instance<TensorCores<Operands, Block64x64>, true>{});
}

template <typename Launch>
void with_instance(DType dtype, const Conv2dWay& way, bool chunked, Launch&& launch) {
  switch (dtype) {
    case DType::kBFloat16:
      return with_tile<HalfOperands<BFloat16>>(way.tile, chunked, launch);
    case DType::kFloat16:
      return with_tile<HalfOperands<Half>>(way.tile, chunked, launch);
    case DType::kFloat64:
      return launch(Instance<Plain<double>, false>{});
    case DType::kFloat32:
      break;
  }
  switch (way.precision) {
    case Precision::kTf32:
      return with_tile<Tf32Operands>(way.tile, chunked, launch);
    case Precision::kTf32x3:
      return with_tile<Tf32x3Operands>(way.tile, chunked, launch);
    case Precision::kIeee:
      break;
  }
  launch(Instance<Plain<float>, false>{});
}

inline int64_t blocks_for(int64_t size, int64_t of_block) {
  return (size + of_block - 1) / of_block;
}

}  // namespace gdfast::cuda
