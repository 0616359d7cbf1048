// roi_align on the GPU: forward and its transpose, out = A_y X A_x^T.
#include "host.h"
#include "roi_align_backward.h"
#include "roi_align_forward.h"

namespace granvit::cuda {
namespace {

Outputs make_outputs(const RegionArguments& a, const RegionInputs& inputs, const Plan& plan) {
  return {inputs.output_sizes, plan.cell_start, static_cast<int>(a.output_height), static_cast<int>(a.output_width)};
}

Tensor roi_align(const Tensor& tokens, const Tensor& boxes, const Tensor& image_index,
                 const std::optional<Tensor>& grid_sizes, int64_t grid_height, int64_t grid_width,
                 const std::optional<Tensor>& output_sizes, int64_t output_height, int64_t output_width,
                 int64_t sampling_ratio) {
  const char* op = "roi_align";
  const RegionArguments arguments{boxes,      image_index,  grid_sizes,    grid_height,
                                  grid_width, output_sizes, output_height, output_width};
  const bool packed = grid_sizes.has_value();
  const DeviceScope device(tokens);
  const TokenLayout layout = token_layout(op, "tokens", tokens, packed, grid_height * grid_width);
  RegionInputs inputs(op, arguments, tokens, layout.num_images, layout.num_tokens);
  const int64_t count = inputs.regions.count, channels = layout.channels;
  Tensor out = output_sizes ? torch::stable::new_empty(tokens, {inputs.num_cells, channels})
                            : torch::stable::new_empty(tokens, {count, output_height * output_width, channels});
  const PlanMemory memory(tokens, inputs, /*by_image=*/false, /*by_region=*/output_sizes.has_value());
  const Plan& plan = memory.plan;
  inputs.images.token_start = plan.token_start;
  with_dtype(tokens, op, "tokens", [&](auto* element) {
    using T = std::remove_pointer_t<decltype(element)>;
    const bool wide = aligned(tokens.const_data_ptr(), sizeof(T), channels, {layout.row_stride, layout.image_stride});
    const BlockShape shape = block_shape(wide ? channels / kWide<T> : channels);
    int64_t work = count * ((output_height + shape.rows - 1) / shape.rows);
    if (output_sizes) {
      work = 0;
      for (int64_t r = 0; r < count; ++r) work += (inputs.host_output_sizes[2 * r] + shape.rows - 1) / shape.rows;
    }
    if (work == 0 || channels == 0) return;
    if (packed || output_sizes)
      launch_plan(inputs.regions, inputs.images, {shape.rows, kTileWidth},
                  CountRowGroups{inputs.output_sizes, shape.rows}, plan, device.stream);
    RoiAlignArgs<T, const T> args{};
    args.regions = inputs.regions;
    args.images = inputs.images;
    args.outputs = make_outputs(arguments, inputs, plan);
    args.tokens = {static_cast<const T*>(tokens.const_data_ptr()), layout.row_stride, layout.image_stride, packed};
    args.cells = static_cast<T*>(out.mutable_data_ptr());
    args.channels = channels;
    args.sampling_ratio = static_cast<int>(sampling_ratio);
    args.shape = shape;
    args.work_start = plan.work_start;
    with_vector<T>(wide, [&](auto vec) {
      launch(op, roi_align_forward_kernel<T, decltype(vec)::value>, dim3(grid_blocks(op, work), shape.channel_blocks),
             dim3(shape.threads), sizeof(RoiAlignForwardShared), device.stream, args);
    });
  });
  return out;
}

Tensor roi_align_backward(const Tensor& grad, const Tensor& boxes, const Tensor& image_index,
                          const std::optional<Tensor>& grid_sizes, int64_t grid_height, int64_t grid_width,
                          const std::optional<Tensor>& output_sizes, int64_t output_height, int64_t output_width,
                          int64_t sampling_ratio, int64_t num_tokens) {
  const char* op = "roi_align_backward";
  const RegionArguments arguments{boxes,      image_index,  grid_sizes,    grid_height,
                                  grid_width, output_sizes, output_height, output_width};
  const bool packed = grid_sizes.has_value();
  const DeviceScope device(grad);
  expect_on_device(grad, grad, op, "grad");
  const int64_t per_image = grid_height * grid_width, channels = grad.size(grad.dim() - 1);
  const int64_t num_images = packed || per_image == 0 ? 0 : num_tokens / per_image;
  RegionInputs inputs(op, arguments, grad, num_images, num_tokens);
  const Tensor cells = torch::stable::contiguous(grad);
  expect(cells.numel() == inputs.num_cells * channels, op, ": grad: expected ", inputs.num_cells,
         " cells to match output_size");
  Tensor out = packed ? torch::stable::new_empty(cells, {num_tokens, channels})
                      : torch::stable::new_empty(cells, {num_images, per_image, channels});
  const PlanMemory memory(grad, inputs, /*by_image=*/true, /*by_region=*/output_sizes.has_value());
  const Plan& plan = memory.plan;
  inputs.images.token_start = plan.token_start;
  with_dtype(grad, op, "grad", [&](auto* element) {
    using T = std::remove_pointer_t<decltype(element)>;
    const bool wide = aligned(cells.const_data_ptr(), sizeof(T), channels, {channels});
    const BlockShape shape = block_shape(wide ? channels / kWide<T> : channels);
    const Tile tile{shape.rows, kTileWidth};
    const int64_t tiles = inputs.count_tiles(tile);
    if (tiles == 0 || channels == 0) return;
    launch_plan(inputs.regions, inputs.images, tile, CountRowGroups{inputs.output_sizes, shape.rows}, plan,
                device.stream);
    RoiAlignArgs<const T, T> args{};
    args.regions = inputs.regions;
    args.images = inputs.images;
    args.outputs = make_outputs(arguments, inputs, plan);
    args.tokens = {static_cast<T*>(out.mutable_data_ptr()), channels, per_image * channels, packed};
    args.cells = static_cast<const T*>(cells.const_data_ptr());
    args.channels = channels;
    args.sampling_ratio = static_cast<int>(sampling_ratio);
    args.shape = shape;
    args.order = plan.order;
    args.region_start = plan.region_start;
    args.tile_start = plan.tile_start;
    with_vector<T>(wide, [&](auto vec) {
      launch(op, roi_align_backward_kernel<T, decltype(vec)::value>, dim3(grid_blocks(op, tiles), shape.channel_blocks),
             dim3(shape.threads), sizeof(RoiAlignBackwardShared), device.stream, args);
    });
  });
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(granvit, CUDA, m) {
  m.impl("roi_align", TORCH_BOX(&roi_align));
  m.impl("roi_align_backward", TORCH_BOX(&roi_align_backward));
}

}  // namespace granvit::cuda
