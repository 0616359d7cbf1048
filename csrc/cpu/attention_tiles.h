// The three products of attention, on tiles that stay in registers, and the softmax between them. "Queries" lie in rows
// of `padded` accumulators, filled up with zeros to whole vectors; "tokens" are rows anywhere in memory, named by
// pointers whose count is padded to a multiple of kTokenBlock, and read `offset` elements further on. Weights and
// scores form a matrix [query][token] whose rows are `stride` apart.
#pragma once

#include <algorithm>
#include <limits>

#include "math.h"
#include "regions.h"

namespace granvit::cpu::GRANVIT_ISA {

constexpr int64_t kTokenBlock = 8;
// Queries that share one pass over the tokens, and tokens that share one pass over their channels: bounded by
// registers.
#if defined(__AVX512F__)
constexpr int kQueryTile = 4;
template <int kQueries>
constexpr int kTokenTile = kQueries == 4 ? 4 : 8;
#else
constexpr int kQueryTile = 2;
template <int kQueries>
constexpr int kTokenTile = kQueries == 2 ? 2 : 4;
#endif

GRANVIT_INLINE int64_t round_up(int64_t n, int64_t multiple) { return (n + multiple - 1) / multiple * multiple; }

// A head dimension is a multiple of 8, so what remains after whole vectors is half a vector of floats.
template <typename T>
GRANVIT_INLINE Vec<acc_t<T>> load_half(const T* p) {
  T padded[kLanes<acc_t<T>>] = {};
  std::memcpy(padded, p, kLanes<acc_t<T>> / 2 * sizeof(T));
  return load(padded);
}
#if defined(__AVX512F__)
// A copy through memory would stall: the wide load cannot be served from the two narrower stores before it.
GRANVIT_INLINE f32x16 load_half(const float* p) {
  const __m512 wide = _mm512_maskz_loadu_ps(0x00ff, p);
  f32x16 x;
  std::memcpy(&x, &wide, sizeof x);
  return x;
}
GRANVIT_INLINE f32x16 load_half(const bf16* p) {
  const __m256i bits = _mm256_zextsi128_si256(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
  u16x16 words;
  std::memcpy(&words, &bits, sizeof words);
  return widen_bf16(words);
}
#endif
template <typename T>
GRANVIT_INLINE void store_half(T* p, Vec<acc_t<T>> x) {
  T padded[kLanes<acc_t<T>>];
  store(padded, x);
  std::memcpy(p, padded, kLanes<acc_t<T>> / 2 * sizeof(T));
}

// Runs body(c, load(row + c)) over a row's vectors, the last one half full where `dim` ends so.
template <typename T, typename Full, typename Half>
GRANVIT_INLINE void for_each_part(int64_t dim, Full&& full, Half&& half) {
  int64_t c = 0;
  for (; c + kLanes<acc_t<T>> <= dim; c += kLanes<acc_t<T>>) full(c);
  if (c < dim) half(c);
}

template <typename T>
void widen_row(const T* from, int64_t dim, acc_t<T>* to) {
  for_each_part<T>(
      dim, [&](int64_t c) { store(to + c, load(from + c)); }, [&](int64_t c) { store(to + c, load_half(from + c)); });
}

template <typename T>
void narrow_row(const acc_t<T>* from, int64_t dim, acc_t<T> factor, T* to) {
  for_each_part<T>(
      dim, [&](int64_t c) { store(to + c, load(from + c) * factor); },
      [&](int64_t c) { store_half(to + c, load(from + c) * factor); });
}

// sums[i] = sum of the lanes of x[i].
template <int kCount>
GRANVIT_INLINE void sum_each(const f64x8 (&x)[kCount], double* sums) {
  for (int i = 0; i < kCount; ++i) sums[i] = sum_lanes<double>(x[i]);
}
#if defined(__AVX512F__)
// Halves the vectors while it halves what each still has to add: every step adds the even and the odd groups of lanes.
template <int kCount>
GRANVIT_INLINE void sum_each(const f32x16 (&x)[kCount], float* sums) {
  static_assert(kCount == 8 || kCount == 16);
  f32x16 a[8], b[4], c[2];
  for (int i = 0; i < kCount / 2; ++i)
    a[i] =
        __builtin_shufflevector(x[2 * i], x[2 * i + 1], 0, 1, 2, 3, 4, 5, 6, 7, 16, 17, 18, 19, 20, 21, 22, 23) +
        __builtin_shufflevector(x[2 * i], x[2 * i + 1], 8, 9, 10, 11, 12, 13, 14, 15, 24, 25, 26, 27, 28, 29, 30, 31);
  for (int i = 0; i < kCount / 4; ++i)
    b[i] = __builtin_shufflevector(a[2 * i], a[2 * i + 1], 0, 1, 2, 3, 8, 9, 10, 11, 16, 17, 18, 19, 24, 25, 26, 27) +
           __builtin_shufflevector(a[2 * i], a[2 * i + 1], 4, 5, 6, 7, 12, 13, 14, 15, 20, 21, 22, 23, 28, 29, 30, 31);
  for (int i = 0; i < kCount / 8; ++i)
    c[i] = __builtin_shufflevector(b[2 * i], b[2 * i + 1], 0, 1, 4, 5, 8, 9, 12, 13, 16, 17, 20, 21, 24, 25, 28, 29) +
           __builtin_shufflevector(b[2 * i], b[2 * i + 1], 2, 3, 6, 7, 10, 11, 14, 15, 18, 19, 22, 23, 26, 27, 30, 31);
  const f32x16 last = c[kCount / 8 - 1];
  const f32x16 d = __builtin_shufflevector(c[0], last, 0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30) +
                   __builtin_shufflevector(c[0], last, 1, 3, 5, 7, 9, 11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31);
  std::memcpy(sums, &d, kCount * sizeof(float));
}
#else
typedef float f32x4 __attribute__((vector_size(16)));
GRANVIT_INLINE f32x4 fold(const f32x16& x) {
  f32x4 quarter[4];
  std::memcpy(quarter, &x, sizeof x);
  return (quarter[0] + quarter[2]) + (quarter[1] + quarter[3]);  // in the order of sum_lanes
}
template <int kCount>
GRANVIT_INLINE void sum_each(const f32x16 (&x)[kCount], float* sums) {
  static_assert(kCount % 4 == 0);
  for (int i = 0; i < kCount; i += 4) {
    const f32x4 a = fold(x[i]), b = fold(x[i + 1]), c = fold(x[i + 2]), d = fold(x[i + 3]);
    const f32x4 ab = __builtin_shufflevector(a, b, 0, 4, 1, 5) + __builtin_shufflevector(a, b, 2, 6, 3, 7);
    const f32x4 cd = __builtin_shufflevector(c, d, 0, 4, 1, 5) + __builtin_shufflevector(c, d, 2, 6, 3, 7);
    const f32x4 sum = __builtin_shufflevector(ab, cd, 0, 1, 4, 5) + __builtin_shufflevector(ab, cd, 2, 3, 6, 7);
    std::memcpy(sums + i, &sum, sizeof sum);
  }
}
#endif

// scores[q][j] = query q . token j.
template <typename T, int kQueries>
void dot_tile(const acc_t<T>* query, int64_t padded, const T* const* tokens, int64_t offset, int64_t count, int64_t dim,
              acc_t<T>* scores, int64_t stride) {
  using A = acc_t<T>;
  constexpr int kTokens = kTokenTile<kQueries>;
  for (int64_t j0 = 0; j0 < count; j0 += kTokens) {
    const T* row[kTokens];
    Vec<A> sum[kQueries * kTokens];
    for (int j = 0; j < kTokens; ++j) row[j] = tokens[j0 + j] + offset;
    for (int i = 0; i < kQueries * kTokens; ++i) sum[i] = Vec<A>{};
    const auto add = [&](int64_t c, const auto& load_token) {
      Vec<A> x[kTokens];
      for (int j = 0; j < kTokens; ++j) x[j] = load_token(row[j] + c);
      for (int q = 0; q < kQueries; ++q) {
        const Vec<A> y = load(query + q * padded + c);
        for (int j = 0; j < kTokens; ++j) sum[q * kTokens + j] += x[j] * y;
      }
    };
    for_each_part<T>(
        dim, [&](int64_t c) { add(c, [](const T* p) { return load(p); }); },
        [&](int64_t c) { add(c, [](const T* p) { return load_half(p); }); });
    A total[kQueries * kTokens];
    sum_each(sum, total);
    for (int q = 0; q < kQueries; ++q) std::memcpy(scores + q * stride + j0, total + q * kTokens, kTokens * sizeof(A));
  }
}

// out[q] += sum over j of weight[q][j] * token j.
template <typename T, int kQueries>
void mix_tile(const acc_t<T>* weight, int64_t stride, const T* const* tokens, int64_t offset, int64_t count,
              int64_t dim, acc_t<T>* out, int64_t padded) {
  using A = acc_t<T>;
  constexpr int kTokens = kTokenTile<kQueries>;
  for (int64_t j0 = 0; j0 < count; j0 += kTokens) {
    const T* row[kTokens];
    Vec<A> w[kQueries * kTokens];
    for (int j = 0; j < kTokens; ++j) row[j] = tokens[j0 + j] + offset;
    for (int q = 0; q < kQueries; ++q)
      for (int j = 0; j < kTokens; ++j) w[q * kTokens + j] = splat(weight[q * stride + j0 + j]);
    const auto add = [&](int64_t c, const auto& load_token) {
      Vec<A> x[kTokens];
      for (int j = 0; j < kTokens; ++j) x[j] = load_token(row[j] + c);
      for (int q = 0; q < kQueries; ++q) {
        // Two chains of additions, so that one does not wait for the other.
        Vec<A> even = load(out + q * padded + c), odd = x[1] * w[q * kTokens + 1];
        for (int j = 0; j < kTokens; j += 2) even += x[j] * w[q * kTokens + j];
        for (int j = 3; j < kTokens; j += 2) odd += x[j] * w[q * kTokens + j];
        store(out + q * padded + c, even + odd);
      }
    };
    for_each_part<T>(
        dim, [&](int64_t c) { add(c, [](const T* p) { return load(p); }); },
        [&](int64_t c) { add(c, [](const T* p) { return load_half(p); }); });
  }
}

// token j += sum over q of weight[q][j] * query q, with tokens in rows of `padded` accumulators too.
template <typename A, int kQueries>
void spread_tile(const A* weight, int64_t stride, const A* query, int64_t padded, A* const* tokens, int64_t offset,
                 int64_t count) {
  constexpr int kTokens = kTokenTile<kQueries>;
  for (int64_t j0 = 0; j0 < count; j0 += kTokens) {
    A* row[kTokens];
    Vec<A> w[kQueries * kTokens];
    for (int j = 0; j < kTokens; ++j) row[j] = tokens[j0 + j] + offset;
    for (int q = 0; q < kQueries; ++q)
      for (int j = 0; j < kTokens; ++j) w[q * kTokens + j] = splat(weight[q * stride + j0 + j]);
    for (int64_t c = 0; c < padded; c += kLanes<A>) {
      Vec<A> y[kQueries];
      for (int q = 0; q < kQueries; ++q) y[q] = load(query + q * padded + c);
      for (int j = 0; j < kTokens; ++j) {
        Vec<A> sum = y[0] * w[j];
        for (int q = 1; q < kQueries; ++q) sum += y[q] * w[q * kTokens + j];
        store(row[j] + c, load(row[j] + c) + sum);
      }
    }
  }
}

// Runs body(first query, compile-time number of queries) until all queries had their turn.
template <typename Body>
GRANVIT_INLINE void for_each_query_tile(int64_t queries, Body&& body) {
  int64_t q = 0;
  for (; q + kQueryTile <= queries; q += kQueryTile) body(q, std::integral_constant<int, kQueryTile>{});
  if constexpr (kQueryTile > 2)
    for (; q + 2 <= queries; q += 2) body(q, std::integral_constant<int, 2>{});
  for (; q < queries; ++q) body(q, std::integral_constant<int, 1>{});
}

// score[j] = scale * score[j] + bias[j], then weight[j] = exp(score[j] - maximum) in place. From `count` up to the next
// whole vector `bias` is minus infinity and the weights become 0. Returns the sum of the weights.
template <typename A>
A softmax_weights(A* score, A scale, const A* bias, int64_t count, A* maximum) {
  constexpr A kLowest = -std::numeric_limits<A>::infinity();
  const int64_t end = round_up(count, kLanes<A>);
  std::fill(score + count, score + end, A(0));
  Vec<A> highest = splat(kLowest);
  for (int64_t j = 0; j < end; j += kLanes<A>) {
    const Vec<A> s = load(score + j) * scale + load(bias + j);
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

// score[j] becomes the weight's share of the gradient of the score, weight * (grad_weight - delta), and grad_weight[j]
// the weight, exp(scale * score + bias - lse); both 0 from `count` on.
template <typename A>
void softmax_gradient(A* score, A* grad_weight, A scale, const A* bias, int64_t count, double lse, A delta) {
  // In two parts: one would carry the rounding of lse, a relative error of half an ulp of lse, into every weight.
  const A coarse = static_cast<A>(lse), fine = static_cast<A>(lse - coarse);
  for (int64_t j = 0; j < count; j += kLanes<A>) {
    // Rounded as in the forward before lse is taken away: lse holds the sum over scores rounded like this.
    const Vec<A> biased = load(score + j) * scale + load(bias + j);
    const Vec<A> w = exp((biased - coarse) - fine);
    store(score + j, w * (load(grad_weight + j) - delta));
    store(grad_weight + j, w);
  }
  const int64_t end = round_up(count, kTokenBlock);
  std::fill(score + count, score + end, A(0));
  std::fill(grad_weight + count, grad_weight + end, A(0));
}

}  // namespace granvit::cpu::GRANVIT_ISA
