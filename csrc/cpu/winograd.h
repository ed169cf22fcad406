// Winograd's minimal filtering F(4x4, 3x3): a tile of 4x4 outputs from 6x6 inputs and a 3x3 kernel.
//
// Tiles and kernels are evaluated as polynomials at the points 0, 2/3, -2/3, 3/2, -3/2 and infinity
// along both axes, multiplied point by point, and interpolated. With these points float32 loses
// less than one bit of precision compared to direct summation; with the usual points 0, 1, -1, 2,
// -2 and infinity it loses two bits.
#pragma once

#include "../macros.h"

namespace nasfcos {

constexpr int kOut = 4, kIn = 6, kPoints = kIn * kIn;

// The points other than 0 and infinity are a, -a, b and -b, with a * b = 1. These are their powers,
// and for each the reciprocal of the product of its distances to the other finite points.
template <typename T>
struct Points {
  static constexpr T a1 = T(2) / 3, a2 = a1 * a1, a3 = a2 * a1;
  static constexpr T b1 = T(3) / 2, b2 = b1 * b1, b3 = b2 * b1;
  static constexpr T na = 1 / (2 * a2 * (a2 - b2)), nb = 1 / (2 * b2 * (b2 - a2));
};

// Each transform maps `from` values along an axis to `to` values. V is T or a vector of T.

// Evaluates the inputs at the points.
struct InputToPoints {
  static constexpr int from = kIn, to = kIn;
  template <typename T, typename V>
  NASFCOS_INLINE static void apply(const V* d, V* t) {
    using P = Points<T>;
    constexpr T both = P::a2 + P::b2;
    const V even_a = d[4] - P::b2 * d[2], odd_a = P::a1 * d[3] - P::b1 * d[1];
    const V even_b = d[4] - P::a2 * d[2], odd_b = P::b1 * d[3] - P::a1 * d[1];
    t[0] = d[0] - both * d[2] + d[4];
    t[1] = even_a + odd_a;
    t[2] = even_a - odd_a;
    t[3] = even_b + odd_b;
    t[4] = even_b - odd_b;
    t[5] = d[1] - both * d[3] + d[5];
  }
};

// Evaluates the kernel at the points.
struct KernelToPoints {
  static constexpr int from = 3, to = kIn;
  template <typename T, typename V>
  NASFCOS_INLINE static void apply(const V* g, V* t) {
    using P = Points<T>;
    const V even_a = P::na * (g[0] + P::a2 * g[2]), odd_a = P::na * P::a1 * g[1];
    const V even_b = P::nb * (g[0] + P::b2 * g[2]), odd_b = P::nb * P::b1 * g[1];
    t[0] = g[0];
    t[1] = even_a + odd_a;
    t[2] = even_a - odd_a;
    t[3] = even_b + odd_b;
    t[4] = even_b - odd_b;
    t[5] = g[2];
  }
};

// Interpolates the outputs from the products at the points.
struct PointsToOutput {
  static constexpr int from = kIn, to = kOut;
  template <typename T, typename V>
  NASFCOS_INLINE static void apply(const V* m, V* y) {
    using P = Points<T>;
    const V sum_a = m[1] + m[2], odd_a = m[1] - m[2], sum_b = m[3] + m[4], odd_b = m[3] - m[4];
    y[0] = m[0] + sum_a + sum_b;
    y[1] = P::a1 * odd_a + P::b1 * odd_b;
    y[2] = P::a2 * sum_a + P::b2 * sum_b;
    y[3] = P::a3 * odd_a + P::b3 * odd_b + m[5];
  }
};

// The transpose of PointsToOutput, for gradients.
struct OutputToPoints {
  static constexpr int from = kOut, to = kIn;
  template <typename T, typename V>
  NASFCOS_INLINE static void apply(const V* y, V* m) {
    using P = Points<T>;
    const V even_a = y[0] + P::a2 * y[2], odd_a = P::a1 * y[1] + P::a3 * y[3];
    const V even_b = y[0] + P::b2 * y[2], odd_b = P::b1 * y[1] + P::b3 * y[3];
    m[0] = y[0];
    m[1] = even_a + odd_a;
    m[2] = even_a - odd_a;
    m[3] = even_b + odd_b;
    m[4] = even_b - odd_b;
    m[5] = y[3];
  }
};

// The transpose of KernelToPoints, for gradients.
struct PointsToKernel {
  static constexpr int from = kIn, to = 3;
  template <typename T, typename V>
  NASFCOS_INLINE static void apply(const V* u, V* g) {
    using P = Points<T>;
    const V sum_a = P::na * (u[1] + u[2]), sum_b = P::nb * (u[3] + u[4]);
    g[0] = u[0] + sum_a + sum_b;
    g[1] = P::na * P::a1 * (u[1] - u[2]) + P::nb * P::b1 * (u[3] - u[4]);
    g[2] = P::a2 * sum_a + P::b2 * sum_b + u[5];
  }
};

// Applies a transform along both axes of a tile: [from, from] to [to, to].
template <typename Transform, typename T, typename V>
NASFCOS_INLINE void transform(const V* tile, V* result) {
  constexpr int from = Transform::from, to = Transform::to;
  V between[to * from];
  for (int x = 0; x < from; ++x) {
    V column[from], turned[to];
    for (int y = 0; y < from; ++y) column[y] = tile[y * from + x];
    Transform::template apply<T, V>(column, turned);
    for (int y = 0; y < to; ++y) between[y * from + x] = turned[y];
  }
  for (int y = 0; y < to; ++y) {
    Transform::template apply<T, V>(between + y * from, result + y * to);
  }
}

}  // namespace nasfcos
