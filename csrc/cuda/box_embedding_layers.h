// What box_embedding does with the sums of its products, kProductVec columns of a row at a time; see product.h.
#pragma once

#include "elementary.h"
#include "product.h"

namespace granvit::cuda {

// Rows that an epilogue reads or writes.
template <typename T>
struct EpilogueRows {
  T* data;
  int64_t stride;
  bool wide;  // whether kProductVec columns can be read and written 16 bytes at a time

  using Element = std::remove_const_t<T>;
  static constexpr int kOnce = kWide<Element>;

  __device__ __forceinline__ T* at(int64_t row, int column) const { return data + row * stride + column; }

  __device__ __forceinline__ void read(int64_t row, int column, int count, float (&x)[kProductVec]) const {
    const T* from = at(row, column);
    if (wide && count == kProductVec) {
#pragma unroll
      for (int i = 0; i < kProductVec; i += kOnce) {
        float part[kOnce];
        load<Element, kOnce>(from + i, part);
#pragma unroll
        for (int e = 0; e < kOnce; ++e) x[i + e] = part[e];
      }
    } else {
#pragma unroll
      for (int i = 0; i < kProductVec; ++i) x[i] = i < count ? widen(from[i]) : 0.0f;
    }
  }

  __device__ __forceinline__ void write(int64_t row, int column, int count, const float (&x)[kProductVec]) const {
    T* to = at(row, column);
    if (wide && count == kProductVec) {
#pragma unroll
      for (int i = 0; i < kProductVec; i += kOnce) {
        float part[kOnce];
#pragma unroll
        for (int e = 0; e < kOnce; ++e) part[e] = x[i + e];
        store<Element, kOnce>(to + i, part);
      }
    } else {
#pragma unroll
      for (int i = 0; i < kProductVec; ++i)
        if (i < count) to[i] = narrow<Element>(x[i]);
    }
  }
};

// Of kProductVec columns, for all rows of a thread.
template <typename T>
struct Bias {
  const T* data;
  float own[kProductVec];

  __device__ __forceinline__ void start(int column, int count) {
#pragma unroll
    for (int i = 0; i < kProductVec; ++i) own[i] = i < count ? widen(data[column + i]) : 0.0f;
  }
};

// The first layer: adds the bias, keeps that for the backward where it is asked for, and applies GELU.
template <typename T>
struct GeluEpilogue {
  static constexpr bool kSums = false;
  Bias<T> bias;
  EpilogueRows<T> hidden;  // without data: not kept
  EpilogueRows<T> activation;

  __device__ __forceinline__ void start(int column, int count) { bias.start(column, count); }
  __device__ __forceinline__ void operator()(int row, int column, int count, float (&x)[kProductVec]) const {
    add(x, 1.0f, bias.own);
    if (hidden.data != nullptr) hidden.write(row, column, count, x);
#pragma unroll
    for (int i = 0; i < kProductVec; ++i) x[i] *= normal<sizeof(T) == 2>(x[i]).cdf;
    activation.write(row, column, count, x);
  }
};

// The second layer: adds the bias and writes rows of a sequence; those that it does not have are left out.
template <typename T>
struct TokenEpilogue {
  static constexpr bool kSums = false;
  Bias<T> bias;
  EpilogueRows<T> out;
  int64_t out_rows;
  const int64_t* index;  // null: a box's own number
  int64_t index_stride;

  __device__ __forceinline__ void start(int column, int count) { bias.start(column, count); }
  __device__ __forceinline__ void operator()(int row, int column, int count, float (&x)[kProductVec]) const {
    const int64_t target = index == nullptr ? row : index[row * index_stride];
    if (target < 0 || target >= out_rows) return;
    add(x, 1.0f, bias.own);
    out.write(target, column, count, x);
  }
};

// From the gradient of the activation to that of the hidden layer. While `hidden` is at hand: the activation again,
// and for each block of rows the sums of the gradient's columns, which make up that of the first bias.
template <typename T>
struct SlopeEpilogue {
  static constexpr bool kSums = true;
  EpilogueRows<const T> hidden;
  EpilogueRows<T> grad_hidden;
  EpilogueRows<T> activation;  // without data: not wanted
  float* partial_sums;         // (row blocks, columns), or null
  int columns;

  __device__ __forceinline__ void start(int, int) {}
  __device__ __forceinline__ void operator()(int row, int column, int count, float (&x)[kProductVec]) const {
    float h[kProductVec], act[kProductVec];
    hidden.read(row, column, count, h);
#pragma unroll
    for (int i = 0; i < kProductVec; ++i) {
      const Normal n = normal<sizeof(T) == 2>(h[i]);
      act[i] = h[i] * n.cdf;
      x[i] *= n.cdf + h[i] * n.density;
    }
    grad_hidden.write(row, column, count, x);
    if (activation.data != nullptr) activation.write(row, column, count, act);
  }
  __device__ __forceinline__ void finish(int row_block, int column, float sum) const {
    if (partial_sums != nullptr) partial_sums[static_cast<int64_t>(row_block) * columns + column] = sum;
  }
};

template <typename T>
struct PlainEpilogue {
  static constexpr bool kSums = false;
  EpilogueRows<T> out;

  __device__ __forceinline__ void start(int, int) {}
  __device__ __forceinline__ void operator()(int row, int column, int count, float (&x)[kProductVec]) const {
    out.write(row, column, count, x);
  }
};

}  // namespace granvit::cuda
