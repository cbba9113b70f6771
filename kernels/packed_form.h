// The products of packed weights in one form. packed.h includes this file once for each form, inside a namespace of its
// own, after it defined INLINE (with the instructions that the form may use: an attribute cannot depend on a template
// argument), the vectors Bytes and what is done with them. Layout and letters: packed.h.

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

// out[c] += scale * x scale * (dot - zero * sum of x), for C rows of x and one group
template <int kKind, int C, class Source>
INLINE void add_group(const Source& w, int64_t padded, const Activations& x, const int64_t* at, Floats scale, float zero,
                      float* out) {
  alignas(64) int32_t dot[C][16];
  const int8_t* codes[C];
  for (int c = 0; c < C; ++c) codes[c] = x.codes + at[c] * padded;
  dots<kKind, C>(w, padded / 32, codes, dot);
#pragma GCC unroll 4
  for (int c = 0; c < C; ++c) {
    Ints whole;
    Floats sum;
    std::memcpy(&whole, dot[c], 64);
    std::memcpy(&sum, out + c * 16, 64);
    sum += (scale * x.scale[at[c]]) * (__builtin_convertvector(whole, Floats) - zero * x.sum[at[c]]);
    std::memcpy(out + c * 16, &sum, 64);
  }
}

template <int kKind, class Source>
INLINE void add_rows(const Source& w, int64_t padded, const Activations& x, const int64_t* at, int64_t n, Floats scale,
                     float zero, float* out) {
  switch (n) {
    case 1: return add_group<kKind, 1>(w, padded, x, at, scale, zero, out);
    case 2: return add_group<kKind, 2>(w, padded, x, at, scale, zero, out);
    default: return add_group<kKind, 3>(w, padded, x, at, scale, zero, out);
  }
}

// What is read soon: the processor's own prefetching stops at the end of a page.
INLINE void prefetch(const uint8_t* from, int64_t lines) {
  for (int64_t i = 0; i < lines; ++i) __builtin_prefetch(from + kAhead + i * 64);
}

template <int... kWidths>
PACKED_TARGET inline void products_of(const Matrix& m, int64_t block, const Activations& x, const int64_t* rows,
                                      int64_t n, float* out) {
  constexpr int kBits = (kWidths + ...), kKind = kBits <= 4 ? 0 : kBits < 8 ? 1 : 2;
  alignas(64) uint8_t buffer[sizeof...(kWidths) == 1 && kBits == 8 ? 64 : kMostGroup * 16];
  const int64_t chunks = m.padded / 32;
  const float zero = m.zero - (kKind == 2 ? kOffset : 0);
  std::memset(out, 0, n * 64);
  for (int64_t g = 0; g < m.groups; ++g) {
    const int64_t chunk = (block * m.groups + g) * chunks;
    const Planes<kWidths...> planes{m.planes, chunk};
    const Floats scale = halves(m.scales + (block * m.groups + g) * 16) * m.step;
    int ahead = 0;
    ((prefetch(m.planes[ahead] + chunk * kWidths * 64, chunks * kWidths), ++ahead), ...);
    if (n <= kTile) {
      int64_t at[kTile];
      for (int64_t c = 0; c < n; ++c) at[c] = g * x.rows + rows[c];
      add_rows<kKind>(planes, m.padded, x, at, n, scale, zero, out);
      continue;
    }
    const uint8_t* bytes = buffer;
    if constexpr (sizeof...(kWidths) == 1 && kBits == 8) {
      bytes = m.planes[0] + chunk * 512;
    } else {
      for (int64_t j = 0; j < chunks; ++j) {
#pragma GCC unroll 8
        for (int i = 0; i < 8; ++i) {
#pragma GCC unroll 4
          for (int p = 0; p < static_cast<int>(64 / sizeof(Bytes)); ++p) {
            store(buffer + (j * 8 + i) * 64 + p * sizeof(Bytes), planes.step(j, i, p));
          }
        }
      }
    }
    for (int64_t c = 0; c < n; c += kTile) {
      const int64_t some = std::min<int64_t>(kTile, n - c);
      int64_t at[kTile];
      for (int64_t i = 0; i < some; ++i) at[i] = g * x.rows + rows[c + i];
      add_rows<kKind>(Unpacked{bytes}, m.padded, x, at, some, scale, zero, out + c * 16);
    }
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
PACKED_TARGET inline void quantise(const float* x, int64_t first, int64_t last, int64_t width, int64_t group,
                                   int64_t padded, const Activations& to) {
  alignas(64) float copy[kMostGroup];
  std::fill(copy, copy + padded, 0.0f);
  for (int64_t r = first; r < last; ++r) {
    for (int64_t g = 0; g * group < width; ++g) {
      const float* in = x + r * width + g * group;
      if (group != padded) in = static_cast<const float*>(std::memcpy(copy, in, group * sizeof(float)));
      Ints most = {}, sum = {};
      for (int64_t i = 0; i < padded; i += 16) {
        Ints bits;  // without their signs floats are in the order of their bits, and NaN is the largest
        std::memcpy(&bits, in + i, 64);
        bits &= 0x7fffffff;
        most = most > bits ? most : bits;
      }
      int32_t largest = 0;
      for (int i = 0; i < 16; ++i) largest = std::max(largest, most[i]);
      float size;
      std::memcpy(&size, &largest, 4);
      const float times = size > kSmallest ? 127 / size : 0;
      for (int64_t i = 0; i < padded; i += 16) {
        Floats values;
        std::memcpy(&values, in + i, 64);
        const Ints whole = nearest(values * times);
        const Codes codes = __builtin_convertvector(whole, Codes);
        std::memcpy(to.codes + (g * to.rows + r) * padded + i, &codes, 16);
        sum += whole;
      }
      int32_t total = 0;
      for (int i = 0; i < 16; ++i) total += sum[i];
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
  std::memcpy(&two_n, &exponent, 64);
  return 1.0f / (1.0f + p * two_n);
}

// act(gate) * up for n rows of 16, into the first `valid` floats of out + c * stride
PACKED_TARGET inline void gated(int64_t act, const float* gate, const float* up, int64_t n, int64_t valid, float* out,
                                int64_t stride) {
  for (int64_t c = 0; c < n; ++c) {
    Floats g, u;
    std::memcpy(&g, gate + c * 16, 64);
    std::memcpy(&u, up + c * 16, 64);
    if (act == 0) {
      u *= g * sigmoid(g);
    } else if (act == 1) {
      for (int i = 0; i < 16; ++i) u[i] *= 0.5f * g[i] * (1 + std::erf(g[i] * 0.70710678118654752f));
    } else {
      u *= g * sigmoid(1.5957691216057308f * (g + 0.044715f * g * g * g));  // (1 + tanh(v)) / 2 = sigmoid(2 v)
    }
    std::memcpy(out + c * stride, &u, valid * sizeof(float));
  }
}

#undef INLINE
#undef PACKED_TARGET
