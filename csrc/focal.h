#pragma once

// The arithmetic of the sigmoid focal loss, for both devices.
//
// Let z be the logit of a wrong prediction (the logit itself if the target is another class, its
// negative if it is this class), p = sigmoid(z), and weight = 1 - alpha or alpha. Then
//   loss = weight * p^gamma * softplus(z)
//   d loss / d z = weight * p^gamma * (gamma * (1 - p) * softplus(z) + p)
// Both stay accurate for large |z|, because p, 1 - p and softplus(z) are computed from exp(-|z|).

#include <algorithm>
#include <cmath>
#include <cstdint>

#include <c10/util/bit_cast.h>

#include "macros.h"

namespace nasfcos {

#ifdef __CUDACC__
NASFCOS_INLINE float exp_minus(float a) { return ::expf(-a); }
NASFCOS_INLINE float log1p_unit(float e) { return ::log1pf(e); }
#else
// exp(-a) for a >= 0, accurate to about one unit in the last place. Plain arithmetic without
// branches, so that compilers vectorise loops of it; from a = 88 on the result is zero.
NASFCOS_INLINE float exp_minus(float a) {
  constexpr float log2e = 1.44269504f, ln2_high = 0.693359375f, ln2_low = -2.12194440e-4f;
  const float x = -std::min(a, 88.0f);
  const int32_t n = static_cast<int32_t>(x * log2e - 0.5f);
  const float k = static_cast<float>(n);
  const float r = (x - k * ln2_high) - k * ln2_low;
  float y = 1.0f / 5040;
  y = y * r + 1.0f / 720;
  y = y * r + 1.0f / 120;
  y = y * r + 1.0f / 24;
  y = y * r + 1.0f / 6;
  y = y * r + 0.5f;
  y = y * r * r + r + 1.0f;
  return y * c10::bit_cast<float>((n + 127) << 23);
}

// log(1 + e) for 0 <= e <= 1, as the series of 2 artanh(e / (2 + e)).
NASFCOS_INLINE float log1p_unit(float e) {
  const float s = e / (2.0f + e);
  const float q = s * s;
  float y = 2.0f / 15;
  y = y * q + 2.0f / 13;
  y = y * q + 2.0f / 11;
  y = y * q + 2.0f / 9;
  y = y * q + 2.0f / 7;
  y = y * q + 2.0f / 5;
  y = y * q + 2.0f / 3;
  return s * (y * q + 2.0f);
}
#endif

NASFCOS_INLINE double exp_minus(double a) { return ::exp(-a); }
NASFCOS_INLINE double log1p_unit(double e) { return ::log1p(e); }

template <typename T>
struct Wrong {
  T p, rest, softplus, power;  // p, 1 - p, softplus(z), p^gamma
};

template <bool squared, typename T>
NASFCOS_INLINE Wrong<T> wrong(T z, T gamma) {
  const T e = exp_minus(std::abs(z));
  const T log = log1p_unit(e);
  const T inverse = T(1) / (T(1) + e);
  Wrong<T> w;
  w.p = z >= T(0) ? inverse : e * inverse;
  w.rest = z >= T(0) ? e * inverse : inverse;
  w.softplus = std::max(z, T(0)) + log;  // this order of the arguments preserves NaN
  if constexpr (squared) {
    w.power = w.p * w.p;
  } else {
    // p^gamma by log p = min(z, 0) - log(1 + e), bounded from below so that p^0 is 1 also for p =
    // 0.
    const T least = std::max(std::min(z, T(0)), T(-1e30));
    w.power = exp_minus(gamma * (log - least));
  }
  return w;
}

template <bool squared, typename T>
NASFCOS_INLINE T loss_of(T z, T gamma) {
  const Wrong<T> w = wrong<squared>(z, gamma);
  return w.power * w.softplus;
}

template <bool squared, typename T>
NASFCOS_INLINE T slope_of(T z, T gamma) {
  const Wrong<T> w = wrong<squared>(z, gamma);
  // The limit of (1 - p) * softplus(z) for large z is 0, also where softplus(z) is infinite.
  const T tail = w.rest * std::min(w.softplus, T(1e38));
  return w.power * (gamma * tail + w.p);
}

}  // namespace nasfcos
