// region_attention on the CPU, forward and backward.
//
// Forward: a task takes one head of a few regions of one image, gathers pointers to the covered tokens and reads each
// of their keys and values once for up to kQueryBlock queries. Backward: a task owns one head of one image and sweeps
// its grid row by row; the log-sum-exp of the forward makes every row independent of the others, so keys, values and
// their gradients pass through the cache once, however many regions overlap there.
#include <algorithm>

#include "../geometry.h"
#include "attention_tiles.h"
#include "math.h"
#include "parallel.h"

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
  void* lse;     // (R, heads, Q) in the accumulation type; backward: read
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

constexpr int64_t kQueryBlock = 16;
constexpr int64_t kRegionsPerTask = 8;

// The cells that a region covers, and the logarithms of their coverage: 0 but for the outermost rows and columns.
struct Footprint {
  int y0, y1, x0, x1;
  double log_top, log_bottom, log_left, log_right;

  int64_t width() const { return x1 - x0; }
  int64_t cells() const { return static_cast<int64_t>(y1 - y0) * (x1 - x0); }
  double log_row(int y) const { return (y == y0 ? log_top : 0) + (y == y1 - 1 ? log_bottom : 0); }
  double log_column(int x) const { return (x == x0 ? log_left : 0) + (x == x1 - 1 ? log_right : 0); }
};

Footprint footprint(const Region& region, const ImageGrid& image) {
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

const Footprint* make_footprints(const RegionPlan& plan, Scratch& scratch) {
  Footprint* all = scratch.take<Footprint>(plan.num_regions);
  for (int64_t r = 0; r < plan.num_regions; ++r)
    all[r] = footprint(plan.regions[r], plan.images[plan.regions[r].image]);
  return all;
}

// Positions [first, last) of RegionPlan::by_image that one task handles.
struct Group {
  int64_t first;
  int64_t last;
};

int64_t make_groups(const RegionPlan& plan, Scratch& scratch, Group** groups) {
  *groups = scratch.take<Group>(plan.num_regions / kRegionsPerTask + plan.num_images);
  int64_t count = 0;
  for (int64_t b = 0; b < plan.num_images; ++b)
    for (int64_t i = plan.image_start[b]; i < plan.image_start[b + 1]; i += kRegionsPerTask)
      (*groups)[count++] = {i, std::min(i + kRegionsPerTask, plan.image_start[b + 1])};
  return count;
}

// score[j] += bias[j], then weight[j] = exp(score[j] - maximum) in place; the entries from `count` up to the next whole
// vector become 0. Returns the sum of the weights.
template <typename A>
A softmax_weights(A* score, const A* bias, int64_t count, A* maximum) {
  constexpr A kLowest = -std::numeric_limits<A>::infinity();
  const int64_t end = round_up(count, kLanes<A>);
  std::fill(score + count, score + end, kLowest);
  Vec<A> highest = splat(kLowest);
  for (int64_t j = 0; j < end; j += kLanes<A>) {
    const Vec<A> s = load(score + j) + load(bias + j);
    highest = s > highest ? s : highest;
    store(score + j, s);
  }
  *maximum = max_lanes<A>(highest);
  Vec<A> sum{};
  for (int64_t j = 0; j < end; j += kLanes<A>) {
    const Vec<A> w = exp(load(score + j) - *maximum);
    sum += w;
    store(score + j, w);
  }
  return sum_lanes<A>(sum);
}

template <typename T>
void forward(const RegionAttentionArgs& a) {
  using A = acc_t<T>;
  Scratch shared;
  const Footprint* footprints = make_footprints(a.plan, shared);
  Group* groups;
  const int64_t num_groups = make_groups(a.plan, shared, &groups);
  const int64_t padded = round_up(a.dim, kLanes<A>);
  const int64_t query_block = std::min(a.queries, kQueryBlock);
  parallel_tasks(a.heads * num_groups, [&](int64_t task, Scratch& scratch) {
    const int64_t head = task / num_groups, channel = head * a.dim;
    const Group group = groups[task % num_groups];
    int64_t most = 0;
    for (int64_t i = group.first; i < group.last; ++i) most = std::max(most, footprints[a.plan.by_image[i]].cells());
    const int64_t stride = round_up(most, 16);
    const T** keys = scratch.take<const T*>(stride);
    const T** values = scratch.take<const T*>(stride);
    A* bias = scratch.take<A>(stride);
    A* weight = scratch.take<A>(stride * query_block);
    A* query = scratch.take<A>(padded * query_block);
    A* out = scratch.take<A>(padded * query_block);
    T* nothing = scratch.take<T>(a.dim);
    std::fill(query, query + padded * query_block, A(0));
    std::fill(nothing, nothing + a.dim, T{});

    for (int64_t i = group.first; i < group.last; ++i) {
      const int64_t r = a.plan.by_image[i];
      const Footprint& f = footprints[r];
      const int64_t image_index = a.plan.regions[r].image;
      const ImageGrid& image = a.plan.images[image_index];
      int64_t count = 0;
      for (int y = f.y0; y < f.y1; ++y) {
        const T* key = a.key.row<const T>(image, image_index, y * image.width + f.x0) + channel;
        const T* value = a.value.row<const T>(image, image_index, y * image.width + f.x0) + channel;
        const A row = static_cast<A>(f.log_row(y));
        for (int64_t j = 0; j < f.width(); ++j) {
          keys[count + j] = key + j * a.key.row_stride;
          values[count + j] = value + j * a.value.row_stride;
          bias[count + j] = row;
        }
        bias[count] = static_cast<A>(f.log_row(y) + f.log_column(f.x0));
        bias[count + f.width() - 1] = static_cast<A>(f.log_row(y) + f.log_column(f.x1 - 1));
        count += f.width();
      }
      const int64_t whole = round_up(count, kTokenBlock);
      std::fill(keys + count, keys + whole, nothing);
      std::fill(values + count, values + whole, nothing);
      std::fill(bias + count, bias + round_up(count, 16), A(0));

      for (int64_t q0 = 0; q0 < a.queries; q0 += kQueryBlock) {
        const int64_t queries = std::min(kQueryBlock, a.queries - q0);
        for (int64_t q = 0; q < queries; ++q)
          widen_row(static_cast<const T*>(a.query) + r * a.query_region_stride + (q0 + q) * a.query_stride + channel,
                    a.dim, static_cast<A>(a.scale), query + q * padded);
        for_each_query_tile(queries, [&](int64_t q, auto tile) {
          dot_tile<T, decltype(tile)::value>(query + q * padded, padded, keys, whole, a.dim, weight + q * stride,
                                             stride);
        });
        A* lse = static_cast<A*>(a.lse) + (r * a.heads + head) * a.queries + q0;
        A total[kQueryBlock];
        for (int64_t q = 0; q < queries; ++q) {
          A maximum;
          total[q] = softmax_weights(weight + q * stride, bias, count, &maximum);
          lse[q] = maximum + std::log(total[q]);
        }
        std::fill(out, out + queries * padded, A(0));
        for_each_query_tile(queries, [&](int64_t q, auto tile) {
          mix_tile<T, decltype(tile)::value>(weight + q * stride, stride, values, whole, a.dim, out + q * padded,
                                             padded);
        });
        for (int64_t q = 0; q < queries; ++q)
          narrow_row(out + q * padded, a.dim, 1 / total[q],
                     static_cast<T*>(a.output) + ((r * a.queries + q0 + q) * a.heads + head) * a.dim);
      }
    }
  });
}

// For every grid row of every image, the regions that cover cells of it, in their order in by_image.
struct RowIndex {
  int64_t* image_rows;  // rows of image b start at image_rows[b]
  int64_t* start;       // regions of row y start at start[image_rows[b] + y]
  int32_t* position;    // counted from image_start[b]
};

RowIndex make_row_index(const RegionPlan& plan, const Footprint* footprints, Scratch& scratch) {
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
  index.position = scratch.take<int32_t>(index.start[rows]);
  int64_t* next = scratch.take<int64_t>(rows);
  std::copy(index.start, index.start + rows, next);
  for_each_row([&](int64_t row, int64_t position) { index.position[next[row]++] = static_cast<int32_t>(position); });
  return index;
}

// One head of one image's regions in the accumulation type: [region][query] rows.
template <typename A>
struct Queries {
  A* query;  // scaled
  A* grad;
  A* grad_query;
  const A** lse;  // [region]
  A* delta;       // grad . output
};

// A grid row's keys and values in the accumulation type, and the gradients that collect there.
template <typename A>
struct TokenRow {
  A* key;
  A* value;
  A* grad_key;
  A* grad_value;
};

template <typename T>
Queries<acc_t<T>> widen_queries(const RegionAttentionArgs& a, int64_t first, int64_t regions, int64_t head,
                                int64_t padded, Scratch& scratch) {
  using A = acc_t<T>;
  const int64_t rows = regions * a.queries;
  Queries<A> all;
  all.query = scratch.take<A>(rows * padded);
  all.grad = scratch.take<A>(rows * padded);
  all.grad_query = scratch.take<A>(rows * padded);
  all.lse = scratch.take<const A*>(regions);
  all.delta = scratch.take<A>(rows);
  A* output = scratch.take<A>(padded);
  std::fill(output, output + padded, A(0));
  std::fill(all.query, all.query + rows * padded, A(0));
  std::fill(all.grad, all.grad + rows * padded, A(0));
  std::fill(all.grad_query, all.grad_query + rows * padded, A(0));
  for (int64_t i = 0; i < regions; ++i) {
    const int64_t r = a.plan.by_image[first + i];
    all.lse[i] = static_cast<const A*>(a.lse) + (r * a.heads + head) * a.queries;
    for (int64_t q = 0; q < a.queries; ++q) {
      const int64_t row = i * a.queries + q;
      const int64_t offset = ((r * a.queries + q) * a.heads + head) * a.dim;
      const T* query = static_cast<const T*>(a.query) + r * a.query_region_stride + q * a.query_stride + head * a.dim;
      widen_row(query, a.dim, static_cast<A>(a.scale), all.query + row * padded);
      widen_row(static_cast<const T*>(a.grad) + offset, a.dim, A(1), all.grad + row * padded);
      widen_row(static_cast<const T*>(a.output) + offset, a.dim, A(1), output);
      Vec<A> sum{};
      for (int64_t c = 0; c < padded; c += kLanes<A>) sum += load(output + c) * load(all.grad + row * padded + c);
      all.delta[row] = sum_lanes<A>(sum);
    }
  }
  return all;
}

// weight[j] = exp(score[j] + bias[j] - lse); score[j] = weight[j] * (grad_weight[j] - delta), the gradient of the
// score.
template <typename A>
void softmax_gradient(A* score, A* weight, const A* bias, int64_t count, A lse, A delta) {
  for (int64_t j = 0; j < round_up(count, kLanes<A>); j += kLanes<A>) {
    const Vec<A> w = exp(load(score + j) + load(bias + j) - lse);
    store(score + j, w * (load(weight + j) - delta));
    store(weight + j, w);
  }
  std::fill(score + count, score + round_up(count, kTokenBlock), A(0));
  std::fill(weight + count, weight + round_up(count, kTokenBlock), A(0));
}

template <typename T>
void backward(const RegionAttentionArgs& a) {
  using A = acc_t<T>;
  Scratch shared;
  const Footprint* footprints = make_footprints(a.plan, shared);
  const RowIndex index = make_row_index(a.plan, footprints, shared);
  const int64_t padded = round_up(a.dim, kLanes<A>);
  const int64_t query_block = std::min(a.queries, kQueryBlock);
  const bool for_query = a.grad_query != nullptr, for_tokens = a.grad_key.data != nullptr;
  parallel_tasks(a.plan.num_images * a.heads, [&](int64_t task, Scratch& scratch) {
    const int64_t b = task / a.heads, head = task % a.heads, channel = head * a.dim;
    const ImageGrid& image = a.plan.images[b];
    const int64_t first = a.plan.image_start[b], regions = a.plan.image_start[b + 1] - first;
    const Queries<A> all = widen_queries<T>(a, first, regions, head, padded, scratch);
    const int64_t stride = round_up(image.width, 16);
    TokenRow<A> row;
    for (A** part : {&row.key, &row.value, &row.grad_key, &row.grad_value}) {
      *part = scratch.take<A>(image.width * padded);
      std::fill(*part, *part + image.width * padded, A(0));
    }
    // Columns of a region, filled up with a row that is never looked at.
    A* nothing = scratch.take<A>(padded);
    std::fill(nothing, nothing + padded, A(0));
    A* spill = scratch.take<A>(padded);
    std::fill(spill, spill + padded, A(0));
    A** keys = scratch.take<A*>(stride);
    A** values = scratch.take<A*>(stride);
    A** grad_keys = scratch.take<A*>(stride);
    A** grad_values = scratch.take<A*>(stride);
    A* bias = scratch.take<A>(stride);
    A* score = scratch.take<A>(stride * query_block);
    A* weight = scratch.take<A>(stride * query_block);

    for (int64_t y = 0; y < image.height; ++y) {
      const int64_t* active = index.start + index.image_rows[b] + y;
      int64_t begin = image.width, end = 0;
      for (int64_t i = active[0]; i < active[1]; ++i) {
        const Footprint& f = footprints[a.plan.by_image[first + index.position[i]]];
        begin = std::min<int64_t>(begin, f.x0);
        end = std::max<int64_t>(end, f.x1);
      }
      if (begin > end) begin = end = 0;
      for (int64_t x = begin; x < end; ++x) {
        const int64_t token = y * image.width + x;
        widen_row(a.key.row<const T>(image, b, token) + channel, a.dim, A(1), row.key + x * padded);
        widen_row(a.value.row<const T>(image, b, token) + channel, a.dim, A(1), row.value + x * padded);
      }
      if (for_tokens) {
        std::fill(row.grad_key + begin * padded, row.grad_key + end * padded, A(0));
        std::fill(row.grad_value + begin * padded, row.grad_value + end * padded, A(0));
      }
      for (int64_t i = active[0]; i < active[1]; ++i) {
        const int64_t position = index.position[i];
        const Footprint& f = footprints[a.plan.by_image[first + position]];
        const int64_t count = f.width(), whole = round_up(count, kTokenBlock);
        for (int64_t j = 0; j < whole; ++j) {
          const int64_t at = (f.x0 + j) * padded;
          const bool covered = j < count;
          keys[j] = covered ? row.key + at : nothing;
          values[j] = covered ? row.value + at : nothing;
          grad_keys[j] = covered ? row.grad_key + at : spill;
          grad_values[j] = covered ? row.grad_value + at : spill;
        }
        const double log_row = f.log_row(static_cast<int>(y));
        std::fill(bias, bias + round_up(count, 16), static_cast<A>(log_row));
        bias[0] = static_cast<A>(log_row + f.log_column(f.x0));
        bias[count - 1] = static_cast<A>(log_row + f.log_column(f.x1 - 1));
        for (int64_t q0 = 0; q0 < a.queries; q0 += kQueryBlock) {
          const int64_t queries = std::min(kQueryBlock, a.queries - q0);
          const int64_t first_row = position * a.queries + q0;
          const A* query = all.query + first_row * padded;
          const A* grad = all.grad + first_row * padded;
          for_each_query_tile(queries, [&](int64_t q, auto tile) {
            constexpr int kTile = decltype(tile)::value;
            dot_tile<A, kTile>(query + q * padded, padded, keys, whole, padded, score + q * stride, stride);
            dot_tile<A, kTile>(grad + q * padded, padded, values, whole, padded, weight + q * stride, stride);
          });
          for (int64_t q = 0; q < queries; ++q)
            softmax_gradient(score + q * stride, weight + q * stride, bias, count, all.lse[position][q0 + q],
                             all.delta[first_row + q]);
          for_each_query_tile(queries, [&](int64_t q, auto tile) {
            constexpr int kTile = decltype(tile)::value;
            if (for_query)
              mix_tile<A, kTile>(score + q * stride, stride, keys, whole, padded,
                                 all.grad_query + (first_row + q) * padded, padded);
            if (for_tokens) {
              spread_tile<A, kTile>(score + q * stride, stride, query + q * padded, padded, grad_keys, whole);
              spread_tile<A, kTile>(weight + q * stride, stride, grad + q * padded, padded, grad_values, whole);
            }
          });
        }
      }
      if (!for_tokens) continue;
      for (int64_t x = 0; x < image.width; ++x) {
        const int64_t token = y * image.width + x;
        T* grad_key = a.grad_key.row<T>(image, b, token) + channel;
        T* grad_value = a.grad_value.row<T>(image, b, token) + channel;
        if (x >= begin && x < end) {
          narrow_row(row.grad_key + x * padded, a.dim, A(1), grad_key);
          narrow_row(row.grad_value + x * padded, a.dim, A(1), grad_value);
        } else {
          std::fill(grad_key, grad_key + a.dim, T{});
          std::fill(grad_value, grad_value + a.dim, T{});
        }
      }
    }
    if (!for_query) return;
    for (int64_t i = 0; i < regions; ++i)
      for (int64_t q = 0; q < a.queries; ++q)
        narrow_row(
            all.grad_query + (i * a.queries + q) * padded, a.dim, static_cast<A>(a.scale),
            static_cast<T*>(a.grad_query) + ((a.plan.by_image[first + i] * a.queries + q) * a.heads + head) * a.dim);
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
  expect(args.dim >= 8 && args.dim % 8 == 0, op, ": query: expected a dim that is a multiple of 8, got ", args.dim);
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
  Tensor lse = torch::stable::new_empty(query, {query.size(0), args.heads, args.queries},
                                        args.key.dtype == DType::kFloat64 ? ScalarType::Double : ScalarType::Float);
  args.output = output.mutable_data_ptr();
  args.lse = lse.mutable_data_ptr();
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
  const ScalarType wide = args.key.dtype == DType::kFloat64 ? ScalarType::Double : ScalarType::Float;
  expect(lse_rows.numel() == query.size(0) * args.heads * args.queries && lse_rows.scalar_type() == wide, op,
         ": lse: expected shape (R, heads, Q) in the accumulation dtype");
  args.grad = grad_rows.const_data_ptr();
  args.output = const_cast<void*>(output_rows.const_data_ptr());
  args.lse = const_cast<void*>(lse_rows.const_data_ptr());
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
