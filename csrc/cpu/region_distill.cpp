// The region self-distillation loss on the CPU: student gradient and loss in one pass over the teacher (cosine: two).
//
// One task owns a block of channels of one image. It walks the image's regions row by row: blend the student's rows,
// blend columns into a cell, subtract the teacher, spread the difference back over the columns and, a row at a time,
// over the gradient. Neither the aligned map nor its gradient is larger than one row of one block.
#include <cmath>

#include "separable.h"

namespace granvit::cpu {

// The teacher's cells (R, h*w, C), or packed (sum of h*w, C), with any row stride.
struct CellView {
  const void* data;
  int64_t region_stride;
  int64_t row_stride;
  bool packed;

  template <typename T>
  const T* row(const Region& region, int64_t region_index, int64_t cell) const {
    const T* base = static_cast<const T*>(data);
    return packed ? base + (region.first_cell + cell) * row_stride
                  : base + region_index * region_stride + cell * row_stride;
  }
};

struct RegionDistillArgs {
  RegionPlan plan;
  TokenView student;
  CellView teacher;
  int64_t channels;
  int sampling_ratio;
  bool cosine;
  const double* share;  // (R): how much a region's mean counts in the loss; read for the gradient only
  double* region_mean;  // (R): written
  void* grad;           // contiguous, laid out like the tokens; null where no gradient is wanted
  DType grad_dtype;
};

GRANVIT_DECLARE_KERNEL(region_distill, RegionDistillArgs)

namespace GRANVIT_ISA {

namespace {

constexpr double kNormFloor = 1e-8;  // as torch.cosine_similarity

// What a pass computes for every cell.
enum class Pass {
  kSquares,          // sum of squared differences
  kSquaresAndGrad,   // the same, and the gradient
  kProducts,         // s.t, s.s and t.t, which the cosine is made of
  kGradFromFactors,  // the gradient a * s + b * t with known factors a, b of each cell
};

// Sums of products of one cell over one block of channels, or the two factors of its gradient.
template <typename A>
struct CellNumbers {
  A dot;
  A student;
  A teacher;
};

// The next row of the teacher is asked for while this one is worked on: its rows lie a token apart, too far for the
// processor's own prefetcher.
template <typename T>
GRANVIT_INLINE void prefetch(const T* row, int64_t bytes) {
  for (int64_t i = 0; i < bytes; i += 64) __builtin_prefetch(reinterpret_cast<const char*>(row) + i);
}

template <typename T, Pass kPass>
struct RegionPass {
  using A = acc_t<T>;
  static constexpr bool kWantsGrad = kPass == Pass::kSquaresAndGrad || kPass == Pass::kGradFromFactors;

  const RegionDistillArgs& a;
  const ImageGrid& image;
  const ChannelBlock& block;
  CellNumbers<A>* numbers;  // of all cells of this block of channels; cosine only

  // Returns the region's sum of squares over the block; adds its gradient, times `scale`, to grad_tokens.
  double run(int64_t index, A scale, A* grad_tokens, Scratch& scratch) const {
    const Region& region = a.plan.regions[index];
    const auto band_y = make_band<A>(region.y0, region.y1, region.out_height, image.height, a.sampling_ratio, scratch);
    const auto band_x = make_band<A>(region.x0, region.x1, region.out_width, image.width, a.sampling_ratio, scratch);
    const int64_t row_size = static_cast<int64_t>(band_x.end - band_x.begin) * block.padded;
    A* blended = scratch.take<A>(row_size);
    A* grad_row = kWantsGrad ? scratch.take<A>(row_size) : nullptr;
    double total = 0;
    for (int p = 0; p < band_y.cells; ++p) {
      mix_rows<T>(a.student, image, region.image, block, band_y, band_x, p, blended);
      if (kWantsGrad) std::fill(grad_row, grad_row + row_size, A(0));
      Vec<A> sum{};
      with_taps(band_x.taps, [&](auto constant) {
        for (int q = 0; q < band_x.cells; ++q) {
          const int64_t cell = static_cast<int64_t>(p) * band_x.cells + q;
          const T* teacher = a.teacher.row<T>(region, index, cell) + block.begin;
          if (p + 1 < band_y.cells)
            prefetch(a.teacher.row<T>(region, index, cell + band_x.cells) + block.begin, block.size * sizeof(T));
          CellNumbers<A>* cell_numbers = numbers == nullptr ? nullptr : numbers + region.first_cell + cell;
          cell_pass<decltype(constant)::value>(band_x, q, blended, grad_row, teacher, cell_numbers, sum);
        }
      });
      // Row by row into a double: the sum over a region keeps its last bits.
      if (kPass == Pass::kSquares || kPass == Pass::kSquaresAndGrad) total += sum_lanes<A>(sum);
      if (kWantsGrad) spread_rows<A>(grad_row, band_y, band_x, p, image, block, scale, grad_tokens);
    }
    return total;
  }

  template <int kTaps>
  GRANVIT_INLINE void cell_pass(const Band<A>& band, int q, const A* blended, A* grad_row, const T* teacher,
                                CellNumbers<A>* cell_numbers, Vec<A>& sum) const {
    const int64_t offset = static_cast<int64_t>(band.first[q] - band.begin) * block.padded;
    const A* weight = band.weight + static_cast<int64_t>(q) * band.taps;
    Vec<A> dot{}, student2{}, teacher2{};
    const auto at = [&](int64_t c, Vec<A> t) {
      const Vec<A> s = mix_columns<A, kTaps>(blended + offset, weight, band.taps, block.padded, c);
      Vec<A> gradient{};
      if constexpr (kPass == Pass::kSquares || kPass == Pass::kSquaresAndGrad) {
        gradient = s - t;
        sum += gradient * gradient;
      } else if constexpr (kPass == Pass::kProducts) {
        dot += s * t;
        student2 += s * s;
        teacher2 += t * t;
      } else {
        gradient = splat<A>(cell_numbers->student) * s + splat<A>(cell_numbers->teacher) * t;
      }
      if constexpr (kWantsGrad)
        spread_columns<A, kTaps>(grad_row + offset, weight, band.taps, block.padded, c, gradient);
    };
    for_each_vec<A>(
        block.size, [&](int64_t c) { at(c, load(teacher + c)); },
        [&](int64_t c, int lanes) { at(c, load_first(teacher + c, lanes)); });
    if constexpr (kPass == Pass::kProducts)
      *cell_numbers = {sum_lanes<A>(dot), sum_lanes<A>(student2), sum_lanes<A>(teacher2)};
  }
};

// Runs one pass over all images and blocks of channels. `sums` (blocks, R) receives each region's sum of squares.
template <typename T, Pass kPass>
void sweep(const RegionDistillArgs& a, int64_t width, double* sums, CellNumbers<acc_t<T>>* numbers,
           bool numbers_per_block) {
  using A = acc_t<T>;
  const int64_t blocks = (a.channels + width - 1) / width;
  constexpr bool kWantsGrad = RegionPass<T, kPass>::kWantsGrad;
  parallel_tasks(a.plan.num_images * blocks, [&](int64_t task, Scratch& scratch) {
    const int64_t b = task / blocks;
    const int64_t index = task % blocks;
    const ImageGrid& image = a.plan.images[b];
    const ChannelBlock block = channel_block<A>(index, width, a.channels);
    A* grad_tokens = nullptr;
    if (kWantsGrad) {
      const int64_t size = image.height * image.width * block.padded;
      grad_tokens = scratch.take<A>(size);
      std::fill(grad_tokens, grad_tokens + size, A(0));
    }
    CellNumbers<A>* own = numbers == nullptr ? nullptr : numbers + (numbers_per_block ? index * a.plan.num_cells : 0);
    const RegionPass<T, kPass> pass{a, image, block, own};
    Scratch region_scratch;
    for (int64_t i = a.plan.image_start[b]; i < a.plan.image_start[b + 1]; ++i) {
      const int64_t r = a.plan.by_image[i];
      const Region& region = a.plan.regions[r];
      const double cells = static_cast<double>(region.out_height * region.out_width);
      // mean of squares: 2 (s - t) / (cells * C); cosine: the factors already hold the rest.
      const double scale = kPass == Pass::kSquaresAndGrad ? 2 / (cells * a.channels) : 1 / cells;
      region_scratch.reset();
      const double sum =
          pass.run(r, kWantsGrad ? static_cast<A>(scale * a.share[r]) : A(0), grad_tokens, region_scratch);
      if (sums != nullptr) sums[index * a.plan.num_regions + r] = sum;
    }
    if (!kWantsGrad) return;
    TokenView grad{a.grad, a.grad_dtype, a.channels, image.height * image.width * a.channels, a.student.packed};
    if constexpr (std::is_same_v<T, f16>) {
      if (a.grad_dtype == DType::kFloat32) return store_gradient<float>(grad_tokens, grad, image, b, block);
    }
    store_gradient<T>(grad_tokens, grad, image, b, block);
  });
}

template <typename T>
void squares(const RegionDistillArgs& a) {
  using A = acc_t<T>;
  const int64_t width = block_width<A>(a.plan);
  const int64_t blocks = (a.channels + width - 1) / width;
  std::vector<double> sums(static_cast<size_t>(blocks * a.plan.num_regions));
  if (a.grad != nullptr)
    sweep<T, Pass::kSquaresAndGrad>(a, width, sums.data(), nullptr, false);
  else
    sweep<T, Pass::kSquares>(a, width, sums.data(), nullptr, false);
  for (int64_t r = 0; r < a.plan.num_regions; ++r) {
    const Region& region = a.plan.regions[r];
    double sum = 0;
    for (int64_t block = 0; block < blocks; ++block) sum += sums[block * a.plan.num_regions + r];
    a.region_mean[r] = sum / static_cast<double>(region.out_height * region.out_width * a.channels);
  }
}

template <typename T>
void cosines(const RegionDistillArgs& a) {
  using A = acc_t<T>;
  const int64_t width = block_width<A>(a.plan);
  const int64_t blocks = (a.channels + width - 1) / width;
  std::vector<CellNumbers<A>> numbers(static_cast<size_t>(blocks * a.plan.num_cells));
  sweep<T, Pass::kProducts>(a, width, nullptr, numbers.data(), true);
  for (int64_t r = 0; r < a.plan.num_regions; ++r) {
    const Region& region = a.plan.regions[r];
    const int64_t cells = region.out_height * region.out_width;
    double sum = 0;
    for (int64_t cell = region.first_cell; cell < region.first_cell + cells; ++cell) {
      double dot = 0, student = 0, teacher = 0;
      for (int64_t block = 0; block < blocks; ++block) {
        const CellNumbers<A>& part = numbers[block * a.plan.num_cells + cell];
        dot += part.dot;
        student += part.student;
        teacher += part.teacher;
      }
      const double student_norm = std::sqrt(student);
      const double inverse_student = 1 / std::max(student_norm, kNormFloor);
      const double inverse_teacher = 1 / std::max(std::sqrt(teacher), kNormFloor);
      const double cosine = dot * inverse_student * inverse_teacher;
      sum += 1 - cosine;
      // d(1 - cosine)/ds = factor_s * s + factor_t * t; below the floor the norm is a constant.
      const double factor_s = student_norm > kNormFloor ? cosine * inverse_student * inverse_student : 0;
      numbers[cell] = {A(0), static_cast<A>(factor_s), static_cast<A>(-inverse_student * inverse_teacher)};
    }
    a.region_mean[r] = sum / static_cast<double>(cells);
  }
  if (a.grad != nullptr) sweep<T, Pass::kGradFromFactors>(a, width, nullptr, numbers.data(), false);
}

}  // namespace

void region_distill(const RegionDistillArgs& a) {
  with_dtype(a.student.dtype, [&](auto t) {
    using T = decltype(t);
    return a.cosine ? cosines<T>(a) : squares<T>(a);
  });
}

}  // namespace GRANVIT_ISA
}  // namespace granvit::cpu

#ifdef GRANVIT_HOST
#include "host.h"

namespace granvit::cpu {
namespace {

constexpr const char* kOp = "region_distill_loss";

// The tensors behind RegionDistillArgs; the teacher is copied only where its channels are not contiguous.
struct Inputs {
  Inputs(const Tensor& student, const Tensor& teacher_in, const RegionArguments& regions, const std::string& loss,
         int64_t sampling_ratio)
      : host(kOp, regions, student.size(0)),
        teacher(teacher_in.stride(teacher_in.dim() - 1) == 1 ? teacher_in : torch::stable::contiguous(teacher_in)) {
    const bool packed_cells = regions.output_sizes.has_value();
    args.plan = host.plan();
    args.channels = student.size(student.dim() - 1);
    args.student = view_tokens(kOp, "student", student, args.plan, regions.grid_sizes.has_value());
    expect(loss == "mse" || loss == "cosine", kOp, ": loss: expected 'mse' or 'cosine', got '", loss, "'");
    expect(teacher.is_cpu() && dtype_of(teacher, kOp, "teacher") == args.student.dtype, kOp,
           ": teacher: expected a CPU tensor of the student's dtype");
    expect(teacher.dim() == (packed_cells ? 2 : 3) && teacher.size(teacher.dim() - 1) == args.channels &&
               teacher.numel() == args.plan.num_cells * args.channels &&
               (packed_cells || teacher.size(0) == args.plan.num_regions),
           kOp, ": teacher: expected ", args.plan.num_cells, " cells of ", args.channels,
           " channels to match boxes, output_size and student");
    args.teacher = {teacher.const_data_ptr(), packed_cells ? 0 : teacher.stride(0),
                    teacher.stride(packed_cells ? 0 : 1), packed_cells};
    args.sampling_ratio = static_cast<int>(sampling_ratio);
    args.cosine = loss == "cosine";
    means.resize(static_cast<size_t>(args.plan.num_regions));
    args.region_mean = means.data();
    args.share = nullptr;
    args.grad = nullptr;
    args.grad_dtype = args.student.dtype;
  }

  HostPlan host;
  Tensor teacher;
  std::vector<double> means;
  RegionDistillArgs args;
};

// How much each region's mean counts in reduction="mean"; all zero where the weights sum to zero.
std::vector<double> shares(const RegionPlan& plan, const std::optional<Tensor>& weight) {
  std::vector<double> share(static_cast<size_t>(plan.num_regions));
  double total = 0;
  for (int64_t r = 0; r < plan.num_regions; ++r) {
    const Region& region = plan.regions[r];
    share[r] = weight ? weight->const_data_ptr<double>()[r * weight->stride(0)]
                      : static_cast<double>(region.out_height * region.out_width);
    total += share[r];
  }
  for (double& s : share) s = total > 0 ? s / total : 0;
  return share;
}

void write_number(const Tensor& to, int64_t index, double value) {
  if (to.scalar_type() == ScalarType::Double)
    to.mutable_data_ptr<double>()[index] = value;
  else
    to.mutable_data_ptr<float>()[index] = static_cast<float>(value);
}

std::tuple<Tensor, Tensor> region_distill_forward(const Tensor& student, const Tensor& teacher, const Tensor& boxes,
                                                  const Tensor& image_index, const std::optional<Tensor>& grid_sizes,
                                                  int64_t grid_height, int64_t grid_width,
                                                  const std::optional<Tensor>& output_sizes, int64_t output_height,
                                                  int64_t output_width, const std::optional<Tensor>& weight,
                                                  const std::string& loss, const std::string& reduction,
                                                  int64_t sampling_ratio, bool with_grad) {
  Inputs in(student, teacher,
            {boxes, image_index, grid_sizes, grid_height, grid_width, output_sizes, output_height, output_width}, loss,
            sampling_ratio);
  const bool mean = reduction == "mean";
  expect(mean || reduction == "none", kOp, ": reduction: expected 'mean' or 'none', got '", reduction, "'");
  expect(!weight || (weight->scalar_type() == ScalarType::Double && weight->numel() == in.args.plan.num_regions), kOp,
         ": weight: expected float64 of shape (", in.args.plan.num_regions, ",)");
  const std::vector<double> share = shares(in.args.plan, weight);
  const auto wide = in.args.student.dtype == DType::kFloat64 ? ScalarType::Double : ScalarType::Float;

  Tensor grad = torch::stable::new_empty(student, {0});
  if (with_grad && mean) {
    const auto sizes = student.sizes();
    const bool half = student.scalar_type() == ScalarType::Half;
    grad = torch::stable::new_empty(student, sizes, half ? ScalarType::Float : student.scalar_type());
    in.args.share = share.data();
    advise_huge_pages(grad);
    in.args.grad = grad.mutable_data_ptr();
    if (half) in.args.grad_dtype = DType::kFloat32;
  }
  region_distill_kernel()(in.args);

  if (!mean) {
    Tensor values = torch::stable::new_empty(student, {in.args.plan.num_regions}, wide);
    for (int64_t r = 0; r < in.args.plan.num_regions; ++r) write_number(values, r, in.means[r]);
    return {values, grad};
  }
  double total = 0;
  for (int64_t r = 0; r < in.args.plan.num_regions; ++r)
    if (share[r] != 0) total += share[r] * in.means[r];
  const torch::headeronly::IntHeaderOnlyArrayRef scalar(nullptr, static_cast<size_t>(0));
  Tensor value = torch::stable::new_empty(student, scalar, wide);
  write_number(value, 0, total);
  return {value, grad};
}

Tensor region_distill_backward(const Tensor& grad_loss, const Tensor& student, const Tensor& teacher,
                               const Tensor& boxes, const Tensor& image_index, const std::optional<Tensor>& grid_sizes,
                               int64_t grid_height, int64_t grid_width, const std::optional<Tensor>& output_sizes,
                               int64_t output_height, int64_t output_width, const std::string& loss,
                               int64_t sampling_ratio) {
  Inputs in(student, teacher,
            {boxes, image_index, grid_sizes, grid_height, grid_width, output_sizes, output_height, output_width}, loss,
            sampling_ratio);
  const int64_t num_regions = in.args.plan.num_regions;
  expect(grad_loss.numel() == num_regions && (num_regions == 0 || grad_loss.dim() == 1), kOp,
         ": gradient: expected shape (", num_regions, ",)");
  std::vector<double> share(static_cast<size_t>(num_regions));
  const bool wide = grad_loss.scalar_type() == ScalarType::Double;
  for (int64_t r = 0; r < num_regions; ++r)
    share[r] = wide ? grad_loss.const_data_ptr<double>()[r * grad_loss.stride(0)]
                    : static_cast<double>(grad_loss.const_data_ptr<float>()[r * grad_loss.stride(0)]);
  Tensor grad = torch::stable::new_empty(student, student.sizes());
  advise_huge_pages(grad);
  in.args.share = share.data();
  in.args.grad = grad.mutable_data_ptr();
  region_distill_kernel()(in.args);
  return grad;
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(granvit, m) {
  m.def(
      "region_distill(Tensor student, Tensor teacher, Tensor boxes, Tensor image_index, Tensor? grid_sizes, "
      "SymInt grid_height, SymInt grid_width, Tensor? output_sizes, SymInt output_height, SymInt output_width, "
      "Tensor? weight, str loss, str reduction, int sampling_ratio, bool with_grad) -> (Tensor, Tensor)");
  m.def(
      "region_distill_backward(Tensor grad_loss, Tensor student, Tensor teacher, Tensor boxes, Tensor image_index, "
      "Tensor? grid_sizes, SymInt grid_height, SymInt grid_width, Tensor? output_sizes, SymInt output_height, "
      "SymInt output_width, str loss, int sampling_ratio) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(granvit, CPU, m) {
  m.impl("region_distill", TORCH_BOX(&region_distill_forward));
  m.impl("region_distill_backward", TORCH_BOX(&region_distill_backward));
}

}  // namespace granvit::cpu
#endif  // GRANVIT_HOST
