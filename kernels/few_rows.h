// Products of few rows with weight matrices: what is read is the weights, once, so each of their rows is multiplied
// with all rows of x while it is in a core's cache. A general product packs its operands first, which takes longer.
//
// A core reads several places of the memory at once faster than one: the six rows of w that are multiplied together lie
// a sixth of all rows apart, so each is the next of its own stream.
//
// A dot product is summed in 16 lanes, whatever the instructions and however many rows there are: a row's result does
// not depend on its neighbours.

#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <string>

namespace few_rows {

constexpr int kLanes = 16;

// out[c][r] = <row r of w, x[c]>; w holds `rows` rows of `width` floats, one after the other.
using Products = void (*)(const float* w, int64_t rows, int64_t width, const float* const* x, int64_t columns,
                          float* const* out);

// Vectors of 4, 8 and 16 floats. As members, since a template argument loses its attributes.
struct Four {
  typedef float V __attribute__((vector_size(16)));
};
struct Eight {
  typedef float V __attribute__((vector_size(32)));
};
struct Sixteen {
  typedef float V __attribute__((vector_size(64)));
};

// R rows of w, `gap` rows apart, with C rows of x, in R * C * 16 lanes that fit in the registers.
template <class S, int R, int C>
[[gnu::always_inline]] inline void tile(const float* w, int64_t width, const float* const* x, float* const* out,
                                        int64_t row, int64_t gap) {
  w += row * width;
  using V = typename S::V;
  constexpr int step = sizeof(V) / sizeof(float), parts = kLanes / step;
  V sums[R][C][parts] = {};
  int64_t k = 0;
  for (; k + kLanes <= width; k += kLanes) {
#pragma GCC unroll 16
    for (int p = 0; p < parts; ++p) {
      V columns[C];
#pragma GCC unroll 16
      for (int c = 0; c < C; ++c) std::memcpy(&columns[c], x[c] + k + p * step, sizeof(V));
#pragma GCC unroll 16
      for (int r = 0; r < R; ++r) {
        V weights;
        std::memcpy(&weights, w + r * gap * width + k + p * step, sizeof(V));
#pragma GCC unroll 16
        for (int c = 0; c < C; ++c) sums[r][c][p] += weights * columns[c];
      }
    }
  }
  for (int r = 0; r < R; ++r) {
    for (int c = 0; c < C; ++c) {
      Four::V lanes[kLanes / 4];
      std::memcpy(lanes, sums[r][c], sizeof(lanes));
      lanes[0] = (lanes[0] + lanes[2]) + (lanes[1] + lanes[3]);
      float sum = (lanes[0][0] + lanes[0][2]) + (lanes[0][1] + lanes[0][3]);
      for (int64_t i = k; i < width; ++i) sum += w[r * gap * width + i] * x[c][i];
      out[c][row + r * gap] = sum;
    }
  }
}

// Six rows of w, from `row` on and `gap` rows apart, with all rows of x.
template <class S>
[[gnu::always_inline]] inline void strip(const float* w, int64_t width, const float* const* x, int64_t columns,
                                         float* const* out, int64_t row, int64_t gap) {
  for (int64_t c = 0; c < columns; c += 3) {
    switch (columns - c) {
      case 1: tile<S, 6, 1>(w, width, x + c, out + c, row, gap); break;
      case 2:
        for (int r = 0; r < 6; r += 3) tile<S, 3, 2>(w, width, x + c, out + c, row + r * gap, gap);
        break;
      default:
        for (int r = 0; r < 6; r += 2) tile<S, 2, 3>(w, width, x + c, out + c, row + r * gap, gap);
    }
  }
}

template <class S>
[[gnu::always_inline]] inline void products(const float* w, int64_t rows, int64_t width, const float* const* x,
                                            int64_t columns, float* const* out) {
  const int64_t gap = rows / 6;
  for (int64_t row = 0; row < gap; ++row) strip<S>(w, width, x, columns, out, row, gap);
  for (int64_t row = 6 * gap; row < rows; ++row) {
    for (int64_t c = 0; c < columns; ++c) tile<S, 1, 1>(w, width, x + c, out + c, row, 1);
  }
}

inline void products_4(const float* w, int64_t rows, int64_t width, const float* const* x, int64_t columns,
                       float* const* out) {
  products<Four>(w, rows, width, x, columns, out);
}

#ifdef __x86_64__
__attribute__((target("avx2,fma"))) inline void products_8(const float* w, int64_t rows, int64_t width,
                                                           const float* const* x, int64_t columns, float* const* out) {
  products<Eight>(w, rows, width, x, columns, out);
}

__attribute__((target("avx512f"))) inline void products_16(const float* w, int64_t rows, int64_t width,
                                                           const float* const* x, int64_t columns, float* const* out) {
  products<Sixteen>(w, rows, width, x, columns, out);
}
#endif

// The form for a processor, which torch names (at::get_cpu_capability); ATEN_CPU_CAPABILITY=default asks for less.
inline Products choose(const std::string& capability) {
#ifdef __x86_64__
  if (capability.starts_with("AVX512")) return products_16;
  if (capability.starts_with("AVX2")) return products_8;
#endif
  return products_4;
}

}  // namespace few_rows
