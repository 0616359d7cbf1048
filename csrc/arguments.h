// What the host sides of CPU and CUDA ops share: errors that name an argument, and the arguments that describe images
// and regions.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <optional>
#include <sstream>
#include <stdexcept>
#include <vector>

namespace granvit {

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

}  // namespace granvit
