// The grid cells that a region covers, from csrc/geometry.h, in double as on the CPU.
#pragma once

#include "regions.h"

namespace granvit::cuda {

struct Footprint {
  double x0, y0, x1, y1;  // in grid units, inside the image
  int row;
  int column;
  int height;
  int width;
  bool whole;  // a box without area stands for one whole cell

  __device__ __forceinline__ int64_t cells() const { return static_cast<int64_t>(height) * width; }

  // Logarithm of the coverage of the cell at (row + y, column + x).
  __device__ __forceinline__ float log_coverage(int y, int x) const {
    if (whole) return 0;
    const double cover = cell_coverage(y0, y1, row + y) * cell_coverage(x0, x1, column + x);
    return cover == 1 ? 0.0f : static_cast<float>(log(cover));
  }
};

__device__ __forceinline__ double clamp_to_image(double x) { return x > 0 ? (x < 1 ? x : 1) : 0; }

// Without cells for an image without tokens.
__device__ __forceinline__ Footprint make_footprint(const Region& region, const ImageGrid& image) {
  const double x0 = clamp_to_image(region.x0) * image.width, x1 = clamp_to_image(region.x1) * image.width;
  const double y0 = clamp_to_image(region.y0) * image.height, y1 = clamp_to_image(region.y1) * image.height;
  if (image.width == 0) return {0, 0, 0, 0, 0, 0, 0, 0, true};
  if (!(x1 > x0 && y1 > y0))
    return {x0, y0, x1, y1, centre_cell(y0, y1, image.height), centre_cell(x0, x1, image.width), 1, 1, true};
  const CellRange rows = covered_cells(y0, y1, image.height), columns = covered_cells(x0, x1, image.width);
  return {x0, y0, x1, y1, rows.first, columns.first, rows.last - rows.first, columns.last - columns.first, false};
}

}  // namespace granvit::cuda
