// box_embedding on the CPU: Fourier features, linear, GELU, linear; forward and backward.
#include "box_embedding_layers.h"

namespace granvit::cpu {

GRANVIT_DECLARE_KERNEL(box_embedding_forward, BoxEmbeddingArgs)
GRANVIT_DECLARE_KERNEL(box_embedding_backward, BoxEmbeddingArgs)

namespace GRANVIT_ISA {

void box_embedding_forward(const BoxEmbeddingArgs& a) {
  with_dtype(a.dtype, [&](auto t) { forward<decltype(t)>(a); });
}
void box_embedding_backward(const BoxEmbeddingArgs& a) {
  with_dtype(a.dtype, [&](auto t) { backward<decltype(t)>(a); });
}

}  // namespace GRANVIT_ISA
}  // namespace granvit::cpu

#ifdef GRANVIT_HOST
#include "host.h"

namespace granvit::cpu {
namespace {

constexpr const char* kOp = "box_embedding";

// A matrix whose rows are contiguous.
Tensor with_contiguous_rows(const Tensor& t) {
  return t.size(1) <= 1 || t.stride(1) == 1 ? t : torch::stable::contiguous(t);
}

// A small matrix of any strides and floating dtype, widened.
std::vector<double> read_reals(const Tensor& t, const char* name) {
  expect(t.is_cpu(), kOp, ": ", name, ": expected a tensor on the CPU");
  const int64_t columns = t.size(1);
  std::vector<double> values(static_cast<size_t>(t.numel()));
  with_dtype(dtype_of(t, kOp, name), [&](auto type) {
    const auto* data = static_cast<const decltype(type)*>(t.const_data_ptr());
    for (int64_t i = 0; i < t.size(0); ++i)
      for (int64_t j = 0; j < columns; ++j)
        values[i * columns + j] = isa_default::load_first(data + i * t.stride(0) + j * t.stride(1), 1)[0];
  });
  return values;
}

void write_reals(const std::vector<double>& values, const Tensor& to) {
  with_dtype(dtype_of(to, kOp, "frequencies"), [&](auto type) {
    using T = decltype(type);
    using A = isa_default::acc_t<T>;
    auto* data = static_cast<T*>(to.mutable_data_ptr());
    for (size_t i = 0; i < values.size(); ++i)
      isa_default::store_first(data + i, isa_default::splat(static_cast<A>(values[i])), 1);
  });
}

// The arguments that all entry points share, and the memory behind them.
class Problem {
 public:
  Problem(const Tensor& boxes, const Tensor& frequencies, const Tensor& w1, const Tensor& w2,
          const std::optional<Tensor>& index)
      : w1_(with_contiguous_rows(w1)), w2_(with_contiguous_rows(w2)) {
    expect(boxes.dim() == 2 && boxes.size(1) == 4, kOp, ": boxes: expected shape (R, 4)");
    expect(frequencies.dim() == 2 && frequencies.size(0) == 4, kOp, ": frequencies: expected shape (4, M)");
    expect(w1.dim() == 2 && w1.size(1) == 2 * frequencies.size(1), kOp, ": w1: expected shape (D1, ",
           2 * frequencies.size(1), ")");
    expect(w2.dim() == 2 && w2.size(1) == w1.size(0), kOp, ": w2: expected shape (D, ", w1.size(0), ")");
    expect(w1.is_cpu() && w2.is_cpu(), kOp, ": w1, w2: expected tensors on the CPU");
    args.dtype = dtype_of(w1, kOp, "w1");
    expect(w2.scalar_type() == w1.scalar_type(), kOp, ": w2: expected the dtype of w1");
    boxes_ = read_reals(boxes, "boxes");
    for (size_t i = 0; i < boxes_.size(); ++i) {
      const double* b = boxes_.data() + i / 4 * 4;
      expect(std::isfinite(boxes_[i]), kOp, ": boxes: expected finite values, got [", b[0], ", ", b[1], ", ", b[2],
             ", ", b[3], "] in row ", i / 4);
    }
    frequencies_ = read_reals(frequencies, "frequencies");
    args.boxes = boxes_.data();
    args.frequencies = frequencies_.data();
    args.num_boxes = boxes.size(0);
    args.num_frequencies = frequencies.size(1);
    args.hidden_size = w1.size(0);
    args.size = w2.size(0);
    args.w1 = w1_.const_data_ptr();
    args.w1_stride = w1_.stride(0);
    args.w2 = w2_.const_data_ptr();
    args.w2_stride = w2_.stride(0);
    if (index) {
      index_ = read_integers(*index, kOp, "index");
      expect(index->dim() == 1 && static_cast<int64_t>(index_.size()) == args.num_boxes, kOp,
             ": index: expected shape (", args.num_boxes, ",) to match boxes");
      args.index = index_.data();
    }
  }

  void set_biases(const Tensor& b1, const Tensor& b2) {
    expect(b1.dim() == 1 && b1.size(0) == args.hidden_size && b1.scalar_type() == w1_.scalar_type() && b1.is_cpu(), kOp,
           ": b1: expected shape (", args.hidden_size, ",) in the dtype of w1");
    expect(b2.dim() == 1 && b2.size(0) == args.size && b2.scalar_type() == w1_.scalar_type() && b2.is_cpu(), kOp,
           ": b2: expected shape (", args.size, ",) in the dtype of w1");
    b1_ = torch::stable::contiguous(b1);
    b2_ = torch::stable::contiguous(b2);
    args.b1 = b1_.const_data_ptr();
    args.b2 = b2_.const_data_ptr();
  }

  // Checks that `index` names every row of (rows, D) at most once.
  void check_index(int64_t rows) const {
    std::vector<bool> taken(static_cast<size_t>(rows));
    for (size_t r = 0; r < index_.size(); ++r) {
      const int64_t row = index_[r];
      expect(row >= 0 && row < rows, kOp, ": index: expected values in [0, ", rows, "), got ", row, " in row ", r);
      expect(!taken[row], kOp, ": index: expected no row twice, got ", row, " more than once");
      taken[row] = true;
    }
  }

  void check_sequence(const Tensor& t, const char* name) const {
    expect(t.dim() == 2 && t.size(1) == args.size && t.scalar_type() == w1_.scalar_type() && t.is_cpu(), kOp, ": ",
           name, ": expected shape (T, ", args.size, ") in the dtype of w1");
  }

  void write_into(const Tensor& t) {
    args.out = t.mutable_data_ptr();
    args.out_stride = t.stride(0);
  }

  // A tensor for the gradient of `t`, or an empty one.
  static Tensor gradient_of(const Tensor& t, bool needed) {
    if (!needed) return torch::stable::new_empty(t, {0});
    return t.dim() == 2 ? torch::stable::new_empty(t, {t.size(0), t.size(1)})
                        : torch::stable::new_empty(t, {t.size(0)});
  }

  BoxEmbeddingArgs args{};

 private:
  Tensor w1_, w2_, b1_, b2_;
  std::vector<double> boxes_, frequencies_;
  std::vector<int64_t> index_;
};

void copy_rows(const Tensor& from, const Tensor& to) {
  const int64_t bytes = to.size(1) * static_cast<int64_t>(to.element_size());
  const int64_t stride = from.stride(0) * static_cast<int64_t>(to.element_size());
  const auto* source = static_cast<const char*>(from.const_data_ptr());
  auto* target = static_cast<char*>(to.mutable_data_ptr());
  constexpr int64_t kBlock = 64;
  isa_default::parallel_tasks((to.size(0) + kBlock - 1) / kBlock, [&](int64_t task, isa_default::Scratch&) {
    for (int64_t r = task * kBlock; r < std::min(to.size(0), (task + 1) * kBlock); ++r)
      std::memcpy(target + r * bytes, source + r * stride, static_cast<size_t>(bytes));
  });
}

std::tuple<Tensor, Tensor> box_embedding(const Tensor& boxes, const Tensor& frequencies, const Tensor& w1,
                                         const Tensor& b1, const Tensor& w2, const Tensor& b2,
                                         const std::optional<Tensor>& out, const std::optional<Tensor>& index,
                                         bool save_hidden) {
  Problem problem(boxes, frequencies, w1, w2, index);
  problem.set_biases(b1, b2);
  BoxEmbeddingArgs& args = problem.args;
  expect(out.has_value() == index.has_value(), kOp, ": out, index: expected both or neither");
  if (out) {
    problem.check_sequence(*out, "out");
    problem.check_index(out->size(0));
  }
  Tensor tokens = torch::stable::new_empty(w1, {out ? out->size(0) : args.num_boxes, args.size});
  if (out) copy_rows(with_contiguous_rows(*out), tokens);
  const bool wide = args.dtype == DType::kFloat64;
  Tensor hidden = torch::stable::new_empty(w1, {save_hidden ? args.num_boxes : 0, args.hidden_size},
                                           wide ? ScalarType::Double : ScalarType::Float);
  problem.write_into(tokens);
  args.save_hidden = save_hidden ? hidden.mutable_data_ptr() : nullptr;
  box_embedding_forward_kernel()(args);
  return {tokens, hidden};
}

void box_embedding_(const Tensor& out, const Tensor& index, const Tensor& boxes, const Tensor& frequencies,
                    const Tensor& w1, const Tensor& b1, const Tensor& w2, const Tensor& b2) {
  Problem problem(boxes, frequencies, w1, w2, index);
  problem.set_biases(b1, b2);
  problem.check_sequence(out, "out");
  problem.check_index(out.size(0));
  expect(out.size(1) <= 1 || out.stride(1) == 1, kOp, ": out: expected a contiguous last dimension");
  problem.write_into(out);
  box_embedding_forward_kernel()(problem.args);
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> box_embedding_backward(
    const Tensor& grad, const Tensor& boxes, const Tensor& frequencies, const Tensor& w1, const Tensor& b1,
    const Tensor& w2, const Tensor& b2, const Tensor& hidden, const std::optional<Tensor>& index, bool need_boxes,
    bool need_frequencies, bool need_w1, bool need_b1, bool need_w2, bool need_b2) {
  Problem problem(boxes, frequencies, w1, w2, index);
  BoxEmbeddingArgs& args = problem.args;
  problem.check_sequence(grad, "grad");
  if (index) {
    problem.check_index(grad.size(0));
  } else {
    expect(grad.size(0) == args.num_boxes, kOp, ": grad: expected ", args.num_boxes, " rows to match boxes");
  }
  const auto accumulated = args.dtype == DType::kFloat64 ? ScalarType::Double : ScalarType::Float;
  expect(hidden.dim() == 2 && hidden.size(0) == args.num_boxes && hidden.size(1) == args.hidden_size &&
             hidden.scalar_type() == accumulated,
         kOp, ": hidden: expected what the forward saved, shape (", args.num_boxes, ", ", args.hidden_size, ")");
  const Tensor rows = with_contiguous_rows(grad), kept = torch::stable::contiguous(hidden);
  args.grad = rows.const_data_ptr();
  args.grad_stride = rows.stride(0);
  args.hidden = kept.const_data_ptr();

  const auto make = [](const Tensor& t, bool needed) { return Problem::gradient_of(t, needed); };
  Tensor grad_boxes = make(boxes, need_boxes), grad_frequencies = make(frequencies, need_frequencies);
  Tensor grad_w1 = make(w1, need_w1), grad_b1 = make(b1, need_b1);
  Tensor grad_w2 = make(w2, need_w2), grad_b2 = make(b2, need_b2);
  std::vector<double> wide_boxes(need_boxes ? boxes.numel() : 0);
  std::vector<double> wide_frequencies(need_frequencies ? frequencies.numel() : 0);
  if (need_boxes) args.grad_boxes = wide_boxes.data();
  if (need_frequencies) args.grad_frequencies = wide_frequencies.data();
  if (need_w1) args.grad_w1 = grad_w1.mutable_data_ptr();
  if (need_b1) args.grad_b1 = grad_b1.mutable_data_ptr();
  if (need_w2) args.grad_w2 = grad_w2.mutable_data_ptr();
  if (need_b2) args.grad_b2 = grad_b2.mutable_data_ptr();
  box_embedding_backward_kernel()(args);
  write_reals(wide_boxes, grad_boxes);
  write_reals(wide_frequencies, grad_frequencies);
  return {grad_boxes, grad_frequencies, grad_w1, grad_b1, grad_w2, grad_b2};
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(granvit, m) {
  m.def(
      "box_embedding(Tensor boxes, Tensor frequencies, Tensor w1, Tensor b1, Tensor w2, Tensor b2, Tensor? out, "
      "Tensor? index, bool save_hidden) -> (Tensor, Tensor)");
  m.def(
      "box_embedding_(Tensor(a!) out, Tensor index, Tensor boxes, Tensor frequencies, Tensor w1, Tensor b1, Tensor w2, "
      "Tensor b2) -> ()");
  m.def(
      "box_embedding_backward(Tensor grad, Tensor boxes, Tensor frequencies, Tensor w1, Tensor b1, Tensor w2, "
      "Tensor b2, Tensor hidden, Tensor? index, bool need_boxes, bool need_frequencies, bool need_w1, bool need_b1, "
      "bool need_w2, bool need_b2) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(granvit, CPU, m) {
  m.impl("box_embedding", TORCH_BOX(&box_embedding));
  m.impl("box_embedding_", TORCH_BOX(&box_embedding_));
  m.impl("box_embedding_backward", TORCH_BOX(&box_embedding_backward));
}

}  // namespace granvit::cpu
#endif  // GRANVIT_HOST
