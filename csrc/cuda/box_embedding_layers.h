// What box_embedding does with the rows of its products, kEpilogueVec columns at a time: as the epilogue of a product,
// or in a pass of its own over rows in memory.
#pragma once

#include "elementary.h"
#include "product.h"

namespace granvit::cuda {

// Of kEpilogueVec columns, for all rows of a thread.
template <typename T>
struct Bias {
  const T* data;  // null: none
  float own[kEpilogueVec];

  __device__ __forceinline__ void start(int column, int count) {
#pragma unroll
    for (int i = 0; i < kEpilogueVec; ++i) own[i] = data != nullptr && i < count ? widen(data[column + i]) : 0.0f;
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
  __device__ __forceinline__ void operator()(int row, int column, int count, float (&x)[kEpilogueVec]) const {
    add(x, 1.0f, bias.own);
    if (hidden.data != nullptr) hidden.write(row, column, count, x);
#pragma unroll
    for (int i = 0; i < kEpilogueVec; ++i) x[i] *= normal_for<T>(x[i]).cdf;
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
  __device__ __forceinline__ void operator()(int row, int column, int count, float (&x)[kEpilogueVec]) const {
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
  __device__ __forceinline__ void operator()(int row, int column, int count, float (&x)[kEpilogueVec]) const {
    float h[kEpilogueVec], act[kEpilogueVec];
    hidden.read(row, column, count, h);
#pragma unroll
    for (int i = 0; i < kEpilogueVec; ++i) {
      const Normal n = normal_for<T>(h[i]);
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

// Writes rows as they are.
template <typename T>
struct PlainEpilogue {
  static constexpr bool kSums = false;
  EpilogueRows<T> out;

  __device__ __forceinline__ void start(int, int) {}
  __device__ __forceinline__ void operator()(int row, int column, int count, float (&x)[kEpilogueVec]) const {
    out.write(row, column, count, x);
  }
};

// The sums of columns for each block of rows, and a copy of the rows. Either may be missing.
template <typename T>
struct SumEpilogue {
  static constexpr bool kSums = true;
  EpilogueRows<T> copy;
  float* partial_sums;  // (row blocks, columns)
  int columns;

  __device__ __forceinline__ void start(int, int) {}
  __device__ __forceinline__ void operator()(int row, int column, int count, float (&x)[kEpilogueVec]) const {
    if (copy.data != nullptr) copy.write(row, column, count, x);
  }
  __device__ __forceinline__ void finish(int row_block, int column, float sum) const {
    if (partial_sums != nullptr) partial_sums[static_cast<int64_t>(row_block) * columns + column] = sum;
  }
};

constexpr int kPassRows = 128;  // of a block
constexpr int kPassColumns = 128;

template <typename T>
struct PassArgs {
  EpilogueRows<const T> from;
  int64_t from_rows;
  const int64_t* index;  // row of `from` for each row, zeros where it has no such row; null: its own number
  int64_t index_stride;
  int rows;
  int columns;
};

template <typename T, typename Epilogue>
__global__ void __launch_bounds__(kEpilogueThreads) box_embedding_pass_kernel(PassArgs<T> args, Epilogue epilogue) {
  const int first_row = blockIdx.x * kPassRows;
  apply_epilogue<kPassRows, kPassColumns>(
      epilogue, {static_cast<int>(blockIdx.x), args.rows, static_cast<int>(blockIdx.y) * kPassColumns, args.columns},
      reinterpret_cast<float*>(shared_memory()), [&](int r, int own, int count, float (&x)[kEpilogueVec]) {
        const int row = first_row + r;
        const int64_t source = args.index == nullptr ? row : args.index[row * args.index_stride];
        set_zero(x);
        if (source < 0 || source >= args.from_rows) return;
        args.from.read(source, static_cast<int>(blockIdx.y) * kPassColumns + own, count, x);
      });
}

}  // namespace granvit::cuda
