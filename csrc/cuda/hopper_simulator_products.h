// Products by a warpgroup without a GPU, for hopper_simulator.h: they are computed at the wait that
// covers them, from what shared memory holds then.
#pragma once

namespace gdfast::cuda {

namespace simulator {

// Where element (row, k) of a matrix lies, rows being those of the product for a and its columns
// for b. The swizzle is applied to the address itself, after all distances have been added.
template <bool kColumns>
size_t place(uint64_t descriptor, int row, int k) {
  const auto field = [descriptor](int bit) {
    return static_cast<size_t>(descriptor >> bit & 0x3fff) * 16;
  };
  const size_t start = field(0), next_64 = field(16), next_8 = field(32);
  const size_t r = static_cast<size_t>(row), i = static_cast<size_t>(k);
  if (kColumns) {
    return swizzled(start + r % 64 * 2 + r / 64 * next_64 + i % 8 * kBoxRow + i / 8 * next_8);
  }
  return swizzled(start + i * 2 + r % 8 * kBoxRow + r / 8 * next_8);
}

template <typename T>
float element_at(size_t offset) {
  uint16_t bits;
  std::memcpy(&bits, shared_memory() + offset, sizeof bits);
  return element(T{}, bits, 0);
}

// One thread's part of a product, with the rows of a that it has.
template <typename T, int kN, bool kColumnsB>
void multiply_rows(const Multiplication& product, const float (&a)[2][16], int lane) {
  for (int column = 0; column < kN / 4; ++column) {
    const int n = column / 2 * 8 + lane % 4 * 2 + column % 2;
    double sums[2] = {0, 0};
    for (int k = 0; k < 16; ++k) {
      const double b = element_at<T>(place<kColumnsB>(product.b, n, k));
      for (int i = 0; i < 2; ++i) sums[i] += a[i][k] * b;
    }
    for (int i = 0; i < 2; ++i) {
      float& d = product.d[column / 2 * 4 + 2 * i + column % 2];
      d = static_cast<float>(product.accumulate ? d + sums[i] : sums[i]);
    }
  }
}

template <typename T, int kN, bool kColumnsB, bool kColumnsA>
void multiply_part(const Multiplication& product, int thread) {
  const int warp = thread % kWarpgroup / kWarp, lane = thread % kWarp;
  float a[2][16];
  for (int k = 0; k < 16; ++k) {
    for (int i = 0; i < 2; ++i) {
      a[i][k] = element_at<T>(place<kColumnsA>(product.a, 16 * warp + lane / 4 + 8 * i, k));
    }
  }
  multiply_rows<T, kN, kColumnsB>(product, a, lane);
}

template <int kN, bool kColumnsB>
void multiply_fragments(const Multiplication& product, int thread) {
  const int lane = thread % kWarp;
  if (std::memcmp(product.fragment, product.fragments[lane % 4], sizeof(uint32_t[4])) != 0) {
    fail("warpgroup_multiply: a fragment was changed before its product was waited for");
  }
  float a[2][16];
  for (int t = 0; t < 4; ++t) {
    for (int i = 0; i < 4; ++i) {
      for (int half = 0; half < 2; ++half) {
        a[i % 2][2 * t + half + i / 2 * 8] = element(BFloat16{}, product.fragments[t][i], half);
      }
    }
  }
  multiply_rows<BFloat16, kN, kColumnsB>(product, a, lane);
}

inline void share_fragments(void* const* lanes) {
  for (int lane = 0; lane < kWarp; ++lane) {
    for (int t = 0; t < 4; ++t) {
      std::memcpy(static_cast<Multiplication*>(lanes[lane])->fragments[t],
                  static_cast<Multiplication*>(lanes[lane / 4 * 4 + t])->fragment,
                  sizeof(uint32_t[4]));
    }
  }
}

}  // namespace simulator

GDFAST_DEVICE uint64_t columns_matrix(const void* shared, int byte, int next) {
  const auto address =
      static_cast<uint64_t>(static_cast<const unsigned char*>(shared) - shared_memory() + byte);
  constexpr uint64_t kSwizzle128 = uint64_t{1} << 62;
  return kSwizzle128 | uint64_t{1024 / 16} << 32 | static_cast<uint64_t>(next / 16) << 16 |
         address / 16;
}

GDFAST_DEVICE uint64_t rows_matrix(const void* shared, int byte) {
  return columns_matrix(shared, byte, 0);
}

GDFAST_DEVICE void warpgroup_begin() {
  simulator::meet_warp("warpgroup_begin", nullptr, [](void* const*) {});
}

template <typename T, int kN, bool kColumnsB, bool kColumnsA = false>
GDFAST_DEVICE void warpgroup_multiply(float (&d)[kN / 2], uint64_t a, uint64_t b, bool accumulate) {
  simulator::UnderWay& now = simulator::under_way();
  now.products[threadIdx.x].push_back({d,
                                       a,
                                       b,
                                       accumulate,
                                       simulator::multiply_part<T, kN, kColumnsB, kColumnsA>,
                                       now.committed[threadIdx.x],
                                       nullptr,
                                       {}});
}

template <int kN, bool kColumnsB>
GDFAST_DEVICE void warpgroup_multiply(float (&d)[kN / 2], const uint32_t (&a)[4], uint64_t b,
                                      bool accumulate) {
  simulator::UnderWay& now = simulator::under_way();
  simulator::Multiplication product{
      d, 0, b, accumulate, simulator::multiply_fragments<kN, kColumnsB>, now.committed[threadIdx.x],
      a, {}};
  simulator::meet_warp("warpgroup_multiply", &product, simulator::share_fragments);
  now.products[threadIdx.x].push_back(product);
}

GDFAST_DEVICE void warpgroup_commit() { ++simulator::under_way().committed[threadIdx.x]; }

template <int kPending>
GDFAST_DEVICE void warpgroup_wait() {
  simulator::UnderWay& now = simulator::under_way();
  std::vector<simulator::Multiplication>& products = now.products[threadIdx.x];
  size_t done = 0;
  for (; done < products.size(); ++done) {
    if (products[done].group >= now.committed[threadIdx.x] - kPending) break;
    products[done].run(products[done], static_cast<int>(threadIdx.x));
  }
  products.erase(products.begin(), products.begin() + static_cast<std::ptrdiff_t>(done));
  simulator::meet_warp("warpgroup_wait", nullptr, [](void* const*) {});
}

template <int kCount>
GDFAST_DEVICE void warpgroup_take(float (&)[kCount]) {}
template <int kCount>
GDFAST_DEVICE void warpgroup_take(uint32_t (&)[kCount]) {}

}  // namespace gdfast::cuda
