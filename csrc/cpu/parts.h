#pragma once

#include <ATen/Parallel.h>

#include <algorithm>
#include <cstdint>
#include <vector>

// Into how many parts to divide work on `count` things, of which `grain` are worth a thread's
// while: for sums that each part keeps to itself.
static inline int64_t parts_of(int64_t count, int64_t grain) {
  return std::clamp<int64_t>((count + grain - 1) / grain, 1, at::get_num_threads());
}

namespace nasfcos {

inline int64_t available_threads() {
  return at::in_parallel_region() ? 1 : at::get_num_threads();
}

// Sums over pixels are of the values' type within a block of so many, and double beyond it: the
// fewer, the less rounding in sums of values that are much alike.
constexpr int64_t kPixels = 32;

// Pixels that are worth a thread's while.
inline int64_t grain_of(int64_t channels) { return (int64_t{1} << 15) / (channels + 1) + 1; }

// Samples of some pixels each, shared out to threads in parts that lie within a sample.
class Parts {
 public:
  Parts(int64_t samples, int64_t pixels, int64_t channels) : samples_(samples), pixels_(pixels) {
    const int64_t grain = grain_of(channels);
    per_sample_ = parts_of(pixels, grain);
    grain_ = std::max<int64_t>(1, grain * per_sample_ / std::max<int64_t>(1, pixels));
  }

  // Calls run(part, sample, first pixel, end) for each part.
  template <typename Run>
  void each(const Run& run) const {
    at::parallel_for(0, samples_ * per_sample_, grain_, [&](int64_t begin, int64_t end) {
      for (int64_t part = begin; part < end; ++part) {
        const int64_t place = part % per_sample_;
        run(part, part / per_sample_, pixels_ * place / per_sample_,
            pixels_ * (place + 1) / per_sample_);
      }
    });
  }

  // Sums [samples * size] of what `add(sample, first pixel, pixels, sums)` adds to its sums.
  template <typename Acc, typename Add>
  std::vector<double> sums(int64_t size, const Add& add) const {
    std::vector<double> found(samples_ * per_sample_ * size);
    each([&](int64_t part, int64_t sample, int64_t begin, int64_t end) {
      std::vector<Acc> sums(size);
      for (int64_t first = begin; first < end; first += kPixels) {
        std::fill(sums.begin(), sums.end(), Acc(0));
        add(sample, first, std::min(kPixels, end - first), sums.data());
        for (int64_t i = 0; i < size; ++i) found[part * size + i] += sums[i];
      }
    });
    std::vector<double> total(samples_ * size);
    for (int64_t part = 0; part < samples_ * per_sample_; ++part) {
      double* own = total.data() + part / per_sample_ * size;
      for (int64_t i = 0; i < size; ++i) own[i] += found[part * size + i];
    }
    return total;
  }

 private:
  int64_t samples_, pixels_, per_sample_, grain_;
};

}  // namespace nasfcos
