// What the operators of native.cpp and packed.cpp share: pairs of a routing, and a router's choice for few rows.

#pragma once

#include <ATen/ATen.h>

#include <algorithm>
#include <cmath>
#include <numeric>
#include <optional>
#include <vector>

namespace unimoe {

// Products of few rows (native.cpp): x [..., K], weight [P, K] in a list of one, bias [P].
at::Tensor few_rows_linear(const at::Tensor& x, at::TensorList weight, const std::optional<at::Tensor>& bias);

struct Pair {
  int64_t expert, token;
  float weight;
};

// The pairs of a routing, sorted by expert: expert e owns bounds[e]..bounds[e+1].
inline std::vector<Pair> pairs_of(const at::Tensor& token, at::IntArrayRef bounds, const at::Tensor& weight) {
  const at::Tensor token_N = token.contiguous(), weight_N = weight.contiguous();
  const int64_t* t = token_N.const_data_ptr<int64_t>();
  const float* w = weight_N.const_data_ptr<float>();
  std::vector<Pair> pairs;
  for (int64_t e = 0; e + 1 < static_cast<int64_t>(bounds.size()); ++e) {
    for (int64_t n = bounds[e]; n < bounds[e + 1]; ++n) pairs.push_back({e, t[n], w[n]});
  }
  return pairs;
}

struct Routed {
  at::Tensor logits, index, weight;  // [T, E'], [T, k], [T, k]
  std::vector<Pair> pairs;           // of the first `experts` experts, sorted by expert
};

// The choice of a router [E', H] with a softmax and its k largest, as TopK (top_k.py) chooses and weighs them. late:
// the softmax is over the chosen; otherwise over all.
inline Routed route(const at::Tensor& x, const at::Tensor& router, int64_t k, bool late, bool renormalize, double scale,
                    int64_t experts) {
  const at::Tensor logits = few_rows_linear(x, {router}, {});
  const int64_t T = logits.size(0), E = logits.size(1);
  const at::Tensor index = at::empty({T, k}, x.options().dtype(at::kLong)), weight = at::empty({T, k}, x.options());
  std::vector<Pair> pairs;
  std::vector<int64_t> order(E);
  std::vector<float> score(E);
  for (int64_t t = 0; t < T; ++t) {
    const float* logit = logits.const_data_ptr<float>() + t * E;
    std::iota(order.begin(), order.end(), 0);
    std::stable_sort(order.begin(), order.end(), [&](int64_t a, int64_t b) { return logit[a] > logit[b]; });
    float all = 0, chosen = 0;
    for (int64_t i = 0; i < E; ++i) {
      score[i] = std::exp(logit[order[i]] - logit[order[0]]);
      all += score[i];
      if (i < k) chosen += score[i];
    }
    const float sum = late || renormalize ? chosen : all;
    for (int64_t i = 0; i < k; ++i) {
      const float w = static_cast<float>(scale) * score[i] / sum;
      index.mutable_data_ptr<int64_t>()[t * k + i] = order[i];
      weight.mutable_data_ptr<float>()[t * k + i] = w;
      if (order[i] < experts) pairs.push_back({order[i], t, w});
    }
  }
  std::stable_sort(pairs.begin(), pairs.end(), [](const Pair& a, const Pair& b) { return a.expert < b.expert; });
  return {logits, index, weight, pairs};
}

}  // namespace unimoe
