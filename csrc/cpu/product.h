// A matrix product for use inside an operator. Libraries first copy both factors into a layout that
// suits them; an operator that uses a factor many times puts it into that layout once.
#pragma once

#include <cstdint>

namespace nasfcos {

// The number of columns that a matrix product computes.
constexpr int64_t kPanel = 16;

// products[row][column] = sum over the steps of a[row][step] * b[step][column], for kPanel columns.
template <typename T>
struct Product {
  const T* a;
  int64_t a_row, a_step;  // strides
  const T* b;
  int64_t b_step;
  int64_t rows, steps;
  T* products;
  int64_t products_row;
};

// Computes the product with vectors, without copying a factor.
void multiply(const Product<float>& product);
void multiply(const Product<double>& product);

}  // namespace nasfcos
