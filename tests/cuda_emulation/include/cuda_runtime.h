// Stands in for CUDA's own header when csrc/cuda is compiled for the host: keywords, built-in variables, vector types,
// warp operations, and the few runtime calls that the host code makes. Ops register for CPU tensors, in a namespace of
// their own.
#pragma once

#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <tuple>
#include <utility>

#include "emulation.h"

#define GRANVIT_EMULATION
extern "C" int emulation_integers_on_device, emulation_shared_bytes;

#undef STABLE_TORCH_LIBRARY_IMPL
#undef STABLE_TORCH_LIBRARY_FRAGMENT
#define STABLE_TORCH_LIBRARY_IMPL(ns, key, m) _STABLE_TORCH_LIBRARY_IMPL(ns##_emulated, CPU, m, C10_UID)
#define STABLE_TORCH_LIBRARY_FRAGMENT(ns, m) _STABLE_TORCH_LIBRARY_FRAGMENT(ns##_emulated, m, C10_UID)

// __shared__ is missing on purpose: kernels take their shared memory from granvit::cuda::shared_memory().
#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)

constexpr int warpSize = emulation::kWarp;
using dim3 = emulation::Dim3;

struct alignas(8) uint2 {
  unsigned x, y;
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};
struct alignas(16) int4 {
  int x, y, z, w;
};
struct alignas(8) float2 {
  float x, y;
};
struct alignas(16) float4 {
  float x, y, z, w;
};
inline uint2 make_uint2(unsigned x, unsigned y) { return {x, y}; }
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }
inline int4 make_int4(int x, int y, int z, int w) { return {x, y, z, w}; }
inline float2 make_float2(float x, float y) { return {x, y}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }

template <typename T>
T __ldg(const T* p) {
  return *p;
}

template <typename T>
void __stwb(T* p, T x) {
  *p = x;
}

#define EMULATION_STRING_(x) #x
#define EMULATION_STRING(x) EMULATION_STRING_(x)
#define EMULATION_SITE __FILE__ ":" EMULATION_STRING(__LINE__)

namespace emulation {

inline int lane() { return (threadIdx.x + blockDim.x * (threadIdx.y + blockDim.y * threadIdx.z)) % kWarp; }

template <typename T>
T shuffle(const char* site, uint32_t mask, T value, int source) {
  static_assert(sizeof(T) <= kOperandBytes);
  WarpOperation operation{site, mask, source, sizeof(T), {}, {}, 0};
  std::memcpy(operation.operand, &value, sizeof(T));
  warp_operation(operation);
  std::memcpy(&value, operation.result, sizeof(T));
  return value;
}

// The lane that `offset` leads to from this one, inside its group of `width`; itself where that leads out of it.
inline int inside(int target, int width) {
  const int group = lane() / width * width;
  return target >= group && target < group + width ? target : lane();
}

inline uint32_t ballot(const char* site, uint32_t mask, bool value) {
  WarpOperation operation{site, mask, lane(), 1, {static_cast<unsigned char>(value)}, {}, 0};
  warp_operation(operation);
  return operation.ballot;
}

}  // namespace emulation

#define __syncthreads() ::emulation::barrier(EMULATION_SITE)
#define __syncwarp(...) ((void)::emulation::ballot(EMULATION_SITE, ::emulation::mask_or_all(__VA_ARGS__), false))
#define __ballot_sync(mask, value) ::emulation::ballot(EMULATION_SITE, mask, (value) != 0)
#define __any_sync(mask, value) (__ballot_sync(mask, value) != 0)
#define __all_sync(mask, value) (__ballot_sync(mask, (value) == 0) == 0)
#define __shfl_sync(mask, value, ...) \
  ::emulation::shuffle(EMULATION_SITE, mask, value, ::emulation::shuffle_indexed(__VA_ARGS__))
#define __shfl_xor_sync(mask, value, ...) \
  ::emulation::shuffle(EMULATION_SITE, mask, value, ::emulation::shuffle_xor(__VA_ARGS__))
#define __shfl_down_sync(mask, value, ...) \
  ::emulation::shuffle(EMULATION_SITE, mask, value, ::emulation::shuffle_down(__VA_ARGS__))
#define __shfl_up_sync(mask, value, ...) \
  ::emulation::shuffle(EMULATION_SITE, mask, value, ::emulation::shuffle_up(__VA_ARGS__))

namespace emulation {

inline uint32_t mask_or_all(uint32_t mask = 0xffffffffu) { return mask; }
inline int shuffle_indexed(int source, int width = kWarp) { return lane() / width * width + source % width; }
inline int shuffle_xor(int bits, int width = kWarp) { return inside(lane() ^ bits, width); }
inline int shuffle_down(int offset, int width = kWarp) { return inside(lane() + offset, width); }
inline int shuffle_up(int offset, int width = kWarp) { return inside(lane() - offset, width); }

}  // namespace emulation

inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int __ffs(int x) { return __builtin_ffs(x); }

using std::max;
using std::min;

#define __CUDACC_VER_MAJOR__ 0
#define __CUDACC_VER_MINOR__ 0

using cudaStream_t = void*;
enum cudaError_t { cudaSuccess = 0, cudaErrorUnknown = 999 };
enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize };

struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  size_t dynamicSmemBytes;
  cudaStream_t stream;
};

namespace emulation {
inline const char* last_error = "no error";
}

inline const char* cudaGetErrorString(cudaError_t) { return emulation::last_error; }
inline cudaError_t cudaRuntimeGetVersion(int* version) {
  *version = 0;
  return cudaSuccess;
}
enum cudaDeviceAttr { cudaDevAttrMaxSharedMemoryPerBlockOptin };
inline cudaError_t cudaGetDevice(int* device) {
  *device = 0;
  return cudaSuccess;
}
inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr, int) {
  *value = emulation_shared_bytes;
  return cudaSuccess;
}
template <typename Kernel>
cudaError_t cudaFuncSetAttribute(Kernel*, cudaFuncAttribute, int) {
  return cudaSuccess;
}

template <typename... Parameters, typename... Arguments>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Parameters...),
                               Arguments&&... arguments) {
  const std::tuple<Parameters...> parameters(std::forward<Arguments>(arguments)...);
  const char* error = emulation::launch(config->gridDim, config->blockDim, config->dynamicSmemBytes,
                                        [&] { std::apply(kernel, parameters); });
  if (error == nullptr) return cudaSuccess;
  emulation::last_error = error;
  return cudaErrorUnknown;
}

// From libtorch_cuda, which the emulation does without.
using CUDAGuardHandle = void*;
static inline AOTITorchError aoti_torch_create_cuda_guard(int32_t, CUDAGuardHandle* guard) {
  *guard = nullptr;
  return 0;
}
static inline AOTITorchError aoti_torch_delete_cuda_guard(CUDAGuardHandle) { return 0; }
static inline AOTITorchError aoti_torch_get_current_cuda_stream(int32_t, void** stream) {
  *stream = nullptr;
  return 0;
}
