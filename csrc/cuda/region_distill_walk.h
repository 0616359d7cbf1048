// The warp that plans: it finds the items of a block one after another, in an order that is always the same, and works
// out the weights of each while the other warps are busy with the items before.
#pragma once

#include "region_distill_args.h"

namespace granvit::cuda {

// Grid lines that a run of cells touches, the last one included; samples outside of the grid count as on its edge.
struct Lines {
  int first;
  int last;
};

__device__ __forceinline__ int edge_line(const Axis& axis, int p, int k) {
  const double t = axis.start - 0.5 + axis.bin * (p + axis.fraction(k));
  return t < 0 ? 0 : axis.size - 1;
}

__device__ __forceinline__ Lines lines_of(const Axis& axis, int first_cell, int last_cell) {
  const auto low = axis.taps(first_cell, 0), high = axis.taps(last_cell, axis.samples - 1);
  const int first = low.weight_low != 0 ? low.low : edge_line(axis, first_cell, 0);
  const int last = high.weight_low == 0    ? edge_line(axis, last_cell, axis.samples - 1)
                   : high.weight_high != 0 ? high.high
                                           : high.low;
  return {first, last};
}

// Bits of the lines [first, last] as seen from `origin`, of a window.
__device__ __forceinline__ unsigned window_bits(int first, int last, int origin) {
  const int low = max(first - origin, 0), high = min(last - origin, kSide - 1);
  return low > high ? 0 : (0xffffu >> (kSide - 1 - high)) & (0xffffu << low);
}

__device__ __forceinline__ int lowest_bit(unsigned bits) { return __ffs(static_cast<int>(bits)) - 1; }

// Lanes 0 to 15 look after the y axis, the others after x. What is not said to be a lane's own is the same in all.
template <typename T, bool kGrad>
class DistillWalk {
 public:
  // Without gradient: the channels from `channel` on, of block of cells `work`. With: what touches the tile.
  __device__ __forceinline__ void start_work(const DistillArgs<T>& a, int64_t work, int64_t channel) {
    int64_t r, block;
    if (a.work_start == nullptr) {
      const int64_t blocks = blocks_along(a.outputs.height) * blocks_along(a.outputs.width);
      r = work / blocks;
      block = work % blocks;
    } else {
      r = find_segment(a.work_start, a.regions.count, work);
      block = work - a.work_start[r];
    }
    image_index_ = a.regions.image(r);
    image_ = a.images[image_index_];
    done_ = image_.width == 0;
    if (done_) return;
    load_region(a, sides_of(a, r), 0);
    const int y = static_cast<int>(block / blocks_x_), x = static_cast<int>(block % blocks_x_);
    chunk_y_ = y / kSide;
    chunk_x_ = x / kSide;
    load_chunk();
    rest_y_ = 1u << y % kSide;
    rest_x_ = 1u << x % kSide;
    channel_ = channel - kItemChannels<T>;
    channel_end_ = min(channel + a.block_channels, a.channels);
  }

  __device__ __forceinline__ void start_tile(const DistillArgs<T>& a, const OwnTile& tile) {
    image_index_ = tile.image_index;
    image_ = tile.image;
    tile_y_ = tile.y;
    tile_x_ = tile.x;
    tile_end_y_ = tile.end_y;
    tile_end_x_ = tile.end_x;
    channel_ = tile.channel;
    position_ = a.region_start[image_index_] - 32;
    end_ = a.region_start[image_index_ + 1];
    share_sum_ = a.shares.relative ? sum_of_shares(a) : 1;
  }

  // Writes the next item, or one that ends the loop.
  __device__ __forceinline__ void next(const DistillArgs<T>& a, Item* item, float* weights) {
    while (!done_ && !next_step()) {
      next_cell_block(a);
      if (!done_) start_block();
    }
    if (done_) {
      if (lane() == 0) item->flags = 0;
      return;
    }
    write_item(a, item, weights);
  }

 private:
  static __device__ __forceinline__ int lane() { return threadIdx.x % 32; }
  static __device__ __forceinline__ bool along_y() { return lane() < kSide; }

  static __device__ __forceinline__ double sum_of_shares(const DistillArgs<T>& a) {
    double sum = 0;
    for (int64_t r = lane(); r < a.regions.count; r += 32) sum += a.shares[r];
    for (int offset = 16; offset > 0; offset /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, offset);
    return sum;
  }

  // What the lanes need of a region, worked out by one of them.
  struct Sides {
    int64_t region;
    Axis y, x;
  };
  __device__ __forceinline__ Sides sides_of(const DistillArgs<T>& a, int64_t r) const {
    const Region region = a.regions[r];
    const auto out = a.outputs[r];
    return {r, make_axis(region.y0, region.y1, out.height, image_.height, a.sampling_ratio),
            make_axis(region.x0, region.x1, out.width, image_.width, a.sampling_ratio)};
  }

  template <typename V>
  static __device__ __forceinline__ V of_lane(V value, int source) {
    return __shfl_sync(0xffffffffu, value, source);
  }
  static __device__ __forceinline__ Axis of_lane(const Axis& axis, int source) {
    return {of_lane(axis.start, source), of_lane(axis.bin, source),     of_lane(axis.cells, source),
            of_lane(axis.size, source),  of_lane(axis.samples, source), of_lane(axis.scale, source)};
  }

  __device__ __forceinline__ void load_region(const DistillArgs<T>& a, const Sides& sides, int source) {
    region_ = of_lane(sides.region, source);
    const Axis y = of_lane(sides.y, source), x = of_lane(sides.x, source);
    axis_ = along_y() ? y : x;
    rows_ = y.cells;
    columns_ = x.cells;
    blocks_y_ = static_cast<int>(blocks_along(rows_));
    blocks_x_ = static_cast<int>(blocks_along(columns_));
    first_cell_ = a.outputs[region_].first_cell;
    work_ = a.work_start == nullptr ? region_ * blocks_y_ * blocks_x_ : a.work_start[region_];
    if constexpr (kGrad) {
      double share = a.scale;
      if (a.shares.values != nullptr) {
        const double cells = static_cast<double>(rows_) * columns_;
        share = share_sum_ > 0 ? a.shares[region_] / share_sum_ / (cells * a.terms) : 0;
      }
      factor_ = static_cast<float>(a.slope == nullptr ? 2 * share : share);
    }
  }

  // Each lane takes a block of cells of its axis, and learns its lines.
  __device__ __forceinline__ void load_chunk() {
    const int first_cell = ((along_y() ? chunk_y_ : chunk_x_) * kSide + lane() % kSide) * kSide;
    bool touches = first_cell < axis_.cells;
    lines_ = touches ? lines_of(axis_, first_cell, min(first_cell + kSide, axis_.cells) - 1) : Lines{0, -1};
    if constexpr (kGrad)
      touches = touches && (along_y() ? lines_.first < tile_end_y_ && lines_.last >= tile_y_
                                      : lines_.first < tile_end_x_ && lines_.last >= tile_x_);
    const unsigned both = __ballot_sync(0xffffffffu, touches);
    chunk_bits_x_ = both >> kSide;
    rest_y_ = chunk_bits_x_ != 0 ? both & 0xffffu : 0;
    rest_x_ = chunk_bits_x_;
  }

  // Whether any cell of a region may touch the tile.
  __device__ __forceinline__ bool touches_tile(const Sides& sides) const {
    const Lines rows = lines_of(sides.y, 0, sides.y.cells - 1), columns = lines_of(sides.x, 0, sides.x.cells - 1);
    return rows.first < tile_end_y_ && rows.last >= tile_y_ && columns.first < tile_end_x_ && columns.last >= tile_x_;
  }

  // 32 regions are looked at at a time, one by each lane.
  __device__ __forceinline__ bool next_region(const DistillArgs<T>& a) {
    while (readers_ == 0) {
      position_ += 32;
      if (position_ >= end_) return false;
      const int64_t mine = position_ + lane();
      sides_ = sides_of(a, a.order[min(mine, end_ - 1)]);
      readers_ = __ballot_sync(0xffffffffu, mine < end_ && touches_tile(sides_));
    }
    load_region(a, sides_, lowest_bit(readers_));
    readers_ &= readers_ - 1;
    return true;
  }

  __device__ __forceinline__ void next_cell_block(const DistillArgs<T>& a) {
    if constexpr (!kGrad) {
      channel_ += kItemChannels<T>;
      done_ = channel_ >= channel_end_;
      return;
    }
    rest_x_ &= rest_x_ - 1;
    if (rest_x_ != 0) return;
    rest_y_ &= rest_y_ - 1;
    rest_x_ = chunk_bits_x_;
    while (rest_y_ == 0) {
      if ((chunk_x_ + 1) * kSide < blocks_x_) {
        ++chunk_x_;
      } else {
        chunk_x_ = 0;
        if ((chunk_y_ + 1) * kSide < blocks_y_) {
          ++chunk_y_;
        } else {
          chunk_y_ = 0;
          if (!next_region(a)) {
            done_ = true;
            return;
          }
        }
      }
      load_chunk();
    }
  }

  __device__ __forceinline__ void start_block() {
    const int from_y = lowest_bit(rest_y_), from_x = kSide + lowest_bit(rest_x_);
    block_y_ = {__shfl_sync(0xffffffffu, lines_.first, from_y), __shfl_sync(0xffffffffu, lines_.last, from_y)};
    block_x_ = {__shfl_sync(0xffffffffu, lines_.first, from_x), __shfl_sync(0xffffffffu, lines_.last, from_x)};
    windows_x_ = (block_x_.last - block_x_.first) / kSide + 1;
    windows_ = ((block_y_.last - block_y_.first) / kSide + 1) * windows_x_;
    step_ = -1;
  }

  __device__ __forceinline__ int window() const { return step_ < windows_ ? step_ : step_ - windows_; }
  // Most blocks have one window, and a division takes long.
  __device__ __forceinline__ int window_y() const {
    return windows_ == 1 ? block_y_.first : block_y_.first + window() / windows_x_ * kSide;
  }
  __device__ __forceinline__ int window_x() const {
    return windows_ == 1 ? block_x_.first : block_x_.first + window() % windows_x_ * kSide;
  }
  __device__ __forceinline__ bool window_touches_tile() const {
    const int y = window_y(), x = window_x();
    return y < tile_end_y_ && y + kSide > tile_y_ && x < tile_end_x_ && x + kSide > tile_x_;
  }

  // First all windows of a block add up, then the last one and after it the others take their gradients.
  __device__ __forceinline__ bool next_step() {
    for (;;) {
      ++step_;
      if (step_ < windows_) return true;
      if (!kGrad || step_ >= 2 * windows_ - 1) return false;
      if (window_touches_tile()) return true;
    }
  }

  // The lane's own row of A and column of its transpose, and which lines it reads.
  __device__ __forceinline__ unsigned write_weights(int cell, int origin, float* weights) const {
    float* matrix = weights + (along_y() ? 0 : kSquare);
    float* transpose = matrix + 2 * kSquare;
    const int row = lane() % kSide;
    unsigned used = 0;
    const auto add = [&](int line, double weight) {
      const auto w = static_cast<float>(weight);
      if (w == 0 || line < origin || line >= origin + kSide) return;
      const float sum = matrix[fragment_place(row, line - origin)] + w;
      matrix[fragment_place(row, line - origin)] = sum;
      if (kGrad) transpose[fragment_place(line - origin, row)] = sum;
      used |= 1u << (line - origin);
    };
    for (int k = 0; cell < axis_.cells && k < axis_.samples; ++k) {
      const auto tap = axis_.taps(cell, k);
      add(tap.low, tap.weight_low * axis_.scale);
      add(tap.high, tap.weight_high * axis_.scale);
    }
    return used;
  }

  __device__ __forceinline__ void write_item(const DistillArgs<T>& a, Item* item, float* weights) {
    const int y = window_y(), x = window_x();
    const int p0 = (chunk_y_ * kSide + lowest_bit(rest_y_)) * kSide,
              q0 = (chunk_x_ * kSide + lowest_bit(rest_x_)) * kSide;
    for (int i = lane(); i < kMatrices * kSquare / 4; i += 32)
      reinterpret_cast<float4*>(weights)[i] = make_float4(0, 0, 0, 0);
    __syncwarp();
    unsigned used = write_weights((along_y() ? p0 : q0) + lane() % kSide, along_y() ? y : x, weights);
    for (int offset = kSide / 2; offset > 0; offset /= 2) used |= __shfl_xor_sync(0xffffffffu, used, offset);
    const unsigned used_y = __shfl_sync(0xffffffffu, used, 0), used_x = __shfl_sync(0xffffffffu, used, kSide);
    if (lane() != 0) return;
    const bool first = step_ == 0, aligns = step_ < windows_, compares = step_ == windows_ - 1;
    const int rows = min(rows_ - p0, kSide), columns = min(columns_ - q0, kSide);
    unsigned owned_y = 0, owned_x = 0;
    bool home = true;
    if constexpr (kGrad) {
      owned_y = used_y & window_bits(tile_y_, tile_end_y_ - 1, y);
      owned_x = used_x & window_bits(tile_x_, tile_end_x_ - 1, x);
      home = block_y_.first >= tile_y_ && block_y_.first < tile_end_y_ && block_x_.first >= tile_x_ &&
             block_x_.first < tile_end_x_;
    }
    const bool pulls = step_ >= windows_ - 1 && owned_y != 0 && owned_x != 0;
    const int whole = (used_y >> 8 != 0 ? kBothY : 0) | (used_x >> 8 != 0 ? kBothX : 0) | (rows > 8 ? kBothP : 0) |
                      (columns > 8 ? kBothQ : 0);
    item->flags = (first ? kFirstWindow : 0) | (aligns ? kAlign : 0) | (compares ? kCompare : 0) |
                  (pulls ? kPullBack : 0) | (compares && home ? kHome : 0) | kIsItem | whole | (a.wide ? kAligned : 0);
    item->used = used_y | used_x << 16;
    item->owned = owned_y | owned_x << 16;
    item->factor = factor_;
    item->tile_y = y - tile_y_;
    item->tile_x = x - tile_x_;
    item->rows = rows;
    item->columns = columns;
    item->cell_width = columns_;
    item->line = image_.width * a.student.row_stride;
    item->token = a.student.image(image_, image_index_) - a.student.data +
                  (static_cast<int64_t>(y) * image_.width + x) * a.student.row_stride + channel_;
    const int64_t cell = static_cast<int64_t>(p0) * columns_ + q0;
    item->cell_index = first_cell_ + cell;
    item->cell = (a.outputs.sizes == nullptr ? region_ * a.teacher_region_stride + cell * a.teacher_row_stride
                                             : item->cell_index * a.teacher_row_stride) +
                 channel_;
    item->channel = channel_;
    item->work = work_ + static_cast<int64_t>(p0 / kSide) * blocks_x_ + q0 / kSide;
  }

  ImageGrid image_{};
  int64_t image_index_ = 0;
  int tile_y_ = 0, tile_x_ = 0, tile_end_y_ = 0, tile_end_x_ = 0;
  int64_t channel_ = 0, channel_end_ = 0;
  int64_t position_ = 0, end_ = 0;  // in the plan's order: the regions that are looked at, and where the image's end
  unsigned readers_ = 0;            // of those, the ones that touch the tile and are still to come
  double share_sum_ = 1;
  int64_t region_ = 0, first_cell_ = 0, work_ = 0;
  Sides sides_{};  // of the region that the lane looked at
  Axis axis_{};    // the lane's own
  int rows_ = 0, columns_ = 0, blocks_y_ = 0, blocks_x_ = 0;
  float factor_ = 0;
  int chunk_y_ = 0, chunk_x_ = 0;     // 16 x 16 blocks of cells that are looked at
  Lines lines_{};                     // the lane's own
  unsigned chunk_bits_x_ = 0;         // columns of blocks in the chunk that touch the tile
  unsigned rest_y_ = 0, rest_x_ = 0;  // still to come, the present one included
  Lines block_y_{}, block_x_{};
  int windows_x_ = 0, windows_ = 0, step_ = 0;
  bool done_ = false;
};

}  // namespace granvit::cuda
