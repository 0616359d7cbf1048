// Kernels that try the emulation itself: `kind` names what each does right or wrong.
#include "../../csrc/cuda/host.h"
#include "../../csrc/cuda/mma.h"

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

// out (16, 8) = a (16, depth) b (depth, 8), all row by row; by one warp.
__global__ void multiply_tf32_kernel(const float* a, const float* b, float* out, int depth) {
  const int group = threadIdx.x / 4, member = threadIdx.x % 4;
  float sum[4] = {0, 0, 0, 0};
  for (int k = 0; k < depth; k += 8) {
    uint32_t left[4], right[2];
    for (int i = 0; i < 4; ++i) left[i] = to_tf32(a[(group + i % 2 * 8) * depth + k + member + i / 2 * 4]);
    for (int i = 0; i < 2; ++i) right[i] = to_tf32(b[(k + member + i * 4) * 8 + group]);
    mma_tf32(sum, left, right);
  }
  for (int i = 0; i < 4; ++i) out[(group + i / 2 * 8) * 8 + 2 * member + i % 2] = sum[i];
}

// The same in 16 bits, through asynchronous copies and matrix loads; `wait` false forgets to wait.
template <typename T>
__global__ void multiply_kernel(const T* a, const T* b, float* out, int depth, bool wait) {
  const int lane = threadIdx.x, group = lane / 4, member = lane % 4;
  auto* left = reinterpret_cast<T*>(shared_memory());
  T* right = left + 16 * depth;
  for (int i = lane * 8; i < 16 * depth; i += 32 * 8) copy_async(left + i, a + i, true);
  commit_copies();
  for (int i = lane * 8; i < 8 * depth; i += 32 * 8) copy_async(right + i, b + i, true);
  commit_copies();
  if (wait)
    wait_for_copies<0>();
  else
    wait_for_copies<1>();
  __syncwarp();
  float sum[4] = {0, 0, 0, 0};
  uint32_t x[4], y[4];
  for (int k = 0; k + 16 <= depth; k += 16) {
    load_matrices(x, left + lane % 16 * depth + k + lane / 16 * 8);
    load_matrices_transposed(y, right + (k + lane % 16) * 8);
    mma(sum, x, {y[0], y[1]}, T());
  }
  if (depth % 16 != 0) {
    load_matrices(x, left + lane % 16 * depth + depth - 8);
    load_matrices_transposed(y, right + (depth - 8 + lane % 8) * 8);
    mma_8(sum, {x[0], x[1]}, y[0], T());
  }
  for (int i = 0; i < 4; ++i) out[(group + i / 2 * 8) * 8 + 2 * member + i % 2] = sum[i];
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

Tensor multiply(const Tensor& a, const Tensor& b, bool wait) {
  const auto depth = static_cast<int>(a.size(1));
  Tensor out = torch::stable::new_empty(a, {16, 8}, ScalarType::Float);
  auto* to = static_cast<float*>(out.mutable_data_ptr());
  with_dtype(a, "multiply", "a", [&](auto* element) {
    using T = std::remove_pointer_t<decltype(element)>;
    const auto *left = static_cast<const T*>(a.const_data_ptr()), *right = static_cast<const T*>(b.const_data_ptr());
    if constexpr (sizeof(T) == 4)
      launch("multiply", multiply_tf32_kernel, dim3(1), dim3(32), 0, nullptr, left, right, to, depth);
    else
      launch("multiply", multiply_kernel<T>, dim3(1), dim3(32), 24 * depth * sizeof(T), nullptr, left, right, to, depth,
             wait);
  });
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(granvit, m) {
  m.def("sums(Tensor numbers, int threads) -> Tensor");
  m.def("misbehave(Tensor like, int kind) -> Tensor");
  m.def("multiply(Tensor a, Tensor b, bool wait) -> Tensor");
}
STABLE_TORCH_LIBRARY_IMPL(granvit, CUDA, m) {
  m.impl("sums", TORCH_BOX(&sums));
  m.impl("misbehave", TORCH_BOX(&misbehave));
  m.impl("multiply", TORCH_BOX(&multiply));
}

}  // namespace granvit::cuda
