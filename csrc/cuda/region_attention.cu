// region_attention on the GPU, forward and backward.
#include "host.h"
#include "region_attention_backward.h"
#include "region_attention_forward.h"
#include "region_attention_matrix_backward.h"
#include "region_attention_matrix_forward.h"

namespace granvit::cuda {
namespace {

constexpr int kQueryBlock = 4;           // queries that share one reading of keys and values
constexpr int kGradientQueryBlock = 2;   // likewise in the backward, which keeps more of each
constexpr int64_t kBlocksWanted = 2048;  // that keep every multiprocessor of a large GPU busy
constexpr int64_t kWarpsWanted = 2048;   // likewise where warps work alone
constexpr int kLongestRun = 8;           // of heads that a warp takes one after the other

// What forward and backward check, and the memory behind their views.
struct Attention {
  Attention(const char* op, const Tensor& query, const Tensor& key, const Tensor& value, const Tensor& boxes,
            const Tensor& image_index, const std::optional<Tensor>& grid_sizes, int64_t grid_height, int64_t grid_width)
      : op(op),
        packed(grid_sizes.has_value()),
        device(query),
        keys(layout("key", key, query, grid_height * grid_width)),
        values(layout("value", value, query, grid_height * grid_width)),
        inputs(op, {boxes, image_index, grid_sizes, grid_height, grid_width, std::nullopt, 1, 1}, query,
               keys.num_images, keys.num_tokens),
        count(inputs.regions.count),
        queries(query.size(1)),
        heads(query.size(2)),
        dim(query.size(3)) {
    expect(keys.num_tokens == values.num_tokens && keys.num_images == values.num_images, op,
           ": value: expected the shape of key");
    expect(query.size(0) == count, op, ": query: expected shape (", count, ", Q, heads, dim) to match boxes");
    expect(heads >= 1 && dim >= 8 && dim % 8 == 0 && dim <= 256, op,
           ": query: expected at least one head and a dim that is a multiple of 8 up to 256, got ", heads, " of ", dim);
    expect(query.stride(3) == 1 && (heads <= 1 || query.stride(2) == dim), op,
           ": query: expected contiguous heads and dim");
    constexpr int64_t kMostQueries = 1 << 24;  // times kRegionChunk is a whole number of 32 bits
    constexpr int64_t kMostTokens = 0x7fffffff;
    expect(keys.num_tokens <= kMostTokens, op, ": key: expected at most ", kMostTokens, " tokens, got ",
           keys.num_tokens);
    expect(queries <= kMostQueries, op, ": query: expected at most ", kMostQueries, " queries a region, got ", queries);
  }

  TokenLayout layout(const char* name, const Tensor& t, const Tensor& query, int64_t per_image) const {
    expect_on_device(query, query, op, "query");
    expect_on_device(t, query, op, name);
    expect(t.scalar_type() == query.scalar_type(), op, ": ", name, ": expected the dtype of query");
    expect(t.dim() == (packed ? 3 : 4) && query.dim() == 4 && t.size(t.dim() - 1) == query.size(3) &&
               t.size(t.dim() - 2) == query.size(2),
           op, ": ", name, ": expected heads and dim like query");
    return token_layout(op, name, t, packed, per_image);
  }

  template <typename T>
  RegionAttentionArgs<T> arguments(const Tensor& query, const Tensor& key, const Tensor& value, const Tensor& output,
                                   const Tensor& lse, double scale) const {
    RegionAttentionArgs<T> args{};
    args.regions = inputs.regions;
    args.images = inputs.images;
    args.key = {static_cast<const T*>(key.const_data_ptr()), keys.row_stride, keys.image_stride, packed};
    args.value = {static_cast<const T*>(value.const_data_ptr()), values.row_stride, values.image_stride, packed};
    args.query = static_cast<const T*>(query.const_data_ptr());
    args.query_region_stride = query.stride(0);
    args.query_stride = query.stride(1);
    args.output = static_cast<T*>(const_cast<void*>(output.const_data_ptr()));
    args.lse = static_cast<double*>(const_cast<void*>(lse.const_data_ptr()));
    args.queries = queries;
    args.heads = static_cast<int>(heads);
    args.dim = static_cast<int>(dim);
    args.scale = static_cast<float>(scale);
    return args;
  }

  // Whether all rows can be read and written 16 bytes at a time, with 32 bits for the bytes between tokens.
  template <typename T>
  bool wide(const RegionAttentionArgs<T>& args) const {
    bool whole = aligned(args.query, sizeof(T), dim, {args.query_region_stride, args.query_stride}) &&
                 aligned(args.key.data, sizeof(T), dim, {keys.row_stride, keys.image_stride}) &&
                 aligned(args.value.data, sizeof(T), dim, {values.row_stride, values.image_stride});
    whole = whole && keys.row_stride * sizeof(T) <= 0x7fffffff && values.row_stride * sizeof(T) <= 0x7fffffff;
    // Contiguous, but anywhere in memory.
    whole = whole && aligned(args.output, sizeof(T), dim, {}) && aligned(args.grad, sizeof(T), dim, {});
    return whole;
  }

  // Room for the parts of all regions, of which at most `wanted` are worth their while; from shapes alone, so that the
  // same call always gives the same bits.
  template <typename T>
  void make_parts(RegionAttentionArgs<T>& args, int64_t wanted, const Tensor& like, std::optional<Tensor>& memory) {
    args.max_parts = static_cast<int>(std::clamp<int64_t>(wanted, 1, kMaxParts));
    if (args.max_parts == 1) return;
    const int64_t rows = count * args.max_parts * queries * heads;
    memory = torch::stable::new_empty(like, {rows * (dim + 2)}, ScalarType::Float);
    args.part_output = static_cast<float*>(memory->mutable_data_ptr());
    args.part_softmax = reinterpret_cast<float2*>(args.part_output + rows * dim);
  }

  const char* op;
  bool packed;
  DeviceScope device;
  TokenLayout keys, values;
  RegionInputs inputs;
  int64_t count, queries, heads, dim;
};

template <typename T, int kVec, int kQueries>
dim3 plain_grid(Attention& attention, RegionAttentionArgs<T>& args, const Tensor& like, std::optional<Tensor>& memory) {
  const AttentionShape& shape = args.shape = attention_shape(args.heads, args.dim / kVec);
  const int64_t query_blocks = (args.queries + kQueries - 1) / kQueries;
  expect(query_blocks <= 65535 && shape.groups <= 65535, attention.op, ": query: expected at most ", 65535 * kQueries,
         " queries a region, got ", args.queries);
  attention.make_parts(args, kBlocksWanted / (attention.count * shape.groups * query_blocks), like, memory);
  return {grid_blocks(attention.op, attention.count * args.max_parts), static_cast<unsigned>(shape.groups),
          static_cast<unsigned>(query_blocks)};
}

template <typename T>
void launch_join(const Attention& attention, void (*kernel)(RegionAttentionArgs<T>),
                 const RegionAttentionArgs<T>& args) {
  if (args.max_parts > 1)
    launch(attention.op, kernel, dim3(grid_blocks(attention.op, attention.count * args.queries)),
           dim3(kAttentionThreads), 0, attention.device.stream, args);
}

template <typename T, int kVec, int kQueries>
void launch_forward(Attention& attention, RegionAttentionArgs<T> args, const Tensor& like) {
  std::optional<Tensor> memory;
  const dim3 grid = plain_grid<T, kVec, kQueries>(attention, args, like, memory);
  launch(attention.op, region_attention_kernel<T, kVec, kQueries>, grid, dim3(args.shape.threads),
         AttentionShared<kQueries>::bytes(args.shape, kVec), attention.device.stream, args);
  launch_join(attention, join_parts_kernel<T>, args);
}

template <typename T, int kVec, int kQueries>
void launch_query_gradient(Attention& attention, RegionAttentionArgs<T> args, const Tensor& like) {
  std::optional<Tensor> memory;
  const dim3 grid = plain_grid<T, kVec, kQueries>(attention, args, like, memory);
  launch(attention.op, region_attention_query_gradient_kernel<T, kVec, kQueries>, grid, dim3(args.shape.threads),
         AttentionShared<2 * kQueries>::bytes(args.shape, kVec), attention.device.stream, args);
  if (args.grad_query != nullptr) launch_join(attention, join_query_gradient_kernel<T>, args);
}

template <typename T, int kVec>
void launch_backward(Attention& attention, RegionAttentionArgs<T> args, const Tensor& like, const Plan& plan) {
  const cudaStream_t stream = attention.device.stream;
  const AttentionShape shape = attention_shape(args.heads, args.dim / kVec);
  const Tile tile{shape.rows, kOwnedTokens};
  if (attention.packed || args.for_tokens())
    launch_plan(attention.inputs.regions, attention.inputs.images, tile, NoCounts{}, plan, stream);
  launch_query_gradient<T, kVec, kGradientQueryBlock>(attention, args, like);
  if (!args.for_tokens()) return;
  args.shape = shape;
  launch(attention.op, region_attention_token_gradient_kernel<T, kVec>,
         dim3(grid_blocks(attention.op, attention.inputs.count_tiles(tile)), static_cast<unsigned>(shape.groups)),
         dim3(shape.threads), TokenGradientShared::bytes(shape), stream, args);
}

// Calls body(std::integral_constant<int, kDim>) with a dim that the compiler knows, or 0.
template <typename Body>
void with_dim(int64_t dim, Body&& body) {
  if (dim == 72) return body(std::integral_constant<int, 72>{});
  if (dim == 64) return body(std::integral_constant<int, 64>{});
  body(std::integral_constant<int, 0>{});
}

// Blocks of a kernel by region, whose warps need `tiles` tiles of rows each; and the room for parts.
template <typename T>
void launch_units(Attention& attention, void (*kernel)(RegionAttentionArgs<T>), void (*join)(RegionAttentionArgs<T>),
                  RegionAttentionArgs<T> args, int tiles, const Tensor& like) {
  MatrixShape& shape = args.matrix;
  const size_t warp_bytes = sizeof(T) * tiles * kSide * shape.pitch;
  const int across = args.heads * shape.slices;
  const int64_t warps = attention.count * shape.query_blocks * across;
  // What precedes a region's first head costs as much as several tiles: where there are enough warps, they share it.
  shape.run = static_cast<int>(std::clamp<int64_t>(warps / (2 * kWarpsWanted), 1, std::min(across, kLongestRun)));
  shape.warps = std::min(matrix_warps(warp_bytes), (across + shape.run - 1) / shape.run);
  std::optional<Tensor> memory;
  attention.make_parts(args, kWarpsWanted / warps, like, memory);
  launch(attention.op, kernel, dim3(grid_blocks(attention.op, RegionUnit::blocks(args))), dim3(shape.warps * 32),
         shape.warps * warp_bytes, attention.device.stream, args);
  if (join != nullptr) launch_join(attention, join, args);
}

template <typename T>
void launch_matrix_forward(Attention& attention, RegionAttentionArgs<T> args, const Tensor& like) {
  with_dim(args.dim, [&](auto dim) {
    constexpr int kDim = decltype(dim)::value;
    args.matrix = matrix_shape(args.queries, args.dim, kDim != 0);
    launch_units(attention, region_attention_matrix_kernel<T, kDim>, join_parts_kernel<T>, args, kForwardTiles, like);
  });
}

template <typename T>
void launch_matrix_backward(Attention& attention, RegionAttentionArgs<T> args, const Tensor& like, const Plan& plan) {
  const cudaStream_t stream = attention.device.stream;
  if (attention.packed || args.for_tokens())
    launch_plan(attention.inputs.regions, attention.inputs.images, kTokenTile, NoCounts{}, plan, stream);
  std::optional<Tensor> covers;
  if (args.for_tokens()) {
    covers = torch::stable::new_empty(like, {attention.count * static_cast<int64_t>(sizeof(Cover) / sizeof(float))},
                                      ScalarType::Float);
    args.covers = static_cast<Cover*>(covers->mutable_data_ptr());
  }
  with_dim(args.dim, [&](auto dim) {
    constexpr int kDim = decltype(dim)::value;
    MatrixShape& shape = args.matrix = matrix_shape(args.queries, args.dim, kDim != 0);
    launch_units(attention, region_attention_matrix_query_gradient_kernel<T, kDim>,
                 args.grad_query != nullptr ? join_query_gradient_kernel<T> : nullptr, args, kQueryGradientTiles, like);
    if (!args.for_tokens()) return;
    const size_t warp_bytes = TokenTileShared<T>::warp_bytes(shape);
    shape.warps = std::min(matrix_warps(warp_bytes), args.heads * shape.slices);
    const int64_t blocks = (args.heads * shape.slices + shape.warps - 1) / shape.warps;
    launch(attention.op, region_attention_matrix_token_gradient_kernel<T, kDim>,
           dim3(grid_blocks(attention.op, attention.inputs.count_tiles(kTokenTile) * blocks)), dim3(shape.warps * 32),
           TokenTileShared<T>::kBlockBytes + shape.warps * warp_bytes, stream, args);
  });
}

std::tuple<Tensor, Tensor> region_attention(const Tensor& query, const Tensor& key, const Tensor& value,
                                            const Tensor& boxes, const Tensor& image_index,
                                            const std::optional<Tensor>& grid_sizes, int64_t grid_height,
                                            int64_t grid_width, double scale) {
  Attention attention("region_attention", query, key, value, boxes, image_index, grid_sizes, grid_height, grid_width);
  const int64_t count = attention.count, queries = attention.queries, heads = attention.heads;
  Tensor output = torch::stable::new_empty(query, {count, queries, heads, attention.dim});
  Tensor lse = torch::stable::new_empty(query, {count, heads, queries}, ScalarType::Double);
  if (count == 0 || queries == 0) return {output, lse};
  const PlanMemory memory(query, attention.inputs, /*by_image=*/false, /*by_region=*/false);
  attention.inputs.images.token_start = memory.plan.token_start;
  if (attention.packed)
    launch_plan(attention.inputs.regions, attention.inputs.images, {1, 1}, NoCounts{}, memory.plan,
                attention.device.stream);
  with_dtype(query, attention.op, "query", [&](auto* element) {
    using T = std::remove_pointer_t<decltype(element)>;
    const auto args = attention.arguments<T>(query, key, value, output, lse, scale);
    const bool wide = attention.wide(args);
    if constexpr (sizeof(T) == 2) {
      // Rows that are not aligned are rare: the block of queries serves one as well, and kernels take long to compile.
      if (wide) return launch_matrix_forward(attention, args, query);
      launch_forward<T, 1, kQueryBlock>(attention, args, query);
    } else {
      if (!wide) return launch_forward<T, 1, kQueryBlock>(attention, args, query);
      if (queries == 1) return launch_forward<T, kWide<T>, 1>(attention, args, query);
      launch_forward<T, kWide<T>, kQueryBlock>(attention, args, query);
    }
  });
  return {output, lse};
}

std::tuple<Tensor, Tensor, Tensor> region_attention_backward(
    const Tensor& grad, const Tensor& query, const Tensor& key, const Tensor& value, const Tensor& output,
    const Tensor& lse, const Tensor& boxes, const Tensor& image_index, const std::optional<Tensor>& grid_sizes,
    int64_t grid_height, int64_t grid_width, double scale, bool for_query, bool for_tokens) {
  Attention attention("region_attention_backward", query, key, value, boxes, image_index, grid_sizes, grid_height,
                      grid_width);
  const char* op = attention.op;
  const int64_t count = attention.count, queries = attention.queries, heads = attention.heads, dim = attention.dim;
  const Tensor grad_rows = torch::stable::contiguous(grad), output_rows = torch::stable::contiguous(output);
  const Tensor lse_rows = torch::stable::contiguous(lse);
  for (const Tensor* t : {&grad_rows, &output_rows}) {
    const char* name = t == &grad_rows ? "grad" : "output";
    expect_on_device(*t, query, op, name);
    expect(t->numel() == query.numel() && t->scalar_type() == query.scalar_type(), op, ": ", name,
           ": expected shape and dtype of query");
  }
  expect_on_device(lse_rows, query, op, "lse");
  expect(lse_rows.numel() == count * heads * queries && lse_rows.scalar_type() == ScalarType::Double, op,
         ": lse: expected a float64 tensor of shape (R, heads, Q)");
  const auto like_tokens = [&](const Tensor& tokens) {
    if (!for_tokens) return torch::stable::new_empty(tokens, {0});
    const bool zero = count == 0 || queries == 0;
    const auto make = [&](std::initializer_list<int64_t> shape) {
      return zero ? torch::stable::new_zeros(tokens, shape) : torch::stable::new_empty(tokens, shape);
    };
    return attention.packed ? make({tokens.size(0), heads, dim}) : make({tokens.size(0), tokens.size(1), heads, dim});
  };
  Tensor grad_query =
      for_query ? torch::stable::new_empty(query, {count, queries, heads, dim}) : torch::stable::new_empty(query, {0});
  Tensor grad_key = like_tokens(key), grad_value = like_tokens(value);
  if (count == 0 || queries == 0 || !(for_query || for_tokens)) return {grad_query, grad_key, grad_value};
  const PlanMemory memory(query, attention.inputs, /*by_image=*/for_tokens, /*by_region=*/false);
  attention.inputs.images.token_start = memory.plan.token_start;
  std::optional<Tensor> statistics;
  if (for_tokens) statistics = torch::stable::new_empty(query, {count * heads * queries * 4}, ScalarType::Float);
  with_dtype(query, op, "query", [&](auto* element) {
    using T = std::remove_pointer_t<decltype(element)>;
    auto args = attention.arguments<T>(query, key, value, output_rows, lse_rows, scale);
    const int64_t per_image = attention.packed ? 0 : key.size(1) * heads * dim;
    args.grad = static_cast<const T*>(grad_rows.const_data_ptr());
    if (for_query) args.grad_query = static_cast<T*>(grad_query.mutable_data_ptr());
    if (for_tokens) {
      args.grad_key = {static_cast<T*>(grad_key.mutable_data_ptr()), heads * dim, per_image, attention.packed};
      args.grad_value = {static_cast<T*>(grad_value.mutable_data_ptr()), heads * dim, per_image, attention.packed};
      args.statistics = static_cast<float4*>(statistics->mutable_data_ptr());
      args.order = memory.plan.order;
      args.region_start = memory.plan.region_start;
      args.tile_start = memory.plan.tile_start;
    }
    const bool wide = attention.wide(args);
    if constexpr (sizeof(T) == 2) {
      if (wide) return launch_matrix_backward(attention, args, query, memory.plan);
      launch_backward<T, 1>(attention, args, query, memory.plan);
    } else {
      if (wide) return launch_backward<T, kWide<T>>(attention, args, query, memory.plan);
      launch_backward<T, 1>(attention, args, query, memory.plan);
    }
  });
  return {grad_query, grad_key, grad_value};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(granvit, CUDA, m) {
  m.impl("region_attention", TORCH_BOX(&region_attention));
  m.impl("region_attention_backward", TORCH_BOX(&region_attention_backward));
}

}  // namespace granvit::cuda
