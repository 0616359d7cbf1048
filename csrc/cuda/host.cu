// Checks and views that all CUDA ops share.
#include "host.h"

namespace granvit::cuda {

namespace {

Tensor on_device(const Tensor& sizes, const Tensor& like) {
  return torch::stable::contiguous(torch::stable::to(sizes, like.device(), /*non_blocking=*/true));
}

void expect_sizes(const Tensor& t, const char* op, const char* name) {
  expect(t.dim() == 2 && t.size(1) == 2 && t.scalar_type() == ScalarType::Long, op, ": ", name,
         ": expected an int64 tensor with rows (height, width)");
}

}  // namespace

RegionInputs::RegionInputs(const char* op, const RegionArguments& a, const Tensor& like, int64_t num_images,
                           int64_t num_tokens) {
  constexpr int64_t kLargest = 0x7fffffff;
  if (a.grid_sizes) {
    expect_sizes(*a.grid_sizes, op, "grid_size");
    num_images = a.grid_sizes->size(0);
    if (on_host(*a.grid_sizes)) {
      host_grid_sizes_ = read_integers(*a.grid_sizes, op, "grid_size");
      int64_t tokens = 0;
      for (size_t i = 0; i < host_grid_sizes_.size(); i += 2) {
        const int64_t h = host_grid_sizes_[i], w = host_grid_sizes_[i + 1];
        expect(h >= 1 && w >= 1 && h <= kLargest && w <= kLargest, op,
               ": grid_size: expected heights and widths of at least 1, got (", h, ", ", w, ") for image ", i / 2);
        tokens += h * w;
      }
      expect(tokens == num_tokens, op, ": grid_size: expected grids of ", num_tokens, " tokens in all, got ", tokens);
    }
    grid_sizes_ = on_device(*a.grid_sizes, like);
    images.sizes = grid_sizes_->const_data_ptr<int64_t>();
  } else {
    expect(a.grid_height >= 1 && a.grid_width >= 1 && a.grid_height <= kLargest && a.grid_width <= kLargest, op,
           ": grid_size: expected height and width of at least 1, got (", a.grid_height, ", ", a.grid_width, ")");
    expect(num_images * a.grid_height * a.grid_width == num_tokens, op, ": grid_size: expected ", a.grid_height, " * ",
           a.grid_width, " tokens an image");
    images.height = static_cast<int>(a.grid_height);
    images.width = static_cast<int>(a.grid_width);
  }
  images.count = num_images;
  images.num_tokens = num_tokens;

  const int64_t count = a.boxes.size(0);
  expect(a.boxes.dim() == 2 && a.boxes.size(1) == 4, op, ": boxes: expected shape (R, 4)");
  regions.wide = a.boxes.scalar_type() == ScalarType::Double;
  expect(regions.wide || a.boxes.scalar_type() == ScalarType::Float, op, ": boxes: expected float32");
  expect(a.image_index.dim() == 1 && a.image_index.size(0) == count && a.image_index.scalar_type() == ScalarType::Long,
         op, ": image_index: expected an int64 tensor of shape (", count, ",) to match boxes");
  expect_on_device(a.boxes, like, op, "boxes");
  expect_on_device(a.image_index, like, op, "image_index");
  expect(count == 0 || num_images > 0, op, ": image_index: expected values in [0, 0), got ", count, " regions");
  regions.boxes = a.boxes.const_data_ptr();
  regions.row_stride = a.boxes.stride(0);
  regions.column_stride = a.boxes.stride(1);
  regions.image_index = a.image_index.const_data_ptr<int64_t>();
  regions.index_stride = a.image_index.stride(0);
  regions.count = count;
  regions.num_images = num_images;

  if (a.output_sizes) {
    expect_sizes(*a.output_sizes, op, "output_size");
    expect(a.output_sizes->size(0) == count, op, ": output_size: expected shape (", count, ", 2) to match boxes");
    // The number of cells is the output's shape. Sizes that are on the device have to be waited for, this once.
    const Tensor host = torch::stable::to(*a.output_sizes, torch::stable::Device(torch::headeronly::DeviceType::CPU));
    host_output_sizes = read_integers(host, op, "output_size");
    for (int64_t r = 0; r < count; ++r) {
      const int64_t h = host_output_sizes[2 * r], w = host_output_sizes[2 * r + 1];
      expect(h >= 1 && w >= 1 && h <= kLargest && w <= kLargest, op,
             ": output_size: expected heights and widths of at least 1, got (", h, ", ", w, ") for region ", r);
      num_cells += h * w;
    }
    output_sizes_ = on_device(*a.output_sizes, like);
    output_sizes = output_sizes_->const_data_ptr<int64_t>();
  } else {
    expect(a.output_height >= 1 && a.output_width >= 1 && a.output_height <= kLargest && a.output_width <= kLargest, op,
           ": output_size: expected height and width of at least 1, got (", a.output_height, ", ", a.output_width, ")");
    num_cells = count * a.output_height * a.output_width;
  }
}

int64_t RegionInputs::count_tiles(Tile tile) const {
  if (images.sizes == nullptr) return images.count * tile.count(images.height, images.width);
  int64_t tiles = 0;
  for (size_t i = 0; i < host_grid_sizes_.size(); i += 2)
    tiles += tile.count(host_grid_sizes_[i], host_grid_sizes_[i + 1]);
  if (!host_grid_sizes_.empty()) return tiles;
  // An image of h x w tokens has at most (h / H + 1)(w / W + 1) tiles, and h, w <= h w.
  const int64_t tokens = images.num_tokens;
  return tokens / (tile.height * tile.width) + tokens / tile.height + tokens / tile.width + images.count;
}

PlanMemory::PlanMemory(const Tensor& like, const RegionInputs& inputs, bool by_image, bool by_region) {
  const int64_t r = inputs.regions.count, b = inputs.images.count;
  const bool packed = inputs.images.sizes != nullptr;
  const int64_t size = (by_image ? r + b + 1 : 0) + (packed ? 2 * (b + 1) : 0) + (by_region ? 2 * (r + 1) : 0);
  if (size == 0) return;
  memory_ = torch::stable::new_empty(like, {size}, ScalarType::Long);
  auto* next = static_cast<int64_t*>(memory_->mutable_data_ptr());
  const auto take = [&](int64_t count) { return std::exchange(next, next + count); };
  if (by_image) {
    plan.order = take(r);
    plan.region_start = take(b + 1);
  }
  if (packed) {
    plan.token_start = take(b + 1);
    plan.tile_start = take(b + 1);
  }
  if (by_region) {
    plan.cell_start = take(r + 1);
    plan.work_start = take(r + 1);
  }
}

TokenLayout token_layout(const char* op, const char* name, const Tensor& tokens, bool packed, int64_t per_image) {
  const int64_t lead = packed ? 1 : 2;
  expect(tokens.dim() > lead, op, ": ", name, ": expected at least ", lead + 1, " dimensions, got ", tokens.dim());
  expect(packed || tokens.size(1) == per_image, op, ": ", name, ": expected ", per_image, " tokens an image, got ",
         packed ? 0 : tokens.size(1));
  int64_t inner = 1;
  for (int64_t d = tokens.dim() - 1; d >= lead; --d) {
    expect(tokens.size(d) <= 1 || tokens.stride(d) == inner, op, ": ", name,
           ": expected contiguous dimensions after the tokens");
    inner *= tokens.size(d);
  }
  expect_on_device(tokens, tokens, op, name);
  const int64_t images = packed ? 0 : tokens.size(0);
  const int64_t count = packed ? tokens.size(0) : images * tokens.size(1);
  return {inner, tokens.stride(lead - 1), packed ? 0 : tokens.stride(0), images, count};
}

}  // namespace granvit::cuda
