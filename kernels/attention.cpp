// Attention of one new token of each conversation (few_rows.py): rotary positions, the append to the KV cache, and the
// weighted sum over it, in one operator.

#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <torch/library.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <optional>
#include <vector>

#include "few_rows.h"
#include "low_rank.h"

namespace {

using at::Tensor;
using Maybe = std::optional<Tensor>;

constexpr int64_t kWorthAThread = 131072;  // cached numbers: fewer are read sooner than a second thread wakes

// Rotary positions of LLaMA: the halves of x are the coordinates that turn together.
void rotate(const float* x, const float* cos, const float* sin, int64_t width, float* out) {
  const int64_t half = width / 2;
  for (int64_t i = 0; i < half; ++i) {
    out[i] = x[i] * cos[i] - x[half + i] * sin[i];
    out[half + i] = x[half + i] * cos[half + i] + x[i] * sin[half + i];
  }
}

// Over `count` numbers, in place. The largest is finite: a token sees itself.
void softmax(float* x, int64_t count) {
  const float most = *std::max_element(x, x + count);
  float sum = 0;
  for (int64_t i = 0; i < count; ++i) sum += x[i] = std::exp(x[i] - most);
  for (int64_t i = 0; i < count; ++i) x[i] /= sum;
}

// Shapes: B conversations, each of one new token, G heads of keys and values, each of which h heads of queries share,
// d width of a head, L cached positions, room for C > L of them.
//   q [B, 1, G h d], k and v [B, 1, G d], before their rotary positions; cos and sin [B or 1, 1, d]
//   keys and values [B, G, C, d]: position L is written
//   mask [B, 1, 1, L + 1]: false where a position is padding
// Returns [B, 1, G h d].
Tensor few_rows_attention(const Tensor& q_in, const Tensor& k_in, const Tensor& v_in, const Tensor& cos_in,
                          const Tensor& sin_in, const Tensor& keys, const Tensor& values, int64_t length,
                          const Maybe& mask_in, double scale) {
  const int64_t B = keys.size(0), G = keys.size(1), C = keys.size(2), d = keys.size(3), all = length + 1;
  const Tensor q = q_in.contiguous(), k = k_in.contiguous(), v = v_in.contiguous();
  const Tensor cos = cos_in.contiguous(), sin = sin_in.contiguous(), mask = mask_in ? mask_in->contiguous() : Tensor();
  for (const Tensor& one : {q, k, v, cos, sin, keys, values}) {
    TORCH_CHECK(one.is_cpu() && one.scalar_type() == at::kFloat, "few rows: expected float32 on the CPU");
  }
  const int64_t h = q.numel() / (B * G * d), angles = cos.numel() / d;
  TORCH_CHECK(keys.is_contiguous() && values.is_contiguous() && values.sizes() == keys.sizes() && all <= C && d % 2 == 0 &&
                  q.numel() == B * G * h * d && k.numel() == B * G * d && v.numel() == B * G * d &&
                  (angles == 1 || angles == B) && sin.numel() == cos.numel() &&
                  (!mask_in || (mask.scalar_type() == at::kBool && mask.numel() == B * all)),
              "few rows: these shapes do not fit the cache");
  static const few_rows::Products products = few_rows::choose(at::get_cpu_capability());
  static const low_rank::Sums sums = low_rank::choose(at::get_cpu_capability()).sums;
  Tensor y = at::zeros_like(q);
  const float *q_p = q.const_data_ptr<float>(), *k_p = k.const_data_ptr<float>(), *v_p = v.const_data_ptr<float>();
  const float *cos_p = cos.const_data_ptr<float>(), *sin_p = sin.const_data_ptr<float>();
  const bool* seen = mask_in ? mask.const_data_ptr<bool>() : nullptr;
  float *keys_p = keys.mutable_data_ptr<float>(), *values_p = values.mutable_data_ptr<float>();
  float* out = y.mutable_data_ptr<float>();
  at::parallel_for(0, B * G, std::max<int64_t>(1, kWorthAThread / (2 * all * d)), [&](int64_t begin, int64_t end) {
    std::vector<float> turned(h * d), scores(h * all);
    std::vector<const float*> from(h);
    std::vector<float*> to(h), mixed(h);
    for (int64_t n = begin; n < end; ++n) {
      const int64_t b = n / G, angle = angles == 1 ? 0 : b * d;
      float *key = keys_p + n * C * d, *value = values_p + n * C * d;
      rotate(k_p + n * d, cos_p + angle, sin_p + angle, d, key + length * d);
      std::memcpy(value + length * d, v_p + n * d, d * sizeof(float));
      const bool* row = seen ? seen + b * all : nullptr;
      const int64_t first = row ? std::find(row, row + length, true) - row : 0, count = all - first;
      for (int64_t i = 0; i < h; ++i) {
        from[i] = turned.data() + i * d, to[i] = scores.data() + i * count, mixed[i] = out + (n * h + i) * d;
        rotate(q_p + (n * h + i) * d, cos_p + angle, sin_p + angle, d, turned.data() + i * d);
      }
      products(key + first * d, count, d, from.data(), h, to.data());
      for (int64_t i = 0; i < h; ++i) {
        for (int64_t l = 0; l < count; ++l) {
          to[i][l] = row && !row[first + l] ? -std::numeric_limits<float>::infinity() : to[i][l] * static_cast<float>(scale);
        }
        softmax(to[i], count);
      }
      sums(value + first * d, count, d, to.data(), h, mixed.data());
    }
  });
  return y;
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(unimoe, m) {
  m.def(
      "few_rows_attention(Tensor q, Tensor k, Tensor v, Tensor cos, Tensor sin, Tensor(a!) keys, Tensor(b!) values, "
      "int length, Tensor? mask, float scale) -> Tensor",
      &few_rows_attention);
}
