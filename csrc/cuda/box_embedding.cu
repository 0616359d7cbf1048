// box_embedding on the GPU: Fourier features, linear, GELU, linear; forward, in place, and backward.
#include "box_embedding_features.h"
#include "box_embedding_products.h"
#include "host.h"

namespace granvit::cuda {
namespace {

constexpr const char* kOp = "box_embedding";
constexpr int kMaxRowsAtOnce = 64;  // boxes of a block of the angles' gradients

int64_t blocks_of(int64_t count, int64_t size) { return (count + size - 1) / size; }

RealType real_type(const Tensor& t, const char* name) {
  switch (t.scalar_type()) {
    case ScalarType::Float:
      return RealType::kFloat;
    case ScalarType::Double:
      return RealType::kDouble;
    case ScalarType::BFloat16:
      return RealType::kBFloat16;
    case ScalarType::Half:
      return RealType::kHalf;
    default:
      value_error(kOp, ": ", name, ": expected float32, float64, bfloat16 or float16");
  }
}

Reals reals(const Tensor& t, const char* name) {
  return {t.const_data_ptr(), real_type(t, name), t.stride(0), t.stride(1)};
}

// A matrix whose lines are contiguous.
Tensor with_contiguous_lines(const Tensor& t) {
  return t.size(1) <= 1 || t.stride(1) == 1 ? t : torch::stable::contiguous(t);
}

// out = a b, by PyTorch's own product, which is hard to beat where nothing is to be done on the way.
void multiply_into(const Tensor& out, const Tensor& a, const Tensor& b) {
  std::array<StableIValue, 3> stack{torch::stable::detail::from(a), torch::stable::detail::from(b),
                                    torch::stable::detail::from(out)};
  STABLE_TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("aten::mm", "out", stack.data(), TORCH_ABI_VERSION));
  torch::stable::detail::to<Tensor>(stack[0]);  // takes the result, which is `out`, off the stack
}

// The arguments that all entry points share.
class Problem {
 public:
  Problem(const Tensor& boxes, const Tensor& frequencies, const Tensor& w1, const Tensor& w2,
          const std::optional<Tensor>& index)
      : w1(with_contiguous_lines(w1)), w2(with_contiguous_lines(w2)), index_(index) {
    expect(boxes.dim() == 2 && boxes.size(1) == 4, kOp, ": boxes: expected shape (R, 4)");
    expect(frequencies.dim() == 2 && frequencies.size(0) == 4, kOp, ": frequencies: expected shape (4, M)");
    expect(w1.dim() == 2 && w1.size(1) == 2 * frequencies.size(1), kOp, ": w1: expected shape (D1, ",
           2 * frequencies.size(1), ")");
    expect(w2.dim() == 2 && w2.size(1) == w1.size(0), kOp, ": w2: expected shape (D, ", w1.size(0), ")");
    expect(w2.scalar_type() == w1.scalar_type(), kOp, ": w2: expected the dtype of w1");
    expect_on_device(boxes, boxes, kOp, "boxes");
    expect_on_device(frequencies, boxes, kOp, "frequencies");
    expect_on_device(w1, boxes, kOp, "w1");
    expect_on_device(w2, boxes, kOp, "w2");
    constexpr int64_t kLargest = 0x7fffff00;  // leaves room for a tile beyond the end
    expect(boxes.size(0) <= kLargest && w1.size(0) <= kLargest && w1.size(1) <= kLargest && w2.size(0) <= kLargest, kOp,
           ": expected at most ", kLargest, " boxes, features and channels");
    num_boxes = static_cast<int>(boxes.size(0));
    num_features = static_cast<int>(w1.size(1));
    hidden_size = static_cast<int>(w1.size(0));
    size = static_cast<int>(w2.size(0));
    angles = {reals(boxes, "boxes"), reals(frequencies, "frequencies"), num_boxes, num_features / 2};
    if (index) {
      expect(index->dim() == 1 && index->size(0) == num_boxes && index->scalar_type() == ScalarType::Long, kOp,
             ": index: expected an int64 tensor of shape (", num_boxes, ",) to match boxes");
      expect_on_device(*index, boxes, kOp, "index");
    }
  }

  void check_bias(const Tensor& b, int64_t length, const char* name) const {
    expect(b.dim() == 1 && b.size(0) == length && b.scalar_type() == w1.scalar_type(), kOp, ": ", name,
           ": expected shape (", length, ",) in the dtype of w1");
    expect_on_device(b, w1, kOp, name);
  }
  void check_sequence(const Tensor& t, const char* name) const {
    expect(t.dim() == 2 && t.size(1) == size && t.scalar_type() == w1.scalar_type(), kOp, ": ", name,
           ": expected shape (T, ", size, ") in the dtype of w1");
    expect_on_device(t, w1, kOp, name);
  }

  const int64_t* index() const { return index_ ? index_->const_data_ptr<int64_t>() : nullptr; }
  int64_t index_stride() const { return index_ ? index_->stride(0) : 0; }

  Tensor new_rows(int64_t rows, int64_t columns) const { return torch::stable::new_empty(w1, {rows, columns}); }

  Tensor w1, w2;
  Angles angles;
  int num_boxes, num_features, hidden_size, size;

 private:
  std::optional<Tensor> index_;
};

template <typename T>
Matrix<T> matrix(const Tensor& t) {
  const auto* data = static_cast<const T*>(t.const_data_ptr());
  return {data, t.stride(0), static_cast<int>(t.size(0)), static_cast<int>(t.size(1)),
          aligned(data, sizeof(T), t.size(1), {t.stride(0)})};
}

template <typename T>
EpilogueRows<T> epilogue_rows(const Tensor& t) {
  if constexpr (std::is_const_v<T>) {
    auto* data = static_cast<T*>(t.const_data_ptr());
    return {data, t.stride(0), aligned(data, sizeof(T), kProductVec, {t.stride(0)})};
  } else {
    auto* data = static_cast<T*>(t.mutable_data_ptr());
    return {data, t.stride(0), aligned(data, sizeof(T), kProductVec, {t.stride(0)})};
  }
}

template <typename T>
Tensor make_features(const Problem& p, cudaStream_t stream) {
  Tensor features = p.new_rows(p.num_boxes, p.num_features);
  const int64_t column_blocks = blocks_of(p.num_features / 2, kFeatureThreads);
  expect(column_blocks <= 65535, kOp, ": frequencies: expected fewer of them");
  launch(kOp, box_embedding_features_kernel<T>,
         dim3(grid_blocks(kOp, blocks_of(p.num_boxes, kFeatureRows)), static_cast<unsigned>(column_blocks)),
         dim3(kFeatureThreads), 4 * kFeatureRows * sizeof(double), stream, p.angles,
         static_cast<T*>(features.mutable_data_ptr()));
  return features;
}

// Writes the tokens into rows of `out`; what GELU is applied to, into `hidden` if there is one.
void embed(const Problem& p, const Tensor& b1, const Tensor& b2, const std::optional<Tensor>& hidden, const Tensor& out,
           cudaStream_t stream) {
  if (p.num_boxes == 0) return;
  p.check_bias(b1, p.hidden_size, "b1");
  p.check_bias(b2, p.size, "b2");
  const Tensor first_bias = torch::stable::contiguous(b1), second_bias = torch::stable::contiguous(b2);
  with_dtype(p.w1, kOp, "w1", [&](auto* element) {
    using T = std::remove_pointer_t<decltype(element)>;
    const Tensor features = make_features<T>(p, stream);
    const Tensor activation = p.new_rows(p.num_boxes, p.hidden_size);
    GeluEpilogue<T> gelu{};
    gelu.bias.data = static_cast<const T*>(first_bias.const_data_ptr());
    if (hidden) gelu.hidden = epilogue_rows<T>(*hidden);
    gelu.activation = epilogue_rows<T>(activation);
    BoxEmbeddingProducts<T>::first_layer(
        {matrix<T>(features), matrix<T>(p.w1), p.num_boxes, p.hidden_size, p.num_features}, gelu, stream);
    TokenEpilogue<T> tokens{};
    tokens.bias.data = static_cast<const T*>(second_bias.const_data_ptr());
    tokens.out = epilogue_rows<T>(out);
    tokens.out_rows = out.size(0);
    tokens.index = p.index();
    tokens.index_stride = p.index_stride();
    BoxEmbeddingProducts<T>::second_layer({matrix<T>(activation), matrix<T>(p.w2), p.num_boxes, p.size, p.hidden_size},
                                          tokens, stream);
  });
}

std::tuple<Tensor, Tensor> box_embedding(const Tensor& boxes, const Tensor& frequencies, const Tensor& w1,
                                         const Tensor& b1, const Tensor& w2, const Tensor& b2,
                                         const std::optional<Tensor>& out, const std::optional<Tensor>& index,
                                         bool save_hidden) {
  const DeviceScope device(boxes);
  const Problem p(boxes, frequencies, w1, w2, index);
  expect(out.has_value() == index.has_value(), kOp, ": out, index: expected both or neither");
  Tensor tokens = p.new_rows(out ? out->size(0) : p.num_boxes, p.size);
  if (out) {
    p.check_sequence(*out, "out");
    torch::stable::copy_(tokens, *out);
  }
  Tensor hidden = p.new_rows(save_hidden ? p.num_boxes : 0, p.hidden_size);
  embed(p, b1, b2, save_hidden ? std::optional(hidden) : std::nullopt, tokens, device.stream);
  return {tokens, hidden};
}

void box_embedding_(const Tensor& out, const Tensor& index, const Tensor& boxes, const Tensor& frequencies,
                    const Tensor& w1, const Tensor& b1, const Tensor& w2, const Tensor& b2) {
  const DeviceScope device(boxes);
  const Problem p(boxes, frequencies, w1, w2, index);
  p.check_sequence(out, "out");
  expect(out.size(1) <= 1 || out.stride(1) == 1, kOp, ": out: expected a contiguous last dimension");
  embed(p, b1, b2, std::nullopt, out, device.stream);
}

// Adds up what `count` blocks left, (count, elements of out); see partial_sums.
void add_up(const std::optional<Tensor>& partial, int64_t count, const Tensor& out, cudaStream_t stream) {
  const int64_t elements = out.numel();
  launch(kOp, box_embedding_add_up_kernel, dim3(grid_blocks(kOp, blocks_of(elements, kAddUpColumns))),
         dim3(kAddUpColumns * kAddUpLanes), kAddUpColumns * kAddUpLanes * sizeof(float), stream,
         static_cast<const float*>(partial->const_data_ptr()), static_cast<int>(count), elements,
         RealResults{out.mutable_data_ptr(), real_type(out, "gradient")});
}

// Where `count` blocks leave their shares of `out`.
std::optional<Tensor> partial_sums(const Tensor& out, int64_t count, bool needed) {
  if (!needed) return std::nullopt;
  return torch::stable::new_empty(out, {count, out.numel()}, ScalarType::Float);
}
float* floats(const std::optional<Tensor>& t) { return t ? static_cast<float*>(t->mutable_data_ptr()) : nullptr; }

struct Needed {
  bool boxes, frequencies, w1, b1, w2, b2;
};

struct Gradients {
  Tensor boxes, frequencies, w1, b1, w2, b2;
};

template <typename T>
class Backward {
 public:
  Backward(const Problem& problem, const Needed& needed, const Gradients& grads, cudaStream_t stream)
      : p(problem), needed(needed), grads(grads), stream(stream) {}

  void run(const Tensor& grad, const Tensor& hidden) const {
    const Tensor rows = boxes_rows(grad);
    const bool before = needed.boxes || needed.frequencies || needed.w1 || needed.b1;
    if (!before && !needed.w2) return;
    const Tensor grad_hidden = p.new_rows(p.num_boxes, p.hidden_size);
    const Tensor activation = p.new_rows(needed.w2 ? p.num_boxes : 0, p.hidden_size);
    through_hidden(rows, hidden, grad_hidden, activation);
    if (needed.w2) weights(rows, activation, grads.w2);
    if (needed.w1) weights(grad_hidden, make_features<T>(p, stream), grads.w1);
    if (needed.boxes || needed.frequencies) through_angles(grad_hidden);
  }

 private:
  // The boxes' rows of the tokens' gradient; on the way, their sums.
  Tensor boxes_rows(const Tensor& grad) const {
    const Tensor lines = with_contiguous_lines(grad);
    const bool copy = p.index() != nullptr;
    if (!copy && !needed.b2) return lines;
    const Tensor rows = copy ? p.new_rows(p.num_boxes, p.size) : lines;
    const int64_t blocks = blocks_of(p.num_boxes, kRowsRows), column_blocks = blocks_of(p.size, kRowsColumns);
    expect(column_blocks <= 65535, kOp, ": w2: expected fewer channels");
    const std::optional<Tensor> partial = partial_sums(grads.b2, blocks, needed.b2);
    GradRows<T> args{};
    args.grad = epilogue_rows<const T>(lines);
    args.grad_rows = lines.size(0);
    args.index = p.index();
    args.index_stride = p.index_stride();
    if (copy) args.copy = epilogue_rows<T>(rows);
    args.partial_sums = floats(partial);
    args.num_boxes = p.num_boxes;
    args.columns = p.size;
    launch(kOp, box_embedding_rows_kernel<T>, dim3(grid_blocks(kOp, blocks), static_cast<unsigned>(column_blocks)),
           dim3(kRowsThreads), kRowsThreads * kProductVec * sizeof(float), stream, args);
    if (needed.b2) add_up(partial, blocks, grads.b2, stream);
    return rows;
  }

  void through_hidden(const Tensor& rows, const Tensor& hidden, const Tensor& grad_hidden,
                      const Tensor& activation) const {
    const int64_t blocks = blocks_of(p.num_boxes, BoxEmbeddingProducts<T>::tile_rows(p.num_boxes));
    const std::optional<Tensor> partial = partial_sums(grads.b1, blocks, needed.b1);
    SlopeEpilogue<T> slope{};
    slope.hidden = epilogue_rows<const T>(hidden);
    slope.grad_hidden = epilogue_rows<T>(grad_hidden);
    if (needed.w2) slope.activation = epilogue_rows<T>(activation);
    slope.partial_sums = floats(partial);
    slope.columns = p.hidden_size;
    BoxEmbeddingProducts<T>::grad_hidden({matrix<T>(rows), matrix<T>(p.w2), p.num_boxes, p.hidden_size, p.size}, slope,
                                         stream);
    if (needed.b1) add_up(partial, blocks, grads.b1, stream);
  }

  // out (columns of grad, columns of input) = grad^T input
  void weights(const Tensor& grad, const Tensor& input, const Tensor& out) const {
    if (p.num_boxes > kFewBoxes) return multiply_into(out, torch::stable::transpose(grad, 0, 1), input);
    BoxEmbeddingProducts<T>::grad_weights(
        {matrix<T>(grad), matrix<T>(input), static_cast<int>(out.size(0)), static_cast<int>(out.size(1)), p.num_boxes},
        {epilogue_rows<T>(out)}, stream);
  }

  void through_angles(const Tensor& grad_hidden) const {
    const Tensor grad_features = p.new_rows(p.num_boxes, p.num_features);
    if (p.num_boxes > kFewBoxes)
      multiply_into(grad_features, grad_hidden, p.w1);
    else
      BoxEmbeddingProducts<T>::grad_features(
          {matrix<T>(grad_hidden), matrix<T>(p.w1), p.num_boxes, p.num_features, p.hidden_size},
          {epilogue_rows<T>(grad_features)}, stream);
    const int rows_at_once = p.num_boxes <= kSomeBoxes ? kAngleWarps : kMaxRowsAtOnce;
    const int64_t row_blocks = blocks_of(p.num_boxes, rows_at_once);
    const int64_t column_blocks = blocks_of(p.num_features / 2, kAngleColumns);
    const std::optional<Tensor> for_boxes = partial_sums(grads.boxes, column_blocks, needed.boxes);
    const std::optional<Tensor> for_frequencies = partial_sums(grads.frequencies, row_blocks, needed.frequencies);
    launch(kOp, box_embedding_angles_kernel<T>,
           dim3(grid_blocks(kOp, row_blocks), static_cast<unsigned>(column_blocks)), dim3(kAngleThreads),
           kAngleSharedBytes, stream, p.angles, static_cast<const T*>(grad_features.const_data_ptr()), rows_at_once,
           floats(for_boxes), floats(for_frequencies));
    if (needed.boxes) add_up(for_boxes, column_blocks, grads.boxes, stream);
    if (needed.frequencies) add_up(for_frequencies, row_blocks, grads.frequencies, stream);
  }

  const Problem& p;
  const Needed& needed;
  const Gradients& grads;
  cudaStream_t stream;
};

// A tensor for the gradient of `t`, or an empty one; zeros where there are no boxes to give any.
Tensor gradient_of(const Tensor& t, bool needed, bool zeros) {
  std::vector<int64_t> shape{0};
  if (needed) shape.assign(t.sizes().begin(), t.sizes().end());
  return zeros ? torch::stable::new_zeros(t, shape) : torch::stable::new_empty(t, shape);
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> box_embedding_backward(
    const Tensor& grad, const Tensor& boxes, const Tensor& frequencies, const Tensor& w1, const Tensor& b1,
    const Tensor& w2, const Tensor& b2, const Tensor& hidden, const std::optional<Tensor>& index, bool need_boxes,
    bool need_frequencies, bool need_w1, bool need_b1, bool need_w2, bool need_b2) {
  const DeviceScope device(boxes);
  const Problem p(boxes, frequencies, w1, w2, index);
  p.check_sequence(grad, "grad");
  p.check_bias(b1, p.hidden_size, "b1");
  p.check_bias(b2, p.size, "b2");
  expect(index.has_value() || grad.size(0) == p.num_boxes, kOp, ": grad: expected ", p.num_boxes,
         " rows to match boxes");
  expect(hidden.dim() == 2 && hidden.size(0) == p.num_boxes && hidden.size(1) == p.hidden_size &&
             hidden.scalar_type() == w1.scalar_type(),
         kOp, ": hidden: expected what the forward saved, shape (", p.num_boxes, ", ", p.hidden_size, ")");
  expect_on_device(hidden, boxes, kOp, "hidden");
  const Needed needed{need_boxes, need_frequencies, need_w1, need_b1, need_w2, need_b2};
  const auto make = [&](const Tensor& t, bool wanted) { return gradient_of(t, wanted, p.num_boxes == 0); };
  const Gradients grads{make(boxes, need_boxes), make(frequencies, need_frequencies),
                        make(w1, need_w1),       make(b1, need_b1),
                        make(w2, need_w2),       make(b2, need_b2)};
  if (p.num_boxes > 0) {
    with_dtype(w1, kOp, "w1", [&](auto* element) {
      using T = std::remove_pointer_t<decltype(element)>;
      Backward<T>(p, needed, grads, device.stream).run(grad, torch::stable::contiguous(hidden));
    });
  }
  return {grads.boxes, grads.frequencies, grads.w1, grads.b1, grads.w2, grads.b2};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(granvit, CUDA, m) {
  m.impl("box_embedding", TORCH_BOX(&box_embedding));
  m.impl("box_embedding_", TORCH_BOX(&box_embedding_));
  m.impl("box_embedding_backward", TORCH_BOX(&box_embedding_backward));
}

}  // namespace granvit::cuda
