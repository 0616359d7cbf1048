// The host side of an op: from stable-ABI tensors to a RegionPlan, with every value checked. Only for GRANVIT_HOST
// code.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <cmath>
#include <optional>
#include <sstream>
#include <stdexcept>
#include <string>
#include <vector>

#include "regions.h"

namespace granvit::cpu {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// Python turns an error with this prefix into a ValueError; see granvit/ops/_dispatch.py.
constexpr const char* kValueError = "granvit value error: ";

template <typename... Parts>
[[noreturn]] void value_error(const Parts&... parts) {
  std::ostringstream message;
  message << kValueError;
  (message << ... << parts);
  throw std::runtime_error(message.str());
}

template <typename... Parts>
void expect(bool condition, const Parts&... parts) {
  if (!condition) value_error(parts...);
}

inline DType dtype_of(const Tensor& t, const char* op, const char* name) {
  switch (t.scalar_type()) {
    case ScalarType::Float:
      return DType::kFloat32;
    case ScalarType::Double:
      return DType::kFloat64;
    case ScalarType::BFloat16:
      return DType::kBFloat16;
    case ScalarType::Half:
      return DType::kFloat16;
    default:
      value_error(op, ": ", name, ": expected float32, float64, bfloat16 or float16");
  }
}

// The integers of a small host tensor of any strides.
inline std::vector<int64_t> read_integers(const Tensor& t, const char* op, const char* name) {
  expect(t.is_cpu(), op, ": ", name, ": expected a tensor on the CPU");
  const bool wide = t.scalar_type() == ScalarType::Long;
  expect(wide || t.scalar_type() == ScalarType::Int, op, ": ", name, ": expected int32 or int64");
  const int64_t columns = t.dim() == 2 ? t.size(1) : 1;
  const int64_t* wide_data = wide ? t.const_data_ptr<int64_t>() : nullptr;
  const int32_t* narrow_data = wide ? nullptr : t.const_data_ptr<int32_t>();
  std::vector<int64_t> values(static_cast<size_t>(t.numel()));
  for (int64_t i = 0; i < static_cast<int64_t>(values.size()); ++i) {
    const int64_t offset = t.dim() == 2 ? (i / columns) * t.stride(0) + (i % columns) * t.stride(1) : i * t.stride(0);
    values[i] = wide ? wide_data[offset] : narrow_data[offset];
  }
  return values;
}

// The arguments that describe images and regions, as every op's schema passes them:
// grid_sizes (B, 2) for packed tokens, else one (grid_height, grid_width); likewise for the output grids.
struct RegionArguments {
  const Tensor& boxes;
  const Tensor& image_index;
  const std::optional<Tensor>& grid_sizes;
  int64_t grid_height;
  int64_t grid_width;
  const std::optional<Tensor>& output_sizes;
  int64_t output_height;
  int64_t output_width;
};

// A RegionPlan and the memory behind it.
class HostPlan {
 public:
  // num_images is needed for dense tokens only.
  HostPlan(const char* op, const RegionArguments& a, int64_t num_images);
  const RegionPlan& plan() const { return plan_; }

 private:
  std::vector<ImageGrid> images_;
  std::vector<Region> regions_;
  std::vector<int64_t> by_image_;
  std::vector<int64_t> image_start_;
  RegionPlan plan_;
};

// Dense (B, N, ...) or packed (T, ...) tokens whose trailing dimensions are contiguous; checked against the plan.
TokenView view_tokens(const char* op, const char* name, const Tensor& tokens, const RegionPlan& plan, bool packed);

// Asks for huge pages behind a large tensor that was just made. The allocator returns memory of tens of megabytes to
// the system every time, and taking it back in pages of 4 KiB costs several times what writing it does.
void advise_huge_pages(const Tensor& t);

}  // namespace granvit::cpu
