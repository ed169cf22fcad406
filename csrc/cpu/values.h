// Values of maps, one by one. bfloat16 is taken as bits: compilers make vectors of this arithmetic,
// which they do not of c10::BFloat16's.
#pragma once

#include <c10/util/BFloat16.h>

#include <cstdint>
#include <type_traits>

#include "../macros.h"

NASFCOS_INLINE float widen(uint16_t value) {
  return __builtin_bit_cast(float, static_cast<uint32_t>(value) << 16);
}

// To the nearest, ties to even; what is not a number stays so whatever its bits.
NASFCOS_INLINE uint16_t narrow(float value) {
  const uint32_t bits = __builtin_bit_cast(uint32_t, value);
  const uint32_t rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  return static_cast<uint16_t>(value != value ? 0x7fc0 : rounded);
}

// One value from memory to what it is computed with, and back.
NASFCOS_INLINE float load(const float* from) { return *from; }
NASFCOS_INLINE double load(const double* from) { return *from; }
NASFCOS_INLINE float load(const uint16_t* from) { return widen(*from); }
NASFCOS_INLINE void store(float value, float* to) { *to = value; }
NASFCOS_INLINE void store(double value, double* to) { *to = value; }
NASFCOS_INLINE void store(float value, uint16_t* to) { *to = narrow(value); }

// Not std::max, which would turn NaN into zero.
template <typename T>
NASFCOS_INLINE T relu(T x) {
  return x < 0 ? T(0) : x;
}

// What values of a tensor's type are read as.
template <typename T>
using Bits = std::conditional_t<std::is_same_v<T, c10::BFloat16>, uint16_t, T>;
