// roi_align on the CPU: forward and its transpose.
#include "separable.h"

namespace granvit::cpu {

struct RoiAlignArgs {
  RegionPlan plan;
  TokenView tokens;  // forward: read; backward: the gradient that is written
  void* cells;       // contiguous (num_cells, channels); forward: written; backward: read
  int64_t channels;
  int sampling_ratio;
};

GRANVIT_DECLARE_KERNEL(roi_align_forward, RoiAlignArgs)
GRANVIT_DECLARE_KERNEL(roi_align_backward, RoiAlignArgs)

namespace GRANVIT_ISA {

namespace {

template <typename T>
void forward(const RoiAlignArgs& a) {
  using A = acc_t<T>;
  constexpr int64_t kWidth = 256;
  const int64_t blocks = (a.channels + kWidth - 1) / kWidth;
  parallel_tasks(a.plan.num_regions * blocks, [&](int64_t task, Scratch& scratch) {
    const Region& region = a.plan.regions[task / blocks];
    const ImageGrid& image = a.plan.images[region.image];
    const ChannelBlock block = channel_block<A>(task % blocks, kWidth, a.channels);
    const auto band_y = make_band<A>(region.y0, region.y1, region.out_height, image.height, a.sampling_ratio, scratch);
    const auto band_x = make_band<A>(region.x0, region.x1, region.out_width, image.width, a.sampling_ratio, scratch);
    A* blended = scratch.take<A>(static_cast<int64_t>(band_x.end - band_x.begin) * block.padded);
    for (int p = 0; p < band_y.cells; ++p) {
      mix_rows<T>(a.tokens, image, region.image, block, band_y, band_x, p, blended);
      T* out = static_cast<T*>(a.cells) + (region.first_cell + p * region.out_width) * a.channels + block.begin;
      with_taps(band_x.taps, [&](auto constant) {
        constexpr int kTaps = decltype(constant)::value;
        for (int q = 0; q < band_x.cells; ++q) {
          const A* cell = blended + static_cast<int64_t>(band_x.first[q] - band_x.begin) * block.padded;
          const A* weight = band_x.weight + static_cast<int64_t>(q) * band_x.taps;
          T* to = out + q * a.channels;
          for_each_vec<A>(
              block.size,
              [&](int64_t c) { store(to + c, mix_columns<A, kTaps>(cell, weight, band_x.taps, block.padded, c)); },
              [&](int64_t c, int lanes) {
                store_first(to + c, mix_columns<A, kTaps>(cell, weight, band_x.taps, block.padded, c), lanes);
              });
        }
      });
    }
  });
}

// One task owns a block of channels of one image's gradient and walks the image's regions in order.
template <typename T>
void backward(const RoiAlignArgs& a) {
  using A = acc_t<T>;
  const int64_t width = block_width<A>(a.plan);
  const int64_t blocks = (a.channels + width - 1) / width;
  parallel_tasks(a.plan.num_images * blocks, [&](int64_t task, Scratch& scratch) {
    const int64_t b = task / blocks;
    const ImageGrid& image = a.plan.images[b];
    const ChannelBlock block = channel_block<A>(task % blocks, width, a.channels);
    const int64_t size = image.height * image.width * block.padded;
    A* grad_tokens = scratch.take<A>(size);
    std::fill(grad_tokens, grad_tokens + size, A(0));
    Scratch bands;
    for (int64_t i = a.plan.image_start[b]; i < a.plan.image_start[b + 1]; ++i) {
      const Region& region = a.plan.regions[a.plan.by_image[i]];
      bands.reset();
      const auto band_y = make_band<A>(region.y0, region.y1, region.out_height, image.height, a.sampling_ratio, bands);
      const auto band_x = make_band<A>(region.x0, region.x1, region.out_width, image.width, a.sampling_ratio, bands);
      const int64_t row_size = static_cast<int64_t>(band_x.end - band_x.begin) * block.padded;
      A* blended = bands.take<A>(row_size);
      for (int p = 0; p < band_y.cells; ++p) {
        std::fill(blended, blended + row_size, A(0));
        const T* in =
            static_cast<const T*>(a.cells) + (region.first_cell + p * region.out_width) * a.channels + block.begin;
        with_taps(band_x.taps, [&](auto constant) {
          constexpr int kTaps = decltype(constant)::value;
          for (int q = 0; q < band_x.cells; ++q) {
            A* cell = blended + static_cast<int64_t>(band_x.first[q] - band_x.begin) * block.padded;
            const A* weight = band_x.weight + static_cast<int64_t>(q) * band_x.taps;
            const T* from = in + q * a.channels;
            for_each_vec<A>(
                block.size,
                [&](int64_t c) {
                  spread_columns<A, kTaps>(cell, weight, band_x.taps, block.padded, c, load(from + c));
                },
                [&](int64_t c, int lanes) {
                  spread_columns<A, kTaps>(cell, weight, band_x.taps, block.padded, c, load_first(from + c, lanes));
                });
          }
        });
        spread_rows<A>(blended, band_y, band_x, p, image, block, A(1), grad_tokens);
      }
    }
    store_gradient<T>(grad_tokens, a.tokens, image, b, block);
  });
}

}  // namespace

void roi_align_forward(const RoiAlignArgs& a) {
  with_dtype(a.tokens.dtype, [&](auto t) { forward<decltype(t)>(a); });
}
void roi_align_backward(const RoiAlignArgs& a) {
  with_dtype(a.tokens.dtype, [&](auto t) { backward<decltype(t)>(a); });
}

}  // namespace GRANVIT_ISA
}  // namespace granvit::cpu

#ifdef GRANVIT_HOST
#include "host.h"

namespace granvit::cpu {
namespace {

Tensor roi_align(const Tensor& tokens, const Tensor& boxes, const Tensor& image_index,
                 const std::optional<Tensor>& grid_sizes, int64_t grid_height, int64_t grid_width,
                 const std::optional<Tensor>& output_sizes, int64_t output_height, int64_t output_width,
                 int64_t sampling_ratio) {
  const char* op = "roi_align";
  const HostPlan host(
      op, {boxes, image_index, grid_sizes, grid_height, grid_width, output_sizes, output_height, output_width},
      tokens.size(0));
  RoiAlignArgs args{host.plan(), {}, nullptr, 0, static_cast<int>(sampling_ratio)};
  args.tokens = view_tokens(op, "tokens", tokens, args.plan, grid_sizes.has_value());
  const int64_t channels = tokens.size(tokens.dim() - 1);
  args.channels = channels;
  Tensor out = output_sizes
                   ? torch::stable::new_empty(tokens, {args.plan.num_cells, channels})
                   : torch::stable::new_empty(tokens, {args.plan.num_regions, output_height * output_width, channels});
  advise_huge_pages(out);
  args.cells = out.mutable_data_ptr();
  roi_align_forward_kernel()(args);
  return out;
}

Tensor roi_align_backward(const Tensor& grad, const Tensor& boxes, const Tensor& image_index,
                          const std::optional<Tensor>& grid_sizes, int64_t grid_height, int64_t grid_width,
                          const std::optional<Tensor>& output_sizes, int64_t output_height, int64_t output_width,
                          int64_t sampling_ratio, int64_t num_tokens) {
  const char* op = "roi_align_backward";
  const bool packed = grid_sizes.has_value();
  const int64_t num_images = packed ? 0 : num_tokens / (grid_height * grid_width);
  const HostPlan host(
      op, {boxes, image_index, grid_sizes, grid_height, grid_width, output_sizes, output_height, output_width},
      num_images);
  const int64_t channels = grad.size(grad.dim() - 1);
  const Tensor cells = torch::stable::contiguous(grad);
  expect(cells.numel() == host.plan().num_cells * channels, op, ": grad: expected ", host.plan().num_cells,
         " cells to match output_size");
  Tensor out = packed ? torch::stable::new_empty(cells, {num_tokens, channels})
                      : torch::stable::new_empty(cells, {num_images, grid_height * grid_width, channels});
  RoiAlignArgs args{
      host.plan(), {}, const_cast<void*>(cells.const_data_ptr()), channels, static_cast<int>(sampling_ratio)};
  advise_huge_pages(out);
  args.tokens = view_tokens(op, "grad_tokens", out, args.plan, packed);
  roi_align_backward_kernel()(args);
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(granvit, m) {
  m.def(
      "roi_align(Tensor tokens, Tensor boxes, Tensor image_index, Tensor? grid_sizes, SymInt grid_height, "
      "SymInt grid_width, Tensor? output_sizes, SymInt output_height, SymInt output_width, int sampling_ratio) -> "
      "Tensor");
  m.def(
      "roi_align_backward(Tensor grad, Tensor boxes, Tensor image_index, Tensor? grid_sizes, SymInt grid_height, "
      "SymInt grid_width, Tensor? output_sizes, SymInt output_height, SymInt output_width, int sampling_ratio, "
      "SymInt num_tokens) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(granvit, CPU, m) {
  m.impl("roi_align", TORCH_BOX(&roi_align));
  m.impl("roi_align_backward", TORCH_BOX(&roi_align_backward));
}

}  // namespace granvit::cpu
#endif  // GRANVIT_HOST
