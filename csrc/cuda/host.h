// The host side of a CUDA op: from stable-ABI tensors to what kernels take, with everything checked that can be checked
// without waiting for the device.
#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/headeronly/util/shim_utils.h>

#include <optional>
#include <string>
#include <vector>

#include "../arguments.h"
#include "plan.h"
#include "vec.h"

namespace granvit::cuda {

#ifdef GRANVIT_EMULATION
constexpr auto kDeviceType = torch::headeronly::DeviceType::CPU;
inline bool on_host(const Tensor& t) { return t.is_cpu() && !emulation_integers_on_device; }
#else
constexpr auto kDeviceType = torch::headeronly::DeviceType::CUDA;
inline bool on_host(const Tensor& t) { return t.is_cpu(); }
#endif

// Makes a tensor's device the current one while it lives; `stream` is torch's current stream there.
class DeviceScope {
 public:
  explicit DeviceScope(const Tensor& t) {
    void* current = nullptr;
    TORCH_ERROR_CODE_CHECK(aoti_torch_create_cuda_guard(t.get_device_index(), &guard_));
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(t.get_device_index(), &current));
    stream = static_cast<cudaStream_t>(current);
  }
  ~DeviceScope() { aoti_torch_delete_cuda_guard(guard_); }
  DeviceScope(const DeviceScope&) = delete;
  DeviceScope& operator=(const DeviceScope&) = delete;

  cudaStream_t stream = nullptr;

 private:
  CUDAGuardHandle guard_ = nullptr;
};

// Calls body with a null pointer to the element type.
template <typename Body>
void with_dtype(const Tensor& t, const char* op, const char* name, Body&& body) {
  switch (t.scalar_type()) {
    case ScalarType::Float:
      return body(static_cast<float*>(nullptr));
    case ScalarType::BFloat16:
      return body(static_cast<__nv_bfloat16*>(nullptr));
    case ScalarType::Half:
      return body(static_cast<__half*>(nullptr));
    default:
      value_error(op, ": ", name, ": expected float32, bfloat16 or float16");
  }
}

inline void expect_on_device(const Tensor& t, const Tensor& like, const char* op, const char* name) {
  const auto device = t.device();
  expect(device.type() == kDeviceType && device.index() == like.device().index(), op, ": ", name,
         ": expected a tensor on the device of the tokens");
}

// Images, regions and output grids of a call, and the memory behind their views.
class RegionInputs {
 public:
  // num_images is needed for dense tokens only; num_tokens is what the token tensor holds.
  RegionInputs(const char* op, const RegionArguments& a, const Tensor& like, int64_t num_images, int64_t num_tokens);

  // Tiles of all images: exact, or at least as many where the grids are on the device.
  int64_t count_tiles(Tile tile) const;

  Regions regions{};
  Images images{};
  const int64_t* output_sizes = nullptr;   // (R, 2) on the device, or null where all are output_height x output_width
  std::vector<int64_t> host_output_sizes;  // the same on the host
  int64_t num_cells = 0;

 private:
  std::vector<int64_t> host_grid_sizes_;
  std::optional<Tensor> grid_sizes_, output_sizes_;
};

// A plan's tables in one allocation.
class PlanMemory {
 public:
  PlanMemory(const Tensor& like, const RegionInputs& inputs, bool by_image, bool by_region);
  Plan plan{};

 private:
  std::optional<Tensor> memory_;
};

// Dense (B, N, C...) or packed (T, C...) tokens with contiguous trailing dimensions, as checked by view_tokens.
struct TokenLayout {
  int64_t channels;  // of all trailing dimensions
  int64_t row_stride;
  int64_t image_stride;
  int64_t num_images;  // dense only
  int64_t num_tokens;
};
TokenLayout token_layout(const char* op, const char* name, const Tensor& tokens, bool packed, int64_t per_image);

// Whether rows of `channels` elements can be read and written 16 bytes at a time.
inline bool aligned(const void* data, int64_t element_size, int64_t channels, std::initializer_list<int64_t> strides) {
  bool whole = reinterpret_cast<uintptr_t>(data) % 16 == 0 && channels * element_size % 16 == 0;
  for (const int64_t stride : strides) whole = whole && stride * element_size % 16 == 0;
  return whole;
}

// Calls body(std::integral_constant<int, kVec>) with the widest access that all rows allow.
template <typename T, typename Body>
void with_vector(bool wide, Body&& body) {
  if (wide)
    body(std::integral_constant<int, kWide<T>>{});
  else
    body(std::integral_constant<int, 1>{});
}

inline unsigned grid_blocks(const char* op, int64_t blocks) {
  expect(blocks <= 0x7fffffff, op, ": ", blocks, " blocks are more than a launch can have");
  return static_cast<unsigned>(blocks);
}

}  // namespace granvit::cuda
