// What the kernels of region_distill share: how work is divided, their arguments, and their shared memory.
//
// A block of 16 x 16 cells reads a window of 16 x 16 tokens that starts at its first line; larger cells take further
// windows. One step of a kernel's loop is an item: one window of one block of cells, for 64 bytes of channels.
#pragma once

#include "mma.h"
#include "outputs.h"
#include "plan.h"
#include "sampling.h"
#include "vec.h"

namespace granvit::cuda {

constexpr int kSide = 16;  // cells along a side of a block, and tokens along a side of a window
constexpr int kSquare = kSide * kSide;
constexpr int kChannelBytes = 64;  // of a token or cell: what an item has of its channels
constexpr int kWarpChannels = 4;   // of them, those of one warp
constexpr int kMatrices = 4;       // weights of an item: A_y, A_x and their transposes
constexpr int kItems = 3;          // one that is worked on, one whose data arrive, one that is being planned
constexpr int kStages = 2;
constexpr size_t kStageBytes = 2 * kSquare * kChannelBytes;  // tokens, then cells

template <typename T>
constexpr int kItemChannels = kChannelBytes / sizeof(T);
template <typename T>
constexpr int kWorkers = kItemChannels<T> / kWarpChannels;  // warps; one more plans the items
template <typename T>
constexpr int kDistillThreads = 32 * (kWorkers<T> + 1);

// What a launch computes.
enum class DistillPass {
  kSquares,         // sums of squared differences
  kSquaresAndGrad,  // the same, and the student's gradient
  kProducts,        // sums of 1 - cosine, and for every cell what the gradient of it is made of
  kCosineGrad,      // the student's gradient from those
};
constexpr bool wants_grad(DistillPass pass) {
  return pass == DistillPass::kSquaresAndGrad || pass == DistillPass::kCosineGrad;
}

// Blocks of cells are the plan's work items.
__host__ __device__ __forceinline__ int64_t blocks_along(int64_t cells) { return (cells + kSide - 1) / kSide; }
struct CountCellBlocks {
  const int64_t* sizes;
  __device__ __forceinline__ RegionCounts operator()(int64_t r) const {
    const int64_t h = sizes[2 * r], w = sizes[2 * r + 1];
    return {h * w, blocks_along(h) * blocks_along(w)};
  }
};

// How much a region's mean counts: by a number of its own, or by its cells.
struct Shares {
  const void* values;  // (R,) float, or double where `wide`; null: by cells
  bool wide;
  bool relative;  // to the sum of all, which makes the loss a weighted mean
  int64_t stride;

  __device__ __forceinline__ double operator[](int64_t r) const {
    return wide ? static_cast<const double*>(values)[r * stride] : static_cast<const float*>(values)[r * stride];
  }
};

template <typename T>
struct DistillArgs {
  Regions regions;
  Images images;
  Outputs outputs;
  TokenView<const T> student;
  const T* teacher;
  int64_t teacher_row_stride;
  int64_t teacher_region_stride;  // where all output grids are alike
  int64_t channels;
  int sampling_ratio;
  bool wide;  // rows of student and teacher can be read 16 bytes at a time
  const int64_t* order;
  const int64_t* region_start;
  const int64_t* tile_start;  // packed tokens
  const int64_t* work_start;  // a grid per region
  int channel_blocks;         // of kItemChannels
  int block_channels;         // without gradient: items of kItemChannels that a block takes one after another

  // Where a gradient is wanted.
  Tile tile;
  void* grad;       // laid out like contiguous tokens
  bool grad_float;  // the gradient is float whatever T is
  Shares shares;
  double terms;  // a cell has in its region's mean
  double scale;  // a cell's share in the mean of all; used where there are no shares

  double* partial;  // per block of cells: `parts` numbers whose sum is its loss; null where it is not wanted
  int parts;
  float2* slope;  // (cells): factors of student and teacher in a cell's gradient; cosine
};

enum ItemFlags : int {
  kFirstWindow = 1,  // of a block of cells
  kAlign = 2,        // the window's tokens are added to the cells
  kCompare = 4,      // the cells are complete: compare them with the teacher's
  kPullBack = 8,     // spread the cells' gradient over the window's tokens
  kHome = 16,        // the loss of the block of cells is counted here
  kIsItem = 32,      // always set
  // More than 8 are in use of the window's rows, of its columns, of the block's rows of cells, of its columns.
  kBothY = 64,
  kBothX = 128,
  kBothP = 256,
  kBothQ = 512,
  kAligned = 1024,  // rows of student and teacher can be read 16 bytes at a time
};

struct alignas(16) Item {
  int flags;           // 0 ends the loop
  unsigned used;       // bits: rows of the window with a weight that is not zero, and from bit 16 columns
  unsigned owned;      // of those, the ones in the tile
  float factor;        // of the cells' gradient
  int tile_y;          // the window's corner in the tile; may be outside
  int tile_x;          //
  int rows;            // of cells
  int columns;         //
  int cell_width;      // of the region's grid
  int64_t token;       // offset of the window's corner, first channel included
  int64_t line;        // stride of its rows
  int64_t cell;        // offset of the block's first cell, likewise
  int64_t cell_index;  // of that cell among all
  int64_t channel;
  int64_t work;  // number of the block of cells
};

// What a block owns of the gradient.
struct alignas(16) OwnTile {
  ImageGrid image;
  int64_t image_index;
  int64_t channel;
  int y;
  int x;
  int end_y;
  int end_x;
};

// A weight's place in shared memory: each lane's four of a product's step side by side. The inner index of the product
// is permuted, 2 member + j standing where mma_tf32 has member + 4 j, and then a result is the next product's operand
// as it is: see distill_products.h.
__device__ __forceinline__ int fragment_place(int row, int column) {
  const int step = column / 8, member = column % 8 / 2, j = column % 2, group = row % 8, h = row / 8;
  return (step * 32 + group * 4 + member) * 4 + j * 2 + h;
}

template <typename T>
struct DistillShared {
  unsigned char* stages;  // [kStages][2][kSquare][kChannelBytes]
  float* weights;         // [kItems][kMatrices][kSquare]
  Item* items;            // [kItems]
  OwnTile* tile;
  float4* grad;  // [kWorkers][plane]
  int pitch;     // of a tile's rows; odd, so that reads of a warp meet all banks
  int plane;

  static __host__ __device__ __forceinline__ int pitch_of(Tile tile) { return tile.width + 1; }
  static __host__ __device__ __forceinline__ int plane_of(Tile tile) { return tile.height * pitch_of(tile) + 1; }
  static size_t bytes(Tile tile, bool with_grad) {
    const size_t items = sizeof(float) * kItems * kMatrices * kSquare + kItems * sizeof(Item) + sizeof(OwnTile);
    return kStages * kStageBytes + items + (with_grad ? sizeof(float4) * kWorkers<T> * plane_of(tile) : 0);
  }
  __device__ __forceinline__ explicit DistillShared(Tile shape) {
    stages = shared_memory();
    weights = reinterpret_cast<float*>(stages + kStages * kStageBytes);
    items = reinterpret_cast<Item*>(weights + kItems * kMatrices * kSquare);
    tile = reinterpret_cast<OwnTile*>(items + kItems);
    grad = reinterpret_cast<float4*>(tile + 1);
    pitch = pitch_of(shape);
    plane = plane_of(shape);
  }
};

}  // namespace granvit::cuda
