// Sigmoid focal loss on CUDA, forward and backward; the arithmetic is in ../focal.h.
//
// Targets are checked by an assertion on the device, as in PyTorch's losses: checking them before
// the kernels start would make the host wait for the device.

#include <ATen/Dispatch.h>
#include <ATen/OpMathType.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#include <c10/macros/Macros.h>
#include <torch/library.h>

#include <algorithm>
#include <limits>

#include "../focal.h"

namespace nasfcos {
namespace {

using at::Tensor;

template <typename S>
using Compute = at::opmath_type<S>;

constexpr int kThreads = 256;
// Enough blocks for any device. Fixed, so that the order of summation does not depend on the
// device.
constexpr int64_t kMaxBlocks = 4096;

template <typename T>
struct Parameters {
  T gamma, alpha;
  bool squared;  // gamma is 2
};

template <typename T>
__device__ __forceinline__ T weighted_loss(T x, bool positive, const Parameters<T>& p) {
  const T z = positive ? -x : x;
  const T loss = p.squared ? loss_of<true>(z, p.gamma) : loss_of<false>(z, p.gamma);
  return (positive ? p.alpha : 1 - p.alpha) * loss;
}

template <typename T>
__device__ __forceinline__ T weighted_slope(T x, bool positive, const Parameters<T>& p) {
  const T z = positive ? -x : x;
  const T slope = p.squared ? slope_of<true>(z, p.gamma) : slope_of<false>(z, p.gamma);
  return (positive ? -p.alpha : 1 - p.alpha) * slope;
}

// Calls body(i, state) for the elements of this thread; state is -1 in an ignored row, 1 for the
// target of a row, and 0 otherwise. Index has 32 bits where that suffices, for a faster division.
template <typename Index, typename Body>
__device__ __forceinline__ void for_each_element(
    const int64_t* targets, Index count, Index classes, const Body& body) {
  const Index stride = static_cast<Index>(gridDim.x) * blockDim.x;
  for (Index i = static_cast<Index>(blockIdx.x) * blockDim.x + threadIdx.x; i < count;
       i += stride) {
    const Index row = i / classes;
    const int64_t target = targets[row];
    CUDA_KERNEL_ASSERT(target >= -1 && target <= static_cast<int64_t>(classes));
    const bool positive = target == static_cast<int64_t>(i - row * classes) + 1;
    body(i, target < 0 ? -1 : static_cast<int>(positive));
  }
}

template <typename S, typename Index>
__global__ void __launch_bounds__(kThreads) sum_kernel(
    const S* logits, const int64_t* targets, Index count, Index classes,
    Parameters<Compute<S>> parameters, double* partial_sums) {
  using T = Compute<S>;
  T sum = 0;
  for_each_element<Index>(targets, count, classes, [&](Index i, int state) {
    if (state >= 0) sum += weighted_loss<T>(static_cast<T>(logits[i]), state == 1, parameters);
  });
  __shared__ T lanes[kThreads];
  lanes[threadIdx.x] = sum;
  for (int half = kThreads / 2; half > 0; half /= 2) {
    __syncthreads();
    if (threadIdx.x < half) lanes[threadIdx.x] += lanes[threadIdx.x + half];
  }
  if (threadIdx.x == 0) partial_sums[blockIdx.x] = static_cast<double>(lanes[0]);
}

template <typename S, typename Index>
__global__ void __launch_bounds__(kThreads) loss_kernel(
    const S* logits, const int64_t* targets, Index count, Index classes,
    Parameters<Compute<S>> parameters, S* losses) {
  using T = Compute<S>;
  for_each_element<Index>(targets, count, classes, [&](Index i, int state) {
    losses[i] = static_cast<S>(
        state < 0 ? T(0) : weighted_loss<T>(static_cast<T>(logits[i]), state == 1, parameters));
  });
}

// grad is a single number (grad_step 0) or has the shape of the logits (grad_step 1).
template <typename S, typename Index>
__global__ void __launch_bounds__(kThreads) grad_kernel(
    const Compute<S>* grad, Index grad_step, const S* logits, const int64_t* targets, Index count,
    Index classes, Parameters<Compute<S>> parameters, S* grad_logits) {
  using T = Compute<S>;
  for_each_element<Index>(targets, count, classes, [&](Index i, int state) {
    grad_logits[i] = static_cast<S>(
        state < 0 ? T(0)
                  : grad[i * grad_step] *
                        weighted_slope<T>(static_cast<T>(logits[i]), state == 1, parameters));
  });
}

// Calls launch with a value of the index type to use.
template <typename Launch>
void with_index(int64_t count, const Launch& launch) {
  // Leaves room for the last step of the loop, which goes beyond the count.
  if (count < std::numeric_limits<int32_t>::max() - kMaxBlocks * kThreads) {
    launch(uint32_t{});
  } else {
    launch(int64_t{});
  }
}

unsigned int blocks_for(int64_t count) {
  // A few elements per thread, to amortise the reduction within a block.
  return static_cast<unsigned int>(
      std::clamp<int64_t>((count + 4 * kThreads - 1) / (4 * kThreads), 1, kMaxBlocks));
}

Tensor checked_targets(const Tensor& logits, const Tensor& targets) {
  TORCH_CHECK_VALUE(
      logits.dim() == 2 && targets.dim() == 1 && targets.size(0) == logits.size(0),
      "sigmoid_focal_loss: logits must be [N, C] and targets [N]");
  TORCH_CHECK_VALUE(
      targets.device() == logits.device(), "sigmoid_focal_loss: targets are on ",
      targets.device(), ", logits on ", logits.device());
  return targets.to(at::kLong).contiguous();
}

Tensor sigmoid_focal_loss(
    const Tensor& logits_, const Tensor& targets_, double gamma, double alpha, bool reduce) {
  const Tensor targets = checked_targets(logits_, targets_);
  const c10::cuda::CUDAGuard guard(logits_.device());
  const Tensor logits = logits_.contiguous();
  const auto stream = c10::cuda::getCurrentCUDAStream();
  const int64_t count = logits.numel();
  const int64_t* target = targets.const_data_ptr<int64_t>();
  Tensor result;
  AT_DISPATCH_FLOATING_TYPES_AND2(
      at::kHalf, at::kBFloat16, logits.scalar_type(), "sigmoid_focal_loss", [&] {
        using T = Compute<scalar_t>;
        const Parameters<T> parameters{
            static_cast<T>(gamma), static_cast<T>(alpha), gamma == 2.0};
        const scalar_t* x = logits.const_data_ptr<scalar_t>();
        const unsigned int blocks = blocks_for(count);
        with_index(count, [&](auto zero) {
          using Index = decltype(zero);
          const Index n = static_cast<Index>(count);
          const Index classes = static_cast<Index>(logits.size(1));
          if (reduce) {
            const Tensor sums = at::empty({blocks}, logits.options().dtype(at::kDouble));
            sum_kernel<scalar_t, Index><<<blocks, kThreads, 0, stream>>>(
                x, target, n, classes, parameters, sums.mutable_data_ptr<double>());
            C10_CUDA_KERNEL_LAUNCH_CHECK();
            result = sums.sum().to(c10::CppTypeToScalarType<T>::value);
          } else {
            result = at::empty(logits.sizes(), logits.options());
            loss_kernel<scalar_t, Index><<<blocks, kThreads, 0, stream>>>(
                x, target, n, classes, parameters, result.mutable_data_ptr<scalar_t>());
            C10_CUDA_KERNEL_LAUNCH_CHECK();
          }
        });
      });
  return result;
}

Tensor sigmoid_focal_loss_backward(
    const Tensor& grad_, const Tensor& logits_, const Tensor& targets_, double gamma,
    double alpha) {
  const Tensor targets = checked_targets(logits_, targets_);
  const c10::cuda::CUDAGuard guard(logits_.device());
  const Tensor logits = logits_.contiguous();
  TORCH_CHECK_VALUE(
      grad_.device() == logits.device() &&
          (grad_.dim() == 0 || grad_.sizes() == logits.sizes()),
      "sigmoid_focal_loss_backward: grad must be a scalar or of the logits' shape, and on their "
      "device");
  const auto stream = c10::cuda::getCurrentCUDAStream();
  const int64_t count = logits.numel();
  Tensor result = at::empty(logits.sizes(), logits.options());
  AT_DISPATCH_FLOATING_TYPES_AND2(
      at::kHalf, at::kBFloat16, logits.scalar_type(), "sigmoid_focal_loss_backward", [&] {
        using T = Compute<scalar_t>;
        const Parameters<T> parameters{
            static_cast<T>(gamma), static_cast<T>(alpha), gamma == 2.0};
        const Tensor grad = grad_.to(c10::CppTypeToScalarType<T>::value).contiguous();
        with_index(count, [&](auto zero) {
          using Index = decltype(zero);
          grad_kernel<scalar_t, Index><<<blocks_for(count), kThreads, 0, stream>>>(
              grad.const_data_ptr<T>(), static_cast<Index>(grad.dim() == 0 ? 0 : 1),
              logits.const_data_ptr<scalar_t>(), targets.const_data_ptr<int64_t>(),
              static_cast<Index>(count), static_cast<Index>(logits.size(1)), parameters,
              result.mutable_data_ptr<scalar_t>());
          C10_CUDA_KERNEL_LAUNCH_CHECK();
        });
      });
  return result;
}

}  // namespace

TORCH_LIBRARY_IMPL(nasfcos, CUDA, m) {
  m.impl("sigmoid_focal_loss", TORCH_FN(sigmoid_focal_loss));
  m.impl("sigmoid_focal_loss_backward", TORCH_FN(sigmoid_focal_loss_backward));
}

}  // namespace nasfcos
