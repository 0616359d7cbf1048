// What is done with the rows of a tile, kEpilogueVec neighbouring columns at a time.
#pragma once

#include <type_traits>

#include "vec.h"

namespace granvit::cuda {

constexpr int kEpilogueThreads = 128;
constexpr int kEpilogueVec = 8;

// Rows in memory that an epilogue reads or writes.
template <typename T>
struct EpilogueRows {
  T* data;
  int64_t stride;
  bool wide;  // whether kEpilogueVec columns can be read and written 16 bytes at a time

  using Element = std::remove_const_t<T>;
  static constexpr int kOnce = kWide<Element>;

  __device__ __forceinline__ T* at(int64_t row, int column) const { return data + row * stride + column; }

  __device__ __forceinline__ void read(int64_t row, int column, int count, float (&x)[kEpilogueVec]) const {
    const T* from = at(row, column);
    if (wide && count == kEpilogueVec) {
#pragma unroll
      for (int i = 0; i < kEpilogueVec; i += kOnce) {
        float part[kOnce];
        load<Element, kOnce>(from + i, part);
#pragma unroll
        for (int e = 0; e < kOnce; ++e) x[i + e] = part[e];
      }
    } else {
#pragma unroll
      for (int i = 0; i < kEpilogueVec; ++i) x[i] = i < count ? widen(from[i]) : 0.0f;
    }
  }

  __device__ __forceinline__ void write(int64_t row, int column, int count, const float (&x)[kEpilogueVec]) const {
    T* to = at(row, column);
    if (wide && count == kEpilogueVec) {
#pragma unroll
      for (int i = 0; i < kEpilogueVec; i += kOnce) {
        float part[kOnce];
#pragma unroll
        for (int e = 0; e < kOnce; ++e) part[e] = x[i + e];
        store<Element, kOnce>(to + i, part);
      }
    } else {
#pragma unroll
      for (int i = 0; i < kEpilogueVec; ++i)
        if (i < count) to[i] = narrow<Element>(x[i]);
    }
  }
};

// The place of a tile in a matrix of rows x columns.
struct TileRange {
  int row_block;
  int rows;
  int first_column;
  int columns;
};

// Bytes of shared memory that apply_epilogue needs for sums.
constexpr int kEpilogueSumBytes = kEpilogueThreads * kEpilogueVec * static_cast<int>(sizeof(float));

// read(row of the tile, column of the tile, count, x) gives what epilogue(row, column, count, x) takes; `count` columns
// of x are inside the matrix. Where Epilogue::kSums, x is added up over the tile's rows after that, and the epilogue
// gets the sums of each column. Every thread of the block takes part.
template <int kRows, int kColumns, typename Epilogue, typename Read>
__device__ __forceinline__ void apply_epilogue(Epilogue& epilogue, const TileRange& range, float* shared,
                                               const Read& read) {
  constexpr int kGroups = kColumns / kEpilogueVec, kRowsAtOnce = kEpilogueThreads / kGroups;
  const int own = threadIdx.x % kGroups * kEpilogueVec, column = range.first_column + own;
  const int count = min(range.columns - column, kEpilogueVec);
  const int first_row = range.row_block * kRows, rows = count > 0 ? min(range.rows - first_row, kRows) : 0;
  float total[kEpilogueVec];
  set_zero(total);
  epilogue.start(column, count);
#pragma unroll 1
  for (int r = threadIdx.x / kGroups; r < rows; r += kRowsAtOnce) {
    float x[kEpilogueVec];
    read(r, own, count, x);
    epilogue(first_row + r, column, count, x);
    if constexpr (Epilogue::kSums) add(total, 1.0f, x);
  }
  if constexpr (Epilogue::kSums) {
    __syncthreads();  // what `read` reads from shared memory has been read
    store_floats(shared + threadIdx.x / kGroups * kColumns + own, total);
    __syncthreads();
    for (int c = threadIdx.x; c < kColumns && range.first_column + c < range.columns; c += kEpilogueThreads) {
      float sum = 0;
      for (int r = 0; r < kRowsAtOnce; ++r) sum += shared[r * kColumns + c];
      epilogue.finish(range.row_block, range.first_column + c, sum);
    }
  }
}

}  // namespace granvit::cuda
