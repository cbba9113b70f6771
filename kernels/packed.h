// Products of packed weights with few or many rows: codes of 1 to 8 bits with a scale for each group, times activations
// of 8 bits, summed in integers. packed.py has the same in Python.
//
// Layout of a matrix [P, K]: blocks of 16 rows; in a block its groups; in a group chunks of 32 columns, the last filled
// up with zeros; in a chunk 8 steps of 4 columns: 16 rows x 4 columns are 64 bytes, and one instruction multiplies them
// with 4 bytes of x. A code's bits lie in planes, the highest first, each [block, group, chunk, width, 64] bytes: in a
// plane of `width` bits a byte holds the codes of 8 / width steps. The first planes alone are a coarser code.
// scales: float16 [block, group, 16].
//
// The forms differ only in their instructions. The integer sums are exact in all of them, and what is done in floats is
// done in the same order for a row of x whatever its neighbours: a row's result does not depend on them.

#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <string>
#include <vector>

#ifdef __x86_64__
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

#if defined(__aarch64__) && defined(__linux__)
#include <sys/auxv.h>
#endif

#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wpsabi"  // vectors are passed between functions that are inlined

namespace packed {

// Vectors of kBytes: a step of weights, or a row of sums for the 16 rows of a block, is 64 / kBytes of them. As members,
// since a template argument loses its attributes.
template <int kBytes>
struct Vectors {
  typedef float Floats __attribute__((vector_size(kBytes)));
  typedef int32_t Ints __attribute__((vector_size(kBytes)));
  typedef int8_t Codes __attribute__((vector_size(kBytes / 4)));
};

constexpr int64_t kMostGroup = 512;  // columns that share a scale, at most
constexpr int64_t kTile = 3;         // rows of x that are multiplied at a time
constexpr int64_t kAhead = 4096;     // bytes: how early weights are asked for
constexpr float kSmallest = 1e-30f;  // activations below are zero: 127 divided by them may be infinite

// W = step * scale * (code - zero)
struct Matrix {
  const uint8_t* planes[5];
  int64_t widths;  // of the planes, as decimal digits: 211 is planes of 2, 1 and 1 bits
  int64_t bits;    // of the planes together
  const uint16_t* scales;
  int64_t groups, padded;  // groups in a row; columns of a group, filled up to 32
  float zero, step;
};

// x of 8 bits: codes [group, row, padded], and [group, row] of their scale and sum
struct Activations {
  int8_t* codes;
  float *scale, *sum;
  int64_t rows;
};

struct Form {
  const char* name;
  void (*products)(const Matrix& m, int64_t block, const Activations& x, const int64_t* rows, int64_t n, float* out);
  void (*quantize)(const float* x, int64_t first, int64_t last, int64_t width, int64_t group, int64_t padded,
                   const Activations& to);
  void (*gated)(int64_t act, const float* gate, const float* up, int64_t n, int64_t valid, float* out, int64_t stride);
};

// In each form: dots<kKind, C> multiplies chunks of weights with C rows of x. kKind 0: codes of up to 4 bits; 1: up to 7;
// 2: 8 bits, of which kOffset is subtracted.

namespace plain {
#define PACKED_TARGET
#define INLINE [[gnu::always_inline]] inline
typedef uint8_t Bytes __attribute__((vector_size(16)));
using Floats = Vectors<16>::Floats;
using Ints = Vectors<16>::Ints;
using Codes = Vectors<16>::Codes;
typedef uint16_t Pairs __attribute__((vector_size(16)));
constexpr float kOffset = 0;

INLINE Bytes load(const uint8_t* from) {
  Bytes bytes;
  std::memcpy(&bytes, from, sizeof(bytes));
  return bytes;
}
INLINE void store(uint8_t* to, Bytes bytes) { std::memcpy(to, &bytes, sizeof(bytes)); }
INLINE Bytes either(Bytes a, Bytes b) { return a | b; }
INLINE Bytes masked(Bytes a, int mask) { return a & static_cast<uint8_t>(mask); }
// to the right, or to the left where `by` is negative; bits that come from the neighbour are masked
INLINE Bytes shifted(Bytes a, int by) {
  const Pairs pairs = reinterpret_cast<Pairs>(a);
  return reinterpret_cast<Bytes>(by < 0 ? pairs << -by : pairs >> by);
}
INLINE Floats halves(const uint16_t* from) {
  Floats wide;
  for (int i = 0; i < 4; ++i) {
    const uint32_t bits = (from[i] & 0x7fffu) << 13 | (from[i] & 0x8000u) << 16;
    float value;
    std::memcpy(&value, &bits, 4);
    wide[i] = value * 0x1p112f;  // the exponent's offsets differ by 112; right for small numbers without one, too
  }
  return wide;
}
INLINE Ints nearest(Floats values) {
  Ints whole;
  for (int i = 0; i < 4; ++i) whole[i] = static_cast<int32_t>(std::nearbyint(values[i]));
  return whole;
}
template <int kKind, int C, class Source>
INLINE void dots(const Source& w, int64_t chunks, const int8_t* const* x, Ints (*out)[4]) {
  for (int c = 0; c < C; ++c) out[c][0] = out[c][1] = out[c][2] = out[c][3] = Ints{};
  for (int64_t s = 0; s < chunks * 8; ++s) {
    for (int p = 0; p < 4; ++p) {
      const Bytes bytes = w.step(s / 8, s % 8, p);
      for (int c = 0; c < C; ++c) {
        const int8_t* four = x[c] + s * 4;
        for (int r = 0; r < 4; ++r) {
          out[c][p][r] += bytes[r * 4] * four[0] + bytes[r * 4 + 1] * four[1] + bytes[r * 4 + 2] * four[2] +
                          bytes[r * 4 + 3] * four[3];
        }
      }
    }
  }
}
#include "packed_form.h"
}  // namespace plain

#ifdef __x86_64__
namespace avx2 {
#define PACKED_TARGET __attribute__((target("avx2,fma,f16c")))
#define INLINE PACKED_TARGET [[gnu::always_inline]] inline
typedef __m256i Bytes;
using Floats = Vectors<32>::Floats;
using Ints = Vectors<32>::Ints;
using Codes = Vectors<32>::Codes;
constexpr float kOffset = 128;

INLINE Bytes load(const uint8_t* from) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)); }
INLINE void store(uint8_t* to, Bytes bytes) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), bytes); }
INLINE Bytes either(Bytes a, Bytes b) { return _mm256_or_si256(a, b); }
INLINE Bytes masked(Bytes a, int mask) { return _mm256_and_si256(a, _mm256_set1_epi8(static_cast<char>(mask))); }
INLINE Bytes shifted(Bytes a, int by) { return by < 0 ? _mm256_slli_epi16(a, -by) : _mm256_srli_epi16(a, by); }
INLINE Floats halves(const uint16_t* from) {
  return Floats(_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from))));
}
INLINE Ints nearest(Floats values) { return Ints(_mm256_cvtps_epi32(__m256(values))); }
// vpmaddubsw adds two products into 16 bits: of 8 steps for codes of 4 bits, of one for 7. Codes of 8 bits are taken as
// signed numbers, and their sign goes to x.
template <int kKind, int C, class Source>
INLINE void dots(const Source& w, int64_t chunks, const int8_t* const* x, Ints (*out)[2]) {
  const __m256i ones = _mm256_set1_epi16(1);
  __m256i total[C][2];
#pragma GCC unroll 4
  for (int c = 0; c < C; ++c) total[c][0] = total[c][1] = _mm256_setzero_si256();
  for (int64_t j = 0; j < chunks; ++j) {
    __m256i part[C][2];
#pragma GCC unroll 8
    for (int i = 0; i < 8; ++i) {
      __m256i weights[2] = {w.step(j, i, 0), w.step(j, i, 1)}, size[2] = {weights[0], weights[1]};
      if constexpr (kKind == 2) {
#pragma GCC unroll 2
        for (int p = 0; p < 2; ++p) {
          weights[p] = _mm256_xor_si256(weights[p], _mm256_set1_epi8(-128));
          size[p] = _mm256_abs_epi8(weights[p]);
        }
      }
#pragma GCC unroll 4
      for (int c = 0; c < C; ++c) {
        int32_t four;
        std::memcpy(&four, x[c] + (j * 8 + i) * 4, 4);
        const __m256i columns = _mm256_set1_epi32(four);
#pragma GCC unroll 2
        for (int p = 0; p < 2; ++p) {
          const __m256i signs = kKind == 2 ? _mm256_sign_epi8(columns, weights[p]) : columns;
          const __m256i sum = _mm256_maddubs_epi16(size[p], signs);
          if constexpr (kKind == 0) {
            part[c][p] = i == 0 ? sum : _mm256_add_epi16(part[c][p], sum);
          } else {
            total[c][p] = _mm256_add_epi32(total[c][p], _mm256_madd_epi16(sum, ones));
          }
        }
      }
    }
    if constexpr (kKind == 0) {
#pragma GCC unroll 4
      for (int c = 0; c < C; ++c) {
#pragma GCC unroll 2
        for (int p = 0; p < 2; ++p) {
          total[c][p] = _mm256_add_epi32(total[c][p], _mm256_madd_epi16(part[c][p], ones));
        }
      }
    }
  }
#pragma GCC unroll 4
  for (int c = 0; c < C; ++c) out[c][0] = Ints(total[c][0]), out[c][1] = Ints(total[c][1]);
}
#include "packed_form.h"
}  // namespace avx2

namespace avx512 {
#define PACKED_TARGET __attribute__((target("avx512f,avx512bw,avx512vnni,avx2,fma,f16c")))
#define INLINE PACKED_TARGET [[gnu::always_inline]] inline
typedef __m512i Bytes;
using Floats = Vectors<64>::Floats;
using Ints = Vectors<64>::Ints;
using Codes = Vectors<64>::Codes;
constexpr float kOffset = 0;

INLINE Bytes load(const uint8_t* from) { return _mm512_loadu_si512(from); }
INLINE void store(uint8_t* to, Bytes bytes) { _mm512_storeu_si512(to, bytes); }
INLINE Bytes either(Bytes a, Bytes b) { return _mm512_or_si512(a, b); }
INLINE Bytes masked(Bytes a, int mask) { return _mm512_and_si512(a, _mm512_set1_epi8(static_cast<char>(mask))); }
INLINE Bytes shifted(Bytes a, int by) {
  return by < 0 ? _mm512_slli_epi16(a, static_cast<unsigned>(-by)) : _mm512_srli_epi16(a, static_cast<unsigned>(by));
}
INLINE Floats halves(const uint16_t* from) {
  return Floats(_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from))));
}
INLINE Ints nearest(Floats values) { return Ints(_mm512_cvtps_epi32(__m512(values))); }
template <int kKind, int C, class Source>
INLINE void dots(const Source& w, int64_t chunks, const int8_t* const* x, Ints (*out)[1]) {
  __m512i even[C], odd[C];  // two chains: the instruction takes longer than it keeps its unit busy
#pragma GCC unroll 4
  for (int c = 0; c < C; ++c) even[c] = odd[c] = _mm512_setzero_si512();
  for (int64_t j = 0; j < chunks; ++j) {
#pragma GCC unroll 4
    for (int i = 0; i < 8; i += 2) {
      const __m512i w0 = w.step(j, i, 0), w1 = w.step(j, i + 1, 0);
#pragma GCC unroll 4
      for (int c = 0; c < C; ++c) {
        int32_t four[2];
        std::memcpy(four, x[c] + (j * 8 + i) * 4, 8);
        even[c] = _mm512_dpbusd_epi32(even[c], w0, _mm512_set1_epi32(four[0]));
        odd[c] = _mm512_dpbusd_epi32(odd[c], w1, _mm512_set1_epi32(four[1]));
      }
    }
  }
#pragma GCC unroll 4
  for (int c = 0; c < C; ++c) out[c][0] = Ints(_mm512_add_epi32(even[c], odd[c]));
}
#include "packed_form.h"
}  // namespace avx512
#elif defined(__aarch64__)
namespace neon {
#ifdef __ARM_FEATURE_DOTPROD
#define PACKED_TARGET
#else
#define PACKED_TARGET __attribute__((target("arch=armv8.2-a+dotprod")))
#endif
#define INLINE PACKED_TARGET [[gnu::always_inline]] inline
typedef uint8x16_t Bytes;
using Floats = Vectors<16>::Floats;
using Ints = Vectors<16>::Ints;
using Codes = Vectors<16>::Codes;
constexpr float kOffset = 128;

INLINE Bytes load(const uint8_t* from) { return vld1q_u8(from); }
INLINE void store(uint8_t* to, Bytes bytes) { vst1q_u8(to, bytes); }
INLINE Bytes either(Bytes a, Bytes b) { return vorrq_u8(a, b); }
INLINE Bytes masked(Bytes a, int mask) { return vandq_u8(a, vdupq_n_u8(static_cast<uint8_t>(mask))); }
INLINE Bytes shifted(Bytes a, int by) { return vshlq_u8(a, vdupq_n_s8(static_cast<int8_t>(-by))); }
INLINE Floats halves(const uint16_t* from) { return Floats(vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(from)))); }
INLINE Ints nearest(Floats values) { return Ints(vcvtnq_s32_f32(float32x4_t(values))); }
template <int kKind, int C, class Source>
INLINE void dots(const Source& w, int64_t chunks, const int8_t* const* x, Ints (*out)[4]) {
  int32x4_t total[C][4];
  for (int c = 0; c < C; ++c) total[c][0] = total[c][1] = total[c][2] = total[c][3] = vdupq_n_s32(0);
  for (int64_t j = 0; j < chunks; ++j) {
#pragma GCC unroll 8
    for (int i = 0; i < 8; ++i) {
      int8x16_t weights[4];
#pragma GCC unroll 4
      for (int p = 0; p < 4; ++p) {
        const uint8x16_t codes = w.step(j, i, p);
        weights[p] = vreinterpretq_s8_u8(kKind == 2 ? veorq_u8(codes, vdupq_n_u8(128)) : codes);
      }
#pragma GCC unroll 4
      for (int c = 0; c < C; ++c) {
        int32_t four;
        std::memcpy(&four, x[c] + (j * 8 + i) * 4, 4);
        const int8x16_t columns = vreinterpretq_s8_s32(vdupq_n_s32(four));
#pragma GCC unroll 4
        for (int p = 0; p < 4; ++p) total[c][p] = vdotq_s32(total[c][p], weights[p], columns);
      }
    }
  }
#pragma GCC unroll 4
  for (int c = 0; c < C; ++c) {
#pragma GCC unroll 4
    for (int p = 0; p < 4; ++p) out[c][p] = Ints(total[c][p]);
  }
}
#include "packed_form.h"
}  // namespace neon
#endif

#if defined(__aarch64__)
inline bool has_dotprod() {
#ifdef __linux__
  return getauxval(AT_HWCAP) & 1 << 20;
#else
  return true;
#endif
}
#endif

// The forms that this processor has, the fastest first. `capability` is what torch says of it (at::get_cpu_capability);
// ATEN_CPU_CAPABILITY=default asks for less.
inline std::vector<Form> forms(const std::string& capability) {
  std::vector<Form> found;
#ifdef __x86_64__
  const bool wide = capability.starts_with("AVX512");
  if (wide && __builtin_cpu_supports("avx512vnni") && __builtin_cpu_supports("avx512bw")) {
    found.push_back({"avx512-vnni", avx512::products, avx512::quantize, avx512::gated});
  }
  if ((wide || capability.starts_with("AVX2")) && __builtin_cpu_supports("f16c")) {
    found.push_back({"avx2", avx2::products, avx2::quantize, avx2::gated});
  }
#elif defined(__aarch64__)
  if (has_dotprod()) found.push_back({"neon-dot", neon::products, neon::quantize, neon::gated});
#endif
  found.push_back({"plain", plain::products, plain::quantize, plain::gated});
  return found;
}

}  // namespace packed

#pragma GCC diagnostic pop
