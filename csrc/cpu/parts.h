// Dividing work on the pixels of maps among threads.
#pragma once

#include <ATen/Parallel.h>

#include <algorithm>
#include <cstdint>
#include <vector>

namespace nasfcos {

// Inside a parallel region there is only the calling thread.
inline int64_t available_threads() {
  return at::in_parallel_region() ? 1 : at::get_num_threads();
}

// The number of parts into which to divide `count` items, each of which keeps a sum of its own;
// fewer than `grain` items are not worth a thread.
inline int64_t parts_of(int64_t count, int64_t grain) {
  return std::clamp<int64_t>((count + grain - 1) / grain, 1, available_threads());
}

// Sums over pixels have the type of the values within a block of this many pixels, and are double
// beyond it. The smaller the block, the smaller the rounding error in sums of similar values.
constexpr int64_t kSumBlock = 32;

// The smallest number of pixels that is worth a thread.
inline int64_t pixel_grain(int64_t channels) { return (int64_t{1} << 15) / (channels + 1) + 1; }

// Divides samples of `pixels` pixels each into parts for the threads, each part within one sample.
class Parts {
 public:
  Parts(int64_t samples, int64_t pixels, int64_t channels) : samples_(samples), pixels_(pixels) {
    const int64_t grain = pixel_grain(channels);
    per_sample_ = parts_of(pixels, grain);
    grain_ = std::max<int64_t>(1, grain * per_sample_ / std::max<int64_t>(1, pixels));
  }

  // Calls run(part, sample, begin, end) for each part, with the range of its pixels.
  template <typename Run>
  void each(const Run& run) const {
    at::parallel_for(0, samples_ * per_sample_, grain_, [&](int64_t begin, int64_t end) {
      for (int64_t part = begin; part < end; ++part) {
        const int64_t index = part % per_sample_;
        run(part, part / per_sample_, pixels_ * index / per_sample_,
            pixels_ * (index + 1) / per_sample_);
      }
    });
  }

  // Sums [samples, size]. add(sample, first, count, sums) adds `count` pixels from `first` on to
  // sums [size].
  template <typename Acc, typename Add>
  std::vector<double> sums(int64_t size, const Add& add) const {
    std::vector<double> part_sums(samples_ * per_sample_ * size);
    each([&](int64_t part, int64_t sample, int64_t begin, int64_t end) {
      std::vector<Acc> sums(size);
      for (int64_t first = begin; first < end; first += kSumBlock) {
        std::fill(sums.begin(), sums.end(), Acc(0));
        add(sample, first, std::min(kSumBlock, end - first), sums.data());
        for (int64_t i = 0; i < size; ++i) part_sums[part * size + i] += sums[i];
      }
    });
    std::vector<double> total(samples_ * size);
    for (int64_t part = 0; part < samples_ * per_sample_; ++part) {
      double* sample_sums = total.data() + part / per_sample_ * size;
      for (int64_t i = 0; i < size; ++i) sample_sums[i] += part_sums[part * size + i];
    }
    return total;
  }

 private:
  int64_t samples_, pixels_, per_sample_, grain_;
};

}  // namespace nasfcos
