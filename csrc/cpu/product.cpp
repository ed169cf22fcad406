#include "product.h"

#include <algorithm>

#include "../macros.h"
#include "vectors.h"

namespace nasfcos {

namespace {

template <int Rows, typename Vector, typename T>
NASFCOS_INLINE void multiply_rows(const Product<T>& p, int64_t first) {
  constexpr int vectors = kPanel * sizeof(T) / sizeof(Vector), lanes = kPanel / vectors;
  const T *a = p.a + first * p.a_row, *b = p.b;
  Vector sums[Rows][vectors] = {}, factors[vectors];
  for (int64_t step = 0; step < p.steps; ++step, a += p.a_step, b += p.b_step) {
    for (int v = 0; v < vectors; ++v) load(b + v * lanes, factors[v]);
    // Unrolling, here and below, keeps all sums in registers.
#pragma GCC unroll 16
    for (int row = 0; row < Rows; ++row) {
      for (int v = 0; v < vectors; ++v) sums[row][v] += a[row * p.a_row] * factors[v];
    }
  }
#pragma GCC unroll 16
  for (int row = 0; row < Rows; ++row) {
    for (int v = 0; v < vectors; ++v) {
      store(sums[row][v], p.products + (first + row) * p.products_row + v * lanes);
    }
  }
}

// All rows from `first` on, `Rows` at a time, and the rest in smaller groups.
template <int Rows, typename Vector, typename T>
NASFCOS_INLINE void multiply_from(const Product<T>& p, int64_t first) {
  for (; first + Rows <= p.rows; first += Rows) multiply_rows<Rows, Vector>(p, first);
  if constexpr (Rows > 1) multiply_from<Rows / 2, Vector>(p, first);
}

template <int Bytes, typename T>
NASFCOS_INLINE void multiply_loop(const Product<T>& p) {
  // Enough independent sums to hide the latency of multiply-adds, and no more than fit registers.
  constexpr int vectors = kPanel * sizeof(T) / Bytes;
  constexpr int rows = Bytes == 64 ? 12 : std::max(1, (Bytes == 32 ? 12 : 8) / vectors);
  multiply_from<rows, typename Lanes<T, Bytes>::type>(p, 0);
}

NASFCOS_BY_WIDTH(multiply_float, Product<float>, multiply_loop<kBytes>(a))
NASFCOS_BY_WIDTH(multiply_double, Product<double>, multiply_loop<kBytes>(a))

}  // namespace

void multiply(const Product<float>& product) { multiply_float(product); }
void multiply(const Product<double>& product) { multiply_double(product); }

}  // namespace nasfcos
