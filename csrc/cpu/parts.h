#pragma once

#include <ATen/Parallel.h>

#include <algorithm>
#include <cstdint>

// Into how many parts to divide work on `count` things, of which `grain` are worth a thread's
// while: for sums that each part keeps to itself.
static inline int64_t parts_of(int64_t count, int64_t grain) {
  return std::clamp<int64_t>((count + grain - 1) / grain, 1, at::get_num_threads());
}
