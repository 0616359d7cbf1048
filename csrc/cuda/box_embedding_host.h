// What the host sides of box_embedding's forward and backward share.
#pragma once

#include <algorithm>
#include <array>

#include "box_embedding_features.h"
#include "box_embedding_products.h"
#include "host.h"

namespace granvit::cuda::embedding {

constexpr const char* kOp = "box_embedding";

// Boxes that go through the library's products together: their layers stay in the second-level cache between a product
// and the pass over it, and memory for them is bounded.
constexpr int64_t kBoxesAtOnce = 8192;
static_assert(kBoxesAtOnce % kPassRows == 0);

inline int64_t blocks_of(int64_t count, int64_t size) { return (count + size - 1) / size; }

inline RealType real_type(const Tensor& t, const char* name) {
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

inline Reals reals(const Tensor& t, const char* name) {
  return {t.const_data_ptr(), real_type(t, name), t.stride(0), t.stride(1)};
}

// A matrix whose lines are contiguous.
inline Tensor with_contiguous_lines(const Tensor& t) {
  return t.size(1) <= 1 || t.stride(1) == 1 ? t : torch::stable::contiguous(t);
}

// Products by PyTorch's own library, which is hard to beat where nothing is to be done on the way. With `out` given,
// autocast leaves the dtypes alone.
// out = a b
inline void library_product(const Tensor& out, const Tensor& a, const Tensor& b) {
  std::array<StableIValue, 3> stack{torch::stable::detail::from(a), torch::stable::detail::from(b),
                                    torch::stable::detail::from(out)};
  TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("aten::mm", "out", stack.data(), TORCH_ABI_VERSION));
  torch::stable::detail::to<Tensor>(stack[0]);  // takes the result, which is `out`, off the stack
}
// out = x w^T + bias
inline void library_layer(const Tensor& out, const Tensor& x, const Tensor& w, const Tensor& bias) {
  std::array<StableIValue, 4> stack{torch::stable::detail::from(x), torch::stable::detail::from(w),
                                    torch::stable::detail::from(std::optional<Tensor>(bias)),
                                    torch::stable::detail::from(out)};
  TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("aten::linear", "out", stack.data(), TORCH_ABI_VERSION));
  torch::stable::detail::to<Tensor>(stack[0]);
}

inline Tensor rows_of(Tensor t, int64_t first, int64_t count) { return torch::stable::narrow(t, 0, first, count); }

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
    constexpr int64_t kMostBoxes = 0x7fffff00, kWidest = 1 << 22;  // so that int counts rows and blocks of columns fit
    expect(boxes.size(0) <= kMostBoxes, kOp, ": boxes: expected at most ", kMostBoxes, " of them");
    expect(std::max({w1.size(0), w1.size(1), w2.size(0)}) <= kWidest, kOp, ": w1, w2: expected at most ", kWidest,
           " rows and columns");
    num_boxes = static_cast<int>(boxes.size(0));
    num_features = static_cast<int>(w1.size(1));
    hidden_size = static_cast<int>(w1.size(0));
    size = static_cast<int>(w2.size(0));
    angles = {reals(boxes, "boxes"), reals(frequencies, "frequencies"), 0, num_boxes, num_features / 2};
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

  // Of the boxes from `first` on; null where there is none.
  const int64_t* index(int64_t first) const {
    return index_ ? index_->const_data_ptr<int64_t>() + first * index_stride() : nullptr;
  }
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
    return {data, t.stride(0), aligned(data, sizeof(T), kEpilogueVec, {t.stride(0)})};
  } else {
    auto* data = static_cast<T*>(t.mutable_data_ptr());
    return {data, t.stride(0), aligned(data, sizeof(T), kEpilogueVec, {t.stride(0)})};
  }
}

// Features of the boxes from `first` on, as many as `features` has rows.
template <typename T>
void make_features(const Problem& p, int64_t first, const Tensor& features, cudaStream_t stream) {
  Angles angles = p.angles;
  angles.first_box = static_cast<int>(first);
  angles.num_boxes = static_cast<int>(features.size(0));
  const int64_t column_blocks = blocks_of(p.num_features / 2, kFeatureThreads);
  launch(kOp, box_embedding_features_kernel<T>,
         dim3(grid_blocks(kOp, blocks_of(angles.num_boxes, kFeatureRows)), static_cast<unsigned>(column_blocks)),
         dim3(kFeatureThreads), 4 * kFeatureRows * sizeof(double), stream, angles,
         static_cast<T*>(features.mutable_data_ptr()));
}

// Hands `rows` rows of `from`, those at `index` where there is one, to an epilogue.
template <typename T, typename Epilogue>
void pass(const Tensor& from, int64_t rows, const int64_t* index, int64_t index_stride, const Epilogue& epilogue,
          cudaStream_t stream) {
  const PassArgs<T> args{epilogue_rows<const T>(from),  from.size(0), index, index_stride, static_cast<int>(rows),
                         static_cast<int>(from.size(1))};
  launch(
      kOp, box_embedding_pass_kernel<T, Epilogue>,
      dim3(grid_blocks(kOp, blocks_of(rows, kPassRows)), static_cast<unsigned>(blocks_of(args.columns, kPassColumns))),
      dim3(kEpilogueThreads), Epilogue::kSums ? kEpilogueSumBytes : 0, stream, args, epilogue);
}

}  // namespace granvit::cuda::embedding
