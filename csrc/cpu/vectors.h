// Vectors of adjacent values, for code that is vectorised explicitly.
#pragma once

#include <cstdint>
#include <cstring>

#include "../macros.h"
#include "values.h"

namespace nasfcos {

// A vector of as many T as fit so many bytes.
template <typename T, int Bytes>
struct Lanes {
  static constexpr int64_t count = Bytes / sizeof(T);
  typedef T type __attribute__((vector_size(Bytes)));
};

// Load a vector of channels (or a single one) from memory, converting bfloat16, and store it.
template <typename T, typename Vector>
NASFCOS_INLINE void load(const T* from, Vector& to) {
  std::memcpy(&to, from, sizeof(Vector));
}
template <typename T, typename Vector>
NASFCOS_INLINE void store(const Vector& from, T* to) {
  std::memcpy(to, &from, sizeof(Vector));
}
template <typename Vector>
NASFCOS_INLINE void load(const uint16_t* from, Vector& to) {
  using Narrow = typename Lanes<uint16_t, sizeof(Vector) / 2>::type;
  using Wide = typename Lanes<uint32_t, sizeof(Vector)>::type;
  Narrow bits;
  std::memcpy(&bits, from, sizeof(bits));
  const Wide wide = __builtin_convertvector(bits, Wide) << 16;
  std::memcpy(&to, &wide, sizeof(to));
}
template <typename Vector>
NASFCOS_INLINE void store(const Vector& from, uint16_t* to) {
  using Narrow = typename Lanes<uint16_t, sizeof(Vector) / 2>::type;
  using Wide = typename Lanes<uint32_t, sizeof(Vector)>::type;
  Wide wide;
  std::memcpy(&wide, &from, sizeof(wide));
  // See `narrow` in values.h.
  wide = (wide + 0x7fff + ((wide >> 16) & 1)) >> 16;
  wide = from != from ? Wide{} + 0x7fc0 : wide;
  const Narrow bits = __builtin_convertvector(wide, Narrow);
  std::memcpy(to, &bits, sizeof(bits));
}
NASFCOS_INLINE void load(const uint16_t* from, float& to) { to = widen(*from); }

}  // namespace nasfcos
