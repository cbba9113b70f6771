// Low-rank experts, a few rows of weights each: the two products of one expert with the rows of its tokens. Rows of
// both kinds are few and long, which general products do not pay for packing. The second one also sums the values of
// attention (attention.cpp).
//
// Every dot product is summed in the same order however many tokens an expert has: a token's result does not depend on
// its neighbours.

#pragma once

#include <cstdint>
#include <cstring>
#include <string>

#include "few_rows.h"

namespace low_rank {

// out[c][r] = <row r of w, x[c]>; w holds `rank` rows of `width` floats.
using Dots = void (*)(const float* w, int64_t rank, int64_t width, const float* const* x, int64_t columns,
                      float* const* out);

// y[c] += sum over r of factors[c][r] * row r of w, the rows in order.
using Sums = void (*)(const float* w, int64_t rank, int64_t width, const float* const* factors, int64_t columns,
                      float* const* y);

// R rows of w with C tokens, one vector of sums each.
template <class S, int R, int C>
[[gnu::always_inline]] inline void dots_tile(const float* w, int64_t width, const float* const* x, float* const* out,
                                             int64_t row) {
  using V = typename S::V;
  constexpr int step = sizeof(V) / sizeof(float);
  V sums[R][C] = {};
  int64_t k = 0;
  for (; k + step <= width; k += step) {
    V columns[C], weights;
#pragma GCC unroll 16
    for (int c = 0; c < C; ++c) std::memcpy(&columns[c], x[c] + k, sizeof(V));
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) {
      std::memcpy(&weights, w + r * width + k, sizeof(V));
#pragma GCC unroll 16
      for (int c = 0; c < C; ++c) sums[r][c] += weights * columns[c];
    }
  }
  for (int r = 0; r < R; ++r) {
    for (int c = 0; c < C; ++c) {
      few_rows::Four::V lanes[step / 4];
      std::memcpy(lanes, &sums[r][c], sizeof(V));
      for (int i = 1; i < step / 4; ++i) lanes[0] += lanes[i];
      float sum = (lanes[0][0] + lanes[0][2]) + (lanes[0][1] + lanes[0][3]);
      for (int64_t i = k; i < width; ++i) sum += w[r * width + i] * x[c][i];
      out[c][row + r] = sum;
    }
  }
}

// R rows of w, added to C tokens.
template <class S, int R, int C>
[[gnu::always_inline]] inline void sums_tile(const float* w, int64_t width, const float* const* factors,
                                             float* const* y, int64_t row) {
  using V = typename S::V;
  constexpr int step = sizeof(V) / sizeof(float);
  V factor[R][C];
  for (int r = 0; r < R; ++r) {
    for (int c = 0; c < C; ++c) factor[r][c] = V{} + factors[c][row + r];
  }
  int64_t k = 0;
  for (; k + step <= width; k += step) {
    V sums[C], weights;
#pragma GCC unroll 16
    for (int c = 0; c < C; ++c) std::memcpy(&sums[c], y[c] + k, sizeof(V));
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) {
      std::memcpy(&weights, w + r * width + k, sizeof(V));
#pragma GCC unroll 16
      for (int c = 0; c < C; ++c) sums[c] += factor[r][c] * weights;
    }
#pragma GCC unroll 16
    for (int c = 0; c < C; ++c) std::memcpy(y[c] + k, &sums[c], sizeof(V));
  }
  for (; k < width; ++k) {
    for (int c = 0; c < C; ++c) {
      for (int r = 0; r < R; ++r) y[c][k] += factors[c][row + r] * w[r * width + k];
    }
  }
}

// Four rows and as many tokens as fit in the registers at a time, then what is left one by one.
template <class S>
[[gnu::always_inline]] inline void dots(const float* w, int64_t rank, int64_t width, const float* const* x,
                                        int64_t columns, float* const* out) {
  constexpr int wide = sizeof(typename S::V) == 64 ? 6 : 3;  // AVX-512 has 32 registers
  int64_t row = 0;
  for (; row + 4 <= rank; row += 4, w += 4 * width) {
    int64_t c = 0;
    for (; c + wide <= columns; c += wide) dots_tile<S, 4, wide>(w, width, x + c, out + c, row);
    for (; c < columns; ++c) dots_tile<S, 4, 1>(w, width, x + c, out + c, row);
  }
  for (; row < rank; ++row, w += width) {
    for (int64_t c = 0; c < columns; ++c) dots_tile<S, 1, 1>(w, width, x + c, out + c, row);
  }
}

template <class S>
[[gnu::always_inline]] inline void sums(const float* w, int64_t rank, int64_t width, const float* const* factors,
                                        int64_t columns, float* const* y) {
  constexpr int wide = sizeof(typename S::V) == 64 ? 5 : 2;
  int64_t row = 0;
  for (; row + 4 <= rank; row += 4, w += 4 * width) {
    int64_t c = 0;
    for (; c + wide <= columns; c += wide) sums_tile<S, 4, wide>(w, width, factors + c, y + c, row);
    for (; c < columns; ++c) sums_tile<S, 4, 1>(w, width, factors + c, y + c, row);
  }
  for (; row < rank; ++row, w += width) {
    for (int64_t c = 0; c < columns; ++c) sums_tile<S, 1, 1>(w, width, factors + c, y + c, row);
  }
}

// Both for one kind of instructions.
struct Form {
  Dots dots;
  Sums sums;
};

#define UNIMOE_LOW_RANK(NAME, S)                                                                        \
  inline void dots_##NAME(const float* w, int64_t rank, int64_t width, const float* const* x, int64_t columns, \
                          float* const* out) {                                                               \
    dots<few_rows::S>(w, rank, width, x, columns, out);                                                      \
  }                                                                                                          \
  inline void sums_##NAME(const float* w, int64_t rank, int64_t width, const float* const* factors,         \
                          int64_t columns, float* const* y) {                                                \
    sums<few_rows::S>(w, rank, width, factors, columns, y);                                                  \
  }

UNIMOE_LOW_RANK(4, Four)
#ifdef __x86_64__
#pragma GCC push_options
#pragma GCC target("avx2,fma")
UNIMOE_LOW_RANK(8, Eight)
#pragma GCC pop_options
#pragma GCC push_options
#pragma GCC target("avx512f")
UNIMOE_LOW_RANK(16, Sixteen)
#pragma GCC pop_options
#endif
#undef UNIMOE_LOW_RANK

// The form for a processor, as few_rows::choose.
inline Form choose(const std::string& capability) {
#ifdef __x86_64__
  if (capability.starts_with("AVX512")) return {dots_16, sums_16};
  if (capability.starts_with("AVX2")) return {dots_8, sums_8};
#endif
  return {dots_4, sums_4};
}

}  // namespace low_rank
