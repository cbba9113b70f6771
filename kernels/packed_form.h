// The products of packed weights in one form. packed.h includes this file once for each form, inside a namespace of its
// own, after it defined INLINE (with the instructions that the form may use: an attribute cannot depend on a template
// argument), the vectors Bytes and what is done with them. Layout and letters: packed.h.

constexpr int kParts = 64 / sizeof(Bytes);  // vectors of a step

// Where `dots` takes its weights from: part p (of sizeof(Bytes)) of step i of a chunk, 64 bytes a step.

// Codes that were unpacked before.
struct Unpacked {
  const uint8_t* bytes;
  INLINE Bytes step(int64_t chunk, int i, int p) const { return load(bytes + (chunk * 8 + i) * 64 + p * sizeof(Bytes)); }
};

// Planes, the highest first. A byte of a plane holds the codes of 8 / kWidth steps.
template <int kWidth, int... kRest>
struct Planes {
  const uint8_t* const* planes;
  int64_t first;
  INLINE Bytes step(int64_t chunk, int i, int p) const {
    constexpr int kEach = 8 / kWidth, kLow = (kRest + ... + 0), kMask = ((1 << kWidth) - 1) << kLow;
    const Bytes all = load(planes[0] + ((first + chunk) * kWidth + i / kEach) * 64 + p * sizeof(Bytes));
    const Bytes codes = kWidth == 8 ? all : masked(shifted(all, i % kEach * kWidth - kLow), kMask);
    if constexpr (sizeof...(kRest) > 0) {
      return either(codes, Planes<kRest...>{planes + 1, first}.step(chunk, i, p));
    } else {
      return codes;
    }
  }
};

// sums[c] += scale * x scale * (dot - zero * sum of x), for C rows of x and one group
template <int kKind, int C, class Source>
INLINE void add_group(const Source& w, int64_t padded, const Activations& x, const int64_t* at, const Floats* scale,
                      float zero, Floats (*sums)[kParts]) {
  Ints dot[C][kParts];
  const int8_t* codes[C];
#pragma GCC unroll 4
  for (int c = 0; c < C; ++c) codes[c] = x.codes + at[c] * padded;
  dots<kKind, C>(w, padded / 32, codes, dot);
#pragma GCC unroll 4
  for (int c = 0; c < C; ++c) {
    const float x_scale = x.scale[at[c]], less = zero * x.sum[at[c]];
#pragma GCC unroll 4
    for (int p = 0; p < kParts; ++p) {
      sums[c][p] += (scale[p] * x_scale) * (__builtin_convertvector(dot[c][p], Floats) - less);
    }
  }
}

// What is read soon: the processor's own prefetching stops at the end of a page.
INLINE void prefetch(const uint8_t* from, int64_t lines) {
  for (int64_t i = 0; i < lines; ++i) __builtin_prefetch(from + kAhead + i * 64);
}

template <int... kWidths>
constexpr int kKindOf = (kWidths + ...) <= 4 ? 0 : (kWidths + ...) < 8 ? 1 : 2;

INLINE void scales(const Matrix& m, int64_t block, int64_t g, Floats* to) {
  const uint16_t* from = m.scales + (block * m.groups + g) * 16;
#pragma GCC unroll 4
  for (int p = 0; p < kParts; ++p) to[p] = halves(from + p * (16 / kParts)) * m.step;
}

// C rows of x: codes are multiplied as they are unpacked.
template <int C, int... kWidths>
INLINE void few(const Matrix& m, int64_t block, const Activations& x, const int64_t* rows, float* out) {
  constexpr int kKind = kKindOf<kWidths...>;
  const float zero = m.zero - (kKind == 2 ? kOffset : 0);
  const int64_t chunks = m.padded / 32;
  Floats sums[C][kParts] = {};
  for (int64_t g = 0; g < m.groups; ++g) {
    const int64_t chunk = (block * m.groups + g) * chunks;
    int i = 0;
    ((prefetch(m.planes[i] + chunk * kWidths * 64, chunks * kWidths), ++i), ...);
    Floats scale[kParts];
    scales(m, block, g, scale);
    int64_t at[C];
#pragma GCC unroll 4
    for (int c = 0; c < C; ++c) at[c] = g * x.rows + rows[c];
    add_group<kKind, C>(Planes<kWidths...>{m.planes, chunk}, m.padded, x, at, scale, zero, sums);
  }
  std::memcpy(out, sums, sizeof(sums));
}

// n rows of x, C at a time, with codes that were unpacked.
template <int kKind, int C>
INLINE void add_rows(const uint8_t* bytes, int64_t g, int64_t padded, const Activations& x, const int64_t* rows,
                     const Floats* scale, float zero, float* out) {
  Floats sums[C][kParts];
  std::memcpy(sums, out, sizeof(sums));
  int64_t at[C];
#pragma GCC unroll 4
  for (int c = 0; c < C; ++c) at[c] = g * x.rows + rows[c];
  add_group<kKind, C>(Unpacked{bytes}, padded, x, at, scale, zero, sums);
  std::memcpy(out, sums, sizeof(sums));
}

template <int... kWidths>
INLINE void many(const Matrix& m, int64_t block, const Activations& x, const int64_t* rows, int64_t n, float* out) {
  constexpr int kKind = kKindOf<kWidths...>;
  constexpr bool kAsTheyAre = sizeof...(kWidths) == 1 && kKind == 2;
  alignas(64) uint8_t buffer[kAsTheyAre ? 64 : kMostGroup * 16];
  const float zero = m.zero - (kKind == 2 ? kOffset : 0);
  const int64_t chunks = m.padded / 32;
  std::memset(out, 0, n * 64);
  for (int64_t g = 0; g < m.groups; ++g) {
    const int64_t chunk = (block * m.groups + g) * chunks;
    const Planes<kWidths...> planes{m.planes, chunk};
    const uint8_t* bytes = kAsTheyAre ? m.planes[0] + chunk * 512 : buffer;
    for (int64_t j = 0; !kAsTheyAre && j < chunks; ++j) {
#pragma GCC unroll 8
      for (int i = 0; i < 8; ++i) {
#pragma GCC unroll 4
        for (int p = 0; p < kParts; ++p) store(buffer + (j * 8 + i) * 64 + p * sizeof(Bytes), planes.step(j, i, p));
      }
    }
    Floats scale[kParts];
    scales(m, block, g, scale);
    int64_t c = 0;
    for (; c + kTile <= n; c += kTile) {
      add_rows<kKind, kTile>(bytes, g, m.padded, x, rows + c, scale, zero, out + c * 16);
    }
    if (n - c == 2) add_rows<kKind, 2>(bytes, g, m.padded, x, rows + c, scale, zero, out + c * 16);
    if (n - c == 1) add_rows<kKind, 1>(bytes, g, m.padded, x, rows + c, scale, zero, out + c * 16);
  }
}

template <int... kWidths>
PACKED_TARGET inline void products_of(const Matrix& m, int64_t block, const Activations& x, const int64_t* rows,
                                      int64_t n, float* out) {
  switch (n) {
    case 1: return few<1, kWidths...>(m, block, x, rows, out);
    case 2: return few<2, kWidths...>(m, block, x, rows, out);
    case 3: return few<3, kWidths...>(m, block, x, rows, out);
    default: return many<kWidths...>(m, block, x, rows, n, out);
  }
}

// out[c][r] = <row r of a block of the matrix, row rows[c] of x>
inline void products(const Matrix& m, int64_t block, const Activations& x, const int64_t* rows, int64_t n, float* out) {
  switch (m.widths) {
    case 1: return products_of<1>(m, block, x, rows, n, out);
    case 2: return products_of<2>(m, block, x, rows, n, out);
    case 21: return products_of<2, 1>(m, block, x, rows, n, out);
    case 211: return products_of<2, 1, 1>(m, block, x, rows, n, out);
    case 4: return products_of<4>(m, block, x, rows, n, out);
    case 41: return products_of<4, 1>(m, block, x, rows, n, out);
    case 411: return products_of<4, 1, 1>(m, block, x, rows, n, out);
    case 4111: return products_of<4, 1, 1, 1>(m, block, x, rows, n, out);
    case 41111: return products_of<4, 1, 1, 1, 1>(m, block, x, rows, n, out);
    default: return products_of<8>(m, block, x, rows, n, out);
  }
}

// Rows first..last of x [rows, width], to 8 bits
PACKED_TARGET inline void quantize(const float* x, int64_t first, int64_t last, int64_t width, int64_t group,
                                   int64_t padded, const Activations& to) {
  alignas(64) float copy[kMostGroup];
  std::fill(copy, copy + padded, 0.0f);
  for (int64_t r = first; r < last; ++r) {
    for (int64_t g = 0; g * group < width; ++g) {
      const float* in = x + r * width + g * group;
      if (group != padded) in = static_cast<const float*>(std::memcpy(copy, in, group * sizeof(float)));
      constexpr int kLanes = sizeof(Floats) / sizeof(float);
      Ints most = {}, sum = {};
      for (int64_t i = 0; i < padded; i += kLanes) {
        Ints bits;  // without their signs floats are in the order of their bits, and NaN is the largest
        std::memcpy(&bits, in + i, sizeof(bits));
        bits &= 0x7fffffff;
        most = most > bits ? most : bits;
      }
      int32_t largest = 0, total = 0;
      for (int i = 0; i < kLanes; ++i) largest = std::max(largest, most[i]);
      float size;
      std::memcpy(&size, &largest, 4);
      const float times = size > kSmallest ? 127 / size : 0;
      for (int64_t i = 0; i < padded; i += kLanes) {
        Floats values;
        std::memcpy(&values, in + i, sizeof(values));
        const Ints whole = nearest(values * times);
        const Codes codes = __builtin_convertvector(whole, Codes);
        std::memcpy(to.codes + (g * to.rows + r) * padded + i, &codes, sizeof(codes));
        sum += whole;
      }
      for (int i = 0; i < kLanes; ++i) total += sum[i];
      to.scale[g * to.rows + r] = size / 127;
      to.sum[g * to.rows + r] = static_cast<float>(total);
    }
  }
}

// 1 / (1 + exp(-x)); exp as 2^n times a polynomial (Cephes' expf, right to about 1e-7)
INLINE Floats sigmoid(Floats x) {
  Floats y = -x;
  y = y < -87.0f ? Floats{} - 87.0f : y;
  y = y > 87.0f ? Floats{} + 87.0f : y;
  const Ints n = nearest(y * 1.44269504088896341f);
  const Floats whole = __builtin_convertvector(n, Floats);
  const Floats r = (y - whole * 0.693359375f) + whole * 2.12194440e-4f;
  Floats p = r * 1.9875691500e-4f + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r * r + r + 1.0f;
  const Ints exponent = (n + 127) << 23;
  Floats two_n;
  std::memcpy(&two_n, &exponent, sizeof(two_n));
  return 1.0f / (1.0f + p * two_n);
}

// act(gate) * up for n rows of 16, into the first `valid` floats of out + c * stride
PACKED_TARGET inline void gated(int64_t act, const float* gate, const float* up, int64_t n, int64_t valid, float* out,
                                int64_t stride) {
  for (int64_t c = 0; c < n; ++c) {
    Floats g[kParts], u[kParts];
    std::memcpy(g, gate + c * 16, sizeof(g));
    std::memcpy(u, up + c * 16, sizeof(u));
    for (int p = 0; p < kParts; ++p) {
      if (act == 0) {
        u[p] *= g[p] * sigmoid(g[p]);
      } else if (act == 1) {
        for (int i = 0; i < 16 / kParts; ++i) u[p][i] *= 0.5f * g[p][i] * (1 + std::erf(g[p][i] * 0.70710678118654752f));
      } else {  // (1 + tanh(v)) / 2 = sigmoid(2 v)
        u[p] *= g[p] * sigmoid(1.5957691216057308f * (g[p] + 0.044715f * g[p] * g[p] * g[p]));
      }
    }
    std::memcpy(out + c * stride, u, valid * sizeof(float));
  }
}

#undef INLINE
#undef PACKED_TARGET
