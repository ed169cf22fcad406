#pragma once

// The IoU of boxes, for the non-maximum suppression on both devices.

#include <algorithm>
#include <cmath>
#include <limits>
#include <type_traits>

#include "macros.h"

namespace nasfcos {

// A product that the GPU's compiler does not fuse with an addition. A fused multiply-add rounds
// once instead of twice, which would decide boxes exactly at the threshold differently from the CPU
// (where a function attribute has the same effect, see cpu/nms.cpp).
template <typename T>
NASFCOS_INLINE T unfused_product(T a, T b) {
#ifdef __CUDA_ARCH__
  if constexpr (std::is_same_v<T, double>) {
    return __dmul_rn(a, b);
  } else {
    return __fmul_rn(a, b);
  }
#else
  return a * b;
#endif
}

template <typename T>
struct Box {
  T x0, y0, x1, y1, area;
};

// Loads a box from its four coordinates; `extra` is 1 in the legacy convention, otherwise 0.
template <typename T>
NASFCOS_INLINE Box<T> load_box(const T* p, T extra) {
  return {p[0], p[1], p[2], p[3], unfused_product(p[2] - p[0] + extra, p[3] - p[1] + extra)};
}

// NaN if a box has a NaN coordinate, and for two boxes without area.
template <typename T>
NASFCOS_INLINE T iou(const Box<T>& a, const Box<T>& b, T extra) {
  T w = std::min(a.x1, b.x1) - std::max(a.x0, b.x0) + extra;
  T h = std::min(a.y1, b.y1) - std::max(a.y0, b.y0) + extra;
  w = w > T(0) ? w : T(0);
  h = h > T(0) ? h : T(0);
  const T intersection = unfused_product(w, h);
  return intersection / (a.area + b.area - intersection);
}

// The limit for which "IoU > limit" in T gives the same answer as "IoU >= threshold" with the
// threshold rounded to T (legacy), or as "IoU > threshold" in double (ordinary).
template <typename T>
T exclusive_limit(double threshold, bool legacy) {
  const T limit = static_cast<T>(threshold);
  const bool lower = legacy || static_cast<double>(limit) > threshold;
  return lower ? std::nextafter(limit, -std::numeric_limits<T>::infinity()) : limit;
}

}  // namespace nasfcos
