// The host side of an op: from stable-ABI tensors to a RegionPlan, with every value checked. Only for GRANVIT_HOST
// code.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <cmath>
#include <string>
#include <vector>

#include "../arguments.h"
#include "regions.h"

namespace granvit::cpu {

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
