// Plain descriptions of images and regions that every kernel reads. No torch types: kernels include only this.
#pragma once

#include <cstdint>

#include "vec.h"

namespace granvit::cpu {

// One image's patch grid; `first_token` counts the tokens of the images before it.
struct ImageGrid {
  int64_t height;
  int64_t width;
  int64_t first_token;
};

// One region: its box relative to its image, and its output grid (where an op has one).
struct Region {
  double x0, y0, x1, y1;
  int64_t image;
  int64_t out_height;
  int64_t out_width;
  int64_t first_cell;
};

struct RegionPlan {
  const ImageGrid* images;
  int64_t num_images;
  int64_t num_tokens;
  const Region* regions;
  int64_t num_regions;
  int64_t num_cells;
  // Regions of image b, in the order given: by_image[image_start[b]] .. by_image[image_start[b + 1] - 1].
  const int64_t* by_image;
  const int64_t* image_start;
};

// Tokens in memory. Strides count elements; image_stride is 0 for packed tokens, which only have a row stride.
struct TokenView {
  void* data;
  DType dtype;
  int64_t row_stride;
  int64_t image_stride;
  bool packed;

  template <typename T>
  T* row(const ImageGrid& image, int64_t image_index, int64_t token) const {
    T* base = static_cast<T*>(data);
    return packed ? base + (image.first_token + token) * row_stride
                  : base + image_index * image_stride + token * row_stride;
  }
};

}  // namespace granvit::cpu
