// Single values of maps. bfloat16 is handled as its bits: compilers vectorise this arithmetic, but
// not that of c10::BFloat16.
#pragma once

#include <c10/util/BFloat16.h>

#include <cstdint>
#include <type_traits>

#include "../macros.h"

namespace nasfcos {

NASFCOS_INLINE float widen(uint16_t value) {
  return __builtin_bit_cast(float, static_cast<uint32_t>(value) << 16);
}

// Rounds to nearest, ties to even. Any NaN becomes one fixed NaN: rounding could carry the bits of
// some into those of another number.
NASFCOS_INLINE uint16_t narrow(float value) {
  const uint32_t bits = __builtin_bit_cast(uint32_t, value);
  const uint32_t rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  return static_cast<uint16_t>(value != value ? 0x7fc0 : rounded);
}

// Converts one value from its type in memory to the type of the arithmetic, and back.
NASFCOS_INLINE float load(const float* from) { return *from; }
NASFCOS_INLINE double load(const double* from) { return *from; }
NASFCOS_INLINE float load(const uint16_t* from) { return widen(*from); }
NASFCOS_INLINE void store(float value, float* to) { *to = value; }
NASFCOS_INLINE void store(double value, double* to) { *to = value; }
NASFCOS_INLINE void store(float value, uint16_t* to) { *to = narrow(value); }

// std::max would turn NaN into zero.
template <typename T>
NASFCOS_INLINE T relu(T x) {
  return x < 0 ? T(0) : x;
}

// The type as which our loops read the values of a tensor.
template <typename T>
using Bits = std::conditional_t<std::is_same_v<T, c10::BFloat16>, uint16_t, T>;

}  // namespace nasfcos
