// roi_align forward: a thread owns one output row and one vector of channels and walks along the row. It keeps the two
// columns between which it samples, each blended from the grid rows under the output row, so a column is read once.
#pragma once

#include "roi_align_args.h"

namespace granvit::cuda {

constexpr int kSampleChunk = 256;  // samples along an output row that are prepared at a time
constexpr int kLines = 16;         // grid rows under an output row that are prepared

struct Sample {
  int low;  // column; the next one has weight_high
  float weight_low;
  float weight_high;
};

struct Line {
  int64_t offset;  // of a grid row, in elements
  float weight;
};

struct RoiAlignForwardShared {
  Axis axis_y;
  Axis axis_x;
  Sample samples[kSampleChunk];
  Line lines[kMaxRows][kLines];
  int counts[kMaxRows];
};

// The grid rows that output row p reads, each once, an even number. Returns how many; -1 where they are too many.
__device__ inline int prepare_lines(const Axis& axis, int p, int64_t line_stride, Line* lines) {
  if (axis.samples * 2 > kLines) return -1;
  if (axis.scale == 0) return 0;
  int count = 0;
  for (int k = 0; k < axis.samples; ++k) {
    const auto tap = axis.taps(p, k);
#pragma unroll
    for (int side = 0; side < 2; ++side) {
      const auto weight = static_cast<float>((side == 0 ? tap.weight_low : tap.weight_high) * axis.scale);
      const int64_t offset = (side == 0 ? tap.low : tap.high) * line_stride;
      if (weight == 0) continue;
      int i = 0;
      while (i < count && lines[i].offset != offset) ++i;
      if (i == count) lines[count++] = {offset, 0.0f};
      lines[i].weight += weight;
    }
  }
  if (count % 2 != 0) {
    lines[count] = {lines[count - 1].offset, 0.0f};
    ++count;
  }
  return count;
}

// The column that starts at `column`, blended over the grid rows under output row p.
template <typename T, int kVec>
__device__ __forceinline__ void blend(const T* column, const Line* lines, int count, const Axis& axis, int p,
                                      int64_t line_stride, float (&out)[kVec]) {
  set_zero(out);
  float first[kVec], second[kVec];
  for (int i = 0; i < count; i += 2) {
    load(column + lines[i].offset, first);
    load(column + lines[i + 1].offset, second);
    add(out, lines[i].weight, first);
    add(out, lines[i + 1].weight, second);
  }
  if (count >= 0) return;
  for (int k = 0; k < axis.samples; ++k) {
    const auto tap = axis.taps(p, k);
    if (tap.weight_low == 0 && tap.weight_high == 0) continue;
    load(column + tap.low * line_stride, first);
    load(column + tap.high * line_stride, second);
    add(out, static_cast<float>(tap.weight_low * axis.scale), first);
    add(out, static_cast<float>(tap.weight_high * axis.scale), second);
  }
}

template <typename T, int kVec>
__global__ void __launch_bounds__(kMaxThreads, 1) roi_align_forward_kernel(RoiAlignArgs<T, const T> a) {
  auto& shared = *reinterpret_cast<RoiAlignForwardShared*>(shared_memory());
  const int row = threadIdx.x / a.shape.lanes, lane = threadIdx.x % a.shape.lanes;
  int64_t r, group;
  if (a.work_start == nullptr) {
    const int groups = (a.outputs.height + a.shape.rows - 1) / a.shape.rows;
    r = blockIdx.x / groups;
    group = blockIdx.x % groups;
  } else {
    r = find_segment(a.work_start, a.regions.count, blockIdx.x);
    group = blockIdx.x - a.work_start[r];
  }
  const int64_t b = a.regions.image(r);
  const ImageGrid image = a.images[b];
  const auto out = a.outputs[r];
  if (threadIdx.x == 0) {
    const Region region = a.regions[r];
    shared.axis_y = make_axis(region.y0, region.y1, out.height, image.height, a.sampling_ratio);
    shared.axis_x = make_axis(region.x0, region.x1, out.width, image.width, a.sampling_ratio);
  }
  __syncthreads();
  const int64_t column_stride = a.tokens.row_stride, line_stride = image.width * column_stride;
  const int64_t channel = (static_cast<int64_t>(blockIdx.y) * a.shape.lanes + lane) * kVec;
  const int p = static_cast<int>(group * a.shape.rows) + row;
  const bool owner = row < a.shape.rows && p < out.height && channel < a.channels;
  if (lane == 0 && row < a.shape.rows && p < out.height)
    shared.counts[row] = prepare_lines(shared.axis_y, p, line_stride, shared.lines[row]);

  const T* tokens = a.tokens.image(image, b) + channel;
  T* to = a.cells + (out.first_cell + static_cast<int64_t>(p) * out.width) * a.channels + channel;
  float left[kVec], right[kVec], sum[kVec];
  int left_column = -1, right_column = -1, k = 0;
  set_zero(sum);
  const auto read = [&](int column, float (&into)[kVec]) {
    blend(tokens + column * column_stride, shared.lines[row], shared.counts[row], shared.axis_y, p, line_stride, into);
  };
  const Axis& axis_x = shared.axis_x;
  const int cell_samples = axis_x.samples;
  const int64_t samples = static_cast<int64_t>(out.width) * cell_samples;
  for (int64_t first = 0; first < samples; first += kSampleChunk) {
    const int chunk = static_cast<int>(min(static_cast<int64_t>(kSampleChunk), samples - first));
    __syncthreads();
    for (int i = threadIdx.x; i < chunk; i += blockDim.x) {
      const int64_t s = first + i;
      const auto tap = axis_x.taps(static_cast<int>(s / cell_samples), static_cast<int>(s % cell_samples));
      shared.samples[i] = {tap.low, static_cast<float>(tap.weight_low * axis_x.scale),
                           static_cast<float>(tap.weight_high * axis_x.scale)};
    }
    __syncthreads();
    if (!owner) continue;
    for (int i = 0; i < chunk; ++i) {
      const Sample sample = shared.samples[i];
      if (sample.weight_low != 0 || sample.weight_high != 0) {
        if (sample.low != left_column) {
          if (sample.low == right_column) {
#pragma unroll
            for (int c = 0; c < kVec; ++c) left[c] = right[c];
          } else {
            read(sample.low, left);
          }
          left_column = sample.low;
        }
        add(sum, sample.weight_low, left);
        if (sample.weight_high != 0) {
          if (sample.low + 1 != right_column) {
            right_column = sample.low + 1;
            read(right_column, right);
          }
          add(sum, sample.weight_high, right);
        }
      }
      if (++k == cell_samples) {
        store(to, sum);
        set_zero(sum);
        to += a.channels;
        k = 0;
      }
    }
  }
}

}  // namespace granvit::cuda
