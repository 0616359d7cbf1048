// Which grid cells each region covers and by how much, where their tokens are, and how heads are dealt out to tasks.
#pragma once

#include <algorithm>
#include <cmath>

#include "../geometry.h"
#include "attention_tiles.h"
#include "parallel.h"

namespace granvit::cpu::GRANVIT_ISA {

// The cells that a region covers, and the logarithms of their coverage: 0 but for the outermost rows and columns.
struct Footprint {
  int y0, y1, x0, x1;
  double log_top, log_bottom, log_left, log_right;

  int64_t width() const { return x1 - x0; }
  int64_t cells() const { return static_cast<int64_t>(y1 - y0) * (x1 - x0); }
  double log_row(int64_t y) const { return (y == y0 ? log_top : 0) + (y == y1 - 1 ? log_bottom : 0); }

  // Log coverage of the region's cells in grid row y.
  template <typename A>
  void write_bias(int64_t y, A* bias) const {
    const double row = log_row(y);
    std::fill(bias, bias + width(), static_cast<A>(row));
    bias[0] = static_cast<A>(row + log_left + (width() == 1 ? log_right : 0));
    if (width() > 1) bias[width() - 1] = static_cast<A>(row + log_right);
  }
};

GRANVIT_INLINE Footprint footprint(const Region& region, const ImageGrid& image) {
  const int height = static_cast<int>(image.height), width = static_cast<int>(image.width);
  const double x0 = std::clamp(region.x0, 0.0, 1.0) * width, x1 = std::clamp(region.x1, 0.0, 1.0) * width;
  const double y0 = std::clamp(region.y0, 0.0, 1.0) * height, y1 = std::clamp(region.y1, 0.0, 1.0) * height;
  if (!(x1 > x0 && y1 > y0)) {
    const int row = centre_cell(y0, y1, height), column = centre_cell(x0, x1, width);
    return {row, row + 1, column, column + 1, 0, 0, 0, 0};
  }
  const CellRange rows = covered_cells(y0, y1, height), columns = covered_cells(x0, x1, width);
  Footprint f{rows.first, rows.last, columns.first, columns.last, 0, 0, 0, 0};
  f.log_top = std::log(cell_coverage(y0, y1, f.y0));
  f.log_left = std::log(cell_coverage(x0, x1, f.x0));
  if (f.y1 - f.y0 > 1) f.log_bottom = std::log(cell_coverage(y0, y1, f.y1 - 1));
  if (f.x1 - f.x0 > 1) f.log_right = std::log(cell_coverage(x0, x1, f.x1 - 1));
  return f;
}

GRANVIT_INLINE const Footprint* make_footprints(const RegionPlan& plan, Scratch& scratch) {
  Footprint* all = scratch.take<Footprint>(plan.num_regions);
  for (int64_t r = 0; r < plan.num_regions; ++r)
    all[r] = footprint(plan.regions[r], plan.images[plan.regions[r].image]);
  return all;
}

// How many heads a task takes at a time. Heads lie side by side in memory, so several make longer runs and fewer page
// look-ups; but `parts` times the groups of heads must keep all threads busy, and what a task keeps for its heads
// should stay near the processor. No result depends on the choice.
GRANVIT_INLINE int64_t heads_per_task(int64_t heads, int64_t run_bytes, int64_t scratch_bytes, int64_t parts) {
  constexpr int64_t kRunBytes = 8192, kScratchBytes = 4 << 20;
  uint32_t threads = 1;
  if (torch_get_num_threads(&threads) != 0) throw std::runtime_error("granvit: torch reports no thread count");
  const int64_t tasks = threads > 1 ? 4 * static_cast<int64_t>(threads) : 1;
  int64_t group = std::clamp<int64_t>(std::min(kRunBytes / run_bytes, kScratchBytes / scratch_bytes), 1, heads);
  while (group > 1 && parts * ((heads + group - 1) / group) < tasks) group = (group + 1) / 2;
  return group;
}

// For every grid row of every image, the regions that cover cells of it, in their order in by_image.
struct RowIndex {
  int64_t* image_rows;  // rows of image b start at image_rows[b]
  int64_t* start;       // regions of row y start at start[image_rows[b] + y]
  int64_t* position;    // counted from image_start[b]
};

GRANVIT_INLINE RowIndex make_row_index(const RegionPlan& plan, const Footprint* footprints, Scratch& scratch) {
  RowIndex index;
  index.image_rows = scratch.take<int64_t>(plan.num_images + 1);
  index.image_rows[0] = 0;
  for (int64_t b = 0; b < plan.num_images; ++b) index.image_rows[b + 1] = index.image_rows[b] + plan.images[b].height;
  const int64_t rows = index.image_rows[plan.num_images];
  index.start = scratch.take<int64_t>(rows + 1);
  std::fill(index.start, index.start + rows + 1, 0);
  const auto for_each_row = [&](const auto& body) {
    for (int64_t b = 0; b < plan.num_images; ++b)
      for (int64_t i = plan.image_start[b]; i < plan.image_start[b + 1]; ++i) {
        const Footprint& f = footprints[plan.by_image[i]];
        for (int y = f.y0; y < f.y1; ++y) body(index.image_rows[b] + y, i - plan.image_start[b]);
      }
  };
  for_each_row([&](int64_t row, int64_t) { ++index.start[row + 1]; });
  for (int64_t row = 0; row < rows; ++row) index.start[row + 1] += index.start[row];
  index.position = scratch.take<int64_t>(index.start[rows]);
  int64_t* next = scratch.take<int64_t>(rows);
  std::copy(index.start, index.start + rows, next);
  for_each_row([&](int64_t row, int64_t position) { index.position[next[row]++] = position; });
  return index;
}

// A zero-filled array: what lies beyond the last channel of a head takes part in whole vectors.
template <typename T>
T* take_zeros(Scratch& scratch, int64_t count) {
  T* p = scratch.take<T>(count);
  std::fill(p, p + count, T{});
  return p;
}

// Pointers to the keys and values that a region covers, from some channel on, and their log coverage.
template <typename T>
struct Cells {
  int64_t count;
  int64_t whole;  // pointers up to here can be read: those beyond `count` lead to zeros
  const T** keys;
  const T** values;
  acc_t<T>* bias;

  Cells(const TokenView& key, const TokenView& value, const ImageGrid& image, int64_t b, const Footprint& f,
        int64_t channel, int64_t channels, Scratch& scratch)
      : count(f.cells()),
        whole(round_up(count, kTokenBlock)),
        keys(scratch.take<const T*>(whole)),
        values(scratch.take<const T*>(whole)),
        bias(scratch.take<acc_t<T>>(round_up(count, kLanes<float>))) {
    int64_t i = 0;
    for (int64_t y = f.y0; y < f.y1; ++y) {
      const T* key_row = key.template row<const T>(image, b, y * image.width + f.x0) + channel;
      const T* value_row = value.template row<const T>(image, b, y * image.width + f.x0) + channel;
      f.write_bias(y, bias + i);
      for (int64_t x = 0; x < f.width(); ++x, ++i) {
        keys[i] = key_row + x * key.row_stride;
        values[i] = value_row + x * value.row_stride;
      }
    }
    const T* nothing = take_zeros<T>(scratch, channels);
    std::fill(keys + count, keys + whole, nothing);
    std::fill(values + count, values + whole, nothing);
    std::fill(bias + count, bias + round_up(count, kLanes<float>), -std::numeric_limits<acc_t<T>>::infinity());
  }
};

// One grid row of some heads in the accumulation type, as (column, head) rows of `padded`: keys, values, and their
// gradients, which collect here over all regions.
template <typename T>
struct GridRow {
  using A = acc_t<T>;
  enum Part { kKey, kValue, kGradKey, kGradValue, kParts };
  int64_t heads;
  int64_t padded;
  A* data[kParts];
  A** column[kParts];  // of one region, filled up with `nothing` or `spill`
  A* nothing;
  A* spill;

  GridRow(int64_t width, int64_t heads, int64_t padded, Scratch& scratch) : heads(heads), padded(padded) {
    for (int part = 0; part < kParts; ++part) {
      data[part] = take_zeros<A>(scratch, width * heads * padded);
      column[part] = scratch.take<A*>(round_up(width, kTokenBlock));
    }
    nothing = take_zeros<A>(scratch, heads * padded);
    spill = take_zeros<A>(scratch, heads * padded);
  }

  void read(const TokenView& tokens, const ImageGrid& image, int64_t b, int64_t y, int64_t begin, int64_t end,
            int64_t channel, int64_t dim, Part part) {
    for (int64_t x = begin; x < end; ++x) {
      const T* from = tokens.row<const T>(image, b, y * image.width + x) + channel;
      for (int64_t h = 0; h < heads; ++h) widen_row(from + h * dim, dim, data[part] + (x * heads + h) * padded);
    }
  }

  void clear(int64_t begin, int64_t end, Part part) {
    std::fill(data[part] + begin * heads * padded, data[part] + end * heads * padded, A(0));
  }

  // Writes the row out, multiplied by `factor`; columns outside [begin, end), which no region covers, as zeros.
  void write(const TokenView& tokens, const ImageGrid& image, int64_t b, int64_t y, int64_t begin, int64_t end,
             int64_t channel, int64_t dim, A factor, Part part) const {
    for (int64_t x = 0; x < image.width; ++x) {
      T* to = tokens.row<T>(image, b, y * image.width + x) + channel;
      if (x < begin || x >= end) {
        std::fill(to, to + heads * dim, T{});
        continue;
      }
      for (int64_t h = 0; h < heads; ++h) narrow_row(data[part] + (x * heads + h) * padded, dim, factor, to + h * dim);
    }
  }

  // Points `column` at the region's columns. Tiles read zeros beyond them, and write what nobody reads.
  void select(const Footprint& f) {
    const int64_t count = f.width(), whole = round_up(count, kTokenBlock);
    for (int part = 0; part < kParts; ++part) {
      for (int64_t j = 0; j < count; ++j) column[part][j] = data[part] + (f.x0 + j) * heads * padded;
      std::fill(column[part] + count, column[part] + whole, part == kKey || part == kValue ? nothing : spill);
    }
  }
};

}  // namespace granvit::cpu::GRANVIT_ISA
