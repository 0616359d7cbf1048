// One axis of RoIAlign's sampling matrix A, from csrc/geometry.h: which grid lines an output cell reads, and which
// cells read a grid line. Coordinates are computed in double, as on the CPU.
#pragma once

#include "regions.h"

namespace granvit::cuda {

struct Axis {
  double start;  // box edge in grid units
  double bin;    // length of an output cell in grid units
  int cells;
  int size;      // grid lines
  int samples;   // a cell, at least one
  double scale;  // of a sample's weight: 1 / samples, or 0 where nothing is sampled

  // Where sample k is in its cell. Without a division, which takes long, where the bits are the same.
  __device__ __forceinline__ double fraction(int k) const {
    return (samples & (samples - 1)) == 0 && scale != 0 ? (k + 0.5) * scale : (k + 0.5) / samples;
  }

  __device__ __forceinline__ SampleTaps<double> taps(int p, int k) const {
    return sample_taps_at<double>(start, bin, p, fraction(k), size);
  }

  // A[p, line]
  __device__ __forceinline__ float weight(int p, int line) const {
    double sum = 0;
    for (int k = 0; k < samples; ++k) {
      const auto tap = taps(p, k);
      if (tap.low == line) sum += tap.weight_low;
      if (tap.high == line) sum += tap.weight_high;
    }
    return static_cast<float>(sum * scale);
  }
};

// Edges are relative to the image, low <= high.
__device__ __forceinline__ Axis make_axis(double low, double high, int cells, int size, int sampling_ratio) {
  const double start = low * size;
  const double bin = (high * size - start) / cells;
  const int samples = samples_per_cell(bin, sampling_ratio);
  return {start, bin, cells, size, samples > 0 ? samples : 1, samples > 0 && size > 0 ? 1.0 / samples : 0.0};
}

struct CellSpan {
  int begin;
  int end;
};

// Cells that may read one of the lines [first, last): all that do, and at most a few more.
__device__ __forceinline__ CellSpan cells_reading(const Axis& axis, int first, int last) {
  // Samples at t in (line - 1, line + 1) read a line; the outermost lines also take what is clamped to them.
  constexpr double kMargin = 1e-6;  // beyond the rounding of t
  const double low = (first == 0 ? -1 : first - 1) - kMargin;
  const double high = (last == axis.size ? axis.size : last) + kMargin;
  const double origin = axis.start - 0.5;
  if (axis.scale == 0 || origin > high || origin + axis.bin * axis.cells < low) return {0, 0};
  const double begin = (low - origin) / axis.bin - 1, end = (high - origin) / axis.bin + 1;
  // Comparisons that a quotient without meaning (of a bin of zero) fails keep all cells.
  return {begin > 0 && begin < axis.cells ? static_cast<int>(begin) : 0,
          end < axis.cells && end > 0 ? static_cast<int>(end) + 1 : axis.cells};
}

}  // namespace granvit::cuda
