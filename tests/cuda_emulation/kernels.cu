// Kernels that try the emulation itself: `kind` names what each does right or wrong.
#include "../../csrc/cuda/host.h"

namespace granvit::cuda {
namespace {

// Sums a block's numbers through shared memory and shuffles; out[block] is the total.
__global__ void sum_kernel(const float* in, float* out) {
  auto* sums = reinterpret_cast<float*>(shared_memory());
  float sum = in[blockIdx.x * blockDim.x + threadIdx.x];
  for (int offset = 16; offset > 0; offset /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, offset);
  if (threadIdx.x % 32 == 0) sums[threadIdx.x / 32] = sum;
  __syncthreads();
  if (threadIdx.x == 0) {
    float total = 0;
    for (unsigned w = 0; w < blockDim.x / 32; ++w) total += sums[w];
    out[blockIdx.x] = total;
  }
}

enum Kind : int64_t { kExit, kTwoBarriers, kMissingLane, kUninitialised, kMissingBarrier, kBeyondShared, kBallot };

__global__ void kind_kernel(int64_t kind, float* out) {
  auto* shared = reinterpret_cast<float*>(shared_memory());
  const int thread = threadIdx.x;
  if (kind == kExit) {
    if (thread == 5) return;
    __syncthreads();
  } else if (kind == kTwoBarriers) {
    if (thread < 40)
      __syncthreads();
    else
      __syncthreads();
  } else if (kind == kMissingLane) {
    if (thread != 7) out[0] = __shfl_sync(0xffffffffu, 1.0f, 0);
  } else if (kind == kUninitialised) {
    out[0] = shared[thread];
  } else if (kind == kMissingBarrier) {
    shared[thread] = static_cast<float>(thread);
    out[thread] = shared[(thread + 1) % blockDim.x];
  } else if (kind == kBeyondShared) {
    if (thread == 0) shared[blockDim.x] = 0;
  } else if (kind == kBallot) {
    const unsigned odd = __ballot_sync(0xffffffffu, thread % 2);
    const int above = __shfl_down_sync(0xffffffffu, thread % 32, 3),
              below = __shfl_up_sync(0xffffffffu, thread % 32, 3);
    const bool right = odd == 0xaaaaaaaau && above == (thread % 32 < 29 ? thread % 32 + 3 : thread % 32) &&
                       below == (thread % 32 >= 3 ? thread % 32 - 3 : thread % 32);
    out[thread] = right ? 1.0f : 0.0f;
  }
}

Tensor sums(const Tensor& in, int64_t threads) {
  const auto blocks = static_cast<unsigned>(in.numel() / threads);
  Tensor out = torch::stable::new_empty(in, {in.numel() / threads});
  launch("sum", sum_kernel, dim3(blocks), dim3(static_cast<unsigned>(threads)), threads / 32 * sizeof(float), nullptr,
         static_cast<const float*>(in.const_data_ptr()), static_cast<float*>(out.mutable_data_ptr()));
  return out;
}

Tensor misbehave(const Tensor& like, int64_t kind) {
  constexpr unsigned kThreads = 64;
  Tensor out = torch::stable::new_zeros(like, {kThreads});
  launch("misbehave", kind_kernel, dim3(1), dim3(kThreads), kThreads * sizeof(float), nullptr, kind,
         static_cast<float*>(out.mutable_data_ptr()));
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(granvit, m) {
  m.def("sums(Tensor numbers, int threads) -> Tensor");
  m.def("misbehave(Tensor like, int kind) -> Tensor");
}
STABLE_TORCH_LIBRARY_IMPL(granvit, CUDA, m) {
  m.impl("sums", TORCH_BOX(&sums));
  m.impl("misbehave", TORCH_BOX(&misbehave));
}

}  // namespace granvit::cuda
