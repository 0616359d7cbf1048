// RoIAlign as two banded matrix products, out = A_y X A_x^T, on one block of channels at a time.
//
// A region's output row p is made in two steps: `mix_rows` blends the few grid rows under it into one row of the box's
// columns, `mix_columns` blends neighbouring columns into an output cell. `spread_columns` and `spread_rows` are their
// transposes. The blended row of a channel block stays in the first-level cache.
#pragma once

#include <algorithm>

#include "../geometry.h"
#include "parallel.h"
#include "regions.h"

namespace granvit::cpu::GRANVIT_ISA {

// The band of A along one axis: output cell p reads grid lines first[p] .. first[p] + taps - 1 with weight[p * taps +
// i].
template <typename A>
struct Band {
  int cells;
  int taps;   // the same for all cells; narrower cells carry zero weights
  int begin;  // grid lines outside [begin, end) are not read
  int end;
  const int* first;
  const A* weight;
};

// Lowest and highest grid line that cell p reads with a weight other than zero; {0, -1} where it reads none.
struct LineSpan {
  int low;
  int high;
};

inline __attribute__((always_inline)) LineSpan cell_span(double start, double bin, int p, int samples, int size) {
  LineSpan span{size, -1};
  for (int k = 0; k < samples; ++k) {
    const auto tap = sample_taps<double>(start, bin, p, k, samples, size);
    if (tap.weight_low != 0) {
      span.low = std::min(span.low, tap.low);
      span.high = std::max(span.high, tap.low);
    }
    if (tap.weight_high != 0) {
      span.low = std::min(span.low, tap.high);
      span.high = std::max(span.high, tap.high);
    }
  }
  return span.high < 0 ? LineSpan{0, -1} : span;
}

// Edges are relative to the image; `size` grid lines lie across it.
template <typename A>
Band<A> make_band(double low, double high, int cells, int size, int sampling_ratio, Scratch& scratch) {
  const double start = low * size;
  const double bin = (high * size - start) / cells;
  const int samples = samples_per_cell(bin, sampling_ratio);
  int* first = scratch.take<int>(cells);
  int taps = 1, begin = size, end = 0;
  for (int p = 0; p < cells; ++p) {
    const LineSpan span = cell_span(start, bin, p, samples, size);
    first[p] = span.low;
    taps = std::max(taps, span.high - span.low + 1);
    if (span.high >= span.low) {
      begin = std::min(begin, span.low);
      end = std::max(end, span.high + 1);
    }
  }
  if (begin >= end) begin = 0, end = 1;  // nothing is read: all weights are zero
  // Every cell gets the same number of taps inside [begin, end), which keeps the inner loops free of branches.
  end = std::max(end, std::min(begin + taps, size));
  begin = std::min(begin, end - taps);
  A* weight = scratch.take<A>(static_cast<int64_t>(cells) * taps);
  std::fill(weight, weight + static_cast<int64_t>(cells) * taps, A(0));
  double* sum = scratch.take<double>(taps);
  for (int p = 0; p < cells; ++p) {
    first[p] = std::clamp(first[p], begin, end - taps);
    std::fill(sum, sum + taps, 0.0);
    for (int k = 0; k < samples; ++k) {
      const auto tap = sample_taps<double>(start, bin, p, k, samples, size);
      if (tap.weight_low != 0) sum[tap.low - first[p]] += tap.weight_low;
      if (tap.weight_high != 0) sum[tap.high - first[p]] += tap.weight_high;
    }
    for (int i = 0; i < taps; ++i) weight[p * taps + i] = samples > 0 ? static_cast<A>(sum[i] / samples) : A(0);
  }
  return {cells, taps, begin, end, first, weight};
}

// Calls body(std::integral_constant<int, taps>), with 0 standing for "any number", so that common widths unroll.
template <typename Body>
GRANVIT_INLINE void with_taps(int taps, Body&& body) {
  switch (taps) {
    case 1:
      return body(std::integral_constant<int, 1>{});
    case 2:
      return body(std::integral_constant<int, 2>{});
    case 3:
      return body(std::integral_constant<int, 3>{});
    default:
      return body(std::integral_constant<int, 0>{});
  }
}

// A block of channels [begin, begin + size). In scratch a token takes `padded` accumulators: size, rounded up to whole
// vectors.
struct ChannelBlock {
  int64_t begin;
  int size;
  int padded;
};

template <typename A>
GRANVIT_INLINE ChannelBlock channel_block(int64_t index, int64_t width, int64_t channels) {
  const int64_t begin = index * width;
  const int size = static_cast<int>(std::min(width, channels - begin));
  return {begin, size, (size + kLanes<A> - 1) / kLanes<A> * kLanes<A>};
}

// Width of the channel blocks such that the gradient of one image's block stays in the second-level cache. Depends on
// the shapes alone, never on the number of threads.
template <typename A>
int64_t block_width(const RegionPlan& plan) {
  int64_t tokens = 1;
  for (int64_t b = 0; b < plan.num_images; ++b) tokens = std::max(tokens, plan.images[b].height * plan.images[b].width);
  const int64_t fitting = (512 * 1024) / (tokens * static_cast<int64_t>(sizeof(A)));
  return std::clamp<int64_t>(fitting / 32 * 32, 32, 256);
}

// blended[x] = sum_i weight_y[p, i] * X[first_y[p] + i, x], for the columns of band_x.
template <typename T>
void mix_rows(const TokenView& tokens, const ImageGrid& image, int64_t image_index, const ChannelBlock& block,
              const Band<acc_t<T>>& band_y, const Band<acc_t<T>>& band_x, int p, acc_t<T>* blended) {
  using A = acc_t<T>;
  const A* weight = band_y.weight + static_cast<int64_t>(p) * band_y.taps;
  with_taps(band_y.taps, [&](auto constant) {
    constexpr int kTaps = decltype(constant)::value;
    const int taps = kTaps != 0 ? kTaps : band_y.taps;
    for (int x = band_x.begin; x < band_x.end; ++x) {
      A* to = blended + static_cast<int64_t>(x - band_x.begin) * block.padded;
      const T* from = tokens.row<T>(image, image_index, band_y.first[p] * image.width + x) + block.begin;
      const int64_t step = image.width * tokens.row_stride;
      for_each_vec<A>(
          block.size,
          [&](int64_t c) {
            Vec<A> sum = splat<A>(weight[0]) * load(from + c);
            for (int i = 1; i < taps; ++i) sum += splat<A>(weight[i]) * load(from + i * step + c);
            store(to + c, sum);
          },
          [&](int64_t c, int lanes) {
            Vec<A> sum{};
            for (int i = 0; i < taps; ++i) sum += splat<A>(weight[i]) * load_first(from + i * step + c, lanes);
            store(to + c, sum);
          });
    }
  });
}

// The value of output cell q at channel c of a blended row.
template <typename A, int kTaps>
GRANVIT_INLINE Vec<A> mix_columns(const A* blended_cell, const A* weight, int taps, int padded, int64_t c) {
  const int count = kTaps != 0 ? kTaps : taps;
  Vec<A> sum = splat<A>(weight[0]) * load(blended_cell + c);
  for (int i = 1; i < count; ++i)
    sum += splat<A>(weight[i]) * load(blended_cell + static_cast<int64_t>(i) * padded + c);
  return sum;
}

// Adds output cell q's gradient at channel c to the columns it was mixed from.
template <typename A, int kTaps>
GRANVIT_INLINE void spread_columns(A* blended_cell, const A* weight, int taps, int padded, int64_t c, Vec<A> grad) {
  const int count = kTaps != 0 ? kTaps : taps;
  for (int i = 0; i < count; ++i) {
    A* to = blended_cell + static_cast<int64_t>(i) * padded + c;
    store(to, load(to) + splat<A>(weight[i]) * grad);
  }
}

// grad_tokens[first_y[p] + i, x] += scale * weight_y[p, i] * blended[x]; grad_tokens is scratch of (H * W, padded).
template <typename A>
void spread_rows(const A* blended, const Band<A>& band_y, const Band<A>& band_x, int p, const ImageGrid& image,
                 const ChannelBlock& block, A scale, A* grad_tokens) {
  const A* weight = band_y.weight + static_cast<int64_t>(p) * band_y.taps;
  const int64_t columns = band_x.end - band_x.begin;
  for (int i = 0; i < band_y.taps; ++i) {
    if (weight[i] == A(0)) continue;
    const Vec<A> factor = splat<A>(weight[i] * scale);
    A* to = grad_tokens + ((band_y.first[p] + i) * image.width + band_x.begin) * block.padded;
    for (int64_t c = 0; c < columns * block.padded; c += kLanes<A>)
      store(to + c, load(to + c) + factor * load(blended + c));
  }
}

// Rounds an image's scratch gradient into its place in the output.
template <typename T>
void store_gradient(const acc_t<T>* grad_tokens, const TokenView& grad, const ImageGrid& image, int64_t image_index,
                    const ChannelBlock& block) {
  using A = acc_t<T>;
  for (int64_t token = 0; token < image.height * image.width; ++token) {
    const A* from = grad_tokens + token * block.padded;
    T* to = grad.row<T>(image, image_index, token) + block.begin;
    for_each_vec<A>(
        block.size, [&](int64_t c) { store(to + c, load(from + c)); },
        [&](int64_t c, int lanes) { store_first(to + c, load(from + c), lanes); });
  }
}

}  // namespace granvit::cpu::GRANVIT_ISA
