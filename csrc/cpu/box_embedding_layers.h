// The work of box_embedding on the CPU: features, both layers, and the way back.
#pragma once

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
}  // namespace GRANVIT_ISA
}  // namespace granvit::cpu
