// Operators for packed weights (packed.py): linear layers, SwiGLU experts and whole MoE layers without a backward, in
// the products of packed.h. One float32 CPU tensor of activations goes in and one comes out.
//
// Shapes: T tokens, N rows or (token, expert) pairs sorted by expert, E experts, H hidden, I intermediate, P outputs, K
// inputs, G groups of a row, B blocks of 16 rows.

#include "packed.h"

#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <ATen/Version.h>
#include <torch/library.h>

#include <array>
#include <cmath>
#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include "native.h"

namespace {

using at::Tensor;
using Maybe = std::optional<Tensor>;

constexpr int64_t kLanes = 16;             // rows of a block
constexpr int64_t kColumns = 256;          // rows of x that one unpacking of a group serves
constexpr int64_t kManyPairs = 64;         // from which on copies of their rows are read sooner than the rows
constexpr int64_t kWorthAThread = 262144;  // weights: fewer are multiplied sooner than a second thread wakes

const packed::Form*& form() {
  static const std::vector<packed::Form> forms = packed::forms(at::get_cpu_capability());
  static const packed::Form* chosen = &forms[0];
  return chosen;
}

std::vector<std::string> form_names() {
  std::vector<std::string> names;
  for (const auto& one : packed::forms(at::get_cpu_capability())) names.emplace_back(one.name);
  return names;
}

// For tests: another form than the fastest.
void use_form(const std::string& name) {
  static const std::vector<packed::Form> forms = packed::forms(at::get_cpu_capability());
  for (const auto& one : forms) {
    if (one.name == name) {
      form() = &one;
      return;
    }
  }
  TORCH_CHECK(false, "packed weights have no form ", name, " on this processor");
}

// Widths of the planes of a code, the highest first (planes() in packed.py).
std::vector<int64_t> plane_widths(int64_t bits, bool nested) {
  if (nested && bits > 4) return {4, 1, 1, 1, 1};
  if (nested && bits == 4) return {2, 1, 1};
  if (bits == 3) return {2, 1};
  return {bits};
}

// A stack of packed matrices, one for each of `bits`.
class Stack {
 public:
  // level: bits of each code that count, 0 for all
  Stack(const Tensor& codes, const Tensor& scales, std::vector<int64_t> bits, int64_t width, bool nested, int64_t level)
      : codes_(codes), scales_(scales), width_(width) {
    TORCH_CHECK(codes.is_cpu() && codes.is_contiguous() && scales.is_contiguous() && scales.scalar_type() == at::kShort,
                "packed weights: expected contiguous tensors on the CPU, scales as int16");
    const int64_t E = bits.size(), G = scales.size(-2), group = width / G, padded = (group + 31) / 32 * 32;
    blocks_ = scales.numel() / (E * G * kLanes);
    const uint8_t* from = codes.const_data_ptr<uint8_t>();
    const auto* scale = reinterpret_cast<const uint16_t*>(scales.const_data_ptr<int16_t>());
    const int64_t bytes = blocks_ * G * padded * kLanes / 8;  // of a plane of one bit
    for (int64_t e = 0; e < E; ++e) {
      packed::Matrix m{{}, 0, 0, scale + e * blocks_ * G * kLanes, G, padded, 0, 1};
      int64_t planes = 0;
      for (const int64_t plane : plane_widths(bits[e], nested)) {
        if (level == 0 || m.bits < level) {
          m.planes[planes++] = from;
          m.widths = m.widths * 10 + plane;
          m.bits += plane;
        }
        from += bytes * plane;
      }
      // codes that are cut lie in the middle of those that they stand for
      const float lost = std::exp2(static_cast<float>(bits[e] - m.bits));
      m.zero = std::exp2(static_cast<float>(m.bits - 1)) - (1 - 1 / lost) / 2;
      m.step = lost;
      if (bits[e] == 1) m.zero = 0.5, m.step = 2;  // -1 and 1
      matrices_.push_back(m);
    }
    TORCH_CHECK(from - codes.const_data_ptr<uint8_t>() == codes.numel(), "packed weights: expected ",
                from - codes.const_data_ptr<uint8_t>(), " bytes of codes, found ", codes.numel());
  }
  int64_t blocks() const { return blocks_; }
  int64_t width() const { return width_; }
  int64_t group() const { return width_ / matrices_[0].groups; }
  int64_t grain() const { return std::max<int64_t>(1, kWorthAThread / (kLanes * width_)); }
  const packed::Matrix& operator[](int64_t e) const { return matrices_[e]; }

 private:
  Tensor codes_, scales_;
  int64_t width_, blocks_;
  std::vector<packed::Matrix> matrices_;
};

// Rows of 8 bits in some memory, which is kept from call to call.
class Quantized {
 public:
  Quantized(const Tensor& x, const Stack& stack, std::vector<int8_t>& memory) : memory_(memory) {
    const int64_t N = x.size(0), K = stack.width(), group = stack.group(), G = K / group, padded = (group + 31) / 32 * 32;
    allocate(N, G, padded);
    const float* from = x.const_data_ptr<float>();
    at::parallel_for(0, N, std::max<int64_t>(1, 65536 / K), [&](int64_t first, int64_t last) {
      form()->quantize(from, first, last, K, group, padded, rows_);
    });
  }
  // Other rows, one after the other: those of an expert, which many of its blocks read.
  Quantized(const Quantized& from, const std::vector<int64_t>& row, const Stack& stack, std::vector<int8_t>& memory)
      : memory_(memory) {
    const int64_t N = row.size(), G = stack.width() / stack.group(), padded = (stack.group() + 31) / 32 * 32;
    allocate(N, G, padded);
    for (int64_t g = 0; g < G; ++g) {
      for (int64_t n = 0; n < N; ++n) {
        const int64_t at = g * from.rows_.rows + row[n], to = g * N + n;
        std::memcpy(rows_.codes + to * padded, from.rows_.codes + at * padded, padded);
        rows_.scale[to] = from.rows_.scale[at], rows_.sum[to] = from.rows_.sum[at];
      }
    }
  }
  const packed::Activations& rows() const { return rows_; }

 private:
  void allocate(int64_t N, int64_t G, int64_t padded) {
    memory_.resize(G * N * (padded + 2 * sizeof(float)));
    auto* rest = reinterpret_cast<float*>(memory_.data() + G * N * padded);
    rows_ = {memory_.data(), rest, rest + G * N, N};
  }
  std::vector<int8_t>& memory_;
  packed::Activations rows_;
};

std::vector<int8_t>& memory(int i) {
  thread_local std::array<std::vector<int8_t>, 3> kept;
  return kept[i];
}

// y = x W^T + bias, x [..., K]. codes: bytes; scales: [1, B, G, 16].
Tensor packed_linear(const Tensor& x, const Tensor& codes, const Tensor& scales, int64_t P, int64_t bits, bool nested,
                     int64_t level, const Maybe& bias) {
  const int64_t K = x.size(-1), N = x.numel() / K;
  const Stack stack(codes, scales, {bits}, K, nested, level);
  const Tensor x_NK = x.reshape({N, K}).contiguous(), b = bias ? bias->contiguous() : Tensor();
  const Quantized quantized(x_NK, stack, memory(0));
  auto shape = x.sizes().vec();
  shape.back() = P;
  Tensor y = at::empty(shape, x.options());
  float* out = y.mutable_data_ptr<float>();
  const float* add = bias ? b.const_data_ptr<float>() : nullptr;
  at::parallel_for(0, stack.blocks(), stack.grain(), [&](int64_t begin, int64_t end) {
    alignas(64) std::array<float, kColumns * kLanes> sums;
    std::array<int64_t, kColumns> rows;
    for (int64_t block = begin; block < end; ++block) {
      const int64_t first = block * kLanes, valid = std::min(kLanes, P - first);
      for (int64_t start = 0; start < N; start += kColumns) {
        const int64_t n = std::min(kColumns, N - start);
        for (int64_t c = 0; c < n; ++c) rows[c] = start + c;
        form()->products(stack[0], block, quantized.rows(), rows.data(), n, sums.data());
        for (int64_t c = 0; c < n; ++c) {
          float* to = out + (start + c) * P + first;
          for (int64_t r = 0; r < valid; ++r) to[r] = sums[c * kLanes + r] + (add ? add[first + r] : 0);
        }
      }
    }
  });
  return y;
}

// What the experts' operators have in common: weights and what they compute.
struct Experts {
  Experts(at::TensorList gate_up, at::TensorList down, const Tensor& bits, int64_t hidden, int64_t inner, bool nested,
          int64_t level, int64_t act)
      : inner(inner), act(act), gate_up(gate_up[0], gate_up[1], list(bits), hidden, nested, level),
        down(down[0], down[1], list(bits), inner, nested, level) {}
  static std::vector<int64_t> list(const Tensor& bits) {
    const uint8_t* from = bits.const_data_ptr<uint8_t>();
    return {from, from + bits.numel()};
  }
  int64_t inner, act;
  Stack gate_up, down;
};

// y[token] += weight * expert(x[token]) for all pairs, which are sorted by expert. Blocks of gate and up rows take turns
// in gate_up.
Tensor run(const Tensor& x, const std::vector<unimoe::Pair>& pairs, const Experts& experts) {
  const int64_t N = pairs.size(), H = x.size(1), I = experts.inner;
  Tensor y = at::zeros({x.size(0), H}, x.options()), activation = at::empty({N, I}, x.options());
  const Quantized tokens(x, experts.gate_up, memory(0));
  float *out = y.mutable_data_ptr<float>(), *act = activation.mutable_data_ptr<float>();
  std::vector<int64_t> starts, token(N), pair(N);
  for (int64_t n = 0; n < N; ++n) {
    if (n == 0 || pairs[n].expert != pairs[n - 1].expert || n - starts.back() == kColumns) starts.push_back(n);
    token[n] = pairs[n].token, pair[n] = n;
  }
  std::optional<Quantized> sorted;
  if (N > kManyPairs) {
    sorted.emplace(tokens, token, experts.gate_up, memory(2));
    token = pair;
  }
  const packed::Activations& from = sorted ? sorted->rows() : tokens.rows();
  const int64_t runs = starts.size(), blocks = experts.gate_up.blocks() / 2;
  starts.push_back(N);
  at::parallel_for(0, runs * blocks, experts.gate_up.grain(), [&](int64_t begin, int64_t end) {
    alignas(64) std::array<float, kColumns * kLanes> gate, up;
    for (int64_t unit = begin; unit < end; ++unit) {
      const int64_t start = starts[unit / blocks], n = starts[unit / blocks + 1] - start, block = unit % blocks;
      const packed::Matrix& m = experts.gate_up[pairs[start].expert];
      form()->products(m, 2 * block, from, &token[start], n, gate.data());
      form()->products(m, 2 * block + 1, from, &token[start], n, up.data());
      const int64_t valid = std::min(kLanes, I - block * kLanes);
      form()->gated(experts.act, gate.data(), up.data(), n, valid, act + start * I + block * kLanes, I);
    }
  });
  const Quantized inner(activation, experts.down, memory(1));
  at::parallel_for(0, experts.down.blocks(), experts.down.grain(), [&](int64_t begin, int64_t end) {
    alignas(64) std::array<float, kColumns * kLanes> sums;
    for (int64_t i = 0; i < runs; ++i) {
      const int64_t start = starts[i], n = starts[i + 1] - start;
      for (int64_t block = begin; block < end; ++block) {
        const int64_t first = block * kLanes, valid = std::min(kLanes, H - first);
        form()->products(experts.down[pairs[start].expert], block, inner.rows(), &pair[start], n, sums.data());
        for (int64_t c = 0; c < n; ++c) {
          float* to = out + pairs[start + c].token * H + first;
          for (int64_t r = 0; r < valid; ++r) to[r] += pairs[start + c].weight * sums[c * kLanes + r];
        }
      }
    }
  });
  return y;
}

Tensor packed_experts(const Tensor& x, const Tensor& token, at::IntArrayRef bounds, const Tensor& weight,
                      at::TensorList gate_up, at::TensorList down, const Tensor& bits, int64_t inner, bool nested,
                      int64_t level, int64_t act) {
  const Experts experts(gate_up, down, bits, x.size(1), inner, nested, level, act);
  return run(x.contiguous(), unimoe::pairs_of(token, bounds, weight), experts);
}

// A whole MoE layer, as few_rows_moe of native.cpp.
std::tuple<Tensor, Tensor, Tensor, Tensor> packed_moe(const Tensor& x_in, const Tensor& router, int64_t k, bool late,
                                                      bool renormalize, double scale, at::TensorList gate_up,
                                                      at::TensorList down, const Tensor& bits, int64_t inner,
                                                      bool nested, int64_t act) {
  const Tensor x = x_in.contiguous();
  const auto [logits, index, weight, pairs] = unimoe::route(x, router, k, late, renormalize, scale, bits.numel());
  const Experts experts(gate_up, down, bits, x.size(1), inner, nested, 0, act);
  return {run(x, pairs, experts), logits, index, weight};
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(unimoe, m) {
  m.def("packed_forms() -> str[]", &form_names);
  m.def("packed_use(str form) -> ()", &use_form);
  m.def(
      "packed_linear(Tensor x, Tensor codes, Tensor scales, int rows, int bits, bool nested, int level, Tensor? bias) "
      "-> Tensor",
      &packed_linear);
  m.def(
      "packed_experts(Tensor x, Tensor token, int[] bounds, Tensor weight, Tensor[] gate_up, Tensor[] down, Tensor bits, "
      "int inner, bool nested, int level, int act) -> Tensor",
      &packed_experts);
  m.def(
      "packed_moe(Tensor x, Tensor router, int k, bool late, bool renormalize, float scale, Tensor[] gate_up, "
      "Tensor[] down, Tensor bits, int inner, bool nested, int act) -> (Tensor, Tensor, Tensor, Tensor)",
      &packed_moe);
}
