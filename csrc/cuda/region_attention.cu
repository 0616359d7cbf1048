// region_attention on the GPU: forward.
#include "host.h"
#include "region_attention_forward.h"

namespace granvit::cuda {
namespace {

constexpr int kQueryBlock = 4;           // queries that share one reading of keys and values
constexpr int64_t kBlocksWanted = 2048;  // that keep every multiprocessor of a large GPU busy

template <typename T, int kVec, int kQueries>
void launch_attention(const char* op, RegionAttentionArgs<T> args, const Tensor& like, cudaStream_t stream) {
  const AttentionShape& shape = args.shape = attention_shape(args.heads, args.dim / kVec);
  const int64_t count = args.regions.count, query_blocks = (args.queries + kQueries - 1) / kQueries;
  expect(query_blocks <= 65535 && shape.groups <= 65535, op, ": query: expected at most ", 65535 * kQueries,
         " queries a region, got ", args.queries);
  // From shapes alone, so that the same call always gives the same bits.
  args.max_parts =
      static_cast<int>(std::clamp<int64_t>(kBlocksWanted / (count * shape.groups * query_blocks), 1, kMaxParts));
  const int64_t rows = count * args.max_parts * args.queries * args.heads;
  std::optional<Tensor> memory;
  if (args.max_parts > 1) {
    memory = torch::stable::new_empty(like, {rows * (args.dim + 2)}, ScalarType::Float);
    args.part_output = static_cast<float*>(memory->mutable_data_ptr());
    args.part_softmax = reinterpret_cast<float2*>(args.part_output + rows * args.dim);
  }
  launch(op, region_attention_kernel<T, kVec, kQueries>,
         dim3(grid_blocks(op, count * args.max_parts), shape.groups, static_cast<unsigned>(query_blocks)),
         dim3(shape.threads), AttentionShared<kQueries>::bytes(shape, kVec), stream, args);
  if (args.max_parts > 1)
    launch(op, join_parts_kernel<T>, dim3(grid_blocks(op, count * args.queries)), dim3(kAttentionThreads), 0, stream,
           args);
}

std::tuple<Tensor, Tensor> region_attention(const Tensor& query, const Tensor& key, const Tensor& value,
                                            const Tensor& boxes, const Tensor& image_index,
                                            const std::optional<Tensor>& grid_sizes, int64_t grid_height,
                                            int64_t grid_width, double scale) {
  const char* op = "region_attention";
  const bool packed = grid_sizes.has_value();
  const std::optional<Tensor> none;
  const RegionArguments arguments{boxes, image_index, grid_sizes, grid_height, grid_width, none, 1, 1};
  const DeviceScope device(query);
  expect_on_device(query, query, op, "query");
  for (const Tensor* t : {&key, &value}) {
    const char* name = t == &key ? "key" : "value";
    expect_on_device(*t, query, op, name);
    expect(t->scalar_type() == query.scalar_type(), op, ": ", name, ": expected the dtype of query");
    expect(t->dim() == (packed ? 3 : 4) && query.dim() == 4 && t->size(t->dim() - 1) == query.size(3) &&
               t->size(t->dim() - 2) == query.size(2),
           op, ": ", name, ": expected heads and dim like query");
  }
  const TokenLayout keys = token_layout(op, "key", key, packed, grid_height * grid_width);
  const TokenLayout values = token_layout(op, "value", value, packed, grid_height * grid_width);
  expect(keys.num_tokens == values.num_tokens && keys.num_images == values.num_images, op,
         ": value: expected the shape of key");
  RegionInputs inputs(op, arguments, query, keys.num_images, keys.num_tokens);
  const int64_t count = inputs.regions.count, queries = query.size(1), heads = query.size(2), dim = query.size(3);
  expect(query.size(0) == count, op, ": query: expected shape (", count, ", Q, heads, dim) to match boxes");
  expect(heads >= 1 && dim >= 8 && dim % 8 == 0 && dim <= 256, op,
         ": query: expected at least one head and a dim that is a multiple of 8 up to 256, got ", heads, " of ", dim);
  expect(query.stride(3) == 1 && (heads <= 1 || query.stride(2) == dim), op,
         ": query: expected contiguous heads and dim");
  Tensor output = torch::stable::new_empty(query, {count, queries, heads, dim});
  Tensor lse = torch::stable::new_empty(query, {count, heads, queries}, ScalarType::Double);
  if (count == 0 || queries == 0) return {output, lse};
  const PlanMemory memory(query, inputs, /*by_image=*/false, /*by_region=*/false);
  inputs.images.token_start = memory.plan.token_start;
  if (packed) launch_plan(inputs.regions, inputs.images, {1, 1}, NoCounts{}, memory.plan, device.stream);
  with_dtype(query, op, "query", [&](auto* element) {
    using T = std::remove_pointer_t<decltype(element)>;
    RegionAttentionArgs<T> args{};
    args.regions = inputs.regions;
    args.images = inputs.images;
    args.key = {static_cast<const T*>(key.const_data_ptr()), keys.row_stride, keys.image_stride, packed};
    args.value = {static_cast<const T*>(value.const_data_ptr()), values.row_stride, values.image_stride, packed};
    args.query = static_cast<const T*>(query.const_data_ptr());
    args.query_region_stride = query.stride(0);
    args.query_stride = query.stride(1);
    args.output = static_cast<T*>(output.mutable_data_ptr());
    args.lse = static_cast<double*>(lse.mutable_data_ptr());
    args.queries = queries;
    args.heads = static_cast<int>(heads);
    args.dim = static_cast<int>(dim);
    args.scale = static_cast<float>(scale);
    const bool wide = aligned(args.query, sizeof(T), dim, {args.query_region_stride, args.query_stride}) &&
                      aligned(args.key.data, sizeof(T), dim, {keys.row_stride, keys.image_stride}) &&
                      aligned(args.value.data, sizeof(T), dim, {values.row_stride, values.image_stride});
    with_vector<T>(wide, [&](auto vec) {
      constexpr int kVec = decltype(vec)::value;
      // Rows that are not aligned are rare: the block of queries serves one as well, and kernels take long to compile.
      if constexpr (kVec > 1) {
        if (queries == 1) return launch_attention<T, kVec, 1>(op, args, query, device.stream);
      }
      launch_attention<T, kVec, kQueryBlock>(op, args, query, device.stream);
    });
  });
  return {output, lse};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(granvit, CUDA, m) { m.impl("region_attention", TORCH_BOX(&region_attention)); }

}  // namespace granvit::cuda
