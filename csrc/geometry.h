// The one definition of where RoIAlign samples and of how much of a grid cell a box covers, for host and device.
#pragma once

#ifdef __CUDACC__
#define GRANVIT_HD __host__ __device__ __forceinline__
#else
#define GRANVIT_HD inline __attribute__((always_inline))
#endif

namespace granvit {

// Number of samples that RoIAlign takes in one output cell along one axis.
template <typename T>
GRANVIT_HD int samples_per_cell(T bin, int sampling_ratio) {
  if (sampling_ratio > 0) return sampling_ratio;
  const int whole = static_cast<int>(bin);
  const int up = whole + (static_cast<T>(whole) < bin ? 1 : 0);  // ceil, without <cmath> on the device
  return up > 0 ? up : 0;
}

// Two grid lines and their weights, for one sample. A sample beyond [-1, size] has weight zero on both.
template <typename T>
struct SampleTaps {
  int low;
  int high;
  T weight_low;
  T weight_high;
};

// The sample at `fraction` of output cell p. `start` is the box edge in grid units, `bin` the cell's length in grid
// units.
template <typename T>
GRANVIT_HD SampleTaps<T> sample_taps_at(T start, T bin, int p, T fraction, int size) {
  const T t = start - T(0.5) + bin * (static_cast<T>(p) + fraction);
  if (!(t >= T(-1) && t <= static_cast<T>(size))) return {0, 0, T(0), T(0)};
  if (t <= T(0)) return {0, 0, T(1), T(0)};
  const int low = static_cast<int>(t);
  if (low >= size - 1) return {size - 1, size - 1, T(1), T(0)};
  const T fraction_of_line = t - static_cast<T>(low);
  return {low, low + 1, T(1) - fraction_of_line, fraction_of_line};
}

// Sample k of `samples` in output cell p.
template <typename T>
GRANVIT_HD SampleTaps<T> sample_taps(T start, T bin, int p, int k, int samples, int size) {
  return sample_taps_at(start, bin, p, (static_cast<T>(k) + T(0.5)) / static_cast<T>(samples), size);
}

// Length of [start, end] inside the unit cell [j, j + 1].
template <typename T>
GRANVIT_HD T cell_coverage(T start, T end, int j) {
  const T low = start > static_cast<T>(j) ? start : static_cast<T>(j);
  const T high = end < static_cast<T>(j + 1) ? end : static_cast<T>(j + 1);
  return high > low ? high - low : T(0);
}

// Cells of one axis that an interval of positive length inside [0, size] touches: [first, last).
struct CellRange {
  int first;
  int last;
};

template <typename T>
GRANVIT_HD CellRange covered_cells(T start, T end, int size) {
  const int first = static_cast<int>(start);
  const int whole = static_cast<int>(end);
  const int last = whole + (static_cast<T>(whole) < end ? 1 : 0);
  return {first < size - 1 ? first : size - 1, last < size ? last : size};
}

// The cell that holds the middle of an interval inside [0, size].
template <typename T>
GRANVIT_HD int centre_cell(T start, T end, int size) {
  const int cell = static_cast<int>((start + end) * T(0.5));
  return cell < size - 1 ? cell : size - 1;
}

}  // namespace granvit
