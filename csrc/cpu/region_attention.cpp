// region_attention on the CPU, forward and backward.
//
// Forward: a task takes some heads of one region, gathers pointers to the covered tokens and reads each of their keys
// and values once for up to kQueryBlock queries. Backward: a task owns some heads of one image and sweeps its grid row
// by row; the log-sum-exp of the forward makes every row independent of the others, so keys, values and their gradients
// pass through the cache once, however many regions overlap there.
#include <new>

#include "attention_cells.h"

namespace granvit::cpu {

struct RegionAttentionArgs {
  RegionPlan plan;
  TokenView key;
  TokenView value;
  int64_t queries;  // per region
  int64_t heads;
  int64_t dim;
  double scale;
  const void* query;  // rows of heads * dim contiguous elements
  int64_t query_region_stride;
  int64_t query_stride;
  void* output;  // (R, Q, heads, dim) contiguous; backward: read
  double* lse;   // (R, heads, Q) log-sum-exp of the scores; backward: read
  // Backward only. Gradients that are not wanted are null.
  const void* grad;  // (R, Q, heads, dim) contiguous
  void* grad_query;
  TokenView grad_key;
  TokenView grad_value;
};

GRANVIT_DECLARE_KERNEL(region_attention_forward, RegionAttentionArgs)
GRANVIT_DECLARE_KERNEL(region_attention_backward, RegionAttentionArgs)

namespace GRANVIT_ISA {

namespace {

constexpr int64_t kQueryBlock = 16;  // queries that share one reading of keys and values
constexpr int64_t kTokenStrip = 16;  // tokens that stay in the first-level cache for all of these

// Asks for the next strip of tokens while several queries keep the processor busy with this one; with one query the
// hardware's own prefetching is ahead, and more requests only get in its way.
template <typename T>
void fetch_strip(const T* const* tokens, int64_t first, int64_t count, int64_t offset, int64_t dim) {
  for (int64_t j = first; j < std::min(first + kTokenStrip, count); ++j)
    for (int64_t c = 0; c < dim; c += 64 / sizeof(T)) __builtin_prefetch(tokens[j] + offset + c);
}

template <typename T>
void forward(const RegionAttentionArgs& a) {
  using A = acc_t<T>;
  Scratch shared;
  const Footprint* footprints = make_footprints(a.plan, shared);
  const int64_t padded = round_up(a.dim, kLanes<A>);
  const int64_t block = std::clamp<int64_t>(a.queries, 1, kQueryBlock);
  int64_t most = 1;
  for (int64_t r = 0; r < a.plan.num_regions; ++r) most = std::max(most, footprints[r].cells());
  const int64_t head_group =
      heads_per_task(a.heads, a.dim * sizeof(T), block * (most + 2 * padded) * sizeof(A), a.plan.num_regions);
  parallel_tasks((a.heads + head_group - 1) / head_group * a.plan.num_regions, [&](int64_t task, Scratch& scratch) {
    const int64_t first_head = task / a.plan.num_regions * head_group;
    const int64_t heads = std::min(head_group, a.heads - first_head), channel = first_head * a.dim;
    const int64_t r = a.plan.by_image[task % a.plan.num_regions];  // regions of one image find its tokens in the cache
    const int64_t b = a.plan.regions[r].image;
    const Cells<T> cells(a.key, a.value, a.plan.images[b], b, footprints[r], channel, heads * a.dim, scratch);
    // Rows (head, query).
    const int64_t stride = round_up(cells.count, kLanes<float>);
    A* weight = scratch.take<A>(heads * block * stride);
    A* query = take_zeros<A>(scratch, heads * block * padded);
    A* out = scratch.take<A>(heads * block * padded);
    A* total = scratch.take<A>(heads * block);

    for (int64_t q0 = 0; q0 < a.queries; q0 += kQueryBlock) {
      const int64_t queries = std::min(kQueryBlock, a.queries - q0);
      const auto for_each_row = [&](const auto& body) {
        for (int64_t h = 0; h < heads; ++h)
          for (int64_t q = 0; q < queries; ++q) body(h, q, h * block + q);
      };
      const auto for_each_tile = [&](const T* const* tokens, const auto& body) {
        for (int64_t j = 0; j < cells.whole; j += kTokenStrip)
          for (int64_t h = 0; h < heads; ++h) {
            if (queries >= kQueryTile) fetch_strip(tokens, j + kTokenStrip, cells.count, h * a.dim, a.dim);
            for_each_query_tile(queries, [&](int64_t q, auto tile) {
              body(j, std::min(kTokenStrip, cells.whole - j), h * a.dim, h * block + q, tile);
            });
          }
      };
      for_each_row([&](int64_t h, int64_t q, int64_t row) {
        const T* from = static_cast<const T*>(a.query) + r * a.query_region_stride + (q0 + q) * a.query_stride;
        widen_row(from + channel + h * a.dim, a.dim, query + row * padded);
      });
      for_each_tile(cells.keys, [&](int64_t j, int64_t count, int64_t offset, int64_t row, auto tile) {
        dot_tile<T, decltype(tile)::value>(query + row * padded, padded, cells.keys + j, offset, count, a.dim,
                                           weight + row * stride + j, stride);
      });
      for_each_row([&](int64_t h, int64_t q, int64_t row) {
        A maximum;
        total[row] = softmax_weights(weight + row * stride, static_cast<A>(a.scale), cells.bias, cells.count, &maximum);
        a.lse[(r * a.heads + first_head + h) * a.queries + q0 + q] =
            static_cast<double>(maximum) + std::log(static_cast<double>(total[row]));
      });
      std::fill(out, out + heads * block * padded, A(0));
      for_each_tile(cells.values, [&](int64_t j, int64_t count, int64_t offset, int64_t row, auto tile) {
        mix_tile<T, decltype(tile)::value>(weight + row * stride + j, stride, cells.values + j, offset, count, a.dim,
                                           out + row * padded, padded);
      });
      for_each_row([&](int64_t h, int64_t q, int64_t row) {
        T* to = static_cast<T*>(a.output) + ((r * a.queries + q0 + q) * a.heads + first_head + h) * a.dim;
        narrow_row(out + row * padded, a.dim, 1 / total[row], to);
      });
    }
  });
}

// Positions [first, last) of RegionPlan::by_image: the regions of one image.
struct ImageRegions {
  int64_t first;
  int64_t last;
};

// What the backward keeps of one head's regions for a sweep over the image, in the accumulation type.
template <typename T>
struct Queries {
  using A = acc_t<T>;
  A* query;       // rows (region, query) of `padded`
  A* grad;        // likewise: of the output
  A* grad_query;  // likewise: collects, not scaled yet
  double* lse;
  A* delta;  // grad . output, which the softmax's gradient subtracts

  Queries(const RegionAttentionArgs& a, ImageRegions group, int64_t head, int64_t padded, Scratch& scratch) {
    const int64_t rows = (group.last - group.first) * a.queries;
    query = take_zeros<A>(scratch, rows * padded);
    grad = take_zeros<A>(scratch, rows * padded);
    grad_query = take_zeros<A>(scratch, rows * padded);
    lse = scratch.take<double>(rows);
    delta = scratch.take<A>(rows);
    A* output = take_zeros<A>(scratch, padded);
    for (int64_t row = 0; row < rows; ++row) {
      const int64_t r = a.plan.by_image[group.first + row / a.queries], q = row % a.queries;
      const int64_t offset = ((r * a.queries + q) * a.heads + head) * a.dim;
      const T* from = static_cast<const T*>(a.query) + r * a.query_region_stride + q * a.query_stride + head * a.dim;
      widen_row(from, a.dim, query + row * padded);
      widen_row(static_cast<const T*>(a.grad) + offset, a.dim, grad + row * padded);
      widen_row(static_cast<const T*>(a.output) + offset, a.dim, output);
      Vec<A> sum{};
      for (int64_t c = 0; c < padded; c += kLanes<A>) sum += load(output + c) * load(grad + row * padded + c);
      delta[row] = sum_lanes<A>(sum);
      lse[row] = a.lse[(r * a.heads + head) * a.queries + q];
    }
  }

  void write_gradient(const RegionAttentionArgs& a, ImageRegions group, int64_t head, int64_t padded) const {
    for (int64_t row = 0; row < (group.last - group.first) * a.queries; ++row) {
      const int64_t r = a.plan.by_image[group.first + row / a.queries], q = row % a.queries;
      narrow_row(grad_query + row * padded, a.dim, static_cast<A>(a.scale),
                 static_cast<T*>(a.grad_query) + ((r * a.queries + q) * a.heads + head) * a.dim);
    }
  }
};

template <typename T>
void backward(const RegionAttentionArgs& a) {
  using A = acc_t<T>;
  using Row = GridRow<T>;
  Scratch shared;
  const Footprint* footprints = make_footprints(a.plan, shared);
  const RowIndex index = make_row_index(a.plan, footprints, shared);
  const int64_t padded = round_up(a.dim, kLanes<A>);
  int64_t rows = 1;  // of `padded` that a task keeps for a head
  for (int64_t b = 0; b < a.plan.num_images; ++b)
    rows = std::max(rows, GridRow<T>::kParts * a.plan.images[b].width +
                              3 * (a.plan.image_start[b + 1] - a.plan.image_start[b]) * a.queries);
  const int64_t head_group = heads_per_task(a.heads, a.dim * sizeof(T), rows * padded * sizeof(A), a.plan.num_images);
  const int64_t head_groups = (a.heads + head_group - 1) / head_group;
  const bool for_query = a.grad_query != nullptr, for_tokens = a.grad_key.data != nullptr;
  parallel_tasks(a.plan.num_images * head_groups, [&](int64_t task, Scratch& scratch) {
    const int64_t b = task / head_groups, first_head = task % head_groups * head_group;
    const int64_t heads = std::min(head_group, a.heads - first_head), channel = first_head * a.dim;
    const ImageGrid& image = a.plan.images[b];
    const ImageRegions group{a.plan.image_start[b], a.plan.image_start[b + 1]};
    Queries<T>* all = scratch.take<Queries<T>>(heads);
    for (int64_t h = 0; h < heads; ++h) new (all + h) Queries<T>(a, group, first_head + h, padded, scratch);
    Row row(image.width, heads, padded, scratch);
    const int64_t stride = round_up(image.width, kLanes<float>);
    A* bias = take_zeros<A>(scratch, stride);
    A* score = scratch.take<A>(stride * kQueryBlock);
    A* weight = scratch.take<A>(stride * kQueryBlock);

    for (int64_t y = 0; y < image.height; ++y) {
      const int64_t* active = index.start + index.image_rows[b] + y;
      int64_t begin = image.width, end = 0;
      for (int64_t i = active[0]; i < active[1]; ++i) {
        const Footprint& f = footprints[a.plan.by_image[group.first + index.position[i]]];
        begin = std::min<int64_t>(begin, f.x0);
        end = std::max<int64_t>(end, f.x1);
      }
      row.read(a.key, image, b, y, begin, end, channel, a.dim, Row::kKey);
      row.read(a.value, image, b, y, begin, end, channel, a.dim, Row::kValue);
      if (for_tokens && begin < end) {
        row.clear(begin, end, Row::kGradKey);
        row.clear(begin, end, Row::kGradValue);
      }
      for (int64_t i = active[0]; i < active[1]; ++i) {
        const int64_t position = index.position[i];
        const Footprint& f = footprints[a.plan.by_image[group.first + position]];
        const int64_t whole = round_up(f.width(), kTokenBlock);
        row.select(f);
        f.write_bias(y, bias);
        for (int64_t h = 0; h < heads; ++h) {
          for (int64_t q0 = 0; q0 < a.queries; q0 += kQueryBlock) {
            const int64_t queries = std::min(kQueryBlock, a.queries - q0), first = position * a.queries + q0;
            const int64_t offset = h * padded;
            const A* query = all[h].query + first * padded;
            const A* grad = all[h].grad + first * padded;
            for_each_query_tile(queries, [&](int64_t q, auto tile) {
              constexpr int kTile = decltype(tile)::value;
              dot_tile<A, kTile>(query + q * padded, padded, row.column[Row::kKey], offset, whole, padded,
                                 score + q * stride, stride);
              dot_tile<A, kTile>(grad + q * padded, padded, row.column[Row::kValue], offset, whole, padded,
                                 weight + q * stride, stride);
            });
            for (int64_t q = 0; q < queries; ++q)
              softmax_gradient(score + q * stride, weight + q * stride, static_cast<A>(a.scale), bias, f.width(),
                               all[h].lse[first + q], all[h].delta[first + q]);
            for_each_query_tile(queries, [&](int64_t q, auto tile) {
              constexpr int kTile = decltype(tile)::value;
              if (for_query)
                mix_tile<A, kTile>(score + q * stride, stride, row.column[Row::kKey], offset, whole, padded,
                                   all[h].grad_query + (first + q) * padded, padded);
              if (for_tokens) {
                spread_tile<A, kTile>(score + q * stride, stride, query + q * padded, padded, row.column[Row::kGradKey],
                                      offset, whole);
                spread_tile<A, kTile>(weight + q * stride, stride, grad + q * padded, padded,
                                      row.column[Row::kGradValue], offset, whole);
              }
            });
          }
        }
      }
      if (for_tokens) {
        row.write(a.grad_key, image, b, y, begin, end, channel, a.dim, static_cast<A>(a.scale), Row::kGradKey);
        row.write(a.grad_value, image, b, y, begin, end, channel, a.dim, A(1), Row::kGradValue);
      }
    }
    if (for_query)
      for (int64_t h = 0; h < heads; ++h) all[h].write_gradient(a, group, first_head + h, padded);
  });
}

}  // namespace

void region_attention_forward(const RegionAttentionArgs& a) {
  with_dtype(a.key.dtype, [&](auto t) { forward<decltype(t)>(a); });
}
void region_attention_backward(const RegionAttentionArgs& a) {
  with_dtype(a.key.dtype, [&](auto t) { backward<decltype(t)>(a); });
}

}  // namespace GRANVIT_ISA
}  // namespace granvit::cpu

#ifdef GRANVIT_HOST
#include "host.h"

namespace granvit::cpu {
namespace {

RegionAttentionArgs make_args(const char* op, const HostPlan& host, const Tensor& query, const Tensor& key,
                              const Tensor& value, bool packed, double scale) {
  RegionAttentionArgs args{};
  args.plan = host.plan();
  args.key = view_tokens(op, "key", key, args.plan, packed);
  args.value = view_tokens(op, "value", value, args.plan, packed);
  expect(query.dim() == 4 && query.is_cpu() && query.size(0) == args.plan.num_regions, op, ": query: expected shape (",
         args.plan.num_regions, ", Q, heads, dim) to match boxes, on the CPU");
  args.queries = query.size(1);
  args.heads = query.size(2);
  args.dim = query.size(3);
  expect(args.heads >= 1 && args.dim >= 8 && args.dim % 8 == 0, op,
         ": query: expected at least one head and a dim that is a multiple of 8, got ", args.heads, " of ", args.dim);
  expect(query.stride(3) == 1 && (args.heads <= 1 || query.stride(2) == args.dim), op,
         ": query: expected contiguous heads and dim");
  const int64_t last = packed ? 2 : 3;
  for (const Tensor* t : {&key, &value})
    expect(t->dim() == last + 1 && t->size(last - 1) == args.heads && t->size(last) == args.dim, op, ": ",
           t == &key ? "key" : "value", ": expected heads and dim (", args.heads, ", ", args.dim, ") like query");
  expect(dtype_of(query, op, "query") == args.key.dtype && args.value.dtype == args.key.dtype, op,
         ": query, key and value: expected one dtype");
  args.scale = scale;
  args.query = query.const_data_ptr();
  args.query_region_stride = query.stride(0);
  args.query_stride = query.stride(1);
  return args;
}

std::tuple<Tensor, Tensor> region_attention(const Tensor& query, const Tensor& key, const Tensor& value,
                                            const Tensor& boxes, const Tensor& image_index,
                                            const std::optional<Tensor>& grid_sizes, int64_t grid_height,
                                            int64_t grid_width, double scale) {
  const char* op = "region_attention";
  const HostPlan host(op, {boxes, image_index, grid_sizes, grid_height, grid_width, std::nullopt, 1, 1}, key.size(0));
  RegionAttentionArgs args = make_args(op, host, query, key, value, grid_sizes.has_value(), scale);
  Tensor output = torch::stable::new_empty(query, {query.size(0), args.queries, args.heads, args.dim});
  Tensor lse = torch::stable::new_empty(query, {query.size(0), args.heads, args.queries}, ScalarType::Double);
  args.output = output.mutable_data_ptr();
  args.lse = static_cast<double*>(lse.mutable_data_ptr());
  region_attention_forward_kernel()(args);
  return {output, lse};
}

std::tuple<Tensor, Tensor, Tensor> region_attention_backward(
    const Tensor& grad, const Tensor& query, const Tensor& key, const Tensor& value, const Tensor& output,
    const Tensor& lse, const Tensor& boxes, const Tensor& image_index, const std::optional<Tensor>& grid_sizes,
    int64_t grid_height, int64_t grid_width, double scale, bool for_query, bool for_tokens) {
  const char* op = "region_attention_backward";
  const bool packed = grid_sizes.has_value();
  const HostPlan host(op, {boxes, image_index, grid_sizes, grid_height, grid_width, std::nullopt, 1, 1}, key.size(0));
  RegionAttentionArgs args = make_args(op, host, query, key, value, packed, scale);
  const Tensor grad_rows = torch::stable::contiguous(grad), output_rows = torch::stable::contiguous(output);
  const Tensor lse_rows = torch::stable::contiguous(lse);
  for (const Tensor* t : {&grad_rows, &output_rows})
    expect(t->numel() == query.numel() && t->scalar_type() == query.scalar_type(), op, ": ",
           t == &grad_rows ? "grad" : "output", ": expected shape and dtype of query");
  expect(lse_rows.numel() == query.size(0) * args.heads * args.queries && lse_rows.scalar_type() == ScalarType::Double,
         op, ": lse: expected a float64 tensor of shape (R, heads, Q)");
  args.grad = grad_rows.const_data_ptr();
  args.output = const_cast<void*>(output_rows.const_data_ptr());
  args.lse = static_cast<double*>(const_cast<void*>(lse_rows.const_data_ptr()));
  Tensor grad_query, grad_key, grad_value;
  if (for_query) {
    grad_query = torch::stable::new_empty(query, {query.size(0), args.queries, args.heads, args.dim});
    args.grad_query = grad_query.mutable_data_ptr();
  } else {
    grad_query = torch::stable::new_empty(query, {0});
  }
  if (for_tokens) {
    for (Tensor* t : {&grad_key, &grad_value})
      *t = packed ? torch::stable::new_empty(key, {key.size(0), args.heads, args.dim})
                  : torch::stable::new_empty(key, {key.size(0), key.size(1), args.heads, args.dim});
    advise_huge_pages(grad_key);
    advise_huge_pages(grad_value);
    args.grad_key = view_tokens(op, "grad_key", grad_key, args.plan, packed);
    args.grad_value = view_tokens(op, "grad_value", grad_value, args.plan, packed);
  } else {
    for (Tensor* t : {&grad_key, &grad_value}) *t = torch::stable::new_empty(key, {0});
  }
  region_attention_backward_kernel()(args);
  return {grad_query, grad_key, grad_value};
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(granvit, m) {
  m.def(
      "region_attention(Tensor query, Tensor key, Tensor value, Tensor boxes, Tensor image_index, Tensor? grid_sizes, "
      "SymInt grid_height, SymInt grid_width, float scale) -> (Tensor, Tensor)");
  m.def(
      "region_attention_backward(Tensor grad, Tensor query, Tensor key, Tensor value, Tensor output, Tensor lse, "
      "Tensor boxes, Tensor image_index, Tensor? grid_sizes, SymInt grid_height, SymInt grid_width, float scale, "
      "bool for_query, bool for_tokens) -> (Tensor, Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(granvit, CPU, m) {
  m.impl("region_attention", TORCH_BOX(&region_attention));
  m.impl("region_attention_backward", TORCH_BOX(&region_attention_backward));
}

}  // namespace granvit::cpu
#endif  // GRANVIT_HOST
