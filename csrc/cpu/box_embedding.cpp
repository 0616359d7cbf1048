// box_embedding on the CPU: Fourier features, linear, GELU, linear; forward and backward.
#include <algorithm>

#include "elementary.h"
#include "gemm.h"

namespace granvit::cpu {

// Weights may have any row stride; `hidden` is what GELU is applied to, (R, D1) in the accumulation type.
struct BoxEmbeddingArgs {
  DType dtype;
  const double* boxes;        // (R, 4)
  const double* frequencies;  // (4, M)
  int64_t num_boxes, num_frequencies, hidden_size, size;
  const void* w1;
  int64_t w1_stride;
  const void* b1;
  const void* w2;
  int64_t w2_stride;
  const void* b2;
  const int64_t* index;  // row of each box in out or grad; null: the box's own number
  // Forward
  void* out;
  int64_t out_stride;
  void* save_hidden;  // null: not kept
  // Backward; a gradient that is null is not computed
  const void* grad;
  int64_t grad_stride;
  const void* hidden;
  double* grad_boxes;        // (R, 4)
  double* grad_frequencies;  // (4, M)
  void* grad_w1;
  void* grad_b1;
  void* grad_w2;
  void* grad_b2;
};

GRANVIT_DECLARE_KERNEL(box_embedding_forward, BoxEmbeddingArgs)
GRANVIT_DECLARE_KERNEL(box_embedding_backward, BoxEmbeddingArgs)

namespace GRANVIT_ISA {

namespace {

// Boxes of a pass: bounds the scratch memory of the forward.
constexpr int64_t kBoxesAtOnce = 1024;

template <typename V>
GRANVIT_INLINE V first_lanes(V x, int lanes) {
  for (int i = lanes; i < static_cast<int>(sizeof x / sizeof x[0]); ++i) x[i] = 0;
  return x;
}

// Calls body(m, lanes, sine_cosine) for the frequencies of one box, a vector at a time.
template <typename A, typename Body>
GRANVIT_INLINE void for_each_angle(const BoxEmbeddingArgs& a, int64_t box, const Body& body) {
  const double* edge = a.boxes + 4 * box;
  for (int64_t m = 0; m < a.num_frequencies; m += kLanes<A>) {
    const int lanes = static_cast<int>(std::min<int64_t>(kLanes<A>, a.num_frequencies - m));
    // Turns in double: products of float32 numbers are exact in it.
    Vec<double> turns[kLanes<A> / kLanes<double>] = {};
    for (int64_t i = 0; i < 4; ++i) {
      const double* row = a.frequencies + i * a.num_frequencies + m;
      for (int part = 0; part < kLanes<A> / kLanes<double>; ++part) {
        const int count = std::clamp(lanes - part * kLanes<double>, 0, kLanes<double>);
        turns[part] += splat(edge[i]) * load_some(row + part * kLanes<double>, count);
      }
    }
    SineCosine<A> value;
    sine_cosine(turns, &value);
    body(m, lanes, value);
  }
}

template <typename T>
Rows<T> make_features(const BoxEmbeddingArgs& a, int64_t first_box, int64_t count, Scratch& scratch) {
  using A = acc_t<T>;
  const Rows<T> features = take_rows<T>(scratch, count, 2 * a.num_frequencies);
  constexpr int64_t kBlock = 16;
  parallel_tasks((count + kBlock - 1) / kBlock, [&](int64_t task, Scratch& own) {
    const int64_t padded = row_units<T>(2 * a.num_frequencies) * Units<T>::kDepth;
    A* line = own.take<A>(padded);
    for (int64_t r = task * kBlock; r < std::min(count, (task + 1) * kBlock); ++r) {
      std::fill(line + std::max<int64_t>(padded - 2 * kLanes<A>, 0), line + padded, A(0));
      for_each_angle<A>(a, first_box + r, [&](int64_t m, int lanes, const SineCosine<A>& value) {
        store_some(line + m, value.sine, lanes);
        store_some(line + a.num_frequencies + m, value.cosine, lanes);
      });
      for (int64_t c = 0; c < padded; c += kLanes<A>) Units<T>::store_row(features.row(r), c, load(line + c));
    }
  });
  return features;
}

template <typename T>
void forward(const BoxEmbeddingArgs& a) {
  using A = acc_t<T>;
  Scratch scratch;
  for (int64_t first = 0; first < a.num_boxes; first += kBoxesAtOnce) {
    const int64_t count = std::min(kBoxesAtOnce, a.num_boxes - first);
    scratch.reset();
    const Rows<T> features = make_features<T>(a, first, count, scratch);
    const Rows<T> activations = take_rows<T>(scratch, count, a.hidden_size);
    clear_padding(activations, count, a.hidden_size);
    const T* b1 = static_cast<const T*>(a.b1);
    multiply_rows<T>(
        features, count, 2 * a.num_frequencies, static_cast<const T*>(a.w1), a.w1_stride, a.hidden_size,
        [&](int64_t r, int64_t column, int64_t columns, const A* values) {
          for (int64_t c = 0; c < columns; c += kLanes<A>) {
            const int lanes = static_cast<int>(std::min<int64_t>(kLanes<A>, columns - c));
            const Vec<A> h = load(values + c) + load_some(b1 + column + c, lanes);
            if (a.save_hidden != nullptr)
              store_some(static_cast<A*>(a.save_hidden) + (first + r) * a.hidden_size + column + c, h, lanes);
            const Vec<A> g = gelu<A>(h);
            Units<T>::store_row(activations.row(r), column + c, lanes == kLanes<A> ? g : first_lanes(g, lanes));
          }
        });
    const T* b2 = static_cast<const T*>(a.b2);
    multiply_rows<T>(activations, count, a.hidden_size, static_cast<const T*>(a.w2), a.w2_stride, a.size,
                     [&](int64_t r, int64_t column, int64_t columns, const A* values) {
                       const int64_t row = a.index != nullptr ? a.index[first + r] : first + r;
                       T* to = static_cast<T*>(a.out) + row * a.out_stride + column;
                       for (int64_t c = 0; c < columns; c += kLanes<A>) {
                         const int lanes = static_cast<int>(std::min<int64_t>(kLanes<A>, columns - c));
                         store_some(to + c, load(values + c) + load_some(b2 + column + c, lanes), lanes);
                       }
                     });
  }
}

// From the gradient of the features (R, 2M) to those of boxes and frequencies.
template <typename A>
void angle_gradients(const BoxEmbeddingArgs& a, const A* grad_features, Scratch& scratch) {
  constexpr double kTurn = 6.283185307179586476925;
  const int64_t count = a.num_frequencies;
  double* grad_angle = scratch.take<double>(a.num_boxes * count);  // of turns
  parallel_tasks(a.num_boxes, [&](int64_t r, Scratch&) {
    double* to = grad_angle + r * count;
    for_each_angle<A>(a, r, [&](int64_t m, int lanes, const SineCosine<A>& value) {
      const A* from = grad_features + r * 2 * count + m;
      for (int i = 0; i < lanes; ++i)
        to[m + i] = kTurn * (static_cast<double>(from[i]) * value.cosine[i] -
                             static_cast<double>(from[count + i]) * value.sine[i]);
    });
    if (a.grad_boxes == nullptr) return;
    for (int64_t i = 0; i < 4; ++i) {
      double sum = 0;
      for (int64_t m = 0; m < count; ++m) sum += to[m] * a.frequencies[i * count + m];
      a.grad_boxes[4 * r + i] = sum;
    }
  });
  if (a.grad_frequencies == nullptr) return;
  constexpr int64_t kBlock = 64;
  parallel_tasks((count + kBlock - 1) / kBlock, [&](int64_t task, Scratch&) {
    const int64_t begin = task * kBlock, end = std::min(count, begin + kBlock);
    for (int64_t i = 0; i < 4; ++i) {
      double* to = a.grad_frequencies + i * count;
      std::fill(to + begin, to + end, 0.0);
      for (int64_t r = 0; r < a.num_boxes; ++r)
        for (int64_t m = begin; m < end; ++m) to[m] += a.boxes[4 * r + i] * grad_angle[r * count + m];
    }
  });
}

template <typename T>
void backward(const BoxEmbeddingArgs& a) {
  using A = acc_t<T>;
  Scratch scratch;
  const int64_t boxes = a.num_boxes, width = 2 * a.num_frequencies;
  const A* hidden = static_cast<const A*>(a.hidden);
  const Rows<T> grad = take_rows<T>(scratch, boxes, a.size);
  constexpr int64_t kBlock = 8;
  parallel_tasks((boxes + kBlock - 1) / kBlock, [&](int64_t task, Scratch&) {
    for (int64_t r = task * kBlock; r < std::min(boxes, (task + 1) * kBlock); ++r) {
      const T* from = static_cast<const T*>(a.grad) + (a.index != nullptr ? a.index[r] : r) * a.grad_stride;
      for_each_row_vec<T>(
          a.size, [&](int64_t c, int lanes) { Units<T>::store_row(grad.row(r), c, load_some(from + c, lanes)); });
    }
  });
  if (a.grad_b2 != nullptr) sum_rows<T>(grad, boxes, a.size, static_cast<T*>(a.grad_b2));
  if (a.grad_w2 != nullptr)
    weight_gradient<T>(
        grad, a.size, boxes, a.hidden_size, scratch,
        [&](int64_t r, int64_t c, int lanes) { return gelu<A>(load_some(hidden + r * a.hidden_size + c, lanes)); },
        static_cast<T*>(a.grad_w2));

  const bool angles = a.grad_boxes != nullptr || a.grad_frequencies != nullptr;
  if (a.grad_w1 == nullptr && a.grad_b1 == nullptr && !angles) return;
  const Rows<T> grad_hidden = take_rows<T>(scratch, boxes, a.hidden_size);
  clear_padding(grad_hidden, boxes, a.hidden_size);
  input_gradient<T>(grad, boxes, a.size, static_cast<const T*>(a.w2), a.w2_stride, a.hidden_size,
                    [&](int64_t r, int64_t column, int64_t count, const A* values) {
                      for (int64_t c = 0; c < count; c += kLanes<A>) {
                        const int lanes = static_cast<int>(std::min<int64_t>(kLanes<A>, count - c));
                        const Vec<A> h = load_some(hidden + r * a.hidden_size + column + c, lanes);
                        Units<T>::store_row(grad_hidden.row(r), column + c, load(values + c) * gelu_derivative<A>(h));
                      }
                    });
  if (a.grad_b1 != nullptr) sum_rows<T>(grad_hidden, boxes, a.hidden_size, static_cast<T*>(a.grad_b1));
  if (a.grad_w1 != nullptr) {
    const Rows<T> features = make_features<T>(a, 0, boxes, scratch);
    weight_gradient<T>(
        grad_hidden, a.hidden_size, boxes, width, scratch,
        [&](int64_t r, int64_t c, int) { return Units<T>::load_row(features.row(r), c); }, static_cast<T*>(a.grad_w1));
  }
  if (!angles) return;
  A* grad_features = scratch.take<A>(boxes * width);
  input_gradient<T>(grad_hidden, boxes, a.hidden_size, static_cast<const T*>(a.w1), a.w1_stride, width,
                    [&](int64_t r, int64_t column, int64_t count, const A* values) {
                      std::copy(values, values + count, grad_features + r * width + column);
                    });
  angle_gradients<A>(a, grad_features, scratch);
}

}  // namespace

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
