// region_distill: a block owns a tile of one image's gradient for 64 bytes of channels and walks, in the plan's order,
// the blocks of cells that touch it. Loss and gradient come from one reading of the teacher; the aligned map is only
// ever in registers. A warp has 4 channels of its own throughout, so nothing is added by two warps: no atomics, the
// same bits every time. Without gradient a block has a block of cells instead, and walks along its channels.
#pragma once

#include "region_distill_products.h"
#include "region_distill_sums.h"
#include "region_distill_walk.h"

namespace granvit::cuda {

// Rows of a stage that all threads of a block copy at a time.
template <typename T>
constexpr int kCopiedRows = kWorkers<T> * 32 / (4 * kSide);

// Copies a thread's chunks of a window or a block of cells: one of every kCopiedRows rows. `from` is the first of them,
// `kept` has a bit for each row, counted from that one; other rows become zero. `base` is an address that can be read.
template <typename T>
__device__ __forceinline__ void copy_rows(unsigned char* to, int first, int column, int chunk, const T* base,
                                          const T* from, int64_t line, unsigned kept, bool both, int channels,
                                          bool wide) {
  constexpr int kRows = kCopiedRows<T>, kElements = 16 / sizeof(T);
  const int place = chunk_place(first, column, chunk);
#pragma unroll
  for (int k = 0; k < kSide / kRows; ++k) {
    if (k * kRows >= 8 && !both) break;
    const bool keep = (kept >> (k * kRows) & 1) != 0 && channels > 0;
    // chunk_place(first + k * kRows, column, chunk)
    unsigned char* there = to + (place ^ kRows / 2 * k % 4 * 16) + k * kRows * kSide * kChannelBytes;
    if (wide) {
      copy_async(there, keep ? from : base, keep);
    } else {
#pragma unroll
      for (int i = 0; i < kElements; ++i)
        reinterpret_cast<T*>(there)[i] = keep && i < channels ? from[i] : narrow<T>(0.0f);
    }
    from += kRows * line;
  }
}

// Brings an item's tokens and cells to a stage. A line that no cell reads is zero, whatever the tokens hold there.
template <typename T>
__device__ __forceinline__ void copy_item(const DistillArgs<T>& a, const Item& item, unsigned char* stage) {
  constexpr int kElements = 16 / sizeof(T);
  const int chunk = threadIdx.x % 4, column = threadIdx.x / 4 % kSide, first = threadIdx.x / (4 * kSide);
  const int64_t channel = chunk * kElements, left = a.channels - item.channel - channel;
  const int channels = left < kElements ? static_cast<int>(left) : kElements;
  const int flags = item.flags;
  const auto copy = [&](bool wide) {
    if ((flags & kAlign) != 0 && (column < 8 || (flags & kBothX) != 0)) {
      const unsigned used = item.used;
      const T* from = a.student.data + item.token + channel + column * a.student.row_stride + first * item.line;
      copy_rows(stage, first, column, chunk, a.student.data, from, item.line,
                (used >> (16 + column) & 1) != 0 ? (used & 0xffffu) >> first : 0, (flags & kBothY) != 0, channels,
                wide);
    }
    if ((flags & kCompare) != 0 && (column < 8 || (flags & kBothQ) != 0)) {
      const int64_t line = item.cell_width * a.teacher_row_stride;
      const T* from = a.teacher + item.cell + channel + column * a.teacher_row_stride + first * line;
      copy_rows(stage + kStageBytes / 2, first, column, chunk, a.teacher, from, line,
                column < item.columns ? ((1u << item.rows) - 1) >> first : 0, (flags & kBothP) != 0, channels, wide);
    }
  };
  if ((flags & kAligned) != 0)
    copy(true);
  else
    copy(false);
}

// For each of a lane's cells, over its channels: student . teacher, student . student, teacher . teacher.
using CellSums = float[2][4][3];

// A number of the cells' gradient as its product takes it.
template <typename T>
__device__ __forceinline__ float gradient_operand(float x) {
  return kSplit<T> ? x : tf32_value(nearest_tf32(x));
}

// cells: in: the student's, aligned; out: the loss's gradient of them. Returns the sum of squared differences.
template <typename T, DistillPass kPass>
__device__ __forceinline__ float compare(const DistillArgs<T>& a, const Item& item, int flags,
                                         const RawSquares<T>& teacher, Squares& cells, CellSums& sums) {
  const int group = threadIdx.x % 32 / 4, member = threadIdx.x % 4;
  float squares[kWarpChannels] = {0, 0, 0, 0};  // more than one, so that additions need not wait for each other
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    if (half > 0 && (flags & kBothP) == 0) break;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if (i > 1 && (flags & kBothQ) == 0) break;
      float2 slope = make_float2(0, 0);
      if constexpr (kPass == DistillPass::kCosineGrad) {
        const int p = 8 * half + 2 * member + i % 2, q = group + i / 2 * 8;
        if (p < item.rows && q < item.columns)
          slope = a.slope[item.cell_index + static_cast<int64_t>(p) * item.cell_width + q];
      }
      float theirs[kWarpChannels];
      widen_four(teacher[half][i], theirs, T());
#pragma unroll
      for (int c = 0; c < kWarpChannels; ++c) {
        const float t = theirs[c];
        float& s = cells[c][half][i];
        if constexpr (kPass == DistillPass::kProducts) {
          sums[half][i][0] += s * t;
          sums[half][i][1] += s * s;
          sums[half][i][2] += t * t;
        } else if constexpr (kPass == DistillPass::kCosineGrad) {
          s = gradient_operand<T>((slope.x * s + slope.y * t) * item.factor);
        } else {
          const float difference = s - t;
          squares[c] += difference * difference;
          if constexpr (wants_grad(kPass)) s = gradient_operand<T>(difference * item.factor);
        }
      }
    }
  }
  return (squares[0] + squares[1]) + (squares[2] + squares[3]);
}

// A warp's part of an item. `cells` lives on while the windows of a block of cells come one after another. What is read
// from shared memory is asked for well before it is needed.
template <typename T, DistillPass kPass>
__device__ __forceinline__ void work_on(const DistillArgs<T>& a, const Item& item, const unsigned char* stage,
                                        const float* weights, const DistillShared<T>& shared, int warp, Squares& cells,
                                        CellSums& sums, double& loss) {
  const int flags = item.flags;
  const bool both_y = (flags & kBothY) != 0, both_x = (flags & kBothX) != 0, both_p = (flags & kBothP) != 0,
             both_q = (flags & kBothQ) != 0;
  RawSquares<T> teacher;
  if ((flags & kCompare) != 0) load_squares<T>(stage + kStageBytes / 2, warp, both_p, both_q, teacher);
  if ((flags & kAlign) != 0) {
    RawSquares<T> raw;
    load_squares<T>(stage, warp, both_y, both_x, raw);
    const Weights<T> weights_y(weights, 0);
    const Weights<T> weights_x(weights, 1);
    Squares rows;
    set_zero(rows);
    multiply_tokens<T>(rows, weights_y, raw, both_y, both_x);
    if ((flags & kFirstWindow) != 0) {
      set_zero(cells);
      multiply<T, Operand::kRows>(cells, weights_x, rows, both_x, both_p);
    } else {
      multiply<T, Operand::kRows>(cells, weights_x, rows, both_x, both_p);
    }
  }
  if ((flags & kCompare) != 0) {
    const float squares = compare<T, kPass>(a, item, flags, teacher, cells, sums);
    if constexpr (kPass == DistillPass::kSquares) {
      loss += squares;
    } else if constexpr (kPass == DistillPass::kSquaresAndGrad) {
      if (a.partial != nullptr && (flags & kHome) != 0) {
        const double total = warp_sum(squares);
        if (threadIdx.x % 32 == 0) a.partial[item.work * a.parts + item.channel / kWarpChannels + warp] = total;
      }
    }
  }
  if constexpr (wants_grad(kPass)) {
    if ((flags & kPullBack) != 0) {
      const unsigned owned = lane_places(item.owned);
      const int group = threadIdx.x % 32 / 4, member = threadIdx.x % 4;
      float4* plane =
          shared.grad + warp * shared.plane + (item.tile_y + 2 * member) * shared.pitch + item.tile_x + group;
      const Weights<T> weights_y(weights, 2), weights_x(weights, 3);
      // Calls body(i, place) for the lane's tokens in one half of the window's rows that are in the tile.
      const auto for_each_owned = [&](int half, auto&& body) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          if (i > 1 && !both_x) break;
          if ((owned >> (8 * half + i) & 1) != 0) body(i, plane + (8 * half + i % 2) * shared.pitch + i / 2 * 8);
        }
      };
      const auto read = [&](int half, float4(&to)[4]) {
        for_each_owned(half, [&](int i, const float4* place) { to[i] = *place; });
      };
      float4 first[4], second[4];
      read(0, first);
      Squares rows;
      set_zero(rows);
      multiply<T, Operand::kCells>(rows, weights_y, cells, both_p, both_q);
      // By halves, because both would not fit the registers.
      const auto add = [&](int half, const float4(&before)[4]) {
        float sum[kWarpChannels][4];
        multiply_half<T, Operand::kGradient>(sum, weights_x, rows, half, both_q);
        for_each_owned(half, [&](int i, float4* place) {
          *place = make_float4(before[i].x + sum[0][i], before[i].y + sum[1][i], before[i].z + sum[2][i],
                               before[i].w + sum[3][i]);
        });
      };
      if (both_y) read(1, second);
      add(0, first);
      if (both_y) add(1, second);
    }
  }
}

// Writes the tile's tokens, all their channels that the block has.
template <typename T, typename Grad>
__device__ __forceinline__ void write_tile(const DistillArgs<T>& a, const DistillShared<T>& shared) {
  const OwnTile tile = *shared.tile;
  const int rows = tile.end_y - tile.y, columns = tile.end_x - tile.x;
  for (int i = threadIdx.x; i < rows * columns * kWorkers<T>; i += blockDim.x) {
    const int worker = i % kWorkers<T>, y = i / kWorkers<T> / columns, x = i / kWorkers<T> % columns;
    const int64_t channel = tile.channel + worker * kWarpChannels;
    if (channel >= a.channels) continue;
    const float4 sum = shared.grad[worker * shared.plane + y * shared.pitch + x];
    const float four[4] = {sum.x, sum.y, sum.z, sum.w};
    const int64_t token = tile.image.first_token + static_cast<int64_t>(tile.y + y) * tile.image.width + tile.x + x;
    Grad* to = static_cast<Grad*>(a.grad) + token * a.channels + channel;
    if (a.channels % kWarpChannels == 0) {
      store_four(to, four);
    } else {
#pragma unroll
      for (int j = 0; j < kWarpChannels; ++j)
        if (channel + j < a.channels) to[j] = narrow<Grad>(four[j]);
    }
  }
}

// The tile of a block; false for a block without.
template <typename T>
__device__ __forceinline__ bool find_tile(const DistillArgs<T>& a, OwnTile& tile) {
  const int64_t n = blockIdx.x / a.channel_blocks;
  int64_t t;
  if (a.tile_start == nullptr) {
    const int64_t tiles = a.tile.count(a.images.height, a.images.width);
    tile.image_index = n / tiles;
    t = n % tiles;
  } else {
    // Where the grids are on the device, there are more blocks than tiles.
    if (n >= a.tile_start[a.images.count]) return false;
    tile.image_index = find_segment(a.tile_start, a.images.count, n);
    t = n - a.tile_start[tile.image_index];
  }
  const ImageGrid image = tile.image = a.images[tile.image_index];
  if (image.width == 0) return false;
  const int tiles_x = (image.width + a.tile.width - 1) / a.tile.width;
  tile.y = static_cast<int>(t / tiles_x) * a.tile.height;
  tile.x = static_cast<int>(t % tiles_x) * a.tile.width;
  tile.end_y = min(tile.y + a.tile.height, image.height);
  tile.end_x = min(tile.x + a.tile.width, image.width);
  tile.channel = static_cast<int64_t>(blockIdx.x % a.channel_blocks) * kItemChannels<T>;
  return true;
}

// From the sums of a block of cells: its loss, and the factors of each cell's gradient.
template <typename T>
__device__ __forceinline__ void finish_cosines(const DistillArgs<T>& a, const Item& item, int warp,
                                               const CellSums& sums) {
  constexpr double kNormFloor = 1e-8;                     // as torch.cosine_similarity
  auto* all = reinterpret_cast<float*>(shared_memory());  // [kWorkers][kSquare][3], where the stages were
  const int group = threadIdx.x % 32 / 4, member = threadIdx.x % 4;
  if (warp < kWorkers<T>)
#pragma unroll
    for (int i = 0; i < 8; ++i)
#pragma unroll
      for (int k = 0; k < 3; ++k)
        all[(warp * kSquare + (i / 4 * 8 + 2 * member + i % 2) * kSide + group + i % 4 / 2 * 8) * 3 + k] =
            sums[i / 4][i % 4][k];
  __syncthreads();
  if (warp == kWorkers<T>) return;
  double loss = 0;
  for (int i = threadIdx.x; i < kSquare; i += kWorkers<T> * 32) {
    const int p = i / kSide, q = i % kSide;
    if (p >= item.rows || q >= item.columns) continue;
    double dot = 0, ours = 0, theirs = 0;
    for (int w = 0; w < kWorkers<T>; ++w) {
      dot += all[(w * kSquare + i) * 3];
      ours += all[(w * kSquare + i) * 3 + 1];
      theirs += all[(w * kSquare + i) * 3 + 2];
    }
    const double norm = sqrt(ours);
    const double by_ours = 1 / (norm < kNormFloor ? kNormFloor : norm);
    const double root = sqrt(theirs);
    const double by_theirs = 1 / (root < kNormFloor ? kNormFloor : root);
    const double cosine = dot * by_ours * by_theirs;
    loss += 1 - cosine;
    // Below the floor the norm counts as a constant.
    if (a.slope != nullptr)
      a.slope[item.cell_index + static_cast<int64_t>(p) * item.cell_width + q] =
          make_float2(norm > kNormFloor ? static_cast<float>(cosine * by_ours * by_ours) : 0.0f,
                      static_cast<float>(-by_ours * by_theirs));
  }
  loss = warp_sum(loss);
  if (threadIdx.x % 32 == 0 && a.partial != nullptr) a.partial[item.work * a.parts + warp] = loss;
}

// Where the items of a stage and a slot lie.
template <typename T>
__device__ __forceinline__ float* weights_of(const DistillShared<T>& shared, int i) {
  return shared.weights + i % kItems * kMatrices * kSquare;
}
template <typename T>
__device__ __forceinline__ unsigned char* stage_of(const DistillShared<T>& shared, int i) {
  return shared.stages + i % kStages * kStageBytes;
}

// The loop of the planning warp, and that of the others: item i is worked on while the data of item i + 1 arrive and
// item i + 2 is planned. Both return the number of items.
template <typename T, bool kGrad>
__device__ __forceinline__ int plan_items(const DistillArgs<T>& a, const DistillShared<T>& shared,
                                          DistillWalk<T, kGrad>& walk) {
  for (int i = 0;; ++i) {
    walk.next(a, shared.items + i % kItems, weights_of(shared, i));
    block_barrier();
    if (i > 0 && shared.items[(i - 1) % kItems].flags == 0) return i - 1;
  }
}

template <typename T, DistillPass kPass>
__device__ __forceinline__ int work_on_items(const DistillArgs<T>& a, const DistillShared<T>& shared, CellSums& sums,
                                             double& loss) {
  const int warp = threadIdx.x / 32;
  Squares cells;
  set_zero(cells);
  for (int i = -1;; ++i) {
    wait_for_copies<0>();
    block_barrier();
    if (i >= 0 && shared.items[i % kItems].flags == 0) return i;
    const Item& next = shared.items[(i + 1) % kItems];
    if (next.flags != 0) copy_item(a, next, stage_of(shared, i + 1));
    commit_copies();
    if (i < 0) continue;
    const Item& item = shared.items[i % kItems];
    if (item.channel + warp * kWarpChannels >= a.channels) continue;
    work_on<T, kPass>(a, item, stage_of(shared, i), weights_of(shared, i), shared, warp, cells, sums, loss);
  }
}

// A block a tile of tokens and a block of channels.
template <typename T, DistillPass kPass>
__global__ void __launch_bounds__(kDistillThreads<T>, 1) region_distill_by_tiles_kernel(DistillArgs<T> a) {
  static_assert(wants_grad(kPass));
  const DistillShared<T> shared(a.tile);
  {
    OwnTile tile;
    if (!find_tile(a, tile)) return;
    if (threadIdx.x == 0) *shared.tile = tile;
  }
  for (int i = threadIdx.x; i < kWorkers<T> * shared.plane; i += blockDim.x) shared.grad[i] = make_float4(0, 0, 0, 0);
  __syncthreads();
  if (threadIdx.x / 32 == kWorkers<T>) {
    DistillWalk<T, true> walk;
    walk.start_tile(a, *shared.tile);
    plan_items(a, shared, walk);
  } else {
    CellSums sums;
    double loss;
    work_on_items<T, kPass>(a, shared, sums, loss);
  }
  if (a.grad_float)
    write_tile<T, float>(a, shared);
  else
    write_tile<T, T>(a, shared);
}

// A block a block of cells and some of its channels.
template <typename T, DistillPass kPass>
__global__ void __launch_bounds__(kDistillThreads<T>, 1) region_distill_by_cells_kernel(DistillArgs<T> a) {
  static_assert(!wants_grad(kPass));
  const DistillShared<T> shared(a.tile);
  const int warp = threadIdx.x / 32;
  CellSums sums;
  for (int i = 0; i < 24; ++i) sums[i / 12][i / 3 % 4][i % 3] = 0;
  double loss = 0;
  int count;
  if (warp == kWorkers<T>) {
    DistillWalk<T, false> walk;
    walk.start_work(a, blockIdx.x, static_cast<int64_t>(blockIdx.y) * a.block_channels);
    count = plan_items(a, shared, walk);
  } else {
    count = work_on_items<T, kPass>(a, shared, sums, loss);
  }
  if (count == 0) return;
  const Item& item = shared.items[(count - 1) % kItems];
  if constexpr (kPass == DistillPass::kProducts) {
    finish_cosines(a, item, warp, sums);
  } else if (warp < kWorkers<T>) {
    loss = warp_sum(loss);
    if (threadIdx.x % 32 == 0) a.partial[item.work * a.parts + blockIdx.y * kWorkers<T> + warp] = loss;
  }
}

}  // namespace granvit::cuda
