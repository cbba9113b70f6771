// Three kinds of operators. First, grouped SwiGLU experts (with or without low-rank adapters) and two-layer FFN experts:
// the cpu forms of swiglu.py and ffn.py, one expert per thread. Products and elementwise steps are ATen's own, so the numbers are those of the
// loop in Python; what is saved is the interpreter's time, the threads' waiting for each other inside every small
// product, and trips of the activations to memory. Second, the few rows of a decoding step (few_rows.py): linear layers
// and whole MoE layers without a backward, in products of our own (few_rows.h). Third, low-rank experts (low_rank.py).
//
// Shapes: T tokens, N (token, expert) pairs sorted by expert, n pairs of one expert, E experts, H hidden,
// I intermediate, R rank. bounds: expert e owns pairs bounds[e]..bounds[e+1].

#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <ATen/Version.h>
#include <ATen/core/LegacyTypeDispatch.h>
#include <torch/library.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <cmath>
#include <numeric>
#include <optional>
#include <tuple>
#include <vector>

#include "few_rows.h"
#include "low_rank.h"
#include "native.h"

namespace {

using at::Tensor;
using Maybe = std::optional<Tensor>;
using Bounds = at::IntArrayRef;

// Calls run(expert, first pair, pairs) for every expert with pairs. An expert that would keep one thread busy for
// longer than the fair share runs with all threads (ATen's own, inside each product); the others are dealt out,
// longest first.
template <class F>
void each_expert(Bounds bounds, const F& run) {
  const int64_t threads = at::get_num_threads();
  auto pairs = [&](int64_t e) { return bounds[e + 1] - bounds[e]; };
  std::vector<int64_t> light;
  at::AutoDispatchBelowADInplaceOrView no_autograd;
  for (int64_t e = 0; e + 1 < static_cast<int64_t>(bounds.size()); ++e) {
    if (pairs(e) * threads * 4 > bounds.back() * 5) {
      run(e, bounds[e], pairs(e));
    } else if (pairs(e) > 0) {
      light.push_back(e);
    }
  }
  std::stable_sort(light.begin(), light.end(), [&](int64_t a, int64_t b) { return pairs(a) > pairs(b); });
  std::atomic<size_t> next{0};
  at::parallel_for(0, std::min<int64_t>(threads, light.size()), 1, [&](int64_t, int64_t) {
    at::AutoDispatchBelowADInplaceOrView no_autograd_in_this_thread;
    for (size_t i; (i = next++) < light.size();) run(light[i], bounds[light[i]], pairs(light[i]));
  });
}

// Rows of elementwise work that stay in a core's cache from one step to the next.
template <class F>
void each_block(int64_t n, int64_t width, const F& run) {
  const int64_t rows = std::max<int64_t>(1, 65536 / width);
  at::parallel_for(0, (n + rows - 1) / rows, 1, [&](int64_t first, int64_t last) {
    at::AutoDispatchBelowADInplaceOrView no_autograd;
    for (int64_t block = first; block < last; ++block) run(block * rows, std::min(rows, n - block * rows));
  });
}

// The dtype of one expert's products: with few rows the time goes into reading its weights, so they are taken as they
// are; otherwise the one that is fast.
at::ScalarType product_dtype(const Tensor& x, const Tensor& weights, int64_t n, at::ScalarType fast) {
  return n <= 4 ? c10::promoteTypes(x.scalar_type(), weights.scalar_type()) : fast;
}

void mm_into(Tensor out, const Tensor& a, const Tensor& b) {
  if (out.scalar_type() == a.scalar_type()) {
    at::mm_out(out, a, b);
  } else {
    out.copy_(at::mm(a, b));
  }
}

Tensor rows_of(const Tensor& x, const Maybe& token, int64_t start, int64_t n, at::ScalarType dtype) {
  return (token ? x.index_select(0, token->narrow(0, start, n)) : x.narrow(0, start, n)).to(dtype);
}

// The adapters of one expert in the dtype of the products; empty when there are none.
struct Adapter {
  Adapter(const std::vector<Tensor>& stacks, int64_t e, at::ScalarType dtype) {
    if (stacks.empty()) return;
    A1 = stacks[0][e].to(dtype), B1 = stacks[1][e].to(dtype), A2 = stacks[2][e].to(dtype), B2 = stacks[3][e].to(dtype);
  }
  explicit operator bool() const { return A1.defined(); }
  Tensor A1, B1, A2, B2;
};

// h_2NI: pre-activations to keep for a backward, or none. y_ND: the output, N rows.
void swiglu_forward(const Tensor& x, const Maybe& token, Bounds bounds, const Tensor& gate_up, const Tensor& down,
                    const std::vector<Tensor>& adapters, double scale, const Maybe& weight, const Maybe& h_2NI,
                    Tensor y_ND, at::ScalarType fast) {
  const int64_t I = down.size(2);
  each_expert(bounds, [&](int64_t e, int64_t start, int64_t n) {
    const auto dtype = product_dtype(x, gate_up, n, fast);
    const Tensor x_e = rows_of(x, token, start, n, dtype);
    const Tensor h = h_2NI && h_2NI->scalar_type() == dtype ? h_2NI->narrow(1, start, n)
                                                            : at::empty({2, n, I}, x_e.options());
    const Tensor gate = h[0], up = h[1], gate_up_e = gate_up[e].to(dtype), down_e = down[e].to(dtype);
    const Adapter lora(adapters, e, dtype);
    mm_into(gate, x_e, gate_up_e.narrow(0, 0, I).t());
    mm_into(up, x_e, gate_up_e.narrow(0, I, I).t());
    if (lora) {
      const Tensor xA = at::mm(x_e, lora.A1.t());
      gate.addmm_(xA, lora.B1.narrow(0, 0, I).t(), 1, scale);
      up.addmm_(xA, lora.B1.narrow(0, I, I).t(), 1, scale);
    }
    if (h_2NI && h_2NI->scalar_type() != dtype) h_2NI->narrow(1, start, n).copy_(h);
    const Tensor activation = at::empty({n, I}, x_e.options());
    each_block(n, I, [&](int64_t first, int64_t rows) {
      Tensor a = activation.narrow(0, first, rows);
      at::silu_out(a, gate.narrow(0, first, rows)).mul_(up.narrow(0, first, rows));
      if (weight) a.mul_(weight->narrow(0, start + first, rows).unsqueeze(1));
    });
    Tensor y = y_ND.narrow(0, start, n);
    mm_into(y, activation, down_e.t());
    if (lora) y.add_(at::mm(at::mm(activation, lora.A2.t()), lora.B2.t()), scale);
  });
}

// Gradients that are wanted are written to d*: dx_ND in rows, the stacks as a whole, zero for experts without pairs.
void swiglu_backward(const Tensor& x, const Maybe& token, Bounds bounds, const Tensor& gate_up, const Tensor& down,
                     const std::vector<Tensor>& adapters, double scale, const Maybe& weight, const Tensor& h_2NI,
                     const Tensor& dy, const Maybe& dx_ND, const Maybe& d_gate_up, const Maybe& d_down,
                     const c10::List<Maybe>& d_adapters, const Maybe& d_weight, at::ScalarType fast) {
  const int64_t I = down.size(2);
  auto adapter_grad = [&](size_t i) { return adapters.empty() ? Maybe() : d_adapters.get(i); };
  const Maybe dA1 = adapter_grad(0), dB1 = adapter_grad(1), dA2 = adapter_grad(2), dB2 = adapter_grad(3);
  for (size_t e = 0; e + 1 < bounds.size(); ++e) {
    if (bounds[e] != bounds[e + 1]) continue;
    at::AutoDispatchBelowADInplaceOrView no_autograd;
    for (const Maybe* grad : {&d_gate_up, &d_down, &dA1, &dB1, &dA2, &dB2}) {
      if (*grad) (*grad)->select(0, e).zero_();
    }
  }
  each_expert(bounds, [&](int64_t e, int64_t start, int64_t n) {
    const auto dtype = product_dtype(x, gate_up, n, fast);
    const Tensor x_e = rows_of(x, token, start, n, dtype), dy_e = rows_of(dy, token, start, n, dtype);
    const Tensor h = h_2NI.narrow(1, start, n).to(dtype), gate = h[0], up = h[1];
    const Tensor gate_up_e = gate_up[e].to(dtype), down_e = down[e].to(dtype);
    const Adapter lora(adapters, e, dtype);
    const Tensor da = at::mm(dy_e, down_e);
    Tensor dyB;
    if (lora) {
      dyB = at::mm(dy_e, lora.B2);
      da.addmm_(dyB, lora.A2, 1, scale);
    }
    const Tensor activation = at::empty_like(da), dh = at::empty({n, 2 * I}, da.options());
    each_block(n, I, [&](int64_t first, int64_t rows) {
      auto part = [&](const Tensor& t) { return t.narrow(0, first, rows); };
      Tensor a = part(activation), d = part(da), d_gate = part(dh).narrow(1, 0, I), d_up = part(dh).narrow(1, I, I);
      const Tensor g = part(gate), u = part(up);
      at::silu_out(a, g);
      at::mul_out(d_up, d, a);
      if (weight) {
        const Tensor w = weight->narrow(0, start + first, rows).unsqueeze(1);
        if (d_weight) {
          d_weight->narrow(0, start + first, rows).copy_(at::mul_out(d_gate, d_up, u).sum(1));
        }
        d_up.mul_(w);
        d.mul_(w);
        a.mul_(w);
      }
      a.mul_(u);
      d.mul_(u);
      at::silu_backward_out(d_gate, d, g);
    });
    if (d_down) mm_into(d_down->select(0, e), dy_e.t(), activation);
    if (dA2) mm_into(dA2->select(0, e), dyB.t().mul(scale), activation);
    if (dB2) mm_into(dB2->select(0, e), dy_e.t(), at::mm(activation, lora.A2.t()).mul_(scale));
    if (d_gate_up) mm_into(d_gate_up->select(0, e), dh.t(), x_e);
    if (dB1) mm_into(dB1->select(0, e), dh.t(), at::mm(x_e, lora.A1.t()).mul_(scale));
    Tensor dhB;
    if (lora && (dA1 || dx_ND)) dhB = at::mm(dh, lora.B1).mul_(scale);
    if (dA1) mm_into(dA1->select(0, e), dhB.t(), x_e);
    if (dx_ND) {
      Tensor dx = dx_ND->narrow(0, start, n);
      mm_into(dx, dh, gate_up_e);
      if (lora) dx.add_(at::mm(dhB, lora.A1));
    }
  });
}

void act_into(Tensor out, const Tensor& h, bool relu) {
  if (relu) {
    at::clamp_min_out(out, h, 0);
  } else {
    at::gelu_out(out, h);
  }
}

// h_NI: pre-activations to keep for a backward, or none. stacks: up [E, I, H], its bias [E, I], down [E, H, I], its
// bias [E, H].
void ffn_forward(const Tensor& x, const Maybe& token, Bounds bounds, const std::vector<Tensor>& stacks, bool relu,
                 const Maybe& weight, const Maybe& h_NI, Tensor y_ND, at::ScalarType fast) {
  const int64_t I = stacks[0].size(1);
  each_expert(bounds, [&](int64_t e, int64_t start, int64_t n) {
    const auto dtype = product_dtype(x, stacks[0], n, fast);
    auto own = [&](size_t i) { return stacks[i][e].to(dtype); };
    const Tensor x_e = rows_of(x, token, start, n, dtype), h = at::addmm(own(1), x_e, own(0).t());
    if (h_NI) h_NI->narrow(0, start, n).copy_(h);
    each_block(n, I, [&](int64_t first, int64_t rows) {
      const Tensor part = h.narrow(0, first, rows);
      act_into(part, part, relu);
    });
    Tensor y = at::addmm(own(3), h, own(2).t());
    if (weight) y.mul_(weight->narrow(0, start, n).unsqueeze(1));
    y_ND.narrow(0, start, n).copy_(y);
  });
}

void ffn_backward(const Tensor& x, const Maybe& token, Bounds bounds, const std::vector<Tensor>& stacks, bool relu,
                  const Maybe& weight, const Tensor& h_NI, const Tensor& dy, const Maybe& dx_ND,
                  const c10::List<Maybe>& d_stacks, const Maybe& d_weight, at::ScalarType fast) {
  const int64_t I = stacks[0].size(1);
  const Maybe d_up = d_stacks.get(0), d_up_b = d_stacks.get(1), d_down = d_stacks.get(2), d_down_b = d_stacks.get(3);
  for (size_t e = 0; e + 1 < bounds.size(); ++e) {
    if (bounds[e] != bounds[e + 1]) continue;
    at::AutoDispatchBelowADInplaceOrView no_autograd;
    for (const Maybe* grad : {&d_up, &d_up_b, &d_down, &d_down_b}) {
      if (*grad) (*grad)->select(0, e).zero_();
    }
  }
  each_expert(bounds, [&](int64_t e, int64_t start, int64_t n) {
    const auto dtype = product_dtype(x, stacks[0], n, fast);
    auto own = [&](size_t i) { return stacks[i][e].to(dtype); };
    const Tensor x_e = rows_of(x, token, start, n, dtype), h = h_NI.narrow(0, start, n).to(dtype);
    Tensor dy_e = rows_of(dy, token, start, n, dtype), dh = at::mm(dy_e, own(2));
    const Tensor activation = at::empty_like(h), w = weight ? weight->narrow(0, start, n).unsqueeze(1) : Tensor();
    Tensor d_w = d_weight ? at::mv(dy_e, own(3)) : Tensor();
    each_block(n, I, [&](int64_t first, int64_t rows) {
      auto part = [&](const Tensor& t) { return t.narrow(0, first, rows); };
      Tensor a = part(activation), d = part(dh);
      act_into(a, part(h), relu);
      if (d_weight) part(d_w).add_((d * a).sum(1));
      if (weight) d.mul_(part(w));
      if (relu) {
        at::threshold_backward_out(d, d, part(h), 0);
      } else {
        at::gelu_backward_out(d, d, part(h));
      }
    });
    if (d_weight) d_weight->narrow(0, start, n).copy_(d_w);
    if (weight) dy_e = dy_e * w;
    if (d_down) mm_into(d_down->select(0, e), dy_e.t(), activation);
    if (d_down_b) d_down_b->select(0, e).copy_(dy_e.sum(0));
    if (d_up) mm_into(d_up->select(0, e), dh.t(), x_e);
    if (d_up_b) d_up_b->select(0, e).copy_(dh.sum(0));
    if (dx_ND) mm_into(dx_ND->narrow(0, start, n), dh, own(0));
  });
}

// ---------------------------------------------------------------- few rows

constexpr int64_t kBlock = 48;            // rows of a weight matrix that a thread takes at a time
constexpr int64_t kColumns = 16;          // rows of x that are multiplied with them
constexpr int64_t kWorthAThread = 131072; // weights: fewer are read sooner than a second thread wakes

// A stack of weight matrices [E, P, K], or one [P, K], and how its rows are multiplied. It comes as a list, since a
// packed form takes several tensors (planes, scales): such a form is another branch here and other products.
class Stack {
 public:
  explicit Stack(at::TensorList parts) : weight_(parts[0]) {
    TORCH_CHECK(parts.size() == 1 && weight_.is_cpu() && weight_.scalar_type() == at::kFloat && weight_.is_contiguous(),
                "few rows: expected one contiguous float32 tensor on the CPU");
  }
  int64_t rows() const { return weight_.size(-2); }
  int64_t width() const { return weight_.size(-1); }
  // Blocks of rows that are worth waking a thread for.
  int64_t grain() const { return std::max<int64_t>(1, kWorthAThread / (kBlock * width())); }

  // out[c][r] = <row first + r of matrix e, x[c]>
  void multiply(int64_t e, int64_t first, int64_t rows, const float* const* x, int64_t columns, float* const* out) const {
    static const few_rows::Products products = few_rows::choose(at::get_cpu_capability());
    const float* w = weight_.const_data_ptr<float>() + (e * this->rows() + first) * width();
    products(w, rows, width(), x, columns, out);
  }

 private:
  Tensor weight_;
};

}  // namespace

namespace unimoe {

Tensor few_rows_linear(const Tensor& x, at::TensorList weight, const Maybe& bias) {
  const Stack stack(weight);
  const int64_t P = stack.rows(), K = stack.width(), N = x.numel() / K;
  const Tensor x_NK = x.contiguous();
  auto shape = x.sizes().vec();
  shape.back() = P;
  Tensor y = at::empty(shape, x.options());
  const Tensor b = bias ? bias->contiguous() : Tensor();
  const float *in = x_NK.const_data_ptr<float>(), *add = bias ? b.const_data_ptr<float>() : nullptr;
  float* out = y.mutable_data_ptr<float>();
  at::parallel_for(0, (P + kBlock - 1) / kBlock, stack.grain(), [&](int64_t begin, int64_t end) {
    const int64_t first = begin * kBlock, rows = std::min(end * kBlock, P) - first;
    for (int64_t start = 0; start < N; start += kColumns) {
      const int64_t columns = std::min(kColumns, N - start);
      std::array<const float*, kColumns> from;
      std::array<float*, kColumns> to;
      for (int64_t c = 0; c < columns; ++c) from[c] = in + (start + c) * K, to[c] = out + (start + c) * P + first;
      stack.multiply(0, first, rows, from.data(), columns, to.data());
      for (int64_t c = 0; add && c < columns; ++c) {
        for (int64_t r = 0; r < rows; ++r) to[c][r] += add[first + r];
      }
    }
  });
  return y;
}

}  // namespace unimoe

namespace {

// weight * x / sqrt(mean of squares + eps), row by row
Tensor few_rows_rms_norm(const Tensor& x_in, const Tensor& weight, double eps) {
  const Tensor x = x_in.contiguous(), w = weight.contiguous(), y = at::empty_like(x);
  const int64_t K = w.numel(), N = x.numel() / K;
  const float *in = x.const_data_ptr<float>(), *times = w.const_data_ptr<float>();
  float* out = y.mutable_data_ptr<float>();
  for (int64_t n = 0; n < N; ++n, in += K, out += K) {
    std::array<float, 16> sums{};
    int64_t k = 0;
    for (; k + 16 <= K; k += 16) {
      for (int64_t i = 0; i < 16; ++i) sums[i] += in[k + i] * in[k + i];
    }
    float sum = std::accumulate(sums.begin(), sums.end(), 0.0f);
    for (; k < K; ++k) sum += in[k] * in[k];
    const float scale = 1 / std::sqrt(sum / static_cast<float>(K) + static_cast<float>(eps));
    for (k = 0; k < K; ++k) out[k] = times[k] * (in[k] * scale);
  }
  return y;
}

using unimoe::few_rows_linear;
using unimoe::Pair;

// y[token] += weight * expert(x[token]) for all pairs, which are sorted by expert. gate_up [E, 2I, H], down [E, H, I].
Tensor few_rows_swiglu(const Tensor& x, const std::vector<Pair>& pairs, const Stack& gate_up, const Stack& down) {
  const int64_t N = pairs.size(), H = down.rows(), I = down.width();
  Tensor y = at::zeros({x.size(0), H}, x.options()), activation = at::empty({N, I}, x.options());
  const float* in = x.const_data_ptr<float>();
  float *out = y.mutable_data_ptr<float>(), *act = activation.mutable_data_ptr<float>();
  // pairs of one expert, at most kColumns: each group reads the expert's weights once
  std::vector<int64_t> starts;
  for (int64_t n = 0; n < N; ++n) {
    if (n == 0 || pairs[n].expert != pairs[n - 1].expert || n - starts.back() == kColumns) starts.push_back(n);
  }
  const int64_t groups = starts.size(), blocks = (I + kBlock - 1) / kBlock;
  starts.push_back(N);
  std::array<std::array<float, kBlock>, kColumns> zeros{};
  at::parallel_for(0, groups * blocks, gate_up.grain(), [&](int64_t begin, int64_t end) {
    auto gate = zeros, up = zeros;
    std::array<const float*, kColumns> from;
    std::array<float*, kColumns> to_gate, to_up;
    for (int64_t unit = begin; unit < end; ++unit) {
      const int64_t start = starts[unit / blocks], columns = starts[unit / blocks + 1] - start;
      const int64_t first = unit % blocks * kBlock, rows = std::min(kBlock, I - first), e = pairs[start].expert;
      for (int64_t c = 0; c < columns; ++c) {
        from[c] = in + pairs[start + c].token * H, to_gate[c] = gate[c].data(), to_up[c] = up[c].data();
      }
      gate_up.multiply(e, first, rows, from.data(), columns, to_gate.data());
      gate_up.multiply(e, I + first, rows, from.data(), columns, to_up.data());
      for (int64_t c = 0; c < columns; ++c) {
        for (int64_t r = 0; r < rows; ++r) {
          const float g = gate[c][r];
          act[(start + c) * I + first + r] = g / (1 + std::exp(-g)) * up[c][r] * pairs[start + c].weight;
        }
      }
    }
  });
  at::parallel_for(0, (H + kBlock - 1) / kBlock, down.grain(), [&](int64_t begin, int64_t end) {
    auto sums = zeros;
    std::array<const float*, kColumns> from;
    std::array<float*, kColumns> to;
    for (int64_t group = 0; group < groups; ++group) {
      const int64_t start = starts[group], columns = starts[group + 1] - start;
      for (int64_t c = 0; c < columns; ++c) from[c] = act + (start + c) * I, to[c] = sums[c].data();
      for (int64_t first = begin * kBlock; first < std::min(end * kBlock, H); first += kBlock) {
        const int64_t rows = std::min(kBlock, H - first);
        down.multiply(pairs[start].expert, first, rows, from.data(), columns, to.data());
        for (int64_t c = 0; c < columns; ++c) {
          for (int64_t r = 0; r < rows; ++r) out[pairs[start + c].token * H + first + r] += sums[c][r];
        }
      }
    }
  });
  return y;
}

// The experts of a routing: pairs sorted by expert, expert e owns bounds[e]..bounds[e+1].
Tensor few_rows_experts(const Tensor& x, const Tensor& token, Bounds bounds, const Tensor& weight,
                        at::TensorList gate_up, at::TensorList down) {
  const std::vector<Pair> pairs = unimoe::pairs_of(token, bounds, weight);
  return few_rows_swiglu(x.contiguous(), pairs, Stack(gate_up), Stack(down));
}

// A whole MoE layer: router [E', H] with a softmax and its k largest, as TopK (top_k.py) chooses and weighs them, then
// the experts. Those of the router behind the experts that have weights are null experts: they add nothing. Returns
// the output, and what a Routing holds: logits [T, E'], experts [T, k] and weights [T, k].
std::tuple<Tensor, Tensor, Tensor, Tensor> few_rows_moe(const Tensor& x_in, const Tensor& router, int64_t k, bool late,
                                                        bool renormalize, double scale, at::TensorList gate_up,
                                                        at::TensorList down) {
  const Tensor x = x_in.contiguous();
  const auto [logits, index, weight, pairs] = unimoe::route(x, router, k, late, renormalize, scale, down[0].size(0));
  return {few_rows_swiglu(x, pairs, Stack(gate_up), Stack(down)), logits, index, weight};
}

// ---------------------------------------------------------------- low-rank experts

constexpr int64_t kTokens = 128;   // whose rows stay in a core's cache while all experts pass by

// The rows of each expert, in order, of banks that hold `rank` rows of `width` floats for each of some experts.
std::vector<const float*> expert_rows(at::TensorList banks, int64_t rank, int64_t width) {
  std::vector<const float*> experts;
  for (const Tensor& bank : banks) {
    TORCH_CHECK(bank.is_contiguous() && bank.size(1) == width, "low_rank_experts: expected contiguous rows of ", width);
    const float* rows = bank.const_data_ptr<float>();
    for (int64_t row = 0; row + rank <= bank.size(0); row += rank) experts.push_back(rows + row * width);
  }
  return experts;
}

// u[n] = first_e x[token n], y[token n] += weight[n] * second_e^T u[n], for the pairs n of each expert e; y may be
// missing. Banks of first are [experts * rank, D], of second [experts * rank, P]; a token's experts are added in order.
// Returns u [N, rank].
Tensor low_rank_experts(const Tensor& x_in, const Tensor& token_in, Bounds bounds, const Tensor& weight_in,
                        at::TensorList first, at::TensorList second, int64_t rank, const Maybe& y) {
  const Tensor x = x_in.contiguous(), token = token_in.contiguous(), weight = weight_in.contiguous();
  const int64_t T = x.size(0), D = x.size(1), P = second[0].size(1), E = bounds.size() - 1;
  const auto A = expert_rows(first, rank, D), B = expert_rows(second, rank, P);
  TORCH_CHECK(std::ssize(A) == E && std::ssize(B) == E && (!y || (y->is_contiguous() && y->size(1) == P)) &&
                  weight.numel() == token.numel() && bounds.back() <= token.numel(),
              "low_rank_experts: these shapes do not fit each other");
  Tensor u = at::empty({token.size(0), rank}, x.options()), factors = at::empty_like(u);
  const int64_t* t = token.const_data_ptr<int64_t>();
  const float *in = x.const_data_ptr<float>(), *w = weight.const_data_ptr<float>();
  float *out_u = u.mutable_data_ptr<float>(), *factor = factors.mutable_data_ptr<float>();
  float* out = y ? y->mutable_data_ptr<float>() : nullptr;
  static const low_rank::Form form = low_rank::choose(at::get_cpu_capability());
  at::parallel_for(0, (T + kTokens - 1) / kTokens, 1, [&](int64_t begin, int64_t end) {
    std::array<const float*, kTokens> from, by;
    std::array<float*, kTokens> to_u, to_y;
    for (int64_t tile = begin; tile < end; ++tile) {
      for (int64_t e = 0; e < E; ++e) {
        const int64_t* own = t + bounds[e + 1];
        const int64_t* start = std::lower_bound(t + bounds[e], own, tile * kTokens);
        const int64_t count = std::lower_bound(start, own, (tile + 1) * kTokens) - start;
        TORCH_CHECK(count <= kTokens, "low_rank_experts: expected each token once for an expert, in order");
        for (int64_t i = 0; i < count; ++i) {
          const int64_t n = start - t + i;
          from[i] = in + t[n] * D, to_u[i] = out_u + n * rank, by[i] = factor + n * rank, to_y[i] = out + t[n] * P;
        }
        form.dots(A[e], rank, D, from.data(), count, to_u.data());
        for (int64_t n = start - t; n < start - t + count; ++n) {
          for (int64_t r = 0; r < rank; ++r) factor[n * rank + r] = w[n] * out_u[n * rank + r];
        }
        if (out) form.sums(B[e], rank, P, by.data(), count, to_y.data());
      }
    }
  });
  return u;
}

}  // namespace

TORCH_LIBRARY(unimoe, m) {
  m.def(
      "swiglu_forward(Tensor x, Tensor? token, int[] bounds, Tensor gate_up, Tensor down, Tensor[] adapters, "
      "float scale, Tensor? weight, Tensor(a!)? h, Tensor(b!) y, ScalarType fast) -> ()",
      &swiglu_forward);
  m.def(
      "swiglu_backward(Tensor x, Tensor? token, int[] bounds, Tensor gate_up, Tensor down, Tensor[] adapters, "
      "float scale, Tensor? weight, Tensor h, Tensor dy, Tensor(a!)? dx, Tensor(b!)? d_gate_up, "
      "Tensor(c!)? d_down, Tensor?[] d_adapters, Tensor(d!)? d_weight, ScalarType fast) -> ()",
      &swiglu_backward);
  m.def(
      "ffn_forward(Tensor x, Tensor? token, int[] bounds, Tensor[] stacks, bool relu, Tensor? weight, Tensor(a!)? h, "
      "Tensor(b!) y, ScalarType fast) -> ()",
      &ffn_forward);
  m.def(
      "ffn_backward(Tensor x, Tensor? token, int[] bounds, Tensor[] stacks, bool relu, Tensor? weight, Tensor h, "
      "Tensor dy, Tensor(a!)? dx, Tensor?[] d_stacks, Tensor(b!)? d_weight, ScalarType fast) -> ()",
      &ffn_backward);
  m.def(
      "low_rank_experts(Tensor x, Tensor token, int[] bounds, Tensor weight, Tensor[] first, Tensor[] second, int rank, "
      "Tensor(a!)? y) -> Tensor",
      &low_rank_experts);
  m.def("few_rows_rms_norm(Tensor x, Tensor weight, float eps) -> Tensor", &few_rows_rms_norm);
  m.def("few_rows_linear(Tensor x, Tensor[] weight, Tensor? bias) -> Tensor", &few_rows_linear);
  m.def(
      "few_rows_experts(Tensor x, Tensor token, int[] bounds, Tensor weight, Tensor[] gate_up, Tensor[] down) -> Tensor",
      &few_rows_experts);
  m.def(
      "few_rows_moe(Tensor x, Tensor router, int k, bool late, bool renormalize, float scale, Tensor[] gate_up, "
      "Tensor[] down) -> (Tensor, Tensor, Tensor, Tensor)",
      &few_rows_moe);
}
