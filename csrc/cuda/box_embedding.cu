// box_embedding on the GPU: Fourier features, linear, GELU, linear; forward and in place.
#include "box_embedding_host.h"
#include "box_embedding_kept.h"

namespace granvit::cuda::embedding {
namespace {

template <typename T>
class Forward {
 public:
  // Writes tokens into `out`; what GELU is applied to, into `hidden` if there is one.
  Forward(const Problem& problem, const Tensor& b1, const Tensor& b2, const std::optional<Tensor>& hidden,
          const Tensor& out, cudaStream_t stream)
      : p(problem), b1(b1), b2(b2), hidden(hidden), out(out), stream(stream) {}

  void run() const {
    const int64_t count = std::min<int64_t>(p.num_boxes, p.num_boxes <= kSomeBoxes ? kSomeBoxes : kBoxesAtOnce);
    const Tensor features = p.new_rows(count, p.num_features), activation = p.new_rows(count, p.hidden_size);
    if (p.num_boxes <= kSomeBoxes) {
      by_own_products(features, activation);
    } else {
      const Tensor tokens = p.new_rows(p.index(0) != nullptr ? count : 0, p.size);
      const Tensor before = hidden ? *hidden : p.new_rows(count, p.hidden_size);
      for (int64_t first = 0; first < p.num_boxes; first += count) {
        const int64_t own = std::min(count, p.num_boxes - first);
        by_library(first, rows_of(features, 0, own), rows_of(before, hidden ? first : 0, own),
                   rows_of(activation, 0, own), p.index(0) != nullptr ? rows_of(tokens, 0, own) : tokens);
      }
    }
  }

 private:
  void by_own_products(const Tensor& features, const Tensor& activation) const {
    make_features<T>(p, 0, features, stream);
    GeluEpilogue<T> gelu{};
    gelu.bias.data = static_cast<const T*>(b1.const_data_ptr());
    if (hidden) gelu.hidden = epilogue_rows<T>(*hidden);
    gelu.activation = epilogue_rows<T>(activation);
    BoxEmbeddingProducts<T>::first_layer(
        {matrix<T>(features), matrix<T>(p.w1), p.num_boxes, p.hidden_size, p.num_features}, gelu, stream);
    TokenEpilogue<T> tokens = token_rows(0);
    tokens.bias.data = static_cast<const T*>(b2.const_data_ptr());
    BoxEmbeddingProducts<T>::second_layer({matrix<T>(activation), matrix<T>(p.w2), p.num_boxes, p.size, p.hidden_size},
                                          tokens, stream);
  }

  // The boxes from `first` on, as many as the tensors have rows; `tokens` is for those that go to rows at an index.
  void by_library(int64_t first, const Tensor& features, const Tensor& before, const Tensor& activation,
                  const Tensor& tokens) const {
    const int64_t count = features.size(0);
    make_features<T>(p, first, features, stream);
    library_layer(before, features, p.w1, b1);
    GeluEpilogue<T> gelu{};
    gelu.activation = epilogue_rows<T>(activation);
    pass<T>(before, count, nullptr, 0, gelu, stream);
    if (p.index(0) == nullptr) return library_layer(rows_of(out, first, count), activation, p.w2, b2);
    library_layer(tokens, activation, p.w2, b2);
    pass<T>(tokens, count, nullptr, 0, token_rows(first), stream);
  }

  TokenEpilogue<T> token_rows(int64_t first) const {
    TokenEpilogue<T> tokens{};
    tokens.out = epilogue_rows<T>(out);
    tokens.out_rows = out.size(0);
    tokens.index = p.index(first);
    tokens.index_stride = p.index_stride();
    return tokens;
  }

  const Problem& p;
  const Tensor &b1, &b2;
  const std::optional<Tensor>& hidden;
  const Tensor& out;
  cudaStream_t stream;
};

void embed(const Problem& p, const Tensor& b1, const Tensor& b2, const std::optional<Tensor>& hidden, const Tensor& out,
           cudaStream_t stream) {
  p.check_bias(b1, p.hidden_size, "b1");
  p.check_bias(b2, p.size, "b2");
  if (p.num_boxes == 0) return;
  const Tensor first_bias = torch::stable::contiguous(b1), second_bias = torch::stable::contiguous(b2);
  with_dtype(p.w1, kOp, "w1", [&](auto* element) {
    using T = std::remove_pointer_t<decltype(element)>;
    Forward<T>(p, first_bias, second_bias, hidden, out, stream).run();
  });
}

// Copies a sequence; for many boxes only the rows that none of them is written to.
void copy_sequence(const Problem& p, const Tensor& from, Tensor to, cudaStream_t stream) {
  constexpr int64_t kMostRows = 0x7fffff00;  // that a pass can count
  const int64_t rows = from.size(0);
  if (p.num_boxes <= kSomeBoxes || rows > kMostRows) {
    torch::stable::copy_(to, from);
    return;
  }
  const Tensor kept = torch::stable::new_empty(from, {rows}, ScalarType::Long);
  auto* numbers = static_cast<int64_t*>(kept.mutable_data_ptr());
  launch(kOp, box_embedding_number_rows_kernel, dim3(grid_blocks(kOp, blocks_of(rows, kKeptThreads))),
         dim3(kKeptThreads), 0, stream, numbers, rows);
  launch(kOp, box_embedding_take_out_kernel, dim3(grid_blocks(kOp, blocks_of(p.num_boxes, kKeptThreads))),
         dim3(kKeptThreads), 0, stream, numbers, rows, p.index(0), p.index_stride(), p.num_boxes);
  const Tensor lines = with_contiguous_lines(from);
  with_dtype(from, kOp, "out", [&](auto* element) {
    using T = std::remove_pointer_t<decltype(element)>;
    TokenEpilogue<T> copy{};
    copy.out = epilogue_rows<T>(to);
    copy.out_rows = rows;
    copy.index = numbers;
    copy.index_stride = 1;
    pass<T>(lines, rows, numbers, 1, copy, stream);
  });
}

std::tuple<Tensor, Tensor> box_embedding(const Tensor& boxes, const Tensor& frequencies, const Tensor& w1,
                                         const Tensor& b1, const Tensor& w2, const Tensor& b2,
                                         const std::optional<Tensor>& out, const std::optional<Tensor>& index,
                                         bool save_hidden) {
  const Problem p(boxes, frequencies, w1, w2, index);
  const DeviceScope device(boxes);
  expect(out.has_value() == index.has_value(), kOp, ": out, index: expected both or neither");
  Tensor tokens = p.new_rows(out ? out->size(0) : p.num_boxes, p.size);
  if (out) {
    p.check_sequence(*out, "out");
    copy_sequence(p, *out, tokens, device.stream);
  }
  Tensor hidden = p.new_rows(save_hidden ? p.num_boxes : 0, p.hidden_size);
  embed(p, b1, b2, save_hidden ? std::optional(hidden) : std::nullopt, tokens, device.stream);
  return {tokens, hidden};
}

void box_embedding_(const Tensor& out, const Tensor& index, const Tensor& boxes, const Tensor& frequencies,
                    const Tensor& w1, const Tensor& b1, const Tensor& w2, const Tensor& b2) {
  const Problem p(boxes, frequencies, w1, w2, index);
  const DeviceScope device(boxes);
  p.check_sequence(out, "out");
  expect(out.size(1) <= 1 || out.stride(1) == 1, kOp, ": out: expected a contiguous last dimension");
  embed(p, b1, b2, std::nullopt, out, device.stream);
}

}  // namespace
}  // namespace granvit::cuda::embedding

namespace granvit::cuda {

STABLE_TORCH_LIBRARY_IMPL(granvit, CUDA, m) {
  m.impl("box_embedding", TORCH_BOX(&embedding::box_embedding));
  m.impl("box_embedding_", TORCH_BOX(&embedding::box_embedding_));
}

}  // namespace granvit::cuda
