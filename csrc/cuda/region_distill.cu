// region_distill on the GPU: loss and the student's gradient from one reading of the teacher (cosine: two).
#include "host.h"
#include "region_distill_kernel.h"

namespace granvit::cuda {
namespace {

constexpr const char* kOp = "region_distill_loss";
constexpr Tile kTiles[] = {{32, 32}, {16, 32}, {16, 16}, {8, 16}};  // of the gradient, as shared memory allows
constexpr int64_t kBlocksWanted = 2048;  // that keep every multiprocessor of a large GPU busy

// The largest tile whose blocks fit the current device.
template <typename T>
Tile largest_tile() {
  int device = 0, bytes = 0;
  check(cudaGetDevice(&device), kOp);
  check(cudaDeviceGetAttribute(&bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device), kOp);
  for (const Tile tile : kTiles)
    if (DistillShared<T>::bytes(tile, true) <= static_cast<size_t>(bytes)) return tile;
  throw std::runtime_error(std::string(kOp) + ": this device's shared memory is too small for the CUDA kernels");
}

// A call's tensors, checked. The teacher is copied only where its channels do not lie side by side.
struct Call {
  Call(const Tensor& student_in, const Tensor& teacher_in, const RegionArguments& a, const std::string& loss,
       int64_t sampling_ratio_in)
      : device(student_in),
        student(student_in),
        teacher(teacher_in.stride(teacher_in.dim() - 1) == 1 ? teacher_in : torch::stable::contiguous(teacher_in)),
        arguments(a),
        packed(a.grid_sizes.has_value()),
        packed_cells(a.output_sizes.has_value()),
        layout(token_layout(kOp, "student", student, packed, a.grid_height * a.grid_width)),
        inputs(kOp, a, student, layout.num_images, layout.num_tokens),
        cosine(loss == "cosine"),
        sampling_ratio(static_cast<int>(sampling_ratio_in)) {
    expect(cosine || loss == "mse", kOp, ": loss: expected 'mse' or 'cosine', got '", loss, "'");
    expect_on_device(teacher, student, kOp, "teacher");
    expect(teacher.scalar_type() == student.scalar_type(), kOp, ": teacher: expected the dtype of student");
    expect(teacher.dim() == (packed_cells ? 2 : 3) && teacher.size(teacher.dim() - 1) == layout.channels &&
               teacher.numel() == inputs.num_cells * layout.channels &&
               (packed_cells || teacher.size(0) == inputs.regions.count),
           kOp, ": teacher: expected ", inputs.num_cells, " cells of ", layout.channels,
           " channels to match boxes, output_size and student");
    const int64_t count = inputs.regions.count;
    blocks = count * blocks_along(a.output_height) * blocks_along(a.output_width);
    if (packed_cells) {
      blocks = 0;
      for (int64_t r = 0; r < count; ++r)
        blocks += blocks_along(inputs.host_output_sizes[2 * r]) * blocks_along(inputs.host_output_sizes[2 * r + 1]);
    }
    terms = cosine ? 1 : static_cast<double>(layout.channels);
  }

  // Without regions, cells or channels there is nothing to compute.
  bool empty() const { return blocks == 0 || layout.channels == 0; }

  // Launches what the loss of every block of cells (`partial`) and the gradient of the student need.
  void run(const Shares& shares, Tensor* grad, bool with_loss) {
    with_dtype(student, kOp, "student", [&](auto* element) {
      using T = std::remove_pointer_t<decltype(element)>;
      const Tile tile = grad != nullptr ? largest_tile<T>() : kTiles[0];
      memory.emplace(student, inputs, /*by_image=*/grad != nullptr, /*by_region=*/packed_cells);
      inputs.images.token_start = memory->plan.token_start;
      if (packed || packed_cells || grad != nullptr)
        launch_plan(inputs.regions, inputs.images, tile, CountCellBlocks{inputs.output_sizes}, memory->plan,
                    device.stream);
      launch_passes(make_args<T>(tile, shares, grad), grad != nullptr, with_loss);
    });
  }

  // Each region's mean, or with `mean` their mean, from `partial`.
  void sum(const Shares& shares, bool mean, const Tensor& value) {
    const int64_t count = inputs.regions.count;
    const Tensor means = torch::stable::new_empty(student, {count}, ScalarType::Double);
    const SumArgs args{inputs.regions,
                       inputs.images,
                       outputs(),
                       shares,
                       memory->plan.work_start,
                       static_cast<const double*>(partial->const_data_ptr()),
                       parts,
                       terms,
                       static_cast<double*>(means.mutable_data_ptr()),
                       static_cast<float*>(value.mutable_data_ptr())};
    constexpr size_t kSharedBytes = kSumThreads / 32 * sizeof(double);
    launch(kOp, region_distill_means_kernel, dim3(grid_blocks(kOp, count)), dim3(kSumThreads), kSharedBytes,
           device.stream, args, !mean);
    if (mean) launch(kOp, region_distill_mean_kernel, dim3(1), dim3(kSumThreads), kSharedBytes, device.stream, args);
  }

  DeviceScope device;
  const Tensor& student;
  Tensor teacher;
  RegionArguments arguments;
  bool packed, packed_cells;
  TokenLayout layout;
  RegionInputs inputs;
  bool cosine;
  int sampling_ratio;
  int64_t blocks;  // of cells
  double terms;    // of a cell in its region's mean
  std::optional<PlanMemory> memory;
  std::optional<Tensor> partial;
  int parts = 0;

 private:
  Outputs outputs() const {
    return {inputs.output_sizes, memory->plan.cell_start, static_cast<int>(arguments.output_height),
            static_cast<int>(arguments.output_width)};
  }

  template <typename T>
  DistillArgs<T> make_args(Tile tile, const Shares& shares, Tensor* grad) const {
    const Plan& plan = memory->plan;
    DistillArgs<T> args{};
    args.regions = inputs.regions;
    args.images = inputs.images;
    args.outputs = outputs();
    args.student = {static_cast<const T*>(student.const_data_ptr()), layout.row_stride, layout.image_stride, packed};
    args.teacher = static_cast<const T*>(teacher.const_data_ptr());
    args.teacher_row_stride = teacher.stride(packed_cells ? 0 : 1);
    args.teacher_region_stride = packed_cells ? 0 : teacher.stride(0);
    args.channels = layout.channels;
    args.sampling_ratio = sampling_ratio;
    args.wide =
        aligned(args.student.data, sizeof(T), layout.channels, {layout.row_stride, layout.image_stride}) &&
        aligned(args.teacher, sizeof(T), layout.channels, {args.teacher_row_stride, args.teacher_region_stride});
    args.order = plan.order;
    args.region_start = plan.region_start;
    args.tile_start = plan.tile_start;
    args.work_start = plan.work_start;
    args.channel_blocks = static_cast<int>((layout.channels + kItemChannels<T> - 1) / kItemChannels<T>);
    args.tile = tile;
    if (grad != nullptr) {
      args.grad = grad->mutable_data_ptr();
      args.grad_float = grad->scalar_type() == ScalarType::Float;
    }
    args.shares = shares;
    args.terms = terms;
    args.scale = 1 / (static_cast<double>(inputs.num_cells) * terms);
    return args;
  }

  template <typename T>
  void launch_passes(DistillArgs<T> args, bool with_grad, bool with_loss) {
    std::optional<Tensor> slope;
    const auto new_partial = [&](int64_t parts_of_a_block) {
      parts = args.parts = static_cast<int>(parts_of_a_block);
      if (!with_loss) return;
      partial = torch::stable::new_empty(student, {blocks * parts}, ScalarType::Double);
      args.partial = static_cast<double*>(partial->mutable_data_ptr());
    };
    if (cosine) {
      new_partial(kWorkers<T>);
      if (with_grad) {
        slope = torch::stable::new_empty(student, {inputs.num_cells, 2}, ScalarType::Float);
        args.slope = static_cast<float2*>(slope->mutable_data_ptr());
      }
      launch_by_cells<T, DistillPass::kProducts>(args, 1);
      if (with_grad) launch_by_tiles<T, DistillPass::kCosineGrad>(args);
    } else if (with_grad) {
      new_partial((layout.channels + kWarpChannels - 1) / kWarpChannels);
      launch_by_tiles<T, DistillPass::kSquaresAndGrad>(args);
    } else {
      // From shapes alone, so that the same call always gives the same bits.
      const int64_t groups = std::clamp<int64_t>(kBlocksWanted / blocks, 1, args.channel_blocks);
      const int64_t channel_blocks = (args.channel_blocks + groups - 1) / groups;
      const int64_t used = (args.channel_blocks + channel_blocks - 1) / channel_blocks;
      new_partial(used * kWorkers<T>);
      args.block_channels = static_cast<int>(channel_blocks * kItemChannels<T>);
      launch_by_cells<T, DistillPass::kSquares>(args, used);
    }
  }

  template <typename T, DistillPass kPass>
  void launch_by_cells(DistillArgs<T> args, int64_t groups) const {
    if (kPass == DistillPass::kProducts) args.block_channels = args.channel_blocks * kItemChannels<T>;
    expect(groups <= 65535, kOp, ": student: ", layout.channels, " channels are more than a launch can have");
    launch(kOp, region_distill_by_cells_kernel<T, kPass>, dim3(grid_blocks(kOp, blocks), static_cast<unsigned>(groups)),
           dim3(kDistillThreads<T>), DistillShared<T>::bytes(args.tile, false), device.stream, args);
  }

  template <typename T, DistillPass kPass>
  void launch_by_tiles(const DistillArgs<T>& args) const {
    launch(kOp, region_distill_by_tiles_kernel<T, kPass>,
           dim3(grid_blocks(kOp, inputs.count_tiles(args.tile) * args.channel_blocks)), dim3(kDistillThreads<T>),
           DistillShared<T>::bytes(args.tile, true), device.stream, args);
  }
};

std::tuple<Tensor, Tensor> region_distill(const Tensor& student, const Tensor& teacher, const Tensor& boxes,
                                          const Tensor& image_index, const std::optional<Tensor>& grid_sizes,
                                          int64_t grid_height, int64_t grid_width,
                                          const std::optional<Tensor>& output_sizes, int64_t output_height,
                                          int64_t output_width, const std::optional<Tensor>& weight,
                                          const std::string& loss, const std::string& reduction, int64_t sampling_ratio,
                                          bool with_grad) {
  Call call(student, teacher,
            {boxes, image_index, grid_sizes, grid_height, grid_width, output_sizes, output_height, output_width}, loss,
            sampling_ratio);
  const int64_t count = call.inputs.regions.count;
  const bool mean = reduction == "mean";
  expect(mean || reduction == "none", kOp, ": reduction: expected 'mean' or 'none', got '", reduction, "'");
  expect(!weight || (weight->scalar_type() == ScalarType::Double && weight->dim() == 1 && weight->size(0) == count),
         kOp, ": weight: expected float64 of shape (", count, ",)");
  if (weight) expect_on_device(*weight, student, kOp, "weight");
  const torch::headeronly::IntHeaderOnlyArrayRef scalar(nullptr, static_cast<size_t>(0));
  Tensor value = mean ? torch::stable::new_empty(student, scalar, ScalarType::Float)
                      : torch::stable::new_empty(student, {count}, ScalarType::Float);
  Tensor grad = torch::stable::new_empty(student, {0});
  with_grad = with_grad && mean;
  if (with_grad) {
    const bool half = student.scalar_type() == ScalarType::Half;
    grad = torch::stable::new_empty(student, student.sizes(), half ? ScalarType::Float : student.scalar_type());
  }
  if (call.empty()) {
    torch::stable::zero_(value);
    torch::stable::zero_(grad);
    return {value, grad};
  }
  Shares shares{};
  if (weight) shares = {weight->const_data_ptr(), true, true, weight->stride(0)};
  call.run(shares, with_grad ? &grad : nullptr, /*with_loss=*/true);
  call.sum(shares, mean, value);
  return {value, grad};
}

Tensor region_distill_backward(const Tensor& grad_loss, const Tensor& student, const Tensor& teacher,
                               const Tensor& boxes, const Tensor& image_index, const std::optional<Tensor>& grid_sizes,
                               int64_t grid_height, int64_t grid_width, const std::optional<Tensor>& output_sizes,
                               int64_t output_height, int64_t output_width, const std::string& loss,
                               int64_t sampling_ratio) {
  Call call(student, teacher,
            {boxes, image_index, grid_sizes, grid_height, grid_width, output_sizes, output_height, output_width}, loss,
            sampling_ratio);
  const int64_t count = call.inputs.regions.count;
  const bool wide = grad_loss.scalar_type() == ScalarType::Double;
  expect(grad_loss.dim() == 1 && grad_loss.size(0) == count && (wide || grad_loss.scalar_type() == ScalarType::Float),
         kOp, ": gradient: expected float32 of shape (", count, ",)");
  expect_on_device(grad_loss, student, kOp, "gradient");
  Tensor grad = torch::stable::new_empty(student, student.sizes());
  if (call.empty())
    torch::stable::zero_(grad);
  else
    call.run({grad_loss.const_data_ptr(), wide, false, grad_loss.stride(0)}, &grad, /*with_loss=*/false);
  return grad;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(granvit, CUDA, m) {
  m.impl("region_distill", TORCH_BOX(&region_distill));
  m.impl("region_distill_backward", TORCH_BOX(&region_distill_backward));
}

}  // namespace granvit::cuda
