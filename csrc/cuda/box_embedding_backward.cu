// box_embedding on the GPU: backward.
#include "box_embedding_angles.h"
#include "box_embedding_host.h"

namespace granvit::cuda::embedding {
namespace {

constexpr int kMaxRowsAtOnce = 64;  // boxes of a block of the angles' gradients

// Where `count` blocks leave their shares of `out`, in float32; `out` itself, if it can be, for one.
std::optional<Tensor> partial_sums(const Tensor& out, int64_t count, bool needed) {
  if (!needed) return std::nullopt;
  if (count == 1 && out.scalar_type() == ScalarType::Float) return out;
  return torch::stable::new_empty(out, {count, out.numel()}, ScalarType::Float);
}
float* floats(const std::optional<Tensor>& t) { return t ? static_cast<float*>(t->mutable_data_ptr()) : nullptr; }

// Adds up what `count` blocks left.
void add_up(const std::optional<Tensor>& partial, int64_t count, const Tensor& out, cudaStream_t stream) {
  if (partial->const_data_ptr() == out.const_data_ptr()) return;
  const int64_t elements = out.numel();
  launch(kOp, box_embedding_add_up_kernel, dim3(grid_blocks(kOp, blocks_of(elements, kAddUpColumns))),
         dim3(kAddUpColumns * kAddUpLanes), kAddUpColumns * kAddUpLanes * sizeof(float), stream,
         static_cast<const float*>(partial->const_data_ptr()), static_cast<int>(count), elements,
         RealResults{out.mutable_data_ptr(), real_type(out, "gradient")});
}

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
    if (needed.w1) {
      const Tensor features = p.new_rows(p.num_boxes, p.num_features);
      make_features<T>(p, 0, features, stream);
      weights(grad_hidden, features, grads.w1);
    }
    if (needed.boxes || needed.frequencies) through_angles(grad_hidden);
  }

 private:
  // The boxes' rows of the tokens' gradient; on the way, their sums.
  Tensor boxes_rows(const Tensor& grad) const {
    const Tensor lines = with_contiguous_lines(grad);
    const bool copy = p.index(0) != nullptr;
    if (!copy && !needed.b2) return lines;
    const Tensor rows = copy ? p.new_rows(p.num_boxes, p.size) : lines;
    const int64_t blocks = blocks_of(p.num_boxes, kPassRows);
    const std::optional<Tensor> partial = partial_sums(grads.b2, blocks, needed.b2);
    SumEpilogue<T> sum{};
    if (copy) sum.copy = epilogue_rows<T>(rows);
    sum.partial_sums = floats(partial);
    sum.columns = p.size;
    pass<T>(lines, p.num_boxes, p.index(0), p.index_stride(), sum, stream);
    if (needed.b2) add_up(partial, blocks, grads.b2, stream);
    return rows;
  }

  void through_hidden(const Tensor& rows, const Tensor& hidden, const Tensor& grad_hidden,
                      const Tensor& activation) const {
    const bool few = p.num_boxes <= kSomeBoxes;
    const int64_t blocks = blocks_of(p.num_boxes, few ? BoxEmbeddingProducts<T>::tile_rows(p.num_boxes) : kPassRows);
    const std::optional<Tensor> partial = partial_sums(grads.b1, blocks, needed.b1);
    const auto slope_of = [&](int64_t first, int64_t count) {
      SlopeEpilogue<T> slope{};
      slope.hidden = epilogue_rows<const T>(rows_of(hidden, first, count));
      slope.grad_hidden = epilogue_rows<T>(rows_of(grad_hidden, first, count));
      if (needed.w2) slope.activation = epilogue_rows<T>(rows_of(activation, first, count));
      if (partial) slope.partial_sums = floats(partial) + first / kPassRows * p.hidden_size;
      slope.columns = p.hidden_size;
      return slope;
    };
    if (few) {
      BoxEmbeddingProducts<T>::grad_hidden({matrix<T>(rows), matrix<T>(p.w2), p.num_boxes, p.hidden_size, p.size},
                                           slope_of(0, p.num_boxes), stream);
    } else {
      const Tensor grad_activation = p.new_rows(std::min<int64_t>(p.num_boxes, kBoxesAtOnce), p.hidden_size);
      for (int64_t first = 0; first < p.num_boxes; first += kBoxesAtOnce) {
        const int64_t count = std::min(kBoxesAtOnce, p.num_boxes - first);
        const Tensor own = rows_of(grad_activation, 0, count);
        library_product(own, rows_of(rows, first, count), p.w2);
        pass<T>(own, count, nullptr, 0, slope_of(first, count), stream);
      }
    }
    if (needed.b1) add_up(partial, blocks, grads.b1, stream);
  }

  // out (columns of grad, columns of input) = grad^T input
  void weights(const Tensor& grad, const Tensor& input, const Tensor& out) const {
    if (p.num_boxes > kSomeBoxes) return library_product(out, torch::stable::transpose(grad, 0, 1), input);
    BoxEmbeddingProducts<T>::grad_weights(
        {matrix<T>(grad), matrix<T>(input), static_cast<int>(out.size(0)), static_cast<int>(out.size(1)), p.num_boxes},
        {epilogue_rows<T>(out)}, stream);
  }

  void through_angles(const Tensor& grad_hidden) const {
    const Tensor grad_features = p.new_rows(p.num_boxes, p.num_features);
    if (p.num_boxes > kSomeBoxes)
      library_product(grad_features, grad_hidden, p.w1);
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
  const Problem p(boxes, frequencies, w1, w2, index);
  const DeviceScope device(boxes);
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
}  // namespace granvit::cuda::embedding

namespace granvit::cuda {

STABLE_TORCH_LIBRARY_IMPL(granvit, CUDA, m) {
  m.impl("box_embedding_backward", TORCH_BOX(&embedding::box_embedding_backward));
}

}  // namespace granvit::cuda
