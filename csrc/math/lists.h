// The list losses. Each gives, for one item of a group, a number that other items need (prepare),
// then the item's share of the loss and the derivative with respect to its score (finish). Both
// cost O(group). T is float on CUDA and double on the CPU.
#pragma once

#include <cmath>

#include "host_device.h"
#include "rlhf_fast/list_loss.h"
#include "sequences.h"

namespace rlhf_fast {

template <class T>
struct Group {
  const float* scores;
  const float* labels;
  const double* prepared;
  int64_t begin, end;
  T margin;

  RLHF_FAST_HD T score(int64_t i) const { return T(scores[i]); }
  RLHF_FAST_HD T label(int64_t i) const { return T(labels[i]); }
  RLHF_FAST_HD T number(int64_t i) const { return T(prepared[i]); }
  // Whether i stands at or behind k when the best label comes first.
  RLHF_FAST_HD bool behind(int64_t i, int64_t k) const {
    return labels[i] < labels[k] || (labels[i] == labels[k] && i >= k);
  }
};

// What one pair, or one item of a group, adds. Sums run over a whole group, so they are doubles on
// CUDA too: a long list would lose digits one addition after another.
template <class T>
struct Share {
  T value = T(0), grad = T(0);
};
using Total = Share<double>;

template <class T>
RLHF_FAST_HD T logistic(T x) {
  const T e = std::exp(x < T(0) ? x : -x);
  return x < T(0) ? e / (T(1) + e) : T(1) / (T(1) + e);
}

// log of a sum of exponentials, term by term
template <class T>
struct LogSum {
  T maximum = T(-INFINITY), sum = T(0);

  RLHF_FAST_HD void add(T x) {
    if (x > maximum) {
      sum = sum * std::exp(maximum - x) + T(1);
      maximum = x;
    } else if (x != T(-INFINITY)) {  // which adds nothing, also to nothing
      sum += std::exp(x - maximum);
    }
  }
  RLHF_FAST_HD T value() const { return maximum + std::log(sum); }
};

// Sum over pairs whose labels differ of weight(i, j) * phi(score of better - score of worse).
template <class Pairs>
struct Pairwise {
  template <class T>
  RLHF_FAST_HD static T prepare(const Group<T>&, int64_t) {
    return T(0);
  }
  template <class T>
  RLHF_FAST_HD static Total finish(const Group<T>& g, int64_t i) {
    Total share;
    for (int64_t j = g.begin; j < g.end; ++j) {
      if (g.labels[i] == g.labels[j]) continue;
      const bool better = g.labels[i] > g.labels[j];
      const T gap = better ? g.score(i) - g.score(j) : g.score(j) - g.score(i);
      const T weight = Pairs::weight(g, i, j);
      const Share<T> phi = Pairs::phi(g, gap);
      if (better) share.value += weight * phi.value;  // each pair once
      share.grad += better ? weight * phi.grad : -weight * phi.grad;
    }
    return share;
  }
  template <class T>
  RLHF_FAST_HD static T weight(const Group<T>&, int64_t, int64_t) {
    return T(1);
  }
};

// RankNet on DPO's scores, arXiv 2402.01878, equation 5: log(1 + e^-gap).
struct PairwiseLogistic : Pairwise<PairwiseLogistic> {
  template <class T>
  RLHF_FAST_HD static Share<T> phi(const Group<T>&, T gap) {
    const T tail = std::log1p(std::exp(gap < T(0) ? gap : -gap));
    return {gap < T(0) ? tail - gap : tail, -logistic(-gap)};
  }
};

// RRHF, arXiv 2304.05302, equation 2 with margin 0; SLiC's rank loss with one: max(0, margin -
// gap).
struct PairwiseHinge : Pairwise<PairwiseHinge> {
  template <class T>
  RLHF_FAST_HD static Share<T> phi(const Group<T>& g, T gap) {
    if (gap >= g.margin) return {};
    return {g.margin - gap, T(-1)};
  }
};

// LiPO-lambda, arXiv 2402.01878, equation 8: the logistic loss weighted by what swapping the two
// would change of the discounted gain, |2^label_i - 2^label_j| |1/log(1 + rank_i) - 1/log(1 +
// rank_j)|, ranks by score. The weights carry no gradient.
struct LipoLambda : Pairwise<LipoLambda> {
  template <class T>
  RLHF_FAST_HD static T prepare(const Group<T>& g, int64_t i) {  // 1 / log(1 + rank)
    int64_t rank = 1;
    for (int64_t j = g.begin; j < g.end; ++j) {
      rank += g.scores[j] > g.scores[i] || (g.scores[j] == g.scores[i] && j != i && g.behind(i, j));
    }
    return T(1) / std::log1p(T(rank));
  }
  template <class T>
  RLHF_FAST_HD static T weight(const Group<T>& g, int64_t i, int64_t j) {
    const T gain = std::exp2(g.label(i)) - std::exp2(g.label(j));
    const T discount = g.number(i) - g.number(j);
    const T product = gain * discount;
    return product < T(0) ? -product : product;
  }
  template <class T>
  RLHF_FAST_HD static Share<T> phi(const Group<T>& g, T gap) {
    return PairwiseLogistic::phi(g, gap);
  }
};

// Plackett-Luce, that is ListMLE, arXiv 2402.01878, equation 7, best first: -sum_k log(e^s_k / sum
// of e^s_i over i behind k). K-wise reward models: arXiv 2301.11270.
struct PlackettLuce {
  template <class T>
  RLHF_FAST_HD static T prepare(const Group<T>& g, int64_t k) {
    LogSum<T> sum;
    for (int64_t i = g.begin; i < g.end; ++i) {
      if (g.behind(i, k)) sum.add(g.score(i));
    }
    return sum.value();
  }
  template <class T>
  RLHF_FAST_HD static Total finish(const Group<T>& g, int64_t i) {
    double chance = 0.0;
    for (int64_t k = g.begin; k < g.end; ++k) {
      if (g.behind(i, k)) chance += std::exp(g.score(i) - g.number(k));
    }
    return {g.number(i) - g.score(i), chance - 1.0};
  }
};

// PRO, arXiv 2306.17492, equations 7 to 9: -sum_k log(e^{s_k t_kk} / sum_{i at or behind k} e^{s_i
// t_ki}), t_ki = label_k - label_i the inverse temperatures, t_kk the greatest of them; all items
// but the last one.
struct Pro {
  template <class T>
  RLHF_FAST_HD static T inverse_temperature(const Group<T>& g, int64_t k, int64_t i) {
    if (i != k) return g.label(k) - g.label(i);
    T lowest = g.label(k);
    for (int64_t j = g.begin; j < g.end; ++j) {
      lowest = g.label(j) < lowest ? g.label(j) : lowest;
    }
    return g.label(k) - lowest;
  }
  template <class T>
  RLHF_FAST_HD static T prepare(const Group<T>& g, int64_t k) {
    LogSum<T> sum;
    for (int64_t i = g.begin; i < g.end; ++i) {
      if (g.behind(i, k)) sum.add(g.score(i) * inverse_temperature(g, k, i));
    }
    return sum.value();
  }
  template <class T>
  RLHF_FAST_HD static Total finish(const Group<T>& g, int64_t i) {
    const T own = inverse_temperature(g, i, i);
    Total share{g.number(i) - g.score(i) * own, -own};
    for (int64_t k = g.begin; k < g.end; ++k) {
      if (!g.behind(i, k)) continue;
      const T t = k == i ? own : inverse_temperature(g, k, i);
      share.grad += t * std::exp(g.score(i) * t - g.number(k));
    }
    return share;
  }
};

template <class T>
RLHF_FAST_HD T prepare_item(ListLoss loss, const Group<T>& g, int64_t i) {
  switch (loss) {
#define RLHF_FAST_ROW(name, Formula) \
  case ListLoss::name: return Formula::prepare(g, i);
    RLHF_FAST_LIST_LOSSES(RLHF_FAST_ROW)
#undef RLHF_FAST_ROW
  }
  return T(0);
}

template <class T>
RLHF_FAST_HD Total finish_item(const ListInputs& in, const Group<T>& g, int64_t i) {
  Total share;
  switch (in.loss) {
#define RLHF_FAST_ROW(name, Formula) \
  case ListLoss::name: share = Formula::finish(g, i); break;
    RLHF_FAST_LIST_LOSSES(RLHF_FAST_ROW)
#undef RLHF_FAST_ROW
  }
  bool is_best = in.nll_weight != 0.0f;
  for (int64_t j = g.begin; is_best && j < g.end; ++j) is_best = g.behind(j, i);
  if (is_best) {
    share.value -= T(in.nll_weight) * g.score(i);
    share.grad -= in.nll_weight;
  }
  return {in.scale * share.value, in.scale * share.grad};
}

template <class T>
RLHF_FAST_HD Group<T> group_of(const ListInputs& in, const ListOutputs& out, Span span) {
  return {in.scores, in.labels, out.workspace, span.begin, span.end, T(in.margin)};
}

}  // namespace rlhf_fast
