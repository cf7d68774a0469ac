// Neighbouring elements that move in one access, and their values in the type that sums are taken
// in.
#pragma once

#include <cstring>
#include <type_traits>

#include "../conv2d_problem.h"
#include "device.h"

namespace gdfast::cuda {

template <typename T>
struct SumTraits {
  using type = float;
};
template <>
struct SumTraits<double> {
  using type = double;
};
// The type that values of T are summed in.
template <typename T>
using SumOf = typename SumTraits<T>::type;

// How many elements 16 bytes hold. float64 is there to be exact: it gets no vectors.
template <typename T>
constexpr int kWholeVector = sizeof(T) == 8 ? 1 : 16 / static_cast<int>(sizeof(T));

// What one access of so many bytes moves.
template <int kBytes>
struct PackTraits {
  struct __attribute__((may_alias, aligned(kBytes))) type {
    uint32_t words[kBytes / 4];
  };
};
template <>
struct PackTraits<16> {
  using type = Pack16;
};
template <>
struct PackTraits<2> {
  struct __attribute__((may_alias)) type {
    uint16_t words[1];
  };
};
template <>
struct PackTraits<1> {
  struct __attribute__((may_alias)) type {
    uint8_t words[1];
  };
};
template <typename T, int kCount>
using PackOf = typename PackTraits<sizeof(T) * kCount>::type;

// kCount elements from an address that their size divides.
template <int kCount, typename T>
GDFAST_DEVICE PackOf<T, kCount> load_pack(const T* from) {
  if constexpr (sizeof(T) * kCount == 16) {
    return load_16(from);
  } else {
    return *reinterpret_cast<const PackOf<T, kCount>*>(from);
  }
}

// What is read for the last time: it makes room in the caches first.
template <int kCount, typename T>
GDFAST_DEVICE PackOf<T, kCount> load_pack_streaming(const T* from) {
  if constexpr (sizeof(T) * kCount == 16) {
    return load_16_streaming(from);
  } else {
    return load_pack<kCount>(from);
  }
}

template <int kCount, typename T>
GDFAST_DEVICE void store_pack(T* to, const PackOf<T, kCount>& pack) {
  if constexpr (sizeof(T) * kCount == 16) {
    store_16(to, pack);
  } else if constexpr (sizeof(T) * kCount == 8) {
    // As one number: the compiler does not always join stores of words.
    using Word = uint64_t __attribute__((may_alias));
    *reinterpret_cast<Word*>(to) = pack.words[0] | static_cast<uint64_t>(pack.words[1]) << 32;
  } else {
    *reinterpret_cast<PackOf<T, kCount>*>(to) = pack;
  }
}

template <typename T, int kCount>
GDFAST_DEVICE void unpack(const PackOf<T, kCount>& pack, SumOf<T> (&values)[kCount]) {
  if constexpr (std::is_same_v<T, BFloat16> && kCount % 2 == 0) {
    // The upper half of a float32's bits: an instruction for each.
#pragma unroll
    for (int i = 0; i < kCount; i += 2) {
      const uint32_t low = pack.words[i / 2] << 16, high = pack.words[i / 2] & 0xffff0000u;
      std::memcpy(&values[i], &low, sizeof low);
      std::memcpy(&values[i + 1], &high, sizeof high);
    }
    return;
  }
  T elements[kCount];
  std::memcpy(elements, &pack, sizeof elements);
#pragma unroll
  for (int i = 0; i < kCount; ++i) values[i] = to_float(elements[i]);
}

template <int kCount, typename T>
GDFAST_DEVICE void load_values(const T* from, SumOf<T> (&values)[kCount]) {
  unpack<T, kCount>(load_pack<kCount>(from), values);
}

template <int kCount, typename T>
GDFAST_DEVICE void store_values(T* to, const SumOf<T> (&values)[kCount]) {
  PackOf<T, kCount> pack;
  if constexpr (sizeof(T) == 2 && kCount % 2 == 0) {
#pragma unroll
    for (int i = 0; i < kCount; i += 2) {
      pack.words[i / 2] = pack_two<T>(values[i], values[i + 1]);
    }
  } else {
    T elements[kCount];
#pragma unroll
    for (int i = 0; i < kCount; ++i) elements[i] = from_float<T>(values[i]);
    std::memcpy(&pack, elements, sizeof pack);
  }
  store_pack<kCount>(to, pack);
}

template <int kValue>
using Constant = std::integral_constant<int, kValue>;

// Whether 16-byte accesses may begin at all of these addresses; null is no address.
template <typename... Pointers>
bool are_aligned(const Pointers*... pointers) {
  return ((reinterpret_cast<uintptr_t>(pointers) % 16 == 0) && ...);
}

// Calls f with a value of the element type that dtype names.
template <typename F>
void with_dtype(DType dtype, F&& f) {
  switch (dtype) {
    case DType::kFloat32:
      return f(float{});
    case DType::kFloat64:
      return f(double{});
    case DType::kBFloat16:
      return f(BFloat16{});
    case DType::kFloat16:
      return f(Half{});
  }
}

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

}  // namespace gdfast::cuda
