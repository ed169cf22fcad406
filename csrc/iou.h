#pragma once

// What one box has in common with another, for the non-maximum suppression of both devices.

#include <algorithm>
#include <cmath>
#include <limits>
#include <type_traits>

#include "macros.h"

namespace nasfcos {

// A product that a GPU's compiler does not fuse into an addition: that rounds once instead of twice
// and would decide boxes exactly at the threshold otherwise than the CPU does (whose compiler is
// told for a whole function, see cpu/nms.cpp).
template <typename T>
NASFCOS_INLINE T product(T a, T b) {
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

// A box from its four coordinates; extra is 1 in the legacy convention, else 0.
template <typename T>
NASFCOS_INLINE Box<T> load_box(const T* p, T extra) {
  return {p[0], p[1], p[2], p[3], product(p[2] - p[0] + extra, p[3] - p[1] + extra)};
}

// NaN where one of the boxes has a NaN coordinate, and for two boxes without area.
template <typename T>
NASFCOS_INLINE T iou(const Box<T>& a, const Box<T>& b, T extra) {
  T w = std::min(a.x1, b.x1) - std::max(a.x0, b.x0) + extra;
  T h = std::min(a.y1, b.y1) - std::max(a.y0, b.y0) + extra;
  w = w > T(0) ? w : T(0);
  h = h > T(0) ? h : T(0);
  const T intersection = product(w, h);
  return intersection / (a.area + b.area - intersection);
}

// The largest value of T that "IoU > value" may be asked of, so that the answer is that of
// IoU >= threshold taken to T (legacy) or of IoU > threshold in double (ordinary).
template <typename T>
T exclusive_limit(double threshold, bool legacy) {
  const T limit = static_cast<T>(threshold);
  const bool lower = legacy || static_cast<double>(limit) > threshold;
  return lower ? std::nextafter(limit, -std::numeric_limits<T>::infinity()) : limit;
}

}  // namespace nasfcos
