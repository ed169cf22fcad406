// A matrix product for the inside of an operator. Libraries copy both factors to where they can read
// them best; operators that use one of them many times lay it out that way once.
#pragma once

#include <cstdint>

namespace nasfcos {

// Columns of a matrix product that are computed together.
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

// In vectors, and without a copy of either factor.
void multiply(const Product<float>& product);
void multiply(const Product<double>& product);

}  // namespace nasfcos
